"""The many-step teacher, against a loop written by hand from the formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import SD_SCHEDULER, build_sd_folder, copy_folder, edit_json, seeded_noise

from tiue_cli.errors import DeviceError, ModelFolderError, SchedulerError, UsageError
from tiue_cli.model.teacher import Teacher, load_teacher

PROMPTS = ["a red star", "a blue tree above a house"]


@torch.no_grad()
def ddim_by_hand(
    teacher: Teacher, prompts: list[str], noise: torch.Tensor, *, steps: int, guidance: float
) -> torch.Tensor:
    """DDIM (Song et al. 2021, eq. 12, η = 0) with classifier-free guidance, from SD's published schedule."""
    prediction_type = teacher.scheduler_config.get("prediction_type", "epsilon")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    timesteps = [step * (1000 // steps) + 1 for step in reversed(range(steps))]
    conditional, unconditional = teacher.encode_prompts(prompts), teacher.encode_prompts([""] * len(prompts))
    x = noise.double()
    for timestep in timesteps:
        previous = timestep - 1000 // steps
        a, b = alphas[timestep], alphas[previous] if previous >= 0 else alphas[0]
        with_text = teacher.unet(x.float(), timestep, conditional).sample.double()
        without = teacher.unet(x.float(), timestep, unconditional).sample.double()
        prediction = without + guidance * (with_text - without)
        if prediction_type == "v_prediction":
            epsilon = a.sqrt() * prediction + (1 - a).sqrt() * x
            x_0 = a.sqrt() * x - (1 - a).sqrt() * prediction
        else:
            epsilon = prediction
            x_0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        x = b.sqrt() * x_0 + (1 - b).sqrt() * epsilon
    return x


@pytest.fixture(scope="module")
def teacher(tiny_teacher_folder: Path) -> Teacher:
    return load_teacher(tiny_teacher_folder)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_equal_a_loop_written_by_hand(tmp_path: Path, kind: Any, prediction_type: str) -> None:
    teacher = load_teacher(build_sd_folder(tmp_path / "model", kind=kind, prediction_type=prediction_type))
    noise = seeded_noise((2, 4, 8, 8))
    latents = teacher.latents(PROMPTS, noise, steps=4, guidance=3.0)
    expected = ddim_by_hand(teacher, PROMPTS, noise, steps=4, guidance=3.0)
    torch.testing.assert_close(latents.double(), expected, rtol=1e-4, atol=1e-4)


def test_images_equal_those_of_plain_diffusers(teacher: Teacher, tiny_teacher_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise((2, 4, 8, 8))
    pictures = pipeline(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=5.0).images
    expected = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(teacher.sample(PROMPTS, noise, steps=3, guidance=5.0), expected)


def test_any_latent_size_goes(teacher: Teacher) -> None:
    """diffusers wants multiples of 8 pixels; the model does not."""
    images = teacher.sample(PROMPTS[:1], seeded_noise((1, 4, 9, 7)), steps=2)
    assert images.shape == (1, 36, 28, 3)


def test_without_guidance_the_empty_prompt_does_not_matter(teacher: Teacher) -> None:
    noise = seeded_noise((1, 4, 8, 8))
    latents = teacher.latents(PROMPTS[:1], noise, steps=2, guidance=1.0)
    torch.testing.assert_close(
        latents.double(), ddim_by_hand(teacher, PROMPTS[:1], noise, steps=2, guidance=1.0), rtol=1e-4, atol=1e-4
    )


def test_an_image_depends_on_its_own_prompt_and_noise_only(teacher: Teacher) -> None:
    noise = seeded_noise((2, 4, 8, 8))
    together = teacher.latents(PROMPTS, noise, steps=2)
    alone = teacher.latents(PROMPTS[1:], noise[1:], steps=2)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_progress_counts_the_steps_done(teacher: Teacher) -> None:
    done: list[int] = []
    teacher.latents(PROMPTS[:1], seeded_noise((1, 4, 8, 8)), steps=3, progress=done.append)
    assert done == [1, 2, 3]


def test_the_folders_own_schedule_counts(tmp_path: Path) -> None:
    """diffusers' pipeline silently sets steps_offset to 1; the config says what the model was trained with."""
    folder = build_sd_folder(tmp_path / "model", scheduler={"steps_offset": 0, "timestep_spacing": "trailing"})
    teacher = load_teacher(folder)
    asked: list[int] = []
    hook = teacher.unet.register_forward_pre_hook(lambda _, arguments: asked.append(int(arguments[1])))
    teacher.latents(PROMPTS[:1], seeded_noise((1, 4, 8, 8)), steps=2, guidance=1.0)
    hook.remove()
    assert asked == [999, 499]


def test_the_libraries_print_nothing(tiny_teacher_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher(tiny_teacher_folder)
    teacher.sample(["a star " * 40], seeded_noise((1, 4, 8, 8)), steps=1)
    assert capfd.readouterr() == ("", "")


def test_what_does_not_fit_is_refused(teacher: Teacher) -> None:
    with pytest.raises(UsageError, match="2 prompts, but noise for 1 images"):
        teacher.latents(PROMPTS, seeded_noise((1, 4, 8, 8)))
    for steps in (0, 1001):
        with pytest.raises(UsageError, match="teacher steps"):
            teacher.latents(PROMPTS[:1], seeded_noise((1, 4, 8, 8)), steps=steps)


def test_a_clipping_scheduler_is_refused(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tiny_teacher_folder, tmp_path / "model")
    edit_json(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    with pytest.raises(SchedulerError, match="clip"):
        load_teacher(folder)


def test_an_autoencoder_can_be_replaced(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    other = build_sd_folder(tmp_path / "other", vae="tiny", scheduler=SD_SCHEDULER)
    replaced = load_teacher(tiny_teacher_folder, vae=other)
    assert type(replaced.vae).__name__ == "AutoencoderTiny"
    noise = seeded_noise((1, 4, 8, 8))
    latents = replaced.latents(PROMPTS[:1], noise, steps=1)
    expected = load_teacher(other).decoder.decode(latents)
    np.testing.assert_array_equal(replaced.sample(PROMPTS[:1], noise, steps=1), expected)


def test_an_autoencoder_of_another_family_is_refused(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "vae16")
    with pytest.raises(ModelFolderError, match="16 latent channels"):
        load_teacher(tiny_teacher_folder, vae=tmp_path / "vae16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_one_clear_error(tiny_teacher_folder: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA"):
        load_teacher(tiny_teacher_folder, device="cuda")
