"""Adapters on a model against diffusers' and PEFT's own layers: the same predictions, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_tokenizer, seeded_noise, tiny_text_encoder, tiny_unet
from lora_files import Factors, Layout, attention_only, draw_factors, write_lora, write_tensors

from tiue_cli.errors import AdapterError
from tiue_cli.files.png import LoraUse
from tiue_cli.model.lora.adapters import Adapters
from tiue_cli.model.lora.files import find_lora, lora_use
from tiue_cli.model.shared import SharedUNetDecoder
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

LAYOUTS: tuple[Layout, ...] = ("peft", "diffusers", "kohya", "processors")


class Model:
    """A tiny UNet and text encoder, and what they compute."""

    def __init__(self, kind: Any = "sd15") -> None:
        self.unet = tiny_unet(kind)
        self.text_encoder = tiny_text_encoder(kind, tokenizer=build_tokenizer())
        self.adapters = Adapters(unet=self.unet, text_encoder=self.text_encoder)

    @torch.no_grad()
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(text states, prediction) of fixed inputs."""
        texts = self.text_encoder(torch.arange(32).reshape(2, 16) + 5)[0]
        noise = seeded_noise((2, 4, 8, 8), seed=3)
        return texts, self.unet(noise, torch.tensor([400, 20]), texts, return_dict=False)[0]

    def use(self, *texts: str) -> bool:
        return self.adapters.use([lora_use(text) for text in texts])

    def weights(self) -> dict[str, torch.Tensor]:
        both = (("unet", self.unet), ("text", self.text_encoder))
        return {f"{part}.{name}": value.clone() for part, module in both for name, value in module.state_dict().items()}


def with_diffusers(model: Model, path: Path, *, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs with the adapter put on by diffusers and PEFT, layer by layer and not fused."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Loader

    other = Model.__new__(Model)
    other.unet, other.text_encoder = copy.deepcopy(model.unet), copy.deepcopy(model.text_encoder)
    tensors, alphas, metadata = Loader.lora_state_dict(str(path), return_lora_metadata=True)
    Loader.load_lora_into_unet(tensors, alphas, other.unet, adapter_name="a", metadata=metadata)
    Loader.load_lora_into_text_encoder(tensors, alphas, other.text_encoder, adapter_name="a", metadata=metadata)
    other.unet.set_adapters(["a"], [weight])
    from diffusers.utils.peft_utils import scale_lora_layers

    if any(name.startswith("text_encoder.") for name in tensors):
        scale_lora_layers(other.text_encoder, weight)
    return other.outputs()


def assert_close(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance


def differs(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return float((one[1] - other[1]).abs().max()) > 1e-2


def own_factors(model: Model, layout: Layout = "peft", **changes: Any) -> Factors:
    factors = draw_factors(model.unet, model.text_encoder, **changes)
    return attention_only(factors) if layout == "processors" else factors


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_fused_adapters_equal_diffusers_own_layers(tmp_path: Path, layout: Layout, kind: str) -> None:
    model = Model(kind)
    bare = model.outputs()
    path = write_lora(tmp_path / "a.safetensors", own_factors(model), layout, alpha=2.0)
    for weight in (1.0, -0.6):
        assert model.use(f"{path}:{weight}")
        assert_close(model.outputs(), with_diffusers(Model(kind), path, weight=weight), 1e-5)
        assert differs(model.outputs(), bare)


def test_every_layout_of_one_adapter_draws_the_same(tmp_path: Path) -> None:
    model = Model()
    factors = own_factors(model, "processors")
    found = []
    for layout in LAYOUTS:
        model.use(str(write_lora(tmp_path / f"{layout}.safetensors", factors, layout)))
        found.append(model.outputs())
    for outputs in found[1:]:
        assert_close(outputs, found[0], 0.0)


def test_alpha_over_rank_scales_each_layer_by_its_own_rank(tmp_path: Path) -> None:
    model = Model()
    factors = own_factors(model)
    path = write_lora(tmp_path / "a.safetensors", factors, "kohya", alpha=0.5)
    before = model.weights()
    model.use(f"{path}:2")
    after = model.weights()
    assert {down.shape[0] for down, _ in factors.values()} == {3, 4}
    for name, (down, up) in factors.items():
        key = f"{name.replace('text_encoder.', 'text.')}.weight"
        expected = 2 * 0.5 / down.shape[0] * torch.einsum("or,r...->o...", up.flatten(1), down)
        torch.testing.assert_close(after[key] - before[key], expected.reshape(before[key].shape), atol=1e-5, rtol=0)


def test_the_alpha_of_diffusers_metadata_is_read(tmp_path: Path) -> None:
    model = Model()
    factors = {name: pair for name, pair in own_factors(model).items() if name.startswith("unet.")}
    config = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"conv1": 1.5}, "unet.use_rslora": False}
    plain = write_lora(tmp_path / "plain.safetensors", factors)
    scaled = write_lora(tmp_path / "scaled.safetensors", factors, config=config)
    before = model.weights()
    deltas = []
    for path in (plain, scaled):
        model.use(str(path))
        deltas.append({name: value - before[name] for name, value in model.weights().items()})
    for name, (down, _) in factors.items():
        alpha = 1.5 if name.endswith("conv1") else 6
        expected = deltas[0][f"{name}.weight"] * alpha / down.shape[0]
        torch.testing.assert_close(deltas[1][f"{name}.weight"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_restored_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Model()
    paths = [
        write_lora(tmp_path / f"{seed}.safetensors", own_factors(model, seed=100 * seed, std=2.0)) for seed in range(3)
    ]
    model.unet.to(dtype)
    model.text_encoder.to(dtype)
    before = model.weights()
    for texts in ([paths[0]], [f"{paths[1]}:0.7", paths[2]], [f"{paths[0]}:1e-3"], []):
        model.use(*map(str, texts))
        changed = [name for name, value in model.weights().items() if not torch.equal(value, before[name])]
        assert bool(changed) == bool(texts)
    assert model.weights().keys() == before.keys()


def test_two_adapters_are_the_sum_of_both(tmp_path: Path) -> None:
    model = Model()
    before = model.weights()
    paths = [write_lora(tmp_path / f"{n}.safetensors", own_factors(model, seed=50 * n)) for n in range(2)]
    deltas = []
    for texts in ([str(paths[0])], [f"{paths[1]}:0.5"], [str(paths[0]), f"{paths[1]}:0.5"]):
        model.use(*texts)
        deltas.append({name: value - before[name] for name, value in model.weights().items()})
    for name in before:
        torch.testing.assert_close(deltas[2][name], deltas[0][name] + deltas[1][name], atol=1e-5, rtol=0)


def test_the_sharing_decoder_with_adapters_equals_the_plain_one(tmp_path: Path) -> None:
    model = Model()
    model.unet.double()
    model.use(str(write_lora(tmp_path / "a.safetensors", own_factors(model))))
    noise, texts = seeded_noise((2, 4, 8, 8), dtype=torch.float64), seeded_noise((2, 16, 32), dtype=torch.float64)
    with torch.no_grad():
        features = UNetEncoder(model.unet)(noise, texts, 751)
        arguments = (features, torch.tensor([751, 501, 251, 1]), texts)
        plain = UNetDecoder(model.unet)(*arguments)
        shared = SharedUNetDecoder(model.unet, merged_upsampler=True)(*arguments)
    assert float((shared - plain).abs().max() / plain.abs().max()) <= 1e-10


# --- what is refused -----------------------------------------------------------------------------------------------


def refusal(path: Path) -> AdapterError:
    model = Model()
    before = model.weights()
    with pytest.raises(AdapterError) as caught:
        model.use(str(path))
    assert all(torch.equal(value, before[name]) for name, value in model.weights().items())
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_an_adapter_of_another_model_is_refused_by_its_layer(tmp_path: Path) -> None:
    larger = tiny_unet("sd15", head_dim=32)
    path = write_lora(tmp_path / "a.safetensors", draw_factors(larger))
    assert "layer down_blocks.0" in refusal(path).message
    factors = {name.replace("down_blocks.0", "down_blocks.9"): pair for name, pair in own_factors(Model()).items()}
    assert "no layer down_blocks.9" in refusal(write_lora(tmp_path / "b.safetensors", factors)).message


def test_a_tensor_that_no_lora_has_is_refused_by_name(tmp_path: Path) -> None:
    down, up = next(iter(own_factors(Model()).values()))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.lora_C.weight": up.clone()}
    assert "attn1.to_q.lora_C.weight" in refusal(write_tensors(tmp_path / "a.safetensors", tensors)).message
    assert (
        "one of its two factors"
        in refusal(write_tensors(tmp_path / "b.safetensors", {f"{layer}.lora_A.weight": down})).message
    )
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, "vae.decoder.lora_A.weight": down.clone()}
    assert "vae.decoder.lora_A.weight" in refusal(write_tensors(tmp_path / "c.safetensors", tensors)).message


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    factors = own_factors(Model())
    next(iter(factors.values()))[0].fill_(float("nan"))
    assert "NaN" in refusal(write_lora(tmp_path / "a.safetensors", factors)).message


def test_a_file_that_changed_meanwhile_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    model = Model()
    path = write_lora(tmp_path / "a.safetensors", own_factors(model))
    use = LoraUse(source=str(path), weight=1.0, sha256=find_lora(str(path)).sha256)
    write_lora(path, own_factors(model, seed=900, rank=5))
    with pytest.raises(AdapterError, match="another file"):
        model.adapters.use([use])
