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

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        columns: int | None = None,
        gap_px: int = GAP_PX,
        border_px: int | None = None,
        paper: int = PAPER_GREY,
        largest_cell_px: int = MAX_SHEET_PX,
    ) -> None:
        """``sizes`` are the (height, width) in pixels of the pictures to come; ``border_px`` None is ``gap_px``."""
        import numpy as np

        self.columns = columns_for(len(sizes)) if columns is None else columns
        shape = math.ceil(len(sizes) / self.columns), self.columns
        cell = max(height for height, _ in sizes), max(width for _, width in sizes)
        self._gap, self._border = gap_px, gap_px if border_px is None else border_px
        frame = [2 * self._border + (count - 1) * gap_px for count in shape]
        room = [(MAX_SHEET_PX - edge) // count for count, edge in zip(shape, frame, strict=True)]
        self._scale = min(1.0, room[0] / cell[0], room[1] / cell[1], largest_cell_px / max(cell))
        self.cell = max(1, math.floor(cell[0] * self._scale)), max(1, math.floor(cell[1] * self._scale))
        height, width = (count * side + edge for count, side, edge in zip(shape, self.cell, frame, strict=True))
        self.pixels: np.ndarray = np.full((height, width, 3), paper, dtype=np.uint8)

    def place(self, index: int, image: np.ndarray) -> None:
        """Put ``image`` (H, W, 3) uint8 into cell ``index``."""
        if self._scale < 1.0:
            image = _shrunk(image, self._scale)
        row, column = divmod(index, self.columns)
        top = self._border + row * (self.cell[0] + self._gap) + (self.cell[0] - image.shape[0]) // 2
        left = self._border + column * (self.cell[1] + self._gap) + (self.cell[1] - image.shape[1]) // 2
        self.pixels[top : top + image.shape[0], left : left + image.shape[1]] = image


def _shrunk(image: np.ndarray, scale: float) -> np.ndarray:
    import numpy as np
    from PIL import Image

    size = tuple(max(1, math.floor(side * scale)) for side in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.LANCZOS))
