"""Options that several commands share, and the panels that help is ordered by."""

from __future__ import annotations

from typing import Annotated

import typer

from tiue_cli.cli.console import Format

MODEL = "Model"
OUTPUT = "Output"
MACHINE = "Machine"

FormatOption = Annotated[Format, typer.Option("--format", help="What goes to stdout.", rich_help_panel=OUTPUT)]
