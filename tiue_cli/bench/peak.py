"""The machine's matmul rate, measured in the run itself: the ceiling that the shares of peak refer to."""

from __future__ import annotations

import time
from typing import Final, Literal

import torch

from tiue_cli.bench.models import DTYPES
from tiue_cli.bench.schema import PeakRecord

SIDES: Final = {"cpu": (512, 1024, 1536, 2048), "cuda": (2048, 4096, 8192, 16384)}
"""Square products that are tried: the fastest counts, as caches and tiles favour different ones."""
SAMPLES: Final = 5
BUDGET_S: Final = 3.0


def measure_peak(device: str, precision: Literal["fp32", "fp16", "bf16"], *, budget_s: float = BUDGET_S) -> PeakRecord:
    """The best rate of a square matrix product in ``precision``, over sides and samples, in FLOP/s.

    In fp32 on a GPU as torch is set (``torch.backends.cuda.matmul.fp32_precision``), as the models run.
    """
    best: tuple[float, int, tuple[float, ...]] | None = None
    started = time.perf_counter()
    for side in SIDES[device]:
        samples = _samples_ms(side, device=device, precision=precision)
        rate = 2.0 * side**3 / (min(samples) / 1000.0)
        if best is None or rate > best[0]:
            best = (rate, side, samples)
        if time.perf_counter() - started > budget_s:
            break
    assert best is not None
    rate, side, samples = best
    return PeakRecord(
        flops_per_s=rate, precision=precision, device=device, shape=(side, side, side), samples_ms=samples
    )


def _samples_ms(side: int, *, device: str, precision: str) -> tuple[float, ...]:
    generator = torch.Generator(device).manual_seed(side)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(DTYPES[precision]) for _ in range(2))
    torch.mm(left, right)
    samples = []
    for _ in range(SAMPLES):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(left, right)
            end.record()
            torch.cuda.synchronize()
            samples.append(float(start.elapsed_time(end)))
        else:
            started = time.perf_counter()
            torch.mm(left, right)
            samples.append((time.perf_counter() - started) * 1000.0)
    return tuple(samples)
