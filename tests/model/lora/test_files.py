"""What a LoRA may be given as, and what is refused before a model is loaded: each kind in its own words."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from lora_files import write_tensors

from tiue_cli.errors import AdapterError, TiueError, UsageError
from tiue_cli.model.lora import files
from tiue_cli.model.lora.files import find_lora, lora_use, lora_uses, parse_lora

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def small_lora(path: Path) -> Path:
    return write_tensors(path, {f"{LAYER}.lora_A.weight": torch.ones(1, 2), f"{LAYER}.lora_B.weight": torch.ones(2, 1)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("OWNER/NAME:-1", ("OWNER/NAME", -1.0)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.0)),
        ("a:b:2e-1", ("a:b", 0.2)),
        ("0.5", ("0.5", 1.0)),
    ],
)
def test_a_weight_follows_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Path) -> None:
    path = small_lora(tmp_path / "style:0.5")
    assert parse_lora(str(path)) == (str(path), 1.0)


@pytest.mark.parametrize("weight", ["nan", "inf", "-1e9"])
def test_a_weight_that_cannot_be_meant_is_refused(tmp_path: Path, weight: str) -> None:
    with pytest.raises(UsageError, match="not a weight"):
        lora_use(f"{small_lora(tmp_path / 'a.safetensors')}:{weight}")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "any.safetensors"])
def test_a_folder_stands_for_the_lora_in_it(tmp_path: Path, name: str) -> None:
    path = small_lora(tmp_path / "style" / name)
    found = find_lora(str(tmp_path / "style"))
    assert found.path == path
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lora_use(str(tmp_path / "style")).name == "style"


def test_a_folder_of_several_asks_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=r"2 \.safetensors files") as caught:
        find_lora(str(tmp_path))
    assert caught.value.hint == f"name one: {tmp_path}/a.safetensors"


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    path = small_lora(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="twice"):
        lora_uses([str(path), f"{path}:0.5"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{KOHYA}.dora_scale", "is DoRA"),
        (f"{LAYER}.lora_magnitude_vector.weight", "is DoRA"),
        (f"{KOHYA}.lokr_w1", "is LoKr"),
        (f"{KOHYA}.hada_w1_a", "is LoHa"),
        (f"{KOHYA}.oft_blocks", "is OFT"),
        (f"{KOHYA}.lora_mid.weight", "Tucker core"),
        (f"{KOHYA}.diff", "full differences"),
        (f"{LAYER}.lora_B.bias", "LoRA with biases"),
        ("bundle_emb.style.string_to_param.*", "textual inversion"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "made for SDXL"),
        ("unet.mid_block.attentions.0.transformer_blocks.7.attn1.to_q.lora_A.weight", "made for SDXL"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "made for Flux"),
        ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", "made for Flux"),
        ("transformer.transformer_blocks.3.attn.to_q.lora_A.weight", "made for a diffusion transformer"),
        ("down_blocks.0.resnets.0.conv1.weight", "holds no LoRA"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {name: torch.ones(1)})
    with pytest.raises(AdapterError, match=words) as caught:
        find_lora(str(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_pickles_and_what_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b.safetensors").write_bytes(b"short")
    (tmp_path / "p.txt").write_bytes(b"a star")
    for source, words in (
        ("a.pt", "is a pickle"),
        ("empty", "holds no LoRA"),
        ("none.safetensors", "does not exist"),
        ("b.safetensors", "truncated"),
        ("p.txt", "not a .safetensors file"),
    ):
        with pytest.raises(AdapterError, match=words):
            find_lora(str(tmp_path / source))


def test_a_hub_id_without_the_hub_says_so() -> None:
    with pytest.raises(TiueError, match="OWNER/NAME") as caught:
        find_lora("OWNER/NAME")
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_an_adapter_of_the_package_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match="papercut-ink does not exist"):
        lora_use("papercut-ink:0.5")
    monkeypatch.setattr(files, "PACKAGED", tmp_path)
    path = small_lora(tmp_path / "loras" / "papercut-ink.safetensors")
    use = lora_use("papercut-ink:0.5")
    assert (use.source, use.weight, use.sha256) == ("papercut-ink", 0.5, find_lora(str(path)).sha256)
    with pytest.raises(AdapterError, match="does not exist"):
        lora_use("papercut-other")
