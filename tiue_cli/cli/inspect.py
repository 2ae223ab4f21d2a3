"""``tiue inspect``: say how a picture was made, or what a folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.options import FormatOption

if TYPE_CHECKING:
    from tiue_cli.cli.inspection import Report


EXAMPLES = (
    "tiue inspect images/a-red-heart-0.png",
    "tiue inspect papercut",
    "tiue inspect runs/student --format json",
)


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="FILE.png|FOLDER", help="A picture, or a model, export or engine folder.")
    ],
    format_: FormatOption = "human",
) -> None:
    """Show how a picture was made, or what a folder is."""
    from tiue_cli.cli.inspection import inspect_source

    show_inspection(Console(format_), inspect_source(source))


def show_inspection(console: Console, report: Report) -> None:
    """What ``tiue inspect`` found."""
    from tiue_cli.cli.inspection import ExportReport, FolderReport, GridReport

    console.document(report.as_dict())
    if console.format == "json":
        return
    if isinstance(report, FolderReport | ExportReport):
        console.table(report.title, list(report.rows.items()))
        for note in report.notes:
            console.line(f"note: {note}")
    elif isinstance(report, GridReport):
        console.table(str(report.path), [("contact sheet", f"{len(report.images)} images, {report.columns} a row")])
        for number, image in enumerate(report.images, 1):
            console.line(f"{number:>4}  seed {image.seed}  {image.prompt}")
    else:
        console.table(str(report.path), [("prompt", report.prompt), *report.settings.items()])
        if report.command is not None:
            console.line(f"\nmake it again:\n  {report.command}")
