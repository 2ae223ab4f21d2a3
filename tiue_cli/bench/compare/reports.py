"""What changed from one bench report to another, and by how much beyond the noise.

A change is an estimate with an interval. For times it comes from a block bootstrap of the raw samples: neighbouring
samples resemble each other (a warm cache, a clock that sinks), and resampling them one by one would promise too much.
What differs between two runs but not within one is the machine's pace; where both reports timed the same matrix
product in every round (``control_samples_ms``), the interval covers the change with and without the pace of the same
batch taken off, so a change counts only if it shows either way. For quality it is Welch's interval over the
repetitions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiue_cli.base.text import plain
from tiue_cli.bench.compare.differences import quality_obstacle, report_differences
from tiue_cli.bench.report.schema import BenchReport, LatencyRecord, QualityRecord
from tiue_cli.bench.report.view import Setting
from tiue_cli.bench.stats import LEAST_SAMPLES, Estimate, block_bootstrap, exact, hull, mean_interval, welch_difference

CONFIDENCE = 0.99
"""Of every interval here: a comparison has many rows, and at 0.95 one in twenty would be flagged by chance."""
THRESHOLD = 0.01
"""Times closer than this are the same to anyone who uses them, however narrow the interval."""
LOWER_IS_BETTER = frozenset({"fid", "kid"})
HIGHER_IS_BETTER = frozenset({"clip_score", "precision", "recall", "density", "coverage", "diversity"})
CHECKER_PREFIX = "checker_"

Verdict = Literal["faster", "slower", "better", "worse", "more", "less", "changed", "within noise", "not judged"]


@dataclass(frozen=True)
class Row:
    """One figure of one subject, before and after.

    ``figure`` is p50, p90, p99 (ms), images_per_s, memory (bytes), or the name of a quality metric. ``scope`` is
    ``image`` (prompt to pixels) or a stage; quality has neither batch nor size. ``relative`` is the change as a
    fraction of the old figure, None where that is 0; ``difference`` is in the figure's own unit.
    """

    subject: str
    batch: int | None
    size: tuple[int, int] | None
    scope: str
    figure: str
    old: float
    new: Estimate
    difference: Estimate
    relative: Estimate | None
    verdict: Verdict

    @property
    def where(self) -> str:
        """Where the figure is from, for people: e.g. ``papercut/torch/k4, batch 1, 64x64, vae``."""
        parts = [self.subject]
        if self.batch is not None and self.size is not None:
            parts += [f"batch {self.batch}", f"{self.size[0]}x{self.size[1]}"]
        if self.scope != "image":
            parts.append(self.scope)
        return ", ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """Two reports, by name. ``differences`` say what else changed (machine, versions, settings, models)."""

    old: str
    new: str
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    quality_obstacle: str | None
    """Why quality is not compared although both reports have it."""
    confidence: float = CONFIDENCE


def compare_reports(old: BenchReport, new: BenchReport, *, seed: int = 0) -> Comparison:
    """Compare what both reports measured; ``seed`` draws the bootstrap, so the same call gives the same intervals."""
    generator = np.random.default_rng(seed)
    paces = _paces(old, new, generator)
    before = {_key(record): record for record in old.latency}
    rows: list[Row] = []
    for record in new.latency:
        if _key(record) in before:
            pace = paces.get(Setting.of(record))
            rows += _latency_rows(before[_key(record)], record, pace, generator)
    obstacle = quality_obstacle(old, new)
    if obstacle is None:
        quality_before = {record.subject: record for record in old.quality}
        for quality in new.quality:
            if quality.subject in quality_before:
                rows += _quality_rows(quality_before[quality.subject], quality)
    return Comparison(
        old=old.name,
        new=new.name,
        differences=report_differences(old, new),
        notes=(*_few_samples(before, new.latency), *_notes(rows, paces)),
        rows=tuple(rows),
        quality_obstacle=obstacle,
    )


def _key(record: LatencyRecord) -> tuple[str, Setting]:
    return record.subject, Setting.of(record)


# --- latency -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """A figure before and after, and the same of REPLICATES resampled series."""

    old: float
    new: float
    old_drawn: np.ndarray
    new_drawn: np.ndarray

    def upside_down(self, scale: float) -> _Change:
        """``scale`` over each of them: a rate from a time."""
        return _Change(scale / self.old, scale / self.new, scale / self.old_drawn, scale / self.new_drawn)


def _changes(
    old: Sequence[float], new: Sequence[float], figures: Sequence[str], generator: np.random.Generator
) -> list[_Change]:
    """Of figures such as ``p50``."""
    percentiles = [float(figure.removeprefix("p")) for figure in figures]
    drawn = [block_bootstrap(samples, percentiles, generator) for samples in (old, new)]
    found = [np.percentile(samples, percentiles).tolist() for samples in (old, new)]
    return [_Change(*parts) for parts in zip(*found, *drawn, strict=True)]


def _paces(old: BenchReport, new: BenchReport, generator: np.random.Generator) -> dict[Setting, _Change]:
    """The median time of the control product in both reports, by batch and size."""
    before, after = _control_samples(old), _control_samples(new)
    return {
        setting: _changes(before[setting], samples, ["p50"], generator)[0]
        for setting, samples in after.items()
        if setting in before and min(len(before[setting]), len(samples)) >= LEAST_SAMPLES["p50"]
    }


def _control_samples(report: BenchReport) -> dict[Setting, tuple[float, ...]]:
    """The control product's samples by the rounds that they opened; all of them where that cannot be told."""
    counts: dict[Setting, int] = {}
    for record in report.latency:
        rounds = max(record.rounds, default=len(record.samples_ms) - 1) + 1
        counts[Setting.of(record)] = max(rounds, counts.get(Setting.of(record), 0))
    samples = report.control_samples_ms
    if sum(counts.values()) != len(samples):
        return dict.fromkeys(counts, samples)
    ends = itertools.accumulate(counts.values())
    return {setting: samples[end - count : end] for (setting, count), end in zip(counts.items(), ends, strict=True)}


def _latency_rows(
    old: LatencyRecord, new: LatencyRecord, pace: _Change | None, generator: np.random.Generator
) -> Iterator[Row]:
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {"image": (old.samples_ms, new.samples_ms)}
    for stage, samples in new.stage_samples_ms.items():
        if stage in old.stage_samples_ms:
            pairs[stage] = old.stage_samples_ms[stage], samples
    for scope, (before, after) in pairs.items():
        fewest = min(len(before), len(after))
        figures = [figure for figure, least in LEAST_SAMPLES.items() if fewest >= least]
        if not figures or min(*before, *after) <= 0:
            continue
        for figure, change in zip(figures, _changes(before, after, figures, generator), strict=True):
            yield _time_row(new, scope, figure, change, pace)
            if scope == "image" and figure == "p50":
                yield _time_row(new, scope, "images_per_s", change.upside_down(1000 * new.batch), pace)
    yield from _memory_rows(old, new)


def _time_row(record: LatencyRecord, scope: str, figure: str, change: _Change, pace: _Change | None) -> Row:
    rate = figure == "images_per_s"
    drawn = [change.new_drawn]
    if pace is not None:
        slower = pace.new_drawn / pace.old_drawn
        drawn.append(change.new_drawn * slower if rate else change.new_drawn / slower)
    relative = [new / change.old_drawn - 1 for new in drawn]
    return _row(
        record,
        scope,
        figure,
        old=change.old,
        # The new figure by itself is what this machine did: no pace is taken off.
        new=hull(change.new, [change.new_drawn], confidence=CONFIDENCE),
        difference=hull(change.new - change.old, [new - change.old_drawn for new in drawn], confidence=CONFIDENCE),
        relative=hull(change.new / change.old - 1, relative, confidence=CONFIDENCE),
        up_and_down=("faster", "slower") if rate else ("slower", "faster"),
    )


def _memory_rows(old: LatencyRecord, new: LatencyRecord) -> Iterator[Row]:
    """One figure a run: it has no interval, and is compared as it is."""
    before, after = old.peak_memory_bytes, new.peak_memory_bytes
    if before is not None and after is not None and old.memory_kind == new.memory_kind:
        relative = None if before == 0 else exact(after / before - 1)
        yield _row(
            new,
            "image",
            "memory",
            old=float(before),
            new=exact(float(after)),
            difference=exact(float(after - before)),
            relative=relative,
            up_and_down=("more", "less"),
        )


def _quality_rows(old: QualityRecord, new: QualityRecord) -> Iterator[Row]:
    for metric in [metric for metric in new.metrics if metric in old.metrics]:
        before, after = old.metrics[metric], new.metrics[metric]
        repeated = new.repetitions.get(metric, ())
        welch = welch_difference(old.repetitions.get(metric, ()), repeated, confidence=CONFIDENCE)
        difference = Estimate(after - before) if welch is None else welch
        verdicts: tuple[Verdict, Verdict] = "changed", "changed"
        if metric in LOWER_IS_BETTER:
            verdicts = "worse", "better"
        elif metric in HIGHER_IS_BETTER or metric.startswith(CHECKER_PREFIX):
            verdicts = "better", "worse"
        yield _row(
            new,
            "image",
            metric,
            old=before,
            new=mean_interval(repeated, confidence=CONFIDENCE) or Estimate(after),
            difference=difference,
            relative=None if before == 0 else difference.scaled(1 / abs(before)),
            up_and_down=verdicts,
        )


def _row(
    record: LatencyRecord | QualityRecord,
    scope: str,
    figure: str,
    *,
    old: float,
    new: Estimate,
    difference: Estimate,
    relative: Estimate | None,
    up_and_down: tuple[Verdict, Verdict],
) -> Row:
    """Times and memory are judged by the relative change, beyond THRESHOLD; quality by the difference."""
    at = record if isinstance(record, LatencyRecord) else None
    change, threshold = (difference, 0.0) if at is None else (relative, THRESHOLD)
    verdict: Verdict = "not judged"
    if change is not None and change.low is not None and change.high is not None:
        up, down = up_and_down
        verdict = up if change.low > threshold else down if change.high < -threshold else "within noise"
    batch, size = (None, None) if at is None else (at.batch, at.size)
    return Row(record.subject, batch, size, scope, figure, old, new, difference, relative, verdict)


def _few_samples(before: Mapping[tuple[str, Setting], LatencyRecord], after: Sequence[LatencyRecord]) -> Iterator[str]:
    """What both reports measured, too seldom to be compared."""
    least = LEAST_SAMPLES["p50"]
    pairs = [(before[_key(record)], record) for record in after if _key(record) in before]
    few = {new.subject for old, new in pairs if min(len(old.samples_ms), len(new.samples_ms)) < least}
    if few:
        yield plain(f"not compared, with fewer than {least} runs: {', '.join(sorted(few))}")


# --- what the rows say together ------------------------------------------------------------------------------------


def _notes(rows: Sequence[Row], paces: Mapping[Setting, _Change]) -> Iterator[str]:
    changes = [
        f"{abs(change):.1%} {'longer' if change > 0 else 'shorter'} at batch {setting.batch}"
        for setting, pace in paces.items()
        if abs(change := pace.new / pace.old - 1) > THRESHOLD
    ]
    if changes:
        yield (
            f"the machine's pace changed: the same matrix product took {', '.join(changes)} than in the old run; "
            "the intervals cover the changes with and without it"
        )
    relative = [row.relative.value for row in rows if (row.figure, row.scope) == ("p50", "image") and row.relative]
    if len(relative) >= 3 and len({change > 0 for change in relative}) == 1:
        smallest, largest = min(relative, key=abs), max(relative, key=abs)
        if abs(smallest) > THRESHOLD and abs(largest) < 2 * abs(smallest):
            yield (
                f"everything changed alike ({smallest:+.1%} to {largest:+.1%}): "
                "the machine may have, rather than one of the subjects"
            )
