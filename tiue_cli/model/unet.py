"""One ``UNet2DConditionModel`` as two modules: UNet encoder (once an image) and UNet decoder (K timesteps, one batch).

The UNet encoder is ``conv_in``, the down blocks and the mid block; the UNet decoder is the up blocks, ``conv_norm_out``
and ``conv_out``. Both hold the caller's UNet and call its own modules: no weight is copied, no ``forward`` patched, and
whatever the caller does to the UNet (load weights, add LoRA layers, enable gradient checkpointing, move it) holds here.
The arithmetic is that of ``UNet2DConditionModel.forward`` in diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from tiue_cli.model.sd_configs import check_unet_config


class UNetFeatures(NamedTuple):
    """What the UNet encoder hands to the UNet decoder: the same for every decoder timestep."""

    mid: Tensor
    """(B, C, h', w'), at the lowest resolution."""
    skips: tuple[Tensor, ...]
    """In the order they arise: the output of ``conv_in`` first. The UNet decoder takes them from the end."""


class UNetEncoder(nn.Module):
    """The first half of the UNet, at one timestep. Raises ``ModelFolderError`` for a UNet that cannot be split."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        check_unet_config(unet.config)
        self.unet = unet

    def forward(self, noise: Tensor, text_states: Tensor, timestep: int | Tensor) -> UNetFeatures:
        """Features of the noise (B, C, h, w) under the text states (B, L, D) at a timestep: int, () or (1,) or (B,)."""
        unet = self.unet
        timesteps = torch.as_tensor(timestep, device=noise.device).reshape(-1)
        embedding = time_embedding(unet, timesteps, noise.dtype)  # (1, T): one row serves the whole batch
        hidden = unet.conv_in(noise)
        skips = [hidden]
        for block in unet.down_blocks:
            if has_cross_attention(block):
                hidden, outputs = block(hidden_states=hidden, temb=embedding, encoder_hidden_states=text_states)
            else:
                hidden, outputs = block(hidden_states=hidden, temb=embedding)
            skips.extend(outputs)
        if unet.mid_block is not None:  # some pruned models have none
            hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=text_states)
        return UNetFeatures(hidden, tuple(skips))


class UNetDecoder(nn.Module):
    """The second half of the UNet at K timesteps, as a plain batch of K·B rows: the reference for the sharing one.

    Raises ``ModelFolderError`` for a UNet that cannot be split.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        check_unet_config(unet.config)
        self.unet = unet

    def forward(self, features: UNetFeatures, timesteps: Tensor, text_states: Tensor) -> Tensor:
        """Predict at every decoder timestep.

        ``features`` of B images, ``timesteps`` (K,), ``text_states`` (B, L, D); returns (K, B, C, h, w). Rows are
        timestep-major: row k·B + b is image b at timestep k.
        """
        unet = self.unet
        steps, batch = timesteps.shape[0], text_states.shape[0]
        embedding = time_embedding(unet, timesteps, features.mid.dtype)
        embedding = embedding[:, None].expand(-1, batch, -1).flatten(0, 1)
        row_states = _rows(text_states, steps)
        hidden = _rows(features.mid, steps)
        for block, skips, size in decoder_levels(unet, features.skips):
            row_skips = tuple(_rows(skip, steps) for skip in skips)
            if has_cross_attention(block):
                hidden = block(hidden, row_skips, embedding, encoder_hidden_states=row_states, upsample_size=size)
            else:
                hidden = block(hidden, row_skips, embedding, upsample_size=size)
        result: Tensor = output_layers(unet, hidden).unflatten(0, (steps, batch))
        return result


def time_embedding(unet: UNet2DConditionModel, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """The embedding of each timestep, (K,) → (K, T), in ``dtype``; as the UNet makes it."""
    # time_proj has no weights and answers in float32, the layers after it may hold another precision.
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(dtype))
    result: Tensor = embedding if unet.time_embed_act is None else unet.time_embed_act(embedding)
    return result


def time_projection(resnet: Any, embedding: Tensor) -> Tensor:
    """What a residual block adds at each timestep, (K, T) → (K, C)."""
    activated = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
    result: Tensor = resnet.time_emb_proj(activated)
    return result


def decoder_levels(
    unet: UNet2DConditionModel, skips: tuple[Tensor, ...]
) -> Iterator[tuple[Any, tuple[Tensor, ...], torch.Size | None]]:
    """Each up block, the skips it takes (it takes the last one first), and the (h, w) it upsamples to.

    The size is that of the next skip, which serves every latent size; None in the last block, which has no upsampler.
    """
    blocks: Any = unet.up_blocks
    for block in blocks:
        count = len(block.resnets)
        skips, taken = skips[:-count], skips[-count:]
        yield block, taken, skips[-1].shape[-2:] if skips else None


def output_layers(unet: UNet2DConditionModel, hidden: Tensor) -> Tensor:
    """Predictions (rows, C, h, w) from the last up block's output."""
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    result: Tensor = unet.conv_out(hidden)
    return result


def has_cross_attention(block: nn.Module) -> bool:
    """Whether the block takes text states."""
    return bool(getattr(block, "has_cross_attention", False))


def _rows(tensor: Tensor, steps: int) -> Tensor:
    """(B, …) → (K·B, …), the whole batch once a timestep."""
    return tensor[None].expand(steps, *tensor.shape).flatten(0, 1)
