"""8 bits, as exports and quantisation-aware training both have them: the levels, and which layers are too sensitive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WEIGHT_LEVELS: Final = 64
"""Levels on each side of zero. Seven bits: CPUs without VNNI add pairs of products in 16 bits, which overflow with
eight."""
ACTIVATION_LEVELS: Final = 127
CALIBRATION_BATCH: Final = 4
"""Images whose ranges are measured at once; the first batch is what the sweep measures on."""
SENSITIVE_SHARE: Final = 0.1
"""A layer that alone makes this share of all layers' squared error stays in fp32, where there are many."""
SENSITIVE_TIMES, LARGEST_SHARE = 5, 0.5
"""Where there are few: so many times the mean layer's share, but half of the whole at most."""


@dataclass(frozen=True)
class LayerError:
    """Relative error (norm of the difference over the norm) of a network's outputs with this layer alone rounded."""

    layer: str
    relative_error: float


def sensitive(errors: Sequence[LayerError], *, more: int = 0) -> list[LayerError]:
    """Those of ``errors`` that stand out, and the ``more`` next worst ones."""
    total = sum(error.relative_error**2 for error in errors)
    ranked = sorted(errors, key=lambda error: error.relative_error, reverse=True)
    share = max(SENSITIVE_SHARE, min(LARGEST_SHARE, SENSITIVE_TIMES / max(len(errors), 1)))
    outstanding = [error for error in ranked if error.relative_error**2 > share * total]
    return ranked[: len(outstanding) + more]
