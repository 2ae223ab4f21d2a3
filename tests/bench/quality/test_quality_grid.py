"""Claims about the grid: whose picture is where."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from tiue_cli.bench.quality.drawing import QualitySubject
from tiue_cli.bench.report.grid import GAP_PX, MAX_CELL_PX, make_grid
from tiue_cli.bench.report.schema import GridRecord
from tiue_cli.errors import UsageError
from tiue_cli.model.noise import draw_noise

PROMPTS, SEEDS = ("a star", "a red house"), (4, 9)


def flat(red: int, *, side: int = 8) -> QualitySubject:
    """Draws squares of one colour: (red, 10 · length of the prompt, 128 + 8 · first noise)."""

    def generate(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        colors = [
            (red, 10 * len(prompt), 128 + int(8 * one.flat[0])) for prompt, one in zip(prompts, noise, strict=True)
        ]
        return np.stack([np.full((side, side, 3), color, np.uint8) for color in colors])

    return QualitySubject(f"m/{red}", "id", (side, side), (4, 1, 1), generate)


def pixels_of(grid: GridRecord) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(grid.png_base64))))


def test_each_cell_is_its_columns_picture_of_its_rows_prompt_and_seed() -> None:
    reference = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (1, 2)])
    grid = make_grid([flat(30), flat(60)], PROMPTS, SEEDS, reference=reference)
    assert grid.columns == ("reference", "m/30", "m/60") and grid.cell == (8, 8)
    pixels = pixels_of(grid)
    assert pixels.shape == (2 * 8 + GAP_PX, 3 * 8 + 2 * GAP_PX, 3)
    step = 8 + GAP_PX
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        first = float(draw_noise([seed], (4, 1, 1)).flat[0])
        for column, color in enumerate(
            [(row + 1,) * 3, *((red, 10 * len(prompt), 128 + int(8 * first)) for red in (30, 60))]
        ):
            cell = pixels[row * step : row * step + 8, column * step : column * step + 8]
            assert (cell == color).all()
    assert (pixels[8 : 8 + GAP_PX] == 255).all()


def test_large_pictures_are_scaled_down_and_small_ones_beside_them_fit() -> None:
    grid = make_grid([flat(30, side=512), flat(60, side=256)], PROMPTS, SEEDS)
    assert grid.cell == (MAX_CELL_PX, MAX_CELL_PX)
    pixels = pixels_of(grid)
    assert pixels.shape[:2] == (2 * MAX_CELL_PX + GAP_PX,) * 2
    assert (pixels[0, [0, -1], 0] == [30, 60]).all() and len(grid.png_base64) < 20_000


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(UsageError):
        make_grid([flat(1)], PROMPTS, (1,))
    with pytest.raises(UsageError):
        make_grid([], PROMPTS, SEEDS)
    with pytest.raises(UsageError):
        make_grid([flat(1)], PROMPTS, SEEDS, reference=np.zeros((3, 8, 8, 3), np.uint8))
