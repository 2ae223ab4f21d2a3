"""The losses of the distillation: pure functions of tensors, each with its equation and its source.

B images, K decoder timesteps, latents (B, C, h, w). ``abar`` is the cumulative product of the alphas; a noisy latent is
x_t = sqrt(abar)·x_0 + sigma·noise with sigma = sqrt(1 - abar).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tiue_cli.model.schedule import LinearCombine, alphas_cumprod, ddim_config


@dataclass(frozen=True)
class NoiseSchedule:
    """sqrt(abar) and sigma of every training timestep, each (T,) in float32, on the device where they are used."""

    root_abar: Tensor
    sigma: Tensor
    prediction_type: str

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any], device: torch.device | str = "cpu") -> NoiseSchedule:
        """Derived in float64 from the scheduler config. Raises SchedulerError."""
        abar = alphas_cumprod(scheduler_config)
        prediction_type = str(ddim_config(scheduler_config)["prediction_type"])
        root_abar, sigma = (
            torch.from_numpy(np.sqrt(values).astype(np.float32)).to(device) for values in (abar, 1 - abar)
        )
        return cls(root_abar, sigma, prediction_type)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sigma at timesteps (B,), each (B, 1, 1, 1)."""
        shape = (-1, 1, 1, 1)
        return self.root_abar[timesteps].reshape(shape), self.sigma[timesteps].reshape(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 (B, C, h, w), noise of that shape and timesteps (B,). DDPM (Ho et al. 2020), eq. 4."""
        root_abar, sigma = self.at(timesteps)
        return root_abar * latents + sigma * noise

    def noise_of(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction (B, C, h, w) at x_t implies, in float32.

        epsilon: itself. v: sqrt(abar)·v + sigma·x_t (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
        """
        prediction = prediction.float()
        if self.prediction_type == "epsilon":
            return prediction
        root_abar, sigma = self.at(timesteps)
        return root_abar * prediction + sigma * x_t

    def target_of(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict at x_t(latents, noise): the noise, or v = sqrt(abar)·noise - sigma·x_0."""
        if self.prediction_type == "epsilon":
            return noise
        root_abar, sigma = self.at(timesteps)
        return root_abar * noise - sigma * latents


def guided(conditional: Tensor, unconditional: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, in Stable Diffusion's scale: 1 is off)."""
    return unconditional + guidance * (conditional - unconditional)


def vsd_gradient(teacher_noise: Tensor, lora_noise: Tensor, sigma: Tensor) -> Tensor:
    """sigma²·(teacher - LoRA teacher) of the noise that each predicts at x_t; all (B, C, h, w), sigma broadcasts.

    ProlificDreamer (Wang et al. 2023, arXiv 2305.16213, eq. 9) with the weight of SwiftBrush and TiUE.
    """
    return sigma.square() * (teacher_noise - lora_noise)


def vsd_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative by ``latents`` (B, C, h, w) is ``gradient`` / number of elements.

    ½·mse(x_0, stopgrad(x_0 - gradient)), which also reports the gradient's size.
    """
    return 0.5 * (latents - (latents - gradient).detach()).square().mean()


def kl_to_standard_normal(noise_predictions: Tensor, *, kind: Literal["sum", "mean"]) -> Tensor:
    """Σ or mean over the K·B tensors of KL(N(μ, s²) ‖ N(0, 1)) = ½(μ² + s² - 1 - ln s²); a scalar.

    ``noise_predictions`` (K, B, C, h, w); μ and s² are mean and (biased) variance over C, h, w. TiUE (Li et al. 2025),
    eq. 8. The authors sum: then the strength grows with K·B; ``mean`` with K·B times the weight is the same.
    """
    values = noise_predictions.float().flatten(2)
    variance, mean = torch.var_mean(values, dim=-1, correction=0)
    divergence = 0.5 * (mean.square() + variance - 1.0 - variance.log())
    return divergence.sum() if kind == "sum" else divergence.mean()


def lora_loss(
    prediction: Tensor,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    kind: Literal["prediction", "alpha-noise"],
) -> Tensor:
    """Denoising score matching on the student's latents; a scalar. All (B, C, h, w), timesteps (B,).

    ``prediction``: mean squared error of the model's own output (DDPM's simple loss, or v's). ``alpha-noise``: of
    sqrt(abar)·(predicted noise - noise), the TiUE authors' weight.
    """
    if kind == "prediction":
        return (prediction.float() - schedule.target_of(latents, noise, timesteps)).square().mean()
    x_t = schedule.add_noise(latents, noise, timesteps)
    root_abar, _ = schedule.at(timesteps)
    return (root_abar * (schedule.noise_of(prediction, x_t, timesteps) - noise)).square().mean()


def regression_loss(latents: Tensor, solution: Tensor) -> Tensor:
    """Mean squared error of the student's x_0 against the teacher's solution from the same noise; a scalar."""
    return (latents.float() - solution).square().mean()


def prefix_loss(noise: Tensor, predictions: Tensor, solution: Tensor, prefixes: Sequence[LinearCombine]) -> Tensor:
    """The regression on what the solver has after each of the first k < K timesteps; mean over k, 0 where K is 1.

    ``predictions`` (K, B, C, h, w); ``prefixes`` are the weighted sums over the first k timesteps. Each sum ends at
    x_0, so each prediction learns to be worth stopping at.
    """
    if not prefixes:
        return predictions.new_zeros(())
    losses = [regression_loss(combine(noise, predictions[: len(combine.timesteps)]), solution) for combine in prefixes]
    return torch.stack(losses).mean()


def clamped_clip_loss(text: Tensor, images: Tensor, threshold: float) -> Tensor:
    """Mean of relu(threshold - cosine) over embeddings (B, D). SwiftBrush v2 (arXiv 2408.14176), eq. 6."""
    cosine = torch.nn.functional.cosine_similarity(text.float(), images.float(), dim=-1)
    return (threshold - cosine).relu().mean()


def annealed(weight: float, step: int, steps: int) -> float:
    """``weight`` at step 0, falling linearly, exactly 0 from ``steps`` on."""
    return weight * max(0.0, 1.0 - step / steps)
