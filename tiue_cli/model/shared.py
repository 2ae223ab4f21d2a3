"""The UNet decoder at K timesteps that computes once what does not depend on the timestep: the one that ships.

In the plain batch of K·B rows everything is computed K times although only the time embedding differs. With exactly the
same result (up to the order of additions) this decoder computes once an image:

- the first resnet up to and including its first convolution, and its shortcut (the mid feature is timestep-free);
- in the other resnets, whose input is ``cat([hidden, skip])``: the norm1 groups that lie wholly inside the skip, their
  activation and their part of conv1, and the skip's half of the shortcut. A group that straddles the border belongs to
  the part that is computed at every timestep;
- keys and values of the cross-attentions: once a prompt. The K timesteps are folded into the query length, so that no
  key or value is copied either;

and once a timestep, for all images: the projections of the time embedding.

Rows are image-major in here (row b·K + k is image b at timestep k): the features of an image then meet its K rows by
broadcasting, and (B·K, tokens) is (B, K·tokens) without a copy.

The caller's UNet is held, not copied, and weights are cut and summed anew on every call: any cache would go stale
unseen when weights change through ``.data`` (EMA swaps do that), and gradients flow through the cuts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tiue_cli.model.sd_configs import check_unet_config
from tiue_cli.model.unet import (
    UNetFeatures,
    decoder_levels,
    has_cross_attention,
    output_layers,
    time_embedding,
    time_projection,
)

_Module = TypeVar("_Module", bound=nn.Module)
_ResnetKind = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class SharedUNetDecoder(nn.Module):
    """The second half of the UNet at K timesteps, equal to ``UNetDecoder`` and cheaper.

    ``merged_upsampler`` turns nearest upsampling by 2 and its 3x3 convolution into one transposed 4x4 convolution
    wherever the size exactly doubles: also equal, with 4 instead of 9 multiplications for each output pixel and pair of
    channels.
    Raises ``ModelFolderError`` for a UNet that cannot be split.
    """

    def __init__(self, unet: UNet2DConditionModel, *, merged_upsampler: bool = False) -> None:
        super().__init__()
        check_unet_config(unet.config)
        self.unet = unet
        self.merged_upsampler = merged_upsampler

    def forward(self, features: UNetFeatures, timesteps: Tensor, text_states: Tensor) -> Tensor:
        """Predict at every decoder timestep.

        ``features`` of B images, ``timesteps`` (K,), ``text_states`` (B, L, D); returns (K, B, C, h, w).
        """
        unet = self.unet
        steps, batch = timesteps.shape[0], text_states.shape[0]
        embedding = time_embedding(unet, timesteps, features.mid.dtype)
        hidden = features.mid
        resnet_kind: _ResnetKind = _first_resnet
        for block, skips, size in decoder_levels(unet, features.skips):
            attentions = block.attentions if has_cross_attention(block) else (None,) * len(block.resnets)
            for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
                hidden = _checkpointed(block, resnet_kind, resnet, hidden, skip, embedding)
                resnet_kind = _resnet
                if attention is not None:
                    hidden = _transformer(attention, hidden, text_states)
            if size is not None:
                hidden = _upsample(block.upsamplers[0].conv, hidden, size, merged=self.merged_upsampler)
        result: Tensor = output_layers(unet, hidden).unflatten(0, (batch, steps)).transpose(0, 1)
        return result


class MergedUpsample(nn.Module):
    """In place of a UNet's ``Upsample2D``: the same, merged where the size exactly doubles."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.conv = upsampler.conv  # under its old name, so that weights are found

    def forward(self, hidden: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(rows, C, h, w) → (rows, C, *output_size), without one (rows, C, 2h, 2w)."""
        size = [2 * side for side in hidden.shape[-2:]] if output_size is None else output_size
        return _upsample(self.conv, hidden, size, merged=True)


def merge_upsamplers(unet: UNet2DConditionModel) -> None:
    """Exchange the UNet's upsamplers for merged ones, in place: for a caller's own copy."""
    blocks: Any = unet.up_blocks
    for block in blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(MergedUpsample(upsampler) for upsampler in block.upsamplers)


def with_same_weights(module: _Module) -> _Module:
    """A copy whose layers may be exchanged; parameters and buffers are the original's own, not copies."""
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _upsample(conv: nn.Conv2d, hidden: Tensor, size: Sequence[int], *, merged: bool) -> Tensor:
    """Nearest neighbour to ``size``, then the convolution; (rows, C, h, w) → (rows, C, *size)."""
    height, width = hidden.shape[-2:]
    if merged and _is_bare(conv, nn.Conv2d) and (size[0], size[1]) == (2 * height, 2 * width):
        return F.conv_transpose2d(hidden, merged_weight(conv.weight), conv.bias, stride=2, padding=1)
    result: Tensor = conv(F.interpolate(hidden, size=(size[0], size[1]), mode="nearest"))
    return result


def merged_weight(weight: Tensor) -> Tensor:
    """Nearest upsampling by 2 and a 3x3 convolution, (out, in, 3, 3), as one transposed one, (in, out, 4, 4).

    Stride 2, padding 1. In one dimension an even output pixel sees w0·x[i-1] + (w1+w2)·x[i] and an odd one
    (w0+w1)·x[i] + w2·x[i+1], so the four taps are w2, w1+w2, w0+w1, w0. Summed in float32 at least.
    """
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for dim in (-2, -1):
        w0, w1, w2 = merged.unbind(dim)
        merged = torch.stack([w2, w1 + w2, w0 + w1, w0], dim)
    return merged.transpose(0, 1).to(weight.dtype)


def _first_resnet(resnet: Any, mid: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
    """The resnet whose whole input is timestep-free: (B, Cm, h, w), (B, Cs, h, w), (K, T) → (B·K, C, h, w)."""
    inputs = torch.cat([mid, skip], dim=1)
    hidden = resnet.conv1(resnet.nonlinearity(resnet.norm1(inputs)))
    shortcut = inputs if resnet.conv_shortcut is None else resnet.conv_shortcut(inputs)
    hidden = hidden[:, None] + _time_bias(resnet, embedding)
    output = _by_image(_after_time(resnet, hidden.flatten(0, 1)), embedding) + shortcut[:, None]
    return _scaled(resnet, output.flatten(0, 1))


def _resnet(resnet: Any, hidden: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
    """A resnet over ``cat([hidden, skip])``: (B·K, Ch, h, w), (B, Cs, h, w), (K, T) → (B·K, C, h, w)."""
    if not all(map(_is_bare, (resnet.norm1, resnet.conv1, resnet.conv_shortcut), (nn.GroupNorm, nn.Conv2d, nn.Conv2d))):
        return _whole_resnet(resnet, hidden, skip, embedding)
    own, channels = hidden.shape[1], resnet.norm1.num_channels
    group = channels // resnet.norm1.num_groups
    border = -(-own // group) * group  # channels from here on lie in groups that are wholly the skip's
    if border > own:
        hidden_and_straddling = torch.cat([hidden, _repeated(skip[:, : border - own], embedding)], dim=1)
    else:
        hidden_and_straddling = hidden
    is_split = border < channels
    bias = None if is_split else resnet.conv1.bias
    inner = _norm_act_conv(resnet, hidden_and_straddling, slice(0, border), bias=bias)
    inner = _by_image(inner, embedding) + _time_bias(resnet, embedding)
    if is_split:
        part = _norm_act_conv(resnet, skip[:, border - own :], slice(border, channels), bias=resnet.conv1.bias)
        inner = inner + part[:, None]
    weight = resnet.conv_shortcut.weight
    skip_shortcut = F.conv2d(skip, weight[:, own:], resnet.conv_shortcut.bias)
    output = _after_time(resnet, inner.flatten(0, 1)) + F.conv2d(hidden, weight[:, :own])
    output = _by_image(output, embedding) + skip_shortcut[:, None]
    return _scaled(resnet, output.flatten(0, 1))


def _whole_resnet(resnet: Any, hidden: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
    """The resnet as it is, where a layer is not a plain one (LoRA, hooks): reading its weights would miss that."""
    row_embedding = embedding[None].expand(skip.shape[0], -1, -1).flatten(0, 1)
    result: Tensor = resnet(torch.cat([hidden, _repeated(skip, embedding)], dim=1), row_embedding)
    return result


def _norm_act_conv(resnet: Any, inputs: Tensor, channels: slice, *, bias: Tensor | None) -> Tensor:
    """norm1, activation and conv1 over some of the input channels, which are whole groups."""
    norm, conv = resnet.norm1, resnet.conv1
    groups = inputs.shape[1] // (norm.num_channels // norm.num_groups)
    hidden = F.group_norm(inputs, groups, norm.weight[channels], norm.bias[channels], norm.eps)
    return F.conv2d(resnet.nonlinearity(hidden), conv.weight[:, channels], bias, padding=conv.padding)


def _time_bias(resnet: Any, embedding: Tensor) -> Tensor:
    """What the resnet adds at each timestep, (K, T) → (1, K, C, 1, 1)."""
    return time_projection(resnet, embedding)[None, :, :, None, None]


def _after_time(resnet: Any, hidden: Tensor) -> Tensor:
    """The rest of the resnet's body once the time embedding is in; (rows, C, h, w) → the same."""
    result: Tensor = resnet.conv2(resnet.dropout(resnet.nonlinearity(resnet.norm2(hidden))))
    return result


def _scaled(resnet: Any, output: Tensor) -> Tensor:
    return output if resnet.output_scale_factor == 1.0 else output / resnet.output_scale_factor


def _transformer(attention: Any, hidden: Tensor, text_states: Tensor) -> Tensor:
    """A ``Transformer2DModel`` over (B·K, C, h, w) with text states of B prompts."""
    height, width = hidden.shape[-2:]
    tokens = attention.norm(hidden)
    if attention.use_linear_projection:
        tokens = attention.proj_in(tokens.permute(0, 2, 3, 1).flatten(1, 2))
    else:
        tokens = attention.proj_in(tokens).permute(0, 2, 3, 1).flatten(1, 2)
    for block in attention.transformer_blocks:
        tokens = _checkpointed(attention, _transformer_block, block, tokens, text_states)
    if attention.use_linear_projection:
        output = attention.proj_out(tokens).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    else:
        output = attention.proj_out(tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    # In this order the sum keeps the memory format of `hidden`.
    result: Tensor = hidden + output
    return result


def _transformer_block(block: Any, tokens: Tensor, text_states: Tensor) -> Tensor:
    """Self-attention, cross-attention, feed-forward; tokens (B·K, h·w, C), text states (B, L, D)."""
    tokens = tokens + block.attn1(block.norm1(tokens))
    # K timesteps of one image ask the same prompt: K·h·w queries against one set of keys and values.
    queries = block.norm2(tokens).reshape(text_states.shape[0], -1, tokens.shape[-1])
    answers = block.attn2(queries, encoder_hidden_states=text_states)
    tokens = tokens + answers.reshape(tokens.shape)
    result: Tensor = tokens + block.ff(block.norm3(tokens))
    return result


def _checkpointed(owner: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call, recomputing in the backward pass where the UNet was asked to (``enable_gradient_checkpointing``)."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        result: Tensor = owner._gradient_checkpointing_func(function, *args)
        return result
    return function(*args)


def _is_bare(module: nn.Module | None, type_: type[nn.Module]) -> bool:
    """Whether reading the module's weights says all that calling it would: no wrapper, no replaced ``forward``."""
    return type(module) is type_ and "forward" not in vars(module)


def _by_image(rows: Tensor, embedding: Tensor) -> Tensor:
    """(B·K, …) → (B, K, …), a view."""
    result: Tensor = rows.unflatten(0, (-1, embedding.shape[0]))
    return result


def _repeated(tensor: Tensor, embedding: Tensor) -> Tensor:
    """(B, …) → (B·K, …), each image K times, in the memory format of ``tensor``."""
    rows = tensor[:, None].expand(-1, embedding.shape[0], *tensor.shape[1:]).flatten(0, 1)
    # Else cat would answer in the other format, and norm, activation and their gradients would run in it.
    return rows.contiguous(memory_format=torch.channels_last) if tensor.stride(1) == 1 else rows
