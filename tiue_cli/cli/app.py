"""The command line: every command has a file of its own beside this one.

Importing this module loads nothing heavy: ``tiue --help`` must answer at once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tiue_cli import __version__
from tiue_cli.base.text import excerpt, visible
from tiue_cli.cli import bench, console, convert, distill, doctor, export, generate, inspect, merge, recipes, serve
from tiue_cli.cli.help_text import Command, Group
from tiue_cli.cli.streams import prepare_streams
from tiue_cli.errors import OutOfMemoryError, TiueError, UsageError, full_installation
from tiue_cli.files.access import access_error
from tiue_cli.files.atomic import terminated_as_interrupt

app = typer.Typer(
    name="tiue",
    cls=Group,
    no_args_is_help=True,
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
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One-pass text-to-image: distilled Stable Diffusion that draws without a loop."""


for _module, _command in (
    (generate, generate.generate),
    (serve, serve.serve),
    (inspect, inspect.inspect),
    (doctor, doctor.doctor),
    (export, export.export),
    (distill, distill.distill),
    (convert, convert.convert),
    (merge, merge.merge),
    (bench, bench.bench),
):
    app.command(epilog=_examples(*_module.EXAMPLES), cls=Command)(_command)
app.add_typer(recipes.app, name="recipes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Failures that a user can understand take two lines on stderr.

    Without ``arguments`` this is the whole process: its streams are made safe, and SIGTERM unwinds as Ctrl-C does.
    """
    if arguments is not None:
        return _run(list(arguments))
    prepare_streams()
    with terminated_as_interrupt():
        return _run(sys.argv[1:])


def _run(words: Sequence[str]) -> int:
    format_ = _format_of(words)
    try:
        _refuse_empty_values(words)
        with full_installation("this command"):
            return app(args=list(words), prog_name="tiue", standalone_mode=False) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except _ClickException as error:
        return _show_usage_error(error, words, format_)
    except TiueError as error:
        if console.debugging():
            raise
        console.show_error(error, format_=format_)
        return error.exit_code
    except OSError as error:
        # What the system refuses to a library that asks it by itself; our own readers and writers say more.
        if console.debugging():
            raise
        if error.errno is None or not isinstance(error.filename, str):
            return _fault(error, format_)
        console.show_error(access_error(error.filename, error), format_=format_)
        return 1
    except MemoryError:
        if console.debugging():
            raise
        full = OutOfMemoryError(
            "the memory of this machine is full", hint="close other programs, or ask for less at once: --batch, --size"
        )
        console.show_error(full, format_=format_)
        return full.exit_code
    except Exception as error:
        if console.debugging():
            raise
        return _fault(error, format_)


_PATHS = frozenset(
    {
        *("--out", "-o", "--model", "--vae", "--lora", "--prompts", "--config", "--teacher", "--triton", "--profile"),
        *("--render", "--compare", "--reference", "--extractor", "--clip", "--keep-images"),
    }
)


def _refuse_empty_values(words: Sequence[str]) -> None:
    """An empty path would be this folder to Python; it is a variable of a script that was not set."""
    options = words[: words.index("--")] if "--" in words else words
    given = [*itertools.pairwise(options), *((word[:-1], "") for word in options if word.endswith("="))]
    for option, value in given:
        if option in _PATHS and not value.strip():
            raise UsageError(f"{option} was given an empty value", hint=f"give a name, or leave {option} out")


def _fault(error: Exception, format_: console.Format) -> int:
    hint = "this is a fault of tiue itself; to see where: run it again with TIUE_DEBUG=1 set"
    console.show_error(TiueError(f"{type(error).__name__}: {error}", hint=hint), format_=format_)
    return 1


# typer brings its own copy of click in some versions, so the class is taken from typer's.
_ClickException: type[Any] = typer.BadParameter.__mro__[2]


def _show_usage_error(error: Any, words: Sequence[str], format_: console.Format) -> int:
    from typer.rich_utils import rich_format_error

    known = _ELSEWHERE.get((getattr(error, "option_name", None) or "").lower().replace("_", "-"))
    device = next((value for option, value in itertools.pairwise(words) if option == "--device"), "")
    if getattr(getattr(error, "param", None), "name", None) == "device":
        number = device.removeprefix("cuda:")
        error.message = (
            f"one GPU is used, the first that is visible; for another one: CUDA_VISIBLE_DEVICES={number} tiue …"
            if device.startswith("cuda:") and number.isdigit()
            else f"{excerpt(visible(device))!r} is not supported: choose auto, cpu, cuda (NVIDIA), gpu or npu (Intel)"
        )
    elif known is not None:
        error.message, error.possibilities = f"No such option: {error.option_name}. {known}", None
    elif isinstance(error.message, str):
        error.message = visible(excerpt(error.message, 300))
    rich_format_error(error)
    console.Console(format_).failure("UsageError", error.format_message())
    return int(error.exit_code)


# Options of other programs, and what they are here; with dashes for underscores.
_NO_NEGATIVE = "There are no negative prompts: say in the prompt what to draw."
_SIDES = "Use --size HEIGHTxWIDTH, e.g. --size 512x768."
_COUNT = "Use --images N."
_STEPS = "Use --steps K of a student, or --teacher-steps N."
_GUIDANCE = "Use --guidance G of a teacher; a student has none."
_SAMPLER = "There is one sampler: a student draws in one pass, a teacher by DDIM."
_MODEL = "Use --model FOLDER|HUB_ID."
_OUT = "Use --out DIR|FILE.png."
_ELSEWHERE = {
    **dict.fromkeys(("--negative-prompt", "--negative", "--neg-prompt", "--uncond"), _NO_NEGATIVE),
    **dict.fromkeys(("--width", "--height", "--w", "--h", "--resolution", "--aspect-ratio"), _SIDES),
    **dict.fromkeys(("--num-images", "--num-images-per-prompt", "--n-samples", "--n-iter", "--count"), _COUNT),
    **dict.fromkeys(("--num-inference-steps", "--inference-steps", "--num-steps", "--ddim-steps"), _STEPS),
    **dict.fromkeys(("--guidance-scale", "--cfg-scale", "--cfg", "--scale"), _GUIDANCE),
    **dict.fromkeys(("--sampler", "--scheduler", "--sampling-method"), _SAMPLER),
    **dict.fromkeys(("--output", "--outdir", "--output-dir", "--output-path"), _OUT),
    **dict.fromkeys(("--ckpt", "--checkpoint", "--model-path", "--pretrained-model-name-or-path"), _MODEL),
    "--prompt": 'The prompt needs no option: tiue generate "a red heart".',
    "--fp16": "Use --precision fp16.",
    "--half": "Use --precision fp16.",
}


def _format_of(words: Sequence[str]) -> console.Format:
    """What ``--format`` asks for, before anything is parsed: a failure to parse is told in that format as well."""
    options = list(words[: words.index("--")] if "--" in words else words)
    asked = [word.removeprefix("--format=") for word in options if word.startswith("--format=")]
    asked += [value for option, value in itertools.pairwise(options) if option == "--format"]
    return "json" if asked[-1:] == ["json"] else "human"
