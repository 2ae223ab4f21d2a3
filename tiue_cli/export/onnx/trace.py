"""From a torch module to an ONNX file: traced by torch.export, translated, folded, stripped, and written the same way
every time.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import optimize
from torch import Tensor, nn

from tiue_cli.export.onnx.translate import translations
from tiue_cli.files.exports import FileSpec, GraphName, GraphSpec, Precision, Size, TensorSpec
from tiue_cli.files.hashes import sha256_file

INLINE_BYTES: Final = 1024
"""Weights up to this size stay in the .onnx file: shapes and scales, which readers want to see."""

Dims = Sequence[int | str]


@dataclass(frozen=True)
class Port:
    """An input or output: its name, and for each dimension a number or the name of a free one."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class Trace:
    """What to trace: a module, example arguments (tensors and lists of tensors), and its ports in flat order."""

    name: GraphName
    module: nn.Module
    arguments: tuple[Any, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: Precision = "fp32"
    size: Size | None = None
    """Image size that the graph is fixed to; None: height and width are free."""


def export_graph(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
    """Trace a module and write ``path``, its weights in NAME.onnx.data beside it; returns what was written.

    The same module gives the same bytes. Peak memory: the module's weights twice.
    """
    with _silent(), torch.no_grad():
        program = torch.export.export(
            trace.module, trace.arguments, dynamic_shapes=_dynamic_shapes(trace.arguments, trace.inputs), strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            optimize=False,
            verbose=False,
            input_names=[port.name for port in trace.inputs],
            output_names=[port.name for port in trace.outputs],
            custom_translation_table=translations(opset),
        )
        assert onnx_program is not None
        model = onnx_program.model
        del program, onnx_program
        _tidy(model, trace)
    return _write(model, trace, path)


# --- tracing -------------------------------------------------------------------------------------------------------


def _dynamic_shapes(arguments: tuple[Any, ...], inputs: Sequence[Port]) -> tuple[Any, ...]:
    """torch.export's description of the free dimensions, in the structure of the arguments.

    One object for a dimension that several inputs share spares the tracer a third of its time; what one input alone has
    is left to the tracer, which rejects names for dimensions that its own conditions bound.
    """
    counts = Counter(dim for port in inputs for dim in port.dims if isinstance(dim, str))
    shared = {name: torch.export.Dim(name) for name, count in counts.items() if count > 1}
    ports = iter(inputs)

    def free(_: Tensor) -> dict[int, Any]:
        dims = enumerate(next(ports).dims)
        return {axis: shared.get(dim, torch.export.Dim.DYNAMIC) for axis, dim in dims if isinstance(dim, str)}

    return tuple(
        [free(part) for part in argument] if isinstance(argument, list) else free(argument) for argument in arguments
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporters' advice is for their developers; a failure still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# --- tidying -------------------------------------------------------------------------------------------------------


def _tidy(model: ir.Model, trace: Trace) -> None:
    """Fold all constants, whatever their size, and drop everything that says how and where the graph was made."""
    limit = 2**40
    # Weights are cut and transposed in the traced code; a runtime would do that anew at every start.
    optimize(model, input_size_limit=limit, output_size_limit=limit)
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    _check_names("input", [value.name for value in graph.inputs], trace.inputs)
    _check_names("output", [value.name for value in graph.outputs], trace.outputs)
    boundary = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for values, ports in ((graph.inputs, trace.inputs), (graph.outputs, trace.outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = ir.Shape(port.dims)
            _forget(value)
    for value in graph.initializers.values():
        _forget(value)
    for node in graph:
        _forget(node)
        for value in node.outputs:
            _forget(value)
            if id(value) not in boundary:
                # Every runtime infers these itself; the names of torch's symbols mean nothing to it.
                value.shape = value.type = None
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    graph.initializers.update(ordered)
    _forget(graph)
    _forget(model)
    graph.name = trace.name
    model.producer_name, model.producer_version = "tiue", None
    model.domain, model.model_version = None, None


def _check_names(kind: str, found: Sequence[str | None], ports: Sequence[Port]) -> None:
    wanted = [port.name for port in ports]
    assert list(found) == wanted, f"{kind}s {found}, and the format says {wanted}"


def _forget(thing: Any) -> None:
    thing.metadata_props.clear()
    thing.meta.clear()
    thing.doc_string = None


# --- writing -------------------------------------------------------------------------------------------------------


def _write(model: ir.Model, trace: Trace, path: Path) -> GraphSpec:
    data = _save(model, path, path.with_name(f"{trace.name}.onnx.data"))
    return GraphSpec(
        name=trace.name,
        size=trace.size,
        precision=trace.precision,
        onnx=file_spec(path),
        data=(file_spec(data),) if data.exists() else (),
        inputs=tuple(map(_tensor_spec, model.graph.inputs)),
        outputs=tuple(map(_tensor_spec, model.graph.outputs)),
    )


def _save(model: ir.Model, path: Path, data: Path) -> Path:
    """Write the graph, and its weights beside it; returns their file: ``data``, unless that holds other weights.

    Weights do not depend on the size, so the graphs of all sizes share one file (a link would not do: readers refuse
    linked weights as a possible attack).
    """
    own = path.with_name(f"{path.name}.data")
    if data == own or not data.exists():
        ir.save(model, path, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
        return data
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        written = Path(aside) / path.name
        ir.save(model, written, external_data=data.name, size_threshold_bytes=INLINE_BYTES)
        if sha256_file(written.with_name(data.name)) == sha256_file(data):
            written.replace(path)
            return data
    return _save(model, path, own)


def file_spec(path: Path) -> FileSpec:
    """Name, hash and size of a file on disk."""
    return FileSpec(file=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)


_DTYPES: Final[Mapping[ir.DataType, str]] = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.FLOAT: "float32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
}


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None and value.dtype is not None
    dims = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec.model_validate({"name": value.name, "dtype": _DTYPES[value.dtype], "shape": dims})
