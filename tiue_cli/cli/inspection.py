"""``tiue inspect``: what a picture says about itself, and what a model folder is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.base.text import bytes_text
from tiue_cli.errors import UsageError
from tiue_cli.files.access import kind_of, user_path
from tiue_cli.files.engines import EngineManifest, engine_manifests, read_engine_manifest
from tiue_cli.files.exports import GraphSpec, QuantizationSpec, TensorSpec
from tiue_cli.files.png import (
    CHUNK,
    PARAMETERS_CHUNK,
    GridRecord,
    ImageRecord,
    ImageSpec,
    read_record,
    read_text_chunks,
    split_parameters,
)
from tiue_cli.generate.target import ExportInfo, find_export
from tiue_cli.model.folder import ModelInfo, check_model_folder
from tiue_cli.model.hub import EMBEDDED_NAMES, is_hub_id, resolve_model
from tiue_cli.model.identity import model_fingerprint


@dataclass(frozen=True)
class ImageReport:
    """A picture of ours, or one that carries the usual ``parameters`` text (then without record and command)."""

    path: Path
    prompt: str
    settings: dict[str, str]
    command: str | None
    record: ImageRecord | None
    parameters: str | None

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``."""
        return {
            "what": "image",
            "path": str(self.path),
            "parameters": self.parameters,
            "record": None if self.record is None else self.record.model_dump(mode="json"),
            "command": self.command,
        }


@dataclass(frozen=True)
class GridReport:
    """A contact sheet of ours."""

    path: Path
    columns: int
    images: tuple[ImageSpec, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``."""
        images = [image.model_dump(mode="json") for image in self.images]
        return {"what": "grid", "path": str(self.path), "columns": self.columns, "images": images}


@dataclass(frozen=True)
class FolderReport:
    """A model folder."""

    source: str
    info: ModelInfo
    model_id: str

    @property
    def title(self) -> str:
        """Its name and what it is."""
        return f"{self.source}: a {self.info.kind}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about it."""
        return self.info.notes

    @property
    def rows(self) -> dict[str, str]:
        """What there is to know, for people."""
        info = self.info
        kind_rows = _student_rows(info) if info.kind == "student" else {"timesteps": "any number (a many-step teacher)"}
        dtypes = sorted({dtype for component in info.components for dtype in component.dtypes})
        return {
            "image size": f"{_pair(info.image_size)} pixels, or other multiples of {info.factor}",
            "latents": f"{info.latent_channels} x {_pair(info.sample_size)}",
            "prompt": f"up to {info.text_tokens} tokens, width {info.text_width}",
            "unet": f"widths {', '.join(str(width) for width in info.unet_widths)}",
            "autoencoder": f"{info.vae_class}, {info.factor} pixels a latent",
            "scheduler": f"{info.scheduler_class}, predicts {info.prediction_type}",
            **kind_rows,
            "licence": info.license,
            "weights": f"{info.parameters / 1e6:,.1f} M parameters, "
            f"{bytes_text(info.size_bytes)} ({', '.join(dtypes)})",
            "id": self.model_id,
            "folder": str(info.path),
            "try it": f'tiue generate --model {shlex.quote(self.source)} "a prompt"',
        }

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``; sizes are [height, width]."""
        return {"what": "model", "source": self.source, "id": self.model_id, **self.info.model_dump(mode="json")}


@dataclass(frozen=True)
class ExportReport:
    """An export folder, or one of the engine folders in it."""

    source: str
    info: ExportInfo
    engine: EngineManifest | None = None

    @property
    def title(self) -> str:
        """Its name and what it is."""
        return f"{self.source}: {'TensorRT engines' if self.engine is not None else 'an exported student'}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about it."""
        return self.info.notes if self.engine is None else self.engine.notes

    @property
    def rows(self) -> dict[str, str]:
        """What there is to know, for people."""
        rows = export_rows(self.info) if self.engine is None else engine_rows(self.engine)
        return {
            **rows,
            "folder": str(self.info.path if self.info.engine is None else self.info.engine),
            "try it": f'tiue generate --model {shlex.quote(self.source)} "a prompt"',
        }

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``: the manifest as it lies there."""
        manifest = self.info.manifest if self.engine is None else self.engine
        return {
            "what": manifest.kind,
            "source": self.source,
            "id": self.info.model_id,
            **manifest.model_dump(mode="json"),
        }


Report = ImageReport | GridReport | FolderReport | ExportReport


def inspect_source(source: str) -> Report:
    """Say what ``source`` is: a PNG, a model, export or engine folder, or the name of an embedded model.

    Raises UsageError for anything else, ManifestError for a damaged record, and what ``check_model_folder`` raises.
    """
    if source not in EMBEDDED_NAMES:
        path = user_path(source)
        kind = kind_of(path)
        if kind == "file" and path.suffix.lower() != ".safetensors":
            return _inspect_png(path)
        if path.suffix.lower() == ".png" and kind == "nothing":
            raise UsageError(f"{path} does not exist", hint="check the path")
        if is_hub_id(source):
            raise UsageError(
                f"{source} is not on this disk, and inspect reads local files only",
                hint="check the path; tiue generate --model OWNER/NAME downloads a model from the hub",
            )
    if (info := find_export(source)) is not None:
        return ExportReport(source, info, None if info.engine is None else read_engine_manifest(info.engine))
    folder = resolve_model(source)
    return FolderReport(source, check_model_folder(folder), model_fingerprint(folder))


def _inspect_png(path: Path) -> ImageReport | GridReport:
    chunks = read_text_chunks(path)
    parameters = chunks.get(PARAMETERS_CHUNK)
    record = read_record(path) if CHUNK in chunks else None
    if isinstance(record, GridRecord):
        return GridReport(path, record.columns, record.images)
    if record is not None:
        return ImageReport(path, record.prompt, _settings(record), record.command(), record, parameters)
    if parameters is None:
        raise UsageError(
            f"{path} does not say how it was made", hint="tiue generate records that, unless --no-metadata is given"
        )
    found = split_parameters(parameters)
    rows = {
        "negative prompt": found.negative_prompt,
        "settings": found.settings,
        "written by": "another program: there is no tiue command for it",
    }
    settings = {name: value for name, value in rows.items() if value}
    return ImageReport(path, found.prompt, settings, None, None, parameters)


def _settings(record: ImageRecord) -> dict[str, str]:
    steps = "sampler steps" if record.kind == "teacher" else "decoder timesteps, one pass"
    settings = {
        "seed": str(record.seed),
        "size": _pair(record.size),
        "steps": f"{record.steps} {steps}",
        "model": f"{record.model} ({record.kind}, id {record.model_id})",
        "computed": f"{record.backend} on {record.device} in {record.dtype}, tiue {record.tiue_version}",
    }
    if record.guidance is not None:
        settings["guidance"] = str(record.guidance)
    if record.vae is not None:
        settings["autoencoder"] = f"{record.vae} (id {record.vae_id})"
    return settings


def export_rows(info: ExportInfo) -> dict[str, str]:
    """An export, for people."""
    manifest = info.manifest
    student, parity = manifest.student, manifest.parity
    sizes = ", ".join(_pair(size) for size in manifest.sizes) or f"any multiples of {manifest.latent_factor}"
    trained = manifest.combines[-1]
    graphs = {graph.onnx.file.removesuffix(".onnx"): _graph_row(graph) for graph in manifest.graphs}
    return {
        "student": f"{student.source} (sha256 {student.sha256[:12]})",
        "teacher": student.teacher,
        "training": f"{student.training_steps:,} steps" if student.training_steps else "not trained yet",
        "licence": student.license,
        "image size": f"{_pair(manifest.default_size)} pixels; sizes: {sizes}",
        "latents": f"{manifest.latent_channels} channels, {manifest.latent_factor} pixels a latent",
        "autoencoder": f"{student.vae_class}, {student.vae_source or 'of the student'}",
        "prompt": f"up to {manifest.text_tokens} tokens, width {manifest.text_width}",
        "timesteps": f"{', '.join(map(str, trained.timesteps))} ({manifest.spacing} spacing; UNet encoder at "
        f"{manifest.encoder_timestep}); --steps {', '.join(map(str, manifest.steps))}",
        "precision": f"{manifest.precision}, opset {manifest.opset}",
        **({} if manifest.quantization is None else {"8 bits": _quantization_row(manifest.quantization)}),
        **graphs,
        "checked": "no (--no-check)"
        if parity is None
        else f"images {parity.image_psnr_db:.1f} dB against torch in fp32 ({parity.required_psnr_db:.0f} needed), "
        f"largest relative error of an output {max(output.relative_error for output in parity.outputs):.1e}",
        "written by": f"tiue {manifest.versions.tiue}, torch {manifest.versions.torch}, onnx {manifest.versions.onnx}, "
        f"ONNX Runtime {manifest.versions.onnxruntime}",
        "engines": ", ".join(path.parent.name for path in engine_manifests(info.path)) or "none",
        "id": info.model_id,
    }


def _quantization_row(made: QuantizationSpec) -> str:
    """Such as ``138 of 151 layers, images 31.8 dB from fp32's; calibrated with 128 images of papercut``."""
    return (
        f"{made.layers - len(made.kept)} of {made.layers} layers, images {made.image_psnr_db:.1f} dB from fp32's;"
        f" calibrated with {made.calibration_images} images of {made.calibration_source}"
    )


def _graph_row(graph: GraphSpec) -> str:
    """Such as ``2.6 MiB, fp32, sha256 a78d33a16a35, input_ids → text_states``; the hashes are those of sha256sum."""
    ports = f"{_names(graph.inputs)} → {_names(graph.outputs)}"
    data = "".join(f", {file.file} {file.sha256[:12]}" for file in graph.data)
    return f"{bytes_text(graph.size_bytes)}, {graph.precision}, sha256 {graph.onnx.sha256[:12]}{data}, {ports}"


def _names(ports: Sequence[TensorSpec]) -> str:
    names = [port.name for port in ports]
    skips = [name for name in names if name.startswith("skip_")]
    shown = [name for name in names if name not in skips[1:]]
    return ", ".join(f"{name} … {skips[-1]}" if name in skips and len(skips) > 1 else name for name in shown)


def engine_rows(engine: EngineManifest) -> dict[str, str]:
    """Engines, for people."""
    device, parity = engine.device, engine.parity
    profiles = "; ".join(
        f"{profile.name}: batch {_range(profile.batch)}, K {_range(profile.steps)}, height {_range(profile.height)}, "
        f"width {_range(profile.width)}"
        for profile in engine.profiles
    )
    plans = {
        plan.plan.file.removesuffix(".plan"): f"{bytes_text(plan.plan.size_bytes)}, built in {plan.build_s:.0f} s"
        for plan in engine.plans
    }
    return {
        "GPU": f"{device.gpu} (compute capability {device.compute_capability})",
        "built with": f"TensorRT {device.tensorrt}, CUDA {device.cuda}, driver {device.driver}",
        "written by": f"tiue {engine.tiue_version}",
        "precision": engine.precision,
        "profiles": profiles,
        "LoRAs": "taken and changed (--refit)" if engine.takes_loras else "none: its weights are set",
        **plans,
        "checked": "no (--no-check)"
        if parity is None
        else f"images {parity.image_psnr_db:.1f} dB against {parity.reference} ({parity.required_psnr_db:.0f} needed)",
    }


def _range(range_: tuple[int, int, int]) -> str:
    low, best, high = range_
    return str(low) if low == high else f"{low} to {high} (best {best})"


def _student_rows(info: ModelInfo) -> dict[str, str]:
    if info.manifest is None:
        return {"timesteps": "not stated", "teacher": "not stated"}
    manifest = info.manifest
    timesteps = ", ".join(str(timestep) for timestep in manifest.decoder_timesteps)
    trained = f"{manifest.training_steps:,} steps" if manifest.training_steps else "not trained yet"
    return {
        "timesteps": f"{timesteps} ({manifest.spacing} spacing; UNet encoder at {manifest.encoder_timestep})",
        "teacher": manifest.teacher,
        "training": trained,
        "written by": f"tiue {manifest.tiue_version}",
    }


def _pair(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
