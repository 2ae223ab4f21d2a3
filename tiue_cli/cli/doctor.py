"""``tiue doctor``: say what works here, and how to mend what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import FormatOption

if TYPE_CHECKING:
    from tiue_cli.cli.diagnosis import Diagnosis


EXAMPLES = (
    "tiue doctor",
    "tiue doctor --format json",
)


def doctor(format_: FormatOption = "human") -> None:
    """Show what works here, and how to mend what does not."""
    from tiue_cli.cli.diagnosis import diagnose

    diagnosis = diagnose()
    show_diagnosis(Console(format_), diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


def show_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """What ``tiue doctor`` found: one line a check, and under it the command that mends what does not work."""
    console.document(diagnosis.as_dict())
    if console.format == "json":
        return
    from rich.text import Text

    marks = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "bold red")}
    out = console.rich()
    for check in diagnosis.checks:
        if console.format == "quiet" and check.status != "broken":
            continue
        mark, style = marks[check.status]
        line = Text.assemble((f"{mark:>3} ", style), (f"{check.name:<16} ", "bold"), check.detail)
        out.print(line, soft_wrap=True)
        if check.fix is not None:
            out.print(Text(f"{'':>21}{check.fix}", style="cyan"), soft_wrap=True)
