"""``config.pbtxt``: what Triton is told about a model (protobuf text of ``inference.ModelConfig``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tiue_cli.files.exports import TensorSpec

TritonBackend = Literal["onnx", "tensorrt", "python"]
MAX_DELAY_US: Final = 5000
"""How long a request waits for others."""
_TYPES: Final = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "uint8": "TYPE_UINT8",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class Port:
    """An input or output without its batch dimension; -1 is a dimension that is free."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One model of an ensemble; its ports carry the same names outside."""

    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def port_of(spec: TensorSpec) -> Port:
    """A graph's port: names of dimensions become -1, the first is the batch."""
    return Port(spec.name, spec.dtype, tuple(side if isinstance(side, int) else -1 for side in spec.shape[1:]))


def model_config(
    name: str, inputs: Sequence[Port], outputs: Sequence[Port], *, backend: TritonBackend, max_batch: int
) -> str:
    """The config of one model with dynamic batching."""
    preferred = ", ".join(str(size) for size in (4, 8, 16, 32, 64) if size <= max_batch) or str(max_batch)
    platform = 'backend: "python"' if backend == "python" else 'platform: "onnxruntime_onnx"'
    group = "instance_group [ { kind: KIND_CPU count: 1 } ]" if backend == "python" else ""
    lines = [
        f'name: "{name}"',
        platform,
        f"max_batch_size: {max_batch}",
        *_ports("input", inputs),
        *_ports("output", outputs),
        f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: {MAX_DELAY_US} }}",
        *([group] if group else ["instance_group [ { kind: KIND_AUTO count: 1 } ]"]),
    ]
    if backend == "tensorrt":
        # ONNX Runtime's TensorRT provider: the server builds the plans with its own TensorRT, and keeps them.
        lines.append(
            'optimization { execution_accelerators { gpu_execution_accelerator [ { name: "tensorrt" '
            'parameters { key: "precision_mode" value: "FP32" } '
            'parameters { key: "trt_engine_cache_enable" value: "true" } '
            'parameters { key: "trt_engine_cache_path" value: "/tmp/tiue-plans" } } ] } }'
        )
    return "\n".join(lines) + "\n"


def ensemble_config(
    name: str, inputs: Sequence[Port], outputs: Sequence[Port], steps: Sequence[Step], *, max_batch: int
) -> str:
    """The config of an ensemble: what flows between the models never leaves the server."""
    lines = [f'name: "{name}"', 'platform: "ensemble"', f"max_batch_size: {max_batch}"]
    lines += [*_ports("input", inputs), *_ports("output", outputs), "ensemble_scheduling {"]
    for step in steps:
        lines += ["  step {", f'    model_name: "{step.model}"', "    model_version: -1"]
        lines += [f'    input_map {{ key: "{port}" value: "{port}" }}' for port in step.inputs]
        lines += [f'    output_map {{ key: "{port}" value: "{port}" }}' for port in step.outputs]
        lines.append("  }")
    lines.append("}")
    return "\n".join(lines) + "\n"


def _ports(kind: str, ports: Sequence[Port]) -> list[str]:
    return [
        f'{kind} [ {{ name: "{port.name}" data_type: {_TYPES[port.dtype]} dims: [ {_list(port.dims)} ] }} ]'
        for port in ports
    ]


def _list(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
