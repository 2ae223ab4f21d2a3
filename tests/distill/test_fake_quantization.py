"""Fake quantisation rounds as ONNX's operators do, lets gradients through, and finds each layer of the graph once."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import seeded_noise, tiny_unet
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tiue_cli.distill.fake_quantization import (
    FakeQuantization,
    LayerRange,
    RangeRecorder,
    recomputing,
    rounded_activation,
    rounded_weight,
    stays_in_floats,
)
from tiue_cli.distill.networks import StudentGenerator


def through_onnx(values: np.ndarray, scale: np.ndarray, *, axis: int | None = None) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear to int8 in ONNX Runtime."""
    options = {} if axis is None else {"axis": axis}
    zeros = np.zeros_like(scale, dtype=np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **options),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **options),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zeros, "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0])


def test_values_are_rounded_as_onnx_rounds_them() -> None:
    weight = seeded_noise((6, 5, 3, 3), seed=1)
    weight[2] = 0  # a channel that says nothing
    largest = weight.flatten(1).abs().amax(1).numpy()
    scale = np.where(largest == 0, 1, largest / 64).astype(np.float32)
    np.testing.assert_allclose(rounded_weight(weight).numpy(), through_onnx(weight.numpy(), scale, axis=0), atol=1e-6)
    values = seeded_noise((4, 400), seed=2)  # some beyond the range
    expected = through_onnx(values.numpy(), np.array(2 / 127, np.float32))
    np.testing.assert_allclose(rounded_activation(values, 2.0).numpy(), expected, atol=1e-6)
    assert len(np.unique(expected)) > 60 and expected.max() == pytest.approx(2)


def test_gradients_pass_rounding_and_stop_at_the_range() -> None:
    weight = seeded_noise((4, 3), seed=1).requires_grad_()
    rounded_weight(weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(4, 3))
    values = torch.tensor([-3.0, -1.0, 0.3, 1.0, 3.0], requires_grad=True)
    rounded_activation(values, 2.0).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 1, 1, 0]


def inputs() -> tuple[Tensor, Tensor]:
    return seeded_noise((2, 4, 8, 8), seed=3), seeded_noise((2, 16, 32), seed=4)


@pytest.mark.parametrize("decoder", ["shared", "plain"])
def test_every_layer_with_weights_is_met_and_only_the_inner_ones_are_rounded(decoder: str) -> None:
    unet = tiny_unet()
    student = StudentGenerator(unet, (751, 501, 251, 1), decoder=decoder)
    with torch.no_grad(), RangeRecorder(unet) as recorder:
        expected = student(*inputs())
    layers = {name.partition("+")[0] for name in recorder.ranges}
    weighted = {
        name.removesuffix(".weight") for name, value in unet.named_parameters() if value.dim() > 1
    }  # fmt: skip
    assert layers == {name for name in weighted if not stays_in_floats(name)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < weighted - layers
    cuts = {name for name in recorder.ranges if "+" in name}
    assert bool(cuts) == (decoder == "shared"), "the sharing decoder computes the parts of a convolution apart"
    with torch.no_grad():
        plain = student(*inputs())
        torch.testing.assert_close(expected, plain)  # recording changes nothing but the order of additions
        with FakeQuantization(unet, {}):
            assert torch.equal(student(*inputs()), plain), "no layers, no rounding"
        with FakeQuantization(unet, recorder.ranges):
            rounded = student(*inputs())
    error = float((rounded - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.2


def test_recomputed_passes_are_rounded_as_well() -> None:
    """Gradients with gradient checkpointing equal those without."""
    gradients = []
    for recompute in (False, True):
        unet = tiny_unet()
        student = StudentGenerator(unet, (751, 1))
        with torch.no_grad(), RangeRecorder(unet) as recorder:
            student(*inputs())
        ranges = {name: LayerRange(*(0.5 * side for side in found)) for name, found in recorder.ranges.items()}

        def rounding(unet: torch.nn.Module = unet, ranges: dict[str, LayerRange] = ranges) -> FakeQuantization:
            return FakeQuantization(unet, ranges)

        if recompute:
            unet.enable_gradient_checkpointing(recomputing(rounding))
            unet.train()
        with rounding():
            loss = student(*inputs()).square().sum()
        loss.backward()  # outside the block, as on a GPU, where another thread runs it
        gradients.append({name: value.grad for name, value in unet.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)
