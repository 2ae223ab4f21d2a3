"""A UNet that computes as its 8-bit export will, in floats and with gradients: rounding, straight-through.

The scheme is the export's (``export/onnx/quantize.py``): weights symmetric, a scale an output channel, seven bits;
what goes into and comes out of each layer symmetric, a scale a tensor, from the largest value that calibration has
seen; biases, norms and products of activations in floats; the same layers left out. One difference: a tensor that other
layers read as well is rounded for its 8-bit readers alone.

Layers are met where torch computes them and known by their weight, so that the sharing decoder, which cuts weights, has
a layer for each cut, as the graph has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tiue_cli.model.quantization import ACTIVATION_LEVELS, WEIGHT_LEVELS


class LayerRange(NamedTuple):
    """The largest magnitudes that go into a layer and come out of it."""

    input: float
    output: float


@dataclass(frozen=True)
class _Call:
    """A convolution or linear layer: ``plain`` computes it as it is; ``run`` takes input and weight, then ``finish``.

    Of a linear layer over tokens the graph has the product, rounded, and then the bias.
    """

    layer: str
    inputs: Tensor
    weight: Tensor
    plain: Callable[[], Tensor]
    run: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]


class _LayerCalls(TorchFunctionMode):
    """Within the block, calls of the UNet's own layers with weights go through ``_compute``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self._names = {
            id(parameter): name.removesuffix(".weight")
            for name, parameter in unet.named_parameters()
            if name.endswith(".weight") and parameter.dim() > 1
        }

    def _compute(self, call: _Call) -> Tensor:
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv2d, F.linear):
            call = self._call(func, *args, **kwargs)
            if call is not None:
                return self._compute(call)
        return func(*args, **kwargs)

    def _call(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> _Call | None:
        name = self._names.get(id(weight if weight._base is None else weight._base))
        if name is None:
            return None
        cut = "" if weight._base is None else f"+{weight.storage_offset()}"

        def whole(x: Tensor, w: Tensor) -> Tensor:
            result: Tensor = func(x, w, bias, *args, **kwargs)
            return result

        def product(x: Tensor, w: Tensor) -> Tensor:
            result: Tensor = func(x, w)
            return result

        plain = functools.partial(whole, input, weight)
        if func is F.linear and input.dim() > 2 and bias is not None:
            return _Call(f"{name}{cut}", input, weight, plain, product, lambda y: y + bias)
        return _Call(f"{name}{cut}", input, weight, plain, whole, lambda y: y)


class RangeRecorder(_LayerCalls):
    """Within the block, ``ranges`` grows by what each layer's input and output reach; nothing is rounded."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__(unet)
        self.ranges: dict[str, LayerRange] = {}

    def _compute(self, call: _Call) -> Tensor:
        output = call.run(call.inputs, call.weight)
        if not stays_in_floats(call.layer):
            seen = self.ranges.get(call.layer, LayerRange(0.0, 0.0))
            found = LayerRange(float(call.inputs.detach().abs().amax()), float(output.detach().abs().amax()))
            self.ranges[call.layer] = LayerRange(*map(max, seen, found))
        return call.finish(output)


class FakeQuantization(_LayerCalls):
    """Within the block, the layers of ``ranges`` compute in 8 bits."""

    def __init__(self, unet: nn.Module, ranges: Mapping[str, LayerRange]) -> None:
        super().__init__(unet)
        self._ranges = ranges

    def _compute(self, call: _Call) -> Tensor:
        found = self._ranges.get(call.layer)
        if found is None:
            return call.plain()
        inputs = rounded_activation(call.inputs, found.input)
        output = call.run(inputs, rounded_weight(call.weight))
        return call.finish(rounded_activation(output, found.output))


def stays_in_floats(layer: str) -> bool:
    """Whether the export leaves the layer alone whatever it measures: first, last, and the time embedding."""
    return layer in ("conv_in", "conv_out") or layer.startswith("time_embedding.") or "time_emb_proj" in layer


def every_layer(unet: nn.Module) -> Mapping[str, LayerRange]:
    """Some range for every layer, however its weight is cut: for playing a step without numbers."""
    return _EveryLayer({name: LayerRange(1.0, 1.0) for name, _ in unet.named_modules() if not stays_in_floats(name)})


class _EveryLayer(dict[str, LayerRange]):
    def get(self, layer: str, default: Any = None) -> Any:
        return super().get(layer.partition("+")[0], default)


def rounded_weight(weight: Tensor) -> Tensor:
    """``weight`` (out, …) as int8 with a scale an output channel, dequantised; its gradient is the rounded one's."""
    scale = weight.detach().float().flatten(1).abs().amax(1) / WEIGHT_LEVELS
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale).reshape(-1, *[1] * (weight.dim() - 1))
    rounded = (weight.detach() / scale).round() * scale
    return weight + (rounded - weight.detach()).to(weight.dtype)


def rounded_activation(values: Tensor, largest: float) -> Tensor:
    """``values`` as int8 with one scale for magnitudes up to ``largest``, dequantised; no gradient beyond them."""
    if largest == 0:
        return values
    scale = largest / ACTIVATION_LEVELS
    # int8 has one level more below zero than above.
    clipped = values.clamp(-(ACTIVATION_LEVELS + 1) * scale, largest)
    rounded = (clipped.detach().float() / scale).round() * scale
    return clipped + (rounded.to(clipped.dtype) - clipped.detach())


def recomputing(mode: Callable[[], TorchFunctionMode]) -> Callable[..., Any]:
    """What a UNet's gradient checkpointing should call: backward passes leave the modes around them."""

    def recomputed(function: Callable[..., Any], *args: Any) -> Any:
        def within(*inner: Any) -> Any:
            with mode():
                return function(*inner)

        return checkpoint(within, *args, use_reentrant=False)

    return recomputed
