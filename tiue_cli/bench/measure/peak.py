"""The machine's matmul rate, measured in the run itself: the ceiling that the shares of peak refer to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch
from torch.nn.functional import conv2d

from tiue_cli.bench.report.schema import PeakKernel, PeakRecord
from tiue_cli.bench.subjects.models import DTYPES

SIDES: Final = {"cpu": (512, 1024, 1536, 2048), "cuda": (2048, 4096, 8192, 16384)}
"""Square products that are tried: the fastest counts, as caches and tiles favour different ones."""
SAMPLES: Final = 5
BUDGET_S: Final = 4.0


@dataclass(frozen=True)
class _Product:
    """One way to multiply matrices (M, L) and (L, N)."""

    kernel: PeakKernel
    shape: tuple[int, int, int]
    """M, L, N."""
    run: Callable[[], torch.Tensor]


def measure_peak(device: str, precision: Literal["fp32", "fp16", "bf16"], *, budget_s: float = BUDGET_S) -> PeakRecord:
    """The best rate of a large matrix product in ``precision``, over kernels, shapes and samples, in FLOP/s.

    In fp32 on a GPU as torch is set (``torch.backends.cuda.matmul.fp32_precision``), as the models run.
    """
    best: PeakRecord | None = None
    started = time.perf_counter()
    for product in _products(device, precision):
        samples = _samples_ms(product, device=device)
        rate = 2.0 * math.prod(product.shape) / (min(samples) / 1000.0)
        if best is None or rate > best.flops_per_s:
            best = PeakRecord(
                flops_per_s=rate,
                precision=precision,
                device=device,
                kernel=product.kernel,
                shape=product.shape,
                samples_ms=samples,
            )
        if time.perf_counter() - started > budget_s:
            break
    assert best is not None
    return best


def _products(device: str, precision: str) -> Iterator[_Product]:
    """On a CPU convolutions too: another library computes them, and it may use instructions that torch.mm's does not.

    MKL, behind ``torch.mm``, leaves AMD's AVX-512 alone; oneDNN does not, and reaches twice the rate there. A ceiling
    that half of a model's layers break is none.
    """
    if device == "cpu":
        yield _convolution(64, 64, 320, side=3, precision=precision)
    for side in SIDES[device]:
        left, right = (_random(side, side, device=device, precision=precision) for _ in range(2))
        yield _Product("matrix product", (side, side, side), partial(torch.mm, left, right))
        if device == "cpu":
            yield _convolution(side // 32, 32, side, side=1, precision=precision)


def _convolution(height: int, width: int, channels: int, *, side: int, precision: str) -> _Product:
    weights = _random(channels, channels, side, side, precision=precision).to(memory_format=torch.channels_last)
    image = _random(1, channels, height, width, precision=precision).to(memory_format=torch.channels_last)
    shape = (height * width, channels * side * side, channels)
    kernel: PeakKernel = "1x1 convolution" if side == 1 else "3x3 convolution"
    return _Product(kernel, shape, lambda: conv2d(image, weights, padding=side // 2))


def _random(*shape: int, precision: str, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(shape[0])
    return torch.randn(*shape, device=device, generator=generator).to(DTYPES[precision])


@torch.inference_mode()
def _samples_ms(product: _Product, *, device: str) -> tuple[float, ...]:
    product.run()
    samples = []
    for _ in range(SAMPLES):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product.run()
            end.record()
            torch.cuda.synchronize()
            samples.append(float(start.elapsed_time(end)))
        else:
            started = time.perf_counter()
            product.run()
            samples.append((time.perf_counter() - started) * 1000.0)
    return tuple(samples)
