"""Grids to look at: the same prompts and seeds every time, the teacher's picture above the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiue_cli.files.atomic import atomic_file
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.noise import draw_noise

COLUMNS = 8
GAP_PX = 2
PAIR_GAP_PX = 8
PAPER_GREY = 235

Sampler = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, C, h, w) from noise (B, C, h, w) and text states (B, L, D)."""


class Validation:
    """Fixed prompts and noise; the teacher draws them once, the student whenever it is asked."""

    def __init__(
        self,
        text_states: Tensor,
        *,
        decoder: ImageDecoder,
        latent_shape: tuple[int, int, int],
        seed: int,
        teacher: Sampler,
    ) -> None:
        count = len(text_states)
        self._states, self._decoder, self._teacher = text_states, decoder, teacher
        noise = torch.from_numpy(draw_noise(range(seed, seed + count), latent_shape))
        self._noise = noise.to(text_states.device, memory_format=torch.channels_last)
        self._teacher_images: np.ndarray | None = None

    def grid(self, student: Sampler, *, stop: object = False) -> np.ndarray | None:
        """Pixels (H, W, 3) uint8: per prompt the teacher's image, and below it the student's from the same noise.

        ``stop`` is looked at between two images; where it has become true there is no grid, and None.
        """
        if self._teacher_images is None:
            self._teacher_images = self._images(self._teacher, stop)
        images = None if self._teacher_images is None else self._images(student, stop)
        return None if self._teacher_images is None or images is None else tile([self._teacher_images, images])

    @torch.no_grad()
    def _images(self, sampler: Sampler, stop: object) -> np.ndarray | None:
        images = []
        # One by one: a grid must not need more memory than the training beside it.
        for noise, states in zip(self._noise.split(1), self._states.split(1), strict=True):
            if stop:
                return None
            images.append(self._decoder.decode(sampler(noise, states)))
        return np.concatenate(images)


def tile(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (B, H, W, 3) set below each other, image under image, COLUMNS to a strip, strips below each other."""
    count, height, width = rows[0].shape[:3]
    columns, strips = min(COLUMNS, count), -(-count // COLUMNS)
    strip_height = len(rows) * (height + GAP_PX) + PAIR_GAP_PX
    sheet = np.full((strips * strip_height, columns * (width + GAP_PX), 3), PAPER_GREY, dtype=np.uint8)
    for number, images in enumerate(rows):
        for index, image in enumerate(images):
            strip, column = divmod(index, COLUMNS)
            top, left = strip * strip_height + number * (height + GAP_PX), column * (width + GAP_PX)
            sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(path: Path, pixels: np.ndarray) -> Path:
    """Write a PNG, whole or not at all. Raises OutputError."""
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)
    return path
