"""The command line: every command has a file of its own beside this one.

Importing this module loads nothing heavy: ``tiue --help`` must answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from tiue_cli import __version__
from tiue_cli.cli import bench, console, distill, doctor, export, generate, inspect, recipes
from tiue_cli.errors import TiueError

app = typer.Typer(
    name="tiue",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _examples(*commands: str) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{command}[/cyan]" for command in commands)])


def _show_version(wanted: bool) -> None:
    if wanted:
        console.show_version(__version__)
        raise typer.Exit


@app.callback(
    epilog=_examples(
        'tiue generate "a yellow star above a green tree"',
        "tiue inspect images/a-yellow-star-above-a-green-tree-0.png",
        "tiue doctor",
    )
)
def tiue(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One-pass text-to-image: distilled Stable Diffusion that draws without a loop."""


for _module, _command in (
    (generate, generate.generate),
    (inspect, inspect.inspect),
    (doctor, doctor.doctor),
    (export, export.export),
    (distill, distill.distill),
    (bench, bench.bench),
):
    app.command(epilog=_examples(*_module.EXAMPLES))(_command)
app.add_typer(recipes.app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Failures that a user can understand take two lines on stderr."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="tiue")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except TiueError as error:
        if console.debugging():
            raise
        console.show_error(error)
        return error.exit_code
    except Exception as error:
        if console.debugging():
            raise
        hint = "this is a fault of tiue itself; to see where: run it again with TIUE_DEBUG=1 set"
        console.show_error(TiueError(f"{type(error).__name__}: {error}", hint=hint))
        return 1
    return 0
