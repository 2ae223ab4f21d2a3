"""Counted operations, against figures that were worked out elsewhere and against arithmetic by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from helpers import build_tokenizer, tiny_text_encoder, tiny_unet, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel

from tiue_cli.bench.measure.flops import StageFlops
from tiue_cli.model.sd_configs import SD15_TEXT, SD15_UNET, SD15_VAE, TAESD


@pytest.fixture(scope="module")
def tiny() -> StageFlops:
    tokenizer = build_tokenizer()
    parts = SimpleNamespace(
        text_encoder=tiny_text_encoder(tokenizer=tokenizer),
        unet=tiny_unet(),
        vae=tiny_vae("tiny"),
        info=SimpleNamespace(text_tokens=16),
    )
    return StageFlops(parts, (8, 8))  # type: ignore[arg-type]


def test_a_plain_pass_is_its_two_halves_which_both_embed_the_time(tiny: StageFlops) -> None:
    width = 32
    embedding = 2 * (width * 4 * width + 4 * width * 4 * width)
    assert tiny.unet(1) == tiny.unet_encoder(1) + tiny.unet_decoder(1, 1, "plain") - embedding


def test_plain_decoder_repeats_everything_but_the_time_embedding(tiny: StageFlops) -> None:
    one, four = tiny.unet_decoder(1, 1, "plain"), tiny.unet_decoder(1, 4, "plain")
    assert four == 4 * one


def test_sharing_and_merging_each_save_something(tiny: StageFlops) -> None:
    plain, shared, merged = (tiny.unet_decoder(1, 4, kind) for kind in ("plain", "shared", "merged"))
    assert merged < shared < plain
    assert tiny.unet(1, merged_upsampler=True) < tiny.unet(1)


def test_counts_grow_with_the_batch(tiny: StageFlops) -> None:
    assert tiny.text(5) == 5 * tiny.text(1)
    assert tiny.vae(5) == 5 * tiny.vae(1)
    assert tiny.unet(2) == 2 * tiny.unet(1)
    # The sharing decoder projects the time embedding once for all images: a little less than twice.
    one, two = tiny.unet_decoder(1, 2, "shared"), tiny.unet_decoder(2, 2, "shared")
    assert 1.9 * one < two < 2 * one


def test_tiny_autoencoder_counts_by_hand() -> None:
    # conv_in 4→8, block 3×(8→8) at 4x4 … counted layer by layer: 2·H·W·k²·in·out of each convolution.
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    convolutions = []
    handles = [
        module.register_forward_hook(lambda module, _, output: convolutions.append((module, output.shape)))
        for module in vae.decoder.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 6, 6))
    for handle in handles:
        handle.remove()
    by_hand = sum(
        2 * shape[2] * shape[3] * module.kernel_size[0] * module.kernel_size[1] * module.in_channels * shape[1]
        for module, shape in convolutions
    )
    tokenizer = build_tokenizer()
    parts = SimpleNamespace(
        text_encoder=tiny_text_encoder(tokenizer=tokenizer),
        unet=tiny_unet(),
        vae=vae,
        info=SimpleNamespace(text_tokens=16),
    )
    assert len(convolutions) > 5
    assert StageFlops(parts, (6, 6)).vae(1) == by_hand  # type: ignore[arg-type]


@pytest.mark.slow
def test_stable_diffusion_15_counts_what_is_published_for_it() -> None:
    # TFLOP at 64x64 latents: the UNet's 0.80 is the usual figure for SD 1.5, the rest were counted for the design.
    with torch.device("meta"):
        parts = SimpleNamespace(
            text_encoder=CLIPTextModel(CLIPTextConfig(**SD15_TEXT)),
            unet=UNet2DConditionModel(**SD15_UNET),
            vae=AutoencoderKL(**SD15_VAE),
            info=SimpleNamespace(text_tokens=77),
        )
        tiny = SimpleNamespace(**{**vars(parts), "vae": AutoencoderTiny(**TAESD)})
    counted = StageFlops(parts, (64, 64))  # type: ignore[arg-type]
    found = {
        "text": counted.text(1),
        "UNet": counted.unet(1),
        "UNet encoder": counted.unet_encoder(1),
        "K = 4, plain": counted.unet_decoder(1, 4, "plain"),
        "K = 4, sharing": counted.unet_decoder(1, 4, "shared"),
        "K = 4, merged": counted.unet_decoder(1, 4, "merged"),
        "KL": counted.vae(1),
        "TAESD": StageFlops(tiny, (64, 64)).vae(1),  # type: ignore[arg-type]
    }
    assert {name: round(flops / 1e12, 3) for name, flops in found.items()} == {
        "text": 0.013,
        "UNet": 0.803,
        "UNet encoder": 0.261,
        "K = 4, plain": 2.167,
        "K = 4, sharing": 1.940,
        "K = 4, merged": 1.789,
        "KL": 2.515,
        "TAESD": 0.141,
    }
