"""The packaged models keep once what is the same in both, and are the models that they were as whole folders."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

import pytest
import torch
from helpers import build_sd_folder, copy_folder, edit_json
from packaged import package_model, share_parts

from tiue_cli.model import parts
from tiue_cli.model.components import load_components
from tiue_cli.model.folder import COMPONENTS, check_model_folder
from tiue_cli.model.hub import EMBEDDED_NAMES, resolve_model
from tiue_cli.model.identity import model_fingerprint, model_sha256


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(parts, "PACKAGED", folder)
    return folder


def _install(whole: Path, name: str, package: Path) -> Path:
    return package_model(copy_folder(whole, package.parent / f"{name}.part"), name, package=package)


def test_nothing_of_the_package_is_stored_twice() -> None:
    copies = collections.Counter(
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in parts.PACKAGED.rglob("*")
        if file.suffix in (".safetensors", ".json") and file.name != "model_index.json"
    )
    # The two UNets have one config, which says what each file beside it is.
    assert sum(count - 1 for count in copies.values()) <= 1
    assert sorted(path.name for path in (parts.PACKAGED / parts.SHARED).iterdir()) == sorted({*COMPONENTS} - {"unet"})


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_a_packaged_model_says_nothing_of_the_machine_that_made_it(name: str) -> None:
    model = resolve_model(name)
    check_model_folder(model)
    for part in COMPONENTS:
        for config in parts.part_folder(model, part).glob("*config.json"):
            assert "_name_or_path" not in config.read_text(encoding="utf-8")


def test_models_in_the_package_are_those_of_whole_folders(
    tiny_teacher_folder: Path, tiny_student_folder: Path, package: Path
) -> None:
    share_parts(copy_folder(tiny_teacher_folder, package.parent / "whole"), package=package)
    teacher = _install(tiny_teacher_folder, "teacher", package)
    student = _install(tiny_student_folder, "student", package)

    for packaged, whole in ((teacher, tiny_teacher_folder), (student, tiny_student_folder)):
        assert [path.name for path in packaged.iterdir() if path.is_dir()] == ["unet"]
        info, other = check_model_folder(packaged), check_model_folder(whole)
        assert info == other.model_copy(update={"path": packaged})
        tensors, wanted = load_components(packaged), load_components(whole)
        for part in ("text_encoder", "unet", "vae"):
            ours, theirs = getattr(tensors, part).state_dict(), getattr(wanted, part).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_place_of_a_part_does_not_change_what_a_model_is_called(tiny_student_folder: Path, package: Path) -> None:
    before = model_sha256(tiny_student_folder), model_fingerprint(tiny_student_folder)
    share_parts(copy_folder(tiny_student_folder, package.parent / "whole"), package=package)
    student = _install(tiny_student_folder, "student", package)
    assert (model_sha256(student), model_fingerprint(student)) == before


def test_a_student_keeps_the_parts_that_it_was_made_with(
    tiny_teacher_folder: Path, tiny_student_folder: Path, package: Path
) -> None:
    share_parts(copy_folder(tiny_teacher_folder, package.parent / "whole"), package=package)
    student = _install(tiny_student_folder, "student", package)
    before = model_sha256(student)

    other = build_sd_folder(package.parent / "other", seed=7)
    share_parts(other, package=package)
    assert model_sha256(student) == before
    # The tokenizer is the same in both teachers, and still shared.
    assert {path.name for path in student.iterdir() if path.is_dir()} == {"text_encoder", "unet", "vae"}


def test_a_folder_elsewhere_has_to_have_all_its_parts(tiny_teacher_folder: Path, package: Path) -> None:
    from tiue_cli.errors import ModelFolderError

    share_parts(copy_folder(tiny_teacher_folder, package.parent / "whole"), package=package)
    teacher = _install(tiny_teacher_folder, "teacher", package)
    outside = copy_folder(teacher, package.parent / "outside" / "teacher")
    copy_folder(package / parts.SHARED, outside.parent / parts.SHARED)
    with pytest.raises(ModelFolderError, match="incomplete"):
        check_model_folder(outside)


def test_a_config_with_another_meaning_is_another_part(tiny_student_folder: Path, package: Path) -> None:
    share_parts(copy_folder(tiny_student_folder, package.parent / "whole"), package=package)
    changed = copy_folder(tiny_student_folder, package.parent / "changed")
    edit_json(changed / "vae" / "config.json", scaling_factor=0.5)
    edit_json(changed / "text_encoder" / "config.json", transformers_version="0")
    student = _install(changed, "student", package)
    assert {path.name for path in student.iterdir() if path.is_dir()} == {"unet", "vae"}
