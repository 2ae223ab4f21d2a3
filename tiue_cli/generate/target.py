"""Which model draws: a student, a teacher or an export, known from its files alone before anything heavy is loaded."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tiue_cli.errors import ManifestError, ModelFolderError, UsageError
from tiue_cli.files.access import has_file, user_path
from tiue_cli.files.engines import ENGINE_MANIFEST, engine_manifests, read_engine_manifest
from tiue_cli.files.exports import ExportManifest, is_export_folder, read_export_manifest
from tiue_cli.files.png import LoraUse, same_effect
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.fused import fused_export
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.model.folder import ModelInfo, check_model_folder, check_vae_folder
from tiue_cli.model.hub import (
    EMBEDDED,
    EMBEDDED_GUIDANCE,
    EMBEDDED_NAMES,
    EMBEDDED_STUDENT,
    EMBEDDED_TEACHER,
    TEACHER_GUIDANCE,
    TEACHER_STEPS,
    resolve_model,
    resolve_vae,
)
from tiue_cli.model.identity import model_fingerprint
from tiue_cli.model.lora.files import lora_uses
from tiue_cli.model.parts import packaged_graphs
from tiue_cli.model.weights import read_json
from tiue_cli.papercut.vocabulary import vocabulary_note

STUDENT_NAMES = (EMBEDDED, EMBEDDED_STUDENT)
"""Models of the package that have graphs beside their weights."""


@dataclass(frozen=True)
class ExportInfo:
    """An export folder: the counterpart of ``model.folder.ModelInfo``; ``engine``: the engine folder that was named."""

    path: Path
    manifest: ExportManifest
    engine: Path | None = None
    kind: Literal["student"] = "student"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about it."""
        return self.manifest.notes

    @property
    def text_tokens(self) -> int:
        """Length of the token sequence, start and end token included."""
        return self.manifest.text_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) where none are asked for."""
        return self.manifest.default_size

    @property
    def model_id(self) -> str:
        """32 hexadecimal digits of graphs, weights and timesteps; figures and engines beside them do not count."""
        lines = [*(graph.digest for graph in self.manifest.graphs), self.manifest.tokenizer.sha256]
        lines += [repr(combine) for combine in self.manifest.combines]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def find_export(source: str) -> ExportInfo | None:
    """The export folder that ``source`` names, itself or by one of its engine folders; None where it is no export.

    Raises ManifestError for a damaged manifest, ModelFolderError for an engine folder without its export.
    """
    if source in EMBEDDED_NAMES:  # whatever folder of that name lies here
        return None
    path = user_path(source, error=ModelFolderError)
    if is_export_folder(path):
        return ExportInfo(path, read_export_manifest(path))
    if not has_file(path / ENGINE_MANIFEST, error=ManifestError):
        return None
    parent = path.resolve().parent
    if not is_export_folder(parent):
        raise ModelFolderError(
            f"{path} holds TensorRT engines, and their export is not in {parent}",
            hint="engines run inside the export folder that they were built from: move it back there",
        )
    return ExportInfo(parent, read_export_manifest(parent), engine=path)


def backend_for(info: ExportInfo | None, source: str, *, backend: str) -> str:
    """``torch``, ``onnx``, ``openvino`` or ``trt`` for what ``--backend`` says of a model. UsageError for a misfit."""
    if info is None:
        if backend in ("auto", "torch"):
            return "torch"
        if backend != "trt" and source in STUDENT_NAMES:
            return backend
        option = " --trt" if backend == "trt" else ""
        raise UsageError(
            f"--backend {backend} runs exported students, and {source} is a model folder",
            hint=f"export it, and give --model that folder: tiue export {source}{option}",
        )
    if backend == "torch":
        raise UsageError(
            f"--backend torch runs model folders, and {source} is an export",
            hint=f"give the student that it was exported from: --model {info.manifest.student.source}",
        )
    if backend == "auto":
        return "onnx" if info.engine is None else "trt"
    return backend


def check_export_options(
    info: ExportInfo, *, backend: str, vae: str | None, dtype: str, device: str, provider: str
) -> str:
    """ONNX Runtime's provider for what the options say together. Raises UsageError for what an export cannot change."""
    precision = info.manifest.precision
    if vae is not None:
        raise UsageError(
            "the autoencoder is part of an export", hint=f"export with it: tiue export STUDENT --vae {vae}"
        )
    if backend == "openvino":
        return _check_openvino_options(info, dtype=dtype, device=device, provider=provider)
    _refuse_openvino_device(device, model=f"{info.path} with --backend {backend}")
    if dtype not in ("auto", precision):
        raise UsageError(
            f"{info.path} was exported in {precision}, and --precision says {dtype}",
            hint=f"export in it: tiue export STUDENT --precision {dtype}"
            if dtype != "bf16"
            else "leave --precision out",
        )
    if backend == "trt" and device == "cpu":
        raise UsageError("TensorRT needs a GPU, and --device says cpu", hint="use --backend onnx")
    if device == "auto":
        return provider
    if provider != "auto" and (provider == "cpu") != (device == "cpu"):
        raise UsageError(f"--provider {provider} does not run on --device {device}", hint="leave one of them out")
    return device if provider == "auto" else provider


OPENVINO_DEVICES = ("gpu", "npu")


def _check_openvino_options(info: ExportInfo, *, dtype: str, device: str, provider: str) -> str:
    """OpenVINO chooses what floats are computed in: only what the graphs themselves settle is refused."""
    if provider != "auto":
        raise UsageError(
            "--provider is for ONNX Runtime, and --backend says openvino", hint="choose with --device cpu, gpu or npu"
        )
    if device == "cuda":
        raise UsageError("OpenVINO does not run on --device cuda", hint="use --backend onnx or trt")
    if dtype == "int8" and info.manifest.precision != "int8":
        raise UsageError(
            f"{info.path} was exported in {info.manifest.precision}, and --precision says int8",
            hint="export in it: tiue export STUDENT --precision int8",
        )
    return "auto"


def _refuse_openvino_device(device: str, *, model: str) -> None:
    if device in OPENVINO_DEVICES:
        raise UsageError(
            f"--device {device} is for OpenVINO, and not for {model}",
            hint="use --device cuda for an NVIDIA GPU; or an export with --backend openvino",
        )


@dataclass(frozen=True)
class ModelTarget:
    """The model that a session uses, checked and not loaded."""

    source: str
    info: ModelInfo | ExportInfo
    model_id: str
    backend: str
    """``torch``, ``onnx``, ``openvino`` or ``trt``."""
    vae: str | None
    vae_folder: Path | None
    vae_id: str | None
    provider: str = "auto"
    """Of ONNX Runtime."""
    graphs: ExportInfo | None = None
    """The packaged student's, where they draw in place of torch."""
    loras: tuple[LoraUse, ...] = ()
    """Adapters on the model, where a row does not name its own."""
    takes_loras: bool = True
    """Whether adapters can be put on it and taken off: model folders, and engines that were built for it."""

    @property
    def origin(self) -> str:
        """What the model is called where it comes from: an export's student, else ``source``."""
        return self.info.manifest.student.source if isinstance(self.info, ExportInfo) else self.source

    def find_loras(self, texts: Iterable[str]) -> tuple[LoraUse, ...]:
        """The adapters that ``SOURCE[:WEIGHT]`` name, for this model; an export has those that are in its weights.

        Raises UsageError, AdapterError.
        """
        texts = tuple(texts)
        if self.takes_loras or not isinstance(self.info, ExportInfo):
            return lora_uses(texts)
        student = self.info.manifest.student
        if texts and not same_effect(lora_uses(texts), student.loras):
            raise UsageError(
                f"a LoRA is for model folders, and {self.source} is an export",
                hint=f"export the student with it: tiue export {student.source} --lora {texts[0]}",
            )
        return student.loras

    def vocabulary_note(self, prompts: Iterable[str]) -> str | None:
        """What to say of words in ``prompts`` that the model has never read; known of papercut alone."""
        return vocabulary_note(prompts, model=EMBEDDED) if self.origin in EMBEDDED_NAMES else None

    def steps(self, config: GenerateConfig, row: PromptRow | None = None) -> int:
        """Decoder timesteps of a student (checked against its training), or sampler steps of a teacher."""
        if self.info.kind == "teacher":
            return TEACHER_STEPS if config.teacher_steps is None else config.teacher_steps
        wanted = config.steps if row is None or row.steps is None else row.steps
        return len(student_timesteps(self.info, wanted))

    def moved_encoder(self, config: GenerateConfig, row: PromptRow | None = None) -> int | None:
        """The UNet encoder's timestep where ``encoder_timestep`` moves it; None where it runs as trained."""
        if config.encoder_timestep == "trained":
            return None
        first = student_timesteps(self.info, config.steps if row is None or row.steps is None else row.steps)[0]
        manifest = self.info.manifest
        trained = student_timesteps(self.info, None)[0] if manifest is None else manifest.encoder_timestep
        return None if first == trained else first

    def guidance(self, config: GenerateConfig) -> float | None:
        """The guidance of a teacher; None for a student, which has none."""
        if self.info.kind == "student":
            return None
        if config.guidance is not None:
            return config.guidance
        return EMBEDDED_GUIDANCE if self.source == EMBEDDED_TEACHER else TEACHER_GUIDANCE


def open_target(config: GenerateConfig, *, note: Callable[[str], None] | None = None) -> ModelTarget:
    """Find and check model, autoencoder and adapters of ``config``; ``note`` is told of what takes long.

    An export with other adapters than it has is exported again with them, once, unless its engine takes them. Raises
    what ``model.folder`` raises, UsageError and AdapterError.
    """
    target = _bare_target(config)
    if config.loras and isinstance(target.info, ExportInfo) and not target.takes_loras:
        target = _fused_target(target, target.info, lora_uses(config.loras), note=note)
    return replace(target, loras=target.find_loras(config.loras))


def _fused_target(
    target: ModelTarget, info: ExportInfo, uses: Sequence[LoraUse], *, note: Callable[[str], None] | None
) -> ModelTarget:
    if target.backend == "trt":
        raise UsageError(
            "this engine takes no LoRA: its weights were set when it was built",
            hint=f"build one that does: tiue export {info.path} --trt --refit;"
            f" or with this one: tiue export {info.manifest.student.source} --lora {uses[0].option} --trt",
        )
    folder = fused_export(info.path, info.manifest, info.model_id, uses, note=note)
    fused = ExportInfo(folder, read_export_manifest(folder))
    return replace(target, info=fused, model_id=fused.model_id)


def _bare_target(config: GenerateConfig) -> ModelTarget:
    export = find_export(config.model)
    backend = backend_for(export, config.model, backend=config.backend)
    if export is not None:
        return _export_target(config, export, backend=backend)
    if config.provider != "auto":
        raise UsageError("--provider is for exported students", hint="use --device for a model folder")
    if backend != "openvino":
        _refuse_openvino_device(config.device, model=f"{config.model}, a model folder")
    if config.dtype == "int8":
        raise UsageError(
            f"--precision int8 is for exports, and {config.model} is a model folder",
            hint=f"export it in 8 bits: tiue export {config.model} --precision int8",
        )
    folder = resolve_model(config.model)
    info = check_model_folder(folder)
    _refuse_other_kinds_options(config, info)
    if config.compiled and info.kind == "teacher":
        raise UsageError("--compile is for students, and this is a teacher", hint="leave --compile out")
    vae_folder = None if config.vae is None else check_vae_folder(resolve_vae(config.vae))
    graphs = _graphs_for(config, packaged_graphs(folder), backend=backend)
    if graphs is not None and backend == "torch":
        backend = "onnx"
    return ModelTarget(
        # By its own name, so that the records hold when this version's stand-in has made way for a student.
        source=EMBEDDED_TEACHER if config.model == EMBEDDED and info.kind == "teacher" else config.model,
        info=info,
        model_id=model_fingerprint(folder),
        backend=backend,
        vae=config.vae,
        vae_folder=vae_folder,
        vae_id=None if vae_folder is None else model_fingerprint(vae_folder),
        provider="auto" if graphs is None else "cpu",
        graphs=graphs,
    )


def _graphs_for(config: GenerateConfig, folder: Path | None, *, backend: str) -> ExportInfo | None:
    """The packaged student's graphs where they draw; None where torch does.

    Without a word about the backend they draw on a CPU whatever they can: they start in a fraction of torch's time.
    Raises UsageError where another backend than torch is asked for together with what only torch can do.
    """
    chosen = config.backend != "auto"
    if folder is None or config.backend == "torch":
        if backend != "torch":
            raise UsageError(
                f"this installation has no graphs of {config.model}, and --backend says {backend}",
                hint=f"export it, and give --model that folder: tiue export {config.model}",
            )
        return None
    needs_torch = {
        "--vae": config.vae is not None,
        "--compile": config.compiled,
        "--long-prompts chunk": config.long_prompts == "chunk",
        "--encoder-timestep first": config.encoder_timestep == "first",
        "--lora": chosen and bool(config.loras),
        f"--precision {config.dtype}": config.dtype not in ("auto", "fp32") and backend != "openvino",
        "--device cuda": config.device == "cuda",
    }
    option = next((option for option, given in needs_torch.items() if given), None)
    if option is not None:
        if chosen:
            raise UsageError(f"{option} needs torch, and --backend says {backend}", hint="leave --backend out")
        return None
    if not chosen and config.device == "auto":
        from tiue_cli.backends.cuda import device_count

        if device_count() > 0:
            return None
    info = ExportInfo(folder, read_export_manifest(folder))
    if backend == "openvino":
        check_export_options(info, backend=backend, vae=None, dtype=config.dtype, device=config.device, provider="auto")
    return info


def _export_target(config: GenerateConfig, info: ExportInfo, *, backend: str) -> ModelTarget:
    _refuse_other_kinds_options(config, info)
    if config.long_prompts == "chunk":
        raise UsageError(
            f"--long-prompts chunk is for model folders: the graphs of an export read {info.text_tokens} tokens",
            hint=f"leave it out, or draw with the student: --model {info.manifest.student.source}",
        )
    if config.compiled:
        raise UsageError(
            "--compile is for model folders, and this is an export", hint="leave it out: an export is compiled already"
        )
    provider = check_export_options(
        info,
        backend=backend,
        vae=config.vae,
        dtype=config.dtype,
        device=config.device,
        provider=config.provider,
    )
    return ModelTarget(
        source=config.model,
        info=info,
        model_id=info.model_id,
        backend=backend,
        vae=None,
        vae_folder=None,
        vae_id=None,
        provider=provider,
        takes_loras=backend == "trt" and _has_engine_for_loras(info),
    )


def _has_engine_for_loras(info: ExportInfo) -> bool:
    """Whether the engine that was named, or any of the export, can be refitted; which one fits is known with the GPU.

    Raises ManifestError.
    """
    if info.manifest.student.loras:
        return False
    folders = [info.engine] if info.engine is not None else [file.parent for file in engine_manifests(info.path)]
    return any(read_engine_manifest(folder).takes_loras for folder in folders)


@functools.lru_cache(maxsize=64)
def student_timesteps(info: ModelInfo | ExportInfo, steps: int | None) -> tuple[int, ...]:
    """The decoder timesteps of a run with ``steps`` of them (None: the student's own). Raises UsageError."""
    if isinstance(info, ExportInfo):
        return info.manifest.combine(steps).timesteps
    from tiue_cli.model.schedule import RELEASED_SPACING, STEPS, combine_for_run, decoder_timesteps

    scheduler_config = read_json(info.folder("scheduler") / "scheduler_config.json")
    if info.manifest is None:
        spacing: str = RELEASED_SPACING
        trained = decoder_timesteps(scheduler_config, STEPS, spacing=spacing)
    else:
        trained, spacing = info.manifest.decoder_timesteps, info.manifest.spacing
    return combine_for_run(scheduler_config, trained, spacing=spacing, steps=steps).timesteps


def _refuse_other_kinds_options(config: GenerateConfig, info: ModelInfo | ExportInfo) -> None:
    if info.kind == "teacher" and config.steps is not None:
        raise UsageError(
            f"--steps counts the decoder timesteps of a student, and {config.model} is a teacher",
            hint="use --teacher-steps N; a student without tiue.json is known by a folder name like loopfree-sd…",
        )
    if config.encoder_timestep != "trained" and (info.kind == "teacher" or isinstance(info, ExportInfo)):
        raise UsageError(
            f"--encoder-timestep is for student folders, and {config.model} is "
            f"{'a teacher' if info.kind == 'teacher' else 'an export, whose UNet encoder has one timestep for good'}",
            hint="leave it out"
            if info.kind == "teacher"
            else "export such a student: see StudentModel.respaced in docs/method.md",
        )
    if config.guidance is not None and not (math.isfinite(config.guidance) and config.guidance >= 0):
        # NaN passes the range of a command-line option.
        raise UsageError(
            f"a guidance of {config.guidance:g} is impossible", hint="give a number; 1 is none, 4.5 is usual"
        )
    if info.kind == "student" and (config.guidance is not None or config.teacher_steps is not None):
        option = "--guidance" if config.guidance is not None else "--teacher-steps"
        raise UsageError(
            f"{option} is for teachers, and {config.model} is a student",
            hint=f"leave {option} out: a student makes an image in one pass, without guidance",
        )
