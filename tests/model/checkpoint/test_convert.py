"""Single files against the folders that they were written from: the same weights, the same pictures, and by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_sd_folder
from ldm_files import ldm_text, ldm_unet, ldm_vae, write_checkpoint, write_vae_file
from safetensors.torch import load_file, save_file

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.png import read_pixels
from tiue_cli.model.checkpoint import convert
from tiue_cli.model.checkpoint.convert import convert_checkpoint, convert_vae
from tiue_cli.model.checkpoint.kinds import CheckpointKind, check_checkpoint
from tiue_cli.model.sd_configs import SD15_TEXT, SD15_UNET, SD15_VAE, SD21_TEXT, SD21_UNET
from tiue_cli.model.weights import read_json


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd_folder(tmp_path_factory.mktemp("models") / request.param, kind=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd_folder(tmp_path_factory.mktemp("models") / "small")


def assert_same_weights(one: Path, other: Path, parts: tuple[str, ...] = ("unet", "vae", "text_encoder")) -> None:
    for part in parts:
        found, expected = (load_file(next((each / part).glob("*.safetensors"))) for each in (one, other))
        if part == "text_encoder":
            found, expected = ({n.removeprefix("text_model."): t for n, t in w.items()} for w in (found, expected))
        assert found.keys() == expected.keys(), part
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_a_file_becomes_the_folder_that_it_was_written_from(folder: Path, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model.safetensors", folder)
    out = convert_checkpoint(file, tmp_path / "out", like=folder)
    assert_same_weights(out, folder)
    pictures = []
    for model in (folder, out):
        with tiue.load(model, device="cpu", guidance=3) as pipe:
            pictures.append(pipe("a red star", seed=1, steps=2, output="numpy")[0])
    assert np.array_equal(*pictures)


def test_averaged_weights_are_taken_on_request(small: Path, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model.safetensors", small, ema=True)
    assert_same_weights(convert_checkpoint(file, tmp_path / "ema", like=small, ema=True), small)
    plain = load_file(
        convert_checkpoint(file, tmp_path / "plain", like=small) / "unet/diffusion_pytorch_model.safetensors"
    )
    averaged = load_file(small / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(plain[name], 2 * averaged[name]) for name in averaged)
    pruned = write_checkpoint(tmp_path / "pruned.safetensors", small)
    with pytest.raises(UsageError, match="no averaged weights"):
        convert_checkpoint(pruned, tmp_path / "none", like=small, ema=True)


def test_parts_that_a_file_lacks_come_from_the_other_folder(small: Path, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model.safetensors", small, vae=False, text=False, dtype=torch.float16)
    out = convert_checkpoint(file, tmp_path / "out", like=small)
    assert_same_weights(out, small, ("vae", "text_encoder"))
    halves = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.float16}
    kind = check_checkpoint(file)
    assert (kind.has_vae, kind.text, kind.text_width) == (False, None, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lacks", "its UNet lacks up_blocks.1.resnets.0.conv1.weight"),
        ("extra", "no place in the UNet for up_blocks.0.resnets.0.gate.weight"),
        ("shape", "mid_block.resnets.0.norm1.bias of its UNet is"),
        ("foreign", "belong to no part of Stable Diffusion: secret.weight"),
        ("text", "its text encoder lacks text_model.encoder.layers.1.mlp.fc2.bias"),
        ("vae", "its autoencoder lacks decoder.mid_block.attentions.0.to_q.weight"),
    ],
)
def test_every_tensor_is_accounted_for(small: Path, tmp_path: Path, change: str, words: str) -> None:
    tensors = load_file(write_checkpoint(tmp_path / "model.safetensors", small))
    unet = "model.diffusion_model."
    if change == "lacks":
        del tensors[f"{unet}output_blocks.2.0.in_layers.2.weight"]
    elif change == "extra":
        tensors[f"{unet}output_blocks.0.0.gate.weight"] = torch.ones(3)
    elif change == "shape":
        tensors[f"{unet}middle_block.0.in_layers.0.bias"] = torch.ones(3)
    elif change == "foreign":
        tensors["secret.weight"] = torch.ones(3)
    elif change == "text":
        del tensors["cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias"]
    else:
        del tensors["first_stage_model.decoder.mid.attn_1.q.weight"]
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ModelFolderError, match=words.replace(".", r"\.")):
        convert_checkpoint(tmp_path / "changed.safetensors", tmp_path / "out", like=small)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_names_and_shapes_of_the_full_sizes(kind: str) -> None:
    """Stable Diffusion's own configurations, key by key; the values are views of one zero."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, text = (SD15_UNET, SD15_TEXT) if kind == "sd15" else (SD21_UNET, SD21_TEXT)
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**SD15_VAE),
            "text": CLIPTextModel(CLIPTextConfig(**text)),
        }
    zero = torch.zeros((), dtype=torch.float16)
    weights = {
        part: {name: zero.expand(value.shape) for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    file = {f"model.diffusion_model.{name}": t for name, t in ldm_unet(weights["unet"], unet).items()}
    file |= {f"first_stage_model.{name}": t for name, t in ldm_vae(weights["vae"], SD15_VAE).items()}
    file |= ldm_text(weights["text"], text)
    layout: Any = "clip" if kind == "sd15" else "open_clip"
    probe = CheckpointKind(Path("x"), text["hidden_size"], True, layout, False, None, False)
    found = {
        "unet": convert._unet(file, unet, ema=False, where=Path("x")),
        "vae": convert._vae(file, SD15_VAE, where=Path("x")),
        "text": convert._text(file, probe, text, where=Path("x")),
    }
    for part, expected in weights.items():
        shapes = {name.removeprefix("text_model."): tuple(t.shape) for name, t in found[part].items()}
        assert shapes == {name: tuple(t.shape) for name, t in expected.items() if "position_ids" not in name}, part


def write_header(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata=metadata)
    return path


UNET = {
    "model.diffusion_model.input_blocks.0.0.weight": (2, 4, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (1, 768),
}
SD2 = UNET | {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (1, 1024)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"conditioner.embedders.0.x": (1,), "conditioner.embedders.1.model.x": (1,)}, "is SDXL"),
        ({"conditioner.embedders.0.model.transformer.x": (1,)}, "is the SDXL refiner"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "is Flux"),
        ({"control_model.time_embed.0.weight": (1,)}, "is a ControlNet"),
        ({"lora_unet_mid_block_x.lora_down.weight": (1, 1)}, "is a LoRA, not a whole model"),
        ({"encoder.conv_in.weight": (1,), "decoder.conv_in.weight": (1,)}, "is an autoencoder, not a whole model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "is a UNet in diffusers' layout"),
        ({"text_model.x": (1,)}, "is a text encoder"),
        (UNET | {"model.diffusion_model.input_blocks.0.0.weight": (2, 9, 1, 1)}, "is an inpainting model"),
        (UNET | {"model.diffusion_model.input_blocks.0.0.weight": (2, 8, 1, 1)}, "is InstructPix2Pix"),
        (UNET | {"model.diffusion_model.label_emb.0.0.weight": (1,)}, "an SDXL or upscaling UNet"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, shapes: dict[str, Any], words: str) -> None:
    path = write_header(tmp_path / "a.safetensors", shapes)
    with pytest.raises(ModelFolderError, match=words) as caught:
        check_checkpoint(path)
    assert caught.value.hint


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(ModelFolderError, match="is a pickle"):
        tiue.load(tmp_path / "a.ckpt")


def test_what_the_unet_predicts_is_read_or_asked_for(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, str], str | None]] = [
        (UNET, {}, "epsilon"),
        (UNET | {"v_pred": (1,)}, {}, "v_prediction"),
        (UNET, {"modelspec.prediction_type": "v"}, "v_prediction"),
        (SD2, {}, None),
        (SD2, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (SD2 | {"v_pred": (1,), "ztsnr": (1,)}, {}, "v_prediction"),
    ]
    for number, (shapes, metadata, expected) in enumerate(cases):
        kind = check_checkpoint(write_header(tmp_path / f"{number}.safetensors", shapes, **metadata))
        assert (kind.prediction, kind.zero_snr) == (expected, "ztsnr" in shapes)
    with pytest.raises(ModelFolderError, match="does not say whether") as caught:
        convert_checkpoint(tmp_path / "3.safetensors", tmp_path / "out")
    assert "--prediction" in str(caught.value.hint)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_an_autoencoder_of_one_file(small: Path, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "SD15_VAE", read_json(small / "vae" / "config.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_vae_file(tmp_path / "vae.safetensors", small, prefix=prefix)
    out = convert_vae(file, tmp_path / "out" / "vae")
    assert_same_weights(out.parent, small, ("vae",))
    pictures = []
    for vae in (None, file):
        with tiue.load(small, device="cpu", vae=vae) as pipe:
            pictures.append(pipe("a tree", seed=0, steps=1, output="numpy")[0])
    assert np.array_equal(*pictures)


def test_a_file_is_a_model_wherever_one_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converted once into the cache; here with the small folder's configs in place of Stable Diffusion's."""
    monkeypatch.setattr(convert, "_own_parts", lambda kind, asked: convert._parts_like(small, asked))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_checkpoint(tmp_path / "model.safetensors", small)
    words = ["generate", "a tree", "--teacher-steps", "1", "--seed", "0", "--device", "cpu"]
    for model, out in ((file, "file.png"), (small, "folder.png")):
        assert main([*words, "--model", str(model), "--out", str(tmp_path / out)]) == 0
    assert np.array_equal(read_pixels(tmp_path / "file.png"), read_pixels(tmp_path / "folder.png"))
    (kept,) = (tmp_path / "cache/tiue/checkpoints/models").iterdir()
    assert kept.name.startswith("model-")
    capsys.readouterr()
    assert main(["inspect", str(file)]) == 0
    assert main(["convert", str(file), str(tmp_path / "kept"), "--like", str(small)]) == 0
    assert main(["convert", str(file), str(tmp_path / "kept"), "--like", str(small)]) == 1
    assert_same_weights(tmp_path / "kept", small)
