"""``tiue recipes``: settings of ``tiue distill`` that ship with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from tiue_cli.cli.console import Console
from tiue_cli.cli.help_text import Command, Group
from tiue_cli.cli.options import FormatOption

app = typer.Typer(cls=Group, no_args_is_help=True, help="Settings of tiue distill that ship with it.")


@app.command("ls", cls=Command)
def recipes_ls(format_: FormatOption = "human") -> None:
    """List the recipes."""
    from tiue_cli.distill.resolve import all_recipes

    show_recipes(Console(format_), {recipe.name: recipe.summary for recipe in all_recipes()})


@app.command("show", cls=Command)
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe's YAML; what it does not set has tiue's defaults."""
    from tiue_cli.distill.resolve import find_recipe

    Console().text(find_recipe(name).text)


@app.command("copy", cls=Command)
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], path: Annotated[Path, typer.Argument(metavar="FILE.yaml")]
) -> None:
    """Write a recipe to a file, to be changed."""
    from tiue_cli.distill.resolve import copy_recipe

    Console().path(str(copy_recipe(name, path)))


def show_recipes(console: Console, summaries: Mapping[str, str]) -> None:
    """Names and what they are for."""
    console.document(dict(summaries))
    if console.format == "json":
        return
    for name, summary in summaries.items():
        console.line(name if console.format == "quiet" else f"{name:<12} {summary}")
