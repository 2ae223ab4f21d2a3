"""The optional CLIP loss: pictures of the student, decoded and read by a CLIP model, pulled to their prompts.

A rewarding of what CLIP sees: useful late and lightly, hence the clamp and the falling weight (SwiftBrush v2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, CLIPTokenizer

from tiue_cli.distill.config import ClipSettings, DistillConfig
from tiue_cli.distill.losses import clamped_clip_loss
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import load_vae
from tiue_cli.model.hub import resolve_vae
from tiue_cli.model.pretrained import load_pretrained

# What all of OpenAI's and LAION's CLIP models were trained with (their preprocessor_config.json).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipLoss:
    """Called with latents (B, C, h, w) and their prompts: the clamped loss, differentiable by the latents.

    ``half`` runs decoder and CLIP under autocast in that type. ``recompute`` decodes image by image, and again in the
    backward pass: one image's activations at a time (5.7 GiB in float32 at 512 x 512 with Stable Diffusion's decoder).
    """

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizer,
        decoder: ImageDecoder,
        *,
        threshold: float,
        half: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        self._clip, self._tokenizer, self._decoder, self._threshold = clip, tokenizer, decoder, threshold
        self._half, self._recompute = half, recompute
        config: Any = clip.config
        self._side = int(config.vision_config.image_size)
        statistics = torch.tensor([_MEAN, _DEVIATION], device=clip.device).reshape(2, 1, 3, 1, 1)
        self._mean, self._deviation = statistics.unbind()

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.autocast(self._clip.device.type, dtype=self._half, enabled=self._half is not None):
            return self._loss(latents, prompts)

    def _loss(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        images = self.preprocess(self.decode(latents))
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(
            self._clip.device
        )
        with torch.no_grad():
            text = self._clip.get_text_features(**tokens).pooler_output
        seen = self._clip.get_image_features(pixel_values=images).pooler_output
        return clamped_clip_loss(text.float(), seen.float(), self._threshold)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 from latents (B, C, h, w)."""
        if not self._recompute:
            return self._decoder.decode_float(latents)
        decode = self._decoder.decode_float
        return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] as CLIP takes them: its side's squares, normalised."""
        side = (self._side, self._side)
        sized = F.interpolate(images, size=side, mode="bicubic", antialias=True, align_corners=False)
        return ((sized / 2 + 0.5).clamp(0, 1) - self._mean) / self._deviation


def make_clip_loss(
    settings: ClipSettings,
    *,
    teacher_vae: AutoencoderKL | AutoencoderTiny,
    device: torch.device,
    half: torch.dtype | None = None,
    recompute: bool = False,
) -> ClipLoss:
    """Load the CLIP model and the decoder of ``settings``, frozen; see ``ClipLoss``. Raises ModelFolderError."""
    what, hint = f"clip.model {settings.model}", "give a CLIPModel's folder or hub id, or set clip.weight=0"
    clip = load_pretrained(CLIPModel, settings.model, what=what, hint=hint, error=ModelFolderError)
    tokenizer = load_pretrained(CLIPTokenizer, settings.model, what=what, hint=hint, error=ModelFolderError)
    vae: Any = teacher_vae if settings.vae is None else load_vae(resolve_vae(settings.vae))
    for module in (clip, vae):
        module.requires_grad_(False).eval().to(device)
    return ClipLoss(clip, tokenizer, ImageDecoder(vae), threshold=settings.threshold, half=half, recompute=recompute)


def recomputes(config: DistillConfig, *, half: bool) -> bool:
    """Whether a run decodes for CLIP image by image, twice: where memory is what limits it."""
    return half or config.gradient_checkpointing
