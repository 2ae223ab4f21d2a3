"""Self-attention as one operator of ONNX Runtime's, on the CPU: graphs are rewritten as they are opened.

    q, k, v ─ Reshape, Transpose ─ MatMul ─ Softmax ─ MatMul ─ Transpose, Reshape ─▶   in the folder, for any engine
    q, k, v ─ MultiHeadAttention ─▶                                                    in the session

The products of a picture of h × w latents are (h·w)² numbers a head and row: 2.1 GB for Stable Diffusion 1.5 at 512
pixels and K = 4, which the chain of operators writes and reads again several times. ONNX Runtime's operator works in
tiles that stay in the processor's cache. Stable Diffusion 1.5's decoder took 3.0 GiB instead of 6.6, weights included,
and a whole picture 0.7 of the time on two cores.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import onnx

MIN_TOKENS: Final = 1024
"""Latents of a picture, h · w, from which rewriting is worth reading the graph; fewer fit in the caches as they are."""
_DOMAIN: Final = "com.microsoft"
_HEADS_APART: Final = (0, 2, 1, 3)  # (batch, tokens, heads, channels) → (batch, heads, tokens, channels)
_KEYS_APART: Final = (0, 2, 3, 1)  # … → (batch, heads, channels, tokens)

_Sizes = tuple[int | str, ...]
"""A shape: numbers, and names of values that are known when the graph runs."""


def with_fused_attention(path: Path) -> bytes | None:
    """The graph in ``path`` with its self-attentions as one operator each; None where it has none.

    Weights stay in their file, which a session finds beside ``path``. None for a damaged graph too: the session that
    opens it says what is wrong.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return None
    return model.SerializeToString() if fuse_attention(model) > 0 else None


def fuse_attention(model: onnx.ModelProto) -> int:
    """Rewrite the self-attentions of ``model`` in place; returns how many there were.

    Only what is exactly that is touched: no mask, softmax over all tokens, one number as scale, queries, keys and
    values of one shape, and nobody else who reads what lies between.
    """
    from onnx import AttributeProto, helper

    if any(attribute.type == AttributeProto.GRAPH for node in model.graph.node for attribute in node.attribute):
        return 0  # a branch may read what would be gone
    graph = _Graph(model)
    found = {id(one.last): one for node in model.graph.node if (one := graph.attention(node)) is not None}
    if not found:
        return 0
    gone = {id(node) for one in found.values() for node in one.between}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        one = found.get(id(node))
        if one is not None:
            nodes.append(
                helper.make_node(
                    "MultiHeadAttention",
                    [one.query, one.key, one.value],
                    list(node.output),
                    name=f"{node.name}_attention",
                    domain=_DOMAIN,
                    num_heads=one.heads,
                    scale=one.scale,
                )
            )
        elif id(node) not in gone:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model)
    if all(imported.domain != _DOMAIN for imported in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(found)


@dataclass(frozen=True)
class _Attention:
    """One self-attention: (batch, tokens, heads · channels) goes in and out; ``last`` writes what comes out."""

    query: str
    key: str
    value: str
    heads: int
    scale: float
    between: tuple[onnx.NodeProto, ...]
    last: onnx.NodeProto


@dataclass(frozen=True)
class _Split:
    """A value whose heads were put apart: Reshape, then Transpose."""

    source: str
    sizes: _Sizes
    nodes: tuple[onnx.NodeProto, ...]


class _Graph:
    """Who writes and who reads each value of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        # The nodes are held, so that their identities last as long as they are compared.
        self._nodes = list(model.graph.node)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._writers = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._nodes:
            for name in node.input:
                self._readers[name].append(node)
        self._outputs = {output.name for output in model.graph.output}

    def attention(self, node: onnx.NodeProto) -> _Attention | None:
        """The self-attention whose product with the values is ``node``."""
        if node.op_type != "MatMul":
            return None
        softmax, values = self._inner(node.input[0], "Softmax"), self._split(node.input[1], _HEADS_APART)
        if softmax is None or values is None or _attribute(softmax, "axis", -1) not in (-1, 3):
            return None
        product = self._inner(softmax.input[0], "MatMul")
        if product is None:
            return None
        scaled, keys = self._inner(product.input[0], "Mul"), self._split(product.input[1], _KEYS_APART)
        if scaled is None or keys is None:
            return None
        queries, scale = self._split(scaled.input[0], _HEADS_APART), self._number(scaled.input[1])
        joined = self._joined(node.output[0])
        if queries is None or scale is None or joined is None:
            return None
        heads = queries.sizes[2]
        if not isinstance(heads, int) or not queries.sizes == keys.sizes == values.sizes:
            return None
        transpose, last = joined
        return _Attention(
            query=queries.source,
            key=keys.source,
            value=values.source,
            heads=heads,
            scale=scale,
            between=(*queries.nodes, *keys.nodes, *values.nodes, scaled, product, softmax, node, transpose),
            last=last,
        )

    def _inner(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of ``kind`` that writes ``name``, where one node reads it and the caller does not see it."""
        node = self._writers.get(name)
        is_inner = node is not None and node.op_type == kind and name not in self._outputs
        return node if is_inner and len(self._readers[name]) == 1 else None

    def _split(self, name: str, order: tuple[int, ...]) -> _Split | None:
        transpose = self._inner(name, "Transpose")
        if transpose is None or _order(transpose) != order:
            return None
        reshape = self._inner(transpose.input[0], "Reshape")
        sizes = None if reshape is None else self._sizes(reshape.input[1])
        if reshape is None or sizes is None or len(sizes) != 4:
            return None
        return _Split(reshape.input[0], sizes, (reshape, transpose))

    def _joined(self, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """Transpose and Reshape to three dimensions after ``name``, as the heads are put together again."""
        readers = self._readers[name]
        if name in self._outputs or len(readers) != 1 or readers[0].op_type != "Transpose":
            return None
        transpose = readers[0]
        after = self._readers[transpose.output[0]]
        if _order(transpose) != _HEADS_APART or transpose.output[0] in self._outputs or len(after) != 1:
            return None
        sizes = self._sizes(after[0].input[1]) if after[0].op_type == "Reshape" else None
        return None if sizes is None or len(sizes) != 3 else (transpose, after[0])

    def _sizes(self, name: str) -> _Sizes | None:
        """A shape, as far as it is known before the graph runs; None where not even its length is."""
        if name in self._constants:
            return self._integers(name)
        node = self._writers.get(name)
        if node is None or node.op_type != "Concat":
            return None
        parts = [self._integers(part) if part in self._constants else (part,) for part in node.input]
        return None if any(part is None for part in parts) else tuple(size for part in parts for size in part or ())

    def _integers(self, name: str) -> tuple[int, ...] | None:
        value = self._constant(name)
        return None if value is None else tuple(int(size) for size in value.flatten())

    def _number(self, name: str) -> float | None:
        value = self._constant(name) if name in self._constants else None
        return None if value is None or value.size != 1 else float(value.flatten()[0])

    def _constant(self, name: str) -> np.ndarray | None:
        from onnx import TensorProto, numpy_helper

        tensor = self._constants[name]
        is_here = tensor.data_location != TensorProto.EXTERNAL
        return numpy_helper.to_array(tensor) if is_here else None


def _order(transpose: onnx.NodeProto) -> tuple[int, ...]:
    return tuple(_attribute(transpose, "perm", ()))  # type: ignore[arg-type]


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove constants that nobody reads any more, of which ONNX Runtime would warn."""
    read = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
