"""The four modules that become graphs: plain tensors in and out, with the names that are part of the format.

text_encoder: input_ids ─▶ text_states
unet_encoder: noise, text_states ─▶ mid, skip_00 …        (the time is a constant in it)
unet_decoder: mid, skip_00 …, text_states, noise, timesteps, weights ─▶ latents
vae_decoder:  latents ─▶ images

At the border noise, weights and latents are float32 whatever the precision: the weighted sum takes the unrounded noise,
and its terms cancel. The hand-off between the graphs (text states, features) is in the graph's own precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tiue_cli.errors import ModelFolderError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.unet import UNetEncoder, UNetFeatures, time_embedding


class TextEncoderGraph(nn.Module):
    """Prompts as tokens to text states. Raises ModelFolderError for a text encoder that wants the padding mask."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        if getattr(text_encoder.config, "use_attention_mask", False):
            raise ModelFolderError(
                "the text encoder's config asks for the padding mask (use_attention_mask); the graph has no such input",
                hint="set use_attention_mask to false: Stable Diffusion was trained without it",
            )
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 → (B, L, D)."""
        text_states: Tensor = self.text_encoder(input_ids)[0]
        return text_states


class UNetEncoderGraph(nn.Module):
    """The UNet encoder at its one timestep; trace it inside ``folded_time``."""

    def __init__(self, unet: UNet2DConditionModel, timestep: int) -> None:
        super().__init__()
        self.encoder = UNetEncoder(unet)
        self.timestep = timestep

    def forward(self, noise: Tensor, text_states: Tensor) -> tuple[Tensor, ...]:
        """(B, C, h, w) float32 and (B, L, D) → the mid feature, then the skips in the order they arise."""
        mid, skips = self.encoder(noise.to(text_states.dtype), text_states, self.timestep)
        return (mid, *skips)


class UNetDecoderGraph(nn.Module):
    """The sharing UNet decoder over K timesteps, and the weighted sum of the noise and its predictions."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.decoder = SharedUNetDecoder(unet)

    def forward(
        self,
        mid: Tensor,
        skips: list[Tensor],
        text_states: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Latents (B, C, h, w) float32; noise (B, C, h, w), timesteps (K,) int64, weights (K + 1,) float32."""
        predictions = self.decoder(UNetFeatures(mid, tuple(skips)), timesteps, text_states)
        # Multiply and add, no matmul: that could run in TF32.
        terms = weights[1:, None, None, None, None] * predictions.float()
        return weights[0] * noise + terms.sum(0)


class VaeDecoderGraph(nn.Module):
    """Latents to pixels, rounded as ``ImageDecoder`` rounds."""

    def __init__(self, decoder: ImageDecoder) -> None:
        super().__init__()
        self.vae = decoder.vae
        self._decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) float32 → (B, H, W, 3) uint8."""
        images = self._decoder.decode_float(latents)
        levels = (images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        # The cast comes last: TensorRT has uint8 at the border only.
        return levels.round().to(torch.uint8)


@contextlib.contextmanager
def folded_time(unet: UNet2DConditionModel, timestep: int) -> Iterator[None]:
    """Inside, every time projection of the UNet encoder is the constant that it is at ``timestep``.

    Computed in the UNet's precision at entry; a cast inside (``unet.half()``) casts the constants as well. The exporter
    does not fold this by itself, and a graph with a timestep in it would ask for the time embedding's weights.
    """
    device = unet.conv_in.weight.device
    embedding = time_embedding(unet, torch.tensor([timestep], device=device), unet.dtype)
    projections = {resnet: resnet.time_emb_proj for resnet in encoder_resnets(unet)}
    try:
        for resnet, projection in projections.items():
            activated = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
            resnet.time_emb_proj = _Constant(projection(activated))
        yield
    finally:
        for resnet, projection in projections.items():
            resnet.time_emb_proj = projection.to(unet.dtype)  # it missed a cast of the UNet meanwhile


def encoder_resnets(unet: UNet2DConditionModel) -> list[Any]:
    """The residual blocks of the UNet encoder."""
    blocks: list[Any] = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    return [resnet for block in blocks for resnet in block.resnets]


class _Constant(nn.Module):
    """Answers the same tensor whatever it is asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach())

    def forward(self, _: Tensor) -> Any:
        return self.value
