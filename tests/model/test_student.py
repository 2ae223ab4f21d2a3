"""Student folders: nothing is lost on the way to disk and back, and plain diffusers can read what we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import build_old_sd_folder, build_sd_folder, copy_folder, edit_json, seeded_noise
from safetensors.torch import load_file, save_file

from tiue_cli.errors import ModelFolderError, OutputError, SchedulerError, UsageError
from tiue_cli.files.hashes import sha256_folder
from tiue_cli.files.students import STUDENT_MANIFEST
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.student import StudentModel, load_student, save_student, student_from_teacher

PARTS = ("text_encoder", "unet", "vae")


def assert_same_weights(first: Any, second: Any) -> None:
    for part in PARTS:
        ours, theirs = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), f"{part}.{key}"


def token_ids(tokenizer: Any) -> list[list[int]]:
    prompts = ["a red star", "Zürich 日本 !", "a blue tree above a house " * 8]
    ids: list[list[int]] = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    ).input_ids
    return ids


@pytest.fixture
def student(tiny_student_folder: Path) -> StudentModel:
    return load_student(tiny_student_folder)


# --- round trips


def test_save_and_load_is_bit_exact(student: StudentModel, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 0.01 * seeded_noise(tuple(parameter.shape), seed=1)
    again = load_student(save_student(student, tmp_path / "out"))
    assert_same_weights(student, again)
    assert again.manifest == student.manifest
    assert again.scheduler_config == student.scheduler_config
    assert token_ids(again.tokenizer) == token_ids(student.tokenizer)
    assert again.notes == []


def test_a_folder_saved_twice_has_one_hash_wherever_it_lies(student: StudentModel, tmp_path: Path) -> None:
    first = save_student(student, tmp_path / "first")
    second = save_student(load_student(first), tmp_path / "elsewhere" / "second")
    assert sha256_folder(first) == sha256_folder(second)
    assert not any(str(tmp_path) in file.read_text() for file in second.rglob("*.json"))


@pytest.mark.parametrize(("kind", "vae"), [("sd15", "kl"), ("sd21", "tiny")])
def test_plain_diffusers_loads_what_we_save(tmp_path: Path, kind: Any, vae: Any) -> None:
    student = student_from_teacher(build_sd_folder(tmp_path / "teacher", kind=kind, vae=vae))
    pipeline = StableDiffusionPipeline.from_pretrained(save_student(student, tmp_path / "student"))
    assert_same_weights(pipeline, student)
    assert token_ids(pipeline.tokenizer) == token_ids(student.tokenizer)
    images = pipeline("a red star", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_half_precision_is_half_the_size_and_leaves_the_student_alone(student: StudentModel, tmp_path: Path) -> None:
    out = save_student(student, tmp_path / "half", dtype=torch.float16)
    assert student.unet.dtype == torch.float32
    info = check_model_folder(out)
    assert {dtype for part in PARTS for dtype in info.component(part).dtypes} == {"F16"}
    pipeline = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float16)
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, student.unet.state_dict()[key].half())
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "float16"


def test_only_safetensors_are_written(tiny_student_folder: Path) -> None:
    suffixes = {file.suffix for file in tiny_student_folder.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".md"}


def test_weights_can_be_read_by_whoever_can_read_the_rest(tiny_student_folder: Path) -> None:
    modes = {file.stat().st_mode for file in tiny_student_folder.rglob("*") if file.is_file()}
    assert len(modes) == 1


def test_a_student_replaces_a_student_and_nothing_else(student: StudentModel, tmp_path: Path) -> None:
    out = save_student(student, tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        save_student(student, out)
    save_student(student, out, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=STUDENT_MANIFEST):
        save_student(student, tmp_path / "home", overwrite=True)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["home", "out"]


def test_a_failed_save_leaves_nothing(student: StudentModel, tmp_path: Path) -> None:
    student.scheduler_config["broken"] = float("nan")
    with pytest.raises(ValueError):
        save_student(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- from a teacher


def test_a_new_student_is_its_teacher_with_a_manifest(tiny_teacher_folder: Path) -> None:
    student = student_from_teacher(tiny_teacher_folder, steps=4)
    assert_same_weights(student, StableDiffusionPipeline.from_pretrained(tiny_teacher_folder))
    manifest = student.manifest
    assert manifest.decoder_timesteps == (751, 501, 251, 1)
    assert (manifest.encoder_timestep, manifest.spacing) == (751, "leading")
    assert (manifest.teacher, manifest.training_steps) == (tiny_teacher_folder.name, 0)
    assert manifest.teacher_sha256 == sha256_folder(tiny_teacher_folder)


@pytest.mark.parametrize(
    ("arguments", "timesteps", "spacing"),
    [
        ({"steps": 4, "spacing": "trailing"}, (999, 749, 499, 249), "trailing"),
        ({"steps": 1}, (999,), "trailing"),
        ({"steps": 1, "spacing": "leading"}, (999,), "trailing"),
        ({"timesteps": [900, 300]}, (900, 300), "explicit"),
    ],
)
def test_the_timesteps_are_the_students_own(
    tiny_teacher_folder: Path, arguments: dict[str, Any], timesteps: tuple[int, ...], spacing: str
) -> None:
    student = student_from_teacher(tiny_teacher_folder, **arguments)
    assert (student.manifest.decoder_timesteps, student.manifest.spacing) == (timesteps, spacing)
    assert student.manifest.encoder_timestep == timesteps[0]
    assert student.linear_combine().timesteps == timesteps


def test_impossible_timesteps_are_refused(tiny_teacher_folder: Path) -> None:
    for wrong in ([], [1, 2], [1000, 1]):
        with pytest.raises((UsageError, SchedulerError)):
            student_from_teacher(tiny_teacher_folder, timesteps=wrong)
    with pytest.raises(UsageError, match="both"):
        student_from_teacher(tiny_teacher_folder, timesteps=[900], spacing="leading")


def test_a_clipping_teacher_is_refused_before_training(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tiny_teacher_folder, tmp_path / "teacher")
    edit_json(folder / "scheduler" / "scheduler_config.json", thresholding=True)
    with pytest.raises(SchedulerError, match="threshold"):
        student_from_teacher(folder)


def test_a_student_is_no_teacher(tiny_student_folder: Path, tiny_teacher_folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="is a student") as caught:
        student_from_teacher(tiny_student_folder)
    assert tiny_teacher_folder.name in str(caught.value.hint)


# --- layouts and faults


def test_the_released_layout_loads_with_the_papers_timesteps_and_a_note(tmp_path: Path) -> None:
    folder = build_old_sd_folder(tmp_path / "loopfree-sd1.5")
    student = load_student(folder)
    assert student.manifest.decoder_timesteps == (751, 501, 251, 1)
    assert (student.manifest.encoder_timestep, student.manifest.teacher) == (751, "unknown")
    assert any("no tiue.json" in note and "[751, 501, 251, 1]" in note for note in student.notes)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_the_old_layout_holds_the_same_model(tmp_path: Path, kind: Any) -> None:
    old = load_student(build_old_sd_folder(tmp_path / "old", kind=kind))
    new = load_student(build_sd_folder(tmp_path / "new", kind=kind))
    assert_same_weights(old, new)
    assert token_ids(old.tokenizer) == token_ids(new.tokenizer)
    assert old.tokenizer.model_max_length == new.tokenizer.model_max_length
    assert old.vae.config.scaling_factor == new.vae.config.scaling_factor


def test_variants_and_shards_hold_the_same_model(tiny_student_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(tiny_student_folder, tmp_path / "student")
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights, total = load_file(plain), plain.stat().st_size
    plain.unlink()
    weight_map = {}
    for number, keys in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, folder / "unet" / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    assert_same_weights(load_student(folder), load_student(tiny_student_folder))


@pytest.mark.parametrize("part", PARTS)
def test_missing_weights_are_an_error_and_not_random_numbers(
    tiny_student_folder: Path, tmp_path: Path, part: str
) -> None:
    folder = copy_folder(tiny_student_folder, tmp_path / "student")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    lost = sorted(key for key in weights if key.endswith("weight"))[-1]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelFolderError) as caught:
        load_student(folder)
    assert str(folder / part) in caught.value.message
    assert lost.rpartition(".")[0].rpartition(".")[2] in caught.value.message


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"layers_per_block": 2}),
        ("unet/config.json", {"block_out_channels": [32, 64, 96]}),
        ("unet/config.json", {"norm_num_groups": 7}),
        ("vae/config.json", {"block_out_channels": [8, 16, 32]}),
        ("text_encoder/config.json", {"intermediate_size": 128}),
        ("text_encoder/config.json", {"vocab_size": 100}),
        ("text_encoder/config.json", {"hidden_act": "nonsense"}),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_an_error(
    tiny_student_folder: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = copy_folder(tiny_student_folder, tmp_path / "student")
    edit_json(folder / file, **changes)
    with pytest.raises(ModelFolderError) as caught:
        load_student(folder)
    assert str((folder / file).parent) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_tokenizer_without_words_is_refused(tiny_student_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    folder = copy_folder(tiny_student_folder, tmp_path / "student")
    CLIPTokenizer(model_max_length=16).save_pretrained(folder / "tokenizer")
    with pytest.raises(ModelFolderError, match="and no words"):
        load_student(folder)


def test_a_tokenizer_that_is_too_large_is_refused(tiny_student_folder: Path, tmp_path: Path) -> None:
    from helpers import build_tokenizer

    folder = copy_folder(tiny_student_folder, tmp_path / "student")
    build_tokenizer(vocab_size=600).save_pretrained(folder / "tokenizer")
    with pytest.raises(ModelFolderError, match="600 tokens, but the text encoder knows"):
        load_student(folder)


def test_precision_is_as_asked(tiny_student_folder: Path) -> None:
    student = load_student(tiny_student_folder, dtype=torch.bfloat16)
    assert {getattr(student, part).dtype for part in PARTS} == {torch.bfloat16}


def test_a_spacing_that_no_student_has_names_the_file_and_the_setting(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher_folder, tmp_path / "euler")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "timestep_spacing": "linspace"}))
    with pytest.raises(SchedulerError, match=rf"{path}: timestep_spacing 'linspace'") as caught:
        student_from_teacher(folder, steps=4)
    assert "--set student.spacing=trailing" in str(caught.value.hint)
    assert student_from_teacher(folder, steps=4, spacing="trailing").manifest.spacing == "trailing"


@pytest.mark.parametrize(("steps", "first"), [(2, 501), (3, 667), (4, 751)])
def test_respaced_has_the_encoder_where_the_authors_script_moves_it(
    tiny_student_folder: Path, tmp_path: Path, steps: int, first: int
) -> None:
    """Their script sets leading timesteps for K and runs the encoder at the first; the figures are its own."""
    student = load_student(tiny_student_folder)
    other = student.respaced(steps)
    assert (len(other.manifest.decoder_timesteps), other.manifest.encoder_timestep) == (steps, first)
    assert student.manifest.encoder_timestep == 751 and other.unet is student.unet
    saved = load_student(save_student(other, tmp_path / "respaced"))
    assert saved.manifest == other.manifest
    with pytest.raises(UsageError):
        student.respaced(5)
