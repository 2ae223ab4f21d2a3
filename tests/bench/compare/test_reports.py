"""Comparisons of reports: what changed is found, and what is noise is not."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from bench_reports import ONNX, PLAIN, STUDENT, TEACHER, machine, make_report, protocol

from tiue_cli.bench.compare.conditions import check_conditions, parse_conditions
from tiue_cli.bench.compare.reports import CONFIDENCE, Comparison, Row, compare_reports
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.errors import UsageError

FEW = (PLAIN, STUDENT, ONNX)
GATE = ("p50>+5%", "p90>+5%", "images_per_s<-5%", "memory>+1%")


def rows_of(comparison: Comparison, figure: str, subject: str, *, batch: int | None = 1, scope: str = "image") -> Row:
    (row,) = (
        row
        for row in comparison.rows
        if (row.figure, row.subject, row.batch, row.scope) == (figure, subject, batch, scope)
    )
    return row


def failing(comparison: Comparison, *conditions: str) -> set[str]:
    checks = check_conditions(comparison, parse_conditions(conditions))
    return {row.subject for check in checks for row in check.offenders}


def without_stages(report: BenchReport) -> BenchReport:
    """Times of whole images alone: what a test over many reports looks at."""
    latency = tuple(record.model_copy(update={"stage_samples_ms": {}}) for record in report.latency)
    return report.model_copy(update={"latency": latency})


# --- changes and noise


def test_a_report_equals_itself() -> None:
    report = make_report(keys=(*FEW, TEACHER), batches=(1, 4))
    comparison = compare_reports(report, report)
    assert comparison.differences == () and comparison.notes == ()
    assert {row.verdict for row in comparison.rows} == {"within noise"}
    assert all(row.difference.value == 0 for row in comparison.rows)
    assert failing(comparison, *GATE, "fid>+1%", "recall<-0.01") == set()


def test_a_planted_slowdown_fails_and_names_the_subject() -> None:
    old = make_report(keys=FEW)
    new = make_report(keys=FEW, seed=1, slower={STUDENT: 1.10})
    comparison = compare_reports(old, new)
    row = rows_of(comparison, "p50", STUDENT)
    assert row.verdict == "slower"
    assert row.relative is not None and row.relative.low is not None and row.relative.high is not None
    assert row.relative.low < 0.10 < row.relative.high
    assert rows_of(comparison, "images_per_s", STUDENT).verdict == "slower"
    assert rows_of(comparison, "p50", STUDENT, scope="unet_decoder").verdict == "slower"
    assert failing(comparison, "p50>+5%") == {STUDENT}
    assert failing(comparison, "images_per_s<-5%") == {STUDENT}
    assert failing(comparison, f"{ONNX}:p50>+5%", "p50>+20%") == set()


def test_a_planted_speed_up_is_faster_and_does_not_fail() -> None:
    comparison = compare_reports(make_report(keys=FEW), make_report(keys=FEW, seed=1, slower={ONNX: 0.85}))
    assert rows_of(comparison, "p50", ONNX).verdict == "faster"
    assert rows_of(comparison, "images_per_s", ONNX).verdict == "faster"
    assert failing(comparison, "p50>+5%") == set()
    assert failing(comparison, "p50<-5%") == {ONNX}


@pytest.mark.parametrize("correlation", [0.0, 0.5], ids=["independent", "neighbours alike"])
def test_noise_alone_is_rarely_flagged_and_never_fails(correlation: float) -> None:
    """120 pairs of runs of the same thing, 3 % noise: at most 2 % flagged (the intervals are 99 %), no gate fails."""
    flagged, judged, failed = 0, 0, 0
    for seed in range(60):
        options = {"keys": (PLAIN, STUDENT), "batches": (1,), "quality": False, "grid": False}
        old = without_stages(make_report(seed=2 * seed, correlation=correlation, **options))  # type: ignore[arg-type]
        new = without_stages(make_report(seed=2 * seed + 1, correlation=correlation, **options))  # type: ignore[arg-type]
        comparison = compare_reports(old, new, seed=seed)
        whole = [row for row in comparison.rows if row.figure == "p50" and row.scope == "image"]
        judged += len(whole)
        flagged += sum(row.verdict != "within noise" for row in whole)
        failed += len(failing(comparison, *GATE))
    assert judged == 120
    assert flagged <= 0.02 * judged
    assert failed == 0


def test_intervals_hold_the_true_change() -> None:
    """Coverage over 100 pairs whose true change of the median is 8 %, neighbouring samples alike."""
    held = 0
    for seed in range(100):
        options = {"keys": (PLAIN,), "batches": (1,), "quality": False, "grid": False, "correlation": 0.5}
        old = without_stages(make_report(seed=2 * seed, **options))  # type: ignore[arg-type]
        new = without_stages(make_report(seed=2 * seed + 1, slower={PLAIN: 1.08}, **options))  # type: ignore[arg-type]
        row = rows_of(compare_reports(old, new, seed=seed), "p50", PLAIN)
        assert row.relative is not None and row.relative.low is not None and row.relative.high is not None
        held += row.relative.low <= 0.08 <= row.relative.high
    assert held >= 95


def test_a_slower_machine_is_not_blamed_on_the_code() -> None:
    old, new = make_report(keys=FEW), make_report(keys=FEW, seed=1, pace=1.08)
    comparison = compare_reports(old, new)
    assert {row.verdict for row in comparison.rows if row.batch is not None} == {"within noise"}
    assert any("pace changed" in note and "longer" in note for note in comparison.notes)
    assert any("everything changed alike" in note for note in comparison.notes)
    unpaced = [report.model_copy(update={"control_samples_ms": ()}) for report in (old, new)]
    assert rows_of(compare_reports(*unpaced), "p50", STUDENT).verdict == "slower"


def test_a_pace_that_changed_at_one_batch_only_is_not_blamed_on_the_code() -> None:
    def report(seed: int, pace: float) -> BenchReport:
        """The machine keeps its pace at batch 1, and has another at batch 16."""
        first = make_report(keys=FEW, seed=seed, batches=(1,), rounds=144)
        last = make_report(keys=FEW, seed=seed, batches=(16,), rounds=36, pace=pace)
        control = first.control_samples_ms + last.control_samples_ms
        return first.model_copy(update={"latency": first.latency + last.latency, "control_samples_ms": control})

    comparison = compare_reports(report(1, 1.0), report(2, 1.08))
    assert {row.verdict for row in comparison.rows if row.batch is not None} == {"within noise"}
    assert any("longer at batch 16" in note and "at batch 1 " not in note for note in comparison.notes)
    slower = report(2, 1.08)
    times = [record for record in slower.latency if (record.subject, record.batch) == (STUDENT, 16)]
    (planted,) = [
        record.model_copy(update={"samples_ms": tuple(1.3 * value for value in record.samples_ms)}) for record in times
    ]
    others = [record for record in slower.latency if record not in times]
    found = compare_reports(report(1, 1.0), slower.model_copy(update={"latency": (*others, planted)}))
    assert rows_of(found, "p50", STUDENT, batch=16).verdict == "slower"


def test_the_same_call_gives_the_same_intervals() -> None:
    old, new = make_report(keys=FEW), make_report(keys=FEW, seed=1)
    assert compare_reports(old, new) == compare_reports(old, new)
    assert compare_reports(old, new, seed=1) != compare_reports(old, new)


def test_few_samples_have_no_p99() -> None:
    few = make_report(rounds=48, keys=(PLAIN, TEACHER), batches=(1,))
    rows = compare_reports(few, few).rows
    figures = {row.figure for row in rows}
    assert "p90" in figures and "p99" not in figures
    many = make_report(rounds=200, keys=(PLAIN,), batches=(1,))
    assert "p99" in {row.figure for row in compare_reports(many, many).rows}
    assert "p90" not in {row.figure for row in rows if row.subject == TEACHER}, "twelve samples have none"


def test_quality_is_held_against_the_spread_of_the_repetitions() -> None:
    old = make_report(keys=FEW)
    record = next(record for record in old.quality if record.subject == STUDENT)
    fid = record.repetitions["fid"]
    for shift, verdict in ((0.1, "within noise"), (20.0, "worse"), (-8.0, "better")):
        moved = tuple(value + shift for value in fid)
        changed = record.model_copy(
            update={
                "repetitions": {**record.repetitions, "fid": moved},
                "metrics": {**record.metrics, "fid": float(np.mean(moved))},
            }
        )
        others = tuple(other for other in old.quality if other.subject != STUDENT)
        comparison = compare_reports(old, old.model_copy(update={"quality": (*others, changed)}))
        row = rows_of(comparison, "fid", STUDENT, batch=None)
        assert row.verdict == verdict, shift
        assert row.difference.value == pytest.approx(shift)
        assert (failing(comparison, "fid>+5") == {STUDENT}) == (shift == 20.0)


def test_a_single_repetition_is_not_judged() -> None:
    old = make_report(keys=FEW)
    once = tuple(
        record.model_copy(update={"repetitions": {name: (value,) for name, value in record.metrics.items()}})
        for record in old.quality
    )
    comparison = compare_reports(old, old.model_copy(update={"quality": once}))
    assert {row.verdict for row in comparison.rows if row.figure == "fid"} == {"not judged"}
    with pytest.raises(UsageError, match="nothing tells its spread"):
        failing(comparison, "fid>+1")


# --- what else differs


def test_other_machines_versions_and_settings_are_named() -> None:
    old = make_report(keys=FEW)
    other = machine(name="other", gpu="NVIDIA Imaginary", packages={**old.machine.packages, "torch": "2.12.0"})
    student = next(subject for subject in old.subjects if subject.key == STUDENT)
    changed = student.model_copy(update={"model_sha256": "34" * 32, "precision": "bf16"})
    subjects = tuple(changed if subject.key == STUDENT else subject for subject in old.subjects)
    new = old.model_copy(update={"machine": other, "seed": 7, "subjects": subjects, "commit": None})
    text = "\n".join(compare_reports(old, new).differences)
    for part in (
        "machine: name test-machine → other",
        "machine: GPU none → NVIDIA Imaginary",
        "package torch 2.13.0 → 2.12.0",
        "commit 0123456789ab → none",
        "seed 0 → 7",
        f"{STUDENT}: model hash 121212121212 → 343434343434",
        f"{STUDENT}: precision fp32 → bf16",
    ):
        assert part in text
    assert text.startswith("machine: name")


def test_subjects_and_batches_of_one_report_are_named() -> None:
    old, new = make_report(keys=FEW, batches=(1, 4)), make_report(keys=(PLAIN, STUDENT, TEACHER), batches=(1,))
    text = "\n".join(compare_reports(old, new).differences)
    assert f"only in the old report: {ONNX}" in text
    assert f"only in the new report: {TEACHER}" in text
    assert "measured in the old report only, for some subjects: batch 4 at 64x64" in text


def test_quality_of_another_protocol_is_not_compared() -> None:
    old = make_report(keys=FEW)
    new = old.model_copy(update={"quality_protocol": protocol(images=512)})
    comparison = compare_reports(old, new)
    assert comparison.quality_obstacle == "another protocol: images 256 → 512"
    assert all(row.batch is not None for row in comparison.rows)
    with pytest.raises(UsageError, match=r"quality is not compared: another protocol: images 256 → 512"):
        failing(comparison, "fid>+1")


# --- conditions


@pytest.mark.parametrize(
    ("text", "subject", "figure", "above", "of", "value"),
    [
        ("p50>+5%", None, "p50", True, "relative", 0.05),
        (" p90 > +2.5% ", None, "p90", True, "relative", 0.025),
        ("papercut/torch/k4:p50>+5%", "papercut/torch/k4", "p50", True, "relative", 0.05),
        ("peer:a/b:p99>40ms", "peer:a/b", "p99", True, "new", 40.0),
        ("p50>1.5s", None, "p50", True, "new", 1500.0),
        ("p50>+3", None, "p50", True, "difference", 3.0),
        ("images_per_s<-10%", None, "images_per_s", False, "relative", -0.10),
        ("memory>2GiB", None, "memory", True, "new", 2 * 2**30),
        ("memory>+100MiB", None, "memory", True, "difference", 100 * 2**20),
        ("recall<0.4", None, "recall", False, "new", 0.4),
        ("fid>+2", None, "fid", True, "difference", 2.0),
    ],
)
def test_conditions_are_read(text: str, subject: str | None, figure: str, above: bool, of: str, value: float) -> None:
    (condition,) = parse_conditions([text])
    assert (condition.subject, condition.figure, condition.above, condition.of) == (subject, figure, above, of)
    assert condition.value == pytest.approx(value)


def test_several_conditions_in_one_word_and_in_several() -> None:
    figures = [condition.figure for condition in parse_conditions(["p50>+5%, p90>+10%", "fid>+1"])]
    assert figures == ["p50", "p90", "fid"]


@pytest.mark.parametrize(
    "text",
    ["", "p50", "p50>", "p50>fast", "p50=+5%", "p50>5%", "p50>+5 %x", ">+5%", "p50>+5GiB", "memory>+5", "fid>+2ms",
     "p50>+5%,", "p50>>+5%", "p50>+nan", "p50>-inf"],
)  # fmt: skip
def test_what_is_no_condition_is_a_usage_error_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conditions([text])
    assert caught.value.exit_code == 2 and caught.value.hint


@pytest.mark.parametrize(
    "condition", ["p99>+5%", "speed>+5%", "nobody/torch/k4:p50>+5%", "papercut-student/torch/k:p50>+5%"]
)
def test_a_condition_about_nothing_does_not_pass(condition: str) -> None:
    comparison = compare_reports(make_report(keys=FEW), make_report(keys=FEW))
    with pytest.raises(UsageError, match="matches no figure") as caught:
        failing(comparison, condition)
    assert STUDENT in str(caught.value.hint)


def test_a_prefix_names_all_below_it() -> None:
    new = make_report(keys=FEW, slower={PLAIN: 1.3, STUDENT: 1.3, ONNX: 1.3}, control_samples_ms=())
    comparison = compare_reports(make_report(keys=FEW), new)
    assert failing(comparison, "papercut-student:p50>+5%") == {STUDENT, ONNX}
    assert failing(comparison, "papercut-student/onnx:p50>+5%") == {ONNX}
    assert failing(comparison, "p50>+5%") == {PLAIN, STUDENT, ONNX}


def test_a_figure_by_itself_is_held_against_the_new_report() -> None:
    report = make_report(keys=FEW, batches=(1,))
    comparison = compare_reports(report, report)
    median = float(np.median(next(record for record in report.latency if record.subject == STUDENT).samples_ms))
    assert STUDENT in failing(comparison, f"p50>{0.9 * median:.2f}ms")
    assert STUDENT not in failing(comparison, f"p50>{0.999 * median:.2f}ms"), "its interval reaches below"
    assert failing(comparison, "memory>1MiB") == set(FEW)
    assert failing(comparison, "memory>1GiB") == set()


def test_the_document_is_plain_data() -> None:
    import json

    comparison = compare_reports(make_report(keys=FEW), make_report(keys=FEW, seed=1))
    data = json.loads(json.dumps(asdict(comparison), allow_nan=False))
    assert data["confidence"] == CONFIDENCE and len(data["rows"]) == len(comparison.rows)
    checks = check_conditions(comparison, parse_conditions(["p50>+5%"]))
    assert json.loads(json.dumps(checks[0].as_dict(), allow_nan=False))["failed"] is False
