"""From latents to pixels: ``AutoencoderKL`` and ``AutoencoderTiny`` behind one decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny

from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.model.finite import BadLatentsError, not_finite

_PIXELS_AT_ONCE = 4 * 512 * 512
"""Images are decoded in groups of at most this many pixels: Stable Diffusion's decoder needs about 1 GB of activations
for each 512 x 512 image in float32, and a large batch must not fail at its last step."""


class ImageDecoder:
    """The decoding half of an autoencoder, with the scale that the UNet's latents have against the autoencoder's."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
            raise ModelFolderError(
                f"{type(vae).__name__} is not an autoencoder that tiue can decode with",
                hint="use an AutoencoderKL or an AutoencoderTiny",
            )
        config: Any = vae.config
        shift = getattr(config, "shift_factor", None)
        self.vae = vae
        self.latent_channels = int(config.latent_channels)
        self.factor = _factor(vae)
        self._scale = float(config.scaling_factor)
        self._shift = 0.0 if shift is None else float(shift)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latents (h, w) for an image of ``size`` (H, W) pixels. UsageError unless both sides are multiples."""
        return latent_size(size, self.factor)

    def decode_float(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) float32, nominally in [-1, 1] and not clamped, from latents (B, C, h, w); differentiable.

        Both classes answer in [-1, 1]: AutoencoderTiny works in [0, 1] inside and converts.
        """
        # Scaled before the cast: half precision would round the latents twice.
        scaled = self.scaled(latents)
        images: torch.Tensor = self.vae.decode(scaled.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return images.float()

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents, float32, from the UNet's."""
        return latents.float() / self._scale + self._shift

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Images (B, H, W, 3) uint8 from latents (B, C, h, w), rounded as diffusers' VaeImageProcessor rounds.

        Raises DeviceError where the arithmetic overflows (a float16 autoencoder that was not made for it).
        """
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        groups = latents.split(images_at_once(pixels))
        return np.concatenate([self._to_bytes(self.decode_float(group), group) for group in groups])

    def _to_bytes(self, images: torch.Tensor, latents: torch.Tensor) -> np.ndarray:
        if not bool(torch.isfinite(images).all()):
            if not bool(torch.isfinite(latents).all()):
                raise BadLatentsError(
                    "the UNet produced NaN or infinity", hint="use float32: --precision fp32; or another model"
                )
            raise not_finite("autoencoder", self.vae, instead="another autoencoder: --vae FOLDER|HUB_ID")
        return to_levels(images).cpu().numpy()


def to_levels(images: torch.Tensor) -> torch.Tensor:
    """Bytes (B, H, W, 3) uint8 of images (B, 3, H, W) in [-1, 1], rounded as diffusers' VaeImageProcessor rounds."""
    return ((images * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


def images_at_once(size: int) -> int:
    """How many images of ``size`` pixels are decoded in one group on a CPU; at least one."""
    return max(1, _PIXELS_AT_ONCE // size)


def latent_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Latents (h, w) for an image of ``size`` (H, W) pixels, ``factor`` a latent. UsageError unless it divides both."""
    height, width = size
    if height < 1 or width < 1 or height % factor or width % factor:
        near = [max(1, round(side / factor)) * factor for side in size]
        raise UsageError(
            f"{height}x{width} pixels do not fit: this model's sides are multiples of {factor}",
            hint=f"the nearest size is {near[0]}x{near[1]}",
        )
    return height // factor, width // factor


def _factor(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """Pixels per latent along each side: every level of the decoder but the last one enlarges."""
    config: Any = vae.config
    if isinstance(vae, AutoencoderTiny):
        return int(config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1))
    return int(2 ** (len(config.block_out_channels) - 1))
