"""``tiue distill``: train, plan only, or hand over to ``accelerate launch``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tiue_cli.base.text import bytes_text, number
from tiue_cli.cli.console import Console
from tiue_cli.cli.options import MACHINE, MODEL, FormatOption
from tiue_cli.errors import UsageError
from tiue_cli.files.atomic import free_bytes

if TYPE_CHECKING:
    from tiue_cli.base.events import Finished
    from tiue_cli.distill.config import DistillConfig
    from tiue_cli.distill.resolve import DistillRequest, ResolvedConfig


EXAMPLES = (
    "tiue distill --config papercut --out runs/papercut",
    "tiue distill --config sd15 --prompts captions.parquet --out runs/sd15 --launch -- --num_processes 8",
    "tiue distill --out runs/sd15 --resume",
    "tiue distill --quantize int8 --teacher runs/sd15 --prompts captions.parquet --out runs/sd15-int8",
)


def distill(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the run; the student is in its student/.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="FOLDER|HUB_ID", help="The many-step model.", rich_help_panel=MODEL)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help=".txt, .jsonl, .csv, .parquet, datasets:NAME, or papercut.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE|RECIPE", help="YAML settings; recipes: tiue recipes ls.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. kl.weight=0.05.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimiser steps in all.")] = None,
    warm_start: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="How many of them are the warm start: regression onto the teacher."),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Train a student, given as --teacher, on in 8-bit arithmetic, for its 8-bit export."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and what it needs; write nothing.")
    ] = False,
    launch: Annotated[
        bool,
        typer.Option("--launch", help="Run through accelerate launch; its options follow --.", rich_help_panel=MACHINE),
    ] = False,
    accelerate_args: Annotated[list[str] | None, typer.Argument(metavar="[-- ACCELERATE_ARGS]", hidden=True)] = None,
    format_: FormatOption = "human",
) -> None:
    """Distil a teacher into a one-pass student, from prompts alone."""
    from tiue_cli.distill.resolve import DistillRequest

    request = DistillRequest(
        out=out,
        teacher=teacher,
        prompts=prompts,
        config=config,
        overrides=tuple(overrides or ()),
        max_steps=max_steps,
        warm_start=warm_start,
        quantize=quantize,
        resume=resume,
    )
    if accelerate_args and not launch:
        raise UsageError(
            f"unexpected argument {accelerate_args[0]!r}", hint="words after -- are for accelerate: add --launch"
        )
    shown = Console("quiet" if is_worker() else format_)
    if dry_run:
        plan_distill(request, shown)
    elif launch:
        raise typer.Exit(relaunch(request, accelerate_args or [], shown, format_=format_))
    else:
        run_distill(request, shown)


def run_distill(request: DistillRequest, console: Console) -> None:
    """Train, with notes, progress and the paths of what was written; an interrupted run says how to continue.

    Raises typer.Exit with 130 or 143 for an interrupted one, so that ``tiue distill … && tiue export …`` stops.
    """
    from tiue_cli.base.events import Finished, Note, Progress, Saved
    from tiue_cli.distill.data.prompts import check_prompt_source
    from tiue_cli.distill.run_folder import check_places

    resolved = request.resolve()
    for line in _settings_notes(resolved):
        console.note(line)
    check_places(request.out, resolved.config, resume=request.resume)
    check_prompt_source(resolved.config.prompts)
    from tiue_cli.distill.start import open_run

    figures: Mapping[str, float] = {}
    with console.stages() as stages:
        run = open_run(resolved.config, request.out, resume=request.resume, acknowledge=_acknowledge)
        for event in run.events():
            if isinstance(event, Note):
                console.note(event.text)
            elif isinstance(event, Progress):
                figures = event.figures or figures
                stages(event.stage, event.done, event.total, _shown(event.figures))
            elif isinstance(event, Saved):
                console.path(str(event.path))
            else:
                assert isinstance(event, Finished)
                finished = event
    _report(finished, figures, console)
    # The first process alone: a launcher would end the others' work for the status of one of them.
    if finished.interrupted and finished.signal is not None and not is_worker():
        raise typer.Exit(128 + finished.signal)


def _acknowledge() -> None:
    """Said from within a signal handler, where Python's own streams may be in the middle of a write."""
    if not is_worker():
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: after this step, and saved (Ctrl-C again: at once)\n")


def _settings_notes(resolved: ResolvedConfig) -> Iterator[str]:
    """Which settings are no defaults and where they come from; a recipe's are counted, for it can be shown."""
    from_recipes: dict[str, int] = {}
    for key, origin in resolved.origins.items():
        if origin.startswith("recipe "):
            from_recipes[origin] = from_recipes.get(origin, 0) + 1
        elif origin not in ("the run", "--teacher", "--prompts") and key != "quantize.precision":
            yield f"{key} = {_value(resolved.config, key)} (from {origin})"
    for recipe, count in from_recipes.items():
        yield f"{count} settings from the {recipe}; to see them: tiue recipes show {recipe.removeprefix('recipe ')}"


def plan_distill(request: DistillRequest, console: Console) -> None:
    """Show the resolved config and what the run would need and write; nothing is written."""
    from tiue_cli.distill.config import to_yaml
    from tiue_cli.distill.data.prompts import read_training_prompts
    from tiue_cli.distill.run_folder import check_places

    resolved = request.resolve()
    config = resolved.config
    check_places(request.out, config, resume=request.resume)
    prompts = read_training_prompts(config.prompts, column=config.prompt_column, limit=config.max_prompts)
    # What cannot be is said before this loads torch.
    from tiue_cli.distill.acceleration import HALF, effective_precision
    from tiue_cli.distill.estimate import estimate_run

    needs = estimate_run(config, prompts=len(prompts.prompts), half=effective_precision(config) in HALF)
    origins: dict[str, list[str]] = {}
    for key, origin in resolved.origins.items():
        origins.setdefault(origin, []).append(key)
    console.document(
        {
            "config": config.model_dump(mode="json"),
            "origins": dict(resolved.origins),
            "prompts": len(prompts.prompts),
            "decoder_timesteps": list(needs.timesteps),
            "parameters": needs.parameters,
            "memory_bytes": needs.memory_bytes,
            "disk_bytes": needs.disk_bytes,
            "steps": needs.steps,
            "out": str(request.out),
        }
    )
    show_plan(
        console,
        to_yaml(config),
        {
            "prompts": prompts.describe(),
            "decoder timesteps": str(list(needs.timesteps)),
            **{f"{name}, steps": f"{count:,}" for name, count in needs.steps.items() if count},
            **{f"{name}, parameters": f"{count:,}" for name, count in needs.parameters.items()},
            **{f"memory: {name}": bytes_text(size) for name, size in needs.memory_bytes.items()},
            "memory: together": f"{bytes_text(needs.peak_memory_bytes)} a process, and what the allocator adds",
            **{f"disk: {name}": bytes_text(size) for name, size in needs.disk_bytes.items() if size},
            **_time_row(config, needs.parameters["student's UNet"]),
            **{f"from {origin}": ", ".join(keys) for origin, keys in origins.items()},
            "would write": f"{request.out}/ (run.json, config.yaml, log.jsonl, grids/, checkpoints/, student/)",
            "cache": str(config.cache_folder),
        },
    )
    if config.optimizer.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        console.note('optimizer.name=adamw8bit needs bitsandbytes: python -m pip install "tiue[adam8bit]"')
    for note in _lack_of_room(needs.disk_bytes, caches=config.cache_folder, out=request.out):
        console.note(note)


def _time_row(config: DistillConfig, unet_parameters: int) -> dict[str, str]:
    """About how long the steps take, where something like it was measured; empty elsewhere."""
    distils = config.quantize.precision is None
    if not distils or not 0.8e9 < unet_parameters < 0.9e9 or config.size not in (None, (512, 512)):
        return {}
    image_s = 0.667 / 4 if config.gradient_checkpointing else 0.735 / 8
    hours = config.max_steps * config.accumulation * config.batch_size * image_s / 3600
    recomputing, plain = "0.667 s a step of 4 with recomputing, 20.4 GiB", "0.735 s a step of 8, 43 GiB"
    measured = f"measured for Stable Diffusion 1.5 in bf16: {recomputing if config.gradient_checkpointing else plain}"
    return {"time": f"about {number(hours, 2)} hours on an H100 ({measured})"}


def _lack_of_room(needed: Mapping[str, int], *, caches: Path, out: Path) -> Iterator[str]:
    """What does not fit on the disks, one sentence each; caches of earlier runs may make it less."""
    for what, folder in (("cached", caches), ("", out)):
        size = sum(size for name, size in needed.items() if name.startswith("cached") == bool(what))
        free = free_bytes(folder)
        if free is not None and size > free:
            names = "the caches" if what else "checkpoints and student"
            yield f"{names} need {bytes_text(size)} in {folder}, and {bytes_text(free)} are free there"


def relaunch(request: DistillRequest, accelerate_args: Sequence[str], console: Console, *, format_: str) -> int:
    """Run the same request under ``accelerate launch``; returns its exit status."""
    from tiue_cli.cli.launch import ACCELERATE_ARGS, command_line, launch, launcher_arguments
    from tiue_cli.distill.run_folder import check_places

    # What is wrong with the request is said once, here.
    check_places(request.out, request.resolve().config, resume=request.resume)
    words, environment = launcher_arguments(accelerate_args)
    arguments = [*request.arguments(), "--format", format_]
    console.note(f"running: {command_line(words, environment, arguments)}")
    return launch(words, {**environment, ACCELERATE_ARGS: shlex.join(accelerate_args)}, arguments)


def is_worker() -> bool:
    """Whether another process of the same launch does the talking."""
    return os.environ.get("RANK", "0") != "0"


def resume_command(out: str) -> str:
    """What to type to continue, with as many processes."""
    from tiue_cli.cli.launch import ACCELERATE_ARGS

    words = f"distill --out {shlex.quote(out)} --resume"
    if ACCELERATE_ARGS in os.environ:
        return f"tiue {words} --launch -- {os.environ[ACCELERATE_ARGS]}"
    processes = os.environ.get("WORLD_SIZE", "1")
    return f"tiue {words}" if processes == "1" else f"accelerate launch --num_processes {processes} -m tiue_cli {words}"


def _report(finished: Finished, figures: Mapping[str, float], console: Console) -> None:
    out = str(finished.out)
    console.document(
        {
            "out": out,
            "student": None if finished.student is None else str(finished.student),
            "step": finished.step,
            "interrupted": finished.interrupted,
            "resume": resume_command(out) if finished.interrupted else None,
            "figures": dict(figures),
        }
    )
    if finished.interrupted and not is_worker():
        console.stopped(f"at step {finished.step}, saved; to continue: {resume_command(out)}")
    elif finished.student is not None:
        console.summary(f'to use it: tiue generate "a prompt" --model {shlex.quote(str(finished.student))}')


def _shown(figures: Mapping[str, float]) -> str:
    """The figures that are worth watching, short."""
    losses = {name: value for name, value in figures.items() if name not in _QUIET}
    words = [f"{name} {value:.4g}" for name, value in losses.items()]
    if "images_per_s" in figures:
        words.append(f"{figures['images_per_s']:.3g} images/s")
    if "memory_bytes" in figures:
        words.append(f"{figures['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join(words)


_QUIET = ("images_per_s", "seconds_per_step", "learning_rate", "memory_bytes")


def _value(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def show_plan(console: Console, config: str, rows: Mapping[str, str]) -> None:
    """What ``tiue distill --dry-run`` found: the config, and facts about it."""
    if console.format == "json":
        return
    console.text(config)
    if console.format == "human":
        console.table("", list(rows.items()))
