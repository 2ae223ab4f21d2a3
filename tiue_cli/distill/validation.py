"""Grids to look at: the same prompts and seeds every time, the teacher's picture above the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiue_cli.distill.grid import draw_grid
from tiue_cli.files.atomic import atomic_file
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.noise import draw_noise

Sampler = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, C, h, w) from noise (B, C, h, w) and text states (B, L, D)."""


class Validation:
    """Fixed prompts and noise; the teacher draws them once, the student whenever it is asked."""

    def __init__(
        self,
        prompts: Sequence[str],
        text_states: Tensor,
        *,
        decoder: ImageDecoder,
        latent_shape: tuple[int, int, int],
        seed: int,
        teacher: Sampler,
    ) -> None:
        count = len(text_states)
        self._prompts = tuple(prompts)
        self._states, self._decoder, self._teacher = text_states, decoder, teacher
        noise = torch.from_numpy(draw_noise(range(seed, seed + count), latent_shape))
        self._noise = noise.to(text_states.device, memory_format=torch.channels_last)
        self._teacher_images: np.ndarray | None = None

    def grid(self, student: Sampler, *, stop: object = False) -> np.ndarray | None:
        """Pixels (H, W, 3) uint8: under each prompt the teacher's image and the student's from the same noise.

        ``stop`` is looked at between two images; where it has become true there is no grid, and None.
        """
        if self._teacher_images is None:
            self._teacher_images = self._images(self._teacher, stop)
        teacher_images = self._teacher_images
        images = None if teacher_images is None else self._images(student, stop)
        if teacher_images is None or images is None:
            return None
        return draw_grid({"teacher": teacher_images, "student": images}, self._prompts)

    @torch.no_grad()
    def _images(self, sampler: Sampler, stop: object) -> np.ndarray | None:
        images = []
        # One by one: a grid must not need more memory than the training beside it.
        for noise, states in zip(self._noise.split(1), self._states.split(1), strict=True):
            if stop:
                return None
            images.append(self._decoder.decode(sampler(noise, states)))
        return np.concatenate(images)


def save_grid(path: Path, pixels: np.ndarray) -> Path:
    """Write a PNG, whole or not at all. Raises OutputError."""
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)
    return path
