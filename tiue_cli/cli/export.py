"""``tiue export``: a student to ONNX graphs and, with ``--trt``, TensorRT engines."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiue_cli.base.text import parse_size
from tiue_cli.cli.console import Console
from tiue_cli.cli.options import MODEL, OUTPUT, BaseOption, FormatOption, LoraOption
from tiue_cli.cli.triton import TRITON, check_triton_options, export_of, run_triton
from tiue_cli.errors import ModelFolderError, OutputError, TiueError, UsageError
from tiue_cli.export import run
from tiue_cli.export.config import OPSETS, EngineConfig, EngineRequest, ExportConfig, parse_part
from tiue_cli.export.triton.pbtxt import TritonBackend
from tiue_cli.export.trt.profiles import parse_range
from tiue_cli.files.access import user_path
from tiue_cli.files.exports import Precision, is_export_folder
from tiue_cli.model.hub import place_base

if TYPE_CHECKING:
    from tiue_cli.export.onnx.export import ExportResult
    from tiue_cli.export.trt.engine import EngineResult
    from tiue_cli.files.exports import ExportParity, QuantizationSpec

_EXPORT = ExportConfig(student="")
_TENSORRT = "TensorRT"

EXAMPLES = (
    "tiue export papercut",
    "tiue export runs/sd15/student --precision fp16 --size 512 --vae madebyollin/taesd",
    "tiue export runs/sd15/student --lora pixel-art.safetensors:0.8 --out engines/pixel-art",
    "tiue export runs/sd15/student --precision int8 --calibration captions.txt",
    "tiue export runs/sd15/student --precision fp8 --calibration captions.txt --size 512 --trt",
    "tiue export runs/sd15/student --trt --profile sd15-512",
    "tiue export engines/student --trt --refit",
    "tiue export engines/student --trt --batch 1 --batch 1:4:16",
    "tiue export engines/student --triton models --steps 4 --steps 2",
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
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS",
            help="int8, fp8: prompts like those to be drawn (.txt, .jsonl, .csv, .parquet); papercut needs none.",
        ),
    ] = _EXPORT.calibration,
    calibration_images: Annotated[
        int, typer.Option(metavar="N", min=1, help="int8, fp8: pictures that ranges are measured on.")
    ] = _EXPORT.calibration_images,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            metavar="text|unet|vae",
            help="int8, fp8: what is quantised; give several. Without it: unet and vae, in fp8 unet.",
        ),
    ] = None,
    opset: Annotated[
        int,
        typer.Option(
            metavar="N", min=OPSETS[0], max=OPSETS[-1], help="ONNX operator set; 23 has attention as one operator."
        ),
    ] = _EXPORT.opset,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|HxW",
            help="Fix the graphs to this size in pixels; give several for graphs of each. Without it: any size.",
        ),
    ] = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="Build TensorRT plans for the GPU of this machine.", rich_help_panel=_TENSORRT)
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.toml",
            help="Shapes to build for: sd15-512, sd21-512, papercut, or a TOML file.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|MIN:OPT:MAX",
            help="Images at once, a number or MIN:OPT:MAX; give several for a profile each. Without it: 1 and 1:4:16.",
            rich_help_panel=_TENSORRT,
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="An engine that takes LoRAs: tiue generate --backend trt --lora.", rich_help_panel=_TENSORRT
        ),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            "--triton",
            metavar="FOLDER",
            help="Write a model repository for Triton Inference Server.",
            rich_help_panel=TRITON,
        ),
    ] = None,
    triton_backend: Annotated[
        TritonBackend,
        typer.Option(
            help="What runs the graphs there: ONNX Runtime, its TensorRT provider, or Python on a CPU.",
            rich_help_panel=TRITON,
        ),
    ] = "onnx",
    steps: Annotated[
        list[int] | None,
        typer.Option(metavar="K", min=1, help="An ensemble for this K; several make several.", rich_help_panel=TRITON),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|HUB_ID", help="Another autoencoder, e.g. a tiny one.", rich_help_panel=MODEL),
    ] = _EXPORT.vae,
    lora: LoraOption = None,
    base: BaseOption = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not compare the graphs with torch.")
    ] = not _EXPORT.check,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export or engine that is there.", rich_help_panel=OUTPUT)
    ] = _EXPORT.overwrite,
    format_: FormatOption = "human",
) -> None:
    """Turn a student into ONNX graphs that run without torch, and show that they compute the same."""

    config = ExportConfig(
        student=student,
        out=out,
        precision=precision or _EXPORT.precision,
        calibration=calibration,
        calibration_images=calibration_images,
        quantized=tuple(parse_part(word) for word in dict.fromkeys(quantize or ())),
        opset=opset,
        sizes=tuple(parse_size(text) for text in size or ()),
        vae=vae,
        loras=tuple(lora or ()),
        check=not no_check,
        overwrite=overwrite,
    )
    check_triton_options(triton, triton_backend, steps, trt=trt)
    if base is not None:
        place_base([student], base)
    if trt:
        batches = tuple(parse_range(text) for text in batch or ())
        request = EngineRequest(profile=profile, batches=batches, refit=refit)
        run_engine(config, request, Console(format_), precision=precision)
        return
    if profile is not None or batch or refit:
        option = "--profile" if profile is not None else "--batch" if batch else "--refit"
        raise UsageError(f"{option} is for TensorRT engines", hint="add --trt to build them")
    console = Console(format_)
    if triton is None:
        run_export(config, console)
        return
    source = user_path(config.student, error=ModelFolderError)
    folder = export_of(source)
    if folder is None:
        run_export(config, console)
        folder = config.folder
    elif config != ExportConfig(student=student, sizes=config.sizes, overwrite=overwrite):
        _refuse_export_options(config, precision=precision)
    run_triton(folder, triton, console, backend=triton_backend, steps=steps, sizes=config.sizes, overwrite=overwrite)


def run_export(config: ExportConfig, console: Console) -> None:
    """Export with a line a step, the parity table, the path of the folder, and the next command."""
    with interrupt_reported(console):
        show_export(console, _export(config, console))


def run_engine(
    config: ExportConfig, request: EngineRequest, console: Console, *, precision: Precision | None = None
) -> None:
    """Export, unless ``config.student`` is an export already, and build the TensorRT engine of it.

    ``precision`` is what the user says, None where it is left to what engines are best in. What rules out
    TensorRT is reported before the export, which takes minutes. Raises what both raise.
    """
    from tiue_cli.backends.trt_device import require_tensorrt

    source = user_path(config.student, error=ModelFolderError)
    fitted = request.fit(config, precision=precision)
    exported = None
    if is_export_folder(source):
        _refuse_export_options(config, precision=precision)
        require_tensorrt()
        folder = source
    else:
        config = fitted
        config.validate()
        if is_export_folder(config.folder) and not config.overwrite:
            raise OutputError(
                f"{config.folder} is an export already; nothing was written",
                hint=f"build its engine: tiue export {config.folder} --trt; or make both anew: --overwrite",
            )
        require_tensorrt()
        with interrupt_reported(console):
            exported = _export(config, console)
        show_export(console, exported, last=False)
        folder = exported.folder
    wanted = EngineConfig(
        export=folder,
        profile=request.profile,
        batches=request.batches,
        check=config.check,
        rebuild=config.overwrite,
        refit=request.refit,
    )
    try:
        with interrupt_reported(console), console.stages() as show:
            built = run.run_engine(wanted, stage=lambda what, share, text: show(what, round(100 * share), 100, text))
    except (TiueError, KeyboardInterrupt):
        if exported is not None:
            console.note(f"the export itself is complete; to build its engine: tiue export {folder} --trt")
        raise
    show_engine(console, built, export=exported)


def _export(config: ExportConfig, console: Console) -> ExportResult:
    with console.steps() as begin:
        return run.run_export(config, stage=begin)


@contextlib.contextmanager
def interrupt_reported(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.stopped("nothing was written")
        raise


def _refuse_export_options(config: ExportConfig, *, precision: Precision | None) -> None:
    """An export stays what it is. Raises UsageError naming the option that asks for another."""
    given = {
        "--out": config.out,
        "--precision": precision,
        "--size": config.sizes or None,
        "--vae": config.vae,
        "--lora": config.loras or None,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{config.student} is an export already, and {option} is for making one",
                hint=f"leave it out, or export the student again: tiue inspect {config.student} says which it was",
            )


def show_export(console: Console, result: ExportResult, *, last: bool = True) -> None:
    """What ``tiue export`` wrote: the parity table, the folder, and what to do next unless more is to come."""
    if last:
        console.document(result.as_dict())
    if console.format == "human":
        _show_parity(console, result.manifest.parity, result.manifest.quantization)
        for note in result.notes:
            console.note(note)
    console.path(str(result.folder))
    if console.format == "human" and last:
        console.line(f'next: tiue generate --model {shlex.quote(str(result.folder))} "a prompt"')


def show_engine(console: Console, result: EngineResult, *, export: ExportResult | None = None) -> None:
    """What ``tiue export --trt`` built: plans, figures, the folder, and what to do next."""
    console.document({**({} if export is None else export.as_dict()), "engine": result.as_dict()})
    if console.format == "human":
        _show_plans(console, result)
        for note in result.notes:
            console.note(note)
    console.path(str(result.folder))
    if console.format == "human":
        console.line(f'next: tiue generate --model {shlex.quote(str(result.folder))} "a prompt"')


def _show_plans(console: Console, result: EngineResult) -> None:
    from rich.table import Table

    if result.reused:
        console.note("an engine that fits exists already; --overwrite builds it again")
    parity = result.manifest.parity
    errors: dict[str, float] = {}
    for row in () if parity is None else parity.outputs:
        errors[row.graph] = max(errors.get(row.graph, 0.0), row.relative_error)
    table = Table("plan", "layers", "size", "working memory", "built in", "relative error", box=None, pad_edge=False)
    for plan in result.manifest.plans:
        table.add_row(
            plan.plan.file.removesuffix(".plan"),
            "" if plan.layers is None else str(plan.layers),
            f"{plan.plan.size_bytes / 1024**2:.1f} MiB",
            "" if plan.device_memory_bytes is None else f"{plan.device_memory_bytes / 1024**2:.1f} MiB",
            f"{plan.build_s:.1f} s",
            f"{errors[plan.graph]:.1e}" if plan.graph in errors else "",
        )
    console.rich().print(table)
    if parity is None:
        console.note("nothing was compared (--no-check)")
        return
    console.line(
        f"images: {parity.image_psnr_db:.1f} dB against ONNX Runtime ({parity.reference}),"
        f" {parity.required_psnr_db:.0f} needed",
    )


def _show_quantization(console: Console, made: QuantizationSpec | None) -> None:
    if made is None:
        return
    sensitive = [f"{layer.graph} {layer.layer}" for layer in made.kept if layer.reason == "sensitive"]
    console.line(
        f"8 bits: {made.layers - len(made.kept)} of {made.layers} layers, {len(made.kept)} stay in floats"
        f" ({len(sensitive)} of them found sensitive); images {made.image_psnr_db:.1f} dB from those before"
    )
    if made.papercut is not None:
        shares = ", ".join(
            f"{share.name} {share.quantized:.3f} ({share.full:.3f})"
            for share in made.papercut.attributes
            if "_" not in share.name
        )
        console.line(
            f"checker over {made.papercut.captions} captions, in brackets before: {shares};"
            f" Fréchet distance {made.papercut.frechet_distance:.2f} ({made.papercut.frechet_distance_full:.2f})"
        )


def _show_parity(console: Console, parity: ExportParity | None, quantization: QuantizationSpec | None) -> None:
    from rich.table import Table

    if parity is None:
        console.note("nothing was compared (--no-check)")
        return
    table = Table("graph", "output", "max error", "relative error", box=None, pad_edge=False)
    for row in parity.rows():
        table.add_row(row.graph, row.output, f"{row.max_error:.2g}", f"{row.relative_error:.1e}")
    console.rich().print(table)
    console.line(
        f"images: {parity.image_psnr_db:.1f} dB against torch in fp32, {parity.required_psnr_db:.0f} needed"
        f" ({len(parity.prompts)} prompts)",
    )
    _show_quantization(console, quantization)
    for found in parity.runtimes:
        console.line(
            f"OpenVINO in {found.precision}: {found.image_psnr_db:.1f} dB, {found.required_psnr_db:.0f} needed"
            + ("" if found.holds else "; it has to be asked for"),
        )
