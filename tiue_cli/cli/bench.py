"""``tiue bench``: measure, write the report, and compare it with another."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiue_cli.base.text import parse_size
from tiue_cli.bench.config import (
    BACKENDS,
    NO_TEACHER,
    SHAPES,
    BenchConfig,
    DeviceName,
    PrecisionName,
    parse_backends,
    parse_numbers,
    parse_peer,
)
from tiue_cli.cli.console import Console
from tiue_cli.cli.options import MACHINE, MODEL, OUTPUT, BaseOption, FormatOption
from tiue_cli.errors import TiueError, UsageError

if TYPE_CHECKING:
    from tiue_cli.base.events import BenchEvent
    from tiue_cli.bench.compare.conditions import Check, Condition
    from tiue_cli.bench.compare.reports import Comparison
    from tiue_cli.bench.config import BenchConfig
    from tiue_cli.bench.report.files import ReportFiles
    from tiue_cli.bench.report.schema import BenchReport
    from tiue_cli.bench.report.tables import Table as BenchTable


_BENCH = BenchConfig(models=())
_QUALITY = "Quality"
_COMPARISON = "Comparison with another report"
EXAMPLES = (
    "tiue bench papercut",
    "tiue bench papercut --quality --images 256 --out reports",
    "tiue bench runs/sd15/student --teacher OWNER/NAME --backend torch,compile,onnx,trt --batch 1,8",
    "tiue bench runs/sd15/student --teacher none --peer turbo=stabilityai/sd-turbo:1:0",
    "tiue bench sd15 --random-weights --batch 1 --teacher-steps 25",
    "tiue bench papercut --compare benchmarks/OLD.json --fail-if 'p50>+5%'",
    "tiue bench --compare OLD.json NEW.json",
    "tiue bench --render benchmarks/REPORT.json --out pages",
)


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="Student, teacher or export folder, or hub id; a shape with --random-weights."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|HUB_ID",
            help='The many-step model to compare with; "none" for none. Without it: the one the student knows.',
            rich_help_panel=MODEL,
        ),
    ] = _BENCH.teacher,
    teacher_steps: Annotated[
        str, typer.Option(metavar="N,…", help="Sampler steps of the teacher.", rich_help_panel=MODEL)
    ] = ",".join(map(str, _BENCH.teacher_steps)),
    guidance: Annotated[
        float | None, typer.Option(metavar="G", help="Guidance of the teacher; 1 is none.", rich_help_panel=MODEL)
    ] = _BENCH.guidance,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="K,…",
            help="Decoder timesteps of the student. Without it: every number up to its own.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="Another autoencoder, for all models.", rich_help_panel=MODEL),
    ] = _BENCH.vae,
    base: BaseOption = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME=FOLDER|HUB_ID:STEPS[:GUIDANCE]",
            help="Another diffusers pipeline under its own sampler; several times for several.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help=f"Speed alone, of the shapes {', '.join(SHAPES)}: no weights are needed.",
            rich_help_panel=MODEL,
        ),
    ] = _BENCH.random_weights,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help=f"What runs the student: {', '.join(BACKENDS)}. Without it: torch, and exports that are there.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,…", help="Images computed at once.")] = ",".join(
        map(str, _BENCH.batches)
    ),
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Pixels, square or height x width. Without it: the model's own.")
    ] = None,
    duration: Annotated[
        float, typer.Option(metavar="S", help="About how many seconds each subject is timed for at each batch.")
    ] = _BENCH.duration_s,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, .txt or .jsonl. Without it: captions of papercut.")
    ] = _BENCH.prompts,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Image number i uses seed + i.")] = _BENCH.seed,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="Measure quality only; time nothing.", rich_help_panel=_QUALITY)
    ] = not _BENCH.latency,
    quality: Annotated[
        bool, typer.Option("--quality", help="Measure the pictures as well.", rich_help_panel=_QUALITY)
    ] = _BENCH.quality,
    images: Annotated[
        int, typer.Option(metavar="N", min=2, help="Pictures of each subject.", rich_help_panel=_QUALITY)
    ] = _BENCH.images,
    repetitions: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Repetitions with other seeds, to tell how much quality scatters.",
            rich_help_panel=_QUALITY,
        ),
    ] = _BENCH.repetitions,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|STATS.npz",
            help="Real pictures, or their statistics. Papercut needs none.",
            rich_help_panel=_QUALITY,
        ),
    ] = _BENCH.reference,
    extractor: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.onnx|DIR",
            help="Network for the distances: Inception as ONNX, or a CLIP folder. Papercut has its own.",
            rich_help_panel=_QUALITY,
        ),
    ] = _BENCH.extractor,
    clip: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CLIP folder for the CLIP score.", rich_help_panel=_QUALITY)
    ] = _BENCH.clip,
    resize: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Crop and resize all pictures to N x N first.", rich_help_panel=_QUALITY),
    ] = _BENCH.resize,
    keep_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to keep the pictures in.", rich_help_panel=_QUALITY)
    ] = _BENCH.keep_images,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.json",
            help="Say what changed since; with NEW.json instead of a model, nothing is measured.",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 1 where it surely holds, e.g. 'p50>+5%', 'memory>2GiB', 'fid>+2'.",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Make a report's page and Markdown again, beside it or in --out; nothing is measured.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the report goes.", rich_help_panel=OUTPUT, show_default=str(_BENCH.out)
        ),
    ] = None,
    format_: FormatOption = "human",
    device: Annotated[DeviceName, typer.Option(help="Device to run on.", rich_help_panel=MACHINE)] = _BENCH.device,
    precision: Annotated[
        PrecisionName,
        typer.Option(
            help="Precision of all models; auto is fp32 on a CPU, fp16 on CUDA. int8 is for exports, torch beside them"
            " in fp32; of exports OpenVINO alone has bf16.",
            rich_help_panel=MACHINE,
        ),
    ] = _BENCH.precision,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="CPU threads. Without it: one for each core.", rich_help_panel=MACHINE),
    ] = _BENCH.threads,
) -> None:
    """Measure how fast and how good models are, side by side in one run, and write a report.

    Every subject gets the same prompts, seeds, size and precision, in rounds that interleave them all.
    """

    if fail_if and compare is None:
        raise UsageError("--fail-if compares with another report", hint="give it: --compare OLD.json")
    if render is not None:
        if models or compare is not None:
            raise UsageError("--render neither measures nor compares", hint="leave MODEL and --compare out")
        from tiue_cli.bench.report.files import render_report

        show_files(render_report(render, out), Console(format_))
        return
    if compare is not None and len(models or []) == 1 and (models or [""])[0].endswith(".json"):
        ok = compare_files(compare, Path((models or [""])[0]), Console(format_), fail_if=fail_if or ())
    else:
        if base is not None:
            from tiue_cli.model.hub import place_base

            place_base(models or [], base)
        config = BenchConfig(
            models=tuple(models or ()),
            teacher=teacher,
            teacher_steps=parse_numbers(teacher_steps, "--teacher-steps"),
            guidance=guidance,
            backends=None if backend is None else parse_backends(backend),
            batches=parse_numbers(batch, "--batch"),
            size=None if size is None else parse_size(size),
            steps=None if steps is None else parse_numbers(steps, "--steps"),
            precision=precision,
            device=device,
            vae=vae,
            duration_s=duration,
            random_weights=random_weights,
            peers=tuple(parse_peer(text) for text in peers or ()),
            prompts=prompts,
            seed=seed,
            threads=threads,
            out=_BENCH.out if out is None else out,
            latency=not no_latency,
            quality=quality,
            images=images,
            repetitions=repetitions,
            reference=reference,
            extractor=extractor,
            clip=clip,
            resize=resize,
            keep_images=keep_images,
            command=shlex.join(["tiue", *sys.argv[1:]]),
        )
        ok = run_bench(config, Console(format_), old=compare, fail_if=fail_if or ())
    if not ok:
        raise typer.Exit(1)


def run_bench(config: BenchConfig, console: Console, *, old: Path | None, fail_if: Sequence[str]) -> bool:
    """Measure, write the report, show the tables; with ``old``, compare with it. Returns whether no condition failed.

    What speaks against the comparison is said before anything is measured.
    """
    config.validate()
    from tiue_cli.bench.compare.conditions import check_conditions, parse_conditions
    from tiue_cli.bench.compare.reports import compare_reports
    from tiue_cli.bench.report.files import read_report, write_report
    from tiue_cli.files.atomic import check_writable

    check_writable(config.out)
    conditions = parse_conditions(fail_if)
    before = None if old is None else read_report(old)
    if before is not None:
        # What cannot be judged in the old report cannot be in any comparison with it.
        check_conditions(compare_reports(before, before), conditions)
    _check_models(config)
    from tiue_cli.bench.run import run_bench as measure

    kept: list[ReportFiles] = []
    try:
        with console.stages(live=False) as stages:
            report = measure(
                config,
                emit=lambda event: _show(event, console, stages),
                keep=lambda report: kept.append(write_report(report, config.out)),
            )
    except (KeyboardInterrupt, SystemExit, TiueError) as ended:
        if isinstance(ended, TiueError) and not kept:
            raise
        again = "; the same command goes on with the pictures that were drawn" if config.quality else ""
        console.stopped(f"{'the report holds what was measured' if kept else 'no report was written'}{again}")
        for files in kept:
            show_files(files, console)
        raise
    if report is None:  # the first of several processes has it
        return True
    # Written first: a closed pipe (| head) must not cost what took hours.
    files = write_report(report, config.out)
    show_report(console, report)
    show_files(files, console)
    if before is None:
        console.document(report.model_dump(mode="json"))
        return True
    return _compare(before, report, conditions, console)


def _check_models(config: BenchConfig) -> None:
    """Look at the models' folders before anything heavy is loaded. Raises what loading them would raise."""
    from tiue_cli.generate.target import find_export
    from tiue_cli.model.folder import check_model_folder
    from tiue_cli.model.hub import resolve_model

    if config.random_weights:
        return
    teachers = [] if config.teacher in (None, NO_TEACHER) else [config.teacher]
    for source in (*config.models, *teachers):
        if find_export(source) is None:
            check_model_folder(resolve_model(source))


def show_files(files: ReportFiles, console: Console) -> None:
    """Name the files."""
    for path in files:
        console.path(str(path))


def compare_files(old: Path, new: Path, console: Console, *, fail_if: Sequence[str]) -> bool:
    """Compare two reports that are there. Returns whether no condition failed. Raises ManifestError, UsageError."""
    from tiue_cli.bench.compare.conditions import parse_conditions
    from tiue_cli.bench.report.files import read_report

    conditions = parse_conditions(fail_if)
    return _compare(read_report(old), read_report(new), conditions, console)


def _compare(old: BenchReport, new: BenchReport, conditions: Sequence[Condition], console: Console) -> bool:
    from tiue_cli.bench.compare.conditions import check_conditions
    from tiue_cli.bench.compare.reports import compare_reports

    comparison = compare_reports(old, new)
    checks = check_conditions(comparison, conditions)
    show_comparison(console, comparison, checks)
    return not any(check.failed for check in checks)


def _show(event: BenchEvent, console: Console, stages: Callable[[str, int, int, str], None]) -> None:
    from tiue_cli.base.events import Note

    if isinstance(event, Note):
        console.note(event.text)
    else:
        stages(event.stage, event.done, event.total, event.detail)


def show_report(console: Console, report: BenchReport) -> None:
    """What ``tiue bench`` measured: latency, ratios and quality; human format only."""
    if console.format != "human":
        return
    from tiue_cli.bench.report.tables import terminal_tables
    from tiue_cli.bench.report.view import ReportView

    for warning in report.warnings:
        console.say("warning", "yellow", warning)
    for table in terminal_tables(ReportView(report)):
        _show_table(console, table)


def show_comparison(console: Console, comparison: Comparison, checks: Sequence[Check]) -> None:
    """What ``tiue bench --compare`` found, and which conditions failed."""
    from tiue_cli.base.text import plain
    from tiue_cli.bench.compare.table import comparison_table, offender_text

    console.document({**asdict(comparison), "checks": [check.as_dict() for check in checks]})
    if console.format == "human":
        for note in (*comparison.differences, *comparison.notes):
            console.note(note)
        _show_table(console, comparison_table(comparison))
    for check in checks:
        for row in check.offenders:
            console.say("failed", "bold red", plain(f"{check.condition.text}: {offender_text(row)}"))


def _show_table(console: Console, table: BenchTable) -> None:
    from rich.table import Table
    from rich.text import Text

    from tiue_cli.base.text import plain

    shown = Table(title=Text(plain(table.title), style="bold"), title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        # Figures stay whole; names are broken where the terminal is narrow.
        if column.align == "left":
            shown.add_column(plain(column.head), overflow="fold")
        else:
            width = max((len(row[index]) for row in table.rows), default=0)
            head = textwrap.fill(plain(column.head), max(width, 10), break_long_words=False)
            shown.add_column(head, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(Text(_indented(cell), style=_VERDICT_STYLES.get(cell, "")) for cell in row))
    out = console.rich()
    out.print(shown)
    for note in table.notes:
        out.print(Text(plain(note), style="dim"))
    out.print()


def _indented(text: str) -> str:
    """A cell without control characters, its leading spaces kept."""
    from tiue_cli.base.text import plain

    return " " * (len(text) - len(text.lstrip(" "))) + plain(text)


_VERDICT_STYLES = {"slower": "bold red", "worse": "bold red", "more": "red", "faster": "green", "better": "green"}
