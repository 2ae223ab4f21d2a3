"""The tables of a report, as plain text cells: Markdown, HTML and the terminal show the same ones.

Cells are not escaped: whoever renders them does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from tiue_cli.base.text import bytes_text, number
from tiue_cli.bench.report.schema import LatencyRecord, QualityRecord, RatioRecord, Stage, SubjectRecord
from tiue_cli.bench.report.view import (
    HASH_DIGITS,
    METRIC_NAMES,
    STAGE_NAMES,
    ReportView,
    Setting,
    Shown,
    as_multiple,
    as_speedup,
)
from tiue_cli.bench.stats import LEAST_SAMPLES

_CHECKER: Final = "checker_"
_CAPTIONS: Final = {"": "all", "single_": "one object", "pair_": "two objects"}
_CHECKED: Final = ("background", "count", "objects", "colors", "relation", "all")


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


def _columns(*heads: str, words: int = 1) -> tuple[Column, ...]:
    """The first ``words`` columns hold words, the others figures."""
    return tuple(Column(head, "left" if index < words else "right") for index, head in enumerate(heads))


def latency_tables(view: ReportView) -> list[Table]:
    """One a setting: median, percentiles, spread, throughput, share of peak, memory; then the stages."""
    return [
        table for setting in view.settings for table in (_latency_table(view, setting), _stage_table(view, setting))
    ]


def _latency_table(view: ReportView, setting: Setting) -> Table:
    columns = _columns(
        "subject", "median, ms", "p90, ms", "p99, ms", "IQR, ms", "runs", "images/s", "of peak", "memory"
    )
    rows, few = [], False
    for record in view.records(setting):
        summary = view.summary(record)
        share = view.share_of_peak(record)
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
                "" if share is None else percent(share),
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
    return Table(f"Latency, {setting.words}", columns, tuple(rows), tuple(notes))


def _memory(record: LatencyRecord) -> str:
    if record.peak_memory_bytes is None:
        return ""
    text = bytes_text(record.peak_memory_bytes)
    return text if record.driver_memory_bytes is None else f"{text} (driver: {bytes_text(record.driver_memory_bytes)})"


def _stage_table(view: ReportView, setting: Setting) -> Table:
    records = view.records(setting)
    stages = [stage for stage in STAGE_NAMES if any(record.stage_samples_ms.get(stage) for record in records)]
    names = [STAGE_NAMES[stage] for stage in stages]
    columns = _columns("subject", *names, "rest", "GFLOP", "floor", "median / floor")
    rows = tuple(_stage_row(view, record, stages) for record in records)
    clocks = sorted({record.clock for record in records if record.stage_samples_ms})
    words = {"wall": "the wall clock", "cuda-events": "CUDA events"}
    notes = [
        "Medians in ms; behind each the share of the machine's peak. Rest: what the whole takes beyond its stages. "
        "Floor: the time of the counted operations at the machine's peak, in ms."
    ]
    if clocks:
        notes.append(f"Stages were timed by {' and '.join(words[clock] for clock in clocks)}.")
    return Table(f"Stages, {setting.words}", columns, rows, tuple(notes))


def _stage_row(view: ReportView, record: LatencyRecord, stages: list[Stage]) -> tuple[str, ...]:
    medians = view.stage_medians(record)
    cells = []
    for stage in stages:
        share = view.share_of_peak(record, stage)
        cells.append(
            "" if stage not in medians else number(medians[stage]) + ("" if share is None else f" ({percent(share)})")
        )
    rest = view.rest_ms(record)
    flops, floor_ms = sum(record.flops.values()), view.floor_ms(record)
    return (
        view.label(record.subject),
        *cells,
        "" if rest is None else number(rest),
        number(flops / 1e9) if flops else "",
        "" if floor_ms is None else number(floor_ms),
        "" if floor_ms is None else number(view.summary(record).median / floor_ms),
    )


def ratio_tables(view: ReportView) -> list[Table]:
    """One a setting: the whole image against every teacher and a plain UNet pass, and the UNet alone against that."""
    return [_ratio_table(view, setting) for setting in view.settings if view.report.ratios]


def _ratio_table(view: ReportView, setting: Setting) -> Table:
    over = [f"speed-up over {view.label(teacher)}" for teacher in view.teachers]
    columns = _columns("subject", *over, "whole image, in plain passes", "UNet alone, in plain UNet passes")
    rows: list[tuple[str, ...]] = []
    withheld: dict[str, str] = {}
    confidence: set[float] = set()
    for record in view.records(setting):
        key = record.subject
        teachers = [view.ratio(key, teacher, setting, "image") for teacher in view.teachers]
        plain = [view.plain_ratio(key, setting, scope) for scope in ("image", "unet")]
        found = [ratio for ratio in (*teachers, *plain) if ratio is not None]
        if not found:
            continue
        confidence |= {ratio.confidence for ratio in found}
        withheld.update((key, ratio.withheld) for ratio in found if ratio.withheld is not None)
        cells = [_ratio_cell(ratio, as_speedup, "×") for ratio in teachers]
        cells += [_ratio_cell(ratio, as_multiple, "") for ratio in plain]
        rows.append((view.label(key), *cells))
    levels = " and ".join(f"{level:.0%}".replace("%", " %") for level in sorted(confidence))
    notes = [
        f"Ratios of medians [{levels} interval: bootstrap over paired rounds]. Speed-up: how many times as fast, "
        "prompt to pixels. A plain pass is one UNet evaluation as any one-step student needs; with merged upsamplers "
        "where the subject has them. The UNet alone against the teacher's is in the JSON."
    ]
    notes += [f"{view.label(key)}: withheld, because {reason}" for key, reason in withheld.items()]
    return Table(f"Ratios, {setting.words}", columns, tuple(rows), tuple(notes))


def _ratio_cell(ratio: RatioRecord | None, form: Callable[[RatioRecord], Shown], unit: str) -> str:
    if ratio is None:
        return ""
    shown = form(ratio)
    if shown.value is None:
        return "withheld"
    return f"{number(shown.value)}{unit} [{shown.interval}]" if shown.interval else f"{number(shown.value)}{unit}"


def load_table(view: ReportView) -> Table:
    """Loading, building and first calls."""
    first_calls = [f"first call, {setting.words}, ms" for setting in view.settings]
    columns = _columns("subject", "load, s", "build, s", *first_calls, "weights")
    rows = []
    for subject in view.report.subjects:
        records = [view.latency(subject.key, setting) for setting in view.settings]
        rows.append(
            (
                view.label(subject.key),
                number(subject.load_s),
                "" if subject.build_s is None else number(subject.build_s),
                *("" if record is None else number(record.first_call_ms) for record in records),
                "" if subject.weights_bytes is None else bytes_text(subject.weights_bytes),
            )
        )
    warm_ups = sorted({record.warm_up for record in view.report.latency})
    note = f"Not part of the latency; nor are the {' or '.join(map(str, warm_ups))} calls of warm-up."
    return Table("Loading, building, first call", columns, tuple(rows), (note,) if warm_ups else ())


def subject_table(view: ReportView) -> Table:
    """What each subject is."""
    heads = ("subject", "key", "backend", "model", "hash", "steps", "guidance", "precision", "pictures")
    rows = tuple(
        (
            subject.label,
            subject.key,
            subject.backend,
            subject.model,
            "" if subject.model_sha256 is None else subject.model_sha256[:HASH_DIGITS],
            str(subject.steps),
            "" if subject.guidance is None else f"{subject.guidance:g}",
            f"{subject.precision} on {subject.device}",
            _pictures(view, subject),
        )
        for subject in view.report.subjects
    )
    notes = tuple(f"{view.label(subject.key)}: {note}" for subject in view.report.subjects for note in subject.notes)
    return Table("Subjects", _columns(*heads, words=len(heads)), rows, notes)


def _pictures(view: ReportView, subject: SubjectRecord) -> str:
    """Whether its pictures are right, in words."""
    if subject.random_weights:
        return "noise (random weights)"
    words = "untrained" if subject.untrained else ""
    parity = subject.parity
    if parity is None:
        return words
    reference = view.label(parity.reference)
    if parity.psnr_db is None:
        found = f"equal to {reference}" if parity.passed else f"not those of {reference}"
    else:
        found = (
            f"{parity.psnr_db:.1f} dB to {reference}, {parity.required_db:g} needed"
            f"{'' if parity.passed else ': did not pass'}"
        )
    return f"{words}; {found}" if words else found


def quality_tables(view: ReportView) -> list[Table]:
    """Every figure of quality with the spread of its repetitions; what the checker read in a table of its own."""
    table = quality_table(view, [metric for metric in view.metrics if not metric.startswith(_CHECKER)])
    checker = _checker_table(view)
    return [found for found in (table, checker) if found is not None]


def quality_table(view: ReportView, metrics: Sequence[str], *, spread: bool = True) -> Table | None:
    """These metrics of every subject, with the spread of the repetitions if wanted."""
    if not view.report.quality:
        return None
    columns = _columns("subject", *map(metric_name, metrics), "images/s")
    rows = []
    for record in view.report.quality:
        cells = [_quality_cell(record, metric, spread=spread) for metric in metrics]
        rate = "" if record.images_per_s is None else number(record.images_per_s)
        rows.append((view.label(record.subject), *cells, rate))
    notes = ["↓ lower is better, ↑ higher."]
    if spread and any(len(values) > 1 for record in view.report.quality for values in record.repetitions.values()):
        notes = ["Mean over the repetitions ± their standard deviation. ↓ lower is better, ↑ higher."]
    return Table("Quality", columns, tuple(rows), tuple(notes))


def _checker_table(view: ReportView) -> Table | None:
    """Shares of images that are as their caption says: a row for each subject and kind of caption."""
    found = {metric for metric in view.metrics if metric.startswith(_CHECKER)}
    if not found:
        return None
    attributes = [name for name in _CHECKED if any(f"{_CHECKER}{kind}{name}" in found for kind in _CAPTIONS)]
    rows = []
    for record in view.report.quality:
        for kind, captions in _CAPTIONS.items():
            cells = [_quality_cell(record, f"{_CHECKER}{kind}{name}", spread=True) for name in attributes]
            if any(cells):
                rows.append((view.label(record.subject), captions, *cells))
    columns = _columns("subject", "captions", *(f"{name} ↑" for name in attributes), words=2)
    note = "Share of images in which papercut's checker reads what the caption says. Relation: of two objects."
    return Table("Checker", columns, tuple(rows), (note,))


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


def terminal_tables(view: ReportView) -> list[Table]:
    """What fits into 80 columns: latency with the first ratios, a table a setting, and the first metrics of quality."""
    tables = [_terminal_table(view, setting) for setting in view.settings]
    quality = quality_table(view, view.main_metrics, spread=False)
    return tables if quality is None else [*tables, quality]


def _terminal_table(view: ReportView, setting: Setting) -> Table:
    teacher = view.teachers[0] if view.teachers else None
    speedup = [] if teacher is None else ["speed-up"]
    columns = _columns("subject", "median, ms", "images/s", *speedup, "UNet passes")
    rows = []
    for record in view.records(setting):
        ratio = None if teacher is None else view.ratio(record.subject, teacher, setting, "image")
        cells = [] if teacher is None else [_ratio_cell(ratio, as_speedup, "×")]
        cells.append(_ratio_cell(view.plain_ratio(record.subject, setting, "unet"), as_multiple, ""))
        medians = number(view.summary(record).median), number(view.images_per_s(record))
        rows.append((view.label(record.subject), *medians, *cells))
    note = "UNet passes: time of the UNet in plain passes of it."
    if teacher is not None:
        note = f"Speed-up: over {view.label(teacher)}, prompt to pixels. {note}"
    return Table(f"Latency, {setting.words}", columns, tuple(rows), (note,))


def percent(share: float) -> str:
    """E.g. ``31 %``, ``4.2 %``."""
    return f"{number(100 * share, 2)} %"


def machine_facts(view: ReportView) -> list[tuple[str, str]]:
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
    facts.append(("GPU", "none" if machine.gpu is None else machine.gpu))
    if machine.driver is not None:
        facts.append(("driver", machine.driver))
    if peak is not None:
        as_what = "" if peak.kernel == "matrix product" else f" (a {peak.kernel.replace('x', '×')})"
        facts.append(
            (
                "peak",
                f"{number(peak.flops_per_s / 1e12)} TFLOP/s in {peak.precision} on {peak.device}: "
                f"a {' × '.join(map(str, peak.shape))} matrix product{as_what}, measured in this run",
            )
        )
    versions = {"tiue": report.tiue_version, "Python": machine.python, **machine.packages}
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    facts.append(("commit", report.commit or "unknown"))
    facts.append(("date", report.created))
    return facts


def run_facts(view: ReportView) -> list[tuple[str, str]]:
    """What was run: prompts, seed, rounds."""
    report = view.report
    facts = [("prompts", "; ".join(report.prompts)), ("seed", str(report.seed))]
    if view.settings:
        facts.append(("measured at", "; ".join(setting.words for setting in view.settings)))
    if report.control_samples_ms:
        samples = report.control_samples_ms
        facts.append(
            (
                "steadiness",
                f"a fixed matrix product at the begin of each of {len(samples)} rounds took "
                f"{number(float(np.median(samples)))} ms in the median, "
                f"{number(float(np.percentile(samples, 90)))} ms at most in 90 % of them",
            )
        )
    return facts


def quality_facts(view: ReportView) -> list[tuple[str, str]]:
    """How quality was measured; empty where it was not."""
    protocol = view.report.quality_protocol
    if protocol is None:
        return []
    facts = [
        ("comparable", "with published figures" if protocol.comparable else "not with published figures"),
        ("images", f"{protocol.images} of each subject, seeds from {', '.join(map(str, protocol.seeds))}"),
        ("prompts", f"{protocol.prompts} ({protocol.prompts_sha256[:HASH_DIGITS]})"),
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
    return "" if sha256 is None else f" ({sha256[:HASH_DIGITS]})"
