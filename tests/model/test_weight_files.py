"""Which weights a component has, and tensors that it has no place for. The oracle is what the loaders really load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiue_cli.errors import ModelFolderError
from tiue_cli.model.components import load_components
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.identity import model_fingerprint, model_sha256
from tiue_cli.model.weights import WEIGHT_STEMS, inspect_weights

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def folder(tiny_teacher_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_teacher_folder, tmp_path / "model")


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{WEIGHT_STEMS[part]}.safetensors"


def shard(folder: Path, part: str, *, factor: float = 1.0) -> None:
    """Write the weights again as two shards with an index, times ``factor``, beside the single file."""
    tensors = {name: tensor * factor for name, tensor in load_file(weights_of(folder, part)).items()}
    stem, names = WEIGHT_STEMS[part], sorted(tensors)
    places = {name: f"{stem}-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for place in set(places.values()):
        one = {name: tensors[name].contiguous() for name in names if places[name] == place}
        save_file(one, folder / part / place, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def loaded_sum(folder: Path, part: str) -> float:
    module: torch.nn.Module = getattr(load_components(folder), part)
    return sum(float(tensor.double().sum()) for tensor in module.state_dict().values())


@pytest.mark.parametrize("part", PARTS)
def test_counts_and_hashes_follow_the_loader_where_shards_lie_beside_a_single_file(folder: Path, part: str) -> None:
    plain = loaded_sum(folder, part)
    shard(folder, part, factor=3.0)
    loader_takes_shards = abs(loaded_sum(folder, part) - plain) > 1e-3
    files = check_model_folder(folder).component(part).files
    assert all("-of-" in name for name in files) == loader_takes_shards
    before = model_fingerprint(folder), model_sha256(folder)

    taken = folder / part / files[0]
    unused = next(file for file in sorted((folder / part).glob("*.safetensors")) if file.name not in files)
    unused.write_bytes(b"damaged")
    assert (model_fingerprint(folder), model_sha256(folder)) == before
    assert abs(loaded_sum(folder, part) - plain) > 1e-3 or not loader_takes_shards
    changed = bytearray(taken.read_bytes())
    changed[-1] ^= 0x40
    taken.write_bytes(changed)
    assert model_fingerprint(folder) != before[0] and model_sha256(folder) != before[1]


def test_what_is_not_loaded_neither_counts_nor_need_be_readable(folder: Path) -> None:
    before = model_fingerprint(folder), model_sha256(folder)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").symlink_to("nowhere")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"gigabytes")
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"another copy")
    assert (model_fingerprint(folder), model_sha256(folder)) == before


FOREIGN: dict[str, tuple[Callable[[str], str], str]] = {
    "old LoRA processors": (lambda name: f"{name.rpartition('.')[0]}.processor.to_q_lora.down.weight", "LoRA"),
    "peft LoRA": (lambda name: f"{name.rpartition('.')[0]}.lora_A.default.weight", "LoRA"),
    "motion modules": (lambda name: f"down_blocks.0.motion_modules.0.{name}", "motion modules"),
    "an IP adapter": (lambda name: f"{name.rpartition('.')[0]}.processor.to_k_ip.weight", "IP adapter"),
    "something unheard of": (lambda name: f"{name}_of_tomorrow", "has no place for"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_tensors_without_a_place_are_refused_by_name(folder: Path, part: str, kind: str) -> None:
    rename, words = FOREIGN[kind]
    path = weights_of(folder, part)
    tensors = load_file(path)
    name = sorted(name for name in tensors if name.endswith(".weight"))[0]
    added = rename(name)
    save_file(tensors | {added: torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=words) as caught:
        load_components(folder)
    assert added in caught.value.message and caught.value.hint


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("rename", "words", "remedy"),
    [
        (lambda name: f"module.{name}", "DistributedDataParallel", "strip"),
        (lambda name: f"_orig_mod.{name}", "torch.compile", "strip"),
        (lambda name: f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}", "not fused", "fuse_lora"),
    ],
)
def test_renamed_weights_name_the_cause_and_the_remedy_without_being_loaded(
    folder: Path, part: str, rename: Callable[[str], str], words: str, remedy: str
) -> None:
    path = weights_of(folder, part)
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=words) as caught:
        inspect_weights(folder / part, name=part, class_name="any")
    assert remedy in str(caught.value.hint)


def test_position_ids_and_the_other_half_of_clip_are_ignored(folder: Path) -> None:
    before = loaded_sum(folder, "text_encoder")
    path = weights_of(folder, "text_encoder")
    prefix = "text_model." if any(name.startswith("text_model.") for name in load_file(path)) else ""
    extra = {
        f"{prefix}embeddings.position_ids": torch.arange(16)[None],
        "text_projection.weight": torch.zeros(2, 2),
        "logit_scale": torch.zeros(1),
    }
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    assert loaded_sum(folder, "text_encoder") == before
