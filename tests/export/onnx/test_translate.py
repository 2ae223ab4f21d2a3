"""Our translations of two operators, in ONNX Runtime against torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiue_cli.export.onnx.trace import Port, Trace, export_graph


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 12, eps=1e-3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)


class Attention(nn.Module):
    def __init__(
        self, mask: torch.Tensor | None = None, *, is_causal: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        self.mask, self.is_causal, self.scale = mask, is_causal, scale

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, key.flip(-1), attn_mask=self.mask, is_causal=self.is_causal, scale=self.scale
        )


def write(
    path: Path, module: nn.Module, arguments: Mapping[str, torch.Tensor], *, opset: int = 21, out: tuple[Any, ...]
) -> Counter[str]:
    """Export a module whose first dimensions are free; returns how often each operator occurs."""
    trace = Trace(
        name="vae_decoder",
        module=module.eval(),
        arguments=tuple(arguments.values()),
        inputs=tuple(Port(name, ("batch", *value.shape[1:])) for name, value in arguments.items()),
        outputs=(Port("output", ("batch", *out)),),
    )
    export_graph(trace, path, opset=opset)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, **inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def test_group_norm_in_float16_has_float32_statistics(tmp_path: Path) -> None:
    """Values near float16's end: their squares overflow, so a mean of squares in float16 would be infinite."""
    module = Norm()
    hidden = 3000 * torch.randn((3, 12, 6, 5), generator=torch.Generator().manual_seed(0)) + 20_000
    expected = module(hidden.half().float()).detach().numpy()
    operators = write(tmp_path / "g.onnx", module.half(), {"hidden": hidden[:2].half()}, out=(12, 6, 5))
    assert operators["GroupNormalization"] == 0
    casts = [node for node in onnx.load(tmp_path / "g.onnx").graph.node if node.op_type == "Cast"]
    assert [cast.attribute[0].i for cast in casts] == [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16]
    np.testing.assert_allclose(run(tmp_path / "g.onnx", hidden=hidden.half()), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("opset", "width", "operator"), [(21, 16, False), (23, 16, True), (23, 8, False), (23, 320, False)]
)
def test_attention_is_one_operator_where_tensorrt_can_build_it(
    opset: int, width: int, operator: bool, tmp_path: Path
) -> None:
    module = Attention()
    query, key = torch.randn(2, 3, 5, width), torch.randn(2, 3, 7, width)
    operators = write(tmp_path / "g.onnx", module, {"query": query, "key": key}, opset=opset, out=(3, 5, width))
    assert (operators["Attention"] == 1) is operator
    if not operator:
        assert operators["MatMul"] == 2 and operators["Softmax"] == 1 and operators["Shape"] == 0
    query, key = torch.randn(4, 3, 5, width), torch.randn(4, 3, 7, width)
    np.testing.assert_allclose(
        run(tmp_path / "g.onnx", query=query, key=key), module(query, key).numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "module",
    [
        Attention(is_causal=True),
        Attention(scale=0.7),
        Attention(torch.randn(5, 5)),
        Attention(torch.randn(5, 5) > 0.5),
    ],
    ids=["causal", "scale", "float-mask", "bool-mask"],
)
def test_masks_and_scales_of_attention(module: Attention, tmp_path: Path) -> None:
    if module.mask is not None and module.mask.dtype == torch.bool:
        module.mask[:, 0] = True  # a row without any key has no answer
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    write(tmp_path / "g.onnx", module, {"query": query, "key": key}, out=(3, 5, 8))
    np.testing.assert_allclose(
        run(tmp_path / "g.onnx", query=query, key=key), module(query, key).numpy(), rtol=1e-4, atol=1e-5
    )


def test_graphs_with_the_same_weights_share_their_file(tmp_path: Path) -> None:
    """One file for all sizes; and a graph with other weights never touches it."""
    module = Norm()
    module.norm.weight = nn.Parameter(torch.randn(12).repeat(200))
    module.norm.bias = nn.Parameter(torch.randn(12).repeat(200))
    module.norm.num_channels, hidden = 2400, torch.randn(2, 2400, 2, 2)
    for name, scale in (("a", 1), ("b", 1), ("c", 2)):
        module.norm.weight.data.mul_(scale)
        write(tmp_path / f"{name}.onnx", module, {"hidden": hidden}, out=(2400, 2, 2))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"a.onnx", "b.onnx", "c.onnx", "vae_decoder.onnx.data", "c.onnx.data"}
    a, b, c = (run(tmp_path / f"{name}.onnx", hidden=hidden) for name in "abc")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(c, module(hidden).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert not np.allclose(a, c)
