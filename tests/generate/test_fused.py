"""A LoRA for an export: a copy of it with the adapter in its weights, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import build_small_student
from lora_files import draw_factors, write_lora
from tiny_export import write_tiny_export

import tiue_cli as tiue
from tiue_cli.errors import AdapterError, UsageError
from tiue_cli.files.exports import read_export_manifest
from tiue_cli.files.manifests import write_json
from tiue_cli.model.components import load_components
from tiue_cli.model.identity import model_sha256


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_student(tiny_student_folder, tmp_path_factory.mktemp("small") / "student")


@pytest.fixture
def lora(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = load_components(student)
    return write_lora(tmp_path / "ink.safetensors", draw_factors(parts.unet, parts.text_encoder))


def export_of(student: Path, folder: Path, *, sha256: str | None = None) -> Path:
    """Graphs that stand in for the student's: only the copy with the adapter is made of the student itself."""
    write_tiny_export(folder, precision="fp32")
    change_source(folder, source=str(student), sha256=sha256 or model_sha256(student), vae_source=None)
    return folder


def change_source(folder: Path, **fields: str | None) -> None:
    manifest = read_export_manifest(folder)
    student = manifest.student.model_copy(update=fields)
    write_json(folder / "manifest.json", manifest.model_copy(update={"student": student}))


def test_a_student_that_is_gone_or_changed_is_said(student: Path, lora: Path, tmp_path: Path) -> None:
    changed = export_of(student, tmp_path / "changed", sha256="0" * 64)
    with pytest.raises(AdapterError, match="another model than the one recorded"):
        tiue.load(changed, loras=[lora])
    gone = export_of(student, tmp_path / "gone", sha256="0" * 64)
    change_source(gone, source="runs/nowhere")
    with pytest.raises(AdapterError, match="runs/nowhere cannot be used"):
        tiue.load(gone, loras=[lora])
    with pytest.raises(UsageError, match="this engine takes no LoRA"):
        tiue.load(gone, loras=[lora], backend="trt")


@pytest.mark.slow  # an export
def test_the_copy_draws_what_torch_draws_and_is_made_once(student: Path, lora: Path, tmp_path: Path) -> None:
    export = export_of(student, tmp_path / "export")
    said: list[str] = []
    with tiue.load(student, device="cpu", loras=[f"{lora}:0.6"]) as pipe:
        expected = pipe("a red star", seed=2, output="latents")[0]
    for _ in range(2):
        with tiue.load(export, loras=[f"{lora}:0.6"], device="cpu", on_note=said.append) as pipe:
            picture = pipe.draw([tiue.Request("a red star", seed=2)], output="latents")[0]
        assert [(use.name, use.weight) for use in picture.record.loras] == [("ink", 0.6)]
        assert float(np.abs(picture.image - expected).max() / np.abs(expected).max()) <= 1e-4
    assert sum("with ink, once" in text for text in said) == 1
    assert len(list((tmp_path / "cache/tiue/exports").iterdir())) == 1
