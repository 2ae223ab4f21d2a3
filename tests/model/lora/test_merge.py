"""A merged folder draws what the model draws with the adapter on it, and says which adapter that was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lora_files import draw_factors, write_lora

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.model.components import load_components
from tiue_cli.model.weights import read_json


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_merged_folder_draws_what_the_adapter_draws(
    kind: str, tiny_student_folder: Path, tiny_teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_student_folder if kind == "student" else tiny_teacher_folder
    parts = load_components(model)
    path = write_lora(tmp_path / "ink.safetensors", draw_factors(parts.unet, parts.text_encoder))
    out = tmp_path / "merged"
    assert main(["merge", str(model), str(out)]) == 2
    assert "no LoRA was given" in capsys.readouterr().err
    assert main(["merge", str(model), str(out), "--lora", f"{path}:0.5"]) == 0
    pictures = []
    for source, loras in ((model, [f"{path}:0.5"]), (out, []), (model, [])):
        with tiue.load(source, device="cpu", loras=loras) as pipe:
            assert pipe.kind == kind
            pictures.append(pipe("a red star", seed=2, steps=2, output="latents")[0])
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.allclose(pictures[1], pictures[2], atol=1e-2)
    assert main(["merge", str(model), str(out), "--lora", str(path)]) == 1
    if kind == "student":
        assert [use["weight"] for use in read_json(out / "tiue.json")["loras"]] == [0.5]
        assert "loras" not in read_json(model / "tiue.json")
