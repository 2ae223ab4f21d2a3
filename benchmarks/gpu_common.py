"""What the stages of gpu_check.py share: where figures go, how time is taken, what model is measured."""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_report import markdown

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red heart above a blue house", "a yellow star at night")
STEPS = 4
TEACHER_STEPS = 25

Figures = dict[str, Any]


class Check:
    """What a stage needs to know, and where its figures go."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        self.cpu: bool = options.cpu
        self.device = "cpu" if options.cpu else "cuda"
        self.dtype = torch.float32 if options.cpu else torch.float16
        self.precision = "fp32" if options.cpu else "fp16"
        self.shape = "papercut" if options.cpu else "sd15"
        self.batches = (1, 2) if options.cpu else (1, 4, 16)
        self.ends = float(options.ends)
        self.out: Path = options.out
        self.file: Path = options.out / "gpu_check.json"
        self.figures: Figures = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.peak: float | None = self.figures.get("ceilings", {}).get("matmul_flops_per_s")

    def put(self, *keys: str, value: Any) -> None:
        """Write one figure at once, and show it."""
        place = self.figures
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        write_figures(self.out, self.figures)
        print(f"   {' / '.join(keys)}: {json.dumps(value)[:400]}", flush=True)

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.time() + seconds < self.ends

    def components(self, *, vae: str | None = None, dtype: Any = None) -> Any:
        """Random weights of the shape on the device, equal from call to call."""
        from tiue_cli.bench.subjects.random_weights import random_components

        return random_components(self.shape, device=self.device, dtype=dtype or self.dtype, vae=vae)

    def model(self, parts: Any) -> Any:
        """The parts as the bench's model: a student and its own teacher."""
        from tiue_cli.bench.subjects.models import LoadedModel

        return LoadedModel(self.shape, self.shape, parts, None, 0.0, True)


def write_figures(out: Path, figures: Figures) -> None:
    """Both files of the report, each whole or not at all: the process may be stopped at any moment."""
    for name, text in (("gpu_check.json", json.dumps(figures, indent=1) + "\n"), ("gpu_check.md", markdown(figures))):
        (out / f"{name}.part").write_text(text, encoding="utf-8")
        (out / f"{name}.part").replace(out / name)


def teacher_folder(*, cpu: bool) -> str:
    """A teacher of the shape on the disk: papercut's, or Stable Diffusion 1.5's with random weights."""
    if cpu:
        return "papercut"
    folder = Path(os.environ.get("TEACHER", "/tmp/tiue-gpu-check-teacher"))
    # The exports are made beside the other stages: whoever needs it first writes it.
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            sys.path.insert(0, str(ROOT / "tests" / "support"))
            from helpers import build_full_size_folder

            build_full_size_folder(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return str(folder)


def latent(parts: Any) -> tuple[int, ...]:
    """(C, h, w)."""
    return (parts.info.latent_channels, *parts.info.sample_size)


def error(actual: Any, expected: Any) -> float:
    """Relative, of the whole tensor."""
    return float(f"{float((actual.double() - expected.double()).norm() / expected.double().norm()):.3g}")


def wait(check: Check) -> None:
    """Until the device has finished."""
    import torch

    if not check.cpu:
        torch.cuda.synchronize()


def free(check: Check) -> None:
    """Give back what nothing holds."""
    import torch

    gc.collect()
    if not check.cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wall_ms(run: Callable[[], Any], *, least: int, seconds: float = 0.6) -> float:
    """Median of runs that end with their result in main memory."""
    run()
    samples: list[float] = []
    while len(samples) < least or (sum(samples) < seconds * 1000 and len(samples) < 100):
        started = time.perf_counter()
        run()
        samples.append((time.perf_counter() - started) * 1000)
    return round(statistics.median(samples), 3)


def device_ms(check: Check, run: Callable[[], Any]) -> float:
    """Median time on the device."""
    import torch

    for _ in range(3):
        run()
    samples = []
    for _ in range(12):
        if check.cpu:
            started = time.perf_counter()
            run()
            samples.append((time.perf_counter() - started) * 1000)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)
