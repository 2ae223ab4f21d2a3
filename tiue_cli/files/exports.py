"""What an export folder holds: ``manifest.json``; that of an engine is in ``files.engines``.

Standard library and pydantic only: whatever runs an exported student reads these first. Sizes are (height, width) in
pixels; the symbolic ``height`` and ``width`` in tensor shapes are those of the latents.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.base.text import MAX_SIDE_PX
from tiue_cli.errors import ManifestError, UsageError
from tiue_cli.files.access import access_error, exists, has_file, open_file
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.png import LoraUse

EXPORT_MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"

GRAPHS: Final = ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder")
"""The graphs of an export, in the order in which an image passes them."""

GraphName = Literal["text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"]
Precision = Literal["fp16", "fp32", "int8", "fp8"]
QUANTIZED: Final = ("int8", "fp8")
"""Precisions of 8 bits: some layers in those, calibrated, and the rest in floats."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
Size = tuple[_Side, _Side]
Count = Annotated[int, Field(ge=1, le=2**20)]
"""At least one, and no more than a slip would give."""
_Timestep = Annotated[int, Field(ge=0, le=2**20)]
# No path may lead out of the folder that the manifest lies in; weights may lie in a folder below it.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
FilePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]

_EXPORT_AGAIN = "export the student again: tiue export STUDENT --out FOLDER"


class ManifestPart(pydantic.BaseModel):
    """What manifests are made of: never changed, nothing unknown in it, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


# --- export folder: manifest.json ----------------------------------------------------------------------------------


class TensorSpec(ManifestPart):
    """An input or output of a graph. A dimension is a number, or the name of one that is free."""

    name: str
    dtype: Literal["float16", "float32", "int64", "uint8"]
    shape: tuple[int | str, ...]


class FileSpec(ManifestPart):
    """A file of the folder, with what proves that it is the one that was written."""

    file: FilePath
    sha256: Sha256
    size_bytes: int = Field(ge=0, le=2**60)


class GraphSpec(ManifestPart):
    """One ONNX file; ``data`` are the external weights beside it. ``size`` None: height and width are free."""

    name: GraphName
    size: Size | None = None
    precision: Precision
    """That of the export, but where a graph was kept in floats: it leaves float16's range, or 8 bits are not for it."""
    onnx: FileSpec
    data: tuple[FileSpec, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def digest(self) -> str:
        """One SHA-256 for the graph with its external weights: what an engine names as its source."""
        lines = "".join(f"{file.file}\0{file.sha256}\n" for file in (self.onnx, *self.data))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, weights included."""
        return sum(file.size_bytes for file in (self.onnx, *self.data))

    def input_shapes(self, *, batch: int, steps: int, size: Size, factor: int) -> dict[str, tuple[int, ...]]:
        """The shape of every input for ``batch`` images of ``size`` (H, W) pixels with K ``steps``, in their order.

        ``factor`` is pixels per latent. Raises ManifestError for a free dimension whose name means nothing.
        """
        known = {"batch": batch, "steps": steps, "steps_plus_1": steps + 1}
        known |= {"image_height": size[0], "image_width": size[1]}
        latent = {"height": size[0] // factor, "width": size[1] // factor}

        def number(dim: int | str, where: str) -> int:
            if isinstance(dim, int):
                return dim
            if dim in known:
                return known[dim]
            side, _, level = dim.partition("_")
            if side not in latent or (level and not level.isdecimal()) or level == "0":
                raise ManifestError(
                    f"{self.name}: {where}: nothing is known about the dimension {dim!r}",
                    hint="export the student again",
                )
            # height_4 is a quarter of the latents' height, rounded up as the UNet's strided convolutions do.
            return math.ceil(latent[side] / int(level or 1))

        return {port.name: tuple(number(dim, port.name) for dim in port.shape) for port in self.inputs}


class CombineSpec(ManifestPart):
    """How K decoder timesteps make an image: what to feed as ``timesteps`` (K) and ``weights`` (K + 1)."""

    timesteps: tuple[_Timestep, ...] = Field(min_length=1, max_length=1000)
    weights: tuple[float, ...]

    @pydantic.model_validator(mode="after")
    def _one_weight_more(self) -> Self:
        if len(self.weights) != len(self.timesteps) + 1:
            raise ValueError(f"{len(self.timesteps)} timesteps need {len(self.timesteps) + 1} weights")
        return self

    @property
    def steps(self) -> int:
        """K."""
        return len(self.timesteps)


class KeptLayer(ManifestPart):
    """A layer of an 8-bit graph that stays in floats, and why; ``relative_error`` is what it alone costs in 8 bits."""

    graph: GraphName
    size: Size | None = None
    layer: str
    reason: Literal["first convolution", "last convolution", "time embedding", "sensitive"]
    relative_error: float | None
    """Of all the graph's outputs; None where it was never in 8 bits."""


class AttributeShare(ManifestPart):
    """Of how many pictures the checker finds one attribute as the captions ask for it."""

    name: str
    quantized: float
    full: float


class Shares(ManifestPart):
    """Papercut's own proof, over pictures of ``captions``: in 8 bits, and before it (``full``).

    ``frechet_distance`` is that of the checker's features, an eighth of them as in ``tiue bench``, to those of renders
    of the same captions.
    """

    captions: int
    attributes: tuple[AttributeShare, ...]
    frechet_distance: float
    frechet_distance_full: float


class QuantizationSpec(ManifestPart):
    """How the 8-bit graphs of an export were made, and what it cost."""

    quantizer: str
    weights: str
    activations: str
    calibration_images: int = Field(ge=1)
    calibration_prompts: int = Field(ge=1)
    calibration_source: str
    """The file of prompts, or what stands for it."""
    graphs: tuple[GraphName, ...]
    layers: int
    """Layers with weights in those graphs, kept ones included."""
    kept: tuple[KeptLayer, ...]
    image_psnr_db: float
    """The worst of the calibration-free pictures against the graphs before."""
    papercut: Shares | None = None


class StudentSource(ManifestPart):
    """The student that was exported. Hashes are ``artifacts.sha256_folder`` of the folders."""

    source: str
    sha256: Sha256
    teacher: str
    license: str
    training_steps: int = Field(ge=0, le=2**60)
    vae_source: str | None = None
    """Folder of another autoencoder (``--vae``); None: the student's own."""
    vae_sha256: Sha256 | None = None
    vae_class: str
    loras: tuple[LoraUse, ...] = Field(default=(), exclude_if=lambda loras: not loras)
    """Adapters that were added to the student's weights."""


class Versions(ManifestPart):
    """What wrote the folder."""

    tiue: str
    torch: str
    onnx: str
    onnxruntime: str


class OutputParity(ManifestPart):
    """One output of one graph in ONNX Runtime against torch in float32, or of its plan against ONNX Runtime; the worst
    over all cases.

    ``max_error`` is absolute, in the output's unit; ``relative_error`` is the norm of the difference over the norm.
    """

    graph: GraphName
    output: str
    cases: tuple[str, ...]
    max_error: float
    relative_error: float


class RuntimeParity(ManifestPart):
    """The fixed prompts' images in another runtime than ONNX Runtime, against the same reference; PSNR of the worst."""

    runtime: Literal["openvino"]
    version: str
    precision: Literal["fp32", "bf16"]
    """What it computed the graphs' floats in."""
    image_psnr_db: float
    required_psnr_db: float

    @property
    def holds(self) -> bool:
        """Whether the images are as near as they must be."""
        return self.image_psnr_db >= self.required_psnr_db


class ExportParity(ManifestPart):
    """What was compared when the folder was written; PSNR is that of the worst of the fixed prompts' images."""

    provider: str
    outputs: tuple[OutputParity, ...] = Field(min_length=1)
    prompts: tuple[str, ...]
    image_psnr_db: float
    required_psnr_db: float
    runtimes: tuple[RuntimeParity, ...] = ()
    """Those that were installed beside ONNX Runtime where the folder was written."""

    @property
    def openvino_bf16(self) -> RuntimeParity | None:
        """What OpenVINO drew in bf16; None where it, or a CPU that computes bf16, was not at hand."""
        return next((found for found in self.runtimes if found.precision == "bf16"), None)

    def rows(self) -> list[OutputParity]:
        """The outputs with the skips of a graph in one row, the worst of them: a table that people can read."""
        rows = []
        by_kind = itertools.groupby(self.outputs, key=lambda output: (output.graph, output.output.startswith("skip_")))
        for (_, is_skip), group in by_kind:
            outputs = list(group)
            if not is_skip:
                rows += outputs
                continue
            worst = {
                "output": f"{outputs[0].output} … {outputs[-1].output}",
                "max_error": max(output.max_error for output in outputs),
                "relative_error": max(output.relative_error for output in outputs),
            }
            rows.append(outputs[0].model_copy(update=worst))
        return rows


class ExportManifest(ManifestPart):
    """``manifest.json``: everything needed to run the graphs without torch, and to know what they are."""

    format_version: int = 1
    kind: Literal["export"] = "export"
    name: str
    student: StudentSource
    versions: Versions
    opset: int = Field(ge=1, le=1000)
    precision: Precision
    encoder_timestep: _Timestep
    spacing: Literal["leading", "trailing", "explicit"]
    prediction_type: Literal["epsilon", "v_prediction"]
    combines: tuple[CombineSpec, ...] = Field(min_length=1)
    """One for each K that the student can run with, ascending; the last is the one it was trained with."""
    text_tokens: int = Field(ge=3, le=2**14)
    """Length of ``input_ids``, start and end token included."""
    text_width: Count
    pad_token_id: int = Field(ge=0, le=2**30)
    latent_channels: int = Field(ge=1, le=2**10)
    latent_factor: int = Field(ge=1, le=2**10)
    """Pixels per latent, along each side."""
    default_size: Size
    sizes: tuple[Size, ...] = ()
    """The fixed sizes, each with graphs of its own; empty: one set of graphs takes any size."""
    tokenizer: FileSpec
    graphs: tuple[GraphSpec, ...]
    parity: ExportParity | None
    """None only where the check was switched off."""
    quantization: QuantizationSpec | None = None
    """How graphs came to 8 bits; None in other precisions."""
    notes: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Self:
        steps = [combine.steps for combine in self.combines]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError("combines must be ascending in their number of steps")
        present = {(graph.name, graph.size) for graph in self.graphs}
        wanted: set[tuple[str, Size | None]] = {("text_encoder", None)}
        wanted |= {(name, size) for name in GRAPHS[1:] for size in (self.sizes or (None,))}
        if present != wanted or len(self.graphs) != len(wanted):
            raise ValueError(f"graphs must be exactly {', '.join(GRAPHS)}, for each of the sizes")
        if self.sizes and self.default_size not in self.sizes:
            raise ValueError("default_size must be one of sizes")
        return self

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of decoder timesteps to choose from, ascending; the last is the default."""
        return tuple(combine.steps for combine in self.combines)

    def combine(self, steps: int | None = None) -> CombineSpec:
        """Timesteps and weights for ``steps`` (None: what the student was trained with). Raises UsageError."""
        if steps is None:
            return self.combines[-1]
        for combine in self.combines:
            if combine.steps == steps:
                return combine
        choices = ", ".join(str(number) for number in self.steps)
        raise UsageError(f"this export cannot draw with {steps} steps", hint=f"choose one of: {choices}")

    def graph(self, name: GraphName, *, size: Size | None = None) -> GraphSpec:
        """The graph for images of ``size``; None takes the default size. UsageError for a size it was not made for."""
        wanted = None if name == "text_encoder" or not self.sizes else (size or self.default_size)
        for graph in self.graphs:
            if graph.name == name and graph.size == wanted:
                return graph
        assert wanted is not None
        choices = ", ".join(f"{height}x{width}" for height, width in self.sizes)
        raise UsageError(
            f"{wanted[0]}x{wanted[1]} pixels is not one of this export's fixed sizes",
            hint=f"choose one of: {choices}; or export again with --size {wanted[0]}x{wanted[1]}",
        )

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``size`` pixels. Raises UsageError for a size that does not fit."""
        factor = self.latent_factor
        if size[0] % factor or size[1] % factor:
            fitting = "x".join(str(max(factor, round(side / factor) * factor)) for side in size)
            raise UsageError(
                f"{size[0]}x{size[1]} pixels: both sides must be multiples of {factor}", hint=f"e.g. --size {fitting}"
            )
        self.graph("unet_decoder", size=size)
        return (self.latent_channels, size[0] // factor, size[1] // factor)


# --- reading and checking ------------------------------------------------------------------------------------------


def read_export_manifest(folder: Path | str) -> ExportManifest:
    """The manifest of an export folder. ManifestError names file, field and next step."""
    return read_manifest(Path(folder) / EXPORT_MANIFEST, ExportManifest)


def is_export_folder(path: Path | str) -> bool:
    """Whether a folder claims to be an export; whether it is sound is ``read_export_manifest``'s question."""
    path = Path(path)
    return not exists(path / "model_index.json") and has_file(path / EXPORT_MANIFEST, error=ManifestError)


def check_files(folder: Path | str, files: Sequence[FileSpec], *, hint: str = _EXPORT_AGAIN) -> None:
    """Compare files with what the manifest says, sizes before hashes. Raises ManifestError for the first mismatch."""
    for spec in files:
        path = Path(folder) / spec.file
        try:
            with open_file(path, error=ManifestError) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes != spec.size_bytes:
                    problem = f"it has {size_bytes} bytes, and the manifest says {spec.size_bytes}"
                elif (found := hashlib.file_digest(file, "sha256").hexdigest()) != spec.sha256:
                    problem = f"its SHA-256 is {found[:12]}…, and the manifest says {spec.sha256[:12]}…"
                else:
                    continue
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing", hint=hint) from None
        except OSError as error:
            raise access_error(path, error, error=ManifestError) from error
        raise ManifestError(f"{path} is not the file that was written: {problem}", hint=hint)
