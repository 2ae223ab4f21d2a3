"""Latents to pixels, with diffusers' own pipeline tail (VaeImageProcessor) as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from helpers import TINY_FACTOR, Vae, seeded_noise, tiny_vae

from tiue_cli.errors import DeviceError, ModelFolderError, UsageError
from tiue_cli.model import autoencoder
from tiue_cli.model.autoencoder import ImageDecoder

KINDS = ("kl", "tiny")


@torch.no_grad()
def diffusers_decode(vae: object, latents: torch.Tensor) -> np.ndarray:
    """The last lines of StableDiffusionPipeline.__call__, with PIL images as arrays."""
    image = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]  # type: ignore[attr-defined]
    return np.stack([np.asarray(picture) for picture in VaeImageProcessor().postprocess(image, output_type="pil")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_pixels_equal_those_of_diffusers(kind: Vae, size: tuple[int, int]) -> None:
    vae = tiny_vae(kind)
    latents = 3 * seeded_noise((2, 4, *size))
    images = ImageDecoder(vae).decode(latents)
    assert images.dtype == np.uint8
    assert images.shape == (2, size[0] * TINY_FACTOR, size[1] * TINY_FACTOR, 3)
    assert images.std() > 1, "a blank image would prove nothing"
    np.testing.assert_array_equal(images, diffusers_decode(vae, latents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_batch_is_decoded_in_groups_with_the_same_pixels(kind: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, latents = ImageDecoder(tiny_vae(kind)), seeded_noise((5, 4, 4, 4))
    whole = decoder.decode(latents)
    monkeypatch.setattr(autoencoder, "_PIXELS_AT_ONCE", 2 * (4 * TINY_FACTOR) ** 2)
    groups = decoder.decode(latents)
    # The convolutions of another batch size may round the last bit the other way.
    assert np.abs(groups.astype(int) - whole.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_what_decoding_does(kind: Vae) -> None:
    decoder = ImageDecoder(tiny_vae(kind))
    latents = decoder.latent_size((12, 20))
    assert decoder.decode(seeded_noise((1, decoder.latent_channels, *latents))).shape[1:3] == (12, 20)


def test_another_scaling_factor_between_levels_is_understood() -> None:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=3,
    )
    decoder = ImageDecoder(vae)
    assert decoder.factor == 3
    assert decoder.decode(seeded_noise((1, 4, 2, 2))).shape == (1, 6, 6, 3)


@pytest.mark.parametrize("size", [(33, 32), (32, 2), (0, 32), (-4, 32)])
def test_a_size_that_is_no_multiple_is_refused_with_the_nearest(size: tuple[int, int]) -> None:
    decoder = ImageDecoder(tiny_vae())
    with pytest.raises(UsageError, match=f"{size[0]}x{size[1]}") as caught:
        decoder.latent_size(size)
    nearest = str(caught.value.hint).rpartition(" ")[2]
    decoder.latent_size(tuple(int(side) for side in nearest.split("x")))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_float_is_differentiable_and_not_clamped(kind: Vae) -> None:
    latents = (20 * seeded_noise((1, 4, 4, 4))).requires_grad_()
    images = ImageDecoder(tiny_vae(kind)).decode_float(latents)
    images.square().mean().backward()
    assert images.dtype == torch.float32
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_latents_decode_like_single_precision(kind: Vae) -> None:
    decoder, latents = ImageDecoder(tiny_vae(kind)), seeded_noise((1, 4, 4, 4)).half()
    np.testing.assert_array_equal(decoder.decode(latents), decoder.decode(latents.float()))


def test_an_overflow_is_an_error_and_not_a_black_image() -> None:
    latents = seeded_noise((1, 4, 4, 4))
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(DeviceError, match="NaN or infinity"):
        ImageDecoder(tiny_vae()).decode(latents)


def test_another_module_is_refused() -> None:
    with pytest.raises(ModelFolderError, match="Linear"):
        ImageDecoder(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
