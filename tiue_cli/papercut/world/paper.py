"""Paper: pieces laid on a canvas, each with a cut edge that catches the light and a shadow on what lies behind.

A piece is a signed distance (negative inside) on a patch of the canvas. Its shadow is the blurred, shifted area that
the piece covers, so it is right for every outline, also for those whose distance is not exact outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32 in fact; the stubs cannot follow
Color = tuple[float, float, float]

UNITS = 64.0
"""A scene is laid out on 64 × 64 units, whatever its size in pixels."""


def cover(distance: Array) -> Array:
    """Coverage 0..1 of a pixel at a signed distance in pixels; an edge is a pixel and a half wide."""
    t = np.clip(0.5 - distance * np.float32(0.67), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def blurred(area: Array, radius: int) -> Array:
    """Two box blurs of 2·radius + 1 pixels along both axes; outside the patch (H, W) nothing is covered."""
    height, width = area.shape
    reach = 2 * radius
    wide = np.zeros((height + 2 * reach, width), np.float32)
    wide[reach:-reach] = area
    for _ in range(2):
        wide = sum((wide[i : len(wide) - 2 * radius + i] for i in range(1, 2 * radius + 1)), wide[: -2 * radius])
    tall = np.zeros((height, width + 2 * reach), np.float32)
    tall[:, reach:-reach] = wide
    for _ in range(2):
        last = tall.shape[1] - 2 * radius
        tall = sum((tall[:, i : last + i] for i in range(1, 2 * radius + 1)), tall[:, :last])
    return tall * np.float32((2 * radius + 1) ** -4)


def lay(canvas: Array, area: Array, color: Array, *, depth: float, scale: float) -> None:
    """Lay a piece on the canvas (3, H, W), in place.

    area: (H, W) coverage; color: (3, 1, 1) or (3, H, W) sRGB 0..1; depth: how far the piece floats above what lies
    behind, in units; scale: pixels a unit.
    """
    down, radius = max(1, round(0.8 * depth * scale)), max(1, round(0.55 * depth * scale))
    right = max(1, down // 2)
    shadow = np.float32(0.30 + 0.10 * min(depth, 1)) * blurred(area, radius)
    canvas[:, down:, right:] *= 1 - shadow[:-down, :-right]
    # The cut edge: where the area begins from above and left it is lit, where it ends it is in the shade.
    lit, shaded = area.copy(), area.copy()
    lit[1:, 1:] -= area[:-1, :-1]
    shaded[:-1, :-1] -= area[1:, 1:]
    lit = np.float32(0.40) * np.maximum(lit, 0)
    paper = color + lit * (1 - color)
    paper *= 1 - np.float32(0.24) * np.maximum(shaded, 0)
    paper -= canvas
    paper *= area
    canvas += paper


def fibre(generator: np.random.Generator, size: int) -> Array:
    """The grain of paper (size, size): faint noise over one and over three pixels."""
    fine = generator.standard_normal((size, size), np.float32)
    coarse = generator.standard_normal((size // 3 + 1, size // 3 + 1), np.float32)
    return np.float32(0.004) * fine + np.float32(0.006) * coarse.repeat(3, 0).repeat(3, 1)[:size, :size]


def paint(canvas: Array, area: Array, color: Array) -> None:
    """Print on what is there (3, H, W), in place: no edge, no shadow."""
    canvas += (color - canvas) * area


def rgb(color: Color | Array) -> Array:
    """A colour as (3, 1, 1) float32, what a canvas (3, H, W) takes."""
    return np.asarray(color, np.float32).reshape(3, 1, 1)


class Brush:
    """One object's own frame on a canvas: the unit circle is the object's radius, y points down, turned by an angle.

    `x`, `y` are the frame's coordinates (H, W) of the patch's pixels.
    """

    def __init__(
        self, canvas: Array, center: tuple[float, float], radius: float, *, angle: float, flip: bool, scale: float
    ) -> None:
        """center and radius in units; a flipped frame is mirrored left to right; scale: pixels a unit."""
        size = canvas.shape[-1]
        reach = 1.05 * radius + 2.5
        left, top = (max(0, int((c - reach) * scale)) for c in center)
        right, bottom = (min(size, int((c + reach) * scale) + 1) for c in center)
        self.patch, self.scale, self.pixels = canvas[:, top:bottom, left:right], scale, np.float32(radius * scale)
        dx = (np.arange(left, right, dtype=np.float32) + 0.5 - center[0] * scale)[None, :] / self.pixels
        dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - center[1] * scale)[:, None] / self.pixels
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        self.x, self.y = (dx * cos + dy * sin) * (-1 if flip else 1), dy * cos - dx * sin

    def lay(self, distance: Array, color: Array | Color, *, depth: float = 0.45) -> None:
        """Lay a piece of paper; distance in the frame's units."""
        if isinstance(color, tuple):
            color = rgb(color)
        lay(self.patch, cover(distance * self.pixels), color, depth=depth, scale=self.scale)

    def paint(self, distance: Array, color: Array | Color, opacity: float = 1.0) -> None:
        """Print on the paper, on the few rows and columns where there is something to print."""
        inside = distance * self.pixels < 1
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        area = np.float32(opacity) * cover(distance[window] * self.pixels)
        paint(self.patch[(slice(None), *window)], area, rgb(color) if isinstance(color, tuple) else color)
