"""For tests of the bench in which nobody looks at the machine's peak."""

from __future__ import annotations

import pytest

from tiue_cli.bench.measure import machine


def measure_small_peak(patch: pytest.MonkeyPatch) -> None:
    """Let the rate be measured on small products, in milliseconds; large ones take seconds a bench."""
    patch.setattr(machine, "SIDES", {"cpu": (128,), "cuda": (128,)})
    patch.setattr(machine, "CONVOLUTION", (16, 16, 32))
