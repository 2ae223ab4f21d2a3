"""Which weights of a graph are which layers': what must stay changeable in an engine that takes LoRAs.

The exporter names folded weights by number, so they are found by their values: each is compared, bit for bit, with the
student's layers in every form that tracing leaves them in. What matches no layer, or several, stays fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from tiue_cli.export.weight_forms import forms_in
from tiue_cli.files.engines import RefitWeight
from tiue_cli.files.exports import GraphSpec
from tiue_cli.model.lora.exported import TIME_PROJECTION, ExportedWeights

_TIME_ERROR: Final = 1e-3
"""Relative, of a time projection's constant: another machine may have summed it in another order."""

Weights = Mapping[str, np.ndarray]


def graph_weights(onnx_file: Path) -> dict[str, np.ndarray]:
    """The floating-point weights of a graph by name, scalars and vectors left out; external ones are read."""
    model = onnx.load(str(onnx_file))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: value for name, value in tensors.items() if value.ndim > 1 and value.dtype.kind == "f"}


def refit_weights(
    graph: GraphSpec, weights: Weights, student: ExportedWeights
) -> tuple[tuple[RefitWeight, ...], tuple[str, ...]]:
    """The ``weights`` of ``graph`` that are layers of the student, and the names of layers that were not found."""
    found: dict[str, list[RefitWeight]] = {
        layer: list(_forms(graph, layer, weights, student)) for layer in student.layers(graph.name)
    }
    claims = Counter(weight.name for matches in found.values() for weight in matches)
    for layer, matches in found.items():
        if not _is_whole(matches, student, graph) or any(claims[weight.name] > 1 for weight in matches):
            found[layer] = []
    times = [layer for layer in found if _is_time(graph, layer)]
    if not all(found[layer] for layer in times):  # the time embedding changes all of them or none
        found |= {layer: [] for layer in times}
    missing = tuple(layer for layer, matches in found.items() if not matches)
    return tuple(sorted((w for matches in found.values() for w in matches), key=lambda w: w.name)), missing


def _forms(graph: GraphSpec, layer: str, weights: Weights, student: ExportedWeights) -> Iterator[RefitWeight]:
    """Every weight of the graph that is ``layer``'s, or a part of it."""
    if _is_time(graph, layer):
        constant = student.array(graph, RefitWeight(name="", layer=layer, form="time"))
        shapes = _with_ones(constant.size)
        for name, value in weights.items():
            if value.shape in shapes and _nearly_equal(value, constant):
                yield RefitWeight(name=name, layer=layer, form="time")
        return
    whole = student.array(graph, RefitWeight(name="", layer=layer))
    for name, value in weights.items():
        for form in forms_in(value, whole):
            if isinstance(form, tuple):
                yield RefitWeight(name=name, layer=layer, columns=form)
            else:
                yield RefitWeight(name=name, layer=layer, form=form)


def _is_time(graph: GraphSpec, layer: str) -> bool:
    return graph.name == "unet_encoder" and layer.endswith(TIME_PROJECTION)


def _is_whole(matches: Sequence[RefitWeight], student: ExportedWeights, graph: GraphSpec) -> bool:
    """Whether the matches are all of the layer: itself, or parts that leave no column out."""
    if any(weight.columns is None for weight in matches):
        return True
    reached = 0
    for start, stop in sorted(weight.columns for weight in matches if weight.columns is not None):
        reached = max(reached, stop) if start <= reached else reached
    return bool(matches) and reached == student.inputs(graph.name, matches[0].layer)


def _with_ones(size: int) -> list[tuple[int, ...]]:
    """The shapes that a constant of ``size`` channels may have got."""
    return [(1, size), (1, size, 1, 1), (size, 1, 1)]


def _nearly_equal(value: np.ndarray, other: np.ndarray) -> bool:
    difference = value.astype(np.float64).ravel() - other.astype(np.float64).ravel()
    return bool(np.linalg.norm(difference) <= _TIME_ERROR * np.linalg.norm(other.astype(np.float64)))
