"""The split UNet against ``UNet2DConditionModel.forward`` itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from unet_configs import TINY_UNETS, draw_inputs, relative_error, tiny_unet

from tiue_cli.errors import ModelFolderError
from tiue_cli.model.sd_configs import SD15_UNET, SD21_UNET, check_unet_config
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "two_layers": {"layers_per_block": 2},
    "no_mid_block": {"mid_block_type": None},
    "deep_attention": {"transformer_layers_per_block": 2},
}


def one_pass(unet: UNet2DConditionModel, noise: torch.Tensor, text_states: torch.Tensor, timestep: int) -> torch.Tensor:
    features = UNetEncoder(unet)(noise, text_states, timestep)
    return UNetDecoder(unet)(features, torch.tensor([timestep]), text_states)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(16, 16), (8, 12), (9, 7), (5, 14)])
@pytest.mark.parametrize("name", TINY_UNETS)
def test_encoder_then_decoder_equals_the_whole_unet(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    unet = tiny_unet(name, dtype=dtype)
    with torch.no_grad():
        for batch, timestep in ((1, 999), (2, 1), (3, 501)):
            noise, text_states = draw_inputs(unet, batch, size)
            expected = unet(noise, timestep, text_states).sample
            assert relative_error(one_pass(unet, noise, text_states, timestep), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TINY_UNETS)
def test_variants_of_the_architecture_split_too(name: str, variant: str) -> None:
    unet = tiny_unet(name, dtype=torch.float64, **VARIANTS[variant])
    noise, text_states = draw_inputs(unet, 2, (11, 8))
    with torch.no_grad():
        actual, expected = one_pass(unet, noise, text_states, 749), unet(noise, 749, text_states).sample
    assert relative_error(actual, expected) <= 1e-13


@pytest.mark.parametrize("name", TINY_UNETS)
def test_decoder_timesteps_reuse_the_features_of_the_encoder_timestep(name: str) -> None:
    """Oracle: the whole UNet at each decoder timestep, its first half pinned to its outputs at the encoder timestep."""
    unet = tiny_unet(name, dtype=torch.float64)
    noise, text_states = draw_inputs(unet, 2, (9, 8))
    timesteps = (999, 749, 499, 249)
    with torch.no_grad():
        features = UNetEncoder(unet)(noise, text_states, 999)
        predictions = UNetDecoder(unet)(features, torch.tensor(timesteps), text_states)

        first_half = [unet.conv_in, *unet.down_blocks, unet.mid_block]
        pinned: dict[torch.nn.Module, Any] = {}
        recording = [part.register_forward_hook(lambda part, _, out: pinned.update({part: out})) for part in first_half]
        unet(noise, 999, text_states)
        for hook in recording:
            hook.remove()
        replaying = [part.register_forward_hook(lambda part, _, __: pinned[part]) for part in first_half]
        expected = torch.stack([unet(noise, timestep, text_states).sample for timestep in timesteps])
        for hook in replaying:
            hook.remove()
    assert predictions.shape == (4, 2, 4, 9, 8)
    assert relative_error(predictions, expected) <= 1e-13
    assert relative_error(predictions[0], predictions[1]) > 1e-3


def test_the_encoder_timestep_may_be_a_number_or_a_tensor() -> None:
    unet = tiny_unet("sd15", dtype=torch.float64)
    noise, text_states = draw_inputs(unet, 2, (8, 8))
    encoder = UNetEncoder(unet)
    with torch.no_grad():
        expected = encoder(noise, text_states, 499)
        for timestep in (torch.tensor(499), torch.tensor([499]), torch.tensor([499, 499])):
            torch.testing.assert_close(encoder(noise, text_states, timestep), expected)
        per_image = encoder(noise, text_states, torch.tensor([499, 9])).mid
        torch.testing.assert_close(per_image[:1], expected.mid[:1])
        torch.testing.assert_close(per_image[1:], encoder(noise[1:], text_states[1:], 9).mid)


def test_the_parts_hold_the_callers_parameters() -> None:
    unet = tiny_unet("sd15")
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}
    parts = (UNetEncoder(unet), UNetDecoder(unet), SharedUNetDecoder(unet, merged_upsampler=True))
    parameters = {id(parameter) for parameter in unet.parameters()}
    for part in parts:
        assert {id(parameter) for parameter in part.parameters()} == parameters
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()} == before
    assert "forward" not in vars(unet)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_whole_unet(checkpointing: bool) -> None:
    unet = tiny_unet("sd21", dtype=torch.float64)
    noise, text_states = draw_inputs(unet, 2, (9, 8))
    unet(noise, 499, text_states).sample.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
    unet.zero_grad(set_to_none=True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    one_pass(unet, noise, text_states, 499).square().sum().backward()
    for name, parameter in unet.named_parameters():
        assert relative_error(parameter.grad, expected[name]) <= 1e-10, name


def test_lora_layers_added_later_take_part() -> None:
    peft = pytest.importorskip("peft")
    unet = tiny_unet("sd15", dtype=torch.float64)
    encoder, decoder = UNetEncoder(unet), UNetDecoder(unet)
    noise, text_states = draw_inputs(unet, 2, (8, 8))
    with torch.no_grad():
        without = unet(noise, 749, text_states).sample
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv_in", "conv_out"]))
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = unet(noise, 749, text_states).sample
        features = encoder(noise, text_states, 749)
        actual = decoder(features, torch.tensor([749]), text_states)[0]
    assert relative_error(actual, expected) <= 1e-13
    assert relative_error(actual, without) > 1e-2


@pytest.mark.parametrize("config", [SD15_UNET, SD21_UNET], ids=["sd15", "sd21"])
def test_the_real_architectures_hand_over_twelve_skips(config: dict[str, Any]) -> None:
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**config)
        noise, text_states = torch.empty(2, 4, 64, 64), torch.empty(2, 77, config["cross_attention_dim"])
        features = UNetEncoder(unet)(noise, text_states, torch.empty(1))
        predictions = UNetDecoder(unet)(features, torch.empty(4), text_states)
    assert len(features.skips) == 12
    assert features.mid.shape == (2, 1280, 8, 8)
    assert sum(tensor[0].numel() for tensor in (features.mid, *features.skips)) == pytest.approx(6.72e6, rel=1e-2)
    assert predictions.shape == (4, 2, 4, 64, 64)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sdxl": ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8}, "addition_embed_type is 'text_time'"),
    "classes": ({"num_class_embeds": 10}, "num_class_embeds is 10"),
    "class_type": ({"class_embed_type": "timestep"}, "class_embed_type"),
    "text_projection": ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}, "encoder_hid_dim_type"),
    "lcm": ({"time_cond_proj_dim": 256}, "guidance"),
    "gligen": ({"attention_type": "gated"}, "GLIGEN"),
    "dual": ({"dual_cross_attention": True}, "dual_cross_attention"),
    "fourier": ({"time_embedding_type": "fourier"}, "time_embedding_type"),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    "cross_norm": ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
    "centred": ({"center_input_sample": True}, "center_input_sample"),
    "only_cross": ({"only_cross_attention": True}, "only_cross_attention"),
    "only_cross_some": ({"only_cross_attention": (False, False, True, False)}, "only_cross_attention"),
    "down_block": ({"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 4}, "SimpleCrossAttnDownBlock2D"),
    "up_block": ({"up_block_types": ("AttnUpBlock2D",) * 4}, "AttnUpBlock2D"),
    "mid_block": ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
    "inpainting": ({"in_channels": 9}, "inpainting"),
    "other_class": ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
    "dit": ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_do_not_split_are_refused_by_field(case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(ModelFolderError, match=message) as caught:
        check_unet_config({**SD15_UNET, **change}, where="folder/unet/config.json")
    assert "folder/unet/config.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("part", [UNetEncoder, UNetDecoder, SharedUNetDecoder])
def test_the_parts_refuse_an_sdxl_unet(part: type) -> None:
    unet = tiny_unet(
        "sd21",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    with pytest.raises(ModelFolderError, match="SDXL"):
        part(unet)


def test_configs_of_the_family_are_accepted() -> None:
    for config in (SD15_UNET, SD21_UNET, *TINY_UNETS.values(), {}):
        check_unet_config({"_class_name": "UNet2DConditionModel", **config})
