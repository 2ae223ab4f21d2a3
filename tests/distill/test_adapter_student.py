"""Students that are adapters: one set of frozen weights, a small folder, and the same model wherever it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pydantic
import pytest
import torch
from helpers import copy_folder, tiny_unet
from safetensors.torch import load_file

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.distill.adapter import adapt_student, adapter_weights
from tiue_cli.distill.config import LoraSettings, StudentSettings
from tiue_cli.distill.networks import ScoreModel
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.weights import read_json

ADAPTER = {"student__trainable": "lora", "student__rank": 3}


@pytest.mark.parametrize("merged", [False, True])
def test_three_roles_share_one_set_of_weights(merged: bool) -> None:
    """Teacher, LoRA teacher and student: whatever is not an adapter is the same memory."""
    unet = tiny_unet("sd15")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32))
    expected = unet(*inputs, return_dict=False)[0]
    score = ScoreModel(tiny_unet("sd15"), LoraSettings(rank=2), seed=0, merged=merged)
    adapt_student(unet, score, LoraSettings(rank=3), seed=0)
    own = {name.replace(".base_layer", ""): value for name, value in unet.named_parameters() if ".lora_" not in name}
    theirs = {name.replace(".base_layer", ""): v for name, v in score.unet.named_parameters() if ".lora_" not in name}
    assert own.keys() == before.keys()
    assert all(own[name] is theirs[name] and not own[name].requires_grad for name in own)
    assert all(torch.equal(own[name], before[name]) for name in before)
    trained = {name for name, value in unet.named_parameters() if value.requires_grad}
    assert trained == set(adapter_weights(unet))
    assert {value.shape[0] for name, value in adapter_weights(unet).items() if ".lora_A." in name} == {3}
    torch.testing.assert_close(unet(*inputs, return_dict=False)[0], expected)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="set trainable to lora"):
        StudentSettings(rank=4)
    with pytest.raises(pydantic.ValidationError, match="leave init out"):
        StudentSettings(trainable="lora", init="student")
    # A full student's settings are called what they always were.
    assert not {"trainable", "rank", "targets"} & StudentSettings().model_dump().keys()


@pytest.mark.slow  # two distillations
def test_an_adapter_student_is_a_student(
    make_config: Callable[..., Any],
    v_teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = copy_folder(v_teacher_folder, tmp_path / "teacher")
    config = make_config(teacher=str(teacher), optimizer__learning_rate=0.01, **ADAPTER)
    finished = tiue.distill(config, out=tmp_path / "run")
    folder = finished.student
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "tiue.json",
    ]
    manifest = read_json(folder / "tiue.json")
    assert manifest["base"]["source"] == str(teacher.resolve())
    assert manifest["base"]["sha256"] == manifest["teacher_sha256"]
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    assert any(float(value.abs().max()) > 0 for name, value in tensors.items() if "lora_B" in name or ".up." in name)

    # The same steps in two runs end where they end in one.
    half = make_config(teacher=str(teacher), optimizer__learning_rate=0.01, max_steps=2, **ADAPTER)
    tiue.distill(half, out=tmp_path / "resumed")
    again = tiue.distill(config, out=tmp_path / "resumed", resume=True)
    assert again.student is not None
    resumed = load_file(again.student / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(resumed[name], tensors[name]) for name in tensors)

    # Wherever a model is named it draws what the full student draws that `merge` writes.
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "full")]) == 0
    assert "base" not in read_json(tmp_path / "full" / "tiue.json")
    pictures = []
    for model in (folder, tmp_path / "full", tmp_path / "run"):
        with tiue.load(model, device="cpu") as pipe:
            assert (pipe.kind, pipe.steps) == ("student", 2)
            pictures.append(pipe("a red star", seed=1, output="latents")[0])
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])

    # The base elsewhere, and another model in its place.
    moved = teacher.rename(tmp_path / "moved")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    with pytest.raises(ModelFolderError, match=r"is an adapter of .*teacher, which cannot be used"):
        tiue.load(folder, device="cpu")
    assert main(["merge", str(folder), str(tmp_path / "full2"), "--base", str(moved)]) == 0
    assert main(["merge", str(folder), str(tmp_path / "full3"), "--base", str(tmp_path / "full")]) == 1
    assert "another model" in capsys.readouterr().err

    # Said once to any command, it is remembered; a wrong one is refused though it would not be needed any more.
    with tiue.load(tmp_path / "run", base=moved, device="cpu") as pipe:
        assert np.array_equal(pipe("a red star", seed=1, output="latents")[0], pictures[0])
    with tiue.load(folder, device="cpu") as pipe:
        assert np.array_equal(pipe("a red star", seed=1, output="latents")[0], pictures[0])
    # A repository of the hub holds the same files, and the base is found or named in the same way.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    with pytest.raises(ModelFolderError, match=r"is an adapter of .*teacher, which cannot be used"):
        resolve_model("owner/adapter")
    with tiue.load("owner/adapter", base=moved, device="cpu") as pipe:
        assert np.array_equal(pipe("a red star", seed=1, output="latents")[0], pictures[0])
    assert resolve_model("owner/adapter") == resolve_model(folder)
    for command in (["generate", "a red star", "--model"], ["export"], ["serve"], ["bench"]):
        assert main([*command, str(folder), "--base", str(tmp_path / "full")]) == 1, command
        assert "another model" in capsys.readouterr().err, command
        assert main([*command, str(tmp_path / "full"), "--base", str(moved)]) == 2, command
        assert "is not one" in capsys.readouterr().err, command
        assert main([*command, str(tmp_path / "nowhere"), "--base", str(moved)]) == 1, command
        assert "does not exist" in capsys.readouterr().err, command
        assert main([*command, "papercut", "--base", str(moved)]) == 2, command
        assert "is not one" in capsys.readouterr().err, command


def test_the_dry_run_counts_the_adapter_and_not_the_weights_below_it(make_config: Callable[..., Any]) -> None:
    from tiue_cli.distill.estimate import estimate_run

    full, adapter = (estimate_run(make_config(**changes), prompts=5, half=True) for changes in ({}, ADAPTER))
    trained = {name: each.parameters["student's UNet"] for name, each in (("full", full), ("adapter", adapter))}
    assert trained["adapter"] * 5 < trained["full"]
    assert adapter.memory_bytes["student"] == 4 * trained["adapter"]
    assert adapter.memory_bytes["teacher's UNet"] == full.memory_bytes["teacher's UNet"]
    assert adapter.peak_memory_bytes < full.peak_memory_bytes
    assert adapter.disk_bytes["student"] == 4 * trained["adapter"]
