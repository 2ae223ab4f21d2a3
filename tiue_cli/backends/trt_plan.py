"""A TensorRT plan that was opened: its tensors, the shapes that it takes, and the memory that it works in.

Python 3.9 reads this file too; see ``trt_runner``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tiue_cli.backends.cuda import device_errors
from tiue_cli.backends.trt_messages import cannot_start, collect_messages, import_tensorrt
from tiue_cli.errors import DeviceError

BUILD_FOR_RANGES = "build an engine for such shapes: tiue export FOLDER --trt --batch MIN:OPT:MAX"
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class TensorInfo(NamedTuple):
    """An input or output of a plan; -1 in ``shape`` is a free dimension."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    is_input: bool


class Plan(NamedTuple):
    """A deserialised plan: ``engine`` is TensorRT's, ``runtime`` what it must not outlive."""

    name: str
    engine: Any
    runtime: Any
    tensors: tuple[TensorInfo, ...]

    def names(self, *, inputs: bool) -> list[str]:
        """Names of the inputs, or of the outputs, in the plan's order."""
        return [tensor.name for tensor in self.tensors if tensor.is_input == inputs]


def open_plan(name: str, data: bytes) -> Plan:
    """Deserialise a plan. It is code for the GPU: check where it comes from before. Raises DeviceError."""
    trt = import_tensorrt()
    messages = collect_messages()
    messages.clear()
    with device_errors(f"opening {name}"):
        from polygraphy.backend.trt import get_trt_logger

        try:
            runtime = trt.Runtime(get_trt_logger())
        except TypeError as error:
            raise cannot_start(error, f"open {name}") from error
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise DeviceError(
            f"TensorRT {trt.__version__} cannot open {name}: {messages.worst() or 'it gives no reason'}",
            hint="build it again: tiue export FOLDER --trt",
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return Plan(name, engine, runtime, tuple(_tensor_info(trt, engine, tensor) for tensor in names))


def _tensor_info(trt: Any, engine: Any, name: str) -> TensorInfo:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES or engine.is_shape_inference_io(name):
        raise DeviceError(
            f"tensor {name} of a plan has the type {kind}, which this runner does not handle",
            hint="build it again: tiue export FOLDER --trt",
        )
    shape = tuple(int(side) for side in engine.get_tensor_shape(name))
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    return TensorInfo(name, np.dtype(_DTYPES[kind]), shape, is_input)


def working_memory(plan: Plan) -> int:
    """Bytes of GPU memory that a plan works in, beside its weights, inputs and outputs; for its largest profile."""
    return max(memory_size(plan, profile) for profile in range(plan.engine.num_optimization_profiles))


def memory_size(plan: Plan, profile: int) -> int:
    """The same for one profile."""
    return int(plan.engine.get_device_memory_size_for_profile_v2(profile))


def new_context(plan: Plan, profile: int, stream: Any) -> Any:
    """An execution context under ``profile`` whose working memory is ours to give. Raises DeviceError."""
    context = plan.engine.create_execution_context(import_tensorrt().ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is None:
        raise DeviceError(
            f"TensorRT makes no execution context: {collect_messages().worst() or 'it gives no reason'}",
            hint="close other programs that use the GPU",
        )
    if not context.set_optimization_profile_async(profile, stream.ptr):
        raise DeviceError(f"{plan.name} has no profile {profile}", hint=BUILD_FOR_RANGES)
    return context


def largest_shapes(plan: Plan, context: Any, profile: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of ``plan`` at the maximum of ``profile``."""
    shapes = {name: limits(plan, profile, name)[1] for name in plan.names(inputs=True)}
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise DeviceError(
                f"{plan.name}: {name} does not take its own maximum {times(shape)}", hint=BUILD_FOR_RANGES
            )
    context.infer_shapes()
    for name in plan.names(inputs=False):
        shapes[name] = tuple(int(side) for side in context.get_tensor_shape(name))
    return shapes


def limits(plan: Plan, profile: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(minimum, maximum) shape of an input."""
    shape = next(tensor.shape for tensor in plan.tensors if tensor.name == name)
    if -1 not in shape:
        return shape, shape
    low, _, high = plan.engine.get_tensor_profile_shape(name, profile)
    return tuple(int(side) for side in low), tuple(int(side) for side in high)


def accepts(plan: Plan, profile: int, name: str, shape: Sequence[int]) -> bool:
    """Whether an input may have this shape."""
    low, high = limits(plan, profile, name)
    return len(shape) == len(low) and all(low[axis] <= side <= high[axis] for axis, side in enumerate(shape))


def range_text(plan: Plan, profile: int, name: str) -> str:
    """The shapes that an input may have, in words."""
    low, high = limits(plan, profile, name)
    return times(low) if low == high else f"{times(low)} to {times(high)}"


def times(shape: Sequence[int]) -> str:
    """A shape in words: ``4x64x64``."""
    return "x".join(str(side) for side in shape)
