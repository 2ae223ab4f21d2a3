"""The models of a bench, loaded: from the words of the command line to weights on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.bench.config import NO_TEACHER, BenchConfig
from tiue_cli.bench.subjects.exports import Say
from tiue_cli.bench.subjects.models import LoadedModel, load_model, named, random_model
from tiue_cli.errors import UsageError
from tiue_cli.files.exports import ExportManifest
from tiue_cli.generate.target import ExportInfo, find_export
from tiue_cli.model.hub import EMBEDDED_NAMES, EMBEDDED_TEACHER, resolve_model
from tiue_cli.model.identity import model_sha256


@dataclass(frozen=True)
class ModelArgument:
    """What one MODEL names: a model, an export, or an export with the student that it came from."""

    name: str
    source: str
    model: LoadedModel | None
    export: ExportInfo | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) that it was made for."""
        if self.export is not None:
            return self.export.image_size
        assert self.model is not None, "an argument is a model or an export"
        return self.model.image_size

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for images of ``size`` (H, W) pixels. Raises UsageError."""
        return self._any.latent_shape(size)

    def steps(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """The K to run it at: those asked for, else every one that it has. Raises UsageError for impossible ones."""
        for steps in asked or ():
            self._any.combine(steps)
        return asked or self._any.steps

    @property
    def _any(self) -> LoadedModel | ExportManifest:
        """The model where there is one."""
        if self.model is not None:
            return self.model
        assert self.export is not None, "an argument is a model or an export"
        return self.export.manifest


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
        if asked is None:
            found = [self._own_teacher(argument) for argument in arguments]
            return list({id(model.components): model for model in found if model is not None}.values())
        model = self._load(named(asked, [argument.name for argument in arguments]), asked)
        if model.is_student:
            raise UsageError(f"--teacher {asked} is a student", hint="give the many-step model that it came from")
        return [model]

    def _argument(self, name: str, source: str) -> ModelArgument:
        if self._config.random_weights:
            return ModelArgument(name, source, self._random(source))
        export = find_export(source)
        if export is not None:
            return ModelArgument(name, source, self._student_of(export, name, source), export)
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

    def _student_of(self, export: ExportInfo, name: str, source: str) -> LoadedModel | None:
        """The student that an export came from, where that is at hand to be compared with."""
        if self._config.vae is not None:
            raise UsageError(f"the autoencoder is part of an export ({source})", hint="leave --vae out")
        origin = export.manifest.student
        if origin.vae_source is None and (origin.source in EMBEDDED_NAMES or Path(origin.source).is_dir()):
            folder = resolve_model(origin.source)
            if model_sha256(folder) == origin.sha256:
                return self._load(name, origin.source)
        self.warnings.append(
            f"{source}: the student it was exported from ({origin.source}) was not found, so its pictures are not"
            " compared with a reference in this run"
        )
        return None

    def _load(self, name: str, source: str) -> LoadedModel:
        folder = str(resolve_model(source).resolve())
        if folder not in self._loaded:
            self._say(f"loading {source}")
            self._loaded[folder] = load_model(
                name, source, device=self._device, precision=self._precision, vae=self._config.vae
            )
        return self._loaded[folder]

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
