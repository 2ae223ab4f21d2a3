"""The six backgrounds: a sky, what hangs in it, and two or three cut hills."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiue_cli.papercut.world.paper import UNITS, Array, Color, cover, lay, paint, rgb

CELL = 13.0
"""Units of a cell that holds at most one speck."""


@dataclass(frozen=True)
class Backdrop:
    """Colours from sky top to near hill (sRGB, 0..1), the disc in the sky if any, the specks if any."""

    top: Color
    bottom: Color
    far: Color
    near: Color
    disc: Color | None = None
    specks: Color | None = None


BACKDROPS = {
    "night": Backdrop((0.05, 0.06, 0.23), (0.19, 0.20, 0.48), (0.12, 0.12, 0.34), (0.07, 0.07, 0.22),
                      specks=(0.93, 0.92, 0.80)),
    "dawn": Backdrop((0.99, 0.76, 0.50), (0.98, 0.56, 0.47), (0.66, 0.32, 0.46), (0.44, 0.20, 0.40),
                     disc=(1.0, 0.90, 0.68)),
    "meadow": Backdrop((0.50, 0.77, 0.95), (0.82, 0.93, 0.98), (0.53, 0.77, 0.39), (0.33, 0.62, 0.28)),
    "snow": Backdrop((0.62, 0.74, 0.90), (0.82, 0.89, 0.97), (0.86, 0.91, 0.98), (0.97, 0.98, 1.00),
                     specks=(1.0, 1.0, 1.0)),
    "sea": Backdrop((0.35, 0.80, 0.82), (0.08, 0.48, 0.66), (0.07, 0.36, 0.56), (0.93, 0.83, 0.60),
                    specks=(0.75, 0.95, 0.96)),
    "desert": Backdrop((0.60, 0.85, 0.83), (0.98, 0.93, 0.78), (0.90, 0.66, 0.38), (0.80, 0.48, 0.24)),
}  # fmt: skip


@dataclass(frozen=True)
class Weather:
    """What varies in a background: bends, hills and light (24,), and the specks' places and sizes, if it has any."""

    name: str
    u: Array
    places: Array | None = None
    sizes: Array | None = None


def draw_weather(name: str, rng: np.random.Generator) -> Weather:
    """The random numbers of a background, the same for every size of picture."""
    u = rng.random(24, np.float32)
    if BACKDROPS[name].specks is None:
        return Weather(name, u)
    cells = int(UNITS / CELL) + 2
    return Weather(name, u, rng.random((cells, cells, 2), np.float32), rng.random((cells, cells), np.float32))


def paint_background(canvas: Array, weather: Weather, scale: float) -> None:
    """Fill the canvas (3, S, S), in place."""
    backdrop, size, u = BACKDROPS[weather.name], canvas.shape[-1], weather.u
    grid = (np.arange(size, dtype=np.float32) + 0.5) / np.float32(scale)  # in units
    tones = [rgb(c) for c in (backdrop.top, backdrop.bottom, backdrop.far, backdrop.near)]
    height = np.clip(grid / UNITS * (1 + 0.36 * (u[0] - 0.5)), 0, 1)[:, None]
    canvas[:] = tones[0] + (tones[1] - tones[0]) * height
    if backdrop.specks is not None:
        _specks(canvas, grid, backdrop.specks, weather, scale)
    if backdrop.disc is not None:
        x, y = grid[None, :] - (14 + 36 * u[5]), grid[:, None] - (30 + 10 * u[6])
        area = cover((np.sqrt(x * x + y * y) - np.float32(9.5)) * np.float32(scale))
        lay(canvas, area, rgb(backdrop.disc), depth=0.6, scale=scale)
    middle = 0.5 * (tones[2] + tones[3]) if weather.name != "sea" else tones[2] * np.float32(0.86)
    layers = ((42.0, tones[2]), (48.5, middle), (55.0, tones[3]))
    for number, (base, tone) in enumerate(layers):
        a, b, c, d = u[8 + 4 * number : 12 + 4 * number]
        swell = (1.4 + 1.8 * b) * np.sin(grid / 9.5 + 6.28 * c) + 1.1 * np.sin(grid / 4.9 + 6.28 * d)
        _hill(canvas, grid, (base + 5 * (a - 0.5) + swell).astype(np.float32), tone, scale)
    canvas *= np.float32(0.97 + 0.06 * u[7])


def _hill(canvas: Array, grid: Array, wave: Array, tone: Array, scale: float) -> None:
    """A sheet whose upper edge is cut along the wave (in units); only the rows that it can touch are drawn."""
    first = max(0, int((wave.min() - 5) * scale))
    below = grid[first:, None] - wave[None, :]  # units under the edge
    rows = canvas[:, first:]
    soft = np.clip(1 + below / np.float32(2.6), 0, 1)
    rows *= 1 - np.float32(0.24) * soft * soft
    light = np.float32(0.22) * np.clip(1 - np.abs(below - np.float32(0.35)) / np.float32(0.5), 0, 1)
    paper = tone * (np.float32(1.05) - np.float32(0.006) * np.clip(below, 0, 20))
    paper += light * (1 - paper)
    paint(rows, cover(-below * np.float32(scale)), paper)


def _specks(canvas: Array, grid: Array, color: Color, weather: Weather, scale: float) -> None:
    """Small dots in the sky: stars, flakes or bubbles, at most one in each cell."""
    assert weather.places is not None and weather.sizes is not None
    cell = np.float32(CELL)
    across, down = grid + cell * weather.u[1], grid + cell * weather.u[2]
    ix, iy = (across / cell).astype(int), (down / cell).astype(int)
    center = (np.float32(2) + (cell - 4) * weather.places)[iy][:, ix]
    dx, dy = (across % cell)[None, :] - center[..., 0], (down % cell)[:, None] - center[..., 1]
    radius = np.where(weather.sizes < 0.55, np.float32(0.45) + np.float32(0.8) * weather.sizes, np.float32(-9))
    area = cover((np.sqrt(dx * dx + dy * dy) - radius[iy][:, ix]) * np.float32(scale))
    paint(canvas, np.float32(0.85) * area, rgb(color))
