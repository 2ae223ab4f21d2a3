"""Interleaved rounds: in each one every subject runs once, in an order drawn anew, so that drift hits all alike.

What is not timed: loading, building, the first call at a batch (reported apart) and the warm-up after it. What is: from
prompts and noise in main memory to pixels in main memory, tokenisation and transfers included. The garbage collector
is off meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from tiue_cli.bench.measure.clock import StageMs
from tiue_cli.bench.measure.machine import Control, MachineUse, watch_machine
from tiue_cli.bench.measure.memory import MemoryRise, watch_memory
from tiue_cli.bench.report.schema import Stage
from tiue_cli.bench.subjects.subject import Outcome, Subject

MIN_ROUNDS: Final = 6
"""Samples of a subject at least: with fewer the interval of a median is the whole range."""
SLOW_S: Final = 10.0
SLOW_ROUNDS: Final = 3
"""Samples at least of a subject that takes longer than SLOW_S a run."""
MAX_ROUNDS: Final = 256
WARM_UP_CALLS: Final = 2
"""After the first call; one for a slow subject."""

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, what is done of it, its whole, and what runs."""


@dataclass
class Measured:
    """What was measured of one subject at one batch; ``images`` are those of its first call."""

    first_call_ms: float
    images: np.ndarray
    memory: MemoryRise
    build_s: float | None = None
    warm_up: int = 0
    estimate_ms: float = 0.0
    """Of the last warm-up call: what the number of rounds is planned with."""
    samples_ms: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    stage_samples_ms: dict[Stage, list[float]] = field(default_factory=dict)

    def add(self, round_: int, latency_ms: float, stage_ms: StageMs) -> None:
        """Take one sample."""
        self.samples_ms.append(latency_ms)
        self.rounds.append(round_)
        for stage, value in stage_ms.items():
            self.stage_samples_ms.setdefault(stage, []).append(value)


@dataclass(frozen=True)
class BatchTiming:
    """All subjects at one batch, by key, and what the machine did meanwhile."""

    measured: Mapping[str, Measured]
    control_ms: tuple[float, ...]
    use: MachineUse
    stopped_by: BaseException | None = None
    """Ctrl-C or a signal that ended the rounds early."""


def measure_batch(
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    noise: np.ndarray,
    *,
    device: str,
    duration_s: float,
    seed: int,
    progress: Progress,
) -> BatchTiming:
    """Warm up and time ``subjects`` on the same prompts and noise, each for about ``duration_s``.

    Subjects that are not ``timed`` run once, for their pictures. Raises what the subjects raise; an interruption once
    the rounds have begun comes back with them, in ``stopped_by``.
    """
    where = f"batch {len(prompts)}"
    measured: dict[str, Measured] = {}
    with _small_heap():
        for number, subject in enumerate(subjects):
            progress(f"warm-up, {where}", number, len(subjects), subject.record.label)
            measured[subject.key] = _warm_up(subject, prompts, noise, device=device)
        progress(f"warm-up, {where}", len(subjects), len(subjects), "")
        timed = [subject for subject in subjects if subject.timed]
        estimates_ms = {subject.key: measured[subject.key].estimate_ms for subject in timed}
        strides = plan_rounds(estimates_ms, duration_s=duration_s)
        runs, rounds = sum(stride.count for stride in strides.values()), round_count(strides)
        control = Control(device)
        control_ms: list[float] = []
        last_round, stopped_by = -1, None
        with _no_garbage_collection(), watch_machine() as watch:
            try:
                for done, (round_, subject) in enumerate(_order(timed, strides, seed=seed)):
                    if round_ == len(control_ms):
                        control_ms.append(control.run_ms())
                    progress(f"timing, {where}", done, runs, f"round {round_ + 1} of {rounds}")
                    latency_ms, outcome = _timed_run(subject, prompts, noise, device=device)
                    measured[subject.key].add(round_, latency_ms, outcome.stage_ms)
                    last_round = round_
                progress(f"timing, {where}", runs, runs, "")
            except (KeyboardInterrupt, SystemExit) as interruption:
                stopped_by = interruption
    return BatchTiming(measured, tuple(control_ms[: last_round + 1]), watch(), stopped_by)


def _order(subjects: Sequence[Subject], strides: Mapping[str, Stride], *, seed: int) -> Iterator[tuple[int, Subject]]:
    """(round, subject) of every run; the order in a round is drawn. In every round somebody runs."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    for round_ in range(round_count(strides)):
        for position in generator.permutation(len(subjects)):
            subject = subjects[position]
            if round_ % strides[subject.key].every == 0:
                yield round_, subject


@dataclass(frozen=True)
class Stride:
    """A subject takes part in every ``every``-th round, ``count`` times in all."""

    every: int
    count: int


def plan_rounds(estimates_ms: Mapping[str, float], *, duration_s: float) -> dict[str, Stride]:
    """How often each subject runs: about ``duration_s``, within MIN_ROUNDS (SLOW_ROUNDS for a slow one) and MAX_ROUNDS.

    Slow subjects skip rounds, by powers of two: so the rounds of a slow subject are rounds of every faster one as
    well, and any two have samples of the same rounds to be compared by.
    """
    wanted = {}
    for key, estimate_ms in estimates_ms.items():
        least = SLOW_ROUNDS if estimate_ms > SLOW_S * 1000 else MIN_ROUNDS
        wanted[key] = min(MAX_ROUNDS, max(least, math.ceil(duration_s * 1000 / max(estimate_ms, 1e-3))))
    rounds = max(wanted.values(), default=0)
    strides = {}
    for key, count in wanted.items():
        every = 2 ** int(math.log2(rounds / count))
        strides[key] = Stride(every, math.ceil(rounds / every))
    return strides


def round_count(strides: Mapping[str, Stride]) -> int:
    """Rounds in all."""
    return max((stride.every * (stride.count - 1) + 1 for stride in strides.values()), default=0)


def _warm_up(subject: Subject, prompts: Sequence[str], noise: np.ndarray, *, device: str) -> Measured:
    build_s = None
    if subject.compiles:
        # What is compiled is made at the first call of a batch: that is building, and the next call is the first.
        started = time.perf_counter()
        subject.run(prompts, noise)
        build_s = time.perf_counter() - started
    (first_ms, outcome), memory = watch_memory(device, lambda: _timed_run(subject, prompts, noise, device=device))
    result = Measured(first_ms, outcome.images, memory, build_s=build_s, estimate_ms=first_ms)
    if not subject.timed:
        return result
    for _ in range(1 if first_ms > SLOW_S * 1000 else WARM_UP_CALLS):
        result.estimate_ms, _ = _timed_run(subject, prompts, noise, device=device)
        result.warm_up += 1
    return result


def _timed_run(subject: Subject, prompts: Sequence[str], noise: np.ndarray, *, device: str) -> tuple[float, Outcome]:
    """(milliseconds end to end, outcome). Pictures lie in main memory at the end, so the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    outcome = subject.run(prompts, noise)
    return (time.perf_counter() - started) * 1000.0, outcome


@contextlib.contextmanager
def _small_heap() -> Iterator[None]:
    """Set aside what is alive already: the collections before each first call would go through all of the libraries."""
    whole = gc.get_freeze_count() == 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if whole:  # else it is for whoever set something aside before to take it back
            gc.unfreeze()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
