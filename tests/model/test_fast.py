"""The networks prepared for a GPU compute the same functions as diffusers' modules; here in torch's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny
from unet_configs import TINY_UNETS, draw_inputs, relative_error, tiny_unet

from tiue_cli.model.fast.autoencoder import fast_decoder
from tiue_cli.model.fast.layers import NotFusable
from tiue_cli.model.fast.ops import TorchOps
from tiue_cli.model.fast.unet import FastUNet
from tiue_cli.model.sd_configs import SD15_VAE, TAESD
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "two_layers": {"layers_per_block": 2},
    "no_mid_block": {"mid_block_type": None},
    "deep_attention": {"transformer_layers_per_block": 2},
    "every_group_straddles": {"norm_num_groups": 2},
    "many_groups": {"norm_num_groups": 32},
}


# Both networks with both decoders; of each variant both networks, one decoder each.
CASES = [
    *((name, shared, "") for name in TINY_UNETS for shared in (False, True)),
    *((name, name == "sd15", variant) for variant in VARIANTS if variant for name in TINY_UNETS),
]


@pytest.mark.parametrize(("name", "shared", "variant"), CASES)
@torch.no_grad()
def test_fast_unet_equals_the_split_unet(name: str, shared: bool, variant: str) -> None:
    unet = tiny_unet(name, dtype=torch.float64, **VARIANTS[variant])
    # A variant is another layer, at whatever size.
    for size, merged in (((9, 7), False),) if variant else (((16, 16), True), ((9, 7), False)):
        fast = FastUNet(unet, TorchOps(), shared=shared, merged=merged)
        for batch, steps in ((1, 1), (2, 3)):
            noise, text_states = draw_inputs(unet, batch, size)
            timesteps = torch.tensor([999, 749, 499][:steps])
            features = UNetEncoder(unet)(noise, text_states, 999)
            texts = fast.texts(text_states)
            found = fast.encode(noise, fast.times(timesteps[:1]), texts)
            assert relative_error(found.mid, features.mid) <= 1e-10
            assert len(found.skips) == len(features.skips)
            for ours, theirs in zip(found.skips, features.skips, strict=True):
                assert relative_error(ours, theirs) <= 1e-10
            expected = UNetDecoder(unet)(features, timesteps, text_states)
            actual = fast.decode(found, fast.times(timesteps), texts)
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) <= 1e-10, (size, batch, steps)


@pytest.mark.parametrize("change", [{"act_fn": "gelu"}])
def test_what_stable_diffusion_does_not_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(NotFusable):
        FastUNet(tiny_unet("sd15", **change), TorchOps())


def test_adapters_are_refused_as_reading_weights_would_miss_them() -> None:
    from peft import LoraConfig

    unet = tiny_unet("sd15")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(NotFusable):
        FastUNet(unet, TorchOps())


@pytest.mark.parametrize("products", [False, True], ids=["fused", "products"])
@pytest.mark.parametrize("merged", [False, True], ids=["nearest", "merged"])
@torch.no_grad()
def test_fast_decoder_equals_the_kl_autoencoder(merged: bool, products: bool) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**SD15_VAE, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8})
    _randomise(vae)
    latents = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = vae.decode(latents, return_dict=False)[0]
    assert relative_error(fast_decoder(vae, TorchOps(), merged=merged, products=products)(latents), expected) <= 1e-10


@torch.no_grad()
def test_fast_decoder_equals_the_tiny_autoencoder() -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(**TAESD)
    _randomise(vae)
    latents = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = vae.decode(latents, return_dict=False)[0]
    assert relative_error(fast_decoder(vae, TorchOps())(latents), expected) <= 1e-10


@torch.no_grad()
def _randomise(vae: torch.nn.Module) -> None:
    torch.nn.Module.to(vae, torch.float64)
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
