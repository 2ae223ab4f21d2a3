"""Two operators in ONNX, translated our way.

Group norm becomes InstanceNormalization over the groups, with float32 statistics by explicit casts in float16 graphs:
every runtime has a kernel for it, where GroupNormalization falls apart in ONNX Runtime into a dozen passes over the
data (measured on a CPU: two to four times slower). Attention becomes one MatMul-Softmax-MatMul without shape
arithmetic, or from opset 23 on the Attention operator where the width of its heads allows that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import onnx_ir as ir
import torch
from onnxscript import opset18, opset23

ATTENTION_OPSET: Final = 23
ATTENTION_WIDTHS: Final = range(16, 257)
"""Head widths that TensorRT's attention layer takes; Attention with others does not build there."""

# While a graph is traced these build nodes; their type annotations describe another use of the library.
_op: Any = opset18
_op23: Any = opset23


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The exporter's custom translation table: aten operator → function that builds ONNX nodes."""

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        width = query.shape[-1]
        assert isinstance(width, int) and not enable_gqa and dropout_p == 0.0
        scale = 1 / math.sqrt(width) if scale is None else scale
        if opset >= ATTENTION_OPSET and width in ATTENTION_WIDTHS:
            answer, *_ = _op23.Attention(query, key, value, attn_mask, is_causal=int(is_causal), scale=scale)
            return answer
        return _plain_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)

    aten = torch.ops.aten
    return {aten.group_norm.default: _group_norm, aten.scaled_dot_product_attention.default: attention}


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """aten.group_norm over (rows, C, h, w) as an instance norm over (rows, groups, C/groups·h·w)."""
    shape = _op.Shape(input)
    is_half = input.dtype == ir.DataType.FLOAT16
    grouped = _op.Reshape(input, _op.Constant(value_ints=[0, num_groups, -1]))
    if is_half:
        grouped = _op.Cast(grouped, to=ir.DataType.FLOAT)
    ones, zeros = _op.Constant(value_floats=[1.0] * num_groups), _op.Constant(value_floats=[0.0] * num_groups)
    normal = _op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
    if is_half:
        normal = _op.Cast(normal, to=ir.DataType.FLOAT16)
    normal = _op.Reshape(normal, shape)
    axes = _op.Constant(value_ints=list(range(1, len(input.shape) - 1)))
    if weight is not None:
        normal = _op.Mul(normal, _op.Unsqueeze(weight, axes))
    if bias is not None:
        normal = _op.Add(normal, _op.Unsqueeze(bias, axes))
    return normal


def _plain_attention(query: Any, key: Any, value: Any, mask: Any, *, is_causal: bool, scale: float) -> Any:
    """softmax(query·keyᵀ·scale + mask)·value over (rows, heads, tokens, width).

    Query is scaled before the product, so that the product stays in float16's range.
    """
    half = query.dtype == ir.DataType.FLOAT16
    factor = _op.Constant(value=ir.tensor(scale, dtype=ir.DataType.FLOAT16 if half else ir.DataType.FLOAT))
    logits = _op.MatMul(_op.Mul(query, factor), _op.Transpose(key, perm=[0, 1, 3, 2]))
    lowest = _op.Constant(value=ir.tensor(-10000.0, dtype=ir.DataType.FLOAT16 if half else ir.DataType.FLOAT))
    if is_causal:
        tokens = _op.Concat(_op.Shape(query, start=2, end=3), _op.Shape(key, start=2, end=3), axis=0)
        ones = _op.Expand(_op.Constant(value_int=1), tokens)
        logits = _op.Where(_op.Cast(_op.Trilu(ones, upper=0), to=ir.DataType.BOOL), logits, lowest)
    if mask is not None:
        is_bool = mask.dtype == ir.DataType.BOOL
        logits = _op.Where(mask, logits, lowest) if is_bool else _op.Add(logits, mask)
    return _op.MatMul(_op.Softmax(logits, axis=-1), value)
