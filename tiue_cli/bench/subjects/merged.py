"""Copies of a module that hold the same weights: for the variants that a bench compares, without their memory."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch.nn.functional as F
from diffusers.models import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tiue_cli.model.shared import merged_weight

_Module = TypeVar("_Module", bound=nn.Module)


def with_same_weights(module: _Module) -> _Module:
    """A copy whose layers may be exchanged; parameters and buffers are the original's own, not copies."""
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def merged_upsamplers(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The whole UNet with its upsamplers merged as ``SharedUNetDecoder(merged_upsampler=True)`` merges them.

    What a plain pass is compared with where the student has them: the same treatment on both sides.
    """
    merged = with_same_weights(unet)
    blocks: Any = merged.up_blocks
    for block in blocks:
        if block.upsamplers is not None:
            block.upsamplers = nn.ModuleList(_MergedUpsample(upsampler) for upsampler in block.upsamplers)
    return merged


class _MergedUpsample(nn.Module):
    """Nearest upsampling by 2 and its convolution as one transposed convolution."""

    def __init__(self, upsampler: Upsample2D) -> None:
        super().__init__()
        self.plain = upsampler

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(rows, C, h, w) → (rows, C, 2h, 2w), or as the plain layer does where another size is asked for."""
        conv: Any = self.plain.conv
        doubled = (2 * hidden.shape[-2], 2 * hidden.shape[-1])
        if output_size is not None and tuple(output_size) != doubled:
            plain: Tensor = self.plain(hidden, output_size)
            return plain
        return F.conv_transpose2d(hidden, merged_weight(conv.weight), conv.bias, stride=2, padding=1)
