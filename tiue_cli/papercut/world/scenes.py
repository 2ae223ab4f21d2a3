"""Draw papercut scenes at any size: anti-aliased, deterministic per seed.

A picture is layers of paper: a backdrop, then the things of the caption's groups. What the caption leaves open (place,
size, turn, shade, hills, light, grain) is drawn per image from (seed, index), so an image does not depend on the batch
that it was drawn in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiue_cli.papercut.world.backgrounds import Weather, draw_weather, paint_background
from tiue_cli.papercut.world.captions import Group, SceneSpec, resolved
from tiue_cli.papercut.world.paper import UNITS, Array, Brush, fibre
from tiue_cli.papercut.world.shapes import DRAWERS, MIRRORED, Stock

SIZE = 128  # pixels, square
# sRGB, 0..1. Shades vary around these per thing.
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
# The radius of a thing as a share of the largest that its place allows: where the caption says it, and where not.
SIZE_RANGES: dict[str | None, tuple[float, float]] = {"small": (0.54, 0.62), "big": (0.92, 1.0), None: (0.66, 0.98)}


@dataclass(frozen=True)
class Piece:
    """One thing as it is cut: x, y, radius in units, angle in radians."""

    object: str
    color: Array
    pattern: str | None
    x: float
    y: float
    radius: float
    angle: float
    flip: bool


@dataclass(frozen=True)
class Composition:
    """Everything that chance decides about a picture, apart from its grain; the same for every size in pixels."""

    scene: SceneSpec
    """The spec with its open colours, background and relation as drawn."""
    weather: Weather
    groups: tuple[tuple[Piece, ...], ...]
    """The pieces of each group, in reading order of the groups."""


def compose(spec: SceneSpec, rng: np.random.Generator) -> Composition:
    """Decide what a spec leaves open."""
    scene = resolved(spec, random.Random(int(rng.integers(2**62))))
    assert scene.background is not None
    weather = draw_weather(scene.background, rng)
    groups = []
    for group, places in zip(scene.slots, layout(scene, rng), strict=True):
        color = _shade(group, rng)
        turn = 0.3 * (rng.random() - 0.5)
        flip = group.object in MIRRORED and rng.random() < 0.5
        groups.append(tuple(
            Piece(group.object, color, group.pattern, x, y, radius, turn + 0.16 * (rng.random() - 0.5), flip)
            for x, y, radius in places
        ))  # fmt: skip
    return Composition(scene, weather, tuple(groups))


def paint_picture(composition: Composition, rng: np.random.Generator, *, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture (size, size, 3) uint8 of a composition; `rng` draws the grain."""
    canvas = np.empty((3, size, size), np.float32)
    paint_background(canvas, composition.weather, size / UNITS)
    for piece in (piece for group in composition.groups for piece in group):
        lay_piece(canvas, piece, Stock(piece.color, piece.pattern))
    canvas += fibre(rng, size)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def lay_piece(canvas: Array, piece: Piece, stock: Stock) -> None:
    """Lay one thing, cut from this paper, on a square canvas (3, H, H), in place."""
    place, scale = (piece.x, piece.y), canvas.shape[-1] / UNITS
    DRAWERS[piece.object](Brush(canvas, place, piece.radius, angle=piece.angle, flip=piece.flip, scale=scale), stock)


def render(specs: Sequence[SceneSpec], seed: int, *, size: int = SIZE) -> NDArray[np.uint8]:
    """Render one image a spec; returns (N, size, size, 3) uint8. Image i depends on (seed, i, specs[i], size) alone."""
    images = np.empty((len(specs), size, size, 3), np.uint8)
    for index, spec in enumerate(specs):
        rng = _draws(seed, index)
        images[index] = paint_picture(compose(spec, rng), rng, size=size)
    return images


def compositions(specs: Sequence[SceneSpec], seed: int) -> list[Composition]:
    """What `render` paints for these specs and this seed: colours, places and sizes of all things."""
    return [compose(spec, _draws(seed, index)) for index, spec in enumerate(specs)]


def _draws(seed: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, index])


def _shade(group: Group, rng: np.random.Generator) -> Array:
    assert group.color is not None
    u = rng.random(4, np.float32)
    color: Array = np.array(PALETTE[group.color], np.float32) * (0.94 + 0.1 * u[0]) + 0.04 * (u[1:] - 0.5)
    return color.clip(0, 1)


def layout(scene: SceneSpec, rng: np.random.Generator) -> list[list[tuple[float, float, float]]]:
    """For each slot the places of its things: (x, y, radius) in units, apart from one another and inside the picture.

    The scene is resolved: two groups have one of the four relations.
    """
    slots = scene.slots
    if len(slots) == 1:
        return [_in_box(slots[0], (0, 0, UNITS, UNITS), rng)]
    if len(slots) == 3:
        # A zigzag: the middle one stands lower or higher than its neighbours, so that all three may be larger.
        low = 27.0 if rng.random() < 0.5 else 0.0
        columns = ((0.0, low), (19.0, 27.0 - low), (38.0, low))
        return [_in_box(g, (x, 5 + y, x + 26, 32 + y), rng) for g, (x, y) in zip(slots, columns, strict=True)]
    # The border moves towards the group with fewer things.
    weights = [1.0 if group.count == 1 else 1.25 for group in slots]
    border = UNITS * weights[0] / sum(weights)
    if scene.axis == "vertical":
        border = UNITS / 2
        boxes = [(0.0, 0.0, UNITS, border), (0.0, border, UNITS, UNITS)]
    else:
        boxes = [(0.0, 0.0, border, UNITS), (border, 0.0, UNITS, UNITS)]
    return [_in_box(group, box, rng) for group, box in zip(slots, boxes, strict=True)]


def _in_box(
    group: Group, box: tuple[float, float, float, float], rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """The places of a group's things inside a box (left, top, right, bottom): in a row, a column or a triangle."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    cells = _cells(group.count, width, height, rng)
    room = min(min(w * width, h * height) for _, _, w, h in cells)
    low, high = SIZE_RANGES[group.size]
    radius = min(room / 2 - 0.7, 25.0) * (low + (high - low) * float(rng.random()))
    places = []
    for x, y, w, h in cells:
        # Free play inside the cell, less than all of it: the middle is where things stand.
        play_x, play_y = (max(0.0, side / 2 - radius - 0.8) for side in (w * width, h * height))
        u, v = rng.random(2) * 2 - 1
        reach_x, reach_y = min(0.85 * play_x, 14.0), min(0.85 * play_y, 14.0)
        places.append((left + x * width + float(u) * reach_x, top + y * height + float(v) * reach_y, radius))
    return places


def _cells(
    count: int, width: float, height: float, rng: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """Cells (x, y of the middle, width, height) as shares of a box, one a thing, in reading order."""
    wide = width > 1.5 * height
    tall = height > 1.5 * width
    draw = rng.random()
    if count == 1:
        return [(0.5, 0.5, 1.0, 1.0)]
    if count == 2:
        if wide or (not tall and draw < 0.5):
            return [(0.25, 0.5, 0.5, 1.0), (0.75, 0.5, 0.5, 1.0)]
        return [(0.5, 0.25, 1.0, 0.5), (0.5, 0.75, 1.0, 0.5)]
    if wide or (not tall and draw < 0.4):
        return [(x, 0.5, 1 / 3, 1.0) for x in (1 / 6, 0.5, 5 / 6)]
    if tall:
        return [(0.5, y, 1.0, 1 / 3) for y in (1 / 6, 0.5, 5 / 6)]
    if draw < 0.7:
        return [(0.5, 0.26, 0.5, 0.5), (0.27, 0.74, 0.5, 0.5), (0.73, 0.74, 0.5, 0.5)]
    return [(0.27, 0.26, 0.5, 0.5), (0.73, 0.26, 0.5, 0.5), (0.5, 0.74, 0.5, 0.5)]
