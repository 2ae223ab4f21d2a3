"""The twelve objects, each a few pieces of paper laid on one another in its own frame (`Brush`).

An object's own colour is the only one that changes; wood, leaves, eyes and windows have theirs. A pattern is printed
on its main pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tiue_cli.papercut.world.outlines import box, circle, ellipse, heart, polygon, segment, star, union
from tiue_cli.papercut.world.paper import Array, Brush, Color, rgb

WOOD: Color = (0.45, 0.27, 0.15)
CREAM: Color = (1.0, 0.95, 0.78)
WHITE: Color = (1.0, 1.0, 1.0)
INK: Color = (0.08, 0.08, 0.12)
LEAF: Color = (0.22, 0.50, 0.24)
BEAK: Color = (0.98, 0.62, 0.15)
LUMA, DARKER, PALE_PRINT = rgb((0.3, 0.6, 0.1)), rgb((0.76, 0.68, 0.68)), rgb((0.80, 0.70, 0.66))
DEPTH = 1.0
"""How far an object floats above the background, in units; pieces on pieces float lower."""


class Stock:
    """The paper that one object is cut from: its colour, and the pattern printed on it (None: plain)."""

    def __init__(self, color: Array, pattern: str | None) -> None:
        self.color, self.pattern = rgb(color), pattern
        # Print that shows on any colour: pale paper is printed darker, the rest lighter.
        pale = float((self.color * LUMA).sum()) > 0.7
        self.print = self.color * PALE_PRINT if pale else self.color + (1 - self.color) * np.float32(0.62)

    @property
    def dark(self) -> Array:
        return self.color * DARKER

    def shade(self, factor: float) -> Array:
        return self.color * np.float32(factor)

    def tint(self, white: float) -> Array:
        return self.color + (1 - self.color) * np.float32(white)

    def printed(self, brush: Brush, factor: float = 1.0) -> Array:
        """The colour of each pixel (3, H, W): a little lighter above, with the pattern."""
        light = np.float32(1.03 * factor) - np.float32(0.07 * factor) * brush.y
        sheet = self.color * light
        if self.pattern is None:
            return sheet
        if self.pattern == "striped":
            along = brush.x * np.float32(0.8 * 2.3) + brush.y * np.float32(0.6 * 2.3)
            distance = (np.abs(along - np.rint(along)) - np.float32(0.25)) / np.float32(2.3)  # half of it is printed
        else:
            u, v = brush.x * np.float32(2.4), brush.y * np.float32(2.4)
            row = np.rint(v)
            u = u + np.float32(0.5) * (row % 2)
            distance = (np.sqrt((u - np.rint(u)) ** 2 + (v - row) ** 2) - np.float32(0.27)) / np.float32(2.4)
        ink = np.clip(np.float32(0.5) - distance * brush.pixels, 0, 1)
        sheet += (self.print * light - sheet) * ink
        return sheet


def _star(b: Brush, s: Stock) -> None:
    outline = star(b.x, b.y + 0.04) - np.float32(0.03)
    b.lay(outline, s.printed(b), depth=DEPTH)


def _heart(b: Brush, s: Stock) -> None:
    b.lay(heart(b.x, b.y), s.printed(b), depth=DEPTH)


def _tree(b: Brush, s: Stock) -> None:
    b.lay(box(b.x, b.y - 0.80, 0.14, 0.19, 0.03), WOOD, depth=DEPTH)
    for top, foot, half, factor in ((-0.30, 0.70, 0.84, 0.86), (-0.66, 0.24, 0.66, 0.94), (-1.0, -0.20, 0.48, 1.02)):
        tier = polygon(b.x, b.y, [(0.0, top), (half, foot), (-half, foot)]) - np.float32(0.02)
        b.lay(tier, s.printed(b, factor), depth=0.7)


def _house(b: Brush, s: Stock) -> None:
    b.lay(box(b.x - 0.46, b.y + 0.62, 0.11, 0.28), s.shade(0.60), depth=DEPTH)  # the chimney
    b.lay(box(b.x, b.y - 0.32, 0.72, 0.56, 0.02), s.printed(b), depth=DEPTH)
    b.lay(polygon(b.x, b.y, [(0.0, -0.96), (0.96, -0.10), (-0.96, -0.10)]) - np.float32(0.02), s.dark, depth=0.6)
    b.lay(box(b.x + 0.28, b.y - 0.56, 0.17, 0.32, 0.02), WOOD, depth=0.3)
    b.paint(circle(b.x + 0.19, b.y - 0.56, 0.035), CREAM)
    b.lay(box(b.x - 0.28, b.y - 0.32, 0.19, 0.18, 0.02), CREAM, depth=0.3)
    cross = np.minimum(np.abs(b.x - 0.28), np.abs(b.y - 0.32)) - np.float32(0.025)
    b.paint(np.maximum(cross, box(b.x - 0.28, b.y - 0.32, 0.19, 0.18)), WOOD)


def _moon(b: Brush, s: Stock) -> None:
    disc, bite = circle(b.x, b.y, 0.94), circle(b.x - 0.42, b.y + 0.14, 0.72)
    b.lay(np.maximum(disc, -bite), s.printed(b), depth=DEPTH)
    for x, y, radius in ((-0.62, 0.10, 0.10), (-0.36, 0.60, 0.13), (-0.50, -0.46, 0.07)):
        b.paint(circle(b.x - x, b.y - y, radius), s.shade(0.84))


def _fish(b: Brush, s: Stock) -> None:
    tail = union(
        polygon(b.x, b.y, [(0.42, -0.04), (0.98, -0.52), (0.80, 0.06)]),
        polygon(b.x, b.y, [(0.42, 0.04), (0.98, 0.52), (0.80, -0.06)]),
    )
    b.lay(tail - np.float32(0.02), s.dark, depth=DEPTH)
    b.lay(polygon(b.x, b.y, [(-0.30, -0.36), (0.28, -0.72), (0.34, -0.20)]) - np.float32(0.02), s.dark, depth=DEPTH)
    body = ellipse(b.x + 0.20, b.y, 0.76, 0.50)
    b.lay(body, s.printed(b), depth=0.8)
    if s.pattern is None:  # two rows of scales
        for x, y in ((0.02, -0.16), (0.02, 0.14), (0.26, 0.0)):
            scale = np.abs(circle(b.x - x + 0.10, b.y - y, 0.15)) - np.float32(0.02)
            b.paint(np.maximum(scale, -(b.x - np.float32(x - 0.08))), s.shade(0.76))
    b.lay(polygon(b.x, b.y, [(-0.16, 0.12), (0.18, 0.30), (-0.02, 0.44)]) - np.float32(0.02), s.dark, depth=0.3)
    b.paint(circle(b.x + 0.60, b.y + 0.12, 0.14), WHITE)
    b.paint(circle(b.x + 0.62, b.y + 0.12, 0.075), INK)


def _boat(b: Brush, s: Stock) -> None:
    b.lay(box(b.x + 0.02, b.y + 0.24, 0.045, 0.72), WOOD, depth=DEPTH)
    b.lay(polygon(b.x, b.y, [(0.07, -0.90), (0.74, 0.26), (0.07, 0.26)]) - np.float32(0.02), s.printed(b), depth=0.9)
    b.lay(polygon(b.x, b.y, [(-0.12, -0.62), (-0.12, 0.26), (-0.64, 0.26)]) - np.float32(0.02), CREAM, depth=0.9)
    hull = polygon(b.x, b.y, [(-0.96, 0.38), (0.96, 0.38), (0.60, 0.84), (-0.62, 0.84)]) - np.float32(0.03)
    b.lay(hull, s.printed(b), depth=DEPTH)
    b.paint(np.maximum(hull, np.abs(b.y - 0.46) - np.float32(0.035)), CREAM)


def _bird(b: Brush, s: Stock) -> None:
    b.lay(polygon(b.x, b.y, [(0.34, 0.06), (0.98, -0.22), (0.94, 0.24)]) - np.float32(0.02), s.dark, depth=DEPTH)
    b.lay(polygon(b.x, b.y, [(-0.76, -0.36), (-0.76, -0.12), (-0.99, -0.20)]), BEAK, depth=0.6)
    body = union(ellipse(b.x - 0.02, b.y - 0.18, 0.60, 0.46), circle(b.x + 0.46, b.y + 0.28, 0.36))
    b.lay(body, s.printed(b), depth=DEPTH)
    wing = np.maximum(ellipse(b.x - 0.20, b.y - 0.08, 0.44, 0.30), -(b.y + np.float32(0.14)))
    b.lay(wing, s.shade(0.80), depth=0.5)
    b.paint(circle(b.x + 0.54, b.y + 0.34, 0.10), WHITE)
    b.paint(circle(b.x + 0.56, b.y + 0.34, 0.06), INK)
    for x in (-0.08, 0.16):
        b.paint(segment(b.x, b.y, (x, 0.60), (x - 0.04, 0.86)) - np.float32(0.035), WOOD)


def _flower(b: Brush, s: Stock) -> None:
    b.lay(box(b.x, b.y - 0.50, 0.05, 0.48), LEAF, depth=DEPTH)
    for side in (-1, 1):
        u, v = side * b.x - 0.24, b.y - 0.62
        b.lay(ellipse(u * 0.86 - v * 0.5, v * 0.86 + u * 0.5, 0.26, 0.12), LEAF, depth=0.5)
    y = b.y + 0.36
    petals = [circle(b.x - 0.36 * np.cos(a), y - 0.36 * np.sin(a), 0.25) for a in np.arange(6) * (np.pi / 3) + 0.52]
    b.lay(union(*petals, circle(b.x, y, 0.3)), s.printed(b), depth=DEPTH)
    yellowish = float(s.color[0, 0, 0]) > 0.9 and float(s.color[2, 0, 0]) < 0.4
    b.lay(circle(b.x, y, 0.19), WOOD if yellowish else (0.99, 0.80, 0.20), depth=0.4)


def _mushroom(b: Brush, s: Stock) -> None:
    stem = polygon(b.x, b.y, [(-0.18, 0.0), (0.18, 0.0), (0.28, 0.88), (-0.28, 0.88)]) - np.float32(0.04)
    b.lay(stem, CREAM, depth=DEPTH)
    b.lay(ellipse(b.x, b.y - 0.16, 0.72, 0.14), s.shade(0.62), depth=0.6)
    cap = np.maximum(ellipse(b.x, b.y - 0.14, 0.94, 1.06), b.y - np.float32(0.14)) - np.float32(0.02)
    b.lay(cap, s.printed(b), depth=DEPTH)


def _cloud(b: Brush, s: Stock) -> None:
    puffs = union(
        circle(b.x + 0.52, b.y - 0.16, 0.38),
        circle(b.x + 0.08, b.y + 0.14, 0.50),
        circle(b.x - 0.46, b.y - 0.08, 0.44),
        box(b.x, b.y - 0.34, 0.90, 0.22, 0.20),
    )
    b.lay(puffs, s.printed(b), depth=DEPTH)
    low = union(
        circle(b.x + 0.40, b.y - 0.38, 0.22), circle(b.x + 0.02, b.y - 0.26, 0.30), circle(b.x - 0.40, b.y - 0.36, 0.24)
    )
    b.lay(np.maximum(low, b.y - np.float32(0.54)), s.tint(0.22), depth=0.3)


def _cat(b: Brush, s: Stock) -> None:
    tail = union(segment(b.x, b.y, (0.30, 0.86), (0.76, 0.76)), segment(b.x, b.y, (0.76, 0.76), (0.86, 0.16)))
    b.lay(tail - np.float32(0.10), s.dark, depth=DEPTH)
    b.lay(ellipse(b.x, b.y - 0.46, 0.50, 0.52), s.printed(b), depth=DEPTH)
    ears = union(
        polygon(b.x, b.y, [(-0.52, -0.96), (-0.50, -0.30), (-0.08, -0.62)]),
        polygon(b.x, b.y, [(0.52, -0.96), (0.50, -0.30), (0.08, -0.62)]),
    )
    b.lay(union(ears, ellipse(b.x, b.y + 0.36, 0.56, 0.44)) - np.float32(0.02), s.printed(b), depth=0.7)
    for side in (-1, 1):
        b.paint(ellipse(b.x - side * 0.22, b.y + 0.40, 0.085, 0.115), WHITE)
        b.paint(ellipse(b.x - side * 0.20, b.y + 0.40, 0.045, 0.085), INK)
        for end in (0.20, 0.34):
            b.paint(segment(b.x, b.y, (side * 0.20, -0.22), (side * 0.62, -end)) - np.float32(0.018), INK, 0.75)
    b.paint(polygon(b.x, b.y, [(-0.07, -0.28), (0.07, -0.28), (0.0, -0.20)]), INK)


DRAWERS: dict[str, Callable[[Brush, Stock], None]] = {
    "star": _star,
    "heart": _heart,
    "tree": _tree,
    "house": _house,
    "moon": _moon,
    "fish": _fish,
    "boat": _boat,
    "bird": _bird,
    "flower": _flower,
    "mushroom": _mushroom,
    "cloud": _cloud,
    "cat": _cat,
}
MIRRORED = ("moon", "fish", "boat", "bird", "cat", "house", "cloud")
"""Objects that may face either way."""
