"""Graphs whose weights are those of a model folder: ONNX's external data can point into a safetensors file.

Weights of a traced graph are the model's, transposed or cut for the runtime, in float32. Here each becomes the tensor
as it lies in the file, by offset, and the nodes that make the weight of it; runtimes compute those once, as they load.
The graph itself is then kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiue_cli.errors import ParityError
from tiue_cli.export.weight_forms import Form, forms_in
from tiue_cli.model.weights import safetensors_header

_DTYPES: Final = {"F16": (np.float16, TensorProto.FLOAT16), "F32": (np.float32, TensorProto.FLOAT)}
SMALLEST: Final = 1024
"""Bytes up to which a constant stays in the graph."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: ``location`` is the file from the graph's folder, ``values`` are in float32."""

    name: str
    location: str
    offset: int
    values: np.ndarray
    onnx_type: int


def stored_tensors(folder: Path, locations: Mapping[str, str]) -> list[StoredTensor]:
    """All floating-point tensors in the files of ``locations`` (prefix → file below ``folder``), by prefix and name."""
    found = []
    for prefix, location in locations.items():
        tensors = safetensors_header(folder / location)
        content = (folder / location).read_bytes()
        # The tensors fill the end of the file without gaps.
        start = len(content) - max(entry["data_offsets"][1] for entry in tensors.values())
        for name, entry in sorted(tensors.items()):
            if entry["dtype"] not in _DTYPES:
                continue
            dtype, onnx_type = _DTYPES[entry["dtype"]]
            begin, end = (start + place for place in entry["data_offsets"])
            values = np.frombuffer(content[begin:end], dtype).reshape(entry["shape"]).astype(np.float32)
            found.append(StoredTensor(f"stored.{prefix}.{name}", location, begin, values, onnx_type))
    return found


def share_weights(model: onnx.ModelProto, tensors: list[StoredTensor]) -> None:
    """Point the float32 weights of ``model`` into the files of ``tensors``, in place.

    Raises ParityError for a weight that no tensor holds: the graph is not that of this model.
    """
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    kept: list[onnx.TensorProto] = []
    used: dict[str, onnx.TensorProto] = {}
    for initializer in graph.initializer:
        values = numpy_helper.to_array(initializer)
        if values.dtype != np.float32 or values.nbytes <= SMALLEST:
            kept.append(_inline(initializer))
            continue
        found = next(((tensor, form) for tensor in tensors for form in forms_in(values, tensor.values)), None)
        if found is None:
            if values.shape[0] == 1:  # computed of several: the sum of position embeddings, a folded time
                kept.append(_inline(initializer))
                continue
            raise ParityError(
                f"{graph.name}: no tensor of the model holds the weight {initializer.name} {values.shape}",
                hint="export the graphs from this very folder",
            )
        tensor, form = found
        used.setdefault(tensor.name, _external(tensor))
        nodes += _made_of(tensor, initializer.name, form, kept)
    del graph.initializer[:]
    graph.initializer.extend([*kept, *used.values()])
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)


def _made_of(
    tensor: StoredTensor, name: str, form: Form, constants: list[onnx.TensorProto]
) -> Iterator[onnx.NodeProto]:
    """Nodes that make the weight ``name`` of the stored tensor; their constants are added to ``constants``."""
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if form == "transposed":
        steps.append(("Transpose", [], {"perm": [1, 0]}))
    elif form != "same":
        borders = {f"{name}_starts": form[0], f"{name}_ends": form[1], f"{name}_axes": 1}
        constants += [numpy_helper.from_array(np.array([value]), label) for label, value in borders.items()]
        steps.append(("Slice", list(borders), {}))
    if tensor.onnx_type != TensorProto.FLOAT:
        steps.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if not steps:
        steps.append(("Identity", [], {}))
    value = tensor.name
    for number, (operator, more, attributes) in enumerate(steps):
        made = name if number == len(steps) - 1 else f"{name}_{operator.lower()}"
        yield helper.make_node(operator, [value, *more], [made], name=f"{made}_made", **attributes)
        value = made


def _external(tensor: StoredTensor) -> onnx.TensorProto:
    made = onnx.TensorProto(name=tensor.name, data_type=tensor.onnx_type, dims=tensor.values.shape)
    made.data_location = TensorProto.EXTERNAL
    itemsize = 2 if tensor.onnx_type == TensorProto.FLOAT16 else 4
    entries = {"location": tensor.location, "offset": tensor.offset, "length": tensor.values.size * itemsize}
    for key, value in entries.items():
        made.external_data.add(key=key, value=str(value))
    return made


def _inline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
