"""A UNet of Stable Diffusion for inference on a GPU: the same function as ``UNetEncoder`` and ``SharedUNetDecoder``.

What does not depend on the noise comes in ready: ``times`` is every resnet's share of the time embedding in one product
(with the bias of its first convolution), ``texts`` every cross-attention's keys and values in another. A student's
timesteps never change, so its times are worked out once; a teacher's texts once an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tiue_cli.model.fast.layers import Conv, GroupNorm, NotFusable, Resnet, Transformer, Upsample
from tiue_cli.model.fast.ops import Ops
from tiue_cli.model.sd_configs import check_unet_config
from tiue_cli.model.unet import UNetFeatures, decoder_levels, has_cross_attention, time_embedding


class FastUNet:
    """``encode`` once an image, ``decode`` at K timesteps; weights are read when it is made (see ``layers``).

    ``shared``: what of the decoder's resnets does not depend on the timestep is computed once an image. ``merged``: an
    upsampler is one transposed convolution. Neither changes the function. Raises NotFusable, ModelFolderError.
    """

    def __init__(self, unet: UNet2DConditionModel, ops: Ops, *, shared: bool = True, merged: bool = False) -> None:
        check_unet_config(unet.config)
        if unet.conv_norm_out is None or type(unet.conv_act) is not nn.SiLU:
            raise NotFusable("the UNet's last layers are not Stable Diffusion's", hint="run it plainly")
        self.unet = unet
        self.dtype = unet.dtype
        self._shared = shared
        self._shifts = _Pieces()
        self._keys = _Pieces()
        self._up: list[_Levels] = []
        self._upsamplers: list[Upsample | None] = []
        self._conv_in = Conv(unet.conv_in, ops)
        down: Any = unet.down_blocks
        self._down = [self._block(block, ops) for block in down]
        self._downsamplers = [_downsampler(block, ops) for block in down]
        self._mid = None if unet.mid_block is None else self._mid_block(unet.mid_block, ops)
        own = int(
            unet.mid_block.resnets[-1].conv2.out_channels if self._mid else down[-1].resnets[-1].conv2.out_channels
        )
        up: Any = unet.up_blocks
        for block in up:
            self._up.append(self._block(block, ops, own=own))
            own = int(block.resnets[-1].conv2.out_channels)
            upsampler = None if block.upsamplers is None else block.upsamplers[0]
            self._upsamplers.append(None if upsampler is None else Upsample(upsampler.conv, ops, merged=merged))
        self._norm_out = GroupNorm(unet.conv_norm_out, ops, silu=True)
        self._conv_out = Conv(unet.conv_out, ops)
        self._shifts.join()
        self._keys.join()

    def times(self, timesteps: Tensor) -> Tensor:
        """(K,) → (K, T): every resnet's shift."""
        embedding = time_embedding(self.unet, timesteps, self.dtype)
        return self._shifts(F.silu(embedding))

    def texts(self, text_states: Tensor) -> Tensor:
        """(B, L, D) → (B, L, T'): every cross-attention's keys and values."""
        return self._keys(text_states)

    def encode(self, noise: Tensor, times: Tensor, texts: Tensor) -> UNetFeatures:
        """Features of noise (B, C, h, w) at one timestep; ``times`` (1, T), ``texts`` (B, L, T')."""
        shifts, keys = self._shifts.split(times), self._keys.split(texts)
        hidden = self._conv_in(noise.contiguous(memory_format=torch.channels_last))
        skips = [hidden]
        for level, downsampler in zip(self._down, self._downsamplers, strict=True):
            for resnet, shift, transformer, text in level:
                hidden = resnet(hidden, shifts[shift])
                if transformer is not None:
                    hidden = transformer(hidden, [keys[index] for index in text])
                skips.append(hidden)
            if downsampler is not None:
                hidden = downsampler(hidden)
                skips.append(hidden)
        for resnet, shift, transformer, text in self._mid or ():
            hidden = resnet(hidden, shifts[shift])
            if transformer is not None:
                hidden = transformer(hidden, [keys[index] for index in text])
        return UNetFeatures(hidden, tuple(skips))

    def decode(self, features: UNetFeatures, times: Tensor, texts: Tensor) -> Tensor:
        """Predictions (K, B, C, h, w) from features of B images; ``times`` (K, T), ``texts`` (B, L, T')."""
        shifts, keys = self._shifts.split(times), self._keys.split(texts)
        steps = times.shape[0]
        hidden = features.mid
        levels = decoder_levels(self.unet, features.skips)
        is_first = True
        for level, upsampler, (_, skips, size) in zip(self._up, self._upsamplers, levels, strict=True):
            for (resnet, shift, transformer, text), skip in zip(level, reversed(skips), strict=True):
                if is_first and steps > 1:
                    hidden = resnet.first(hidden, skip, shifts[shift], repeats=steps)
                else:
                    hidden = resnet(hidden, shifts[shift], skip=skip, repeats=steps)
                is_first = False
                if transformer is not None:
                    hidden = transformer(hidden, [keys[index] for index in text])
            if size is not None:
                assert upsampler is not None, "every block but the last one has an upsampler"
                hidden = upsampler(hidden, size)
        predictions = self._conv_out(self._norm_out(hidden))
        result: Tensor = predictions.unflatten(0, (-1, steps)).transpose(0, 1)
        return result

    def _block(self, block: Any, ops: Ops, *, own: int | None = None) -> _Levels:
        attentions = block.attentions if has_cross_attention(block) else (None,) * len(block.resnets)
        made: list[tuple[Any, ...]] = []
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            # The first one of all computes everything once, so its norm is whole.
            shared = self._shared and bool(self._up or made)
            made.append((Resnet(resnet, ops, own=own, shared=shared), *self._rest(resnet, attention, ops)))
            own = None if own is None else int(resnet.conv2.out_channels)
        return made

    def _mid_block(self, block: Any, ops: Ops) -> _Levels:
        # A resnet, then pairs of a transformer and a resnet.
        attentions = (*block.attentions, None)
        if len(attentions) != len(block.resnets):
            raise NotFusable("the UNet's mid block is not Stable Diffusion's", hint="run it plainly")
        pairs = zip(block.resnets, attentions, strict=True)
        return [(Resnet(resnet, ops), *self._rest(resnet, attention, ops)) for resnet, attention in pairs]

    def _rest(self, resnet: Any, attention: Any, ops: Ops) -> tuple[int, Transformer | None, list[int]]:
        shift = self._shifts.add(*Resnet.time_layer(resnet))
        if attention is None:
            return shift, None, []
        return shift, Transformer(attention, ops), [self._keys.add(one) for one in Transformer.text_layers(attention)]


_Levels = list[tuple[Resnet, int, "Transformer | None", list[int]]]


class _Pieces:
    """Many linear layers over one input, as one product."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self._sizes: list[int] = []

    def add(self, weight: Tensor, bias: Tensor | None = None) -> int:
        """One more layer; returns its number."""
        self._weights.append(weight)
        self._sizes.append(weight.shape[0])
        if bias is not None:
            self._biases.append(bias)
        return len(self._sizes) - 1

    def join(self) -> None:
        """No more layers come."""
        self._weight = torch.cat(self._weights) if self._weights else None
        self._bias = torch.cat(self._biases) if self._biases else None
        self._weights, self._biases = [], []

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._weight is None:
            return inputs[..., :0]
        return F.linear(inputs, self._weight, self._bias)

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Each layer's part of an output, views."""
        result: tuple[Tensor, ...] = outputs.split(self._sizes, dim=-1)
        return result


def _downsampler(block: Any, ops: Ops) -> Conv | None:
    if block.downsamplers is None:
        return None
    (layer,) = block.downsamplers
    if not layer.use_conv or layer.padding != 1 or layer.norm is not None:
        raise NotFusable("a downsampler is not Stable Diffusion's", hint="run it plainly")
    return Conv(layer.conv, ops, stride=2)
