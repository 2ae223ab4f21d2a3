"""A grid says what is on it, and its captions touch no picture."""

from __future__ import annotations

import numpy as np
import pytest

from tiue_cli.distill.grid import COLUMNS, GAP_PX, PAPER_GREY, GridLayout, draw_grid


def pictures(count: int, side: int, *, first: int) -> np.ndarray:
    """One level a picture, each another one, none of them the paper's or the ink's."""
    levels = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, side, side, 3)).copy()


def inked(pixels: np.ndarray) -> bool:
    return bool((pixels != PAPER_GREY).any())


@pytest.mark.parametrize(("count", "side"), [(1, 32), (8, 64), (11, 64), (3, 512)])
def test_every_picture_stands_whole_under_its_caption_and_beside_its_name(count: int, side: int) -> None:
    rows = {"teacher": pictures(count, side, first=100), "student": pictures(count, side, first=150)}
    grid = draw_grid(rows, ["a red star above a blue house"] * count)
    layout = GridLayout(tuple(rows), count, side, side)
    assert grid.shape == layout.shape
    for row, images in enumerate(rows.values()):
        for index, image in enumerate(images):
            top, left = layout.corner(row, index)
            np.testing.assert_array_equal(grid[top : top + side, left : left + side], image)
            if row == 0:
                assert inked(grid[top - layout.caption_px : top, left : left + side])
            if index % COLUMNS == 0:
                assert inked(grid[top : top + side, : left - 1])


@pytest.mark.parametrize(
    "caption",
    ["Donaudampfschifffahrtsgesellschaft" * 5, "a b " * 200, "", "夜\n\x1b[31m🌙"],
)
def test_a_caption_stays_within_its_column(caption: str) -> None:
    rows = {"teacher": pictures(2, 64, first=100)}
    grid = draw_grid(rows, [caption, ""])
    layout = GridLayout(("teacher",), 2, 64, 64)
    top, left = layout.corner(0, 0)
    assert inked(grid[:top, left : left + 64 + GAP_PX]) == bool(caption)
    assert not inked(grid[:top, left + 64 + GAP_PX :])


def test_prompts_that_differ_at_their_beginning_look_different() -> None:
    one, other = (draw_grid({"teacher": pictures(1, 64, first=9)}, [text]) for text in ("a red star", "a blue star"))
    assert (one != other).any()
