"""A grid to look at: pictures of the same prompts row under row, with the prompt above and the row's name beside.

         a red star   a blue house
teacher  ┌────────┐   ┌────────┐
         └────────┘   └────────┘
student  ┌────────┐   ┌────────┐      further prompts in strips below
         └────────┘   └────────┘
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiue_cli.base.text import plain

COLUMNS = 8
GAP_PX = 2
STRIP_GAP_PX = 8
PAPER_GREY = 235
INK_GREY = 40
CAPTION_LINES = 3

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridLayout:
    """Where things are, in pixels; a grid of ``count`` prompts with pictures of ``height`` x ``width``."""

    names: tuple[str, ...]
    """Of the rows, from the top."""
    count: int
    height: int
    width: int

    @property
    def columns(self) -> int:
        """Pictures beside each other."""
        return min(COLUMNS, self.count)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of the whole."""
        strips = -(-self.count // COLUMNS)
        return strips * self._strip_px, self.margin_px + self.columns * (self.width + GAP_PX), 3

    @property
    def margin_px(self) -> int:
        """Left of the pictures, for the names."""
        return max(round(_font(self.font_px).getlength(name)) for name in self.names) + 3 * GAP_PX

    @property
    def font_px(self) -> int:
        """Small beside a picture, and never too small to read."""
        return max(10, self.width // 24)

    @property
    def caption_px(self) -> int:
        """Above the pictures of a strip, for the prompts."""
        return CAPTION_LINES * self.line_px + GAP_PX

    @property
    def line_px(self) -> int:
        """From line to line."""
        return self.font_px + 2

    def corner(self, row: int, index: int) -> tuple[int, int]:
        """(top, left) of the picture of prompt ``index`` in row ``row``."""
        strip, column = divmod(index, COLUMNS)
        top = strip * self._strip_px + self.caption_px + row * (self.height + GAP_PX)
        return top, self.margin_px + column * (self.width + GAP_PX)

    @property
    def _strip_px(self) -> int:
        return self.caption_px + len(self.names) * (self.height + GAP_PX) + STRIP_GAP_PX


def draw_grid(rows: Mapping[str, np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of named rows of pictures (B, h, w, 3) uint8, with a caption above each of the B columns.

    COLUMNS to a strip, strips below each other. What does not fit into the lines of a caption ends in an ellipsis.
    """
    count, height, width = next(iter(rows.values())).shape[:3]
    layout = GridLayout(tuple(rows), count, height, width)
    sheet = Image.new("RGB", (layout.shape[1], layout.shape[0]), (PAPER_GREY,) * 3)
    pen, font = ImageDraw.Draw(sheet), _font(layout.font_px)
    for index, caption in enumerate(captions):
        top, left = layout.corner(0, index)
        for number, line in enumerate(_lines(plain(caption), font, width)):
            pen.text((left, top - layout.caption_px + number * layout.line_px), line, (INK_GREY,) * 3, font)
    for row, (name, pictures) in enumerate(rows.items()):
        for strip in range(0, count, COLUMNS):
            top = layout.corner(row, strip)[0] + (height - layout.font_px) // 2
            pen.text((GAP_PX, top), name, (INK_GREY,) * 3, font)
        for index, picture in enumerate(pictures):
            top, left = layout.corner(row, index)
            sheet.paste(Image.fromarray(picture), (left, top))
    return np.array(sheet)


def _lines(text: str, font: _Font, width: int) -> list[str]:
    """``text`` in at most CAPTION_LINES lines of ``width`` pixels, broken between words where that is possible."""
    lines: list[str] = []
    while text and len(lines) < CAPTION_LINES:
        last = len(lines) == CAPTION_LINES - 1
        fits = _fitting(text, font, width)
        if fits < len(text) and last:
            lines.append(text[: _fitting(f"{text}…", font, width - round(font.getlength("…")))] + "…")
            break
        # A word that is cut goes to the next line whole, unless it is longer than a line.
        space = text.rfind(" ", 0, fits + 1)
        end = space if fits < len(text) and space > 0 else fits
        lines.append(text[:end])
        text = text[end:].lstrip()
    return lines


def _fitting(text: str, font: _Font, width: int) -> int:
    """How many characters from the start are within ``width`` pixels; at least one."""
    longest = min(len(text), width)  # no character is narrower than a pixel
    return max(1, next((end for end in range(longest, 0, -1) if font.getlength(text[:end]) <= width), 1))


@functools.cache
def _font(size_px: int) -> _Font:
    return ImageFont.load_default(size_px)
