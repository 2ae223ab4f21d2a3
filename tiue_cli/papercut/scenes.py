"""Draw papercut scenes: signed distances, anti-aliased, vectorised over images, deterministic per seed.

A picture is layers of paper: a sky, two cut hills, the objects, each with a soft shadow on what lies behind. What the
caption leaves open (place, size, turn, shade, hills, light, grain) is drawn per image from (seed, index), so an image
does not depend on the batch that it was drawn in. Signed distances after Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiue_cli.papercut.captions import BACKGROUNDS, COLORS, OBJECTS, SceneSpec

SIZE = 64  # pixels, square
CHUNK = 128  # images rendered at once: bounds the memory, not the result
Array = NDArray[np.floating]  # float32 in fact; the stubs cannot follow

# sRGB, 0..1. Shades vary around these per image.
PALETTE = {
    "red": (0.88, 0.16, 0.17),
    "orange": (0.98, 0.55, 0.12),
    "yellow": (0.99, 0.86, 0.17),
    "green": (0.16, 0.62, 0.28),
    "blue": (0.15, 0.36, 0.88),
    "purple": (0.53, 0.23, 0.74),
    "pink": (0.99, 0.53, 0.73),
    "white": (0.97, 0.96, 0.93),
}
# sky top, sky bottom, far hill, near hill
SKIES = {
    "night": ((0.05, 0.06, 0.23), (0.19, 0.20, 0.48), (0.12, 0.12, 0.34), (0.07, 0.07, 0.22)),
    "dawn": ((0.99, 0.76, 0.50), (0.98, 0.56, 0.47), (0.66, 0.32, 0.46), (0.44, 0.20, 0.40)),
    "meadow": ((0.50, 0.77, 0.95), (0.82, 0.93, 0.98), (0.53, 0.77, 0.39), (0.33, 0.62, 0.28)),
    "snow": ((0.62, 0.74, 0.90), (0.82, 0.89, 0.97), (0.86, 0.91, 0.98), (0.97, 0.98, 1.00)),
    "sea": ((0.35, 0.80, 0.82), (0.08, 0.48, 0.66), (0.07, 0.36, 0.56), (0.93, 0.83, 0.60)),
}
TRUNK, CREAM, INK = (0.45, 0.27, 0.15), (1.0, 0.95, 0.78), (0.08, 0.08, 0.12)
_DRAWS = 32  # uniform numbers an image consumes; fixed, so that a new use does not move the others


@dataclass(frozen=True)
class _Paper:
    """Per-image random numbers and the pixel grid of one chunk; shapes (N, 1, 1) and (64, 64)."""

    uniform: Array  # (N, _DRAWS)
    x: Array
    y: Array

    def number(self, column: int, low: float, high: float) -> Array:
        return (low + (high - low) * self.uniform[:, column])[:, None, None]


def render(specs: Sequence[SceneSpec], seed: int) -> NDArray[np.uint8]:
    """Render one image a spec; returns (N, 64, 64, 3) uint8. Image i depends on (seed, i, specs[i]) alone.

    A spec whose background is None gets one of the five at random.
    """
    images = np.empty((len(specs), SIZE, SIZE, 3), np.uint8)
    for start in range(0, len(specs), CHUNK):
        stop = min(start + CHUNK, len(specs))
        images[start:stop] = _render_chunk(specs[start:stop], seed, start)
    return images


def _render_chunk(specs: Sequence[SceneSpec], seed: int, start: int) -> NDArray[np.uint8]:
    n = len(specs)
    generators = [np.random.Generator(np.random.Philox(key=[seed % 2**64, start + i])) for i in range(n)]
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    paper = _Paper(np.stack([g.random(_DRAWS, np.float32) for g in generators]), *np.meshgrid(grid, grid))
    canvas = _background(specs, paper)
    count = np.array([len(spec.things) for spec in specs])
    centers, radii = _place(specs, paper, count)
    for slot in range(2):
        for kind in OBJECTS:
            rows = np.array([i for i in range(n) if count[i] > slot and specs[i].slots[slot].object == kind], int)
            if len(rows):
                colors = [specs[i].slots[slot].color for i in rows]
                _draw(canvas, paper, rows, kind, colors, centers[rows, slot], radii[rows, slot], 8 + 6 * slot)
    canvas += np.stack([_grain(g) for g in generators])[..., None]
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _grain(generator: np.random.Generator) -> Array:
    """Paper fibre: faint noise, correlated over about two pixels."""
    noise = generator.standard_normal((SIZE + 1, SIZE + 1), np.float32)
    return np.float32(0.008) * (noise[1:, 1:] + noise[:-1, 1:] + noise[1:, :-1] + noise[:-1, :-1]) / 4


# --- layout -----------------------------------------------------------------------------------------------------------


def _place(specs: Sequence[SceneSpec], paper: _Paper, count: NDArray[np.int_]) -> tuple[Array, Array]:
    """Centres (N, 2, 2) as (x, y) and radii (N, 2) in pixels, inside the picture, pairs apart along their axis."""
    u = paper.uniform
    single = (count == 1)[:, None]
    radii = np.where(single, 16 + 4.5 * u[:, 0:1], 11.3 + 2.7 * u[:, 0:2]).astype(np.float32)
    half = np.float32(SIZE / 2)
    along = np.stack([half - 15.5 + 3 * (u[:, 2] - 0.5), half + 15.5 + 3 * (u[:, 3] - 0.5)], 1)
    across = half + 11 * (u[:, 4:6] - 0.5)
    vertical = np.array([spec.axis == "vertical" for spec in specs])[:, None]
    pairs = np.stack([np.where(vertical, across, along), np.where(vertical, along, across)], -1)
    margin = SIZE / 2 - radii[:, :1] - 1.5
    alone = half + np.stack([(u[:, 2:3] * 2 - 1) * margin, (u[:, 3:4] * 2 - 1) * margin], -1)
    return np.where(single[..., None], alone, pairs).astype(np.float32), radii


# --- background -------------------------------------------------------------------------------------------------------


def _mix(under: Array, over: Array, cover: Array) -> Array:
    return under + (over - under) * cover[..., None]


def _background(specs: Sequence[SceneSpec], paper: _Paper) -> Array:
    names = tuple(BACKGROUNDS)
    open_choice = (paper.uniform[:, 31] * len(names)).astype(int)
    chosen = [spec.background or names[open_choice[i]] for i, spec in enumerate(specs)]
    colors = np.array([SKIES[name] for name in chosen], np.float32)[:, :, None, None, :]  # (N, 4, 1, 1, 3)
    height = paper.y[None] / SIZE
    bend = paper.number(20, -0.18, 0.18)
    sky = _mix(colors[:, 0] + 0 * height[..., None], colors[:, 1], np.clip(height * (1 + bend), 0, 1))
    dawn = np.array([name == "dawn" for name in chosen], np.float32)[:, None, None]
    sun = np.hypot(paper.x - paper.number(21, 12, 52), paper.y - paper.number(22, 34, 44)) - 10
    sky = _mix(sky, np.array((1.0, 0.90, 0.68), np.float32), 0.75 * dawn * _cover(sun, 1.2))
    for layer, (base, first) in enumerate(((44.0, 23), (53.0, 27))):
        wave = (
            paper.number(first, base - 3, base + 3)
            + paper.number(first + 1, 1.5, 3.5) * np.sin(paper.x / 9.5 + paper.number(first + 2, 0, 6.28))
            + 1.2 * np.sin(paper.x / 4.7 + paper.number(first + 3, 0, 6.28))
        )
        distance = wave - paper.y  # below zero: on the hill
        sky *= 1 - 0.22 * _cover(distance - 1.5, 2.5)[..., None]
        shade = colors[:, 2 + layer] * (1.06 - 0.12 * np.clip((paper.y - wave) / 22, 0, 1)[..., None])
        sky = _mix(sky, shade, _cover(distance, 0.6))
    return sky * (0.97 + 0.06 * paper.uniform[:, 30])[:, None, None, None]


def _cover(distance: Array, softness: float) -> Array:
    """Coverage 0..1 of a pixel at a signed distance in pixels; softness: half the width of the edge in pixels."""
    t = np.clip(0.5 - distance / (2 * softness), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


# --- objects ----------------------------------------------------------------------------------------------------------


def _draw(
    canvas: Array,
    paper: _Paper,
    rows: NDArray[np.int_],
    kind: str,
    colors: Sequence[str],
    center: Array,
    radius: Array,
    column: int,
) -> None:
    """Draw one kind of object on the images `rows` of the canvas, in place."""
    u = paper.uniform[rows]
    r = radius[:, None, None]
    angle = (u[:, column] - 0.5)[:, None, None] * 0.36
    dx, dy = paper.x - center[:, 0, None, None], paper.y - center[:, 1, None, None]
    cos, sin = np.cos(angle), np.sin(angle)
    px, py = (dx * cos + dy * sin) / r, (dy * cos - dx * sin) / r
    if kind in ("moon", "fish"):  # they may face either way
        px = px * np.where(u[:, column + 1] < 0.5, -1, 1)[:, None, None]
    outline = _OUTLINES[kind](px, py) * r
    shadow = np.zeros_like(outline)
    shadow[:, 2:, 1:] = _cover(outline - 1.0, 3.2)[:, :-2, :-1]
    base = np.array([PALETTE[c] for c in colors], np.float32)
    base = base * (0.94 + 0.1 * u[:, column + 2 : column + 3]) + 0.04 * (u[:, column + 3 : column + 6] - 0.5)
    fill = base[:, None, None, :] * (1.05 - 0.11 * np.clip(py[..., None], -1, 1))
    fill = _details(kind, fill, px, py, r)
    layer = canvas[rows] * (1 - 0.42 * shadow[..., None])
    canvas[rows] = _mix(layer, np.clip(fill, 0, 1), _cover(outline, 0.65))


def _details(kind: str, fill: Array, px: Array, py: Array, r: Array) -> Array:
    """Paint what lies inside an outline: roof and windows, trunk, eye."""

    def paint(color: tuple[float, float, float] | Array, distance: Array) -> Array:
        return _mix(fill, np.asarray(color, np.float32), _cover(distance * r, 0.6))

    if kind == "house":
        fill = paint(fill * 0.66, _polygon(px, py, _ROOF))
        fill = paint(CREAM, _box(px - 0.28, py - 0.28, 0.155, 0.15))
        fill = paint(TRUNK, _box(px + 0.22, py - 0.53, 0.155, 0.34))
    elif kind == "tree":
        fill = paint(TRUNK, _box(px, py - 0.86, 0.3, 0.17))
        for edge in (-0.26, 0.22):  # the shade under each tier
            fill = paint(fill * 0.84, np.abs(py - edge - 0.05) - 0.055)
    elif kind == "fish":
        fill = paint(fill * 0.80, _polygon(px, py, _TAIL))
        fill = paint((1.0, 1.0, 1.0), np.hypot(px + 0.52, py + 0.10) - 0.17)
        fill = paint(INK, np.hypot(px + 0.54, py + 0.10) - 0.085)
    return fill


def _polygon(px: Array, py: Array, points: Sequence[tuple[float, float]]) -> Array:
    """Signed distance to a simple polygon; even-odd rule decides inside."""
    nearest = np.full_like(px, np.inf)
    sign = np.ones_like(px)
    for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = px - ax, py - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        crosses = (ay > py) != (by > py)
        left = wx * ey - wy * ex
        sign = np.where(crosses & ((left < 0) == (ey > 0)), -sign, sign)
    return np.asarray(sign * np.sqrt(nearest), np.float32)


def _box(px: Array, py: Array, half_width: float, half_height: float) -> Array:
    qx, qy = np.abs(px) - half_width, np.abs(py) - half_height
    return np.asarray(np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0), np.float32)


def _ring(radii: Sequence[float], start: float) -> list[tuple[float, float]]:
    turns = [start + 2 * np.pi * i / len(radii) for i in range(len(radii))]
    return [(float(r * np.cos(t)), float(r * np.sin(t))) for r, t in zip(radii, turns, strict=True)]


_STAR = _ring([0.98, 0.47] * 5, -np.pi / 2)
_ROOF = [(0.0, -1.0), (0.98, -0.12), (-0.98, -0.12)]
_WALLS = [(0.74, -0.3), (0.74, 0.85), (-0.74, 0.85), (-0.74, -0.3)]
_TAIL = [(0.42, 0.0), (0.98, -0.58), (0.98, 0.58)]
_TIERS = [
    [(0.0, -1.0), (0.52, -0.26), (-0.52, -0.26)],
    [(0.0, -0.66), (0.70, 0.22), (-0.70, 0.22)],
    [(0.0, -0.22), (0.86, 0.74), (-0.86, 0.74)],
]


def _union(*distances: Array) -> Array:
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = np.minimum(nearest, distance)
    return nearest


def _heart(px: Array, py: Array) -> Array:
    """Quilez's exact heart, scaled to the unit circle; its tip points down."""
    scale = np.float32(0.60)
    x, y = np.abs(px) * scale, 0.56 - py * scale
    lobes = np.hypot(x - 0.25, y - 0.75) - np.float32(np.sqrt(2) / 4)
    half = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return np.asarray(np.where(x + y > 1, lobes, tip) / scale, np.float32)


def _tree(px: Array, py: Array) -> Array:
    return _union(*(_polygon(px, py, tier) for tier in _TIERS), _box(px, py - 0.84, 0.15, 0.16)) - 0.02


def _moon(px: Array, py: Array) -> Array:
    disc = np.hypot(px, py) - 0.96
    bite = np.hypot(px - 0.46, py + 0.16) - 0.76
    return np.asarray(np.maximum(disc, -bite), np.float32)


def _fish(px: Array, py: Array) -> Array:
    # Two circles' intersection: a lens with a pointed nose.
    lens = np.maximum(np.hypot(px + 0.22, py + 0.42) - 1.0, np.hypot(px + 0.22, py - 0.42) - 1.0)
    return _union(np.asarray(lens, np.float32), _polygon(px, py, _TAIL)) - 0.03


_OUTLINES = {
    "star": lambda px, py: _polygon(px, py, _STAR) - 0.03,
    "heart": _heart,
    "tree": _tree,
    "house": lambda px, py: _union(_polygon(px, py, _ROOF), _polygon(px, py, _WALLS)) - 0.015,
    "moon": _moon,
    "fish": _fish,
}
assert set(_OUTLINES) == set(OBJECTS) and set(PALETTE) == set(COLORS) and set(SKIES) == set(BACKGROUNDS)
