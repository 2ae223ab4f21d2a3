"""The script for the owner of a GPU, run from end to end on the fakes: it must work the first time it is needed."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import onnx
import pytest
from exports import build_small_student, export_copy
from tiny_export import write_tiny_export

from tiue_cli.backends import onnx_backend
from tiue_cli.backends.onnx_session import Provider
from tiue_cli.cli.app import main

ROOT = Path(__file__).resolve().parent.parent


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load(monkeypatch, "tensorrt_check")

    def in_process(*arguments: str) -> dict[str, Any]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = main([*arguments, "--format", "json"])
        if status != 0:
            raise RuntimeError(errors.getvalue())
        return json.loads(out.getvalue())

    monkeypatch.setattr(module, "tiue", in_process)
    for name, value in (("WARM_UP", 1), ("RUNS", 3), ("MIN_SECONDS", 0.0)):
        monkeypatch.setattr(module, name, value)
    # Where there is no GPU, ONNX Runtime's CUDA provider is played by its CPU provider.
    monkeypatch.setattr(onnx_backend, "choose_provider", lambda asked, **rest: Provider("cpu"))
    return module


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_tensorrt.State:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch)


def run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    write_tiny_export(tmp_path / "tiny")
    status = script.main(["--export", str(tmp_path / "tiny"), "--out", str(tmp_path), "--no-tests"])
    capsys.readouterr()
    (written,) = tmp_path.glob("tiny_*.json")
    text = written.with_suffix(".md").read_text(encoding="utf-8")
    return status, json.loads(written.read_text(encoding="utf-8")), text


def test_the_whole_script_writes_a_report(
    script: ModuleType, cuda: fake_tensorrt.State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report, text = run(script, tmp_path, capsys)
    steps = {step["name"]: step for step in report["steps"]}
    assert status == 0 and {step["status"] for step in report["steps"]} == {"ok", "skipped"}, report["steps"]
    assert steps["build"]["detail"]["parity"]["image_psnr_db"] == 100.0
    assert set(steps["compare"]["detail"]) == {"onnx cpu", "onnx cuda", "trt", "trt without CUDA graphs"}
    assert set(steps["time trt"]["detail"]) == {"1", "4", "16"}
    assert steps["time trt"]["detail"]["16"]["median_ms"] > 0
    assert "whole process trt" in steps and "| trt without CUDA graphs |" in text
    assert report["machine"]["packages"]["numpy"] is not None


def test_a_wrong_engine_fails_the_script_and_the_report_says_so(
    script: ModuleType, cuda: fake_tensorrt.State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.spoil = lambda name, value: value * 0 if name == "mid" else value
    status, report, text = run(script, tmp_path, capsys)
    steps = {step["name"]: step for step in report["steps"]}
    assert status == 1 and steps["build"]["status"] == "failed" and "mid" in steps["build"]["detail"]
    assert "| build | failed |" in text


@pytest.mark.slow  # an export of a small student
def test_an_engine_for_adapters_is_built_refitted_and_timed(
    script: ModuleType, cuda: fake_tensorrt.State, tiny_student_folder: Path, tmp_path: Path
) -> None:
    student = build_small_student(tiny_student_folder, tmp_path / "student")
    folder = export_copy(student, tmp_path / "small", precision="fp32", sizes=((16, 12),), check=False)
    figures = script.refit(str(student), folder, tmp_path, device="cpu")
    assert figures["psnr_db"] >= 60.0
    assert all(figures[name] >= 0 for name in ("build_s", "first_s", "off_s", "on_again_s"))
    assert len(cuda.refits) >= 3


def test_tests_that_run_out_of_time_leave_what_they_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load(monkeypatch, "gpu_check")

    def run(command: list[str], *, stdout: Any, timeout: float, **rest: Any) -> None:
        stdout.write("tests/gpu/test_a.py::test_one PASSED [ 3%]\ntests/gpu/test_a.py::test_two[fp16] FAILED [ 6%]\n")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(module.subprocess, "run", run)
    options = module.argparse.Namespace(cpu=True, ends=module.time.time() + 60, out=tmp_path)
    module.tests(module.Check(options))
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["tests"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 0)
    assert found["status"].startswith("stopped after")


def make_check(module: ModuleType, out: Path, *, seconds: float = 300) -> Any:
    return module.Check(module.argparse.Namespace(cpu=True, ends=module.time.time() + seconds, out=out))


def written(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))
    return found


def test_onnx_runtime_is_rehearsed_with_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load(monkeypatch, "gpu_check")
    monkeypatch.setattr(sys.modules["gpu_commands"], "wall_ms", lambda run, **_: run() is None or 1.0)
    module.onnx(make_check(module, tmp_path))
    rows = written(tmp_path)["onnx"]
    ways = ["21, default", "21, graphs", "21, graphs,nhwc", "21, graphs,nhwc,search", "21, search", "23, default"]
    assert [f"opset {way}, batch {batch}" for way in ways for batch in (1, 2)] == list(rows)[:12]
    assert all(row["psnr_db"] >= 60 for row in rows.values()), rows
    assert "| opset 21, graphs, batch 2 |" in (tmp_path / "gpu_check.md").read_text(encoding="utf-8")


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load(monkeypatch, "gpu_check")
    check = make_check(module, tmp_path)
    module.tensorrt(check)
    check.cpu = False
    module.onnx(check)
    check.cpu = True

    def late(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(module.subprocess, "run", late)
    module.bench(check)
    module.doctor(check)
    found = written(tmp_path)
    assert "TensorRT needs a GPU" in found["tensorrt"]
    assert found["onnx"].startswith("skipped: ") or isinstance(found["onnx"], dict)
    assert found["bench"] == "stopped after 150 s" and found["doctor"] == "stopped after 60 s"


def test_without_tiue_the_shell_script_says_what_to_do(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh")],
        capture_output=True,
        encoding="utf-8",
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        check=False,
    )
    assert done.returncode == 1 and "gpu_check.sh --install" in done.stderr


def test_the_check_with_tensorrt_8_6_runs_from_its_two_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(monkeypatch, "trt86_check")
    monkeypatch.setattr(module, "RUNS", 2)
    write_tiny_export(tmp_path / "tiny", sizes=((32, 32),))
    assert module.main(["prepare", str(tmp_path / "tiny"), str(tmp_path / "out")]) == 0
    for name in module.GRAPHS:
        model = onnx.load(tmp_path / "out" / f"{name}.onnx")
        assert [one.version for one in model.opset_import] == [17]
    state = fake_tensorrt.install(monkeypatch, version="8.6.1")
    assert module.main(["run", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["failed"] == [] and report["tensorrt"] == "8.6.1"
    assert all(found["psnr_db"] == 98.13 and found["captures"] == 1 for found in report["images"].values())
    assert not state.cudart.allocations
    state.spoil = lambda name, value: value * 0 if name == "mid" else value
    assert module.main(["run", str(tmp_path / "out")]) == 1
    capsys.readouterr()


def test_the_check_with_tensorrt_8_6_is_python_3_9() -> None:
    ast.parse((ROOT / "benchmarks" / "trt86_check.py").read_text(encoding="utf-8"), feature_version=(3, 9))


def test_a_pass_that_is_one_piece_has_a_row_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"text": 1.0, "unet_encoder": 2.0, "unet_decoder": 3.0, "vae": 4.0}
    in_stages = {"wall_ms": 10.5, "stage_ms": stages, "floor_ms": stages, "share_of_peak": 0.5, "first_s": 0.1}
    whole = {**in_stages, "wall_ms": 9.5, "stage_ms": {"whole": 9.0}}
    text = load(monkeypatch, "gpu_report").markdown({"pass": {"default": in_stages, "one graph": whole}})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "| 10.5 | 1.0 (floor 1.0) | 2.0 (floor 2.0) |" in rows["default"]
    assert "| 9.5 |  |  |  |  | 50 % |" in rows["one graph"]


def test_wheels_for_another_python_are_left_out_with_a_note(tmp_path: Path) -> None:
    for name in ("benchmarks/gpu_check.sh", "benchmarks/gpu_check.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("print('checked')" if name.endswith("py") else (ROOT / name).read_text())
    (tmp_path / ".whl").mkdir()
    for name in ("a-1.0-py3-none-any.whl", "b-1.0-cp27-cp27m-win32.whl"):
        (tmp_path / ".whl" / name).write_bytes(b"")
    done = subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / "gpu_check.sh")],
        capture_output=True,
        encoding="utf-8",
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr
    assert "wheels in .whl/ are for another Python" in done.stderr
