"""The student as a diffusers pipeline: the command's pixels for a seed, and diffusers' own ways around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lora_files import draw_factors, write_lora

import tiue_cli as tiue
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.model.diffusers_pipeline import TiuePipeline


@pytest.fixture(scope="module")
def pipe(tiny_student_folder: Path) -> TiuePipeline:
    return TiuePipeline.from_pretrained(tiny_student_folder)


def arrays(images: list[object]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def check_same_but_for_rounding(images: list[object], others: np.ndarray) -> None:
    """tiue.load runs the networks prepared, which rounds otherwise: a value in hundreds is one level away."""
    difference = np.abs(np.stack(arrays(images)).astype(int) - others)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_same_seed_same_pixels_as_the_command(pipe: TiuePipeline, tiny_student_folder: Path) -> None:
    found = pipe(["a red star", "a tree"], seed=3, num_images_per_prompt=2, num_inference_steps=2, height=48, width=32)
    with tiue.load(tiny_student_folder, device="cpu") as plain:
        wanted = plain(["a red star", "a tree"], seed=3, images=2, steps=2, size=(48, 32), output="numpy")
    check_same_but_for_rounding(found.images, wanted)


def test_a_saved_pipeline_is_a_student_that_draws_the_same(pipe: TiuePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "student", safe_serialization=True)
    again = TiuePipeline.from_pretrained(str(tmp_path / "student"))
    np.testing.assert_array_equal(arrays(again("a star", seed=1).images), arrays(pipe("a star", seed=1).images))
    with tiue.load(tmp_path / "student", device="cpu") as plain:
        check_same_but_for_rounding(pipe("a star", seed=1).images, plain("a star", seed=1, output="numpy"))
    assert isinstance(StableDiffusionPipeline.from_pretrained(tmp_path / "student"), StableDiffusionPipeline)


def test_output_types_are_one_picture(pipe: TiuePipeline) -> None:
    pil, floats, tensors, latents = (
        pipe("a star", seed=1, output_type=kind, return_dict=False)[0] for kind in ("pil", "np", "pt", "latent")
    )
    assert floats.shape == (1, 32, 32, 3) and tensors.shape == (1, 3, 32, 32) and latents.shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(np.asarray(pil[0]), (floats[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), floats)


def test_slicing_changes_nothing_and_casting_moves_every_part(tiny_student_folder: Path) -> None:
    pipe = TiuePipeline.from_pretrained(tiny_student_folder)
    before = arrays(pipe(["a star", "a tree"], seed=1).images)
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    after = arrays(pipe(["a star", "a tree"], seed=1).images)
    assert np.abs(np.array(before).astype(int) - np.array(after)).max() <= 1
    pipe.disable_vae_slicing()
    pipe.to("cpu", torch.bfloat16)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert set(pipe.components) == {"vae", "text_encoder", "tokenizer", "unet"}
    assert pipe("a star", seed=1).images[0].size == (32, 32)


def test_a_generator_is_the_noise_of_diffusers(pipe: TiuePipeline) -> None:
    first, second = (pipe("a star", generator=torch.Generator().manual_seed(5), output_type="pt") for _ in range(2))
    torch.testing.assert_close(first.images, second.images)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(pipe("a star", latents=noise, output_type="pt").images, first.images)
    several = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipe("a star", num_images_per_prompt=2, generator=several, output_type="pt").images
    torch.testing.assert_close(both[:1], first.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"guidance_scale": 7.5}, "guidance_scale 7.5 has no meaning"),
        ({"negative_prompt": ["", "blurry"]}, "negative_prompt works through guidance"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator were both given"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "do not fit"),
        ({"output_type": "jpeg"}, "unknown output_type"),
        ({"num_inference_steps": 9}, "steps"),
        ({"height": 33}, "33x32"),
        ({"num_images_per_prompt": 0}, "out of range"),
        ({"num_images_per_prompt": 2, "generator": [torch.Generator()] * 3}, "3 generators for 2 images"),
    ],
)
def test_what_a_student_has_not_is_refused(pipe: TiuePipeline, keywords: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe("a star", **keywords)


def test_neutral_guidance_is_taken(pipe: TiuePipeline) -> None:
    asked = pipe("a star", seed=1, guidance_scale=1.0, negative_prompt=["", " "], output_type="np")
    np.testing.assert_array_equal(asked.images, pipe("a star", seed=1, output_type="np").images)


def test_teachers_and_unknown_keywords_are_refused(
    tiny_teacher_folder: Path, pipe: TiuePipeline, tmp_path: Path
) -> None:
    with pytest.raises(ModelFolderError, match="is a teacher"):
        TiuePipeline.from_pretrained(tiny_teacher_folder)
    with pytest.raises(UsageError, match="does not take variant"):
        TiuePipeline.from_pretrained("papercut", variant="fp16")
    with pytest.raises(UsageError, match="does not take push_to_hub"):
        pipe.save_pretrained(tmp_path / "it", push_to_hub=True)
    with pytest.raises(UsageError, match="needs the student's timesteps"):
        TiuePipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet)


def test_loras_that_diffusers_runs_draw_what_fused_ones_draw(tiny_student_folder: Path, tmp_path: Path) -> None:
    """Beside the layers, by PEFT, or in the weights: one picture."""
    own = TiuePipeline.from_pretrained(tiny_student_folder)
    path = write_lora(tmp_path / "ink.safetensors", draw_factors(own.unet, own.text_encoder), "kohya", alpha=2.0)
    bare = own("a red star", seed=1, output_type="latent").images
    own.load_lora_weights(str(path), adapter_name="ink")
    own.set_adapters(["ink"], [0.7])
    unfused = own("a red star", seed=1, output_type="latent").images
    with tiue.load(tiny_student_folder, device="cpu", loras=[f"{path}:0.7"]) as plain:
        fused = plain("a red star", seed=1, output="latents")[0]
    scale = float(np.abs(fused).max())
    assert float(np.abs(unfused[0].numpy() - fused).max()) / scale <= 1e-4
    assert float((unfused - bare).abs().max()) / scale > 1e-2
    with pytest.raises(UsageError, match="LoRAs beside its weights"):
        own.save_pretrained(tmp_path / "student")
    own.unload_lora_weights()
    assert torch.equal(own("a red star", seed=1, output_type="latent").images, bare)
    own.save_pretrained(tmp_path / "student")
