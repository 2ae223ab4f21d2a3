"""``tiue export --trt`` and ``tiue generate --backend trt`` as a user types them, on the fakes."""

from __future__ import annotations

import json
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from PIL import Image
from tiny_export import write_tiny_export

from tiue_cli.backends import cuda as cuda_calls
from tiue_cli.backends import trt_device
from tiue_cli.cli.app import main
from tiue_cli.errors import UsageError
from tiue_cli.export.config import EngineRequest, ExportConfig
from tiue_cli.files.engines import ENGINE_MANIFEST

ENGINE = "nvidia-fake-4090-trt10.8.0.43-fp16"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_tensorrt.State:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def export(cuda: fake_tensorrt.State, tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "tiny")
    return tmp_path / "tiny"


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and sum(line.startswith("error:") for line in lines) == 1 and "Traceback" not in err
    assert lines[-1].startswith("hint:") and lines[-2].startswith("error:"), err
    return "\n".join(lines[-2:])


def test_an_export_gets_an_engine_and_the_next_command_works(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--trt"]) == 0
    out, err = capsys.readouterr()
    assert "unet_decoder" in out and "images: 100.0 dB against ONNX Runtime (cpu), 35 needed" in out
    assert "build text_encoder" in err and "compare: images" in err
    folder, following = out.splitlines()[-2:]
    assert folder == str(export / ENGINE) and following.startswith(f"next: tiue generate --model {export / ENGINE}")
    arguments = ["a red heart", "--seed", "3", "--size", "32"]
    assert main(["generate", "--model", folder, *arguments, "--out", "trt.png"]) == 0
    assert main(["generate", "--model", str(export), *arguments, "--backend", "onnx", "--out", "onnx.png"]) == 0
    assert main(["generate", "--model", str(export), *arguments, "--backend", "trt", "--out", "again.png"]) == 0
    pictures = [np.asarray(Image.open(name)) for name in ("trt.png", "onnx.png", "again.png")]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def test_json_is_one_document_and_quiet_is_the_folder(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--trt", "--batch", "1:2:3", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    engine = json.loads(out)["engine"]
    assert engine["folder"] == str(export / ENGINE) and not engine["reused"] and err == ""
    assert [profile["batch"] for profile in engine["manifest"]["profiles"]] == [[1, 2, 3]]
    assert main(["export", str(export), "--trt", "--batch", "1:2:3", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == f"{export / ENGINE}\n"


def test_overwrite_builds_anew(export: Path, cuda: fake_tensorrt.State, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--trt"]) == 0
    assert main(["export", str(export), "--trt"]) == 0
    assert "exists already" in capsys.readouterr().err and len(cuda.workspaces) == 4
    assert main(["export", str(export), "--trt", "--overwrite"]) == 0
    assert len(cuda.workspaces) == 8


def test_batches_follow_the_engine_where_none_is_asked_for(
    export: Path, cuda: fake_tensorrt.State, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(export), "--trt", "--batch", "1:2:3", "--format", "quiet"]) == 0
    cuda.executed.clear()
    assert main(["generate", "a", "--images", "7", "--seed", "0", "--model", str(export), "--backend", "trt"]) == 0
    assert cuda.executed.count("vae_decoder") == 3, "3 + 3 + 1 images"
    capsys.readouterr()
    arguments = ["a", "--images", "7", "--seed", "0", "--model", str(export), "--backend", "trt", "--overwrite"]
    assert main(["generate", *arguments, "--batch", "5"]) == 1
    assert "batch 5 is outside 1 to 3" in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--batch", "1:4:16"], 2, "--batch is for TensorRT engines"),
        (["--profile", "papercut"], 2, "--profile is for TensorRT engines"),
        (["--trt", "--batch", "16:4:1"], 2, "does not hold"),
        (["--trt", "--profile", "sd15-512"], 1, "Stable Diffusion 1.x"),
        (["--trt", "--profile", "papercut", "--batch", "1"], 2, "both given"),
        (["--trt", "--profile", "none"], 2, "sd21-512"),
        (["--trt", "--precision", "fp32"], 2, "--precision is for making one"),
        (["--trt", "--size", "64"], 2, "--size is for making one"),
    ],
)
def test_what_cannot_be_is_one_error(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["export", str(export), *arguments]) == status
    assert message in one_error(capsys)
    assert not (export / ENGINE).exists()


@pytest.mark.parametrize("command", ["export {export} --trt", "generate a --seed 1 --model {export} --backend trt"])
def test_without_tensorrt_there_is_one_error_with_the_install(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(trt_device, "missing_packages", lambda: [trt_device.tensorrt_requirement()])
    assert main(command.format(export=export).split()) == 1
    assert "pip install 'tensorrt-cu12>=10.8,<12'" in one_error(capsys)
    for module in (trt_device, cuda_calls):
        monkeypatch.setattr(module, "driver_library", lambda: None)
    assert main(command.format(export=export).split()) == 1
    found = one_error(capsys)
    assert "needs an NVIDIA GPU" in found and "pip install" in found


def test_without_tensorrt_a_wrong_profile_name_is_said_first(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_device, "driver_library", lambda: None)
    assert main(["export", str(export), "--trt", "--profile", "none"]) == 2
    assert "there is no profile 'none'" in one_error(capsys)


def test_a_failed_build_fails_the_command_and_leaves_the_export(
    export: Path, cuda: fake_tensorrt.State, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.spoil = lambda name, value: value[::-1].copy() if name == "images" and len(value) > 1 else value
    assert main(["export", str(export), "--trt", "--format", "quiet"]) == 1
    assert "vae_decoder: images" in one_error(capsys)
    assert sorted(path.name for path in export.iterdir() if path.is_dir()) == []


def test_a_flipped_byte_in_a_plan_is_one_error(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--trt", "--format", "quiet"]) == 0
    capsys.readouterr()
    plan = export / ENGINE / "unet_encoder.plan"
    data = bytearray(plan.read_bytes())
    data[-1] ^= 255
    plan.write_bytes(data)
    assert main(["generate", "a", "--seed", "1", "--model", str(export), "--backend", "trt"]) == 1
    assert "unet_encoder.plan is not the plan that was built" in one_error(capsys)


def test_inspect_shows_an_engine(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--trt", "--format", "quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(export / ENGINE)]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA Fake 4090" in out and "TensorRT 10.8.0.43" in out and "batch-1-4-16" in out
    assert (export / ENGINE / ENGINE_MANIFEST).is_file()


# --- what an engine wants of its export ----------------------------------------------------------------------------


def test_an_engine_wants_fp16_and_fixed_sizes_unless_told_otherwise() -> None:
    plain = ExportConfig(student="student")
    fitted = EngineRequest().fit(plain, precision=None)
    assert (fitted.precision, fitted.sizes, fitted.fixed) == ("fp16", (), True)
    asked = EngineRequest().fit(ExportConfig(student="student", sizes=((64, 96),)), precision="fp32")
    assert (asked.precision, asked.sizes, asked.fixed) == ("fp32", ((64, 96),), False)
    profile = EngineRequest(profile="sd15-512").fit(plain, precision=None)
    assert (profile.precision, profile.sizes, profile.fixed) == ("fp16", ((512, 512),), False)
    with pytest.raises(UsageError, match="both given"):
        EngineRequest(profile="sd15-512", batches=((1, 1, 1),)).fit(plain, precision=None)


def test_a_range_of_sizes_wants_free_graphs(tmp_path: Path) -> None:
    file = tmp_path / "ranged.toml"
    file.write_text(
        'format_version = 1\nprecision = "fp32"\n[model]\nfamily = "any"\n'
        '[[profile]]\nname = "p"\nbatch = 1\nsteps = 4\nsize = "256:512:768"\n',
        encoding="utf-8",
    )
    fitted = EngineRequest(profile=str(file)).fit(ExportConfig(student="student"), precision=None)
    assert (fitted.precision, fitted.sizes, fitted.fixed) == ("fp32", (), False)
