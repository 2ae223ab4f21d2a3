"""An int8 Q/DQ graph becomes one in float8 (E4M3), with the same layers and ranges: what Hopper and Ada compute.

One scale a tensor, weights included, from the largest magnitude: as TensorRT Model Optimizer's FP8 default has it. A
float of 8 bits keeps three digits of the mantissa whatever the size, so that a scale a channel would gain little.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tiue_cli.model.quantization import ACTIVATION_LEVELS

LARGEST: Final = 448.0
"""The largest number that E4M3 has."""


def as_float8(quantized: onnx.ModelProto, plain: onnx.ModelProto) -> onnx.ModelProto:
    """``quantized`` (int8, symmetric) with float8 in its place; ``plain`` is the graph it was made of."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {tensor.name: tensor for tensor in plain.graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        values, scale, zero = node.input
        if values in tensors:
            made |= _weight(tensors[values], scale, zero, original=weights[values.removesuffix("_quantized")])
            del node.attribute[:]
        elif scale not in made:
            made |= _activation(tensors[scale], zero)
    del model.graph.initializer[:]
    model.graph.initializer.extend(made.get(name, tensor) for name, tensor in tensors.items())
    return model


def _activation(scale: onnx.TensorProto, zero: str) -> Mapping[str, onnx.TensorProto]:
    factor = numpy_helper.to_array(scale)
    largest = factor.astype(np.float64) * ACTIVATION_LEVELS
    return {
        scale.name: numpy_helper.from_array(np.asarray(largest / LARGEST, factor.dtype), scale.name),
        zero: _float8(np.zeros((), np.float32), zero),
    }


def _weight(
    integers: onnx.TensorProto, scale: str, zero: str, *, original: onnx.TensorProto
) -> Mapping[str, onnx.TensorProto]:
    values = numpy_helper.to_array(original)
    factor = np.asarray(float(np.abs(values).max()) / LARGEST, values.dtype)
    if factor == 0:
        factor = np.ones((), values.dtype)
    scaled = values.astype(np.float32) / factor.astype(np.float32)
    return {
        # The rounded scale may be a little too small, and E4M3 has no infinity: beyond its largest number is NaN.
        integers.name: _float8(np.clip(scaled, -LARGEST, LARGEST), integers.name),
        scale: numpy_helper.from_array(factor, scale),
        zero: _float8(np.zeros((), np.float32), zero),
    }


def _float8(values: np.ndarray, name: str) -> onnx.TensorProto:
    rounded = np.asarray(values).astype(ml_dtypes.float8_e4m3fn)
    return onnx.TensorProto(
        name=name, data_type=TensorProto.FLOAT8E4M3FN, dims=rounded.shape, raw_data=rounded.tobytes()
    )
