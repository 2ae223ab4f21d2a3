"""Who takes part: from what was asked for to the subjects of a bench, ready to run.

- for each teacher: guided sampling at each number of steps;
- for each model: one plain UNet pass, and the same with merged upsamplers; the student with the sharing decoder at each
  K and with the authors' K-fold batch at each K above 1; with merged upsamplers and compiled at the largest K; its
  export in each runtime at each K;
- for each peer: the pipeline under its own sampler.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tiue_cli.backends.torch_backend import choose_device, choose_dtype
from tiue_cli.backends.trt_device import require_tensorrt
from tiue_cli.bench.config import BACKEND_NAMES, BenchConfig, PeerSpec, StudentBackend
from tiue_cli.bench.measure.flops import DecoderKind, StageFlops
from tiue_cli.bench.report.schema import SubjectRecord
from tiue_cli.bench.subjects.exports import (
    ONLY_ASKED,
    RUNTIMES,
    OpenedExport,
    Say,
    check_engine,
    engine_now,
    export_now,
    find_export_of,
    stored_in,
)
from tiue_cli.bench.subjects.loading import Loader, ModelArgument
from tiue_cli.bench.subjects.models import LoadedModel
from tiue_cli.bench.subjects.peers import load_peer, peer_subject, pipeline_bytes
from tiue_cli.bench.subjects.subject import Subject
from tiue_cli.bench.subjects.torch_subjects import plain_unet_subject, student_subject, teacher_subject
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError, UsageError
from tiue_cli.files.temporary import temporary_folder
from tiue_cli.generate.target import ExportInfo
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_TEACHER

_GRAPHS = "prepared networks, fused kernels and CUDA graphs, as tiue generate runs on CUDA"
_HOW: dict[DecoderKind, str] = {
    "shared": "sharing decoder",
    "plain": "the authors' K-fold batch",
    "merged": "sharing decoder, merged upsamplers",
}


@dataclass
class OpenedSubjects:
    """The subjects in the order of the report, and what they have in common. ``size`` is (H, W) in pixels."""

    device: str
    precision: Any
    """What torch computes in."""
    exported: Any
    """What exports compute in."""
    size: tuple[int, int]
    latent: tuple[int, int, int]
    names: tuple[str, ...] = ()
    """Of the models, short."""
    subjects: list[Subject] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_subjects(config: BenchConfig, stack: ExitStack, *, say: Say) -> OpenedSubjects:
    """Load everything that ``config`` names; ``stack`` holds it open.

    ``say`` is called with what begins. Raises what loading raises, and UsageError for what does not fit together.
    """
    device = choose_device(config.device)
    exported = choose_dtype(config.precision, device)
    precision = "fp32" if exported == "int8" else exported
    if config.backends is not None and "trt" in config.backends:
        require_tensorrt()  # rather than after minutes of exporting
    loader = Loader(config, device=device, precision=precision, say=say)
    arguments = loader.arguments()
    teachers = loader.teachers(arguments)
    size = config.size or _common_size(arguments)
    shapes = {argument.latent_shape(size) for argument in arguments}
    shapes |= {model.latent_shape(size) for model in teachers}
    if len(shapes) > 1:
        raise UsageError(
            f"the models' latents have different shapes: {', '.join(map(str, sorted(shapes)))}",
            hint="measure models of one family in one run: the same noise goes into all",
        )
    names = tuple(argument.name for argument in arguments)
    opened = OpenedSubjects(
        device, precision, exported, size, shapes.pop(), names, warnings=loader.warnings, notes=loader.notes
    )
    opener = _Opener(config, opened, stack, say)
    for model in teachers:
        opener.add_teacher(model)
    for argument in arguments:
        opener.add_argument(argument)
    for peer in config.peers:
        opener.add_peer(peer)
    # Many-step models cost so many plain passes of the first model: guided, about twice their steps.
    plain = [subject.key for subject in opened.subjects if subject.record.kind == "plain-unet"]
    for subject in opened.subjects:
        if plain and subject.record.kind in ("teacher", "peer"):
            subject.plain_pass = plain[0]
    return opened


def _common_size(arguments: list[ModelArgument]) -> tuple[int, int]:
    """The one size (H, W) in pixels that all were made for. Raises UsageError where there are several."""
    sizes = {argument.image_size for argument in arguments}
    if len(sizes) > 1:
        listed = ", ".join(f"{one.name} {one.image_size[0]}x{one.image_size[1]}" for one in arguments)
        raise UsageError(f"the models were made for different sizes: {listed}", hint="choose one for all: --size 512")
    return sizes.pop()


class _Opener:
    """Opens subjects, model by model."""

    def __init__(self, config: BenchConfig, opened: OpenedSubjects, stack: ExitStack, say: Say) -> None:
        self._config, self._opened, self._stack, self._say = config, opened, stack, say
        self._on_gpu = opened.device == "cuda"
        self._names: dict[int, str] = {}
        """Under which name a model's torch subjects are, by its identity: an export may share its student's."""
        self._counted: dict[int, StageFlops] = {}

    def add_teacher(self, model: LoadedModel) -> None:
        """Guided sampling at each number of steps."""
        name = EMBEDDED_TEACHER if model.source == EMBEDDED and not model.random_weights else model.name
        guidance = model.guidance(self._config.guidance)
        how = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
        for steps in self._config.teacher_steps:
            record = self._record(
                model,
                key=f"{name}/torch/{steps}-steps",
                label=f"{name}, {steps} steps, {how}",
                kind="teacher",
                steps=steps,
                guidance=guidance,
                merged_upsampler=self._on_gpu,
                notes=(_GRAPHS,) if self._on_gpu else (),
            )
            self._opened.subjects.append(teacher_subject(record, model, self._flops(model)))

    def add_peer(self, peer: PeerSpec) -> None:
        """Another pipeline under its own sampler."""
        self._say(f"loading {peer.source}")
        opened = self._opened
        pipeline, load_s = load_peer(peer, device=opened.device, precision=opened.precision)
        how = "its own guidance" if peer.guidance is None else f"guidance {peer.guidance:g}"
        record = SubjectRecord(
            key=f"{peer.name}/diffusers/{peer.steps}-steps",
            label=f"{peer.name}, {peer.steps} step{'' if peer.steps == 1 else 's'}, {how}",
            kind="peer",
            backend="diffusers",
            model=peer.source,
            model_sha256=None,
            steps=peer.steps,
            guidance=peer.guidance,
            precision=opened.precision,
            device=opened.device,
            weights_bytes=pipeline_bytes(pipeline),
            load_s=load_s,
            notes=(f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}",),
        )
        opened.subjects.append(peer_subject(record, pipeline, self._stack, size=opened.size, seed=self._config.seed))

    def add_argument(self, argument: ModelArgument) -> None:
        """A model's plain passes, its student in torch, and its export. Raises UsageError where nothing can run it."""
        asked, model, before = self._config.backends, argument.model, len(self._opened.subjects)
        all_steps = argument.steps(self._config.steps)
        if model is not None and id(model) not in self._names:
            self._names[id(model)] = argument.name
            self._add_torch(model, argument.name, all_steps, ("torch",) if asked is None else asked)
        usual = [name for name in RUNTIMES if name not in ONLY_ASKED]
        backends = usual if asked is None else [name for name in RUNTIMES if name in asked]
        if backends:
            self._add_exports(argument, all_steps, backends)
        if model is None and len(self._opened.subjects) == before:
            raise UsageError(
                f"{argument.source} is an export, and none of the backends in --backend runs exports",
                hint=f"name {' or '.join(RUNTIMES)}, or leave --backend out",
            )

    # --- torch ---

    def _add_torch(
        self, model: LoadedModel, name: str, all_steps: tuple[int, ...], backends: tuple[StudentBackend, ...]
    ) -> None:
        for merged in (False, True):
            record = self._record(
                model,
                key=_plain_pass(name, merged=merged),
                label=f"{name}, one plain UNet pass{', merged upsamplers' if merged else ''}",
                kind="plain-unet",
                steps=1,
                merged_upsampler=merged,
                untrained=True,
                notes=("a single step that the model was not trained for: its time counts, its picture does not",),
            )
            self._opened.subjects.append(plain_unet_subject(record, model, self._flops(model)))
        add = partial(self._add_student, model, name)
        most, timed = max(all_steps), "torch" in backends
        # Where torch is not asked for, it still draws what the others are compared with.
        for steps in all_steps if timed or set(backends) & RUNTIMES.keys() else (most,):
            add(steps, "shared", timed=timed)
        for steps in all_steps:
            if timed and steps > 1:
                add(steps, "plain")
        if timed and not self._on_gpu:
            add(most, "merged")
        if "compile" in backends:
            add(most, "shared", backend="compile")

    def _add_student(
        self,
        model: LoadedModel,
        name: str,
        steps: int,
        variant: DecoderKind,
        *,
        backend: StudentBackend = "torch",
        timed: bool = True,
    ) -> None:
        suffix, reference = "" if variant == "shared" else f"-{variant}", f"{name}/torch/k{steps}"
        notes: tuple[str, ...] = ()
        if self._on_gpu:
            # There upsamplers are merged in what ships, so that no variant of its own is needed.
            variant = "merged" if variant == "shared" else variant
            notes = ("diffusers' modules in eager mode",) if variant == "plain" else (_GRAPHS,)
        record = self._record(
            model,
            key=f"{name}/{backend}/k{steps}{suffix}",
            label=f"{name}, K = {steps}, {_HOW[variant]}{', torch.compile' if backend == 'compile' else ''}",
            kind="student-plain" if variant == "plain" else "student",
            backend=backend,
            steps=steps,
            merged_upsampler=variant == "merged",
            untrained=not model.is_student,
            notes=notes,
        )
        subject = student_subject(record, model, self._flops(model), variant=variant)
        subject.timed = timed
        subject.plain_pass = _plain_pass(name, merged=record.merged_upsampler)
        subject.reference = None if record.key == reference else reference
        self._opened.subjects.append(subject)

    # --- exports ---

    def _add_exports(self, argument: ModelArgument, all_steps: tuple[int, ...], backends: list[StudentBackend]) -> None:
        """The export in each runtime at each K; where it was not asked for, only where it can run here."""
        asked = self._config.backends is not None
        found = self._export(argument, asked=asked)
        for backend in backends:
            if isinstance(found, str):
                self._opened.notes.append(f"{backend} is left out: {found}")
                continue
            export, build_s = found
            try:
                if backend == "trt":
                    export, build_s = self._with_engine(export, build_s, asked=asked)
                opened = OpenedExport(
                    export, backend, self._stack, device=self._opened.device, precision=self._opened.exported
                )
            except (DeviceError, ManifestError, MissingDependencyError) as error:
                # An export that was given as a model is there to be run, and an engine that was named as well.
                named = export.engine if backend == "trt" else argument.export
                if asked or named is not None:
                    raise
                self._opened.notes.append(f"{backend} is left out: {error.message}")
                continue
            for steps in all_steps:
                self._add_exported(argument, export, opened, backend, steps=steps, build_s=build_s)

    def _export(self, argument: ModelArgument, *, asked: bool) -> tuple[ExportInfo, float | None] | str:
        """The export to run and the seconds that it took to make, if it was made for this run; or why there is none.

        Raises where it was asked for and cannot be had.
        """
        opened, model = self._opened, argument.model
        if argument.export is not None:
            precision = argument.export.manifest.precision
            if precision != stored_in(opened.exported):
                raise UsageError(
                    f"{argument.source} was exported in {precision}, and this run is in {opened.exported}",
                    hint=f"measure all in it: --precision {precision}",
                )
            return argument.export, None
        assert model is not None, "an argument is a model or an export"
        found = find_export_of(model, precision=stored_in(opened.exported), size=opened.size, vae=self._config.vae)
        if isinstance(found, ExportInfo):
            return found, None
        if not asked:
            return found
        folder = self._stack.enter_context(temporary_folder("tiue-bench"))
        return export_now(
            model,
            folder,
            precision=stored_in(opened.exported),
            size=opened.size,
            prompts=self._config.prompts,
            say=self._say,
        )

    def _with_engine(
        self, export: ExportInfo, build_s: float | None, *, asked: bool
    ) -> tuple[ExportInfo, float | None]:
        """The export with an engine that takes every batch. Raises where there is none and none is to be built."""
        batches = self._config.batches
        try:
            check_engine(export, size=self._opened.size, batches=batches)
        except (DeviceError, ManifestError, MissingDependencyError):
            if not asked or build_s is None:
                raise
            # The export was made for this run, so its engine is as well.
            export, seconds = engine_now(export, batches=batches, say=self._say)
            build_s += seconds
        return export, build_s

    def _add_exported(
        self,
        argument: ModelArgument,
        export: ExportInfo,
        opened: OpenedExport,
        backend: StudentBackend,
        *,
        steps: int,
        build_s: float | None,
    ) -> None:
        name, model, manifest = argument.name, argument.model, export.manifest
        record = SubjectRecord(
            key=f"{name}/{backend}/k{steps}",
            label=f"{name}, K = {steps}, {BACKEND_NAMES[backend]}",
            kind="student",
            backend=backend,
            model=argument.source,
            model_sha256=manifest.student.sha256 if model is None else model.sha256,
            steps=steps,
            guidance=None,
            precision=self._opened.exported,
            device=opened.running.device,
            random_weights=model is not None and model.random_weights,
            untrained=model is not None and not model.is_student,
            weights_bytes=sum(file.size_bytes for graph in manifest.graphs for file in (graph.onnx, *graph.data)),
            load_s=opened.load_s,
            build_s=build_s,
            notes=_export_notes(opened.running.notes, export, compared=model is not None),
        )
        subject = Subject(record, opened.draw(steps), opened.clock)
        if model is not None:
            # An export computes what the student computes.
            subject.flops = partial(self._flops(model).student, steps=steps, kind="shared")
            subject.reference = f"{self._names[id(model)]}/torch/k{steps}"
            subject.plain_pass = _plain_pass(self._names[id(model)], merged=False)
        elif manifest.parity is None:
            subject.unverified = "its pictures were never compared with a reference, neither in this run nor at export"
        self._opened.subjects.append(subject)

    # --- both ---

    def _flops(self, model: LoadedModel) -> StageFlops:
        if id(model) not in self._counted:
            self._counted[id(model)] = StageFlops(model.components, self._opened.latent[1:])
        return self._counted[id(model)]

    def _record(self, model: LoadedModel, **fields: Any) -> SubjectRecord:
        """A record over a loaded model; ``fields`` are those that differ from subject to subject."""
        common = {
            "backend": "torch",
            "model": model.source,
            "model_sha256": model.sha256,
            "guidance": None,
            "precision": self._opened.precision,
            "device": self._opened.device,
            "random_weights": model.random_weights,
            "weights_bytes": model.weights_bytes,
            "load_s": model.load_s,
        }
        return SubjectRecord.model_validate({**common, **fields})


def _plain_pass(name: str, *, merged: bool) -> str:
    """The key of a model's plain UNet pass."""
    return f"{name}/torch/unet{'-merged' if merged else ''}"


def _export_notes(notes: tuple[str, ...], export: ExportInfo, *, compared: bool) -> tuple[str, ...]:
    """What a reader should know: where this run compares the pictures, earlier comparisons do not matter."""
    if compared:
        return tuple(note for note in notes if not note.endswith("(--no-check)"))
    parity = export.manifest.parity
    if parity is None:
        return notes
    return (*notes, f"when it was exported, its pictures had {parity.image_psnr_db:.1f} dB to those of torch in fp32")
