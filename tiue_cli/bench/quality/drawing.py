"""Draw the images of a quality measurement batch by batch, keep their features on disk, go on where it stopped.

    rows ─ batches ─▶ generate ─▶ resize ─▶ each extractor ─▶ <cache>/<subject>/<seed>/<extractor>/<first>-<last>.npy

Batches are dealt out to the processes; each writes its own files, whole or not at all, and nothing else passes between
them but a barrier. Memory holds one batch of images.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiue_cli import __version__
from tiue_cli.bench.quality.features import Extractor, Resizing
from tiue_cli.bench.quality.plan import Row
from tiue_cli.errors import DeviceError, QualityError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.rows import RowCache, cache_key
from tiue_cli.model.noise import draw_noise

_BARRIER_TIMEOUT = timedelta(hours=24)
"""Processes on slower devices keep the others waiting."""


@dataclass(frozen=True)
class QualitySubject:
    """Whose quality is measured: a callable that draws.

    ``generate`` takes B prompts and noise (B, *latent_shape) float32 and returns (B, H, W, 3) uint8 of ``size`` (H, W).
    ``identity`` is all that decides the pictures but prompt and seed (hash of the weights, steps, guidance, precision,
    backend): cached features are only taken up again where it is the same.
    """

    key: str
    identity: str
    size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    generate: Callable[[Sequence[str], NDArray[np.float32]], NDArray[np.uint8]]


class Processes:
    """The processes that draw together: one, or those of ``accelerate launch`` (on a CPU, of ``torchrun``).

    They must share the cache folder. Raises DeviceError where the launcher started several that cannot find each other.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self._state = None
        started = int(os.environ.get("WORLD_SIZE", "1"))
        # Without a launcher there is nothing to set up, and Accelerate need not be loaded.
        if started > 1:
            import torch
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            # Accelerate itself leaves processes without a GPU alone unless it is told that they are meant to be.
            on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
            self._state = PartialState(cpu=on_cpu, timeout=_BARRIER_TIMEOUT)
            self.index, self.count = self._state.process_index, self._state.num_processes
            if self.count != started:
                raise DeviceError(
                    f"{started} processes were started, and Accelerate sees {self.count}",
                    hint="start them with accelerate launch, or on a CPU with torchrun --nproc-per-node N",
                )

    @property
    def is_main(self) -> bool:
        """Whether this one gathers, measures and reports."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()


class Drawing:
    """The images of one subject and repetition, as features by name of the extractor."""

    def __init__(
        self,
        subject: QualitySubject,
        rows: Sequence[Row],
        extractors: Mapping[str, Extractor],
        *,
        resizing: Resizing,
        batch: int,
        cache: Path,
        keep: Path | None = None,
    ) -> None:
        """``keep`` is the folder for the pictures of this subject and repetition; None keeps none."""
        self._subject, self._rows, self._extractors, self._resizing = subject, rows, extractors, resizing
        self._keep = keep
        self._files = [f"{row:06d}.png" for row in range(len(rows))]
        self._warm, self._timed_images, self._timed_s = False, 0, 0.0
        key = cache_key(
            {
                "subject": subject.identity,
                "size": subject.size,
                "rows": [(row.prompt, row.seed) for row in rows],
                "resize": resizing.describe(),
                "tiue": __version__,
            }
        )
        folder = cache / f"{slug(subject.key)}-{key}"
        self._caches = {
            name: RowCache(folder / f"{name}-{one.sha256[:16]}", len(rows), (one.width,), max_chunk_rows=batch)
            for name, one in extractors.items()
        }
        self._batches = next(iter(self._caches.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, processes: Processes) -> Iterator[int]:
        """Draw what is missing of this process's share; yields the images of each batch. Raises what drawing raises."""
        for number in self._missing(processes):
            rows = self._range(number)
            images = self._generate(rows)
            if self._keep is not None:
                for row, image in zip(rows, images, strict=True):
                    with atomic_file(self._keep / self._files[row]) as temporary:
                        Image.fromarray(image).save(temporary, format="PNG")
            sized = self._resizing(images)
            for name, extractor in self._extractors.items():
                self._caches[name].write(number, extractor(sized))
            yield len(rows)

    def remaining(self, processes: Processes) -> int:
        """Images that this process still has to draw."""
        return sum(len(self._range(number)) for number in self._missing(processes))

    @property
    def timed(self) -> tuple[int, float]:
        """Images that this process drew now, rather than found in the cache, without its first batch; and seconds."""
        return self._timed_images, self._timed_s

    def features(self, name: str) -> NDArray[np.float32]:
        """Features (len, F) of one extractor, once all processes are done."""
        return self._caches[name].rows(range(len(self._rows)))

    def _range(self, number: int) -> range:
        return self._batches.chunk_range(number)

    def _missing(self, processes: Processes) -> list[int]:
        share = (processes.index, processes.count)
        lacking = {number for cache in self._caches.values() for number in cache.missing(share)}
        if self._keep is not None:
            every = range(processes.index, self._batches.chunks, processes.count)
            lacking |= {n for n in every if not all((self._keep / self._files[i]).is_file() for i in self._range(n))}
        return sorted(lacking)

    def _generate(self, rows: range) -> NDArray[np.uint8]:
        subject = self._subject
        chosen = [self._rows[row] for row in rows]
        noise = draw_noise([row.seed for row in chosen], subject.latent_shape)
        started = time.perf_counter()
        images = subject.generate([row.prompt for row in chosen], noise)
        elapsed_s = time.perf_counter() - started
        if images.shape != (len(chosen), *subject.size, 3) or images.dtype != np.uint8:
            raise QualityError(
                f"{subject.key} drew {images.dtype} {images.shape} for {len(chosen)} prompts at {subject.size}",
                hint="every picture of a measurement must have one size",
            )
        if self._warm:  # the first batch compiles and allocates
            self._timed_images += len(chosen)
            self._timed_s += elapsed_s
        self._warm = True
        return images

    def write_index(self) -> None:
        """Beside kept images: which prompt and seed each is of. Raises OutputError."""
        if self._keep is None:
            return
        lines = [
            json.dumps({"file": file, "prompt": row.prompt, "seed": row.seed})
            for file, row in zip(self._files, self._rows, strict=True)
        ]
        with atomic_file(self._keep / "images.jsonl") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def slug(key: str) -> str:
    """A subject's key as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip("-.") or "subject"
