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
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
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
            pace = paces.get(_setting(record))
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


def _setting(record: LatencyRecord) -> Setting:
    return Setting(record.batch, record.size)


def _key(record: LatencyRecord) -> tuple[str, Setting]:
    return record.subject, _setting(record)


# --- latency -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    """A percentile of the samples before and after, and the same of REPLICATES resampled series."""

    old: float
    new: float
    old_drawn: np.ndarray
    new_drawn: np.ndarray

    @property
    def ratio(self) -> float:
        return self.new / self.old

    def upside_down(self, scale: float) -> _Series:
        """``scale`` over each of them: a rate from a time."""
        return _Series(scale / self.old, scale / self.new, scale / self.old_drawn, scale / self.new_drawn)


def _series(
    old: Sequence[float], new: Sequence[float], figures: Sequence[str], generator: np.random.Generator
) -> list[_Series]:
    percentiles = [PERCENTILES[figure] for figure in figures]
    drawn = [block_bootstrap(samples, percentiles, generator) for samples in (old, new)]
    found = [np.percentile(samples, percentiles).tolist() for samples in (old, new)]
    return [_Series(*parts) for parts in zip(*found, *drawn, strict=True)]


def _paces(old: BenchReport, new: BenchReport, generator: np.random.Generator) -> dict[Setting, _Series]:
    """The median time of the control product in both reports, by batch and size."""
    before, after = _control_samples(old), _control_samples(new)
    return {
        setting: _series(before[setting], samples, ["p50"], generator)[0]
        for setting, samples in after.items()
        if setting in before and min(len(before[setting]), len(samples)) >= LEAST_SAMPLES["p50"]
    }


def _control_samples(report: BenchReport) -> dict[Setting, tuple[float, ...]]:
    """The control product's samples by the rounds that they opened; all of them where that cannot be told."""
    counts: dict[Setting, int] = {}
    for record in report.latency:
        rounds = max(record.rounds, default=len(record.samples_ms) - 1) + 1
        counts[_setting(record)] = max(rounds, counts.get(_setting(record), 0))
    samples = report.control_samples_ms
    if sum(counts.values()) != len(samples):
        return dict.fromkeys(counts, samples)
    ends = itertools.accumulate(counts.values())
    return {setting: samples[end - count : end] for (setting, count), end in zip(counts.items(), ends, strict=True)}


def _latency_rows(
    old: LatencyRecord, new: LatencyRecord, pace: _Series | None, generator: np.random.Generator
) -> Iterator[Row]:
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {"image": (old.samples_ms, new.samples_ms)}
    for stage, samples in new.stage_samples_ms.items():
        if stage in old.stage_samples_ms:
            pairs[stage] = (old.stage_samples_ms[stage], samples)
    for scope, (before, after) in pairs.items():
        fewest = min(len(before), len(after))
        figures = [figure for figure, least in LEAST_SAMPLES.items() if fewest >= least]
        if not figures or min(*before, *after) <= 0:
            continue
        for figure, series in zip(figures, _series(before, after, figures, generator), strict=True):
            yield _latency_row(new, scope, figure, series, pace)
            if scope == "image" and figure == "p50":
                yield _latency_row(new, scope, "images_per_s", series.upside_down(1000 * new.batch), pace)
    yield from _memory_rows(old, new)


def _latency_row(record: LatencyRecord, scope: str, figure: str, series: _Series, pace: _Series | None) -> Row:
    rate = figure == "images_per_s"
    drawn = [series.new_drawn]
    if pace is not None:
        change = pace.new_drawn / pace.old_drawn
        drawn.append(series.new_drawn * change if rate else series.new_drawn / change)
    relative = _estimate(series.ratio - 1, [new / series.old_drawn - 1 for new in drawn])
    return Row(
        subject=record.subject,
        batch=record.batch,
        size=record.size,
        scope=scope,
        figure=figure,
        old=series.old,
        # The new figure by itself is what this machine did: no pace is taken off.
        new=_estimate(series.new, [series.new_drawn]),
        difference=_estimate(series.new - series.old, [new - series.old_drawn for new in drawn]),
        relative=relative,
        verdict=_verdict(
            relative, up="faster" if rate else "slower", down="slower" if rate else "faster", threshold=THRESHOLD
        ),
    )


def _estimate(value: float, series: Sequence[np.ndarray]) -> Estimate:
    return Estimate(value, *hull(series, confidence=CONFIDENCE))


def _memory_rows(old: LatencyRecord, new: LatencyRecord) -> Iterator[Row]:
    """One figure a run: it has no interval, and is compared as it is."""
    if old.peak_memory_bytes is None or new.peak_memory_bytes is None or old.memory_kind != new.memory_kind:
        return
    before, after = float(old.peak_memory_bytes), float(new.peak_memory_bytes)
    relative = None if before == 0 else exact(after / before - 1)
    yield Row(
        subject=new.subject,
        batch=new.batch,
        size=new.size,
        scope="image",
        figure="memory",
        old=before,
        new=exact(after),
        difference=exact(after - before),
        relative=relative,
        verdict="not judged" if relative is None else _verdict(relative, up="more", down="less", threshold=THRESHOLD),
    )


def _verdict(estimate: Estimate, *, up: Verdict, down: Verdict, threshold: float) -> Verdict:
    if estimate.low is None or estimate.high is None:
        return "not judged"
    if estimate.low > threshold:
        return up
    return down if estimate.high < -threshold else "within noise"


# --- quality -------------------------------------------------------------------------------------------------------


def _verdicts(metric: str) -> tuple[Verdict, Verdict]:
    """What a rise and what a fall of a quality metric mean."""
    if metric in LOWER_IS_BETTER:
        return "worse", "better"
    known = metric in HIGHER_IS_BETTER or metric.startswith(CHECKER_PREFIX)
    return ("better", "worse") if known else ("changed", "changed")


def _quality_rows(old: QualityRecord, new: QualityRecord) -> Iterator[Row]:
    for metric, after in new.metrics.items():
        if metric not in old.metrics:
            continue
        before, repeated = old.metrics[metric], new.repetitions.get(metric, ())
        difference = welch_difference(old.repetitions.get(metric, ()), repeated, confidence=CONFIDENCE)
        if difference is None:
            difference = Estimate(after - before)
        up, down = _verdicts(metric)
        yield Row(
            subject=new.subject,
            batch=None,
            size=None,
            scope="image",
            figure=metric,
            old=before,
            new=mean_interval(repeated, confidence=CONFIDENCE) or Estimate(after),
            difference=difference,
            relative=None if before == 0 else difference.scaled(1 / abs(before)),
            verdict=_verdict(difference, up=up, down=down, threshold=0.0),
        )


def _few_samples(before: Mapping[tuple[str, Setting], LatencyRecord], after: Sequence[LatencyRecord]) -> Iterator[str]:
    """What both reports measured, too seldom to be compared."""
    least = LEAST_SAMPLES["p50"]
    pairs = [(before[_key(record)], record) for record in after if _key(record) in before]
    few = {new.subject for old, new in pairs if min(len(old.samples_ms), len(new.samples_ms)) < least}
    if few:
        yield plain(f"not compared, with fewer than {least} runs: {', '.join(sorted(few))}")


# --- what the rows say together ------------------------------------------------------------------------------------


def _notes(rows: Sequence[Row], paces: Mapping[Setting, _Series]) -> Iterator[str]:
    changes = [
        f"{abs(pace.ratio - 1):.1%} {'longer' if pace.ratio > 1 else 'shorter'} at batch {setting.batch}"
        for setting, pace in paces.items()
        if abs(pace.ratio - 1) > THRESHOLD
    ]
    if changes:
        yield (
            f"the machine's pace changed: the same matrix product took {', '.join(changes)} than in the old run; "
            "the intervals cover the changes with and without it"
        )
    whole = [row for row in rows if row.figure == "p50" and row.scope == "image" and row.relative is not None]
    relative = [row.relative.value for row in whole if row.relative is not None]
    if len(relative) >= 3 and len({change > 0 for change in relative}) == 1:
        smallest, largest = min(relative, key=abs), max(relative, key=abs)
        if abs(smallest) > THRESHOLD and abs(largest) < 2 * abs(smallest):
            yield (
                f"everything changed alike ({smallest:+.1%} to {largest:+.1%}): "
                "the machine may have, rather than one of the subjects"
            )
