"""Claims about the grid: whose picture is where."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from tiue_cli.bench.records import GRID_GAP_PX, MAX_CELL_PX, picture_grid
from tiue_cli.bench.report.schema import GridRecord

PROMPTS, SEEDS = ("a star", "a red house"), (4, 9)


def flat(*values: int, side: int = 8) -> np.ndarray:
    """A column: a square a row, of one grey each."""
    return np.stack([np.full((side, side, 3), value, np.uint8) for value in values])


def pixels_of(grid: GridRecord) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(grid.png_base64))))


def test_each_cell_is_its_columns_picture_of_its_row() -> None:
    columns = {"reference": (1, 2), "m/30": (30, 31), "m/60": (60, 61)}
    grid = picture_grid({key: flat(*values) for key, values in columns.items()}, PROMPTS, SEEDS)
    assert grid.columns == tuple(columns) and grid.cell == (8, 8)
    assert (grid.prompts, grid.seeds) == (PROMPTS, SEEDS)
    pixels, step = pixels_of(grid), 8 + GRID_GAP_PX
    assert pixels.shape == (2 * 8 + GRID_GAP_PX, 3 * 8 + 2 * GRID_GAP_PX, 3)
    for column, values in enumerate(columns.values()):
        for row, value in enumerate(values):
            assert (pixels[row * step : row * step + 8, column * step : column * step + 8] == value).all()
    assert (pixels[8 : 8 + GRID_GAP_PX] == 255).all()


def test_large_pictures_are_scaled_down() -> None:
    grid = picture_grid({"a": flat(30, 40, side=512), "b": flat(60, 70, side=512)}, PROMPTS, SEEDS)
    assert grid.cell == (MAX_CELL_PX, MAX_CELL_PX)
    pixels = pixels_of(grid)
    assert pixels.shape[:2] == (2 * MAX_CELL_PX + GRID_GAP_PX,) * 2
    assert pixels[0, [0, -1], 0].tolist() == [30, 60] and len(grid.png_base64) < 20_000
