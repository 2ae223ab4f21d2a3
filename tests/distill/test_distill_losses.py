"""Every loss against an oracle that shares no code with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import seeded_noise

from tiue_cli.distill.losses import (
    NoiseSchedule,
    annealed,
    clamped_clip_loss,
    guided,
    kl_to_standard_normal,
    lora_loss,
    prefix_loss,
    regression_loss,
    vsd_gradient,
    vsd_loss,
)
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.sd_configs import SD15_SCHEDULER

TYPES = ("epsilon", "v_prediction")


def config_of(prediction_type: str) -> dict[str, Any]:
    return {**SD15_SCHEDULER, "prediction_type": prediction_type}


def ddpm(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False,
    )  # fmt: skip


def test_noise_is_added_as_diffusers_adds_it() -> None:
    schedule, timesteps = NoiseSchedule.from_config(config_of("epsilon")), torch.tensor([0, 20, 500, 980, 999])
    latents, noise = seeded_noise((5, 4, 3, 3)), seeded_noise((5, 4, 3, 3), seed=1)
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, timesteps), ddpm("epsilon").add_noise(latents, noise, timesteps)
    )


def test_velocity_target_is_diffusers_velocity() -> None:
    schedule, timesteps = NoiseSchedule.from_config(config_of("v_prediction")), torch.tensor([3, 400, 999])
    latents, noise = seeded_noise((3, 4, 2, 2)), seeded_noise((3, 4, 2, 2), seed=1)
    torch.testing.assert_close(
        schedule.target_of(latents, noise, timesteps), ddpm("v_prediction").get_velocity(latents, noise, timesteps)
    )


@pytest.mark.parametrize("prediction_type", TYPES)
def test_noise_of_a_perfect_prediction_is_the_noise(prediction_type: str) -> None:
    schedule, timesteps = NoiseSchedule.from_config(config_of(prediction_type)), torch.tensor([10, 300, 990])
    latents, noise = seeded_noise((3, 4, 2, 2)), seeded_noise((3, 4, 2, 2), seed=1)
    x_t = schedule.add_noise(latents, noise, timesteps)
    perfect = schedule.target_of(latents, noise, timesteps)
    torch.testing.assert_close(schedule.noise_of(perfect, x_t, timesteps), noise, rtol=1e-5, atol=1e-5)


def test_guidance_one_and_zero_are_the_two_predictions() -> None:
    conditional, unconditional = seeded_noise((2, 4)), seeded_noise((2, 4), seed=1)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 4.5), 4.5 * conditional - 3.5 * unconditional)


def test_vsd_gradient_by_hand() -> None:
    sigma = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1)
    gradient = vsd_gradient(torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0), sigma)
    assert gradient.flatten().tolist() == [0.5, 8.0]


def test_vsd_loss_has_the_gradient_it_was_given() -> None:
    latents = seeded_noise((2, 4, 3, 3), dtype=torch.float64).requires_grad_()
    gradient = seeded_noise((2, 4, 3, 3), seed=1, dtype=torch.float64)
    vsd_loss(latents, gradient).backward()
    torch.testing.assert_close(latents.grad, gradient / latents.numel())


def test_vsd_gradient_leads_to_the_teachers_mean() -> None:
    """Gaussians have scores in closed form: following sigma²·Δ brings the student's mean to the teacher's."""
    schedule = NoiseSchedule.from_config(config_of("epsilon"))
    mean, target, deviation = torch.tensor([2.0]), torch.tensor([-1.0]), 0.5
    timesteps = torch.arange(20, 981, 60)
    root_abar, sigma = (value.flatten() for value in schedule.at(timesteps))
    variance = root_abar.square() * deviation**2 + sigma.square()
    for _ in range(200):
        x_t = root_abar * mean  # any point: the difference of the two scores does not depend on it
        teacher_noise = sigma * (x_t - root_abar * target) / variance
        student_noise = sigma * (x_t - root_abar * mean) / variance
        mean = mean - vsd_gradient(teacher_noise, student_noise, sigma).mean()
    torch.testing.assert_close(mean, target, rtol=0, atol=1e-3)


def test_kl_equals_torch_distributions() -> None:
    noises = 1.3 * seeded_noise((3, 2, 4, 5, 5), dtype=torch.float64) + 0.4
    rows = noises.float().flatten(2)
    fitted = torch.distributions.Normal(rows.mean(-1), rows.std(-1, correction=0))
    expected = torch.distributions.kl_divergence(fitted, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_standard_normal(noises, kind="sum"), expected.sum())
    torch.testing.assert_close(kl_to_standard_normal(noises, kind="mean"), expected.mean())
    six_tensors = 6 * kl_to_standard_normal(noises, kind="mean")
    torch.testing.assert_close(kl_to_standard_normal(noises, kind="sum"), six_tensors)


def test_kl_gradient_equals_finite_differences() -> None:
    noises = seeded_noise((1, 1, 1, 2, 2)) * 2
    noises.requires_grad_()
    kl_to_standard_normal(noises, kind="sum").backward()
    assert noises.grad is not None
    values = noises.detach().double().flatten().numpy()

    def closed_form(x: np.ndarray) -> float:
        return 0.5 * (x.mean() ** 2 + x.var() - 1 - math.log(x.var()))

    step = 1e-6
    for index, slope in enumerate(noises.grad.flatten().tolist()):
        shift = np.zeros(4)
        shift[index] = step
        numeric = (closed_form(values + shift) - closed_form(values - shift)) / (2 * step)
        assert slope == pytest.approx(numeric, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_lora_losses_agree_on_what_an_error_in_noise_costs(prediction_type: str) -> None:
    """alpha-noise is abar·|error of noise|²; an error e in v is an error sqrt(abar)·e in noise."""
    schedule, timesteps = NoiseSchedule.from_config(config_of(prediction_type)), torch.tensor([100, 700])
    abar = ddpm(prediction_type).alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    latents, noise = seeded_noise((2, 4, 2, 2)), seeded_noise((2, 4, 2, 2), seed=1)
    error = seeded_noise((2, 4, 2, 2), seed=2)
    prediction = schedule.target_of(latents, noise, timesteps) + error
    arguments: dict[str, Any] = {
        "latents": latents, "noise": noise, "timesteps": timesteps, "schedule": schedule,
    }  # fmt: skip
    plain = lora_loss(prediction, kind="prediction", **arguments)
    torch.testing.assert_close(plain, error.square().mean(), rtol=1e-4, atol=1e-6)
    power = 1 if prediction_type == "epsilon" else 2
    weighted = lora_loss(prediction, kind="alpha-noise", **arguments)
    torch.testing.assert_close(weighted, (abar**power * error.square()).mean(), rtol=1e-4, atol=1e-6)


def test_prefixes_are_the_solver_stopped_early() -> None:
    """The sum over the first k timesteps is diffusers' DDIM over them, its last step taken to the end."""
    config, timesteps = config_of("epsilon"), (999, 749, 499, 249)
    noise, predictions = seeded_noise((1, 4, 2, 2)), seeded_noise((4, 1, 4, 2, 2), seed=1)
    prefixes = [LinearCombine.from_scheduler_config(config, timesteps[:k]) for k in (1, 2, 3)]
    scheduler = DDIMScheduler.from_config({**config, "_class_name": "DDIMScheduler", "steps_offset": 1})
    abar = scheduler.alphas_cumprod
    expected = []
    for k in (1, 2, 3):
        x = noise
        for i in range(k):
            now, after = abar[timesteps[i]], abar[timesteps[i + 1]] if i + 1 < k else abar[0]
            x_0 = (x - (1 - now).sqrt() * predictions[i]) / now.sqrt()
            x = after.sqrt() * x_0 + (1 - after).sqrt() * predictions[i]
        expected.append((x - 0.5).square().mean())
    solution = torch.full_like(noise, 0.5)
    torch.testing.assert_close(
        prefix_loss(noise, predictions, solution, prefixes), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5
    )
    assert prefix_loss(noise, predictions[:1], solution, []).item() == 0.0


def test_regression_is_the_mean_squared_error() -> None:
    assert regression_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])).item() == 2.5


def test_clip_loss_is_clamped() -> None:
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # cosines 1 and 0
    assert clamped_clip_loss(text, images, 0.35).item() == pytest.approx(0.35 / 2)


def test_annealed_weight_reaches_zero_and_stays() -> None:
    assert [annealed(0.1, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.1, 0.05, 0.0, 0.0])
