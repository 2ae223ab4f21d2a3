"""``tiue generate``: draw prompts, once or for every line that is typed."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiue_cli.base.text import excerpt, parse_size
from tiue_cli.cli.bulk import BULK, check_bulk_options, run_shards
from tiue_cli.cli.console import Console
from tiue_cli.cli.options import (
    MACHINE,
    MODEL,
    OUTPUT,
    BackendOption,
    BaseOption,
    CompileOption,
    DeviceOption,
    FormatOption,
    GuidanceOption,
    LoraOption,
    PrecisionOption,
    ProviderOption,
    VaeOption,
)
from tiue_cli.errors import TiueError, UsageError
from tiue_cli.files.atomic import Terminated
from tiue_cli.generate.bulk.config import BulkConfig, ImageFormat
from tiue_cli.generate.config import EncoderTimestep, GenerateConfig, LongPrompts
from tiue_cli.generate.plan import MAX_IMAGES, Plan, check_settings
from tiue_cli.generate.prompts import PromptRow, bare_words_note, read_prompts, rows_from_arguments
from tiue_cli.generate.session import Made, Session, report
from tiue_cli.model.hub import TEACHER_STEPS, place_base
from tiue_cli.model.noise import MAX_SEED

if TYPE_CHECKING:
    pass


_DEFAULTS = GenerateConfig()

EXAMPLES = (
    'tiue generate "a red heart left of a blue house at night" --seed 0 --images 8 --grid',
    "tiue generate --prompts captions.txt --out pictures --batch 16",
    'tiue generate "a lighthouse" --model runs/student --steps 2 --size 512x768',
    'tiue generate "a lighthouse" --model OWNER/NAME --teacher-steps 50 --guidance 5',
    'tiue generate "a lighthouse" --model runs/student --lora pixel-art.safetensors:0.8',
    'tiue generate "a lighthouse" --model engines/student --provider cuda',
    "tiue generate --prompts captions.parquet --out shards --shards 1000 --workers 4",
    "tiue generate --interactive",
)


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw; several prompts make one image each.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='More: .txt, one a line; .jsonl, {"prompt", "seed", "size", "steps", "lora"} a line; - is stdin.',
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Load once, then draw each line that is typed.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Image number i uses seed + i. Without it: random, shown and stored."),
    ] = _DEFAULTS.seed,
    images: Annotated[
        int, typer.Option("--images", "-n", metavar="N", min=1, help="Images for each prompt.")
    ] = _DEFAULTS.images,
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
    encoder_timestep: Annotated[
        EncoderTimestep,
        typer.Option(
            help="With fewer --steps, the UNet encoder runs where it was trained, or at the first (the authors' way).",
            rich_help_panel=MODEL,
        ),
    ] = _DEFAULTS.encoder_timestep,
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
    guidance: GuidanceOption = _DEFAULTS.guidance,
    vae: VaeOption = _DEFAULTS.vae,
    lora: LoraOption = None,
    base: BaseOption = None,
    long_prompts: Annotated[
        LongPrompts,
        typer.Option(
            help="Beyond 75 tokens: cut the prompt, or read it in chunks of 75, as A1111 does.", rich_help_panel=MODEL
        ),
    ] = _DEFAULTS.long_prompts,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR|FILE.png",
            help="Where images go; a file for one image or grid.",
            rich_help_panel=OUTPUT,
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
        typer.Option("--no-metadata", help="Write no prompt, seed or model into the PNG.", rich_help_panel=OUTPUT),
    ] = not _DEFAULTS.metadata,
    shards: Annotated[
        int | None,
        typer.Option(
            "--shards",
            metavar="[N]",
            min=1,
            help=f"Write tar and Parquet shards of N images each ({BulkConfig.shard} if not given) instead of single "
            "files; goes on where it was stopped.",
            rich_help_panel=BULK,
        ),
    ] = None,
    image_format: Annotated[
        ImageFormat, typer.Option(help="Of the images in shards.", rich_help_panel=BULK)
    ] = BulkConfig.image_format,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop at a bad row, instead of noting it in failed.jsonl.", rich_help_panel=BULK),
    ] = BulkConfig.strict,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that write shards.", rich_help_panel=BULK)
    ] = BulkConfig.workers,
    launch: Annotated[
        str | None,
        typer.Option(metavar="ray|ray://HOST:PORT", help="Write shards on a Ray cluster.", rich_help_panel=BULK),
    ] = BulkConfig.launch,
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
    backend: BackendOption = _DEFAULTS.backend,
    provider: ProviderOption = _DEFAULTS.provider,
    device: DeviceOption = _DEFAULTS.device,
    dtype: PrecisionOption = _DEFAULTS.dtype,
    compiled: CompileOption = _DEFAULTS.compiled,
) -> None:
    """Draw pictures of prompts.

    Images that exist already are not made again: a run that was stopped continues where it was.
    """
    bulk = {"--image-format": image_format, "--strict": strict, "--workers": workers, "--launch": launch}
    check_bulk_options(shards, prompts_file, bulk, others=bool(prompts) or interactive)
    rows = rows_from_arguments(prompts or [])
    if prompts_file is not None and shards is None:
        rows += read_prompts(prompts_file)
    if interactive and rows:
        raise UsageError("--interactive reads its prompts from stdin", hint="leave the other prompts out")
    if not interactive and not rows and shards is None:
        raise UsageError("no prompt was given", hint='say what to draw: tiue generate "a red heart at night"')
    if base is not None:
        place_base([model], base)
    config = GenerateConfig(
        model=model,
        vae=vae,
        loras=tuple(lora or ()),
        long_prompts=long_prompts,
        steps=steps,
        encoder_timestep=encoder_timestep,
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
        compiled=compiled,
        out=out,
        grid=grid,
        metadata=not no_metadata,
        overwrite=overwrite,
    )

    if (note := bare_words_note(prompts or [])) is not None:
        Console(format_).note(note)
    if shards is not None:
        run_shards(
            BulkConfig(
                draw=config,
                prompts=str(prompts_file),
                out=out,
                shard=shards,
                image_format=image_format,
                strict=strict,
                workers=workers,
                launch=launch,
            ),
            Console(format_),
        )
    elif not interactive:
        run_once(config, rows, Console(format_))
    elif not run_interactive(config, Console(format_)):
        raise typer.Exit(1)


HELP = ":seed N|random  :images N  :size N|HxW  :steps N  :help  :quit   anything else is a prompt"


def run_once(config: GenerateConfig, rows: Sequence[PromptRow], console: Console) -> None:
    """Make all images of ``rows`` and show them; on Ctrl-C say what was written and how to continue."""
    session = Session(config, note=console.note)
    with interrupt_reported(console, session), session:
        make_and_show(session, session.plan(rows), console)


def make_and_show(session: Session, plan: Plan, console: Console, *, one_line: bool = False) -> None:
    """Run ``plan`` with a progress bar, the paths as they are ready, and a summary or a JSON document at the end."""
    if plan.seed_drawn and not one_line:  # the summary of each line names the seed as well
        console.note(f"no --seed was given; a random one: --seed {plan.seed}")
    made: list[Made] = []
    session.left_behind = ""
    try:
        with console.progress(len(plan.todo)) as progress:
            for image in session.run(plan, progress=progress):
                made.append(image)
                if image.path is not None:
                    console.path(str(image.path))
    except (KeyboardInterrupt, Terminated) as interrupt:
        session.left_behind = _how_to_go_on(plan, made)
        raise interrupt from None
    if plan.sheet is not None:
        console.path(str(plan.sheet))
    console.document(report(session, plan, made), one_line=one_line)
    console.summary(_summary(session, made))


def run_interactive(config: GenerateConfig, console: Console, *, lines: Iterable[str] | None = None) -> bool:
    """Load once, then make images for each line of stdin until it ends or ``:quit``; returns whether all lines worked.

    A line that fails is reported and the next one is read. Lines that begin with a colon change the settings.
    """
    all_worked = True
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 spoil their own line, not the session.
        sys.stdin.reconfigure(errors="surrogateescape")
    session = Session(config, note=console.note)
    with interrupt_reported(console, session), session:
        session.open()
        console.note(HELP)
        console.prompt("tiue> ")
        for line in sys.stdin if lines is None else lines:
            text = _command(line.strip())
            if text in (":quit", ":q", ":exit"):
                break
            try:
                config = _answer(text, config, session, console)
            except TiueError as error:
                all_worked = False
                console.error(error)
            console.prompt("tiue> ")
    return all_worked


def _command(text: str) -> str:
    """A line as the session understands it: ``help``, ``exit``, ``quit`` and ``--seed 7`` are commands, too."""
    if text.lower() in ("help", "exit", "quit"):
        return f":{text.lower()}"
    return f":{text.removeprefix('--').replace('=', ' ', 1)}" if text.startswith("--") else text


def _answer(text: str, config: GenerateConfig, session: Session, console: Console) -> GenerateConfig:
    """Do what one line asks; returns the config for the next one."""
    if not text:
        return config
    if text == ":help":
        console.note(HELP)
        return config
    if text.startswith(":"):
        changed = _changed(text, config, kind=session.target.info.kind)
        check_settings(changed, session.target)
        console.note(text.removeprefix(":"))
        return changed
    make_and_show(session, session.plan(rows_from_arguments([text]), config), console, one_line=True)
    return config


def _changed(text: str, config: GenerateConfig, *, kind: str) -> GenerateConfig:
    """The config after a line such as ``:seed 5``. Raises UsageError for one that is not understood."""
    name, _, value = text.removeprefix(":").partition(" ")
    value = value.strip()
    if name == "size":
        return replace(config, size=parse_size(value))
    if name == "seed":
        return replace(
            config, seed=None if value == "random" else _whole_number(text, value, at_least=0, at_most=MAX_SEED)
        )
    if name == "images":
        return replace(config, images=_whole_number(text, value, at_least=1, at_most=MAX_IMAGES))
    if name == "steps":
        number = _whole_number(text, value, at_least=1, at_most=1000)
        return replace(config, teacher_steps=number) if kind == "teacher" else replace(config, steps=number)
    raise UsageError(f"{excerpt(text)!r} is not understood", hint=HELP)


def _whole_number(text: str, value: str, *, at_least: int, at_most: int) -> int:
    # The length first: Python refuses to read a number of thousands of digits.
    digits = value.isascii() and value.isdigit() and len(value) <= len(str(at_most))
    if not digits or not at_least <= int(value) <= at_most:
        raise UsageError(f"{excerpt(text)!r} needs a whole number from {at_least} to {at_most}", hint=HELP)
    return int(value)


def _summary(session: Session, made: Sequence[Made]) -> str:
    new = sum(not image.skipped for image in made)
    kept = len(made) - new
    parts = []
    if new:
        rate = session.generated / session.generate_s if session.generate_s > 0 else 0.0
        seconds = f"{session.load_s:.1f} s to load, {session.generate_s:.1f} s to make"
        parts.append(f"{_images(new)} made, {_seeds(made)} ({rate:.2f} images/s; {seconds})")
    if kept:
        parts.append(f"{_images(kept)} {'was' if kept == 1 else 'were'} there already")
    return ", ".join(parts)


def _how_to_go_on(plan: Plan, made: Sequence[Made]) -> str:
    there = sum(image.path is not None for image in made)
    if not there:
        return "nothing was written"
    again = f"the same command with --seed {plan.seed}" if plan.seed_drawn else "the same command"
    if not plan.config.metadata:
        return f"{there} of {_images(len(plan.images))} are in {plan.folder}"
    return f"{there} of {_images(len(plan.images))} are in {plan.folder}; {again} makes the rest"


def _seeds(made: Sequence[Made]) -> str:
    """E.g. ``seed 5``, ``seeds 5-8``; the two ends where the seeds between are not all there."""
    seeds = sorted({image.spec.seed for image in made if not image.skipped})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    dense = seeds[-1] - seeds[0] == len(seeds) - 1
    return f"seeds {seeds[0]}-{seeds[-1]}" if dense else f"seeds between {seeds[0]} and {seeds[-1]}"


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


@contextlib.contextmanager
def interrupt_reported(console: Console, session: Session) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        left = session.left_behind
        if not left:  # it came between two plans, or before the first
            left = f"{_images(session.generated)} made" if session.generated else "nothing was written"
        console.stopped(left)
        console.failure("Interrupted", left)
        raise
