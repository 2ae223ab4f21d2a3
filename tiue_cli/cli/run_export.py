"""What ``tiue export`` does with a config: write the folder, show that it is equal, and build its engine if asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_cli.cli.console import Console
from tiue_cli.errors import OutputError, TiueError, UsageError
from tiue_cli.files.exports import is_export_folder

if TYPE_CHECKING:
    from tiue_cli.export.config import EngineRequest, ExportConfig
    from tiue_cli.export.onnx.export import ExportResult
    from tiue_cli.files.exports import Precision


def run_export(config: ExportConfig, console: Console) -> None:
    """Export with a line a step, the parity table, the path of the folder, and the next command."""
    with _saying_what_is_there(console):
        console.export(_export(config, console))


def run_engine(
    config: ExportConfig, request: EngineRequest, console: Console, *, precision: Precision | None = None
) -> None:
    """Export, unless ``config.student`` is an export already, and build the TensorRT engine of it.

    ``precision`` is what the user says, None where it is left to what engines are best in. What speaks against
    TensorRT is said before the minutes of the export. Raises what both raise.
    """
    from tiue_cli.backends.trt_device import require_tensorrt
    from tiue_cli.export.config import EngineConfig

    source = Path(config.student).expanduser()
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
        with _saying_what_is_there(console):
            exported = _export(config, console)
        console.export(exported, last=False)
        folder = exported.folder
    from tiue_cli.export.trt.engine import build_engine

    wanted = EngineConfig(
        export=folder,
        profile=request.profile,
        batches=request.batches,
        check=config.check,
        rebuild=config.overwrite,
    )
    try:
        with _saying_what_is_there(console), console.stages() as show:
            built = build_engine(wanted, stage=lambda what, share, text: show(what, round(100 * share), 100, text))
    except (TiueError, KeyboardInterrupt):
        if exported is not None:
            console.note(f"the export itself is complete; from it an engine is built by: tiue export {folder} --trt")
        raise
    console.engine(built, export=exported)


def _export(config: ExportConfig, console: Console) -> ExportResult:
    config.validate()
    from tiue_cli.export.onnx.export import export_student

    with console.steps() as begin:
        return export_student(config, stage=begin)


@contextlib.contextmanager
def _saying_what_is_there(console: Console) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.stopped("nothing was written")
        raise


def _refuse_export_options(config: ExportConfig, *, precision: Precision | None) -> None:
    """An export stays what it is. Raises UsageError naming the option that asks for another."""
    given = {"--out": config.out, "--precision": precision, "--size": config.sizes or None, "--vae": config.vae}
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{config.student} is an export already, and {option} is for making one",
                hint=f"leave it out, or export the student again: tiue inspect {config.student} says which it was",
            )
