"""The stages of gpu_check.py that run other programs of the project, or need an export of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_common import PROMPTS, ROOT, STEPS, Check, Figures, free, teacher_folder, wall_ms

EXPORTS = Path(os.environ.get("EXPORTS", "/tmp/tiue-gpu-check-exports"))
OPSETS = (21, 23)
"""Operator sets that exports are compared in: from 23 on, self-attention is one operator."""
OPTIONS = ("", "graphs", "graphs,nhwc", "graphs,nhwc,search", "search")
"""Ways to run ONNX Runtime's CUDA provider, as TIUE_ORT_CUDA names them."""
TESTS_S = 180.0
TESTS = (
    "tests/gpu/test_torch_gpu.py",
    "tests/model/test_triton_kernels.py",
    "tests/gpu/test_distill_gpu.py",
    "tests/gpu/test_onnx_gpu.py",
    "tests/backends/test_trt_gpu.py",
)
"""In order of worth, by their places: collecting the whole suite takes longer than running these."""


def doctor(check: Check) -> None:
    """What ``tiue doctor`` says of the machine: GPU, driver, and where CUDA, cuDNN and TensorRT were found."""
    done = program(check, ["-m", "tiue_cli", "doctor", "--format", "json"], seconds=60)
    if isinstance(done, str):
        check.put("doctor", value=done)
        return
    try:
        said: Any = json.loads(done.stdout)
    except json.JSONDecodeError:
        said = (done.stdout + done.stderr)[-1500:]
    check.put("doctor", value={"status": done.returncode, "said": said})


def tests(check: Check) -> None:
    """The tests that need a GPU; where time runs out, what was said until then counts."""
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", "-rfEs", "--durations=5"]
    limit = max(20.0, min(TESTS_S, check.ends - time.time()))
    command += ["--maxfail=8", "-m", "not slow", *(TESTS[:1] if check.cpu else TESTS)]
    log = check.out / "gpu_tests.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=limit)
            status: int | str = done.returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
    said = log.read_text(encoding="utf-8", errors="replace")
    counts = {
        word.lower(): len(re.findall(rf"::.* {word}\b", said)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")
    }
    last = (said.strip().splitlines() or ["nothing was said"])[-1]
    reasons = sorted({line[:200] for line in said.splitlines() if line.startswith("SKIPPED")})
    check.put(
        "tests",
        value={"status": status, **counts, "last": last[:300], "failures": failures(said), "skipped for": reasons},
    )


def failures(text: str) -> list[str]:
    """Of pytest's summary."""
    return [line[:200] for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))][:20]


def bench(check: Check) -> None:
    """``tiue bench``: student, the authors' K-fold scheme and the 25-step teacher in turns, as its protocol says."""
    what = (
        ["papercut", "--teacher-steps", "3"]
        if check.cpu
        else [check.shape, "--random-weights", "--teacher-steps", "25"]
    )
    options = ["--steps", str(STEPS), "--batch", "1", "--duration", "0.2" if check.cpu else "4", "--backend", "torch"]
    command = ["-m", "tiue_cli", "bench", *what, *options, "--out", str(check.out / "bench"), "--format", "json"]
    done = program(check, command, seconds=150)
    if isinstance(done, str):
        check.put("bench", value=done)
        return
    value: Figures = {"status": done.returncode, "said": done.stderr[-400:]}
    for file in (check.out / "bench").glob("*.md"):
        value["report"] = file.name
    check.put("bench", value=value)


def onnx(check: Check) -> None:
    """ONNX Runtime: each option of its CUDA provider and both operator sets, prompts to pixels, against the default."""
    problem = None if check.cpu else onnx_problem()
    if problem is not None:
        check.put("onnx", value=f"skipped: {problem}")
        return
    images: dict[int, Any] = {}
    for opset in OPSETS:
        folder = export_folder(check, opset)
        if isinstance(folder, str):
            check.put("onnx", f"opset {opset}", value=folder)
            continue
        for words in OPTIONS if opset == OPSETS[0] else OPTIONS[:2]:
            if not check.has(30):
                check.put("onnx", f"opset {opset}, {words or 'default'}", value="no time left")
                continue
            try:
                onnx_row(check, folder, opset, words, images)
            except Exception as failure:  # noqa: BLE001  # the other ways go on
                check.put(
                    "onnx",
                    f"opset {opset}, {words or 'default'}",
                    value=f"{type(failure).__name__}: {str(failure)[:300]}",
                )
            free(check)


def onnx_problem() -> str | None:
    """Why ONNX Runtime does not run on CUDA here; None where it does."""
    from tiue_cli.backends.onnx_session import provider_problem
    from tiue_cli.errors import MissingDependencyError

    try:
        return provider_problem("cuda")
    except MissingDependencyError as error:
        return error.message


def onnx_row(check: Check, folder: Path, opset: int, words: str, images: dict[int, Any]) -> None:
    """Open the export one way and time it at each batch; ``images`` are the first way's, to compare with."""
    from tiue_cli.backends import onnx_backend
    from tiue_cli.backends.onnx_session import Provider, read_cuda_options
    from tiue_cli.export.tolerance import psnr_db
    from tiue_cli.model.noise import draw_noise

    cuda = read_cuda_options(words)
    backend = onnx_backend.OnnxBackend(folder, provider="cpu" if check.cpu else "cuda", cuda=cuda)
    if check.cpu:  # its binding is rehearsed, without anything being recorded
        backend.provider = Provider("cpu", cuda=cuda)
    with backend:
        for batch in check.batches:
            if not check.has(8):
                continue
            prompts = [PROMPTS[row % len(PROMPTS)] for row in range(batch)]
            noise = draw_noise(range(batch), backend.latent_shape(backend.default_size))
            started = time.perf_counter()
            drawn = backend.generate(prompts, noise)
            first_s = time.perf_counter() - started
            wall = wall_ms(lambda prompts=prompts, noise=noise: backend.generate(prompts, noise), least=5)
            row: Figures = {"wall_ms": wall, "first_s": round(first_s, 2), "notes": list(backend.notes)}
            row["psnr_db"] = round(float(psnr_db(drawn, images.setdefault(batch, drawn))), 1)
            check.put("onnx", f"opset {opset}, {words or 'default'}, batch {batch}", value=row)


def export_folder(check: Check, opset: int) -> Path | str:
    """The export that was made beside the other stages, waited for while there is time; else why there is none."""
    if check.cpu:
        sys.path.insert(0, str(ROOT / "tests" / "support"))
        from tiny_export import write_tiny_export

        folder = check.out / f"tiny-{opset}"
        if not folder.exists():
            write_tiny_export(folder, precision="fp32")
        return folder
    folder = EXPORTS / f"opset{opset}"
    while not (folder / "manifest.json").is_file():
        if not check.has(60):
            return "skipped: not exported in time"
        if (EXPORTS / "failed").is_file():
            return f"skipped: {(EXPORTS / 'failed').read_text(encoding='utf-8')[-300:]}"
        time.sleep(1)
    return folder


def make_exports() -> int:
    """Export a student of random weights in both operator sets, unchecked, on the CPU: a process beside the stages."""
    from tiue_cli.model.student import save_student, student_from_teacher

    EXPORTS.mkdir(parents=True, exist_ok=True)
    (EXPORTS / "failed").unlink(missing_ok=True)
    student = EXPORTS / "student"
    if not student.exists():
        save_student(student_from_teacher(teacher_folder(cpu=False), steps=STEPS), student)
    for opset in OPSETS:
        target = EXPORTS / f"opset{opset}"
        if (target / "manifest.json").is_file():
            continue
        options = ["--precision", "fp16", "--size", "512", "--opset", str(opset), "--no-check", "--out", str(target)]
        command = [sys.executable, "-m", "tiue_cli", "export", str(student), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            (EXPORTS / "failed").write_text(done.stderr[-1000:], encoding="utf-8")
            return 1
    return 0


def start_exports() -> subprocess.Popen[bytes] | None:
    """Begin ``make_exports`` at low priority; None where nothing could run the exports."""
    if onnx_problem() is not None:
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}
    command = ["nice", "-n", "10", sys.executable, str(Path(__file__).with_name("gpu_check.py")), "--make-exports"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tensorrt(check: Check) -> None:
    """Export, build, compare and time with TensorRT and ONNX Runtime: tensorrt_check.py, where it is installed."""
    if check.cpu or importlib.util.find_spec("tensorrt") is None:
        reason = "TensorRT needs a GPU" if check.cpu else "TensorRT is not installed (pip install tiue[trt])"
        check.put("tensorrt", value=f"skipped: {reason}; for 8.6: benchmarks/trt86_check.py")
        return
    command = [str(ROOT / "benchmarks" / "tensorrt_check.py"), "--no-tests", "--out", str(check.out)]
    done = program(check, command, seconds=600)
    check.put(
        "tensorrt", value=done if isinstance(done, str) else {"status": done.returncode, "said": done.stdout[-2000:]}
    )


def program(check: Check, command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str] | str:
    """Run Python with ``command`` within ``seconds`` and the time that is left; in words where that did not suffice."""
    limit = max(10.0, min(seconds, check.ends - time.time()))
    try:
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
