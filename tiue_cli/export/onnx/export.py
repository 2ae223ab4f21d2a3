"""A student becomes a folder of four ONNX graphs that prove themselves.

    student ─ reference in torch, float32 ─▶ for each graph: trace ─▶ write ─▶ compare ─▶ images ─▶ manifest

One graph at a time, and each part of the model is let go once its graph is written: the peak of memory is about three
times the UNet's weights.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from transformers import CLIPTokenizer

from tiue_cli import __version__
from tiue_cli.errors import SchedulerError
from tiue_cli.export.config import ExportConfig, calibration_source, checked_student
from tiue_cli.export.onnx.graphs import (
    folded_time,
    trace_text_encoder,
    trace_unet_decoder,
    trace_unet_encoder,
    trace_vae_decoder,
)
from tiue_cli.export.onnx.parity import (
    PROVIDER,
    Case,
    Tensors,
    check_cases,
    check_graph,
    check_images,
    check_openvino,
    check_prompts,
    image_case,
    largest_magnitude,
    run_chain,
)
from tiue_cli.export.onnx.quantized_export import QuantizeRequest, quantize_export
from tiue_cli.export.onnx.trace import Trace, export_graph, file_spec
from tiue_cli.export.tolerance import REQUIRED_PSNR_DB
from tiue_cli.files.atomic import atomic_folder, terminated_as_interrupt
from tiue_cli.files.engines import engine_manifests, read_engine_manifest
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    GRAPHS,
    QUANTIZED,
    TOKENIZER,
    CombineSpec,
    ExportManifest,
    ExportParity,
    FileSpec,
    GraphName,
    GraphSpec,
    OutputParity,
    Precision,
    Size,
    StudentSource,
    Versions,
)
from tiue_cli.files.manifests import write_json
from tiue_cli.files.png import LoraUse
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import quiet
from tiue_cli.model.folder import ModelInfo
from tiue_cli.model.hub import resolve_vae
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.lora.adapters import Adapters
from tiue_cli.model.lora.files import lora_uses
from tiue_cli.model.schedule import combine_for_run
from tiue_cli.model.student import StudentModel, load_student

FLOAT16_LIMIT: Final = 65504 / 2
"""Half of the largest float16: a layer that comes closer on the check's prompts may overflow on others."""

StageFn = Callable[[str, int, int], None]
"""Called when a stage begins, with what it is, its number from 1, and how many there are."""


@dataclass(frozen=True)
class GraphTiming:
    """Seconds that one graph took: to trace and write, and to compare."""

    graph: GraphName
    size: Size | None
    trace_s: float
    check_s: float


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how long it took."""

    folder: Path
    manifest: ExportManifest
    timings: tuple[GraphTiming, ...]
    seconds: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``; times in seconds."""
        return {
            "folder": str(self.folder),
            "seconds": round(self.seconds, 1),
            "timings": [asdict(timing) for timing in self.timings],
            "notes": list(self.notes),
            "manifest": self.manifest.model_dump(mode="json"),
        }


def export_student(
    config: ExportConfig, *, info: ModelInfo | None = None, stage: StageFn | None = None
) -> ExportResult:
    """Write the export folder of a student; a failure or a kill leaves the old one or none.

    ``info`` is what ``checked_student`` has said of ``config``, where it was asked already.
    Raises what loading the student raises, UsageError for options that do not fit it, OutputError, ParityError.
    """
    started = time.perf_counter()
    info = info or checked_student(config)
    out = config.folder
    with terminated_as_interrupt(), atomic_folder(out, overwrite=config.overwrite, marker=EXPORT_MANIFEST) as folder:
        student = load_student(info, vae=config.vae)
        loras = lora_uses(config.loras)
        Adapters(unet=student.unet, text_encoder=student.text_encoder).use(loras)
        job = _Job(config, info, student, loras, folder, stage)
        manifest = job.run(name=out.resolve().name)
        notes = (*student.notes, *manifest.notes, *_carry_engines(out, folder, manifest))
    return ExportResult(out, manifest, tuple(job.timings), time.perf_counter() - started, notes)


# --- the job -------------------------------------------------------------------------------------------------------


class _Job:
    """One export, stage by stage; ``folder`` is the temporary one."""

    def __init__(
        self,
        config: ExportConfig,
        info: ModelInfo,
        student: StudentModel,
        loras: tuple[LoraUse, ...],
        folder: Path,
        stage: StageFn | None,
    ) -> None:
        self._loras = loras
        self.timings: list[GraphTiming] = []
        self._info = info
        self._student = student
        self._folder = folder
        self._stage = stage
        self._number = 0
        self._decoder = ImageDecoder(student.vae)
        sizes = config.sizes or (self._default_size,)
        self._config = replace(config, sizes=sizes) if config.fixed else config
        self._latents = {size: self._decoder.latent_size(size) for size in sizes}
        self._notes: list[str] = []

    def run(self, *, name: str) -> ExportManifest:
        """Write everything into the folder; returns the manifest."""
        tokenizer = write_tokenizer(self._student.tokenizer, self._folder / TOKENIZER)
        references, images, vae_precision = self._references()
        graphs: list[GraphSpec] = []
        outputs: list[OutputParity] = []
        for trace in self._traces(vae_precision):
            begun = time.perf_counter()
            self._say(f"{_title(trace)}: trace and write")
            graph = export_graph(trace, self._folder / self._file(trace), opset=self._config.opset)
            traced = time.perf_counter()
            if self._config.check:
                self._say(f"{_title(trace)}: compare")
                outputs += check_graph(self._folder, graph, references[trace.size])
            self.timings.append(GraphTiming(trace.name, trace.size, traced - begun, time.perf_counter() - traced))
            graphs.append(graph)
        manifest = self._manifest(name, tokenizer, graphs)
        if self._config.precision in QUANTIZED:
            manifest, outputs = self._in_8_bits(manifest, references)
        # The images run through the folder as a user would run it, so it needs a manifest first.
        write_json(self._folder / EXPORT_MANIFEST, manifest)
        if self._config.check:
            self._say("images: compare")
            parity = self._image_parity(images, outputs)
            manifest = manifest.model_copy(update={"parity": parity})
            write_json(self._folder / EXPORT_MANIFEST, manifest)
        return manifest

    def _in_8_bits(
        self, manifest: ExportManifest, references: dict[Size | None, list[tuple[Case, Tensors]]]
    ) -> tuple[ExportManifest, list[OutputParity]]:
        """The manifest with its graphs in 8 bits, and how far their outputs are from torch's."""
        config = self._config
        assert config.precision in ("int8", "fp8")
        request = QuantizeRequest(
            calibration_source(config, self._info),
            images=config.calibration_images,
            graphs=config.quantized_graphs,
            kind=config.precision,
        )
        full = manifest.model_copy(update={"precision": self._full_precision})
        graphs, record = quantize_export(self._folder, full, request, say=self._say)
        outputs: list[OutputParity] = []
        if config.check:
            self._say("8-bit graphs: compare")
            for graph in graphs:
                outputs += check_graph(self._folder, graph, references[graph.size])
        return manifest.model_copy(update={"graphs": graphs, "quantization": record}), outputs

    @property
    def _default_size(self) -> Size:
        height, width = self._info.sample_size
        return height * self._decoder.factor, width * self._decoder.factor

    @property
    def _full_precision(self) -> Precision:
        """What graphs are traced in: int8 is made of fp32, and float8, which GPUs have, of fp16."""
        made_of: dict[Precision, Precision] = {"int8": "fp32", "fp8": "fp16"}
        return made_of.get(self._config.precision, self._config.precision)

    @property
    def _steps(self) -> int:
        return len(self._student.manifest.decoder_timesteps)

    def _say(self, what: str) -> None:
        self._number += 1
        if self._stage is not None:
            graphs = 1 + 3 * len(self._latents)
            total = 2 * graphs + 2 if self._config.check else graphs
            if self._config.precision in QUANTIZED:
                names = self._config.quantized_graphs
                quantized = sum(1 if name == "text_encoder" else len(self._latents) for name in names)
                total += quantized + 3 + self._config.check
            # Where 8 bits need several tries there are more stages than that.
            self._stage(what, self._number, max(total, self._number))

    # Before any graph: the parts are cast and let go as their graphs are written.
    def _references(
        self,
    ) -> tuple[dict[Size | None, list[tuple[Case, Tensors]]], list[tuple[Case, Tensors]], Precision]:
        """The reference's tensors for each fixed size (None: any), those of the images, and the VAE's precision."""
        if not self._config.check:
            return {}, [], self._full_precision
        self._say("reference in torch")
        fixed = bool(self._config.sizes)
        parameters = self._info.component("unet").parameters
        references: dict[Size | None, list[tuple[Case, Tensors]]] = {}
        images: list[tuple[Case, Tensors]] = []
        with largest_magnitude(self._student.vae) as largest:
            for size, latent in self._latents.items():
                cases = check_cases(steps=self._steps, default=latent, parameters=parameters, fixed=fixed)
                references[size if fixed else None] = [(case, run_chain(self._student, case)) for case in cases]
                case = image_case(steps=self._steps, default=latent, parameters=parameters, fixed=fixed)
                images.append((case, _kept(run_chain(self._student, case), "noise", "images")))
        precision, note = fitting_precision(self._full_precision, largest())
        if note is not None:
            self._notes.append(note)
        # The text encoder does not know sizes: the cases of any size do.
        references.setdefault(None, next(iter(references.values())))
        return references, images, precision

    def _traces(self, vae_precision: Precision) -> Iterator[Trace]:
        """What is traced, in order; each part is cast when its turn comes, and let go when it has gone by."""
        student, config = self._student, self._config
        sizes: Sequence[Size | None] = config.sizes or (None,)
        precision = self._full_precision
        _cast(student.text_encoder, precision)
        yield replace(trace_text_encoder(student), precision=precision)
        _let_go(student.text_encoder)
        with folded_time(student.unet, student.manifest.encoder_timestep):
            _cast(student.unet, precision)
            for size in sizes:
                yield replace(trace_unet_encoder(student, size), precision=precision)
        for size in sizes:
            yield replace(trace_unet_decoder(student, size), precision=precision)
        _let_go(student.unet)
        _cast(student.vae, vae_precision)
        for size in sizes:
            yield replace(trace_vae_decoder(student, size), precision=vae_precision)

    def _file(self, trace: Trace) -> str:
        """One set of graphs has the plain names; with several sizes the size is in the name."""
        if trace.size is None or len(self._config.sizes) == 1:
            return f"{trace.name}.onnx"
        return f"{trace.name}_{trace.size[0]}x{trace.size[1]}.onnx"

    def _image_parity(self, images: list[tuple[Case, Tensors]], outputs: list[OutputParity]) -> ExportParity:
        return ExportParity(
            provider=PROVIDER,
            outputs=tuple(outputs),
            prompts=tuple(check_prompts(max(case.batch for case, _ in images))),
            image_psnr_db=check_images(self._folder, images),
            required_psnr_db=REQUIRED_PSNR_DB[self._config.precision],
            runtimes=() if self._config.precision == "fp8" else check_openvino(self._folder, images),
        )

    def _manifest(self, name: str, tokenizer: FileSpec, graphs: Sequence[GraphSpec]) -> ExportManifest:
        student, config = self._student, self._config
        vae_folder = None if config.vae is None else resolve_vae(config.vae)
        sizes = config.sizes
        return ExportManifest(
            name=name,
            student=StudentSource(
                source=config.student,
                sha256=model_sha256(self._info.path),
                teacher=student.manifest.teacher,
                license=self._info.license,
                training_steps=student.manifest.training_steps,
                vae_source=config.vae,
                vae_sha256=None if vae_folder is None else model_sha256(vae_folder),
                vae_class=type(student.vae).__name__,
                loras=self._loras,
            ),
            versions=Versions(
                tiue=__version__,
                torch=str(torch.__version__),
                onnx=str(onnx.__version__),
                onnxruntime=str(onnxruntime.__version__),
            ),
            opset=config.opset,
            precision=config.precision,
            encoder_timestep=student.manifest.encoder_timestep,
            spacing=student.manifest.spacing,
            prediction_type=student.manifest.prediction_type,
            combines=_combines(student),
            text_tokens=int(student.tokenizer.model_max_length),
            text_width=int(student.text_encoder.config.hidden_size),
            pad_token_id=int(student.tokenizer.pad_token_id),
            latent_channels=self._decoder.latent_channels,
            latent_factor=self._decoder.factor,
            default_size=sizes[0] if sizes and self._default_size not in sizes else self._default_size,
            sizes=sizes,
            tokenizer=tokenizer,
            graphs=tuple(sorted(graphs, key=lambda graph: (GRAPHS.index(graph.name), graph.size or ()))),
            parity=None,
            notes=tuple(self._notes),
        )


# --- parts ---------------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: CLIPTokenizer, path: Path) -> FileSpec:
    """Write a tokenizer with its padding and truncation set: the file that ``tokenizer.PromptTokenizer`` reads."""
    length = int(tokenizer.model_max_length)
    # A copy: padding set on the original would pad whatever else it is used for.
    copy = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    copy.enable_truncation(max_length=length)
    copy.enable_padding(length=length, pad_id=int(tokenizer.pad_token_id), pad_token=str(tokenizer.pad_token))
    path.write_text(copy.to_str(pretty=True) + "\n", encoding="utf-8")
    return file_spec(path)


def fitting_precision(asked: Precision, largest: float) -> tuple[Precision, str | None]:
    """The precision of the VAE decoder whose layers reach ``largest``, and a note where it is not the one asked for."""
    if asked == "fp32" or largest <= FLOAT16_LIMIT:
        return asked, None
    return "fp32", f"vae_decoder is kept in fp32: its layers reach {largest:.0f}, and float16 ends at 65504"


def _combines(student: StudentModel) -> tuple[CombineSpec, ...]:
    """Timesteps and weights for every K that the student can run with; the last one is its own."""
    trained, spacing = student.manifest.decoder_timesteps, student.manifest.spacing
    found = []
    for steps in range(1, len(trained) + 1) if spacing != "explicit" else (len(trained),):
        try:
            combine = combine_for_run(student.scheduler_config, trained, spacing=spacing, steps=steps)
        except SchedulerError:  # fewer steps are a bonus that not every schedule allows
            continue
        found.append(CombineSpec(timesteps=combine.timesteps, weights=combine.weights))
    return tuple(found)


def _cast(module: torch.nn.Module, precision: Precision) -> None:
    with quiet():  # diffusers warns of casts
        module.to(torch.float16 if precision == "fp16" else torch.float32)


def _let_go(module: torch.nn.Module) -> None:
    """Free the weights; what remains is the structure."""
    module.to("meta")
    gc.collect()


def _title(trace: Trace) -> str:
    return trace.name if trace.size is None else f"{trace.name} {trace.size[0]}x{trace.size[1]}"


def _kept(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensors[name] for name in names}


def _carry_engines(old: Path, new: Path, manifest: ExportManifest) -> list[str]:
    """Keep the engines of the folder that is replaced where their graphs are still these; say which are not kept."""
    digests = {(graph.name, graph.size): graph.digest for graph in manifest.graphs}
    notes = []
    for path in engine_manifests(old):
        plans = read_engine_manifest(path.parent).plans
        if all(digests.get((plan.graph, plan.size)) == plan.onnx_sha256 for plan in plans):
            shutil.copytree(path.parent, new / path.parent.name, copy_function=os.link)
        else:
            notes.append(
                f"the engines in {path.parent.name} were built from other graphs and are gone: build them again"
            )
    return notes
