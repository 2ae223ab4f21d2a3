"""The decoders of ``AutoencoderKL`` and ``AutoencoderTiny`` for inference on a GPU: the same functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from tiue_cli.model.fast.layers import (
    Conv,
    GroupNorm,
    NotFusable,
    Resnet,
    Upsample,
    as_image,
    as_tokens,
    channels_last,
    plain_layer,
)
from tiue_cli.model.fast.ops import Ops


def fast_decoder(
    vae: AutoencoderKL | AutoencoderTiny, ops: Ops, *, merged: bool = False, products: bool = False
) -> Callable[[Tensor], Tensor]:
    """From scaled latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], both in the weights' dtype.

    ``products`` computes attention as two matrix products and a softmax. Weights are read here (see ``layers``).
    Raises NotFusable.
    """
    if isinstance(vae, AutoencoderTiny):
        return TinyDecoder(vae, ops)
    assert isinstance(vae, AutoencoderKL), "the two that components.load_vae knows"
    return KLDecoder(vae, ops, merged=merged, products=products)


class KLDecoder:
    """``AutoencoderKL.decode``."""

    def __init__(self, vae: AutoencoderKL, ops: Ops, *, merged: bool = False, products: bool = False) -> None:
        decoder: Any = vae.decoder
        if type(decoder.conv_act) is not nn.SiLU:
            raise NotFusable("the autoencoder's last layers are not Stable Diffusion's", hint="run it plainly")
        self._post = None if vae.post_quant_conv is None else Conv(vae.post_quant_conv, ops)
        self._conv_in = Conv(decoder.conv_in, ops)
        mid = decoder.mid_block
        self._mid = [Resnet(resnet, ops) for resnet in mid.resnets]
        self._attentions = [
            None if attention is None else _PixelAttention(attention, ops, products=products)
            for attention in mid.attentions
        ]
        self._up = [
            ([Resnet(resnet, ops) for resnet in block.resnets], _upsampler(block, ops, merged=merged))
            for block in decoder.up_blocks
        ]
        self._norm_out = GroupNorm(decoder.conv_norm_out, ops, silu=True)
        self._conv_out = Conv(decoder.conv_out, ops)

    def __call__(self, latents: Tensor) -> Tensor:
        """See ``fast_decoder``."""
        hidden = latents.contiguous(memory_format=torch.channels_last)
        if self._post is not None:
            hidden = self._post(hidden)
        hidden = self._conv_in(hidden)
        first, *others = self._mid
        hidden = first(hidden, first.still_shift)
        for attention, resnet in zip(self._attentions, others, strict=True):
            hidden = hidden if attention is None else attention(hidden)
            hidden = resnet(hidden, resnet.still_shift)
        for resnets, upsampler in self._up:
            for resnet in resnets:
                hidden = resnet(hidden, resnet.still_shift)
            if upsampler is not None:
                hidden = upsampler(hidden, [2 * side for side in hidden.shape[-2:]])
        return self._conv_out(self._norm_out(hidden))


class TinyDecoder:
    """``AutoencoderTiny.decode``; on CUDA a convolution, its bias and its ReLU are one kernel of cuDNN."""

    def __init__(self, vae: AutoencoderTiny, ops: Ops) -> None:
        config: Any = vae.config
        if config.act_fn != "relu" or config.upsample_fn != "nearest" or config.upsampling_scaling_factor != 2:
            raise NotFusable("the tiny autoencoder is not TAESD's", hint="run it plainly")
        self._layers: list[Callable[[Tensor], Tensor]] = []
        layers: Any = list(vae.decoder.layers)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Conv2d):
                is_activated = bool(layers) and isinstance(layers[0], nn.ReLU)
                if is_activated:
                    layers.pop(0)
                self._layers.append(_TinyConv(layer, relu=is_activated))
            elif isinstance(layer, nn.Upsample):
                self._layers.append(ops.double)
            else:
                self._layers.append(_TinyBlock(layer))

    def __call__(self, latents: Tensor) -> Tensor:
        """See ``fast_decoder``."""
        hidden = torch.tanh(latents.contiguous(memory_format=torch.channels_last) / 3) * 3
        for layer in self._layers:
            hidden = layer(hidden)
        return hidden.mul(2).sub(1)


class _TinyConv:
    def __init__(self, conv: Any, *, relu: bool) -> None:
        conv = plain_layer(conv, nn.Conv2d)
        self._weight = channels_last(conv.weight)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._relu = relu

    def __call__(self, hidden: Tensor, addend: Tensor | None = None) -> Tensor:
        """The convolution, plus ``addend``, and the ReLU of that."""
        if self._relu and hidden.is_cuda and self._bias is not None:
            options = ([1, 1], [1, 1], [1, 1], 1)
            if addend is None:
                return torch.cudnn_convolution_relu(hidden, self._weight, self._bias, *options)
            return torch.cudnn_convolution_add_relu(hidden, self._weight, addend, 1.0, self._bias, *options)
        output = F.conv2d(hidden, self._weight, self._bias, padding=1)
        output = output if addend is None else output + addend
        return F.relu(output) if self._relu else output


class _TinyBlock:
    """An ``AutoencoderTinyBlock``: three convolutions, and the input added before the last ReLU."""

    def __init__(self, block: Any) -> None:
        if type(block).__name__ != "AutoencoderTinyBlock" or not isinstance(block.skip, nn.Identity):
            raise NotFusable("the tiny autoencoder is not TAESD's", hint="run it plainly")
        self._convs = [_TinyConv(layer, relu=True) for layer in block.conv if isinstance(layer, nn.Conv2d)]

    def __call__(self, hidden: Tensor) -> Tensor:
        first, second, third = self._convs
        return third(second(first(hidden)), hidden)


class _PixelAttention:
    """The mid block's attention among pixels, with its own norm and residual."""

    def __init__(self, attention: Any, ops: Ops, *, products: bool) -> None:
        if attention.rescale_output_factor != 1 or not attention.residual_connection or attention.spatial_norm:
            raise NotFusable("the autoencoder's attention is not Stable Diffusion's", hint="run it plainly")
        self._norm = GroupNorm(attention.group_norm, ops, silu=False)
        self._heads = attention.heads
        # One head of 512 numbers is wider than any fused kernel for Hopper takes: torch has an older one for it.
        self._attend = _attention_by_products if products else F.scaled_dot_product_attention
        layers = [plain_layer(layer, nn.Linear) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        self._qkv = torch.cat([layer.weight.detach() for layer in layers])
        self._qkv_bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        out = plain_layer(attention.to_out[0], nn.Linear)
        self._out = (out.weight.detach(), None if out.bias is None else out.bias.detach())

    def __call__(self, hidden: Tensor) -> Tensor:
        """(B, C, h, w) → the same."""
        joined = F.linear(as_tokens(self._norm(hidden)), self._qkv, self._qkv_bias).chunk(3, dim=-1)
        parts = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in joined)
        answers = self._attend(*parts).transpose(1, 2).flatten(2)
        return as_image(F.linear(answers, *self._out), hidden.shape[-2:]) + hidden


def _attention_by_products(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention (B, H, N, D) with its matrix of all pairs (B, H, N, N) in memory: 32 MiB an image of 512 x 512."""
    scaled = queries * queries.shape[-1] ** -0.5  # before the product, which is then within half precision's range
    return torch.softmax(scaled @ keys.transpose(-1, -2), dim=-1) @ values


def _upsampler(block: Any, ops: Ops, *, merged: bool) -> Upsample | None:
    if block.upsamplers is None:
        return None
    (upsampler,) = block.upsamplers
    return Upsample(upsampler.conv, ops, merged=merged)
