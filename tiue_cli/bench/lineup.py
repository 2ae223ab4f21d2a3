"""Who takes part: from what was asked for to the subjects of a bench, with their models loaded.

for each MODEL   its teacher with guidance at each number of steps
                 one plain UNet pass, and the same with merged upsamplers
                 the student: sharing decoder at each K, the authors' K-fold batch, merged upsamplers, other backends
for each --peer  the pipeline under its own sampler
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from tiue_cli.backends.torch_backend import choose_device, choose_dtype
from tiue_cli.bench.config import BenchConfig, StudentBackend
from tiue_cli.bench.flops import StageFlops
from tiue_cli.bench.models import (
    LoadedModel,
    check_same_size,
    load_model,
    named,
    random_model,
    student_steps,
)
from tiue_cli.bench.schema import BenchBackend, SubjectKind, SubjectRecord
from tiue_cli.bench.subjects import PlainUNetSubject, StudentSubject, Subject, TeacherSubject, Variant
from tiue_cli.errors import UsageError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_NAMES, EMBEDDED_TEACHER, resolve_model

NO_TEACHER: Final = "none"
"""What ``--teacher`` says to leave the teacher out."""

Say = Callable[[str], None]


@dataclass
class Lineup:
    """The subjects in the order of the report, and what they have in common. ``size`` is (H, W) in pixels."""

    device: str
    precision: Any
    size: tuple[int, int]
    latent: tuple[int, int, int]
    subjects: list[Subject] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def subject(self, key: str) -> Subject:
        """The subject of that key; KeyError for another."""
        for subject in self.subjects:
            if subject.key == key:
                return subject
        raise KeyError(key)

    @property
    def teachers(self) -> list[Subject]:
        """The many-step models that the others are compared with."""
        return [subject for subject in self.subjects if subject.record.kind == "teacher"]


def open_lineup(config: BenchConfig, stack: ExitStack, *, say: Say) -> Lineup:
    """Load everything that ``config`` names and enter the subjects on ``stack``.

    ``say`` is called with what begins. Raises what loading raises, and UsageError for what does not fit together.
    """
    return _Builder(config, stack, say).build()


class _Builder:
    """One lineup in the making."""

    def __init__(self, config: BenchConfig, stack: ExitStack, say: Say) -> None:
        self._config = config
        self._stack = stack
        self._say = say
        self._device = choose_device(config.device)
        self._precision: Any = choose_dtype(config.precision, self._device)
        self._loaded: dict[str, LoadedModel] = {}
        self._flops: dict[str, StageFlops] = {}
        self._warnings: list[str] = []

    def build(self) -> Lineup:
        names: list[str] = []
        for source in self._config.models:
            names.append(named(source, names))
        students = [self._student(name, source) for name, source in zip(names, self._config.models, strict=True)]
        teachers = self._teachers(students)
        size = self._config.size or check_same_size({model.name: model.image_size() for model in students})
        decoder = ImageDecoder(students[0].components.vae)
        lineup = Lineup(
            device=self._device,
            precision=self._precision,
            size=size,
            latent=(decoder.latent_channels, *decoder.latent_size(size)),
        )
        for model in students:
            self._flops[model.name] = StageFlops(model.components, lineup.latent[1:])
        for model in teachers:
            self._flops.setdefault(model.name, StageFlops(model.components, lineup.latent[1:]))
            lineup.subjects += self._teacher_subjects(model)
        for model in students:
            lineup.subjects += self._plain_subjects(model)
            lineup.subjects += self._student_subjects(model)
        for subject in lineup.subjects:
            self._stack.enter_context(subject)
        lineup.warnings = self._warnings
        return lineup

    # --- models ---

    def _student(self, name: str, source: str) -> LoadedModel:
        if self._config.random_weights:
            self._say(f"building {source} with random weights")
            return random_model(
                source,
                device=self._device,
                precision=self._precision,
                seed=self._config.seed,
                vae=self._config.vae,
            )
        model = self._load(name, source)
        if not model.is_student:
            self._warnings.append(
                f"{source} is a many-step model: its untrained student is measured for speed, and the pictures of that"
                " student mean nothing"
            )
        return model

    def _load(self, name: str, source: str) -> LoadedModel:
        place = str(resolve_model(source))
        if place not in self._loaded:
            self._say(f"loading {source}")
            self._loaded[place] = load_model(
                name, source, device=self._device, precision=self._precision, vae=self._config.vae
            )
        return self._loaded[place]

    def _teachers(self, students: list[LoadedModel]) -> list[LoadedModel]:
        """The many-step models to compare with, each once: the one that was named, else what each student knows."""
        asked = self._config.teacher
        if asked == NO_TEACHER:
            return []
        if asked is not None:
            return [self._checked_teacher(self._load(named(asked, [model.name for model in students]), asked), asked)]
        found: dict[int, LoadedModel] = {}
        for student in students:
            teacher = self._own_teacher(student)
            if teacher is not None:
                found[id(teacher.components)] = teacher
        return list(found.values())

    def _own_teacher(self, student: LoadedModel) -> LoadedModel | None:
        if student.random_weights or not student.is_student:
            return student
        manifest = student.components.info.manifest
        known = None if manifest is None else manifest.teacher
        if known in EMBEDDED_NAMES or student.source in EMBEDDED_NAMES:
            return self._load(EMBEDDED_TEACHER, EMBEDDED_TEACHER)
        self._warnings.append(
            f"{student.source} is compared with no teacher: give its folder with --teacher"
            + ("" if known in (None, "unknown") else f" (its manifest names {known})")
        )
        return None

    def _checked_teacher(self, model: LoadedModel, source: str) -> LoadedModel:
        if model.is_student:
            raise UsageError(f"--teacher {source} is a student", hint="give the many-step model that it came from")
        return model

    # --- subjects ---

    def _teacher_subjects(self, model: LoadedModel) -> list[Subject]:
        name = EMBEDDED_TEACHER if model.source == EMBEDDED else model.name
        guidance = model.guidance(self._config.guidance)
        subjects: list[Subject] = []
        for steps in self._config.teacher_steps:
            record = self._record(
                model,
                key=f"{name}/torch/{steps}-steps",
                label=f"{name}, {steps} steps, {f'guidance {guidance:g}' if guidance > 1 else 'no guidance'}",
                kind="teacher",
                steps=steps,
                guidance=guidance,
            )
            subjects.append(TeacherSubject(record, model, self._flops[model.name]))
        return subjects

    def _plain_subjects(self, model: LoadedModel) -> list[Subject]:
        subjects: list[Subject] = []
        for merged in (False, True):
            record = self._record(
                model,
                key=f"{model.name}/torch/unet{'-merged' if merged else ''}",
                label=f"{model.name}, one plain UNet pass{', merged upsamplers' if merged else ''}",
                kind="plain-unet",
                steps=1,
                merged_upsampler=merged,
                untrained=not model.is_student,
                notes=("an untrained model's single step: its speed counts, its picture does not",),
            )
            subjects.append(PlainUNetSubject(record, model, self._flops[model.name]))
        return subjects

    def _student_subjects(self, model: LoadedModel) -> list[Subject]:
        """The sharing decoder at each K, the K-fold batch at each K > 1, and the rest at the largest K."""
        all_steps = student_steps(model.student, self._config.steps)
        most = max(all_steps)
        backends = self._config.backends or ("torch",)
        subjects = []
        if "torch" in backends:
            subjects = [self._student_subject(model, steps, "shared") for steps in all_steps]
            subjects += [self._student_subject(model, steps, "plain") for steps in all_steps if steps > 1]
            subjects.append(self._student_subject(model, most, "merged"))
        elif "compile" in backends:
            reference = self._student_subject(model, most, "shared")
            reference.timed = False
            subjects.append(reference)
        if "compile" in backends:
            subjects.append(self._student_subject(model, most, "shared", backend="compile"))
        return subjects

    def _student_subject(
        self, model: LoadedModel, steps: int, variant: Variant, *, backend: StudentBackend = "torch"
    ) -> Subject:
        suffix = "" if variant == "shared" else f"-{variant}"
        how = {
            "shared": "sharing decoder",
            "plain": "the authors' K-fold batch",
            "merged": "sharing decoder, merged upsamplers",
        }[variant]
        record = self._record(
            model,
            key=f"{model.name}/{backend}/k{steps}{suffix}",
            label=f"{model.name}, K = {steps}, {how}{', torch.compile' if backend == 'compile' else ''}",
            kind="student-plain" if variant == "plain" else "student",
            backend=backend,
            steps=steps,
            merged_upsampler=variant == "merged",
            untrained=not model.is_student,
        )
        subject = StudentSubject(record, model, self._flops[model.name], variant=variant)
        subject.plain_pass = f"{model.name}/torch/unet{'-merged' if variant == 'merged' else ''}"
        reference = f"{model.name}/torch/k{steps}"
        subject.reference = None if record.key == reference else reference
        return subject

    def _record(
        self,
        model: LoadedModel,
        *,
        key: str,
        label: str,
        kind: SubjectKind,
        steps: int,
        backend: BenchBackend = "torch",
        guidance: float | None = None,
        merged_upsampler: bool = False,
        untrained: bool = False,
        notes: tuple[str, ...] = (),
    ) -> SubjectRecord:
        return SubjectRecord(
            key=key,
            label=label,
            kind=kind,
            backend=backend,
            model=model.source,
            model_sha256=model.sha256,
            steps=steps,
            guidance=guidance,
            precision=self._precision,
            device=self._device,
            random_weights=model.random_weights,
            untrained=untrained,
            merged_upsampler=merged_upsampler,
            weights_bytes=model.weights_bytes,
            load_s=model.load_s,
            notes=notes,
        )
