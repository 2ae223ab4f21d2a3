"""The models of a bench, loaded: from the words of the command line to weights on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.bench.config import NO_TEACHER, BenchConfig
from tiue_cli.bench.subjects.models import LoadedModel, load_model, named, random_model
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError, TiueError, UsageError
from tiue_cli.export.config import EngineConfig, ExportConfig
from tiue_cli.files.exports import ExportManifest, Size, is_export_folder, read_export_manifest
from tiue_cli.generate.target import ExportInfo, find_export
from tiue_cli.model.hub import EMBEDDED_NAMES, EMBEDDED_TEACHER, resolve_model
from tiue_cli.model.identity import model_sha256

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelArgument:
    """What one MODEL names. ``model`` None: an export whose student was not found; ``export``: MODEL is an export."""

    name: str
    source: str
    model: LoadedModel | None
    export: ReadyExport | None = None

    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) that it was made for."""
        if self.export is not None:
            return self.export.manifest.default_size
        assert self.model is not None, "an argument is a model or an export"
        return self.model.image_size()


class Loader:
    """Loads each folder once. ``warnings`` are for the reader of the report, ``notes`` for who runs the bench."""

    def __init__(self, config: BenchConfig, *, device: str, precision: Any, say: Say) -> None:
        self._config = config
        self._device = device
        self._precision = precision
        self._say = say
        self._loaded: dict[str, LoadedModel] = {}
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def arguments(self) -> list[ModelArgument]:
        """Every MODEL. Raises what loading raises."""
        names: list[str] = []
        for source in self._config.models:
            names.append(named(source, names))
        return [self._argument(name, source) for name, source in zip(names, self._config.models, strict=True)]

    def teachers(self, arguments: Sequence[ModelArgument]) -> list[LoadedModel]:
        """The many-step models to compare with, each once: the one that was named, else what each student knows."""
        asked = self._config.teacher
        if asked == NO_TEACHER:
            return []
        if asked is not None:
            name = named(asked, [argument.name for argument in arguments])
            return [self._many_steps(self._load(name, asked), asked)]
        found = [self._own_teacher(argument) for argument in arguments]
        return list({id(model.components): model for model in found if model is not None}.values())

    def _argument(self, name: str, source: str) -> ModelArgument:
        if self._config.random_weights:
            return ModelArgument(name, source, self._random(source))
        export = find_export(source)
        if export is not None:
            return self._exported(name, source, export)
        model = self._load(name, source)
        if not model.is_student:
            self.warnings.append(
                f"{source} is a many-step model: its untrained student is measured for speed, and the pictures of that"
                " student mean nothing"
            )
        return ModelArgument(name, source, model)

    def _random(self, shape: str) -> LoadedModel:
        self._say(f"building {shape} with random weights")
        self.warnings.append(f"{shape}: random weights in the model's full size; speed alone means anything")
        return random_model(
            shape, device=self._device, precision=self._precision, seed=self._config.seed, vae=self._config.vae
        )

    def _exported(self, name: str, source: str, export: ExportInfo) -> ModelArgument:
        """An export, with the student that it came from where that is at hand to be compared with."""
        if self._config.vae is not None:
            raise UsageError(f"the autoencoder is part of an export ({source})", hint="leave --vae out")
        ready = ReadyExport(export.path, export.manifest, engine=export.engine)
        origin = export.manifest.student
        if origin.vae_source is None and (origin.source in EMBEDDED_NAMES or Path(origin.source).is_dir()):
            folder = resolve_model(origin.source)
            if model_sha256(folder) == origin.sha256:
                return ModelArgument(name, source, self._load(name, origin.source), ready)
        self.warnings.append(
            f"{source}: the student it was exported from ({origin.source}) was not found, so its pictures are not"
            " compared with a reference in this run"
        )
        return ModelArgument(name, source, None, ready)

    def _load(self, name: str, source: str) -> LoadedModel:
        place = str(resolve_model(source).resolve())
        if place not in self._loaded:
            self._say(f"loading {source}")
            self._loaded[place] = load_model(
                name, source, device=self._device, precision=self._precision, vae=self._config.vae
            )
        return self._loaded[place]

    def _own_teacher(self, argument: ModelArgument) -> LoadedModel | None:
        model = argument.model
        if model is not None and (model.random_weights or not model.is_student):
            return model
        manifest = None if model is None else model.components.info.manifest
        known = None if manifest is None else manifest.teacher
        if argument.export is not None:
            known = argument.export.manifest.student.teacher
        if known in EMBEDDED_NAMES or argument.source in EMBEDDED_NAMES:
            return self._load(EMBEDDED_TEACHER, EMBEDDED_TEACHER)
        named_by = "" if known in (None, "unknown") else f" (it names {known})"
        self.notes.append(f"{argument.source} is compared with no teacher{named_by}: give one with --teacher FOLDER")
        return None

    def _many_steps(self, model: LoadedModel, source: str) -> LoadedModel:
        if model.is_student:
            raise UsageError(f"--teacher {source} is a student", hint="give the many-step model that it came from")
        return model


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
        return "random weights have no export" if model.is_student else f"{model.source} is not a trained student"
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
        raise UsageError(
            f"there are no exports in {precision}", hint="choose --precision fp32 or fp16, or --backend torch"
        )
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
