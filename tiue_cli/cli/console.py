"""Everything that reaches the terminal; the only module that prints.

Data goes to stdout, all else to stderr: notes, progress, errors. ``human`` writes the paths of images to stdout as they
are ready, ``json`` one document at the end, ``quiet`` the paths and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from tiue_cli.errors import TiueError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from tiue_cli.bench.compare.conditions import Check
    from tiue_cli.bench.compare.reports import Comparison
    from tiue_cli.bench.report.schema import BenchReport
    from tiue_cli.bench.report.tables import Table as BenchTable
    from tiue_cli.cli.diagnosis import Diagnosis
    from tiue_cli.cli.inspection import Report
    from tiue_cli.export.onnx.export import ExportResult
    from tiue_cli.export.trt.engine import EngineResult
    from tiue_cli.files.exports import ExportParity

Format = Literal["human", "json", "quiet"]


class Console:
    """Where a command shows what it does, in one of the three formats."""

    def __init__(self, format_: Format = "human") -> None:
        """``format_`` is what ``--format`` says."""
        self._format = format_
        self._holding = False
        self._held_lines: list[str] = []

    # --- stderr ---

    def note(self, text: str) -> None:
        """A sentence that the user should know; human format only, as the others carry it as data or not at all."""
        if self._format == "human":
            _say("note", "cyan", text)

    def summary(self, text: str) -> None:
        """The last line of a run; human format only."""
        if self._format == "human":
            _line(sys.stderr, text)

    def error(self, error: TiueError) -> None:
        """One line of what went wrong and where, one of what to do next; in every format."""
        _say("error", "bold red", error.message)
        if error.hint is not None:
            _say("hint", "yellow", error.hint)

    def stopped(self, text: str) -> None:
        """What an interrupted run left behind; in every format."""
        _say("stopped", "yellow", text)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[float], None]]:
        """A bar over ``total`` images on stderr; yields a function that takes the number done so far.

        Where stderr is no terminal: a line every half minute.
        """
        if self._format != "human" or total == 0:
            yield _ignore
            return
        if not sys.stderr.isatty():
            yield _ImageLines(total)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # stdout stays untouched (it may be a pipe), so lines meant for a shared terminal wait until the bar is gone.
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=_rich(sys.stderr),
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._holding = sys.stdout.isatty()
        try:
            with bar:
                task = bar.add_task("images", total=total, rate="")

                def update(done: float) -> None:
                    seconds = bar.tasks[0].elapsed or 0.0
                    rate = f"{done / seconds:.2f} images/s" if done > 0 and seconds > 0 else ""
                    bar.update(task, completed=done, rate=rate)

                yield update
        finally:
            self._holding = False
            for line in self._held_lines:
                _line(sys.stdout, line)
            self._held_lines.clear()

    @contextlib.contextmanager
    def stages(self, *, live: bool = True) -> Iterator[Callable[[str, int, int, str], None]]:
        """Work in named stages on stderr; yields a function of (stage, done, total, figures as text).

        A bar a stage on a terminal, the figures below; elsewhere a line at the start and end of a stage and every half
        minute. Without ``live`` no thread draws beside the work, for work that is timed.
        """
        if self._format != "human":
            yield _ignore_stage
            return
        if not sys.stderr.isatty():
            yield _StageLines()
            return
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        )
        figures_line = Text()  # below the bars: in a narrow terminal a column of it would push out the others
        display = Live(
            Group(bars, figures_line),
            console=_rich(sys.stderr),
            auto_refresh=live,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        tasks: dict[str, Any] = {}
        drawn_s = 0.0
        self._holding = sys.stdout.isatty()
        try:
            with display:

                def update(stage: str, done: int, total: int, figures: str) -> None:
                    nonlocal drawn_s
                    if stage not in tasks:
                        tasks[stage] = bars.add_task(stage, total=total)
                    bars.update(tasks[stage], completed=done)
                    figures_line.plain = figures
                    if not live and (done in (0, total) or time.monotonic() - drawn_s > _REDRAW_SECONDS):
                        display.refresh()
                        drawn_s = time.monotonic()

                yield update
        finally:
            self._holding = False
            for line in self._held_lines:
                _line(sys.stdout, line)
            self._held_lines.clear()

    @contextlib.contextmanager
    def steps(self) -> Iterator[Callable[[str, int, int], None]]:
        """Long steps one after the other on stderr; yields a function of (what begins, its number from 1, how many).

        A line a step; on a terminal the running one shows its time.
        """
        if self._format != "human":
            yield _ignore_step
            return
        if not sys.stderr.isatty():
            yield lambda what, number, total: _line(sys.stderr, f"{number}/{total} {what}")
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        bar = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=_rich(sys.stderr),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with bar:

            def begin(what: str, number: int, total: int) -> None:
                for task in bar.tasks:
                    bar.update(task.id, total=1, completed=1)
                bar.add_task(f"{number}/{total} {what}", total=None)

            yield begin
            for task in bar.tasks:
                bar.update(task.id, total=1, completed=1)

    # --- stdout ---

    def export(self, result: ExportResult, *, last: bool = True) -> None:
        """What ``tiue export`` wrote: the parity table, the folder, and what to do next unless more is to come."""
        if last:
            self.document(result.as_dict())
        if self._format == "human":
            self._parity(result.manifest.parity)
            for note in result.notes:
                self.note(note)
        self.path(str(result.folder))
        if self._format == "human" and last:
            _line(sys.stdout, f'next: tiue generate --model {shlex.quote(str(result.folder))} "a prompt"')

    def engine(self, result: EngineResult, *, export: ExportResult | None = None) -> None:
        """What ``tiue export --trt`` built: plans, figures, the folder, and what to do next."""
        self.document({**({} if export is None else export.as_dict()), "engine": result.as_dict()})
        if self._format == "human":
            self._plans(result)
            for note in result.notes:
                self.note(note)
        self.path(str(result.folder))
        if self._format == "human":
            _line(sys.stdout, f'next: tiue generate --model {shlex.quote(str(result.folder))} "a prompt"')

    def _plans(self, result: EngineResult) -> None:
        from rich.table import Table

        if result.reused:
            self.note("this engine was there already and fits; --overwrite builds it anew")
        parity = result.manifest.parity
        errors: dict[str, float] = {}
        for row in () if parity is None else parity.outputs:
            errors[row.graph] = max(errors.get(row.graph, 0.0), row.relative_error)
        table = Table(
            "plan", "layers", "size", "working memory", "built in", "relative error", box=None, pad_edge=False
        )
        for plan in result.manifest.plans:
            table.add_row(
                plan.plan.file.removesuffix(".plan"),
                "" if plan.layers is None else str(plan.layers),
                f"{plan.plan.size_bytes / 1024**2:.1f} MiB",
                "" if plan.device_memory_bytes is None else f"{plan.device_memory_bytes / 1024**2:.1f} MiB",
                f"{plan.build_s:.1f} s",
                f"{errors[plan.graph]:.1e}" if plan.graph in errors else "",
            )
        _rich(sys.stdout).print(table)
        if parity is None:
            self.note("nothing was compared (--no-check)")
            return
        _line(
            sys.stdout,
            f"images: {parity.image_psnr_db:.1f} dB against ONNX Runtime ({parity.reference}),"
            f" {parity.required_psnr_db:.0f} needed",
        )

    def _parity(self, parity: ExportParity | None) -> None:
        from rich.table import Table

        if parity is None:
            self.note("nothing was compared (--no-check)")
            return
        table = Table("graph", "output", "max error", "relative error", box=None, pad_edge=False)
        for row in parity.rows():
            table.add_row(row.graph, row.output, f"{row.max_error:.2g}", f"{row.relative_error:.1e}")
        _rich(sys.stdout).print(table)
        _line(
            sys.stdout,
            f"images: {parity.image_psnr_db:.1f} dB against torch in fp32, {parity.required_psnr_db:.0f} needed"
            f" ({len(parity.prompts)} prompts)",
        )

    def bench(self, report: BenchReport) -> None:
        """What ``tiue bench`` measured: latency, ratios and quality; human format only."""
        if self._format != "human":
            return
        from tiue_cli.bench.report.tables import terminal_tables
        from tiue_cli.bench.report.view import ReportView

        for warning in report.warnings:
            _say("warning", "yellow", warning)
        for table in terminal_tables(ReportView(report)):
            self._bench_table(table)

    def comparison(self, comparison: Comparison, checks: Sequence[Check]) -> None:
        """What ``tiue bench --compare`` found, and which conditions failed."""
        from tiue_cli.bench.compare.table import comparison_table, offender_text
        from tiue_cli.text import plain

        self.document({**comparison.as_dict(), "checks": [check.as_dict() for check in checks]})
        if self._format == "human":
            for note in (*comparison.differences, *comparison.notes):
                self.note(note)
            self._bench_table(comparison_table(comparison))
        for check in checks:
            for row in check.offenders:
                _say("failed", "bold red", plain(f"{check.condition.text}: {offender_text(row)}"))

    def _bench_table(self, table: BenchTable) -> None:
        from rich.table import Table
        from rich.text import Text

        from tiue_cli.text import plain

        shown = Table(title=Text(plain(table.title), style="bold"), title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(table.columns):
            # Figures stay whole; names are broken where the terminal is narrow.
            if column.align == "left":
                shown.add_column(plain(column.head), overflow="fold")
            else:
                width = max((len(row[index]) for row in table.rows), default=0)
                head = textwrap.fill(plain(column.head), max(width, 10), break_long_words=False)
                shown.add_column(head, justify="right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(Text(_indented(cell), style=_VERDICT_STYLES.get(cell, "")) for cell in row))
        out = _rich(sys.stdout)
        out.print(shown)
        for note in table.notes:
            out.print(Text(plain(note), style="dim"))
        out.print()

    def path(self, text: str) -> None:
        """The path of something that was written (or found to be there already)."""
        if self._format == "json":
            return
        if self._holding:
            self._held_lines.append(text)
        else:
            _line(sys.stdout, text)

    def document(self, data: Mapping[str, Any], *, one_line: bool = False) -> None:
        """One JSON document; json format only."""
        if self._format == "json":
            # Escapes where the terminal is not UTF-8: JSON has them, and they read the same.
            ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
            indent = None if one_line else 2
            _line(sys.stdout, json.dumps(data, indent=indent, ensure_ascii=ascii_only, allow_nan=False))

    def prompt(self, text: str) -> None:
        """Ask for a line on stderr, where someone is there to answer."""
        if self._format == "human" and sys.stdin.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()

    def text(self, text: str) -> None:
        """A document of several lines, as it is."""
        for line in text.rstrip("\n").split("\n"):
            _line(sys.stdout, line)

    def plan(self, config: str, rows: Mapping[str, str]) -> None:
        """What ``tiue distill --dry-run`` found: the config, and facts about it."""
        if self._format == "json":
            return
        self.text(config)
        if self._format == "human":
            self._table("", list(rows.items()))

    def recipes(self, summaries: Mapping[str, str]) -> None:
        """Names and what they are for."""
        self.document(dict(summaries))
        if self._format == "json":
            return
        for name, summary in summaries.items():
            _line(sys.stdout, name if self._format == "quiet" else f"{name:<12} {summary}")

    def inspection(self, report: Report) -> None:
        """What ``tiue inspect`` found."""
        from tiue_cli.cli.inspection import ExportReport, FolderReport, GridReport

        self.document(report.as_dict())
        if self._format == "json":
            return
        if isinstance(report, FolderReport | ExportReport):
            self._table(report.title, list(report.rows.items()))
            for note in report.notes:
                _line(sys.stdout, f"note: {note}")
        elif isinstance(report, GridReport):
            self._table(str(report.path), [("contact sheet", f"{len(report.images)} images, {report.columns} a row")])
            for number, image in enumerate(report.images, 1):
                _line(sys.stdout, f"{number:>4}  seed {image.seed}  {image.prompt}")
        else:
            self._table(str(report.path), [("prompt", report.prompt), *report.settings.items()])
            if report.command is not None:
                _line(sys.stdout, f"\nmake it again:\n  {report.command}")

    def diagnosis(self, diagnosis: Diagnosis) -> None:
        """What ``tiue doctor`` found: one line a check, and under it the command that mends what does not work."""
        self.document(diagnosis.as_dict())
        if self._format == "json":
            return
        from rich.text import Text

        marks = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "bold red")}
        out = _rich(sys.stdout)
        for check in diagnosis.checks:
            if self._format == "quiet" and check.status != "broken":
                continue
            mark, style = marks[check.status]
            line = Text.assemble((f"{mark:>3} ", style), (f"{check.name:<16} ", "bold"), check.detail)
            out.print(line, soft_wrap=True)
            if check.fix is not None:
                out.print(Text(f"{'':>21}{check.fix}", style="cyan"), soft_wrap=True)

    def _table(self, title: str, rows: Sequence[tuple[str, object]]) -> None:
        from rich.text import Text

        out = _rich(sys.stdout)
        out.print(Text(title, style="bold"), soft_wrap=True)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            out.print(Text.assemble((f"  {name:<{width}}  ", "cyan"), str(value)), soft_wrap=True)


def show_error(error: TiueError) -> None:
    """``Console.error`` for whoever has no console yet."""
    Console().error(error)


def show_version(version: str) -> None:
    """The line of ``tiue --version``."""
    _line(sys.stdout, f"tiue {version}")


def debugging() -> bool:
    """Whether the user asked for tracebacks (TIUE_DEBUG=1)."""
    return os.environ.get("TIUE_DEBUG", "") not in ("", "0")


def _say(label: str, style: str, text: str) -> None:
    from rich.text import Text

    one_line = " ".join(text.split())
    _rich(sys.stderr).print(Text.assemble((f"{label}:", style), f" {one_line}"), soft_wrap=True)


def _rich(file: Any) -> RichConsole:
    from rich.console import Console as RichConsole

    # Made anew each time: whoever has replaced sys.stdout meanwhile (tests do) gets what belongs there.
    return RichConsole(file=file, highlight=False, emoji=False, markup=False)


def _line(file: Any, text: str) -> None:
    """Write one line as it is: no wrapping, no markup, and no failure for what the terminal's encoding lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
    file.flush()


def _indented(text: str) -> str:
    """A cell without control characters, its leading spaces kept."""
    from tiue_cli.text import plain

    return " " * (len(text) - len(text.lstrip(" "))) + plain(text)


_VERDICT_STYLES = {"slower": "bold red", "worse": "bold red", "more": "red", "faster": "green", "better": "green"}
_LINE_SECONDS = 30.0
_REDRAW_SECONDS = 0.5


class _ImageLines:
    """Progress over images for a log file: a line every half minute."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start_s = self._last_s = time.monotonic()

    def __call__(self, done: float) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= _LINE_SECONDS:
            self._last_s = now_s
            _line(sys.stderr, f"{int(done)}/{self._total} images  {done / (now_s - self._start_s):.2f} images/s")


class _StageLines:
    """Progress for a log file."""

    def __init__(self) -> None:
        self._stage = ""
        self._first, self._start_s, self._last_s = 0, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, figures: str) -> None:
        now_s = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._start_s = stage, done, now_s
        elif done < total and now_s - self._last_s < _LINE_SECONDS:
            return
        self._last_s = now_s
        left = ""
        if self._first < done < total:
            left_s = (now_s - self._start_s) / (done - self._first) * (total - done)
            left = f"{timedelta(seconds=round(left_s))} left"
        _line(sys.stderr, "  ".join(part for part in (f"{stage} {done}/{total}", figures, left) if part))


def _ignore_stage(stage: str, done: int, total: int, figures: str) -> None:
    """Progress that nobody looks at."""


def _ignore_step(what: str, number: int, total: int) -> None:
    """Steps that nobody looks at."""


def _ignore(done: float) -> None:
    """A progress bar that nobody looks at."""
