"""Everything that reaches the terminal; the only module that prints.

It knows streams, formats and progress, and no command.

Data goes to stdout, all else to stderr: notes, progress, errors. ``human`` writes the paths of images to stdout as they
are ready, ``json`` one document at the end, ``quiet`` the paths and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from tiue_cli.base.text import UNSAFE, visible
from tiue_cli.cli.streams import terminal
from tiue_cli.errors import TiueError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

Format = Literal["human", "json", "quiet"]


class Console:
    """Where a command shows what it does, in one of the three formats."""

    def __init__(self, format_: Format = "human") -> None:
        """``format_`` is what ``--format`` says."""
        self.format = format_
        self._bar: RichConsole | None = None
        """That of the progress on stderr, while there is one: lines go above it."""
        self._holding = False
        self._held_lines: list[str] = []

    # --- stderr ---

    def note(self, text: str) -> None:
        """A sentence that the user should know; human format only, as the others carry it as data or not at all."""
        if self.format == "human":
            self.say("note", "cyan", text)

    def summary(self, text: str) -> None:
        """The last line of a run; human format only."""
        if self.format == "human":
            _line(sys.stderr, text)

    def error(self, error: TiueError) -> None:
        """One line of what went wrong and where, one of what to do next; in every format, in JSON also as data."""
        self.say("error", "bold red", error.message)
        if error.hint is not None:
            self.say("hint", "yellow", error.hint)
        self.failure(type(error).__name__, error.message, error.hint)

    def failure(self, type_: str, message: str, hint: str | None = None) -> None:
        """The JSON document of a command that failed; json format only."""
        self.document({"error": {"type": type_, "message": message, "hint": hint}}, one_line=True)

    def stopped(self, text: str) -> None:
        """What an interrupted run left behind; in every format."""
        self.say("stopped", "yellow", text)

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[float], None]]:
        """A bar over ``total`` images on stderr; yields a function that takes the number done so far.

        Where stderr is no terminal: a line every half minute.
        """
        if self.format != "human" or total == 0:
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
            console=terminal(sys.stderr),
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        with self._paths_held(), bar, self._above(bar.console):
            task = bar.add_task("images", total=total, rate="")

            def update(done: float) -> None:
                seconds = bar.tasks[0].elapsed or 0.0
                rate = f"{done / seconds:.2f} images/s" if done > 0 and seconds > 0 else ""
                bar.update(task, completed=done, rate=rate)

            yield update

    @contextlib.contextmanager
    def stages(self, *, live: bool = True) -> Iterator[Callable[[str, int, int, str], None]]:
        """Work in named stages on stderr; yields a function of (stage, done, total, figures as text).

        A bar a stage on a terminal, the figures below; elsewhere a line at the start and end of a stage and every half
        minute. Without ``live`` no thread draws beside the work, for work that is timed.
        """
        if self.format != "human":
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
            console=terminal(sys.stderr),
            auto_refresh=live,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        tasks: dict[str, Any] = {}
        drawn_s = 0.0
        with self._paths_held(), display, self._above(display.console):

            def update(stage: str, done: int, total: int, figures: str) -> None:
                nonlocal drawn_s
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)
                figures_line.plain = figures
                if not live and (done in (0, total) or time.monotonic() - drawn_s > _REDRAW_SECONDS):
                    display.refresh()
                    drawn_s = time.monotonic()

            yield update

    @contextlib.contextmanager
    def _paths_held(self) -> Iterator[None]:
        """Keep lines for a terminal that stdout shares with a bar until the bar is gone."""
        self._holding = sys.stdout.isatty()
        try:
            yield
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
        if self.format != "human":
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
            console=terminal(sys.stderr),
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with bar, self._above(bar.console):

            def begin(what: str, number: int, total: int) -> None:
                for task in bar.tasks:
                    bar.update(task.id, total=1, completed=1)
                bar.add_task(f"{number}/{total} {what}", total=None)

            yield begin
            for task in bar.tasks:
                bar.update(task.id, total=1, completed=1)

    # --- stdout ---

    def path(self, text: str) -> None:
        """The path of something that was written (or found to be there already)."""
        if self.format == "json":
            return
        if self._holding:
            self._held_lines.append(text)
        else:
            _line(sys.stdout, text)

    def document(self, data: Mapping[str, Any], *, one_line: bool = False) -> None:
        """One JSON document; json format only."""
        if self.format == "json":
            # Escapes where the terminal is not UTF-8: JSON has them, and they read the same.
            ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
            indent = None if one_line else 2
            text = json.dumps(data, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
            # JSON need not escape DEL, the C1 controls and bidirectional marks; a terminal obeys them.
            _line(sys.stdout, UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))

    def prompt(self, text: str) -> None:
        """Ask for a line on stderr, where someone is there to answer."""
        if self.format == "human" and sys.stdin.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()

    def line(self, text: str) -> None:
        """Text on stdout as it is, but for controls."""
        _line(sys.stdout, text)

    def rich(self) -> RichConsole:
        """A rich console on stdout, for tables."""
        return terminal(sys.stdout)

    def say(self, label: str, style: str, text: str) -> None:
        """A labelled sentence on stderr, in every format."""
        from rich.text import Text

        out = terminal(sys.stderr) if self._bar is None else self._bar
        one_line = " ".join(text.split())
        out.print(Text.assemble((f"{label}:", style), f" {visible(one_line)}"), soft_wrap=True)

    @contextlib.contextmanager
    def _above(self, bar: RichConsole) -> Iterator[None]:
        self._bar = bar
        try:
            yield
        finally:
            self._bar = None

    def text(self, text: str) -> None:
        """A document of several lines, as it is."""
        for line in text.rstrip("\n").split("\n"):
            _line(sys.stdout, line)

    def table(self, title: str, rows: Sequence[tuple[str, object]]) -> None:
        from rich.text import Text

        out = terminal(sys.stdout)
        out.print(Text(title, style="bold"), soft_wrap=True)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            lines = visible(str(value)).split("\n")
            for number, line in enumerate(lines):
                label = name if number == 0 else ""
                out.print(Text.assemble((f"  {label:<{width}}  ", "cyan"), line), soft_wrap=True)


def show_error(error: TiueError, *, format_: Format = "human") -> None:
    """``Console.error`` for callers that have no console yet."""
    Console(format_).error(error)


def show_version(version: str) -> None:
    """The line of ``tiue --version``."""
    _line(sys.stdout, f"tiue {version}")


def debugging() -> bool:
    """Whether the user asked for tracebacks (TIUE_DEBUG=1)."""
    return os.environ.get("TIUE_DEBUG", "") not in ("", "0")


def _line(file: Any, text: str) -> None:
    """Write a line as it is but for controls: no wrapping, no markup, no failure for what the encoding lacks."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(visible(text).encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
    file.flush()


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
