"""Tables of a report: whole figures in 80 columns, and nothing in them that moves the cursor."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from bench_reports import ONNX, PLAIN, STUDENT, TEACHER, make_report

from tiue_cli.bench.compare.conditions import check_conditions, parse_conditions
from tiue_cli.bench.compare.reports import compare_reports
from tiue_cli.bench.compare.table import comparison_table
from tiue_cli.bench.report.schema import BenchReport
from tiue_cli.bench.report.tables import (
    latency_tables,
    quality_facts,
    quality_tables,
    ratio_tables,
    run_facts,
    with_spread,
)
from tiue_cli.bench.report.view import ReportView
from tiue_cli.cli.bench import show_comparison, show_report
from tiue_cli.cli.console import Console

KEYS = (TEACHER, PLAIN, STUDENT, ONNX, "papercut-student/compile/k4")
OPTIONS: dict[str, Any] = {"keys": KEYS, "batches": (1, 4), "rounds": 40, "grid": False}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(report: BenchReport, capsys: pytest.CaptureFixture[str]) -> str:
    show_report(Console(), report)
    return capsys.readouterr().out


@pytest.mark.usefixtures("narrow")
def test_a_report_fits_into_80_columns_with_whole_figures(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(**OPTIONS)
    out = shown(report, capsys)
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "…" not in out, "no figure is cut"
    for record in report.latency:
        median = statistics.median(record.samples_ms)
        assert (f"{median:.1f}" if median < 99.95 else f"{median:,.0f}") in out
    assert "withheld" in out and "Fréchet" in out


@pytest.mark.usefixtures("narrow")
def test_names_from_outside_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(**OPTIONS)
    subjects = tuple(subject.model_copy(update={"label": "a\x1b[2J\rb [red]c[/red]"}) for subject in report.subjects)
    hostile = report.model_copy(update={"subjects": subjects, "warnings": ("busy",)})
    show_report(Console(), hostile)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out and "\r" not in captured.out
    assert "[red]c[/red]" in captured.out, "shown as it is, not read as markup"
    assert "busy" in captured.err


@pytest.mark.usefixtures("narrow")
def test_a_comparison_shows_what_changed_and_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare_reports(make_report(**OPTIONS), make_report(**OPTIONS, seed=1, slower={STUDENT: 1.2}))
    checks = check_conditions(comparison, parse_conditions(["p50>+5%"]))
    show_comparison(Console(), comparison, checks)
    captured = capsys.readouterr()
    assert max(len(line) for line in captured.out.splitlines()) <= 80
    below = captured.out[captured.out.index(STUDENT) :].split("papercut-student/onnx")[0]
    assert "slower" in below and "UNet decoder" in below and "within noise" not in below
    failed = [line for line in captured.err.splitlines() if line.startswith("failed")]
    assert len(failed) == 2 and all(STUDENT in line and "→" in line for line in failed)


def test_a_table_counts_the_rows_that_it_leaves_out() -> None:
    comparison = compare_reports(make_report(**OPTIONS), make_report(**OPTIONS))
    table = comparison_table(comparison)
    figures = [row for row in table.rows if row[0].startswith(" ")]
    assert any(f"{len(comparison.rows) - len(figures)} more figures" in note for note in table.notes)
    assert len(figures) == 2 * len(KEYS)


def test_rows_are_as_wide_as_their_heads() -> None:
    view = ReportView(make_report(**OPTIONS))
    quality = quality_tables(view)
    assert [table.title for table in quality] == ["Quality", "Checker"]
    for table in (*latency_tables(view), *ratio_tables(view), *quality):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_few_runs_are_marked_at_the_p99() -> None:
    (few, _), (many, _) = (
        latency_tables(ReportView(make_report(keys=(PLAIN,), batches=(1,), rounds=rounds, quality=False, grid=False)))
        for rounds in (199, 200)
    )
    assert few.rows[0][3].endswith("*") and not many.rows[0][3].endswith("*")
    assert len(few.notes) == len(many.notes) + 1


def test_the_floor_is_the_counted_operations_at_the_measured_peak() -> None:
    report = make_report(**OPTIONS)
    assert report.peak is not None
    record = next(record for record in report.latency if record.subject == STUDENT)
    floor_ms = 1000 * sum(record.flops.values()) / report.peak.flops_per_s
    table = latency_tables(ReportView(report))[1]
    row = next(row for row in table.rows if row[0] == "K = 4, torch")
    assert float(row[-2]) == pytest.approx(floor_ms, rel=5e-3)
    assert float(row[-1]) == pytest.approx(statistics.median(record.samples_ms) / floor_ms, rel=5e-3)


def test_a_peak_of_another_precision_is_no_floor() -> None:
    report = make_report(**OPTIONS)
    assert report.peak is not None
    other = report.model_copy(update={"peak": report.peak.model_copy(update={"precision": "bf16"})})
    assert all(row[-1] == row[-2] == "" for row in latency_tables(ReportView(other))[1].rows)


@pytest.mark.parametrize(
    ("mean", "values", "text"),
    [(0.7142, (0.711, 0.7174), "0.714 ± 0.005"), (13.46, (13.0, 13.92), "13.5 ± 0.7"), (13.46, (13.46,), "13.5")],
)
def test_a_spread_has_the_decimals_of_its_mean(mean: float, values: tuple[float, ...], text: str) -> None:
    assert with_spread(mean, values) == text


def test_facts_say_what_the_protocol_and_the_rounds_were() -> None:
    view = ReportView(make_report(**OPTIONS))
    facts = dict(quality_facts(view))
    assert facts["comparable"] == "not with published figures" and "256 of each subject" in facts["images"]
    assert "40 rounds" in dict(run_facts(view))["steadiness"]
    assert quality_facts(ReportView(make_report(keys=(PLAIN,), quality=False, grid=False))) == []


def test_the_checker_has_a_row_for_each_kind_of_caption() -> None:
    report = make_report(**OPTIONS)
    metrics = {"fid": 2.0, "checker_all": 0.5, "checker_relation": 0.75, "checker_single_all": 0.25}
    record = report.quality[0].model_copy(update={"metrics": metrics, "repetitions": {"checker_all": (0.4, 0.6)}})
    view = ReportView(report.model_copy(update={"quality": (record,)}))
    features, checker = quality_tables(view)
    label = view.label(record.subject)
    assert [column.head for column in checker.columns] == ["subject", "captions", "relation ↑", "all ↑"]
    assert checker.rows == ((label, "all", "0.750", "0.500 ± 0.141"), (label, "one object", "", "0.250"))
    assert not any("checker" in column.head for column in features.columns)
