"""What times the stages of an image: the wall clock on a CPU, CUDA events on a GPU.

Events are recorded in the stream between the kernels and read once the image is there, so that timing a stage does not
make the GPU wait; on a CPU torch computes before it returns, and the wall clock is right.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from tiue_cli.bench.report.schema import Stage

StageMs = dict[Stage, float]


class WallClock:
    """Times named stages of one run at a time, by ``time.perf_counter``: for whatever computes before it returns."""

    kind: Literal["wall", "cuda-events"] = "wall"

    def __init__(self) -> None:
        self._ms: StageMs = {}

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block as part of ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - started) * 1000.0)

    def add(self, name: Stage, ms: float) -> None:
        """Count milliseconds that somebody else timed as part of ``name``."""
        self._ms[name] = self._ms.get(name, 0.0) + ms

    def take_ms(self) -> StageMs:
        """Milliseconds of each stage since the last call."""
        taken, self._ms = self._ms, {}
        return taken


class CudaClock:
    """Stages by CUDA events in the current stream."""

    kind: Literal["wall", "cuda-events"] = "cuda-events"

    def __init__(self) -> None:
        self._events: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block's work on the GPU as part of ``name``."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((name, start, end))

    def take_ms(self) -> StageMs:
        """Milliseconds of each stage since the last call; waits for the device."""
        torch.cuda.synchronize()
        taken: StageMs = {}
        for name, start, end in self._events:
            taken[name] = taken.get(name, 0.0) + float(start.elapsed_time(end))
        self._events.clear()
        return taken


StageClock = WallClock | CudaClock


def run_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, until ``device`` has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000.0


def clock_for(device: str) -> StageClock:
    """The clock for ``cpu`` or ``cuda``."""
    return CudaClock() if device == "cuda" else WallClock()
