"""The exact-sharing decoder against the plain batched one: same numbers, same gradients, fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from unet_configs import TINY_UNETS, draw_inputs, encoded_features, relative_error, tiny_unet

from tiue_cli.model.sd_configs import SD15_UNET
from tiue_cli.model.shared import SharedUNetDecoder, _repeated, merge_upsamplers, merged_weight
from tiue_cli.model.unet import UNetDecoder, UNetEncoder, UNetFeatures

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
TIMESTEPS = (999, 749, 499, 249)
VARIANTS: dict[str, dict[str, Any]] = {
    "two_layers": {"layers_per_block": 2},
    "no_mid_block": {"mid_block_type": None},
    "deep_attention": {"transformer_layers_per_block": 2},
    "every_group_straddles": {"norm_num_groups": 2},
    "many_groups": {"norm_num_groups": 32},
    "activated_time": {"resnet_skip_time_act": True},
    "scaled_output": {"resnet_out_scale_factor": 1.3},
    "other_activation": {"act_fn": "gelu"},
}


def both(unet: UNet2DConditionModel, *, merged: bool) -> tuple[UNetDecoder, SharedUNetDecoder]:
    return UNetDecoder(unet), SharedUNetDecoder(unet, merged_upsampler=merged)


# Single precision adds rounding and nothing else: one size shows it.
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((16, 16), torch.float64), ((9, 7), torch.float64), ((5, 12), torch.float64), ((9, 7), torch.float32)],
)
@pytest.mark.parametrize("merged", [False, True], ids=["nearest", "merged"])
@pytest.mark.parametrize("name", TINY_UNETS)
def test_shared_decoder_equals_plain_decoder(
    name: str, size: tuple[int, int], merged: bool, dtype: torch.dtype
) -> None:
    unet = tiny_unet(name, dtype=dtype)
    plain, shared = both(unet, merged=merged)
    with torch.no_grad():
        for batch, steps in ((1, 1), (1, 4), (2, 3), (3, 2)):
            noise, text_states = draw_inputs(unet, batch, size)
            features = UNetEncoder(unet)(noise, text_states, 999)
            timesteps = torch.tensor(TIMESTEPS[:steps])
            expected = plain(features, timesteps, text_states)
            actual = shared(features, timesteps, text_states)
            assert actual.shape == expected.shape == (steps, batch, 4, *size)
            assert relative_error(actual, expected) <= TOLERANCE[dtype], (batch, steps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TINY_UNETS)
def test_variants_of_the_architecture_are_shared_too(name: str, variant: str) -> None:
    unet = tiny_unet(name, dtype=torch.float64, **VARIANTS[variant])
    plain, shared = both(unet, merged=True)
    features, (_, text_states) = encoded_features(unet, 2, (8, 10)), draw_inputs(unet, 2, (8, 10))
    with torch.no_grad():
        arguments = (features, torch.tensor(TIMESTEPS[:3]), text_states)
        assert relative_error(shared(*arguments), plain(*arguments)) <= 1e-10


def gradients(
    decoder: torch.nn.Module, unet: UNet2DConditionModel, features: UNetFeatures, text_states: torch.Tensor
) -> dict[str, torch.Tensor]:
    """d loss / d everything, for a loss that weighs every prediction differently."""
    leaves = dict(unet.named_parameters()) | {"mid": features.mid, "text_states": text_states}
    leaves |= {f"skip_{i:02}": skip for i, skip in enumerate(features.skips)}
    predictions = decoder(features, torch.tensor(TIMESTEPS[:3]), text_states)
    weights = torch.linspace(-1, 1, predictions.numel(), dtype=predictions.dtype).reshape(predictions.shape)
    found = torch.autograd.grad((weights * predictions.square()).sum(), list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("merged", [False, True], ids=["nearest", "merged"])
@pytest.mark.parametrize("name", TINY_UNETS)
def test_gradients_equal_those_of_the_plain_decoder(name: str, merged: bool, checkpointing: bool) -> None:
    unet = tiny_unet(name, dtype=torch.float64)
    features, (_, text_states) = encoded_features(unet, 2, (8, 12)), draw_inputs(unet, 2, (8, 12))
    text_states.requires_grad_()
    plain, shared = both(unet, merged=merged)
    expected = gradients(plain, unet, features, text_states)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    actual = gradients(shared, unet, features, text_states)
    assert actual.keys() == expected.keys()
    assert {"mid", "text_states", "skip_00", "conv_out.weight", "up_blocks.0.upsamplers.0.conv.weight"} <= actual.keys()
    for key in expected:
        assert relative_error(actual[key], expected[key]) <= 1e-9, key


def test_gradient_checkpointing_recomputes_in_the_backward_pass() -> None:
    unet = tiny_unet("sd15")
    features, (_, text_states) = encoded_features(unet, 1, (8, 8)), draw_inputs(unet, 1, (8, 8))
    calls: list[int] = []
    unet.up_blocks[-1].resnets[-1].conv2.register_forward_hook(lambda *_: calls.append(1))
    unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(2))
    unet.enable_gradient_checkpointing()
    predictions = SharedUNetDecoder(unet)(features, torch.tensor(TIMESTEPS), text_states)
    assert calls == [1, 2]
    predictions.sum().backward()
    assert sorted(calls) == [1, 1, 2, 2]


def test_prompts_times_and_features_are_projected_once() -> None:
    """B rows where only the image or the prompt matters, K where only the timestep does, B·K for the rest."""
    unet, batch, steps = tiny_unet("sd15"), 2, 4
    rows: dict[str, int] = {}

    def record(name: str) -> Any:
        return lambda _, arguments: rows.update({name: arguments[0].shape[0]})

    first, last = unet.up_blocks[0].resnets[0], unet.up_blocks[-1].resnets[-1]
    attention = unet.up_blocks[-1].attentions[-1].transformer_blocks[0]
    for name, module in {
        "first.norm1": first.norm1,
        "first.conv1": first.conv1,
        "first.conv_shortcut": first.conv_shortcut,
        "first.norm2": first.norm2,
        "last.time_emb_proj": last.time_emb_proj,
        "last.conv2": last.conv2,
        "attn2.to_k": attention.attn2.to_k,
        "attn2.to_v": attention.attn2.to_v,
        "attn1.to_k": attention.attn1.to_k,
    }.items():
        module.register_forward_pre_hook(record(name))
    features, (_, text_states) = encoded_features(unet, batch, (8, 8)), draw_inputs(unet, batch, (8, 8))
    with torch.no_grad():
        SharedUNetDecoder(unet)(features, torch.tensor(TIMESTEPS), text_states)
    assert rows == {
        "first.norm1": batch,
        "first.conv1": batch,
        "first.conv_shortcut": batch,
        "first.norm2": batch * steps,
        "last.time_emb_proj": steps,
        "last.conv2": batch * steps,
        "attn2.to_k": batch,
        "attn2.to_v": batch,
        "attn1.to_k": batch * steps,
    }


@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "proj_in"], ["conv1", "conv_shortcut", "conv", "conv2"]])
def test_lora_layers_take_part(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    unet = tiny_unet("sd15", dtype=torch.float64)
    plain, shared = both(unet, merged=True)
    features, (_, text_states) = encoded_features(unet, 2, (8, 8)), draw_inputs(unet, 2, (8, 8))
    arguments = (features, torch.tensor(TIMESTEPS), text_states)
    with torch.no_grad():
        without = plain(*arguments)
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=targets))
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        expected = plain(*arguments)
        assert relative_error(shared(*arguments), expected) <= 1e-10
    assert relative_error(expected, without) > 1e-3


def test_a_replaced_forward_is_not_bypassed() -> None:
    """Offloading and casting hooks replace a layer's forward; its weights alone do not say what it computes."""
    unet = tiny_unet("sd15", dtype=torch.float64)
    conv = unet.up_blocks[-1].resnets[-1].conv1
    original = conv.forward
    conv.forward = lambda inputs: 2 * original(inputs)
    plain, shared = both(unet, merged=False)
    features, (_, text_states) = encoded_features(unet, 2, (8, 8)), draw_inputs(unet, 2, (8, 8))
    arguments = (features, torch.tensor(TIMESTEPS), text_states)
    with torch.no_grad():
        assert relative_error(shared(*arguments), plain(*arguments)) <= 1e-10


def test_weights_changed_behind_its_back_are_seen() -> None:
    """An EMA swap writes through ``.data``, which leaves no trace that a cache could notice."""
    unet = tiny_unet("sd15", dtype=torch.float64)
    plain, shared = both(unet, merged=True)
    features, (_, text_states) = encoded_features(unet, 1, (8, 8)), draw_inputs(unet, 1, (8, 8))
    arguments = (features, torch.tensor(TIMESTEPS), text_states)
    with torch.no_grad():
        before = shared(*arguments)
        for parameter in unet.parameters():
            parameter.data.mul_(1.1)
        after = shared(*arguments)
        assert relative_error(after, plain(*arguments)) <= 1e-10
    assert relative_error(after, before) > 1e-2


@pytest.mark.parametrize("name", TINY_UNETS)
def test_channels_last_stays_channels_last(name: str) -> None:
    unet = tiny_unet(name)
    features, (_, text_states) = encoded_features(unet, 2, (8, 8)), draw_inputs(unet, 2, (8, 8))
    timesteps = torch.tensor(TIMESTEPS)
    with torch.no_grad():
        expected = UNetDecoder(unet)(features, timesteps, text_states)
        unet.to(memory_format=torch.channels_last)
        strided = UNetFeatures(*_channels_last(features))
        formats: list[bool] = []
        unet.conv_out.register_forward_pre_hook(
            lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        actual = SharedUNetDecoder(unet)(strided, timesteps, text_states)
    assert formats == [True]
    assert relative_error(actual, expected) <= 1e-5


def _channels_last(features: UNetFeatures) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    mid, *skips = (tensor.to(memory_format=torch.channels_last) for tensor in (features.mid, *features.skips))
    return mid, tuple(skips)


def test_repeated_rows_keep_the_memory_format() -> None:
    """Where they did not, a concatenation with them left channels-last, and with it the layers after it."""
    skip, embedding = torch.randn(2, 6, 3, 3), torch.zeros(4, 1)
    for strided in (skip, skip.to(memory_format=torch.channels_last)):
        part = strided[:, :5]
        rows = _repeated(part, embedding)
        assert torch.equal(rows, part.repeat_interleave(4, dim=0))
        assert rows.is_contiguous(memory_format=torch.channels_last) == (strided is not skip)


@torch.no_grad()
def test_a_unet_with_exchanged_upsamplers_is_the_same() -> None:
    unet = tiny_unet("sd15")
    exchanged = copy.deepcopy(unet)
    merge_upsamplers(exchanged)
    assert exchanged.state_dict().keys() == unet.state_dict().keys()
    for size in ((8, 8), (10, 6)):  # the second is no multiple: some levels upsample to another size than the double
        noise, text_states = draw_inputs(unet, 2, size)
        actual, expected = (each(noise, 500, text_states, return_dict=False)[0] for each in (exchanged, unet))
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_the_merged_upsampler_equals_nearest_then_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 6, 3, padding=1, dtype=torch.float64)
    inputs = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = conv(F.interpolate(inputs, scale_factor=2.0, mode="nearest"))
    actual = F.conv_transpose2d(inputs, merged_weight(conv.weight), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_merged_half_precision_weights_are_summed_in_float32() -> None:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    merged = merged_weight(weight)
    assert merged.dtype == torch.float16
    assert torch.equal(merged, merged_weight(weight.float()).half())


def test_sharing_saves_the_operations_it_promises() -> None:
    """SD 1.5, 64×64 latents, K = 4: at most 0.90 of the plain decoder's FLOPs, 0.83 with the merged upsampler."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel(**SD15_UNET)
        noise, text_states, timesteps = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768), torch.empty(4)
        features = UNetEncoder(unet)(noise, text_states, timesteps[:1])

        def flops(decoder: torch.nn.Module) -> int:
            with FlopCounterMode(display=False) as counter:
                decoder(features, timesteps, text_states)
            return counter.get_total_flops()

        plain = flops(UNetDecoder(unet))
        assert plain == pytest.approx(2.167e12, rel=1e-3)
        assert flops(SharedUNetDecoder(unet)) <= 0.90 * plain
        assert flops(SharedUNetDecoder(unet, merged_upsampler=True)) <= 0.83 * plain


class _Flat(torch.nn.Module):
    """The decoder with a flat signature, as a graph has it."""

    def __init__(self, decoder: SharedUNetDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, mid: torch.Tensor, skips: tuple[torch.Tensor, ...], timesteps: torch.Tensor, text_states: torch.Tensor
    ) -> torch.Tensor:
        return self.decoder(UNetFeatures(mid, skips), timesteps, text_states)


def test_the_decoder_exports_with_symbolic_batch_and_timesteps() -> None:
    unet = tiny_unet(
        "sd15",
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    with torch.no_grad():
        features, (_, text_states) = encoded_features(unet, 2, (8, 8)), draw_inputs(unet, 2, (8, 8))
        program = torch.export.export(
            _Flat(SharedUNetDecoder(unet, merged_upsampler=True)),
            (features.mid, features.skips, torch.tensor(TIMESTEPS[:3]), text_states),
            dynamic_shapes=({0: batch}, tuple({0: batch} for _ in features.skips), {0: steps}, {0: batch}),
        )
        features, (_, text_states) = encoded_features(unet, 5, (8, 8)), draw_inputs(unet, 5, (8, 8))
        timesteps = torch.tensor(TIMESTEPS)
        actual = program.module()(features.mid, features.skips, timesteps, text_states)
        expected = UNetDecoder(unet)(features, timesteps, text_states)
    assert relative_error(actual, expected) <= 1e-5
