"""The measured ceiling that shares of peak refer to."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tiue_cli.bench.measure.machine import measure_peak
from tiue_cli.bench.report.schema import PeakRecord


def _seconds(run: Callable[[], object], samples: int = 5) -> float:
    times = []
    for _ in range(samples):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


@pytest.fixture(scope="module")
def peak() -> PeakRecord:
    return measure_peak("cpu", "fp32")


@pytest.mark.parametrize("library", ["numpy", "oneDNN"])
def test_the_ceiling_holds_for_other_libraries(library: str, peak: PeakRecord) -> None:
    # A factor of 1.5 leaves room for a machine whose pace changes, and none for half the instructions' width.
    side = 1024
    left = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    if library == "numpy":
        operations, seconds = 2.0 * side**3, _seconds(lambda: left @ left)
    else:
        image, weights = torch.randn(1, 256, 64, 64), torch.randn(256, 256, 3, 3)
        with torch.inference_mode():
            seconds = _seconds(lambda: torch.nn.functional.conv2d(image, weights, padding=1))
        operations = 2.0 * 64 * 64 * 256 * 256 * 9
    assert operations / seconds < 1.5 * peak.flops_per_s


def test_rate_is_operations_over_the_fastest_sample() -> None:
    peak = measure_peak("cpu", "fp32", budget_s=0.0)
    operations = 2.0 * np.prod(peak.shape)
    assert peak.flops_per_s == pytest.approx(operations / (min(peak.samples_ms) / 1000.0))
    assert peak.kernel == "3x3 convolution"  # without time, the first kernel alone
    assert peak.shape == (64 * 64, 320 * 9, 320)
