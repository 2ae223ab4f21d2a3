"""What an engine folder holds, one for a GPU and a TensorRT version inside its export: ``engine.json``.

Standard library and pydantic only, as ``files.exports``. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from tiue_cli.files.exports import (
    Count,
    FileSpec,
    GraphName,
    ManifestPart,
    OutputParity,
    Precision,
    Sha256,
    Size,
    TensorSpec,
)
from tiue_cli.files.manifests import read_manifest

ENGINE_MANIFEST: Final = "engine.json"

Range = tuple[Count, Count, Count]
"""Minimum, optimum and maximum."""


class ProfileSpec(ManifestPart):
    """The range of one optimisation profile, in images: batch, decoder timesteps K, height and width in pixels."""

    name: str
    batch: Range
    steps: Range
    height: Range
    width: Range

    def refusal(self, *, batch: int, steps: int, size: Size) -> str | None:
        """Why a request does not fit, in words; None where it fits."""
        asked = (("batch", batch), ("steps", steps), ("height", size[0]), ("width", size[1]))
        for what, value in asked:
            low, _, high = getattr(self, what)
            if not low <= value <= high:
                return f"{what} {value} is outside {low} to {high}" if low < high else f"{what} {value} is not {low}"
        return None


class RefitWeight(ManifestPart):
    """A weight that may be changed in a plan: its name in the graph, and what it is there of which layer.

    ``same`` is the layer's weight as it is, ``transposed`` with its two sides exchanged, ``time`` what a time
    projection answers at the encoder's timestep. ``columns`` (from, to) are the inputs that a part of it is for.
    """

    name: str
    layer: str
    form: Literal["same", "transposed", "time"] = "same"
    columns: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None


class PlanSpec(ManifestPart):
    """One TensorRT plan: the graph that it was built from, and the build's figures.

    ``shapes`` holds for each profile, in the order of ``EngineManifest.profiles``, each input's (min, opt, max) shape;
    it is empty for a profile of another size. Profiles that give a graph the same shapes share one inside the plan.
    """

    graph: GraphName
    size: Size | None = None
    plan: FileSpec
    onnx_sha256: Sha256
    """``GraphSpec.digest`` of the source."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], ...]
    build_s: float
    layers: int | None = None
    device_memory_bytes: int | None = None
    refit: tuple[RefitWeight, ...] = Field(default=(), exclude_if=lambda weights: not weights)
    """The weights that a LoRA may change without building again."""

    @property
    def distinct_shapes(self) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]], ...]:
        """What TensorRT was given: the shapes that are not empty, each once, in order."""
        distinct: list[dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]] = []
        for shapes in self.shapes:
            if shapes and shapes not in distinct:
                distinct.append(shapes)
        return tuple(distinct)

    def plan_profile(self, index: int) -> int:
        """The number inside the plan of profile ``index`` of the engine, which must be one that the plan serves."""
        return self.distinct_shapes.index(self.shapes[index])


class EngineParity(ManifestPart):
    """What was compared after the build."""

    reference: str
    """The ONNX Runtime provider."""
    outputs: tuple[OutputParity, ...]
    image_psnr_db: float
    required_psnr_db: float


class EngineDevice(ManifestPart):
    """Where the plans were built: what must match before one is opened."""

    gpu: str
    compute_capability: str
    """Such as ``9.0``."""
    tensorrt: str
    cuda: str
    driver: str
    platform: str
    """Such as ``Linux-x86_64``."""


class EngineManifest(ManifestPart):
    """``engine.json``: the plans of one export for one GPU and one TensorRT version."""

    format_version: int = 1
    kind: Literal["engine"] = "engine"
    name: str
    tiue_version: str
    device: EngineDevice
    precision: Precision
    export_sha256: Sha256
    """SHA-256 of the ``manifest.json`` that the plans were built from."""
    profiles: tuple[ProfileSpec, ...] = Field(min_length=1)
    plans: tuple[PlanSpec, ...]
    build_flags: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    build_s: float
    parity: EngineParity | None
    """None only where the check was switched off."""
    notes: tuple[str, ...] = ()

    @property
    def takes_loras(self) -> bool:
        """Whether it was built for adapters that come and go (``--refit``)."""
        return any(plan.refit for plan in self.plans)


def read_engine_manifest(folder: Path | str) -> EngineManifest:
    """The manifest of an engine folder. ManifestError names file, field and next step."""
    return read_manifest(Path(folder) / ENGINE_MANIFEST, EngineManifest)


def engine_manifests(export: Path) -> list[Path]:
    """The ``engine.json`` of every engine in an export folder, by name; those that are being written do not count."""
    return sorted(path for path in export.glob(f"*/{ENGINE_MANIFEST}") if not path.parent.name.startswith("."))
