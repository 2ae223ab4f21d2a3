"""A student's layers as the graphs of its export hold them, with LoRAs added or without.

Tracing leaves a convolution's weight as it is, transposes that of a linear layer, cuts what the sharing UNet decoder
reads in two parts, and makes constants of the UNet encoder's time projections. `ExportedWeights.array` gives any of
them for the adapters that are on the layers now: what a TensorRT engine is refitted with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from tiue_cli.files.engines import RefitWeight
from tiue_cli.files.exports import ExportManifest, GraphName, GraphSpec, Precision
from tiue_cli.files.png import LoraUse
from tiue_cli.model.components import load_components
from tiue_cli.model.lora.adapters import Adapters
from tiue_cli.model.lora.layers import Part
from tiue_cli.model.lora.source import exported_student
from tiue_cli.model.unet import time_embedding, time_projection

if TYPE_CHECKING:
    import numpy as np

TIME_PROJECTION: Final = ".time_emb_proj"
_DECODER: Final = ("up_blocks.", "conv_out")
_BOTH: Final = "time_embedding."
_DTYPES: Final[dict[Precision, torch.dtype]] = {"fp16": torch.float16, "fp32": torch.float32}
_PREFIX: Final = "text_model."
"""Of a text encoder's layers, in front of their names before transformers 5."""

Touched = frozenset[tuple[Part, str]]
"""Layers that adapters have changed, by part and name."""


class ExportedWeights:
    """The layers of an export's student, in main memory in float32: the precision that exports are traced from."""

    def __init__(self, folder: Path, manifest: ExportManifest) -> None:
        """Load the student of the export in ``folder``. Raises AdapterError where it is not at hand any more."""
        parts = load_components(exported_student(folder, manifest))
        self._modules: dict[Part, nn.Module] = {"unet": parts.unet, "text_encoder": parts.text_encoder}
        self._unet = parts.unet
        self._timestep = manifest.encoder_timestep
        self._adapters = Adapters(unet=parts.unet, text_encoder=parts.text_encoder)

    def use(self, uses: Sequence[LoraUse]) -> Touched:
        """Put exactly these on the layers; returns those that may have changed. Raises AdapterError."""
        before = self.touched
        self._adapters.use(uses)
        return before | self.touched

    @property
    def touched(self) -> Touched:
        """The layers that are not the student's own now."""
        return frozenset((part, _plain(name)) for part, name in self._adapters.touched)

    def layers(self, graph: GraphName) -> Iterator[str]:
        """Names of the linear and convolution layers in ``graph``; the UNet encoder has its time embedding folded."""
        part = _part(graph)
        for name, layer in self._modules[part].named_modules():
            plain = _plain(name)
            folded = graph == "unet_encoder" and plain.startswith(_BOTH)
            if isinstance(layer, nn.Linear | nn.Conv2d) and graph in _graphs_with(plain, part=part) and not folded:
                yield plain

    @torch.no_grad()
    def array(self, graph: GraphSpec, weight: RefitWeight) -> np.ndarray:
        """The weight as ``graph`` has it, in its precision, with the adapters of the last ``use``."""
        tensor = self._time(weight.layer) if weight.form == "time" else self._weight(graph.name, weight.layer)
        if weight.form == "transposed":
            tensor = tensor.T
        if weight.columns is not None:
            tensor = tensor[:, slice(*weight.columns)]
        return tensor.to(_DTYPES[graph.precision]).clone(memory_format=torch.contiguous_format).numpy()

    def inputs(self, graph: GraphName, layer: str) -> int:
        """How many inputs a layer has: the columns of its weight."""
        return self._weight(graph, layer).shape[1]

    def _weight(self, graph: GraphName, layer: str) -> Tensor:
        module = self._modules[_part(graph)]
        if graph == "text_encoder" and hasattr(module, _PREFIX.rstrip(".")):
            layer = _PREFIX + layer
        weight: Tensor = module.get_submodule(layer).weight  # type: ignore[assignment]
        return weight

    def _time(self, layer: str) -> Tensor:
        """The constant that the time projection of a residual block of the UNet encoder becomes, (1, C)."""
        resnet = self._unet.get_submodule(layer.removesuffix(TIME_PROJECTION))
        embedding = time_embedding(self._unet, torch.tensor([self._timestep]), torch.float32)
        return time_projection(resnet, embedding)


def changed_weights(weights: Sequence[RefitWeight], layers: Touched, *, graph: GraphName) -> list[str]:
    """Names of those of a graph's ``weights`` that are others where ``layers`` are."""
    own = {layer for part, layer in layers if part == _part(graph)}
    folded = any(layer.startswith(_BOTH) for layer in own)
    return [weight.name for weight in weights if weight.layer in own or (folded and weight.form == "time")]


def fixed_layers(weights: Sequence[RefitWeight], layers: Touched, *, graph: GraphName) -> list[str]:
    """Names of those ``layers`` that are in ``graph`` and of which ``weights`` do not hold all."""
    held = {weight.layer for weight in weights}
    times = any(weight.form == "time" for weight in weights)
    inside = [layer for part, layer in layers if graph in _graphs_with(layer, part=part)]
    return sorted(
        layer
        for layer in inside
        if not (times if graph == "unet_encoder" and layer.startswith(_BOTH) else layer in held)
    )


def _graphs_with(layer: str, *, part: Part) -> tuple[GraphName, ...]:
    """The graphs of an export that a layer takes part in."""
    if part == "text_encoder":
        return ("text_encoder",)
    if layer.startswith(_BOTH):
        return ("unet_encoder", "unet_decoder")
    return ("unet_decoder",) if layer.startswith(_DECODER) else ("unet_encoder",)


def _part(graph: GraphName) -> Part:
    return "text_encoder" if graph == "text_encoder" else "unet"


def _plain(layer: str) -> str:
    return layer.removeprefix(_PREFIX)
