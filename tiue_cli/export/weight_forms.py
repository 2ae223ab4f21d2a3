"""How tracing leaves a layer's weight in a graph: as it is, transposed, or cut for the sharing UNet decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np

Form = Literal["same", "transposed"] | tuple[int, int]
"""A pair is a cut: the input channels (from, to) of a convolution's weight."""
_GLANCE: Final = 16
"""Values that are compared before a whole weight is."""


def forms_in(part: np.ndarray, whole: np.ndarray) -> Iterator[Form]:
    """Every form in which ``part``, a graph's weight, is of ``whole``, a layer's of the same type, bit for bit."""
    if part.shape == whole.shape and _equal(part, whole):
        yield "same"
    if whole.ndim == 2 and part.shape == whole.T.shape and _equal(part, whole.T):
        yield "transposed"
    if _may_be_cut(whole.shape, part.shape):
        channels = part.shape[1]
        for start in range(whole.shape[1] - channels + 1):
            if _equal(part, whole[:, start : start + channels]):
                yield start, start + channels


def _may_be_cut(whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return len(whole) == len(part) == 4 and whole[0] == part[0] and whole[2:] == part[2:] and whole[1] > part[1]


def _equal(value: np.ndarray, other: np.ndarray) -> bool:
    glance = slice(0, _GLANCE)
    return bool(np.array_equal(value[0].flat[glance], other[0].flat[glance]) and np.array_equal(value, other))
