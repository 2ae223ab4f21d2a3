"""Signed distances to simple outlines, negative inside, on coordinate arrays of one shape.

After Inigo Quilez, "2D distance functions". Not all are exact outside: shadows come from covered areas, not from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiue_cli.papercut.world.paper import Array

Point = tuple[float, float]


def circle(x: Array, y: Array, radius: float) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(radius)


def ellipse(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """First-order distance: exact on the outline, a little short far from it."""
    u, v = x / np.float32(half_width), y / np.float32(half_height)
    length: Array = np.sqrt(u * u + v * v)
    u, v = u / np.float32(half_width), v / np.float32(half_height)
    distance: Array = length * (length - 1) / (np.sqrt(u * u + v * v) + np.float32(1e-6))
    return distance


def box(x: Array, y: Array, half_width: float, half_height: float, corner: float = 0.0) -> Array:
    """A rectangle whose corners are rounded by `corner`."""
    qx, qy = np.abs(x) - np.float32(half_width - corner), np.abs(y) - np.float32(half_height - corner)
    outside: Array = np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2)
    return outside + np.minimum(np.maximum(qx, qy), 0) - np.float32(corner)


def segment(x: Array, y: Array, start: Point, end: Point) -> Array:
    """Distance to a line from start to end, zero on it."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    wx, wy = x - np.float32(start[0]), y - np.float32(start[1])
    t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
    wx, wy = wx - t * ex, wy - t * ey
    return np.sqrt(wx * wx + wy * wy)


def polygon(x: Array, y: Array, points: Sequence[Point]) -> Array:
    """A convex polygon, its corners in either turn: the largest of the distances to its sides' lines."""
    area = sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True))
    turn = 1.0 if area > 0 else -1.0
    result: Array | None = None
    for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True):
        length = turn * float(np.hypot(bx - ax, by - ay))
        side = x * np.float32((by - ay) / length) - y * np.float32((bx - ax) / length)
        side = side - np.float32((ax * (by - ay) - ay * (bx - ax)) / length)
        result = side if result is None else np.maximum(result, side)
    assert result is not None
    return result


def union(*distances: Array) -> Array:
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = np.minimum(nearest, distance)
    return nearest


def star(x: Array, y: Array, radius: float = 0.96, depth: float = 0.45) -> Array:
    """A five-pointed star, one point up: folded into one tenth of it."""
    k1 = (0.809016994, 0.587785252)
    x, y = np.abs(x), -y
    for sign in (1, -1):
        reach = 2 * np.maximum(np.float32(sign * k1[0]) * x - np.float32(k1[1]) * y, 0)
        x, y = x - reach * np.float32(sign * k1[0]), y + reach * np.float32(k1[1])
    x, y = np.abs(x), y - np.float32(radius)
    bx, by = depth * k1[1], depth * k1[0] - 1
    t = np.clip((x * bx + y * by) / (bx * bx + by * by), 0, radius)
    away = np.sqrt((x - bx * t) ** 2 + (y - by * t) ** 2)
    return away * np.sign(y * np.float32(bx) - x * np.float32(by))


def heart(x: Array, y: Array) -> Array:
    """Quilez's exact heart, scaled to the unit circle; its tip points down."""
    scale = np.float32(0.60)
    x, y = np.abs(x) * scale, 0.56 - y * scale
    lobes = np.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - np.float32(np.sqrt(2) / 4)
    half = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobes, tip) / scale
