"""What ``tiue generate`` does with a config: run it once, or again for every line that is typed; and show it."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tiue_cli.cli.console import Console
from tiue_cli.errors import TiueError, UsageError
from tiue_cli.generate.plan import GenerateConfig, Plan
from tiue_cli.generate.prompts import PromptRow, rows_from_arguments
from tiue_cli.generate.session import Made, Session, report
from tiue_cli.text import parse_size

HELP = ":seed N|random  :images N  :size N|HxW  :steps N  :help  :quit   anything else is a prompt"


def run_once(config: GenerateConfig, rows: Sequence[PromptRow], console: Console) -> None:
    """Make all images of ``rows`` and show them; on Ctrl-C say what is there and how to go on."""
    with _saying_what_is_there(console), Session(config, note=console.note) as session:
        make_and_show(session, session.plan(rows), console)


def make_and_show(session: Session, plan: Plan, console: Console, *, one_line: bool = False) -> None:
    """Run ``plan`` with a progress bar, the paths as they are ready, and a summary or a JSON document at the end."""
    if plan.seed_drawn:
        console.note(f"no --seed was given; a random one: --seed {plan.seed}")
    made: list[Made] = []
    try:
        with console.progress(len(plan.todo)) as progress:
            for image in session.run(plan, progress=progress):
                made.append(image)
                if image.path is not None:
                    console.path(str(image.path))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(plan, made)) from None
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
    with _saying_what_is_there(console), Session(config, note=console.note) as session:
        session.open()
        console.note(HELP)
        console.prompt("tiue> ")
        for line in sys.stdin if lines is None else lines:
            text = line.strip()
            if text in (":quit", ":q"):
                break
            try:
                config = _answer(text, config, session, console)
            except TiueError as error:
                all_worked = False
                console.error(error)
            console.prompt("tiue> ")
    return all_worked


def _answer(text: str, config: GenerateConfig, session: Session, console: Console) -> GenerateConfig:
    """Do what one line asks; returns the config for the next one."""
    if not text:
        return config
    if text == ":help":
        console.note(HELP)
        return config
    if text.startswith(":"):
        changed = _changed(text, config, kind=session.target.info.kind)
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
        return replace(config, seed=None if value == "random" else _whole_number(text, value, at_least=0))
    if name == "images":
        return replace(config, images=_whole_number(text, value, at_least=1))
    if name == "steps":
        number = _whole_number(text, value, at_least=1)
        return replace(config, teacher_steps=number) if kind == "teacher" else replace(config, steps=number)
    raise UsageError(f"{text!r} is not understood", hint=HELP)


def _whole_number(text: str, value: str, *, at_least: int) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < at_least:
        raise UsageError(f"{text!r} needs a whole number, at least {at_least}", hint=HELP)
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
def _saying_what_is_there(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        # Without words of its own it came before there was a plan.
        console.stopped(str(interrupt) or "nothing was written")
        raise
