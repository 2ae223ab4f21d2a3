"""What each layer alone in 8 bits costs: one graph whose layers are quantised or not by a switch, run once a layer.

Every activation into or out of a layer has both values, with and without rounding, and a switch chooses: a sweep is one
session and as many runs as there are layers, where a graph a layer would have to be built, loaded and optimised anew.
Weights are inputs of that graph with the exact ones as default, and a layer in 8 bits is given rounded ones: to round
and choose all of them in every run, as activations are, took half of the time for Stable Diffusion 1.5's encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiue_cli.backends.onnx_session import session_options
from tiue_cli.model.quantization import LayerError

GATES = "tiue_gates"
"""Input of the gated graph: one bool a layer, whether it is in 8 bits."""


@dataclass(frozen=True)
class GatedGraph:
    """A graph with a switch a layer."""

    model: onnx.ModelProto
    layers: tuple[str, ...]
    """The layers' names, in the order of their switches."""
    rounded_weights: Mapping[str, Mapping[str, RoundedWeight]]
    """By layer and input of ``model``: what is fed while the layer is in 8 bits."""

    def feeds(self, on: Collection[str]) -> dict[str, np.ndarray]:
        """The switches with those of the layers ``on`` switched on, and the weights of these."""
        gates = np.array([layer in on for layer in self.layers], dtype=bool)
        weights = [item for layer in on for item in self.rounded_weights[layer].items()]
        return {GATES: gates} | {name: weight.array() for name, weight in weights}


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as the graph in 8 bits holds it."""

    stored: onnx.TensorProto
    scale: onnx.TensorProto
    zero_point: onnx.TensorProto | None
    axis: int

    def array(self) -> np.ndarray:
        """What ONNX's DequantizeLinear makes of it."""
        scale = numpy_helper.to_array(self.scale)
        shape = [1] * len(self.stored.dims)
        if scale.ndim:
            shape[self.axis] = -1
        values = numpy_helper.to_array(self.stored).astype(np.float32)
        if self.zero_point is not None:
            values -= numpy_helper.to_array(self.zero_point).astype(np.float32).reshape(shape)
        return (values * scale.astype(np.float32).reshape(shape)).astype(scale.dtype)


def gated_layers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> GatedGraph:
    """``quantized`` (Q/DQ form of ``model``) with a switch a layer."""
    gated = onnx.ModelProto()
    gated.CopyFrom(quantized)
    graph = gated.graph
    aside = _set_outputs_aside(graph)
    made = {name: node for node in graph.node for name in node.output}
    plain = {node.name: node for node in model.graph.node}
    layers = tuple(node.name for node in graph.node if node.name in plain and _is_quantized(node, made))
    numbers = {name: index for index, name in enumerate(layers)}

    edges, weights = _Edges(numbers), _Weights(model, quantized)
    nodes = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            dequantize = made.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = made.get(dequantize.input[0])
            if quantize is None or quantize.op_type != "QuantizeLinear":
                node.input[position] = weights.given(node.name, plain[node.name].input[position], dequantize)
                continue
            original = quantize.input[0]
            producer = made.get(original)
            owners = {numbers.get(node.name), None if producer is None else numbers.get(producer.name)} - {None}
            if owners:
                node.input[position] = edges.chosen(
                    name, original, sorted(owner for owner in owners if owner is not None)
                )
                nodes += edges.take_new()
        nodes.append(node)
    for output, rounded in aside.items():
        original = made[made[rounded].input[0]].input[0]
        owner = numbers.get(made[original].name)
        choice = original if owner is None else edges.chosen(rounded, original, [owner])
        nodes += [*edges.take_new(), helper.make_node("Identity", [choice], [output])]
    # What dequantised a weight has no reader any more, and the weights in 8 bits none either.
    nodes = [node for node in nodes if not weights.is_left_over(node)]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *weights.exact.values(), *edges.indices()])
    graph.input.extend(weights.inputs())
    graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.BOOL, [len(layers)]))
    return GatedGraph(gated, layers, weights.rounded)


def layer_errors(path: Path, gated: GatedGraph, rows: Sequence[Mapping[str, np.ndarray]]) -> list[LayerError]:
    """Run the gated graph, saved in ``path``, with each layer's switch alone; relative errors over outputs and rows."""
    import onnxruntime

    options = session_options()
    # Rewriting would fuse what the switches hold apart.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(row: Mapping[str, np.ndarray], on: Collection[str]) -> list[np.ndarray]:
        return [output.astype(np.float64) for output in session.run(None, {**row, **gated.feeds(on)})]

    squares = dict.fromkeys(gated.layers, 0.0)
    count = 0
    for row in rows:
        expected = run(row, ())
        norms = [max(float(np.linalg.norm(output)), 1e-12) for output in expected]
        count += len(expected)
        for layer in gated.layers:
            found = run(row, (layer,))
            squares[layer] += sum(
                (float(np.linalg.norm(one - other)) / norm) ** 2
                for one, other, norm in zip(found, expected, norms, strict=True)
            )
    return [LayerError(layer, float(np.sqrt(square / max(count, 1)))) for layer, square in squares.items()]


class _Weights:
    """The quantised weights of a graph as inputs of it: the exact ones are the default, rounded ones can be fed."""

    def __init__(self, model: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
        self.exact: dict[str, onnx.TensorProto] = {}
        self.rounded: dict[str, dict[str, RoundedWeight]] = {}
        self._plain = {tensor.name: tensor for tensor in model.graph.initializer}
        self._stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
        self._left_over: set[str] = set()

    def given(self, layer: str, original: str, dequantize: onnx.NodeProto) -> str:
        """The name of the input that ``layer`` reads in the place of the weight ``original``.

        Two layers with one weight get an input each, as they are rounded one by one.
        """
        name = original if original not in self.exact else f"{original}_tiue_{len(self.exact)}"
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._plain[original])
        tensor.name = name
        self.exact[name] = tensor
        self._left_over.update(dequantize.output)
        zero_point = self._stored[dequantize.input[2]] if len(dequantize.input) > 2 and dequantize.input[2] else None
        axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
        self.rounded.setdefault(layer, {})[name] = RoundedWeight(
            self._stored[dequantize.input[0]], self._stored[dequantize.input[1]], zero_point, axis
        )
        return name

    def is_left_over(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` dequantised a weight that is an input now."""
        return node.op_type == "DequantizeLinear" and not self._left_over.isdisjoint(node.output)

    def inputs(self) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, one.data_type, one.dims) for name, one in self.exact.items()]


class _Edges:
    """The switches of a graph: nodes that choose, made once for each pair of value and owners."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._numbers = numbers
        self._chosen: dict[tuple[str, tuple[int, ...]], str] = {}
        self._gates: dict[tuple[int, ...], str] = {}
        self._new: list[onnx.NodeProto] = []

    def chosen(self, rounded: str, original: str, owners: Sequence[int]) -> str:
        """The name of ``rounded`` where a layer of ``owners`` is switched on, else of ``original``."""
        key = (rounded, tuple(owners))
        if key not in self._chosen:
            name = f"tiue_chosen_{len(self._chosen)}"
            self._new.append(helper.make_node("Where", [self._gate(tuple(owners)), rounded, original], [name]))
            self._chosen[key] = name
        return self._chosen[key]

    def take_new(self) -> list[onnx.NodeProto]:
        """Nodes that were made since the last call, in order."""
        new, self._new = self._new, []
        return new

    def indices(self) -> list[onnx.TensorProto]:
        """The numbers of the switches, as constants."""
        return [numpy_helper.from_array(np.array(index), f"tiue_index_{index}") for index in self._numbers.values()]

    def _gate(self, owners: tuple[int, ...]) -> str:
        if owners in self._gates:
            return self._gates[owners]
        name = "tiue_gate_" + "_".join(map(str, owners))
        if len(owners) == 1:
            self._new.append(helper.make_node("Gather", [GATES, f"tiue_index_{owners[0]}"], [name]))
        else:
            self._new.append(helper.make_node("Or", [self._gate(owners[:1]), self._gate(owners[1:])], [name]))
        self._gates[owners] = name
        return name


def _is_quantized(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> bool:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return False
    weight = made.get(node.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def _set_outputs_aside(graph: onnx.GraphProto) -> dict[str, str]:
    """Give rounded outputs of the graph names of their own; returns output name → name of its rounded value."""
    outputs = {output.name for output in graph.output}
    aside = {
        name: f"{name}_tiue_rounded"
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for name in node.output
        if name in outputs
    }
    for node in graph.node:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                names[position] = aside.get(name, name)
    return aside
