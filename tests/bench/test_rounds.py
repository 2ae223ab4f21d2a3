"""Rounds: who runs when, what is kept, and what is not timed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tiue_cli.bench import rounds as timing
from tiue_cli.bench.report.schema import SubjectRecord
from tiue_cli.bench.rounds import MAX_ROUNDS, MIN_ROUNDS, SLOW_ROUNDS, measure_batch, plan_rounds, round_count
from tiue_cli.bench.subjects.subject import Outcome, Subject

PROMPTS = ["a red star", "a blue house"]
NOISE = np.zeros((2, 4, 2, 2), dtype=np.float32)


class Clock:
    """A perf_counter that stands still until a subject runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Timed(Subject):
    """Takes as long as it is told; writes down its calls."""

    def __init__(self, key: str, durations_s: Sequence[float], clock: Clock, calls: list[str]) -> None:
        super().__init__(record(key), lambda prompts, noise: np.zeros(0))
        self._durations = list(durations_s)
        self._clock = clock
        self._calls = calls
        self.collector_was_on: list[bool] = []

    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        assert list(prompts) == PROMPTS and noise is NOISE
        self._calls.append(self.key)
        self.collector_was_on.append(gc.isenabled())
        duration_s = self._durations.pop(0) if len(self._durations) > 1 else self._durations[0]
        self._clock.now_s += duration_s
        images = np.full((2, 4, 4, 3), len(self._calls), dtype=np.uint8)
        return Outcome(images, {"unet": 250.0 * duration_s, "vae": 750.0 * duration_s})


def record(key: str, **fields: Any) -> SubjectRecord:
    values: dict[str, Any] = {
        "key": key,
        "label": key,
        "kind": "student",
        "backend": "torch",
        "model": "m",
        "model_sha256": None,
        "steps": 1,
        "guidance": None,
        "precision": "fp32",
        "device": "cpu",
        "load_s": 0.0,
    }
    return SubjectRecord.model_validate({**values, **fields})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes a while on a heap with torch in it
    return clock


def measure(subjects: Sequence[Subject], *, duration_s: float, seed: int = 0) -> timing.BatchTiming:
    return measure_batch(
        subjects,
        PROMPTS,
        NOISE,
        device="cpu",
        duration_s=duration_s,
        seed=seed,
        progress=lambda stage, done, total, detail: None,
    )


def test_samples_are_what_each_run_took_without_first_call_and_warm_up(clock: Clock) -> None:
    calls: list[str] = []
    subject = Timed("a", [9.0, 0.5, 0.5, *(0.1 * number for number in range(1, 7))], clock, calls)
    found = measure([subject], duration_s=0.1).measured["a"]
    assert found.first_call_ms == pytest.approx(9000.0)
    assert found.warm_up == 2
    assert found.samples_ms == pytest.approx([100.0, 200.0, 300.0, 400.0, 500.0, 600.0])
    assert found.stage_samples_ms["vae"] == pytest.approx([75.0, 150.0, 225.0, 300.0, 375.0, 450.0])
    assert found.images[0, 0, 0, 0] == 1, "the pictures of the first call"


def test_every_subject_runs_once_a_round_in_changing_order(clock: Clock) -> None:
    calls: list[str] = []
    subjects = [Timed(key, [0.125], clock, calls) for key in "abcd"]
    found = measure(subjects, duration_s=1.0)
    rounds = [calls[start : start + 4] for start in range(12, len(calls), 4)]
    assert len(rounds) == 8
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert all(found.measured[key].rounds == list(range(8)) for key in "abcd")
    assert len(found.control_ms) == 8


def test_the_order_follows_the_seed(clock: Clock) -> None:
    orders: list[list[str]] = []
    for seed in (0, 0, 1):
        calls: list[str] = []
        measure([Timed(key, [0.125], clock, calls) for key in "abcd"], duration_s=1.0, seed=seed)
        orders.append(calls)
    assert orders[0] == orders[1] != orders[2]


def test_slow_subjects_skip_rounds_and_share_theirs_with_all_faster_ones(clock: Clock) -> None:
    calls: list[str] = []
    found = measure([Timed("slow", [1.0], clock, calls), Timed("fast", [0.125], clock, calls)], duration_s=8.0).measured
    assert len(found["fast"].rounds) == 64
    assert 7 <= len(found["slow"].rounds) <= 16
    assert set(found["slow"].rounds) <= set(found["fast"].rounds)


def test_garbage_is_not_collected_while_it_is_timed(clock: Clock) -> None:
    assert gc.isenabled()
    subject = Timed("a", [0.1], clock, [])
    measure([subject], duration_s=0.1)
    assert subject.collector_was_on == [True] * 3 + [False] * MIN_ROUNDS
    assert gc.isenabled()


def test_the_collector_is_back_after_a_failure(clock: Clock) -> None:
    class Failing(Timed):
        def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
            if not gc.isenabled():
                raise MemoryError
            return super().run(prompts, noise)

    with pytest.raises(MemoryError):
        measure([Failing("a", [0.1], clock, [])], duration_s=0.1)
    assert gc.isenabled()


def test_an_interruption_keeps_the_rounds_that_were_measured(clock: Clock) -> None:
    class Stopping(Timed):
        def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
            if len(self.collector_was_on) == 3 + 4:
                raise KeyboardInterrupt
            return super().run(prompts, noise)

    found = measure([Stopping("a", [0.1], clock, []), Timed("b", [0.1], clock, [])], duration_s=0.1)
    assert isinstance(found.stopped_by, KeyboardInterrupt)
    assert len(found.measured["a"].samples_ms) == 4 <= len(found.measured["b"].samples_ms) <= 5
    assert len(found.control_ms) == max(found.measured["b"].rounds[-1], 3) + 1
    assert gc.isenabled()


def test_a_reference_runs_once_and_is_not_timed(clock: Clock) -> None:
    calls: list[str] = []
    reference = Timed("r", [0.1], clock, calls)
    reference.timed = False
    found = measure([reference, Timed("a", [0.1], clock, calls)], duration_s=0.1).measured
    assert calls.count("r") == 1
    assert found["r"].samples_ms == []
    assert found["r"].images is not None


def test_building_is_apart_from_the_first_call(clock: Clock) -> None:
    subject = Timed("a", [60.0, 2.0, 0.1], clock, [])
    subject.compiles = True
    found = measure([subject], duration_s=0.1).measured["a"]
    assert (found.build_s, found.first_call_ms) == (pytest.approx(60.0), pytest.approx(2000.0))


@pytest.mark.parametrize("duration_s", [0.01, 3.0, 1000.0])
def test_plan_keeps_to_its_bounds(duration_s: float) -> None:
    estimates: Mapping[str, float] = {"a": 0.01, "b": 7.0, "c": 130.0, "d": 2500.0, "e": 60_000.0}
    plan = plan_rounds(estimates, duration_s=duration_s)
    rounds = round_count(plan)
    for key, stride in plan.items():
        least = SLOW_ROUNDS if key == "e" else MIN_ROUNDS
        assert least <= stride.count <= MAX_ROUNDS
        assert stride.count == len(range(0, rounds, stride.every))
        assert stride.every & (stride.every - 1) == 0, "a power of two, so that rounds nest"
    # Nobody runs much longer than asked, beyond the least number of samples.
    for key, estimate_ms in estimates.items():
        wanted = max(SLOW_ROUNDS if key == "e" else MIN_ROUNDS, duration_s * 1000 / estimate_ms)
        assert plan[key].count <= 2 * wanted + 1
