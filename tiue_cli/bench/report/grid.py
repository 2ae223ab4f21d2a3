"""Pictures side by side: the same prompts and seeds a row, a subject a column."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tiue_cli.bench.quality.drawing import QualitySubject
from tiue_cli.bench.report.schema import GridRecord
from tiue_cli.errors import UsageError
from tiue_cli.model.noise import draw_noise

GAP_PX = 2
MAX_CELL_PX = 192
"""Longer side of a picture in a grid; larger ones are scaled down, smaller ones stay."""
REFERENCE = "reference"
_PAPER = 255


def make_grid(
    subjects: Iterable[QualitySubject],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    reference: NDArray[np.uint8] | None = None,
) -> GridRecord:
    """Draw each prompt with its seed by each subject; ``reference`` (B, H, W, 3) makes a first column.

    Cells lie GAP_PX apart on white, without a border, so that a cell's place follows from ``cell``. Raises UsageError
    where there is nothing to draw or counts differ.
    """
    if not prompts or len(prompts) != len(seeds) or (reference is not None and len(reference) != len(prompts)):
        raise UsageError("a grid needs a prompt, a seed and, where given, a reference for each row", hint="count them")
    columns = {} if reference is None else {REFERENCE: reference}
    for subject in subjects:
        noise = draw_noise(seeds, subject.latent_shape)
        # One by one: a grid must not need a larger batch than the measurement beside it.
        columns[subject.key] = np.concatenate([subject.generate([p], noise[i : i + 1]) for i, p in enumerate(prompts)])
    if not columns:
        raise UsageError("a grid needs a subject", hint="name a model")
    return picture_grid(columns, prompts, seeds)


def picture_grid(columns: Mapping[str, NDArray[np.uint8]], prompts: Sequence[str], seeds: Sequence[int]) -> GridRecord:
    """The grid of pictures (rows, H, W, 3) that are drawn already, by the key of each column; at least one column."""
    largest = max((column.shape[1:3] for column in columns.values()), key=max)
    scale = min(1.0, MAX_CELL_PX / max(largest))
    cell = (round(largest[0] * scale), round(largest[1] * scale))
    return GridRecord(
        columns=tuple(columns),
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        png_base64=_png(_sheet(list(columns.values()), cell)),
        cell=cell,
    )


def _sheet(columns: Sequence[NDArray[np.uint8]], cell: tuple[int, int]) -> NDArray[np.uint8]:
    rows = len(columns[0])
    height, width = rows * (cell[0] + GAP_PX) - GAP_PX, len(columns) * (cell[1] + GAP_PX) - GAP_PX
    sheet = np.full((height, width, 3), _PAPER, np.uint8)
    for number, column in enumerate(columns):
        for row, image in enumerate(column):
            top, left = row * (cell[0] + GAP_PX), number * (cell[1] + GAP_PX)
            sheet[top : top + cell[0], left : left + cell[1]] = _fitted(image, cell)
    return sheet


def _fitted(image: NDArray[np.uint8], cell: tuple[int, int]) -> NDArray[np.uint8]:
    if image.shape[:2] == cell:
        return image
    size = (cell[1], cell[0])
    return np.asarray(ImageOps.pad(Image.fromarray(image), size, Image.Resampling.LANCZOS, color=(_PAPER,) * 3))


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
