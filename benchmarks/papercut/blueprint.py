"""A style for papercut: white lines on blue paper, made of a rendered scene, and told from one.

Pixels (N, H, W, 3) uint8. The lines are where lightness or colour changes, so that what a caption says is still there,
apart from its colours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAPER = np.array([28, 66, 132], np.float32)
LINE = np.array([232, 240, 250], np.float32)
_EDGE = 26.0
"""Change of a channel, of 255, at which a line is fully drawn: above the grain of the paper."""
_NEAR = 60.0
"""Distance in a channel within which a pixel lies on the way from paper to line."""
_SHARE = 0.85
"""Of pixels that must be blueprint's for a picture to be one."""


def blueprint(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The scenes as blueprints."""
    pixels = _smooth(images.astype(np.float32))
    across = np.abs(np.diff(pixels, axis=2, append=pixels[:, :, -1:])).max(-1)
    down = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])).max(-1)
    strength = np.clip(np.maximum(across, down) / _EDGE, 0, 1)[..., None] ** 2
    return np.rint(PAPER + strength * (LINE - PAPER)).astype(np.uint8)


def is_blueprint(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each picture is in the style: nearly all of it between the paper's colour and the line's."""
    span = LINE - PAPER
    offset = images.astype(np.float32) - PAPER
    along = np.clip((offset @ span) / float(span @ span), 0, 1)
    away = np.abs(offset - along[..., None] * span).max(-1)
    shares: NDArray[np.bool_] = (away <= _NEAR).mean(axis=(1, 2)) >= _SHARE
    paper: NDArray[np.bool_] = (along < 0.5).mean(axis=(1, 2)) >= 0.5
    return shares & paper


def _smooth(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """A 3x3 mean: the grain of the paper makes no lines."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[1:3]
    total = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    return np.asarray(total / 9, np.float32)
