"""What each layer alone in 8 bits costs: one graph whose layers are quantised or not by a switch, run once a layer.

Every edge into or out of a layer carries both values, with and without rounding, and a switch chooses: a sweep is one
session and as many runs as there are layers, where a graph a layer would have to be built, loaded and optimised anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiue_cli.backends.onnx_session import session_options
from tiue_cli.model.quantization import LayerError

GATES = "tiue_gates"
"""Input of the gated graph: one bool a layer, whether it is in 8 bits."""


def gated_layers(model: onnx.ModelProto, quantized: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """``quantized`` (Q/DQ form of ``model``) with a switch a layer, and the layers in the order of their switches."""
    gated = onnx.ModelProto()
    gated.CopyFrom(quantized)
    graph = gated.graph
    aside = _set_outputs_aside(graph)
    made = {name: node for node in graph.node for name in node.output}
    plain = {node.name: node for node in model.graph.node}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = tuple(node.name for node in graph.node if node.name in plain and _is_quantized(node, made))
    numbers = {name: index for index, name in enumerate(layers)}

    edges = _Edges(numbers)
    nodes = []
    for node in graph.node:
        for position, name in enumerate(node.input):
            dequantize = made.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = made.get(dequantize.input[0])
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                original = quantize.input[0]
                producer = made.get(original)
                owners = {numbers.get(node.name), None if producer is None else numbers.get(producer.name)} - {None}
            else:  # weights
                original = plain[node.name].input[position]
                owners = {numbers[node.name]}
                edges.weights[original] = weights[original]
            if owners:
                node.input[position] = edges.chosen(
                    name, original, sorted(owner for owner in owners if owner is not None)
                )
                nodes += edges.take_new()
        nodes.append(node)
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for name, tensor in edges.weights.items() if name not in present)
    graph.initializer.extend(edges.indices())
    for output, rounded in aside.items():
        original = made[made[rounded].input[0]].input[0]
        owner = numbers.get(made[original].name)
        choice = original if owner is None else edges.chosen(rounded, original, [owner])
        nodes += [*edges.take_new(), helper.make_node("Identity", [choice], [output])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.BOOL, [len(layers)]))
    return gated, layers


def layer_errors(path: Path, layers: Sequence[str], rows: Sequence[Mapping[str, np.ndarray]]) -> list[LayerError]:
    """Run the gated graph with each layer's switch alone; relative errors over all outputs and ``rows``."""
    import onnxruntime

    options = session_options()
    # Rewriting would fuse what the switches hold apart.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(row: Mapping[str, np.ndarray], gates: np.ndarray) -> list[np.ndarray]:
        return [output.astype(np.float64) for output in session.run(None, {**row, GATES: gates})]

    squares = np.zeros(len(layers))
    count = 0
    for row in rows:
        expected = run(row, np.zeros(len(layers), dtype=bool))
        norms = [max(float(np.linalg.norm(output)), 1e-12) for output in expected]
        count += len(expected)
        for index in range(len(layers)):
            gates = np.zeros(len(layers), dtype=bool)
            gates[index] = True
            found = run(row, gates)
            squares[index] += sum(
                (float(np.linalg.norm(one - other)) / norm) ** 2
                for one, other, norm in zip(found, expected, norms, strict=True)
            )
    return [
        LayerError(layer, float(np.sqrt(square / max(count, 1)))) for layer, square in zip(layers, squares, strict=True)
    ]


class _Edges:
    """The switches of a graph: nodes that choose, made once for each pair of value and owners."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.weights: dict[str, onnx.TensorProto] = {}
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
