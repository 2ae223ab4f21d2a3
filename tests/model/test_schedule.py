"""The schedule and the weighted sum against diffusers' own ``DDIMScheduler``."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tiue_cli.errors import SchedulerError, TiueError, UsageError
from tiue_cli.model.schedule import LinearCombine, alphas_cumprod, combine_for_run, ddim_config, decoder_timesteps
from tiue_cli.model.sd_configs import SD15_SCHEDULER, SD21_SCHEDULER

SD = {**SD15_SCHEDULER, "_class_name": "DDIMScheduler"}
SHAPE = (2, 4, 5, 3)

SCHEDULES = {
    "sd": SD,
    "linear": {**SD, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {**SD, "beta_schedule": "squaredcos_cap_v2"},
    "trained": {**SD, "trained_betas": np.linspace(0.001, 0.01, 1000).tolist()},
    "alpha_one": {**SD, "set_alpha_to_one": True},
    "no_offset": {**SD, "steps_offset": 0},
    "short": {**SD, "num_train_timesteps": 400},
}


def ddim(config: dict, spacing: str, steps: int) -> DDIMScheduler:
    fields = {name: value for name, value in config.items() if name not in ("_class_name", "skip_prk_steps")}
    scheduler = DDIMScheduler(**{**fields, "timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    return scheduler


def draw(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return noise, torch.randn((steps, *SHAPE), generator=generator, dtype=torch.float64)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def stepped(scheduler: DDIMScheduler, noise: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    sample = noise
    for timestep, prediction in zip(scheduler.timesteps, predictions, strict=True):
        sample = scheduler.step(prediction, int(timestep), sample).prev_sample
    return sample


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 25, 50, 999])
def test_timesteps_equal_diffusers(spacing: str, steps: int) -> None:
    expected = tuple(ddim(SD, spacing, steps).timesteps.tolist())
    assert decoder_timesteps(SD, steps, spacing=spacing) == expected
    assert decoder_timesteps({**SD, "timestep_spacing": spacing}, steps) == expected


def test_a_single_step_is_the_last_timestep() -> None:
    assert decoder_timesteps(SD, 1) == decoder_timesteps(SD, 1, spacing="leading") == (999,)


def test_sd_timesteps_and_weights_are_the_known_ones() -> None:
    assert decoder_timesteps(SD15_SCHEDULER, 4) == (751, 501, 251, 1)
    assert decoder_timesteps(SD21_SCHEDULER, 4, spacing="trailing") == (999, 749, 499, 249)
    weights = LinearCombine.from_scheduler_config(SD15_SCHEDULER, (751, 501, 251, 1)).weights
    assert weights == pytest.approx((4.235, -2.492, -0.925, -0.657, -0.012), abs=5e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_equal_diffusers(name: str, zero_snr: bool) -> None:
    config = {**SCHEDULES[name], "rescale_betas_zero_snr": zero_snr}
    actual, expected = alphas_cumprod(config), ddim(config, "leading", 4).alphas_cumprod.double().numpy()
    assert actual.dtype == np.float64
    # diffusers multiplies a thousand float32 factors; near abar = 0 only the absolute error is meaningful.
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-7)
    assert (actual[-1] == 0.0) == zero_snr


# Not the cosine schedule with epsilon from the last timestep: abar is 2e-9 there, and float32 stepping has no 5 digits.
CASES = [
    (name, steps, spacing, prediction_type)
    for name in SCHEDULES
    for steps in (1, 2, 3, 4, 7)
    for spacing in ("leading", "trailing")
    for prediction_type in ("epsilon", "v_prediction")
    if (name, prediction_type) != ("cosine", "epsilon") or (spacing == "leading" and steps > 1)
]


@pytest.mark.parametrize(("name", "steps", "spacing", "prediction_type"), CASES)
def test_one_sum_equals_stepwise_ddim(name: str, steps: int, spacing: str, prediction_type: str) -> None:
    config = {**SCHEDULES[name], "prediction_type": prediction_type}
    # A single step is trailing in ours, whatever the spacing.
    scheduler = ddim(config, "trailing" if steps == 1 else spacing, steps)
    combine = LinearCombine.from_scheduler_config(config, decoder_timesteps(config, steps, spacing=spacing))
    noise, predictions = draw(steps)
    assert combine.timesteps == tuple(scheduler.timesteps.tolist())
    assert relative_error(combine(noise, predictions), stepped(scheduler, noise, predictions)) <= 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_explicit_list_equals_stepping_from_timestep_to_timestep(prediction_type: str) -> None:
    config = {**SD, "prediction_type": prediction_type}
    timesteps, gaps = (951, 618, 118), (3, 2, 1)  # 1000 // gap: 333, 500, and 1000, which is past the end
    noise, predictions = draw(3)
    scheduler, sample = ddim(config, "leading", 4), noise
    for timestep, gap, prediction in zip(timesteps, gaps, predictions, strict=True):
        scheduler.num_inference_steps = gap
        sample = scheduler.step(prediction, timestep, sample).prev_sample
    combine = LinearCombine.from_scheduler_config(config, timesteps)
    assert relative_error(combine(noise, predictions), sample) <= 1e-5


def test_zero_terminal_snr_works_for_v_and_is_refused_for_epsilon() -> None:
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    timesteps = decoder_timesteps(config, 4, spacing="trailing")
    noise, predictions = draw(4)
    actual = LinearCombine.from_scheduler_config(config, timesteps)(noise, predictions)
    assert relative_error(actual, stepped(ddim(config, "trailing", 4), noise, predictions)) <= 1e-5

    epsilon = {**config, "prediction_type": "epsilon"}
    with pytest.raises(SchedulerError, match="timestep 999"):
        LinearCombine.from_scheduler_config(epsilon, timesteps)
    assert LinearCombine.from_scheduler_config(epsilon, (751, 501, 251, 1)).weights[0] > 0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_noise_predictions_equal_those_of_stepwise_ddim(prediction_type: str, steps: int, spacing: str) -> None:
    config = {**SD, "prediction_type": prediction_type}
    scheduler = ddim(config, "trailing" if steps == 1 else spacing, steps)
    noise, predictions = draw(steps)
    sample, expected = noise, []
    for timestep, prediction in zip(scheduler.timesteps, predictions, strict=True):
        bar = scheduler.alphas_cumprod[timestep].double()
        step = scheduler.step(prediction, int(timestep), sample)
        expected.append((sample - bar.sqrt() * step.pred_original_sample) / (1 - bar).sqrt())
        sample = step.prev_sample
    combine = LinearCombine.from_scheduler_config(config, decoder_timesteps(config, steps, spacing=spacing))
    actual = combine.noise_predictions(noise, predictions)
    assert actual.shape == predictions.shape
    assert relative_error(actual, torch.stack(expected)) <= 1e-5
    np.testing.assert_array_equal(combine.noise_predictions(noise.numpy(), predictions.numpy()), actual.numpy())


def test_half_precision_inputs_are_summed_in_float32() -> None:
    combine = LinearCombine.from_scheduler_config(SD, (751, 501, 251, 1))
    noise, predictions = draw(4)
    halves = combine(noise.half(), predictions.half())
    assert halves.dtype == torch.float32
    assert relative_error(halves, combine(noise.half().double(), predictions.half().double())) <= 1e-6


def test_numpy_and_torch_agree() -> None:
    combine = LinearCombine.from_scheduler_config(SD, (999, 749, 499, 249))
    noise, predictions = (tensor.float() for tensor in draw(4))
    actual = combine(noise.numpy(), predictions.numpy())
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, combine(noise, predictions).numpy(), rtol=1e-6, atol=1e-6)


def test_the_number_of_predictions_must_match() -> None:
    noise, predictions = draw(3)
    with pytest.raises(ValueError, match="zip"):
        LinearCombine.from_scheduler_config(SD, (751, 501, 251, 1))(noise, predictions)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"clip_sample": True}, "clip_sample is true"),
        ({"_class_name": "PNDMScheduler", "clip_sample": True}, "clip_sample is true"),
        ({"thresholding": True}, "thresholding"),
        ({"prediction_type": "sample"}, "'sample'"),
        ({"eta": 1.0}, "eta is 1.0"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
    ],
)
def test_what_one_sum_cannot_express_is_refused_with_a_hint(change: dict, match: str) -> None:
    with pytest.raises(SchedulerError, match=match) as caught:
        LinearCombine.from_scheduler_config({**SD, **change}, (751, 501, 251, 1))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("class_name", "refused"),
    [("DDIMScheduler", True), ("DDPMScheduler", True), (None, True), ("PNDMScheduler", False)]
    + [(f"{name}DiscreteScheduler", False) for name in ("LMS", "Euler", "EulerAncestral")],
)
def test_a_missing_clip_sample_means_what_the_class_does(class_name: str | None, refused: bool) -> None:
    config = {name: value for name, value in SD.items() if name != "clip_sample"}
    config["_class_name"] = class_name
    if refused:
        with pytest.raises(SchedulerError, match="clips by default"):
            decoder_timesteps(config, 4)
    else:
        assert decoder_timesteps(config, 4) == (751, 501, 251, 1)


def test_the_ddim_config_rebuilds_the_same_scheduler() -> None:
    """What a teacher is sampled with and what a student sums come from one reading of the config."""
    noise, predictions = draw(4)
    scheduler = DDIMScheduler.from_config(ddim_config(SD15_SCHEDULER))
    scheduler.set_timesteps(4)
    combine = LinearCombine.from_scheduler_config(SD15_SCHEDULER, decoder_timesteps(SD15_SCHEDULER, 4))
    assert relative_error(combine(noise, predictions), stepped(scheduler, noise, predictions)) <= 1e-5


@pytest.mark.parametrize("timesteps", [(), (1, 2), (5, 5), (1000, 1), (3, -1)])
def test_impossible_timesteps_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(SchedulerError, match="must decrease"):
        LinearCombine.from_scheduler_config(SD, timesteps)


def test_impossible_numbers_of_steps_and_spacings_are_refused() -> None:
    for steps in (0, -1, 1001):
        with pytest.raises(UsageError, match=str(steps)):
            decoder_timesteps(SD, steps)
    with pytest.raises(SchedulerError, match="linspace"):
        decoder_timesteps({**SD, "timestep_spacing": "linspace"}, 4)
    with pytest.raises(SchedulerError, match="must decrease"):
        decoder_timesteps(SD, 1000, spacing="leading")  # steps_offset 1 would ask for timestep 1000


def test_fewer_steps_than_trained_keep_the_spacing() -> None:
    trailing = (999, 749, 499, 249)
    assert combine_for_run(SD, trailing, spacing="trailing").timesteps == trailing
    assert combine_for_run(SD, trailing, spacing="trailing", steps=2).timesteps == (999, 499)
    assert combine_for_run(SD, (751, 501, 251, 1), spacing="leading", steps=2).timesteps == (501, 1)
    assert combine_for_run(SD, trailing, spacing="trailing", steps=1) == LinearCombine.from_scheduler_config(SD, (999,))
    explicit = combine_for_run(SD, (951, 618, 118), spacing="explicit", steps=3)
    assert explicit == LinearCombine.from_scheduler_config(SD, (951, 618, 118))


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 5), ("trailing", 0), ("explicit", 2)])
def test_runs_that_the_student_was_not_trained_for_are_refused(spacing: str, steps: int) -> None:
    with pytest.raises(TiueError) as caught:
        combine_for_run(SD, (999, 749, 499, 249), spacing=spacing, steps=steps)
    assert isinstance(caught.value, UsageError)
    assert caught.value.hint


def test_the_schedule_does_not_load_torch() -> None:
    code = "import sys, tiue_cli.model.schedule, tiue_cli.model.sd_configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- types ---------------------------------------------------------------------------------------------------------

WRONG_TYPES = {
    "set_alpha_to_one": ["x", "false", 1, None],
    "rescale_betas_zero_snr": ["x", 0],
    "clip_sample": ["false", 0],
    "thresholding": ["no"],
    "num_train_timesteps": ["1000", 1000.0, True, 0, -5],
    "steps_offset": ["1", 0.5, False],
    "beta_start": ["0.1", True, float("nan"), float("inf")],
    "beta_end": [[0.1]],
    "beta_schedule": [1, None],
    "prediction_type": [1],
    "timestep_spacing": [None],
    "eta": ["0"],
    "trained_betas": ["0.1", [0.1, "0.2"], [True], 0.5],
    "_class_name": [5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_a_field_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, name: value}
    with pytest.raises(SchedulerError, match=name):
        decoder_timesteps(config, 4)
