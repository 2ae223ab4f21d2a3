"""The commands of ``tiue``: each turns its options into a config, makes one call, and shows the result.

Importing this module loads nothing heavy: ``tiue --help`` must answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tiue_cli import __version__
from tiue_cli.cli import console
from tiue_cli.cli.bench_options import EXAMPLES as BENCH_EXAMPLES
from tiue_cli.cli.bench_options import bench
from tiue_cli.cli.console import Console
from tiue_cli.cli.options import MACHINE, MODEL, OUTPUT, FormatOption
from tiue_cli.errors import TiueError, UsageError
from tiue_cli.export.config import OPSETS, EngineRequest, ExportConfig
from tiue_cli.export.trt.profiles import parse_range
from tiue_cli.files.exports import Precision
from tiue_cli.generate.plan import TEACHER_STEPS, BackendName, DeviceName, DtypeName, GenerateConfig, ProviderName
from tiue_cli.generate.prompts import read_prompts, rows_from_arguments
from tiue_cli.model.noise import MAX_SEED
from tiue_cli.text import parse_size

app = typer.Typer(
    name="tiue",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DEFAULTS = GenerateConfig()
_TENSORRT = "TensorRT"


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


@app.command(
    epilog=_examples(
        'tiue generate "a red heart left of a blue house at night" --seed 0 --images 8 --grid',
        "tiue generate --prompts captions.txt --out pictures --batch 16",
        'tiue generate "a lighthouse" --model runs/student --steps 2 --size 512x768',
        'tiue generate "a lighthouse" --model OWNER/NAME --teacher-steps 50 --guidance 5',
        'tiue generate "a lighthouse" --model engines/student --provider cuda',
        "tiue generate --interactive",
    )
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw; several make one image each.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='More prompts: .txt with one a line, or .jsonl with {"prompt", "seed", "size", "steps"} a line.',
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Load once, then draw each line that is typed.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, max=MAX_SEED, help="Image number i uses seed + i. Without it: random, shown and stored."
        ),
    ] = _DEFAULTS.seed,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Images for each prompt.")] = _DEFAULTS.images,
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Pixels, square or height x width. Without it: the model's own.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(metavar="FOLDER|HUB_ID", help="Student, teacher or export folder.", rich_help_panel=MODEL),
    ] = _DEFAULTS.model,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="Decoder timesteps of a student, all in one pass.", rich_help_panel=MODEL
        ),
    ] = _DEFAULTS.steps,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help=f"Sampler steps of a teacher; {TEACHER_STEPS} if not given.",
            rich_help_panel=MODEL,
        ),
    ] = _DEFAULTS.teacher_steps,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", min=0, max=100, help="Guidance of a teacher; 1 is none.", rich_help_panel=MODEL),
    ] = _DEFAULTS.guidance,
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="Another autoencoder, e.g. a tiny one.", rich_help_panel=MODEL),
    ] = _DEFAULTS.vae,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR|FILE.png", help="Where images go; a file for one image or grid.", rich_help_panel=OUTPUT
        ),
    ] = _DEFAULTS.out,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write a contact sheet of all images as well.", rich_help_panel=OUTPUT)
    ] = _DEFAULTS.grid,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other pictures of the same name.", rich_help_panel=OUTPUT)
    ] = _DEFAULTS.overwrite,
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Write no prompt, seed and model into the PNG.", rich_help_panel=OUTPUT),
    ] = not _DEFAULTS.metadata,
    format_: FormatOption = "human",
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Images computed at once. Without it: by size and device.",
            rich_help_panel=MACHINE,
        ),
    ] = _DEFAULTS.batch,
    backend: Annotated[
        BackendName,
        typer.Option(
            help="What computes: torch for a model folder, onnx or trt for an export.", rich_help_panel=MACHINE
        ),
    ] = _DEFAULTS.backend,
    provider: Annotated[
        ProviderName, typer.Option(help="What ONNX Runtime computes with.", rich_help_panel=MACHINE)
    ] = _DEFAULTS.provider,
    device: Annotated[DeviceName, typer.Option(help="Where.", rich_help_panel=MACHINE)] = _DEFAULTS.device,
    dtype: Annotated[
        DtypeName, typer.Option(help="Precision; auto is fp32 on a CPU, fp16 on CUDA.", rich_help_panel=MACHINE)
    ] = _DEFAULTS.dtype,
) -> None:
    """Draw prompts.

    Images that are there already are not made again: a stopped run goes on where it was.
    """
    rows = rows_from_arguments(prompts or [])
    if prompts_file is not None:
        rows += read_prompts(prompts_file)
    if interactive and rows:
        raise UsageError("--interactive reads its prompts from stdin", hint="leave the other prompts out")
    if not interactive and not rows:
        raise UsageError("no prompt was given", hint='say what to draw: tiue generate "a red heart at night"')
    config = GenerateConfig(
        model=model,
        vae=vae,
        steps=steps,
        teacher_steps=teacher_steps,
        guidance=guidance,
        seed=seed,
        images=images,
        size=None if size is None else parse_size(size),
        batch=batch,
        backend=backend,
        device=device,
        dtype=dtype,
        provider=provider,
        out=out,
        grid=grid,
        metadata=not no_metadata,
        overwrite=overwrite,
    )
    from tiue_cli.cli.run import run_interactive, run_once

    if not interactive:
        run_once(config, rows, Console(format_))
    elif not run_interactive(config, Console(format_)):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "tiue inspect images/a-red-heart-0.png", "tiue inspect papercut", "tiue inspect runs/student --format json"
    )
)
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="FILE.png|FOLDER", help="A picture, or a model, export or engine folder.")
    ],
    format_: FormatOption = "human",
) -> None:
    """Say how a picture was made, or what a folder is."""
    from tiue_cli.cli.inspection import inspect_source

    Console(format_).inspection(inspect_source(source))


@app.command(epilog=_examples("tiue doctor", "tiue doctor --format json"))
def doctor(format_: FormatOption = "human") -> None:
    """Say what works here, and how to mend what does not."""
    from tiue_cli.cli.diagnosis import diagnose

    diagnosis = diagnose()
    Console(format_).diagnosis(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


_EXPORT = ExportConfig(student="")


@app.command(
    epilog=_examples(
        "tiue export papercut",
        "tiue export runs/sd15/student --precision fp16 --size 512 --vae madebyollin/taesd",
        "tiue export runs/sd15/student --trt --profile sd15-512",
        "tiue export engines/student --trt --batch 1 --batch 1:4:16",
    )
)
def export(
    student: Annotated[
        str, typer.Argument(metavar="FOLDER|HUB_ID", help="Student folder; with --trt, or an export folder.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The export folder; engines/NAME if not given.", rich_help_panel=OUTPUT),
    ] = _EXPORT.out,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help=f"Of the weights and most of the arithmetic. Without it: {_EXPORT.precision}, with --trt fp16."
        ),
    ] = None,
    opset: Annotated[
        int,
        typer.Option(metavar="N", min=OPSETS[0], max=OPSETS[-1], help="ONNX operator set; 23 has attention as one."),
    ] = _EXPORT.opset,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="N|HxW", help="Fix this size in pixels; several make graphs each. Without it: any size."),
    ] = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="Build TensorRT plans for the GPU of this machine.", rich_help_panel=_TENSORRT)
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="What they take: sd15-512, sd21-512, papercut, or a file.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|MIN:OPT:MAX",
            help="Images that they take; several make a profile each. Without it: 1 and 1:4:16.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="Another autoencoder, e.g. a tiny one.", rich_help_panel=MODEL),
    ] = _EXPORT.vae,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the graphs with torch.")
    ] = not _EXPORT.check,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export or engine that is there.", rich_help_panel=OUTPUT)
    ] = _EXPORT.overwrite,
    format_: FormatOption = "human",
) -> None:
    """Turn a student into ONNX graphs that run without torch, and show that they compute the same."""
    from tiue_cli.cli.run_export import run_engine, run_export

    config = ExportConfig(
        student=student,
        out=out,
        precision=precision or _EXPORT.precision,
        opset=opset,
        sizes=tuple(parse_size(text) for text in size or ()),
        vae=vae,
        check=not no_check,
        overwrite=overwrite,
    )
    if trt:
        request = EngineRequest(profile=profile, batches=tuple(parse_range(text) for text in batch or ()))
        run_engine(config, request, Console(format_), precision=precision)
        return
    if profile is not None or batch:
        option = "--batch" if profile is None else "--profile"
        raise UsageError(f"{option} is for TensorRT engines", hint="add --trt to build them")
    run_export(config, Console(format_))


@app.command(
    epilog=_examples(
        "tiue distill --teacher papercut --prompts captions.txt --out runs/small --max-steps 200",
        "tiue distill --config sd15 --prompts captions.parquet --out runs/sd15 --launch -- --num_processes 8",
        "tiue distill --out runs/sd15 --resume",
    )
)
def distill(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run; the student is in its student/.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="FOLDER|HUB_ID", help="The many-step model.", rich_help_panel=MODEL)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help=".txt, .jsonl, .csv, .parquet, or datasets:NAME.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE|RECIPE", help="YAML settings; recipes: tiue recipes ls.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. kl.weight=0.05.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="All optimiser steps.")] = None,
    warm_start: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="How many of them are regression onto the teacher.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and what it needs.")] = False,
    launch: Annotated[
        bool,
        typer.Option("--launch", help="Through accelerate launch; its options after --.", rich_help_panel=MACHINE),
    ] = False,
    accelerate_args: Annotated[list[str] | None, typer.Argument(metavar="[-- ACCELERATE_ARGS]", hidden=True)] = None,
    format_: FormatOption = "human",
) -> None:
    """Distil a teacher into a one-pass student, from prompts alone."""
    from tiue_cli.cli.run_distill import is_worker, plan_distill, relaunch, run_distill
    from tiue_cli.distill.request import DistillRequest

    request = DistillRequest(
        out=out,
        teacher=teacher,
        prompts=prompts,
        config=config,
        overrides=tuple(overrides or ()),
        max_steps=max_steps,
        warm_start=warm_start,
        resume=resume,
    )
    if accelerate_args and not launch:
        raise UsageError(f"what is {accelerate_args[0]!r}?", hint="words after -- are for accelerate: add --launch")
    shown = Console("quiet" if is_worker() else format_)
    if dry_run:
        plan_distill(request, shown)
    elif launch:
        raise typer.Exit(relaunch(request, accelerate_args or [], shown, format_=format_))
    else:
        run_distill(request, shown)


app.command(epilog=_examples(*BENCH_EXAMPLES))(bench)

recipes_app = typer.Typer(no_args_is_help=True, help="Settings of tiue distill that ship with it.")
app.add_typer(recipes_app, name="recipes")


@recipes_app.command("ls")
def recipes_ls(format_: FormatOption = "human") -> None:
    """List the recipes."""
    from tiue_cli.distill.recipes import all_recipes

    Console(format_).recipes({recipe.name: recipe.summary for recipe in all_recipes()})


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe's YAML; what it does not set has tiue's defaults."""
    from tiue_cli.distill.recipes import find_recipe

    Console().text(find_recipe(name).text)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], path: Annotated[Path, typer.Argument(metavar="FILE.yaml")]
) -> None:
    """Write a recipe to a file, to be changed."""
    from tiue_cli.distill.recipes import copy_recipe

    Console().path(str(copy_recipe(name, path)))


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
