"""What ``tiue bench`` does with a config: measure and show, write the report, and compare it with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_cli.cli.console import Console

if TYPE_CHECKING:
    from tiue_cli.bench.compare.conditions import Check, Condition
    from tiue_cli.bench.compare.reports import Comparison
    from tiue_cli.bench.config import BenchConfig
    from tiue_cli.bench.events import Event
    from tiue_cli.bench.report.schema import BenchReport


def run_bench(config: BenchConfig, console: Console, *, old: Path | None, fail_if: Sequence[str]) -> bool:
    """Measure, write the report, show the tables; with ``old``, compare with it. Returns whether no condition failed.

    What speaks against the comparison is said before anything is measured.
    """
    config.validate()
    from tiue_cli.bench.compare.conditions import check_conditions, parse_conditions
    from tiue_cli.bench.compare.reports import compare_reports
    from tiue_cli.bench.report.files import read_report, write_report

    conditions = parse_conditions(fail_if)
    before = None if old is None else read_report(old)
    if before is not None:
        # What cannot be judged in the old report cannot be in any comparison with it.
        check_conditions(compare_reports(before, before), conditions)
    from tiue_cli.bench.run import run_bench as measure

    try:
        with console.stages(live=False) as stages:
            report = measure(config, emit=lambda event: _show(event, console, stages))
    except KeyboardInterrupt:
        again = "; the same command goes on with the pictures that were drawn" if config.quality else ""
        console.stopped(f"no report was written{again}")
        raise
    if report is None:  # the first of several processes has it
        return True
    # Written first: a closed pipe (| head) must not cost what took hours.
    files = write_report(report, config.out)
    console.bench(report)
    for path in (files.json, files.markdown, files.html):
        console.path(str(path))
    if before is None:
        console.document(report.model_dump(mode="json"))
        return True
    return _compare(before, report, conditions, console)


def compare_files(old: Path, new: Path, console: Console, *, fail_if: Sequence[str]) -> bool:
    """Compare two reports that are there. Returns whether no condition failed. Raises ManifestError, UsageError."""
    from tiue_cli.bench.compare.conditions import parse_conditions
    from tiue_cli.bench.report.files import read_report

    conditions = parse_conditions(fail_if)
    return _compare(read_report(old), read_report(new), conditions, console)


def _compare(old: BenchReport, new: BenchReport, conditions: Sequence[Condition], console: Console) -> bool:
    comparison, checks = _judge(old, new, conditions)
    console.comparison(comparison, checks)
    return not any(check.failed for check in checks)


def _judge(old: BenchReport, new: BenchReport, conditions: Sequence[Condition]) -> tuple[Comparison, tuple[Check, ...]]:
    from tiue_cli.bench.compare.conditions import check_conditions
    from tiue_cli.bench.compare.reports import compare_reports

    comparison = compare_reports(old, new)
    return comparison, check_conditions(comparison, conditions)


def _show(event: Event, console: Console, stages: Callable[[str, int, int, str], None]) -> None:
    from tiue_cli.bench.events import Note

    if isinstance(event, Note):
        console.note(event.text)
    else:
        stages(event.stage, event.done, event.total, event.detail)
