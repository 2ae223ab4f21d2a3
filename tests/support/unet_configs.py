"""Tiny UNets in the shapes of Stable Diffusion 1.5 and 2.1, whose norm groups straddle and meet the skip border."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tiue_cli.model.sd_configs import SD15_UNET, SD21_UNET
from tiue_cli.model.unet import UNetEncoder, UNetFeatures

_TINY: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}

TINY_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**SD15_UNET, **_TINY, "attention_head_dim": 2},
    "sd21": {**SD21_UNET, **_TINY, "attention_head_dim": (2, 4, 6)},
}


def tiny_unet(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> UNet2DConditionModel:
    """A tiny UNet with random weights, norms and biases included (their defaults would hide a missing term)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**copy.deepcopy({**TINY_UNETS[name], **changes}))
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    torch.nn.Module.to(unet, dtype)  # diffusers' own `to` warns about every cast
    return unet.eval()


def draw_inputs(
    unet: UNet2DConditionModel, batch: int, size: tuple[int, int], *, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, 4, h, w) and text states (B, 7, D) in the UNet's precision."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((batch, unet.config.in_channels, *size), generator=generator, dtype=torch.float64)
    text_states = torch.randn((batch, 7, unet.config.cross_attention_dim), generator=generator, dtype=torch.float64)
    return noise.to(unet.dtype), text_states.to(unet.dtype)


def encoded_features(unet: UNet2DConditionModel, batch: int, size: tuple[int, int], *, seed: int = 1) -> UNetFeatures:
    """Features at the first decoder timestep, as leaves that ask for gradients."""
    noise, text_states = draw_inputs(unet, batch, size, seed=seed)
    with torch.no_grad():
        features = UNetEncoder(unet)(noise, text_states, 999)
    return UNetFeatures(features.mid.requires_grad_(), tuple(skip.requires_grad_() for skip in features.skips))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    return float((actual - expected).double().norm() / expected.double().norm())
