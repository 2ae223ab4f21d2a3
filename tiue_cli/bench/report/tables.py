"""The tables of a report, as plain text cells: Markdown, HTML and the terminal show the same ones.

Cells are not escaped: whoever renders them does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np

from tiue_cli.base.text import bytes_text, number
from tiue_cli.bench.report.schema import LatencyRecord, QualityRecord, SubjectRecord
from tiue_cli.bench.report.view import METRIC_NAMES, STAGE_NAMES, ReportView, Setting, as_multiple, as_speedup
from tiue_cli.bench.stats import LEAST_SAMPLES

HASH_DIGITS: Final = 12
"""Of a hash, enough for people to compare."""
_CHECKER: Final = "checker_"
_CAPTIONS: Final = {"": "all", "single_": "one object", "pair_": "two objects"}
_CHECKED: Final = ("background", "count", "objects", "colors", "relation", "all")

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Column:
    """A column's head, and whether its cells are words or figures."""

    head: str
    align: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads; ``notes`` stand below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def make_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *notes: str, words: int = 1) -> Table:
    """A table whose first ``words`` columns hold words, the others figures."""
    columns = tuple(Column(head, "left" if index < words else "right") for index, head in enumerate(heads))
    return Table(title, columns, tuple(map(tuple, rows)), notes)


def _cell(value: _Value | None, form: Callable[[_Value], str]) -> str:
    return "" if value is None else form(value)


def percent(share: float) -> str:
    """E.g. ``31 %``, ``4.2 %``."""
    return f"{number(100 * share, 2)} %"


# --- latency and ratios --------------------------------------------------------------------------------------------


def latency_tables(view: ReportView) -> list[Table]:
    """Two a setting: median, percentiles, spread, throughput, share of peak, memory; and the stages."""
    return [make(view, setting) for setting in view.settings for make in (_latency_table, _stage_table)]


def _latency_table(view: ReportView, setting: Setting) -> Table:
    heads = ("subject", "median, ms", "p90, ms", "p99, ms", "IQR, ms", "runs", "images/s", "of peak", "memory")
    rows, few = [], False
    for record in view.records(setting):
        summary = view.summary(record)
        uncertain = summary.count < LEAST_SAMPLES["p99"]
        few = few or uncertain
        rows.append(
            (
                view.label(record.subject),
                number(summary.median),
                number(summary.p90),
                number(summary.p99) + ("*" if uncertain else ""),
                number(summary.iqr),
                str(summary.count),
                number(view.images_per_s(record)),
                _cell(view.share_of_peak(record), percent),
                _memory(record),
            )
        )
    notes = [
        "Wall clock for the whole batch, prompts to pixels. IQR: interquartile range. Of peak: the time that the "
        "counted operations take at the machine's measured matrix product rate, as a share of the median. Memory: what "
        "the calls added at most; weights do not count."
    ]
    if few:
        notes.append(f"* of fewer than {LEAST_SAMPLES['p99']} runs: close to the slowest one, rather than a percentile")
    return make_table(f"Latency, {setting.words}", heads, rows, *notes)


def _memory(record: LatencyRecord) -> str:
    driver = _cell(record.driver_memory_bytes, lambda count: f" (driver: {bytes_text(count)})")
    return _cell(record.peak_memory_bytes, lambda count: bytes_text(count) + driver)


def _stage_table(view: ReportView, setting: Setting) -> Table:
    records = view.records(setting)
    stages = [stage for stage in STAGE_NAMES if any(record.stage_samples_ms.get(stage) for record in records)]
    rows = []
    for record in records:
        row = [view.label(record.subject)]
        medians = view.stage_medians(record)
        for stage in stages:
            share = _cell(view.share_of_peak(record, stage), lambda share: f" ({percent(share)})")
            row.append(_cell(medians.get(stage), number) + share)
        row.append(_cell(view.rest_ms(record), number))
        row.append(_cell(sum(record.flops.values()) or None, lambda flops: number(flops / 1e9)))
        floor_ms = view.floor_ms(record)
        times = None if floor_ms is None else view.summary(record).median / floor_ms
        rows.append((*row, _cell(floor_ms, number), _cell(times, number)))
    notes = [
        "Medians in ms; behind each the share of the machine's peak. Rest: what the whole takes beyond its stages. "
        "Floor: the time of the counted operations at the machine's peak, in ms."
    ]
    words = {"wall": "the wall clock", "cuda-events": "CUDA events"}
    clocks = sorted({record.clock for record in records if record.stage_samples_ms})
    if clocks:
        notes.append(f"Stages were timed by {' and '.join(words[clock] for clock in clocks)}.")
    heads = ("subject", *(STAGE_NAMES[stage] for stage in stages), "rest", "GFLOP", "floor", "median / floor")
    return make_table(f"Stages, {setting.words}", heads, rows, *notes)


def ratio_tables(view: ReportView) -> list[Table]:
    """One a setting: the whole image against every teacher and a plain UNet pass, and the UNet alone against that."""
    return [_ratio_table(view, setting) for setting in view.settings if view.report.ratios]


def _ratio_table(view: ReportView, setting: Setting) -> Table:
    rows: list[tuple[str, ...]] = []
    withheld: dict[str, str] = {}
    confidence: set[float] = set()
    for record in view.records(setting):
        key = record.subject
        speedups = [view.ratio(key, teacher, setting, "image") for teacher in view.teachers]
        multiples = [view.plain_ratio(key, setting, "image"), view.plain_ratio(key, setting, "unet")]
        found = [ratio for ratio in (*speedups, *multiples) if ratio is not None]
        confidence |= {ratio.confidence for ratio in found}
        withheld.update((key, ratio.withheld) for ratio in found if ratio.withheld is not None)
        cells = [_cell(ratio, lambda ratio: as_speedup(ratio).text) for ratio in speedups]
        cells += [_cell(ratio, lambda ratio: as_multiple(ratio).text) for ratio in multiples]
        if found:
            rows.append((view.label(key), *cells))
    levels = " and ".join(f"{level:.0%}".replace("%", " %") for level in sorted(confidence))
    note = (
        f"Ratios of medians [{levels} interval: bootstrap over paired rounds]. Speed-up: how many times as fast, "
        "prompt to pixels. A plain pass is one UNet evaluation as any one-step student needs; with merged upsamplers "
        "where the subject has them. The UNet alone against the teacher's is in the JSON."
    )
    reasons = [f"{view.label(key)}: withheld, because {reason}" for key, reason in withheld.items()]
    over = [f"speed-up over {view.label(teacher)}" for teacher in view.teachers]
    heads = ("subject", *over, "whole image, in plain passes", "UNet alone, in plain UNet passes")
    return make_table(f"Ratios, {setting.words}", heads, rows, note, *reasons)


# --- subjects ------------------------------------------------------------------------------------------------------


def load_table(view: ReportView) -> Table:
    """Loading, building and first calls."""
    rows = []
    for subject in view.report.subjects:
        records = [view.latency(subject.key, setting) for setting in view.settings]
        first_calls = [_cell(record, lambda record: number(record.first_call_ms)) for record in records]
        cells = [number(subject.load_s), _cell(subject.build_s, number), *first_calls]
        rows.append([view.label(subject.key), *cells, _cell(subject.weights_bytes, bytes_text)])
    heads = ["subject", "load, s", "build, s", *(f"first call, {one.words}, ms" for one in view.settings), "weights"]
    warm_ups = sorted({record.warm_up for record in view.report.latency})
    note = f"Not part of the latency; nor are the {' or '.join(map(str, warm_ups))} calls of warm-up."
    return make_table("Loading, building, first call", heads, rows, *([note] if warm_ups else []))


def subject_table(view: ReportView) -> Table:
    """What each subject is."""
    heads = ("subject", "key", "backend", "model", "hash", "steps", "guidance", "precision", "pictures")
    rows = [
        (
            subject.label,
            subject.key,
            subject.backend,
            subject.model,
            _cell(subject.model_sha256, lambda sha256: sha256[:HASH_DIGITS]),
            str(subject.steps),
            _cell(subject.guidance, lambda guidance: f"{guidance:g}"),
            f"{subject.precision} on {subject.device}",
            _pictures(view, subject),
        )
        for subject in view.report.subjects
    ]
    notes = [f"{view.label(subject.key)}: {note}" for subject in view.report.subjects for note in subject.notes]
    return make_table("Subjects", heads, rows, *notes, words=len(heads))


def _pictures(view: ReportView, subject: SubjectRecord) -> str:
    """Whether its pictures are right, in words."""
    if subject.random_weights:
        return "noise (random weights)"
    words = ["untrained"] if subject.untrained else []
    parity = subject.parity
    if parity is not None:
        reference = view.label(parity.reference)
        if parity.psnr_db is None:
            words.append(f"equal to {reference}" if parity.passed else f"not those of {reference}")
        else:
            verdict = "" if parity.passed else ": did not pass"
            words.append(f"{parity.psnr_db:.1f} dB to {reference}, {parity.required_db:g} needed{verdict}")
    return "; ".join(words)


# --- quality -------------------------------------------------------------------------------------------------------


def quality_tables(view: ReportView) -> list[Table]:
    """Every figure of quality with the spread of its repetitions; what the checker read in a table of its own."""
    if not view.report.quality:
        return []
    table = quality_table(view, [metric for metric in view.metrics if not metric.startswith(_CHECKER)])
    has_checker = any(metric.startswith(_CHECKER) for metric in view.metrics)
    return [table, _checker_table(view)] if has_checker else [table]


def quality_table(view: ReportView, metrics: Sequence[str], *, spread: bool = True) -> Table:
    """These metrics of every subject, with the spread of the repetitions if wanted."""
    rows = [
        (
            view.label(record.subject),
            *(_quality_cell(record, metric, spread=spread) for metric in metrics),
            _cell(record.images_per_s, number),
        )
        for record in view.report.quality
    ]
    note = "↓ lower is better, ↑ higher."
    if spread and any(len(values) > 1 for record in view.report.quality for values in record.repetitions.values()):
        note = f"Mean over the repetitions ± their standard deviation. {note}"
    return make_table("Quality", ("subject", *map(metric_name, metrics), "images/s"), rows, note)


def _checker_table(view: ReportView) -> Table:
    """Shares of images that are as their caption says: a row for each subject and kind of caption."""
    attributes = [name for name in _CHECKED if any(f"{_CHECKER}{kind}{name}" in view.metrics for kind in _CAPTIONS)]
    rows = []
    for record in view.report.quality:
        for kind, captions in _CAPTIONS.items():
            cells = [_quality_cell(record, f"{_CHECKER}{kind}{name}", spread=True) for name in attributes]
            if any(cells):
                rows.append((view.label(record.subject), captions, *cells))
    heads = ("subject", "captions", *(f"{name} ↑" for name in attributes))
    note = "Share of images in which papercut's checker reads what the caption says. Relation: of two objects."
    return make_table("Checker", heads, rows, note, words=2)


def _quality_cell(record: QualityRecord, metric: str, *, spread: bool) -> str:
    if metric not in record.metrics:
        return ""
    return with_spread(record.metrics[metric], record.repetitions.get(metric, ()) if spread else ())


def with_spread(mean: float, values: Sequence[float]) -> str:
    """A mean ± the standard deviation of what it is over, to the same decimals: ``0.714 ± 0.003``."""
    text = number(mean)
    if len(values) < 2:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {float(np.std(values, ddof=1)):.{decimals}f}"


def metric_name(metric: str) -> str:
    """A metric's name for people, with an arrow to what is better."""
    if metric.startswith(_CHECKER):
        return f"checker: {metric.removeprefix(_CHECKER).replace('_', ' ')} ↑"
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


# --- the terminal --------------------------------------------------------------------------------------------------


def terminal_tables(view: ReportView) -> list[Table]:
    """What fits into 80 columns: latency with the first ratios, a table a setting, and the first metrics of quality."""
    tables = [_terminal_table(view, setting) for setting in view.settings]
    return [*tables, quality_table(view, view.main_metrics, spread=False)] if view.report.quality else tables


def _terminal_table(view: ReportView, setting: Setting) -> Table:
    teacher = view.teachers[0] if view.teachers else None
    rows = []
    for record in view.records(setting):
        cells = [view.label(record.subject), number(view.summary(record).median), number(view.images_per_s(record))]
        if teacher is not None:
            ratio = view.ratio(record.subject, teacher, setting, "image")
            cells.append(_cell(ratio, lambda ratio: as_speedup(ratio).text))
        plain = view.plain_ratio(record.subject, setting, "unet")
        rows.append([*cells, _cell(plain, lambda ratio: as_multiple(ratio).text)])
    heads, note = ["subject", "median, ms", "images/s"], "UNet passes: time of the UNet in plain passes of it."
    if teacher is not None:
        heads.append("speed-up")
        note = f"Speed-up: over {view.label(teacher)}, prompt to pixels. {note}"
    return make_table(f"Latency, {setting.words}", [*heads, "UNet passes"], rows, note)


# --- facts ---------------------------------------------------------------------------------------------------------

Facts = list[tuple[str, str]]
"""(what, its value)."""


def machine_facts(view: ReportView) -> Facts:
    """Where and with what it ran."""
    report = view.report
    machine, peak = report.machine, report.peak
    facts = [
        ("machine", machine.name),
        ("system", machine.system),
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"),
    ]
    if machine.memory_bytes is not None:
        facts.append(("memory", bytes_text(machine.memory_bytes)))
    facts.append(("GPU", machine.gpu or "none"))
    if machine.driver is not None:
        facts.append(("driver", machine.driver))
    if peak is not None:
        rate = f"{number(peak.flops_per_s / 1e12)} TFLOP/s in {peak.precision} on {peak.device}"
        as_what = "" if peak.kernel == "matrix product" else f" (a {peak.kernel.replace('x', '×')})"
        shape = " × ".join(map(str, peak.shape))
        facts.append(("peak", f"{rate}: a {shape} matrix product{as_what}, measured in this run"))
    versions = {"tiue": report.tiue_version, "Python": machine.python, **machine.packages}
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    return [*facts, ("commit", report.commit or "unknown"), ("date", report.created)]


def run_facts(view: ReportView) -> Facts:
    """What was run: prompts, seed, rounds."""
    report = view.report
    facts = [("prompts", "; ".join(report.prompts)), ("seed", str(report.seed))]
    if view.settings:
        facts.append(("measured at", "; ".join(setting.words for setting in view.settings)))
    samples = report.control_samples_ms
    if samples:
        median, p90 = (number(float(value)) for value in np.percentile(samples, [50, 90]))
        rounds = f"a fixed matrix product at the begin of each of {len(samples)} rounds"
        facts.append(("steadiness", f"{rounds} took {median} ms in the median, {p90} ms at most in 90 % of them"))
    return facts


def quality_facts(view: ReportView) -> Facts:
    """How quality was measured; empty where it was not."""
    protocol = view.report.quality_protocol
    if protocol is None:
        return []
    facts = [
        ("comparable", "with published figures" if protocol.comparable else "not with published figures"),
        ("images", f"{protocol.images} of each subject, seeds from {', '.join(map(str, protocol.seeds))}"),
        ("prompts", f"{protocol.prompts}{_hash(protocol.prompts_sha256)}"),
        ("reference", f"{protocol.reference}, {protocol.reference_images} images{_hash(protocol.reference_sha256)}"),
        ("features", f"{protocol.extractor}, {protocol.features} of them{_hash(protocol.extractor_sha256)}"),
        ("resize", protocol.resize),
        ("neighbours", f"k = {protocol.k}"),
    ]
    if protocol.diversity is not None:
        facts.append(("diversity", protocol.diversity))
    if protocol.clip is not None:
        facts.append(("CLIP model", f"{protocol.clip}{_hash(protocol.clip_sha256)}"))
    return facts + [("note", note) for note in protocol.notes]


def _hash(sha256: str | None) -> str:
    return _cell(sha256, lambda digits: f" ({digits[:HASH_DIGITS]})")
