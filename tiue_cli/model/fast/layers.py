"""Resnets and transformers of Stable Diffusion over channels-last memory, with what does not change worked out once.

Weights are read from diffusers' modules when these are made, and cut, joined and merged there: whoever changes the
weights afterwards makes them anew. For inference only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiue_cli.errors import ModelFolderError
from tiue_cli.model.fast.ops import Ops
from tiue_cli.model.shared import merged_weight


class NotFusable(ModelFolderError):
    """A module is not what Stable Diffusion has there; the plain modules can run it."""


def plain_layer(module: Any, kind: type[nn.Module]) -> Any:
    """The module, where reading its weights says all that calling it would. Raises NotFusable."""
    if type(module) is kind and "forward" not in vars(module):
        return module
    raise NotFusable(
        f"a {type(module).__name__} lies where Stable Diffusion has a {kind.__name__}",
        hint="merge adapters into the weights, or run it plainly",
    )


def channels_last(weight: Tensor) -> Tensor:
    """A convolution's weight as cuDNN wants it beside channels-last images."""
    return weight.detach().contiguous(memory_format=torch.channels_last)


def as_tokens(image: Tensor) -> Tensor:
    """(rows, C, h, w) in channels-last memory → (rows, h·w, C), a view."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(rows, h·w, C) → (rows, C, h, w) in channels-last memory, a view."""
    result: Tensor = tokens.unflatten(1, (size[0], size[1])).permute(0, 3, 1, 2)
    return result


class GroupNorm:
    """A group norm, with SiLU where ``silu``; over some of its channels where ``channels`` says so (whole groups)."""

    def __init__(self, norm: Any, ops: Ops, *, silu: bool, channels: slice | None = None) -> None:
        norm = plain_layer(norm, nn.GroupNorm)
        part = slice(0, norm.num_channels) if channels is None else channels
        self._weight, self._bias = (value.detach()[part].contiguous() for value in (norm.weight, norm.bias))
        self._groups = self._weight.shape[0] * norm.num_groups // norm.num_channels
        self._eps, self._silu, self._ops = norm.eps, silu, ops

    def __call__(
        self, inputs: Tensor, *, shift: Tensor | None = None, skip: Tensor | None = None, repeats: int = 1
    ) -> Tensor:
        """See ``Ops.group_norm``."""
        return self._ops.group_norm(
            inputs,
            self._weight,
            self._bias,
            groups=self._groups,
            eps=self._eps,
            silu=self._silu,
            shift=shift,
            skip=skip,
            repeats=repeats,
        )


class Resnet:
    """A ``ResnetBlock2D`` over ``cat([inputs, skip])``, or over the inputs alone where ``own`` is None.

    ``own`` is the number of the inputs' channels. The first convolution's bias is part of ``shift_bias``; the second
    one's and the shortcut's are added with the shortcut.
    """

    def __init__(self, resnet: Any, ops: Ops, *, own: int | None = None, shared: bool = False) -> None:
        if type(resnet.nonlinearity) is not nn.SiLU or resnet.time_embedding_norm not in ("default", "group"):
            raise NotFusable("a resnet is not Stable Diffusion's", hint="run it plainly")
        conv1, conv2 = (plain_layer(conv, nn.Conv2d) for conv in (resnet.conv1, resnet.conv2))
        channels = conv1.in_channels
        self._ops = ops
        self._own = channels if own is None else own
        group = channels // resnet.norm1.num_groups
        self._border = -(-self._own // group) * group
        self._is_shared = shared and own is not None and self._border < channels
        weight1 = channels_last(conv1.weight)
        if self._is_shared:
            self._norm1 = GroupNorm(resnet.norm1, ops, silu=True, channels=slice(0, self._border))
            self._skip_norm = GroupNorm(resnet.norm1, ops, silu=True, channels=slice(self._border, channels))
            self._conv1 = channels_last(weight1[:, : self._border])
            self._skip_conv = channels_last(weight1[:, self._border :])
        else:
            self._norm1 = GroupNorm(resnet.norm1, ops, silu=True)
            self._conv1 = weight1
        self._norm2 = GroupNorm(resnet.norm2, ops, silu=True)
        self._conv2 = channels_last(conv2.weight)
        self._conv1_bias, bias = conv1.bias.detach(), conv2.bias.detach()
        self._bias: Tensor = bias
        self._shortcut = self._skip_shortcut = None
        if resnet.conv_shortcut is not None:
            shortcut = plain_layer(resnet.conv_shortcut, nn.Conv2d)
            matrix = shortcut.weight.detach().flatten(1)
            self._shortcut = matrix[:, : self._own].contiguous()
            self._skip_shortcut = None if own is None else matrix[:, self._own :].contiguous()
            self._bias = bias if shortcut.bias is None else bias + shortcut.bias.detach()
        elif own is not None:
            raise NotFusable("a resnet with a skip has no shortcut", hint="run it plainly")
        if resnet.output_scale_factor != 1.0:
            raise NotFusable("a resnet scales its output", hint="run it plainly")

    @staticmethod
    def time_layer(resnet: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of what the resnet adds at a timestep, its first convolution's bias included."""
        if resnet.skip_time_act:
            raise NotFusable("a resnet takes its time embedding bare", hint="run it plainly")
        layer = plain_layer(resnet.time_emb_proj, nn.Linear)
        return layer.weight.detach(), layer.bias.detach() + resnet.conv1.bias.detach()

    @property
    def still_shift(self) -> Tensor:
        """(1, C): the shift of a resnet without a timestep."""
        result: Tensor = self._conv1_bias[None]
        return result

    def __call__(self, inputs: Tensor, shift: Tensor, *, skip: Tensor | None = None, repeats: int = 1) -> Tensor:
        """(R, C', h, w), ``shift`` (S, C), ``skip`` (R / repeats, …) → (R, C, h, w); see ``Ops.group_norm``."""
        if skip is None:
            inner = F.conv2d(self._norm1(inputs), self._conv1, padding=1)
        elif self._is_shared:
            straddling = skip[:, : self._border - self._own] if self._border > self._own else None
            inner = F.conv2d(self._norm1(inputs, skip=straddling, repeats=repeats), self._conv1, padding=1)
            once = F.conv2d(self._skip_norm(skip[:, self._border - self._own :]), self._skip_conv, padding=1)
            inner = self._ops.add_rows(inner, once, repeats=repeats)
        else:
            inner = F.conv2d(self._norm1(inputs, skip=skip, repeats=repeats), self._conv1, padding=1)
        output = F.conv2d(self._norm2(inner, shift=shift), self._conv2, padding=1)
        return self._with_shortcut(output, inputs, skip, repeats=repeats)

    def first(self, inputs: Tensor, skip: Tensor, shift: Tensor, *, repeats: int) -> Tensor:
        """As the call, where the inputs too are the same at every timestep: (B, …), (B, …) → (B·repeats, C, h, w)."""
        inner = F.conv2d(self._norm1(inputs, skip=skip), self._conv1, padding=1)
        rows = inner.repeat_interleave(repeats, dim=0)
        rows = rows.contiguous(memory_format=torch.channels_last)
        output = F.conv2d(self._norm2(rows, shift=shift), self._conv2, padding=1)
        assert self._shortcut is not None and self._skip_shortcut is not None
        once = F.linear(as_tokens(inputs), self._shortcut, self._bias) + F.linear(as_tokens(skip), self._skip_shortcut)
        return self._ops.add_rows(output, as_image(once, inputs.shape[-2:]), repeats=repeats)

    def _with_shortcut(self, output: Tensor, inputs: Tensor, skip: Tensor | None, *, repeats: int) -> Tensor:
        if self._shortcut is None:
            return self._ops.add_rows(output, inputs, self._bias)
        size = inputs.shape[-2:]
        if skip is None or self._skip_shortcut is None:
            return self._ops.add_rows(output, as_image(F.linear(as_tokens(inputs), self._shortcut, self._bias), size))
        total = as_tokens(output).flatten(0, 1)
        # One product more, added where it is made: no tensor of its own.
        total = total.addmm_(as_tokens(inputs).flatten(0, 1), self._shortcut.T)
        output = as_image(total.unflatten(0, (output.shape[0], -1)), size)
        once = as_image(F.linear(as_tokens(skip), self._skip_shortcut, self._bias), size)
        return self._ops.add_rows(output, once, repeats=repeats)


class Transformer:
    """A ``Transformer2DModel`` with cross-attention to keys and values that were made before."""

    def __init__(self, attention: Any, ops: Ops) -> None:
        self._norm = GroupNorm(attention.norm, ops, silu=False)
        kind = nn.Linear if attention.use_linear_projection else nn.Conv2d
        self._in, self._out = (_matrix(plain_layer(each, kind)) for each in (attention.proj_in, attention.proj_out))
        self._blocks = [_TransformerBlock(block, ops) for block in attention.transformer_blocks]

    @staticmethod
    def text_layers(attention: Any) -> list[Tensor]:
        """The weights that make keys and values of the text states, (2·C, D) a block."""
        found = []
        for block in attention.transformer_blocks:
            key, value = (plain_layer(layer, nn.Linear) for layer in (block.attn2.to_k, block.attn2.to_v))
            if key.bias is not None or value.bias is not None:
                raise NotFusable("an attention has biases", hint="run it plainly")
            found.append(torch.cat([key.weight.detach(), value.weight.detach()]))
        return found

    def __call__(self, hidden: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """(R, C, h, w) and, a block, (B, L, 2·C) → (R, C, h, w)."""
        tokens = F.linear(as_tokens(self._norm(hidden)), *self._in)
        for block, text in zip(self._blocks, texts, strict=True):
            tokens = block(tokens, text)
        # Of the sum the first one is fresh: the resnet before made it for nobody else.
        return as_image(F.linear(tokens, *self._out), hidden.shape[-2:]) + hidden


class _TransformerBlock:
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, block: Any, ops: Ops) -> None:
        for attention in (block.attn1, block.attn2):
            if attention.to_q.bias is not None or attention.norm_q is not None or attention.rescale_output_factor != 1:
                raise NotFusable("an attention is not Stable Diffusion's", hint="run it plainly")
        self._ops = ops
        self._heads = block.attn1.heads
        own = [plain_layer(layer, nn.Linear) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
        self._qkv = torch.cat([layer.weight.detach() for layer in own])
        self._own_out = _matrix(plain_layer(block.attn1.to_out[0], nn.Linear))
        self._query = plain_layer(block.attn2.to_q, nn.Linear).weight.detach()
        self._cross_out = _matrix(plain_layer(block.attn2.to_out[0], nn.Linear))
        projection = getattr(block.ff.net[0], "proj", None)
        if type(block.ff.net[0]).__name__ != "GEGLU":
            raise NotFusable("a feed-forward layer is not a GEGLU", hint="run it plainly")
        self._wide = _matrix(plain_layer(projection, nn.Linear))
        self._narrow = _matrix(plain_layer(block.ff.net[2], nn.Linear))
        norms = [plain_layer(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2, block.norm3)]
        self._norms = [(norm.weight.detach(), norm.bias.detach()) for norm in norms]
        self._eps = [norm.eps for norm in norms]

    def __call__(self, tokens: Tensor, text: Tensor) -> Tensor:
        """(R, h·w, C) and (B, L, 2·C) → (R, h·w, C)."""
        tokens, normed = self._add_norm(tokens, None, 0)
        query, key, value = F.linear(normed, self._qkv).chunk(3, dim=-1)
        answers = F.linear(self._attend(query, key, value), *self._own_out)
        tokens, normed = self._add_norm(tokens, answers, 1)
        # K timesteps of one image ask the same prompt: K·h·w queries against one set of keys and values.
        query = F.linear(normed, self._query).reshape(text.shape[0], -1, tokens.shape[-1])
        answers = F.linear(self._attend(query, *text.chunk(2, dim=-1)), *self._cross_out)
        tokens, normed = self._add_norm(tokens, answers.reshape(tokens.shape), 2)
        return tokens + F.linear(self._ops.geglu(F.linear(normed, *self._wide)), *self._narrow)

    def _add_norm(self, tokens: Tensor, addend: Tensor | None, which: int) -> tuple[Tensor, Tensor]:
        return self._ops.add_layer_norm(tokens, addend, *self._norms[which], eps=self._eps[which])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (each.unflatten(-1, (self._heads, -1)).transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Conv:
    """A convolution that keeps the size, or halves it with ``stride`` 2; its bias is added in one pass."""

    def __init__(self, conv: Any, ops: Ops, *, stride: int = 1) -> None:
        conv = plain_layer(conv, nn.Conv2d)
        self._weight = channels_last(conv.weight)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._stride, self._padding, self._ops = stride, conv.weight.shape[-1] // 2, ops

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows, C, h, w) → (rows, C', h', w')."""
        output = F.conv2d(hidden, self._weight, stride=self._stride, padding=self._padding)
        return output if self._bias is None else self._ops.add_rows(output, None, self._bias)


class Upsample:
    """Nearest neighbour, then a 3x3 convolution; one transposed convolution where ``merged`` and the size doubles."""

    def __init__(self, conv: Any, ops: Ops, *, merged: bool) -> None:
        conv = plain_layer(conv, nn.Conv2d)
        self._ops = ops
        self._weight = channels_last(conv.weight)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._merged = channels_last(merged_weight(conv.weight.detach())) if merged else None

    def __call__(self, hidden: Tensor, size: Sequence[int]) -> Tensor:
        """(rows, C, h, w) → (rows, C, *size)."""
        doubles = (size[0], size[1]) == (2 * hidden.shape[-2], 2 * hidden.shape[-1])
        if self._merged is not None and doubles:
            output = F.conv_transpose2d(hidden, self._merged, stride=2, padding=1)
        else:
            enlarged = self._ops.double(hidden) if doubles else _nearest(hidden, size)
            output = F.conv2d(enlarged, self._weight, padding=1)
        return output if self._bias is None else self._ops.add_rows(output, None, self._bias)


def _nearest(hidden: Tensor, size: Sequence[int]) -> Tensor:
    enlarged = F.interpolate(hidden, size=(size[0], size[1]), mode="nearest")
    return enlarged.contiguous(memory_format=torch.channels_last)


def _matrix(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a linear layer or a convolution of one pixel."""
    return layer.weight.detach().flatten(1), None if layer.bias is None else layer.bias.detach()
