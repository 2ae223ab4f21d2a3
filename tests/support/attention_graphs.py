"""Self-attention as exporters write it to ONNX, and as it is defined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, CHANNELS, SCALE = 2, 8, 0.25
Change = Callable[[dict[str, onnx.NodeProto]], object]


def attention_graph(
    tokens: int, *, dynamic: bool = False, projected: bool = False, change: Change | None = None
) -> onnx.ModelProto:
    """softmax(q · k · scale) · v of (batch, tokens, heads · channels); ``change`` edits nodes.

    With ``projected`` each of the inputs q, k, v goes through a linear layer first.
    """
    width = HEADS * CHANNELS
    node = helper.make_node
    sizes = [np.array(value, np.int64) for value in ([-1], [tokens], [HEADS], [CHANNELS])]
    constants = {
        "apart": np.array([-1, tokens, HEADS, CHANNELS], np.int64),
        "together": np.array([-1, tokens, width], np.int64),
        "scale": np.array(SCALE, np.float32),
        "mask": np.triu(np.full((tokens, tokens), -1e9, np.float32), 1),
    }
    apart = "apart"
    nodes = []
    if dynamic:
        constants |= {f"size{number}": size for number, size in enumerate(sizes)}
        nodes.append(node("Shape", ["q"], ["tokens"], start=1, end=2))
        nodes.append(node("Concat", ["size0", "tokens", "size2", "size3"], ["known"], axis=0))
        apart = "known"
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        source = f"{name}p" if projected else name
        if projected:
            weight = np.random.default_rng(ord(name)).standard_normal((width, width)) / 4
            constants[f"w{name}"] = weight.astype(np.float32)
            nodes.append(node("MatMul", [name, f"w{name}"], [source], name=f"to_{name}"))
        nodes.append(node("Reshape", [source, apart], [f"{name}4"], name=f"reshape_{name}"))
        nodes.append(node("Transpose", [f"{name}4"], [f"{name}t"], name=f"transpose_{name}", perm=order))
    nodes += [
        node("Mul", ["qt", "scale"], ["qs"], name="scaled"),
        node("MatMul", ["qs", "kt"], ["products"], name="products"),
        node("Softmax", ["products"], ["weights"], name="softmax", axis=-1),
        node("MatMul", ["weights", "vt"], ["mixed"], name="mixed"),
        node("Transpose", ["mixed"], ["mixed4"], name="back", perm=[0, 2, 1, 3]),
        node("Reshape", ["mixed4", "together"], ["out"], name="joined"),
    ]
    if change is not None:
        change({each.name: each for each in nodes})
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "attention",
        [value(name, TensorProto.FLOAT, ["batch", tokens, width]) for name in "qkv"],
        [value("out", TensorProto.FLOAT, ["batch", tokens, width])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def inputs(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((3, tokens, HEADS * CHANNELS)).astype(np.float32) for name in "qkv"}


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """In float64, from the definition."""

    def apart(value: np.ndarray) -> np.ndarray:
        return value.astype(np.float64).reshape(len(value), -1, HEADS, CHANNELS).transpose(0, 2, 1, 3)

    products = SCALE * apart(q) @ apart(k).transpose(0, 1, 3, 2)
    weights = np.exp(products - products.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ apart(v)
    return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(q.shape))
