"""The starting noise of an image: a function of its seed alone.

Drawn on the CPU by NumPy's Philox generator (Salmon et al. 2011, a counter-based generator), one generator an image,
so that neither the batch an image lies in, nor the device, nor the backend changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tiue_cli.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    import numpy as np

MAX_SEED = 2**63 - 1
"""Largest seed: one that every JSON reader and every 64-bit integer holds."""


def check_seed(seed: int) -> int:
    """Return ``seed`` when it lies in 0 … MAX_SEED; UsageError otherwise. Zero is a seed like any other."""
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed {seed} is out of range", hint=f"give a whole number from 0 to {MAX_SEED}")
    return seed


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> np.ndarray:
    """Draw x_T ~ N(0, I) for each image; returns (B, C, h, w) float32 for B seeds and a latent ``shape`` (C, h, w).

    Row i depends on ``seeds[i]`` and ``shape`` only. Raises UsageError for a seed out of range, OutOfMemoryError.
    """
    import numpy as np

    try:
        noise = np.empty((len(seeds), *shape), dtype=np.float32)
    except (MemoryError, ValueError) as error:  # the latter for more bytes than an address has
        raise OutOfMemoryError(
            f"the memory is full: the noise of {len(seeds)} images at once does not fit",
            hint="try a smaller --batch, or a smaller --size",
        ) from error
    for row, seed in zip(noise, seeds, strict=True):
        # The seed is the key itself, not entropy to be hashed into one: another implementation can repeat it.
        generator = np.random.Generator(np.random.Philox(key=check_seed(seed)))
        generator.standard_normal(dtype=np.float32, out=row)
    return noise
