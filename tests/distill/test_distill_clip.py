"""The CLIP loss on a tiny random CLIP model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_tokenizer, seeded_noise, tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tiue_cli.distill.clip import ClipLoss, make_clip_loss
from tiue_cli.distill.config import ClipSettings
from tiue_cli.distill.estimate import _FakeClip, estimate_run
from tiue_cli.distill.loop import Distillation
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.folder import check_model_folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_loss(folder: Path, threshold: float) -> ClipLoss:
    settings = ClipSettings(model=str(folder), threshold=threshold)
    return make_clip_loss(settings, teacher_vae=tiny_vae("tiny"), device=torch.device("cpu"))


def test_loss_is_that_of_clips_own_cosine(clip_folder: Path) -> None:
    latents, prompts = seeded_noise((2, 4, 8, 8)), ["a red star", "a tree"]
    loss, clip = make_loss(clip_folder, threshold=1.0), CLIPModel.from_pretrained(clip_folder).eval()
    images = loss.preprocess(ImageDecoder(tiny_vae("tiny")).decode_float(latents))
    tokens = build_tokenizer()(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = clip(**tokens, pixel_values=images).logits_per_image.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(loss(latents, prompts), (1 - scores).mean(), rtol=1e-4, atol=1e-5)


def test_preprocessing_is_clips_own(clip_folder: Path) -> None:
    """Against transformers' image processor on a real picture, up to the rounding of its 8 bits."""
    gradient = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(
        [np.tile(gradient, (64, 1)), np.tile(gradient[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], -1
    )
    processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    found = make_loss(clip_folder, 0.35).preprocess(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2) / 127.5 - 1)
    assert (found - expected).abs().max() < 0.03


def test_gradient_reaches_the_latents_and_stops_above_the_threshold(clip_folder: Path) -> None:
    latents = seeded_noise((1, 4, 8, 8)).requires_grad_()
    make_loss(clip_folder, threshold=1.0)(latents, ["a tree"]).backward()
    assert latents.grad is not None and latents.grad.abs().max() > 0
    latents.grad = None
    make_loss(clip_folder, threshold=-1.0)(latents, ["a tree"]).backward()
    assert latents.grad.abs().max() == 0


def test_recomputing_in_half_precision_gives_the_same_loss_and_gradient(clip_folder: Path) -> None:
    prompts = ["a red star", "a tree"]
    settings, found = ClipSettings(model=str(clip_folder), threshold=1.0), {}
    for half, recompute in ((None, False), (None, True), (torch.bfloat16, True)):
        latents = seeded_noise((2, 4, 8, 8)).requires_grad_()
        loss = make_clip_loss(
            settings, teacher_vae=tiny_vae("kl"), device=torch.device("cpu"), half=half, recompute=recompute
        )
        value = loss(latents, prompts)
        value.backward()
        assert value.dtype == torch.float32 and latents.grad is not None
        found[half, recompute] = value.detach(), latents.grad
    exact = found[None, False]
    torch.testing.assert_close(found[None, True], exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[torch.bfloat16, True][0], exact[0], rtol=0, atol=0.02)
    cosine = torch.cosine_similarity(found[torch.bfloat16, True][1].flatten(), exact[1].flatten(), dim=0)
    assert cosine > 0.9


def test_dry_run_counts_the_clip_loss_and_what_recomputing_spares(
    make_config: Callable[..., Any], clip_folder: Path
) -> None:
    def played(**changes: Any) -> _FakeClip:
        config = make_config(clip__model=clip_folder, clip__weight=0.1, **changes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _FakeClip(config, check_model_folder(config.teacher), 8, half=None)

    kept, spared = played(), played(gradient_checkpointing=True)
    assert kept.parameters == sum(value.numel() for value in CLIPModel.from_pretrained(clip_folder).parameters())
    assert spared.activation_bytes < 0.7 * kept.activation_bytes
    memory = estimate_run(make_config(clip__model=clip_folder, clip__weight=0.1), prompts=5, half=False).memory_bytes
    assert memory["CLIP loss, its networks"] == 4 * kept.parameters


def test_run_with_clip_loss_anneals_it_by_optimiser_steps(
    make_config: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        clip__weight=0.1, clip__steps=2, clip__model=clip_folder, clip__threshold=1.0, accumulation=2, max_steps=5
    )
    for _ in Distillation(config, tmp_path / "run").events():
        pass
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # Two steps of warm start, two with a weight of 0.1 and 0.05, then none.
    assert ["clip" in line for line in lines] == [False, False, True, True, False]


def test_clip_model_without_some_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    """The library would draw them at random, and say so in a log."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[-1]
    save_file({key: weight for key, weight in weights.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=f"the weights lack {name}"):
        make_loss(tmp_path / "clip", 0.35)


def test_clip_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"clip\.model"):
        make_loss(tmp_path / "none", 0.35)
