"""Batches and noise: from specs of images to pixels, whatever the backend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tiue_cli.backends.base import TakesLoras
from tiue_cli.files.png import ImageSpec, LoraUse
from tiue_cli.model.noise import draw_noise

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.backends.base import Backend, ProgressFn


MAX_BATCH = 16


PIXELS_PER_BATCH = {"cpu": 512 * 512, "cuda": 8 * 512 * 512, "gpu": 2 * 512 * 512, "npu": 512 * 512}


class OnePassPipeline:
    """Specifications in, pixels out, on any backend: the order, the batches and the noise."""

    def __init__(self, backend: Backend, *, batch: int | None = None) -> None:
        """``batch`` None chooses by size and device."""
        self._backend = backend
        self._batch = batch

    def images(
        self, specs: Sequence[ImageSpec], *, progress: ProgressFn | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position in ``specs``, (H, W, 3) uint8), batch by batch.

        Images of one batch share size, steps and adapters. ``progress`` is called with the number of images done, a
        fraction within a batch.
        """
        done = 0
        for positions in self._batches(specs):
            batch = self._batch_of(specs, positions)
            pixels = self._backend.generate(
                [spec.prompt for spec in batch],
                self._noise(batch),
                steps=batch[0].steps,
                progress=None if progress is None else _scaled(progress, start=done, count=len(batch)),
            )
            yield from zip(positions, pixels, strict=True)
            done += len(batch)
            if progress is not None:
                progress(done)

    def latents(self, specs: Sequence[ImageSpec]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position in ``specs``, latents (C, h, w) float32) in the same batches; nothing is decoded."""
        for positions in self._batches(specs):
            batch = self._batch_of(specs, positions)
            prompts = [spec.prompt for spec in batch]
            latents = self._backend.latents(prompts, self._noise(batch), steps=batch[0].steps)
            yield from zip(positions, latents, strict=True)

    def batch_for(self, size: tuple[int, int]) -> int:
        """Images a batch at ``size`` (H, W) pixels."""
        if self._batch is not None:
            return self._batch
        limit = self._backend.largest_batch(size)
        fitting = max(1, PIXELS_PER_BATCH[self._backend.device] // math.prod(size))
        return min(fitting, MAX_BATCH if limit is None else min(MAX_BATCH, limit))

    def _batch_of(self, specs: Sequence[ImageSpec], positions: Sequence[int]) -> list[ImageSpec]:
        """The specs at ``positions``, with their adapters on the model."""
        batch = [specs[position] for position in positions]
        if isinstance(self._backend, TakesLoras):
            self._backend.use_loras(batch[0].loras)
        return batch

    def _noise(self, batch: Sequence[ImageSpec]) -> np.ndarray:
        return draw_noise([spec.seed for spec in batch], self._backend.latent_shape(batch[0].size))

    def _batches(self, specs: Sequence[ImageSpec]) -> Iterator[list[int]]:
        groups: dict[tuple[tuple[LoraUse, ...], tuple[int, int], int], list[int]] = {}
        for position, spec in enumerate(specs):
            groups.setdefault((spec.loras, spec.size, spec.steps), []).append(position)
        # By adapters first, so that each set of them is put on the model once.
        order = {loras: number for number, loras in enumerate(dict.fromkeys(loras for loras, _, _ in groups))}
        for (_, size, _), positions in sorted(groups.items(), key=lambda group: order[group[0][0]]):
            batch = self.batch_for(size)
            for start in range(0, len(positions), batch):
                yield positions[start : start + batch]


def _scaled(progress: ProgressFn, *, start: int, count: int) -> ProgressFn:
    return lambda share: progress(start + share * count)
