"""All randomness and the order of the data, as functions of (seed, step, process): a resumed run draws the same.

NumPy's Philox generator is counter-based (Salmon et al. 2011): a draw is addressed, not remembered, so there is no
state to save, and the numbers are the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What is drawn; each has its own sequence. The numbers are part of the format: never reuse one."""

    ORDER = 1
    NOISE = 2
    SCORE = 3
    LORA = 4
    LORA_WEIGHTS = 5
    PAIR_NOISE = 6
    PAIR_ORDER = 7
    STUDENT_WEIGHTS = 8
    CALIBRATION = 9


def generator(seed: int, stream: Stream, *, step: int = 0, micro: int = 0, process: int = 0) -> np.random.Generator:
    """The generator of one draw; its address is everything in the call."""
    # The lowest counter word counts the numbers drawn, so addresses begin at the second.
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, micro, process, step]))


def normal(random: np.random.Generator, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal numbers of ``shape`` in float32."""
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32)).to(device)


class EndlessOrder:
    """Rows 0 … count-1, shuffled anew in every epoch and without end: no batch is ever short."""

    def __init__(self, count: int, *, seed: int, stream: Stream) -> None:
        self._count, self._seed, self._stream = count, seed, stream
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def rows(self, start: int, count: int) -> list[int]:
        """The rows at positions start … start + count - 1 of the endless sequence."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self._count)
        if epoch != self._epoch:
            random = generator(self._seed, self._stream, step=epoch)
            self._epoch, self._permutation = epoch, random.permutation(self._count)
        return int(self._permutation[index])
