"""Build, compare and time an export on an NVIDIA GPU, and write a report; gpu_check.py runs it.

Every step is recorded, failed ones with their reason; the rest goes on. Exit status 1 where one failed.

What is timed: ``Backend.generate`` from prompts to pixels in main memory (tokenizer, text encoder, UNet, VAE, and both
copies), warm, each run waited for. What is not: loading, and the first runs of a shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from tiue_cli import __version__
from tiue_cli.backends.base import Backend
from tiue_cli.backends.trt_device import require_tensorrt
from tiue_cli.base.machine import machine_info, package_version
from tiue_cli.errors import TiueError
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.files.manifests import write_json
from tiue_cli.model.noise import draw_noise

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red heart above a blue house", "a yellow star at night")
BATCHES = (1, 4, 16)
REQUIRED_DB = 35.0
WARM_UP, RUNS, MIN_SECONDS = 3, 20, 2.0
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
LORA_STD = 0.05
LIBRARIES = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-cu12", "polygraphy", "onnx")

OpenBackend = Callable[[], AbstractContextManager[Backend]]


@dataclass
class Step:
    """One thing that was tried: ``status`` is ok, failed or skipped."""

    name: str
    status: str
    seconds: float
    detail: Any


@dataclass
class Report:
    """What was found out, in order."""

    model: str
    machine: dict[str, Any]
    tiue: str = __version__
    day: str = field(default_factory=lambda: date.today().isoformat())
    steps: list[Step] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Do one step and keep what it returns, or why it failed; returns None where it failed."""
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        try:
            status, detail = "ok", work()
        except (TiueError, subprocess.SubprocessError, OSError, RuntimeError, ValueError, AssertionError) as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
        self.steps.append(Step(name, status, round(time.perf_counter() - started, 2), detail))
        print(f"   {status}: {json.dumps(detail)[:300]}", flush=True)
        return detail if status == "ok" else None

    def skip(self, name: str, reason: str) -> None:
        """Say why a step was not tried."""
        print(f"== {name}\n   skipped: {reason}", flush=True)
        self.steps.append(Step(name, "skipped", 0.0, reason))

    @property
    def failed(self) -> list[str]:
        """Names of the steps that failed."""
        return [step.name for step in self.steps if step.status == "failed"]


# --- steps ---------------------------------------------------------------------------------------------------------


def gpu_tests() -> str:
    """Run the tests that need a GPU; the last line of pytest. Raises RuntimeError where one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1]
    if done.returncode not in (0, 5):  # 5: no test has the marker
        raise RuntimeError(f"{last}\n{done.stdout[-1500:]}")
    return last


def tiue(*arguments: str) -> dict[str, Any]:
    """A tiue command's JSON document. Raises RuntimeError with its error."""
    command = [sys.executable, "-m", "tiue_cli", *arguments, "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(" ".join(done.stderr.split())[-800:])
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def random_sd15(work: Path) -> str:
    """A student of Stable Diffusion 1.5's shapes with random weights."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from helpers import build_full_size_folder

    from tiue_cli.model.student import save_student, student_from_teacher

    folder = work / "sd15-student"
    if not folder.exists():
        build_full_size_folder(work / "sd15-teacher")
        save_student(student_from_teacher(work / "sd15-teacher", steps=4), folder)
    return str(folder)


def build(source: str, folder: Path, *, profile: str | None) -> dict[str, Any]:
    """Export (unless the folder is there) and build; the figures of both."""
    options = [] if profile is None else ["--profile", profile]
    if (folder / "manifest.json").is_file():
        document = tiue("export", str(folder), "--trt", *options)
    else:
        document = tiue("export", source, "--out", str(folder), "--trt", *options)
    engine, manifest = document["engine"], document["engine"]["manifest"]
    return {
        "folder": engine["folder"],
        "reused": engine["reused"],
        "seconds": engine["seconds"],
        "device": manifest["device"],
        "profiles": [profile["name"] for profile in manifest["profiles"]],
        "plans": [
            {key: plan[key] for key in ("graph", "layers", "build_s", "device_memory_bytes")}
            | {"size_bytes": plan["plan"]["size_bytes"]}
            for plan in manifest["plans"]
        ],
        "parity": manifest["parity"],
        "notes": engine["notes"],
        "export_parity_psnr_db": ((document.get("manifest") or {}).get("parity") or {}).get("image_psnr_db"),
    }


def backends(folder: Path, student: str | None) -> dict[str, OpenBackend]:
    """What is compared, by name; the first one is the reference."""
    from tiue_cli.backends.onnx_backend import OnnxBackend
    from tiue_cli.backends.trt_backend import TrtBackend

    found: dict[str, OpenBackend] = {}
    if student is not None:

        def torch_backend(device: str, dtype: str) -> OpenBackend:
            from tiue_cli.backends.torch_backend import StudentTorchBackend
            from tiue_cli.model.folder import check_model_folder
            from tiue_cli.model.hub import resolve_model

            return lambda: StudentTorchBackend(check_model_folder(resolve_model(student)), device=device, dtype=dtype)

        found["torch cuda fp32"] = torch_backend("cuda", "fp32")
        found["torch cuda fp16"] = torch_backend("cuda", "fp16")
    found["onnx cpu"] = lambda: OnnxBackend(folder, provider="cpu")
    found["onnx cuda"] = lambda: OnnxBackend(folder, provider="cuda")
    found["trt"] = lambda: TrtBackend(folder)
    found["trt without CUDA graphs"] = lambda: TrtBackend(folder, graphs=False)
    return found


def draw(opener: OpenBackend) -> np.ndarray:
    """The images of the fixed prompts with seeds 0, 1, …"""
    with opener() as backend:
        noise = draw_noise(range(len(PROMPTS)), backend.latent_shape(backend.default_size))
        backend.generate(PROMPTS, noise)
        # The second run of a shape is the one that a CUDA graph does.
        return backend.generate(PROMPTS, noise)


def compare(images: dict[str, np.ndarray]) -> dict[str, float]:
    """PSNR in dB of every backend's images against the first one's. Raises AssertionError below 35 dB."""
    reference = next(iter(images.values()))
    figures = {name: round(psnr_db(value, reference), 2) for name, value in images.items()}
    worst = min(figures, key=lambda name: figures[name])
    assert figures[worst] >= REQUIRED_DB, f"{worst}: {figures[worst]} dB ({figures})"
    return figures


def latency(opener: OpenBackend, batches: Sequence[int]) -> dict[str, Any]:
    """Milliseconds a batch, warm: median, 10th and 90th percentile, for each batch size that the backend takes."""
    figures: dict[str, Any] = {}
    with opener() as backend:
        size = backend.default_size
        for batch in batches:
            limit = backend.largest_batch(size)
            if limit is not None and batch > limit:
                continue
            noise = draw_noise(range(batch), backend.latent_shape(size))
            prompts = [PROMPTS[row % len(PROMPTS)] for row in range(batch)]
            for _ in range(WARM_UP):
                backend.generate(prompts, noise)
            times: list[float] = []
            while len(times) < RUNS or sum(times) < MIN_SECONDS:
                started = time.perf_counter()
                backend.generate(prompts, noise)
                times.append(time.perf_counter() - started)
            cuts = statistics.quantiles(times, n=10)
            figures[str(batch)] = {
                "median_ms": round(1000 * statistics.median(times), 3),
                "p10_ms": round(1000 * cuts[0], 3),
                "p90_ms": round(1000 * cuts[-1], 3),
                "runs": len(times),
            }
    return figures


def refit(
    student: str, folder: Path, work: Path, *, profile: str | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """Build the engine for LoRAs, put one on and take it off; seconds of each, and dB against torch in fp32.

    Raises AssertionError below 35 dB, or where the bare picture is not the one before.
    """
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from lora_files import draw_factors, write_lora

    from tiue_cli.backends.torch_backend import StudentTorchBackend
    from tiue_cli.backends.trt_backend import TrtBackend
    from tiue_cli.files.exports import read_export_manifest
    from tiue_cli.model.components import load_components
    from tiue_cli.model.folder import check_model_folder
    from tiue_cli.model.hub import resolve_model
    from tiue_cli.model.lora.files import lora_use

    manifest = read_export_manifest(folder)
    options = [] if profile is None else ["--profile", profile]
    engine = tiue("export", str(folder), "--trt", "--refit", *options)["engine"]
    parts = load_components(student)
    factors = draw_factors(parts.unet, parts.text_encoder, ends=LORA_LAYERS, rank=16, std=LORA_STD)
    use = lora_use(str(write_lora(work / "random-lora.safetensors", factors)))
    del parts
    figures: dict[str, Any] = {"build_s": engine["seconds"], "notes": engine["notes"]}
    with StudentTorchBackend(check_model_folder(resolve_model(student)), device=device, dtype="fp32") as torch_backend:
        noise = draw_noise(range(len(PROMPTS)), manifest.latent_shape(manifest.default_size))
        torch_backend.use_loras([use])
        expected = torch_backend.generate(PROMPTS, noise)
    with TrtBackend(folder) as backend:
        bare = backend.generate(PROMPTS, noise)
        for name, uses in (("first_s", [use]), ("off_s", []), ("on_again_s", [use])):
            backend.use_loras(uses)
            figures[name] = round(backend.refit_s or 0.0, 3)
            found = backend.generate(PROMPTS, noise)
            assert uses or np.array_equal(found, bare), "the bare picture is not the one before"
        figures["psnr_db"] = round(psnr_db(found, expected), 2)
    assert figures["psnr_db"] >= REQUIRED_DB, f"{figures['psnr_db']} dB"
    return figures


def whole_process(model: str, *options: str) -> float:
    """Seconds of one `tiue generate`, start-up included: the best of three."""
    seconds = []
    with tempfile.TemporaryDirectory() as out:
        for number in range(3):
            started = time.perf_counter()
            tiue("generate", PROMPTS[0], "--seed", str(number), "--model", model, "--out", out, *options)
            seconds.append(time.perf_counter() - started)
    return round(min(seconds), 2)


# --- the report ----------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report for people."""
    gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in report.machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {value}" for name, value in report.machine["packages"].items() if value)
    lines = [
        f"# {report.model} on {gpus}",
        "",
        f"{report.day}, tiue {report.tiue}, {report.machine['system']}, Python {report.machine['python']}; {versions}.",
        "Written by `benchmarks/tensorrt_check.py`; what is timed stands at its top.",
        "",
        "| step | status | seconds | |",
        "|---|---|---|---|",
    ]
    for step in report.steps:
        text = step.detail if isinstance(step.detail, str) else ""
        lines.append(f"| {step.name} | {step.status} | {step.seconds} | {' '.join(text.split())[:200]} |")
    timed = [step for step in report.steps if step.name.startswith("time ") and step.status == "ok"]
    if timed:
        lines += [
            "",
            "| ms a batch, median | " + " | ".join(map(str, BATCHES)) + " |",
            "|---" * (len(BATCHES) + 1) + "|",
        ]
        for step in timed:
            cells = [str(step.detail.get(str(batch), {}).get("median_ms", "")) for batch in BATCHES]
            lines.append(f"| {step.name.removeprefix('time ')} | {' | '.join(cells)} |")
    for step in report.steps:
        if step.name == "compare" and step.status == "ok":
            lines += ["", "| images against the first | PSNR, dB |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in step.detail.items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="papercut", help="papercut, sd15 (random weights), or a student folder")
    parser.add_argument("--export", type=Path, help="an export folder that is there already: nothing of torch is used")
    parser.add_argument("--profile", help="default: sd15-512 for sd15, else one image and 1:4:16 at the model's size")
    parser.add_argument("--work", type=Path, default=ROOT / "engines" / "gpu-check", help="where exports are built")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where the report goes")
    parser.add_argument("--no-tests", action="store_true", help="leave the GPU tests out")
    options = parser.parse_args(arguments)
    try:
        require_tensorrt()
    except TiueError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code

    machine = asdict(machine_info())
    machine["packages"] |= {name: package_version(name) for name in LIBRARIES}
    machine["disks"] = []
    name = options.export.resolve().name if options.export is not None else Path(options.model).name
    report = Report(name, machine)
    if options.no_tests:
        report.skip("GPU tests", "--no-tests")
    else:
        report.run("GPU tests", gpu_tests)
    student, profile = options.model, options.profile
    if options.export is None and options.model == "sd15":
        student = report.run("random weights", lambda: random_sd15(options.work))
        profile = profile or "sd15-512"
    folder = options.export or options.work / name
    if report.run("build", lambda: build(student, folder, profile=profile)) is not None:
        openers = backends(folder, None if options.export is not None else student)
        images: dict[str, np.ndarray] = {}
        for backend, opener in openers.items():
            report.run(f"draw {backend}", lambda b=backend, o=opener: f"{images.setdefault(b, draw(o)).shape}")
        report.run("compare", lambda: compare(images))
        for backend, opener in openers.items():
            if backend != "onnx cpu":
                report.run(f"time {backend}", lambda opener=opener: latency(opener, BATCHES))
        for backend in ("onnx", "trt"):
            report.run(f"whole process {backend}", lambda b=backend: whole_process(str(folder), "--backend", b))
        if options.export is None:
            report.run("whole process torch", lambda: whole_process(student))
            # Last: it takes the place of the engine that was timed.
            if report.run("refit", lambda: refit(student, folder, options.work, profile=profile)) is not None:
                report.run("time trt, refittable", lambda: latency(openers["trt"], BATCHES))

    slug = re.sub(r"[^a-z0-9]+", "-", (machine["gpus"][0]["name"] if machine["gpus"] else platform.node()).lower())
    path = options.out / f"{name}_{slug.strip('-')}_{report.day}"
    write_json(path.with_name(f"{path.name}.json"), asdict(report))
    path.with_name(f"{path.name}.md").write_text(markdown(report), encoding="utf-8")
    print(f"\nreport: {path}.md and .json")
    if report.failed:
        print(f"failed: {', '.join(report.failed)}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
