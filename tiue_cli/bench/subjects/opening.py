"""Who takes part: from what was asked for to the subjects of a bench, ready to run.

- for each teacher: guided sampling at each number of steps;
- for each model: one plain UNet pass, and the same with merged upsamplers; the student with the sharing decoder at each
  K and with the authors' K-fold batch at each K above 1; with merged upsamplers and compiled at the largest K; its
  export and engine at each K;
- for each peer: the pipeline under its own sampler.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tiue_cli.backends.torch_backend import choose_device, choose_dtype
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.backends.trt_device import require_tensorrt
from tiue_cli.bench.config import BenchConfig, PeerSpec, StudentBackend
from tiue_cli.bench.measure.flops import StageFlops
from tiue_cli.bench.report.schema import SubjectRecord
from tiue_cli.bench.subjects.exported_subjects import ExportedSubject, TimedOnnxBackend
from tiue_cli.bench.subjects.loading import (
    Loader,
    ModelArgument,
    ReadyExport,
    Say,
    engine_now,
    engine_obstacle,
    export_now,
    find_export_of,
)
from tiue_cli.bench.subjects.models import LoadedModel, check_same_size, student_steps
from tiue_cli.bench.subjects.peers import PeerSubject, load_peer, pipeline_bytes
from tiue_cli.bench.subjects.torch_subjects import PlainUNetSubject, StudentSubject, Subject, TeacherSubject, Variant
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError, UsageError
from tiue_cli.files.temporary import temporary_folder
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_TEACHER

_ExportBackend = Literal["onnx", "trt"]
_RUN_EXPORTS: tuple[_ExportBackend, ...] = ("onnx", "trt")
_GRAPHS = "prepared networks, fused kernels and CUDA graphs, as tiue generate runs on CUDA"
_HOW: dict[Variant, str] = {
    "shared": "sharing decoder",
    "plain": "the authors' K-fold batch",
    "merged": "sharing decoder, merged upsamplers",
}


@dataclass
class OpenedSubjects:
    """The subjects in the order of the report, and what they have in common. ``size`` is (H, W) in pixels."""

    device: str
    precision: Any
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
    precision = choose_dtype(config.precision, device)
    if config.backends is not None and "trt" in config.backends:
        require_tensorrt()  # rather than after minutes of exporting
    loader = Loader(config, device=device, precision=precision, say=say)
    arguments = loader.arguments()
    teachers = loader.teachers(arguments)
    size = config.size or check_same_size({one.name: one.image_size() for one in arguments})
    shapes = {_latent_shape(one, size) for one in arguments}
    shapes |= {_latent_shape(ModelArgument(model.name, model.source, model), size) for model in teachers}
    if len(shapes) > 1:
        raise UsageError(
            f"the models' latents have different shapes: {', '.join(map(str, sorted(shapes)))}",
            hint="measure models of one family in one run: the same noise goes into all",
        )
    opened = OpenedSubjects(
        device,
        precision,
        size,
        shapes.pop(),
        names=tuple(argument.name for argument in arguments),
        warnings=loader.warnings,
        notes=loader.notes,
    )
    opener = _Opener(config, opened, stack, say)
    for model in teachers:
        opener.add_teacher(model)
    for argument in arguments:
        opener.add_argument(argument)
    for peer in config.peers:
        opener.add_peer(peer)
    _compare_with_a_plain_pass(opened)
    return opened


def _compare_with_a_plain_pass(opened: OpenedSubjects) -> None:
    """Many-step models cost so many plain passes of the first model: guided, about twice their steps."""
    plain = [subject.key for subject in opened.subjects if subject.record.kind == "plain-unet"]
    for subject in opened.subjects:
        if plain and subject.record.kind in ("teacher", "peer"):
            subject.plain_pass = plain[0]


def _latent_shape(argument: ModelArgument, size: tuple[int, int]) -> tuple[int, int, int]:
    if argument.model is None:
        assert argument.export is not None, "an argument is a model or an export"
        return argument.export.manifest.latent_shape(size)
    decoder = ImageDecoder(argument.model.components.vae)
    return (decoder.latent_channels, *decoder.latent_size(size))


class _Opener:
    """Opens subjects, model by model."""

    def __init__(self, config: BenchConfig, opened: OpenedSubjects, stack: ExitStack, say: Say) -> None:
        self._config, self._opened, self._stack, self._say = config, opened, stack, say
        self._names: dict[int, str] = {}
        """Under which name a model's torch subjects are, by its identity: an export may share its student's."""

    @property
    def _on_gpu(self) -> bool:
        return self._opened.device == "cuda"

    # --- many steps ---

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
            self._add(TeacherSubject(record, model, self._flops(model)))

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
        self._add(PeerSubject(record, pipeline, size=opened.size, seed=self._config.seed))

    # --- one pass ---

    def add_argument(self, argument: ModelArgument) -> None:
        """A model's plain passes, its student in torch, and its export. Raises UsageError where nothing can run it."""
        asked, model, before = self._config.backends, argument.model, len(self._opened.subjects)
        if model is None:
            all_steps = _export_steps(argument, self._config.steps)
        else:
            all_steps = student_steps(model.student, self._config.steps)
            if id(model) not in self._names:
                self._names[id(model)] = argument.name
                self._add_plain_passes(model, argument.name)
                self._add_torch(model, argument.name, all_steps, ("torch",) if asked is None else asked)
        backends = [name for name in _RUN_EXPORTS if asked is None or name in asked]
        ready = self._export(argument, asked=asked is not None) if backends else ""
        for backend in backends:
            if isinstance(ready, str):
                self._opened.notes.append(f"{backend} is left out: {ready}")
            else:
                self._add_exported(argument, ready, all_steps, backend, asked=asked is not None)
        if model is None and len(self._opened.subjects) == before:
            raise UsageError(
                f"{argument.source} is an export, and none of the backends in --backend runs exports",
                hint="name onnx or trt, or leave --backend out",
            )

    def _add_plain_passes(self, model: LoadedModel, name: str) -> None:
        for merged in (False, True):
            record = self._record(
                model,
                key=f"{name}/torch/unet{'-merged' if merged else ''}",
                label=f"{name}, one plain UNet pass{', merged upsamplers' if merged else ''}",
                kind="plain-unet",
                steps=1,
                merged_upsampler=merged,
                untrained=True,
                notes=("a single step that the model was not trained for: its time counts, its picture does not",),
            )
            self._add(PlainUNetSubject(record, model, self._flops(model)))

    def _add_torch(
        self, model: LoadedModel, name: str, all_steps: tuple[int, ...], backends: tuple[StudentBackend, ...]
    ) -> None:
        most, timed = max(all_steps), "torch" in backends
        # Where torch is not asked for, it still draws what the others are compared with.
        for steps in all_steps if timed or set(backends) & {"onnx", "trt"} else (most,):
            self._add_student(model, name, steps, "shared", timed=timed)
        if timed:
            for steps in all_steps:
                if steps > 1:
                    self._add_student(model, name, steps, "plain")
            if not self._on_gpu:
                self._add_student(model, name, most, "merged")
        if "compile" in backends:
            self._add_student(model, name, most, "shared", backend="compile")

    def _add_student(
        self,
        model: LoadedModel,
        name: str,
        steps: int,
        variant: Variant,
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
        merged = variant == "merged"
        record = self._record(
            model,
            key=f"{name}/{backend}/k{steps}{suffix}",
            label=f"{name}, K = {steps}, {_HOW[variant]}{', torch.compile' if backend == 'compile' else ''}",
            kind="student-plain" if variant == "plain" else "student",
            backend=backend,
            steps=steps,
            merged_upsampler=merged,
            untrained=not model.is_student,
            notes=notes,
        )
        subject = StudentSubject(record, model, self._flops(model), variant=variant)
        subject.timed = timed
        subject.plain_pass = f"{name}/torch/unet{'-merged' if merged else ''}"
        subject.reference = None if record.key == reference else reference
        self._add(subject)

    # --- exports ---

    def _add_exported(
        self,
        argument: ModelArgument,
        ready: ReadyExport,
        all_steps: tuple[int, ...],
        backend: _ExportBackend,
        *,
        asked: bool,
    ) -> None:
        """The student's export, or its engine, at each K; where it was not asked for, only if it can run here."""
        try:
            if backend == "trt":
                ready = self._with_engine(ready, asked=asked)
            started = time.perf_counter()
            running = self._backend(ready, backend)
            self._stack.enter_context(running)
        except (DeviceError, ManifestError, MissingDependencyError) as error:
            # An export that was given as a model is there to be run, and an engine that was named as well.
            wanted = ready.engine is not None if backend == "trt" else argument.export is not None
            if asked or wanted:
                raise
            self._opened.notes.append(f"{backend} is left out: {error.message}")
            return
        load_s = time.perf_counter() - started
        name, model, manifest = argument.name, argument.model, ready.manifest
        for steps in all_steps:
            record = SubjectRecord(
                key=f"{name}/{backend}/k{steps}",
                label=f"{name}, K = {steps}, {'ONNX Runtime' if backend == 'onnx' else 'TensorRT'}",
                kind="student",
                backend=backend,
                model=argument.source,
                model_sha256=manifest.student.sha256 if model is None else model.sha256,
                steps=steps,
                guidance=None,
                precision=self._opened.precision,
                device=running.device,
                random_weights=model is not None and model.random_weights,
                untrained=model is not None and not model.is_student,
                weights_bytes=sum(file.size_bytes for graph in manifest.graphs for file in (graph.onnx, *graph.data)),
                load_s=load_s,
                build_s=ready.build_s,
                notes=_export_notes(running.notes, ready, compared=model is not None),
            )
            subject = ExportedSubject(record, running, None if model is None else self._flops(model))
            if model is not None:
                torch_name = self._names[id(model)]
                subject.reference = f"{torch_name}/torch/k{steps}"
                subject.plain_pass = f"{torch_name}/torch/unet"
            elif manifest.parity is None:
                subject.unverified = (
                    "its pictures were never compared with a reference, neither in this run nor at export"
                )
            self._add(subject)

    def _export(self, argument: ModelArgument, *, asked: bool) -> ReadyExport | str:
        """The export to run, or why there is none. Raises where it was asked for and cannot be had."""
        opened, model = self._opened, argument.model
        if argument.export is not None:
            precision = argument.export.manifest.precision
            if precision != opened.precision:
                raise UsageError(
                    f"{argument.source} was exported in {precision}, and this run is in {opened.precision}",
                    hint=f"measure all in it: --precision {precision}",
                )
            return argument.export
        assert model is not None, "an argument is a model or an export"
        found = find_export_of(model, precision=opened.precision, size=opened.size, vae=self._config.vae)
        if isinstance(found, ReadyExport) or not asked:
            return found
        folder = self._stack.enter_context(temporary_folder("tiue-bench"))
        return export_now(model, folder, precision=opened.precision, size=opened.size, say=self._say)

    def _with_engine(self, ready: ReadyExport, *, asked: bool) -> ReadyExport:
        """The export with an engine that takes every batch. Raises where there is none and none is to be built."""
        batches = self._config.batches
        obstacle = engine_obstacle(ready.folder, ready.engine, size=self._opened.size, batches=batches)
        if obstacle is None:
            return ready
        if not asked or ready.build_s is None:
            raise obstacle
        # The export was made for this run, so its engine is as well.
        engine, build_s = engine_now(ready, batches=batches, say=self._say)
        return replace(ready, build_s=ready.build_s + build_s, engine=engine)

    def _backend(self, ready: ReadyExport, backend: _ExportBackend) -> TimedOnnxBackend | TrtBackend:
        if backend == "trt":
            return TrtBackend(ready.folder, engine=ready.engine)
        provider = "cuda" if self._opened.device == "cuda" else "cpu"
        return TimedOnnxBackend(ready.folder, provider=provider, threads=torch.get_num_threads())

    # --- records ---

    def _add(self, subject: Subject) -> None:
        self._opened.subjects.append(self._stack.enter_context(subject))

    def _flops(self, model: LoadedModel) -> StageFlops:
        return StageFlops(model.components, self._opened.latent[1:])

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


def _export_steps(argument: ModelArgument, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    assert argument.export is not None, "an argument is a model or an export"
    manifest = argument.export.manifest
    for steps in asked or ():
        manifest.combine(steps)
    return asked or manifest.steps


def _export_notes(notes: tuple[str, ...], ready: ReadyExport, *, compared: bool) -> tuple[str, ...]:
    """What a reader should know: where this run compares the pictures, earlier comparisons do not matter."""
    if compared:
        return tuple(note for note in notes if not note.endswith("(--no-check)"))
    parity = ready.manifest.parity
    if parity is None:
        return notes
    return (*notes, f"when it was exported, its pictures had {parity.image_psnr_db:.1f} dB to those of torch in fp32")
