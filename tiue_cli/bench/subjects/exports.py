"""The export and the engine of a student: found where ``tiue export`` puts them, or made for the run.

What is made for a run lies in a temporary folder and goes with it: a bench leaves nothing but its report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.bench.subjects.models import LoadedModel
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError, TiueError, UsageError
from tiue_cli.export.config import EngineConfig, ExportConfig
from tiue_cli.files.exports import ExportManifest, Size, is_export_folder, read_export_manifest

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReadyExport:
    """An export folder that is this student's, in this precision, for this size."""

    folder: Path
    manifest: ExportManifest
    build_s: float | None = None
    """Seconds it took where it was made for this run."""
    engine: Path | None = None
    """Engine folder, where one was named or built."""


def find_export_of(model: LoadedModel, *, precision: str, size: Size, vae: str | None) -> ReadyExport | str:
    """The student's export in its usual place (``engines/NAME``), or why there is none that fits, in words."""
    if model.sha256 is None or not model.is_student:
        return "random and untrained weights have no export" if model.is_student else "it is no trained student"
    folder = ExportConfig(student=model.source).folder
    if not is_export_folder(folder):
        return f"there is no export in {folder} (tiue export {model.source})"
    try:
        manifest = read_export_manifest(folder)
        manifest.latent_shape(size)
    except (ManifestError, UsageError) as error:
        return error.message
    if manifest.student.sha256 != model.sha256:
        return f"{folder} is the export of another student than {model.source}"
    if manifest.student.vae_source != vae:
        return f"{folder} was exported with another autoencoder"
    if manifest.precision != precision:
        return f"{folder} was exported in {manifest.precision}"
    return ReadyExport(folder, manifest)


def export_now(model: LoadedModel, folder: Path, *, precision: Any, size: Size, say: Say) -> ReadyExport:
    """Export the student into ``folder``, at one fixed size. Raises what ``export_student`` raises, and UsageError."""
    if precision not in ("fp32", "fp16"):
        raise UsageError(f"exports have no {precision}", hint="choose --precision fp32 or fp16, or --backend torch")
    from tiue_cli.export.onnx.export import export_student
    from tiue_cli.model.student import save_student

    started = time.perf_counter()
    # Saved as it is loaded: random weights, another autoencoder and a teacher's untrained student have no folder.
    student = save_student(model.student, folder / "student")
    config = ExportConfig(student=str(student), out=folder / "export", precision=precision, sizes=(size,), check=False)
    result = export_student(
        config, stage=lambda what, number, total: say(f"exporting {model.name}: {what} ({number} of {total})")
    )
    return ReadyExport(result.folder, result.manifest, build_s=time.perf_counter() - started)


def engine_now(export: ReadyExport, *, batches: Sequence[int], say: Say) -> tuple[Path, float]:
    """(engine folder, seconds) of a new engine with a profile for each batch. Raises what ``build_engine`` raises."""
    from tiue_cli.export.trt.engine import build_engine

    started = time.perf_counter()
    config = EngineConfig(export=export.folder, batches=tuple((batch, batch, batch) for batch in batches), check=False)
    result = build_engine(config, stage=lambda what, share, text: say(f"{what}: {share:.0%} {text}"))
    return result.folder, time.perf_counter() - started


def engine_obstacle(folder: Path, engine: Path | None, *, size: Size, batches: Sequence[int]) -> TiueError | None:
    """Why TensorRT cannot run this export here, at these batches; None where a fitting engine lies ready."""
    from tiue_cli.backends.trt_backend import TrtBackend

    try:
        largest = TrtBackend(folder, engine=engine).largest_batch(size)
    except (DeviceError, ManifestError, MissingDependencyError) as error:
        return error
    if largest is None or largest < max(batches):
        return DeviceError(
            f"the engine in {folder} takes {'no pictures of this size' if largest is None else f'{largest} images'}",
            hint=f"build it for more: tiue export {folder} --trt --batch {max(batches)}",
        )
    return None
