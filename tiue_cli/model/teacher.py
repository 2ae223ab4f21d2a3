"""The teacher: many steps of deterministic DDIM with classifier-free guidance, the reference for all comparisons.

Sampling is diffusers' own ``StableDiffusionPipeline``; here it only gets its noise, its scheduler and its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from tiue_cli.errors import SchedulerError, UsageError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import Components, load_components, quiet
from tiue_cli.model.folder import ModelInfo
from tiue_cli.model.hub import TEACHER_GUIDANCE, TEACHER_STEPS
from tiue_cli.model.schedule import alphas_cumprod, ddim_config
from tiue_cli.model.text import cut_text, encode_prompts

Progress = Callable[[int], None]
"""Called after each step with the number of steps done."""


class Teacher:
    """A loaded many-step model. The parts are plain diffusers and transformers modules, free to be used."""

    def __init__(self, components: Components) -> None:
        self.info: ModelInfo = components.info
        self.tokenizer = components.tokenizer
        self.text_encoder = components.text_encoder
        self.unet = components.unet
        self.vae = components.vae
        self.scheduler_config = components.scheduler_config
        self.decoder = ImageDecoder(components.vae)
        self._pipeline = _pipeline(components)

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text states (B, L, D); see ``tiue_cli.model.text``."""
        return encode_prompts(self.tokenizer, self.text_encoder, prompts)

    def cut_text(self, prompts: Sequence[str]) -> list[str]:
        """The end of each prompt that does not fit; "" where it does."""
        return cut_text(self.tokenizer, prompts)

    def sample(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        *,
        steps: int = TEACHER_STEPS,
        guidance: float = TEACHER_GUIDANCE,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Images (B, H, W, 3) uint8 from prompts (B) and noise (B, C, h, w); see ``latents``."""
        return self.decoder.decode(self.latents(prompts, noise, steps=steps, guidance=guidance, progress=progress))

    def latents(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        *,
        steps: int = TEACHER_STEPS,
        guidance: float = TEACHER_GUIDANCE,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """Latents (B, C, h, w) after ``steps`` DDIM steps from ``noise`` (B, C, h, w), in the UNet's dtype.

        DDIM (Song et al. 2021) with η = 0; prediction = unconditional + guidance·(conditional - unconditional) (Ho and
        Salimans 2022). ``guidance`` 1 or less means the conditional prediction alone, at half the cost. Timesteps are
        spaced as the folder's scheduler config says. Raises UsageError.
        """
        self._check(prompts, noise, steps=steps)
        return self.denoise(
            self.encode_prompts(prompts),
            noise,
            unconditional=self.encode_prompts([""] * len(prompts)) if guidance > 1.0 else None,
            steps=steps,
            guidance=guidance,
            progress=progress,
        )

    def denoise(
        self,
        text_states: torch.Tensor,
        noise: torch.Tensor,
        *,
        unconditional: torch.Tensor | None,
        steps: int = TEACHER_STEPS,
        guidance: float = TEACHER_GUIDANCE,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """``latents`` from text states (B, L, D) and those of the empty prompt, None where nothing guides."""
        with quiet():
            latents: torch.Tensor = self._pipeline(
                prompt_embeds=text_states.to(self.unet.dtype),
                negative_prompt_embeds=None if unconditional is None else unconditional.to(self.unet.dtype),
                latents=noise.to(self.unet.device, self.unet.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                # Read by a check alone, as the noise is given: and that check wants multiples of 8, whatever the model.
                height=64,
                width=64,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=None if progress is None else _reporter(progress),
            )[0]
        return latents

    def _check(self, prompts: Sequence[str], noise: torch.Tensor, *, steps: int) -> None:
        if len(prompts) == 0 or len(prompts) != noise.shape[0]:
            raise UsageError(
                f"{len(prompts)} prompts, but noise for {noise.shape[0]} images",
                hint="give noise for each prompt",
            )
        last = int(self._pipeline.scheduler.config.num_train_timesteps)
        if not 1 <= steps <= last:
            raise UsageError(f"{steps} teacher steps are outside 1 to {last}", hint=f"{TEACHER_STEPS} is usual")
        scheduler = self._pipeline.scheduler
        scheduler.set_timesteps(steps)
        first = int(scheduler.timesteps[0])
        if scheduler.config.prediction_type == "epsilon" and float(scheduler.alphas_cumprod[first]) == 0.0:
            raise SchedulerError(
                f"timestep {first} has abar 0 (zero terminal SNR), where an epsilon prediction says nothing about the"
                " image",
                hint="such models predict v, or their rescale_betas_zero_snr is false: correct scheduler_config.json",
            )


def load_teacher(
    source: str | Path | ModelInfo,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
) -> Teacher:
    """Load a model folder, embedded name, hub id or checked folder as a many-step sampler.

    Raises ModelFolderError, ManifestError, SchedulerError or DeviceError.
    """
    return Teacher(load_components(source, device=device, dtype=dtype, vae=vae))


def _pipeline(components: Components) -> Any:
    """diffusers' pipeline over the components, with DDIM as the folder's scheduler config defines it."""
    alphas_cumprod(components.scheduler_config)  # refuses, in our words, what diffusers would not build
    with quiet():
        # Inside, as the import itself prints a warning about an image processor that is not used here.
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        class_: Any = StableDiffusionPipeline  # its annotations allow neither AutoencoderTiny nor None
        pipeline = class_(
            tokenizer=components.tokenizer,
            text_encoder=components.text_encoder,
            unet=components.unet,
            vae=components.vae,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        # Afterwards, as the constructor rewrites some configs (steps_offset) that are what the model was trained with.
        pipeline.scheduler = DDIMScheduler.from_config(ddim_config(components.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _reporter(progress: Progress) -> Callable[..., dict[str, Any]]:
    def report(pipeline: object, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1)
        return tensors

    return report
