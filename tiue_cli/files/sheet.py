"""A contact sheet: many pictures in one, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_SHEET_PX = 8192
"""Longest side of a sheet; larger ones are scaled down, to keep it below 200 MB of memory."""
GAP_PX = 4
PAPER_GREY = 235


def columns_for(count: int) -> int:
    """Columns of a sheet of ``count`` pictures: as square as it gets, wider rather than taller."""
    return math.ceil(math.sqrt(count))


class ContactSheet:
    """A canvas on which pictures are placed by index, in any order, each in the middle of its cell."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """``sizes`` are the (height, width) in pixels of the pictures to come."""
        import numpy as np

        self.columns = columns_for(len(sizes))
        rows = math.ceil(len(sizes) / self.columns)
        cell = max(height for height, _ in sizes), max(width for _, width in sizes)
        room = (
            (MAX_SHEET_PX - GAP_PX * (rows + 1)) // rows,
            (MAX_SHEET_PX - GAP_PX * (self.columns + 1)) // self.columns,
        )
        self._scale = min(1.0, room[0] / cell[0], room[1] / cell[1])
        self._cell = tuple(max(1, math.floor(side * self._scale)) for side in cell)
        height, width = (
            count * side + (count + 1) * GAP_PX for count, side in zip((rows, self.columns), self._cell, strict=True)
        )
        self.pixels: np.ndarray = np.full((height, width, 3), PAPER_GREY, dtype=np.uint8)

    def place(self, index: int, image: np.ndarray) -> None:
        """Put ``image`` (H, W, 3) uint8 into cell ``index``."""
        if self._scale < 1.0:
            image = _shrunk(image, self._scale)
        row, column = divmod(index, self.columns)
        top = GAP_PX + row * (self._cell[0] + GAP_PX) + (self._cell[0] - image.shape[0]) // 2
        left = GAP_PX + column * (self._cell[1] + GAP_PX) + (self._cell[1] - image.shape[1]) // 2
        self.pixels[top : top + image.shape[0], left : left + image.shape[1]] = image


def _shrunk(image: np.ndarray, scale: float) -> np.ndarray:
    import numpy as np
    from PIL import Image

    size = tuple(max(1, math.floor(side * scale)) for side in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.LANCZOS))
