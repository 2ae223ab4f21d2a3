"""The first part that is not finite is named, though every later part passes NaN on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiue_cli.backends.torch_backend import TeacherTorchBackend
from tiue_cli.errors import DeviceError, ModelFolderError, SchedulerError
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.noise import draw_noise

FILES = {
    "text encoder": "text_encoder/model.safetensors",
    "UNet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vae/diffusion_pytorch_model.safetensors",
}
KEYS = {"text encoder": "final_layer_norm", "UNet": "mid_block", "autoencoder": "decoder.conv_in"}


def draw(folder: Path) -> None:
    with TeacherTorchBackend(check_model_folder(folder), guidance=2.0, device="cpu") as backend:
        backend.generate(["a star"], draw_noise([1], backend.latent_shape(backend.default_size)), steps=2)


def changed(folder: Path, part: str, value: float) -> str:
    weights = load_file(folder / FILES[part])
    name = next(name for name in weights if KEYS[part] in name and name.endswith("weight"))
    weights[name].view(-1)[0] = value
    save_file(weights, folder / FILES[part], metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", list(FILES))
def test_part_with_a_bad_weight_is_named_with_the_weight(tiny_teacher_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    name = changed(tmp_path / "m", part, float("nan"))
    with pytest.raises(ModelFolderError) as caught:
        draw(tmp_path / "m")
    assert caught.value.message.startswith(f"the {part}'s weights hold NaN or infinity")
    assert name.removeprefix("text_model.") in caught.value.message


@pytest.mark.parametrize("part", ["text encoder", "UNet"])
def test_part_that_overflows_is_named(tiny_teacher_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / FILES[part])
    large = {name: weight * (1e30 if "weight" in name and weight.dim() > 1 else 1) for name, weight in weights.items()}
    save_file(large, tmp_path / "m" / FILES[part], metadata={"format": "pt"})
    with pytest.raises(DeviceError, match=f"the {part} produced NaN or infinity in float32"):
        draw(tmp_path / "m")


def test_epsilon_with_zero_terminal_snr_is_refused_before_sampling(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    change = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SchedulerError, match="abar is 0"):
        draw(tmp_path / "m")


def test_an_unknown_beta_schedule_is_refused_at_loading(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """Found by benchmarks/fuzz.py --seed 2: diffusers answers with NotImplementedError."""
    shutil.copytree(tiny_teacher_folder, tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": "exp"}))
    with pytest.raises(SchedulerError, match="beta_schedule 'exp'"):
        draw(tmp_path / "m")
