"""The tables of a report, as plain text cells: Markdown, HTML and the terminal show the same ones.

Cells are not escaped: whoever renders them does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiue_cli.bench.compare import Comparison, Row
from tiue_cli.bench.intervals import LEAST_SAMPLES
from tiue_cli.bench.schema import LatencyRecord, RatioRecord, Stage, SubjectRecord
from tiue_cli.bench.view import (
    METRIC_NAMES,
    STAGE_NAMES,
    Place,
    ReportView,
    Shown,
    as_multiple,
    as_speedup,
    bytes_text,
    number,
)

HASH_DIGITS = 12


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


def latency_tables(view: ReportView) -> list[Table]:
    """One a place: median, percentiles, spread, throughput, share of peak, memory; then the stages."""
    return [table for place in view.places for table in (_latency_table(view, place), _stage_table(view, place))]


def _latency_table(view: ReportView, place: Place) -> Table:
    columns = (
        Column("subject", "left"),
        Column("median, ms"),
        Column("p90, ms"),
        Column("p99, ms"),
        Column("IQR, ms"),
        Column("runs"),
        Column("images/s"),
        Column("of peak"),
        Column("memory"),
    )
    rows, few = [], False
    for record in view.records(place):
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
    return Table(f"Latency, {place.words}", columns, tuple(rows), tuple(notes))


def _memory(record: LatencyRecord) -> str:
    if record.peak_memory_bytes is None:
        return ""
    text = bytes_text(record.peak_memory_bytes)
    return text if record.driver_memory_bytes is None else f"{text} (driver: {bytes_text(record.driver_memory_bytes)})"


def _stage_table(view: ReportView, place: Place) -> Table:
    records = view.records(place)
    stages = [stage for stage in STAGE_NAMES if any(record.stage_samples_ms.get(stage) for record in records)]
    columns = (
        Column("subject", "left"),
        *(Column(f"{STAGE_NAMES[stage]}, ms") for stage in stages),
        Column("rest, ms"),
        Column("GFLOP"),
        Column("floor, ms"),
        Column("median / floor"),
    )
    rows = tuple(_stage_row(view, record, stages) for record in records)
    clocks = sorted({record.clock for record in records if record.stage_samples_ms})
    words = {"wall": "the wall clock", "cuda-events": "CUDA events"}
    notes = [
        "Medians; behind each the share of the machine's peak. Rest: what the whole takes beyond its stages. Floor: "
        "the counted operations at the machine's peak."
    ]
    if clocks:
        notes.append(f"Stages were timed by {' and '.join(words[clock] for clock in clocks)}.")
    return Table(f"Stages, {place.words}", columns, rows, tuple(notes))


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
    """One a place: whole image against every teacher and against a plain UNet pass, and the UNet alone against that."""
    return [_ratio_table(view, place) for place in view.places if view.report.ratios]


def _ratio_table(view: ReportView, place: Place) -> Table:
    columns = (
        Column("subject", "left"),
        *(Column(f"speed-up over {view.label(teacher)}") for teacher in view.teachers),
        Column("whole image, in plain passes"),
        Column("UNet alone, in plain UNet passes"),
    )
    rows: list[tuple[str, ...]] = []
    withheld: dict[str, str] = {}
    confidence: set[float] = set()
    for record in view.records(place):
        key = record.subject
        teachers = [view.ratio(key, teacher, place, "image") for teacher in view.teachers]
        plain = [view.plain_ratio(key, place, scope) for scope in ("image", "unet")]
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
    return Table(f"Ratios, {place.words}", columns, tuple(rows), tuple(notes))


def _ratio_cell(ratio: RatioRecord | None, form: Callable[[RatioRecord], Shown], unit: str) -> str:
    if ratio is None:
        return ""
    shown = form(ratio)
    if shown.value is None:
        return "withheld"
    return f"{number(shown.value)}{unit} [{shown.interval}]" if shown.interval else f"{number(shown.value)}{unit}"


def load_table(view: ReportView) -> Table:
    """Loading, building and first calls."""
    columns = (
        Column("subject", "left"),
        Column("load, s"),
        Column("build, s"),
        *(Column(f"first call, {place.words}, ms") for place in view.places),
        Column("weights"),
    )
    rows = []
    for subject in view.report.subjects:
        records = [view.latency(subject.key, place) for place in view.places]
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
    return Table("Subjects", tuple(Column(head, "left") for head in heads), rows, notes)


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


def quality_table(view: ReportView) -> Table | None:
    """Every metric of every subject, with the spread of the repetitions."""
    if not view.report.quality:
        return None
    columns = (
        Column("subject", "left"),
        *(Column(metric_name(metric)) for metric in view.metrics),
        Column("images/s"),
    )
    rows = []
    for record in view.report.quality:
        cells = []
        for metric in view.metrics:
            values = record.repetitions.get(metric, ())
            spread = f" ± {number(float(np.std(values, ddof=1)), 2)}" if len(values) > 1 else ""
            cells.append(number(record.metrics[metric]) + spread if metric in record.metrics else "")
        rate = "" if record.images_per_s is None else number(record.images_per_s)
        rows.append((view.label(record.subject), *cells, rate))
    notes = ["Mean over the repetitions ± their standard deviation. ↓ lower is better, ↑ higher."]
    return Table("Quality", columns, tuple(rows), tuple(notes))


def metric_name(metric: str) -> str:
    """A metric's name for people, with an arrow to what is better."""
    if metric.startswith("checker_"):
        return f"checker: {metric.removeprefix('checker_').replace('_', ' ')} ↑"
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def comparison_table(comparison: Comparison) -> Table:
    """What changed, whole images before stages; every row has its verdict."""
    columns = (
        Column("subject", "left"),
        Column("batch"),
        Column("what", "left"),
        Column("old"),
        Column("new"),
        Column("change"),
        Column("interval"),
        Column("verdict", "left"),
    )
    rows = sorted(comparison.rows, key=lambda row: (row.batch is None, row.scope != "image"))
    notes = [
        f"{100 * comparison.confidence:g} % intervals. Faster, slower: the whole interval is on that side, and by more "
        "than 1 %."
    ]
    if comparison.quality_obstacle is not None:
        notes.append(f"Quality is not compared: {comparison.quality_obstacle}")
    title = f"{comparison.old_name} → {comparison.new_name}"
    return Table(title, columns, tuple(_comparison_row(row) for row in rows), tuple(notes))


def _comparison_row(row: Row) -> tuple[str, ...]:
    relative = row.relative
    change = "" if relative is None else signed_percent(relative.value)
    interval = ""
    if relative is not None and relative.low is not None and relative.high is not None and relative.low < relative.high:
        interval = f"{signed_percent(relative.low)} to {signed_percent(relative.high)}"
    stages: Mapping[str, str] = {str(stage): name for stage, name in STAGE_NAMES.items()}
    what = _figure_name(row) if row.scope == "image" else f"{stages[row.scope]}, {row.figure}"
    return (
        row.subject,
        "" if row.batch is None else str(row.batch),
        what,
        _figure_text(row.figure, row.old),
        _figure_text(row.figure, row.new.value),
        change,
        interval,
        row.verdict,
    )


def _figure_name(row: Row) -> str:
    names = {"images_per_s": "images/s", "memory": "memory"}
    return names.get(row.figure, row.figure if row.batch is not None else metric_name(row.figure))


def _figure_text(figure: str, value: float) -> str:
    if figure == "memory":
        return bytes_text(value)
    return f"{number(value)} ms" if figure in LEAST_SAMPLES else number(value)


# --- facts ---------------------------------------------------------------------------------------------------------


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
        facts.append(
            (
                "peak",
                f"{number(peak.flops_per_s / 1e12)} TFLOP/s in {peak.precision} on {peak.device}: "
                f"a {' × '.join(map(str, peak.shape))} matrix product, measured in this run",
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
    if view.places:
        facts.append(("measured at", "; ".join(place.words for place in view.places)))
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
    return facts + [("note", note) for note in protocol.notes]


def _hash(sha256: str | None) -> str:
    return "" if sha256 is None else f" ({sha256[:HASH_DIGITS]})"


def signed_percent(share: float) -> str:
    """E.g. ``+4.2 %``; ``0 %`` for what rounds to nothing."""
    text = f"{100 * share:+.1f} %"
    return "0 %" if text in ("+0.0 %", "-0.0 %") else text


def percent(share: float) -> str:
    """E.g. ``31 %``, ``4.2 %``."""
    return f"{number(100 * share, 2)} %"
