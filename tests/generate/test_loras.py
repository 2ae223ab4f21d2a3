"""Adapters from the command line, from JSON lines and from Python: same pictures, recorded, none left behind."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import draw_factors, write_lora, write_tensors

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.errors import AdapterError, PromptError, UsageError
from tiue_cli.files.png import ImageRecord, read_pixels, read_record, read_text_chunks
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.plan import plan_images
from tiue_cli.generate.prompts import row_from_json
from tiue_cli.generate.session import Session


@pytest.fixture(scope="module")
def loras(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of the tiny models."""
    from tiue_cli.model.components import load_components

    parts, folder = load_components(tiny_teacher_folder), tmp_path_factory.mktemp("loras")
    return [
        write_lora(
            folder / f"style-{number}.safetensors", draw_factors(parts.unet, parts.text_encoder, seed=77 * number)
        )
        for number in range(3)
    ]


@pytest.fixture(params=["student", "teacher"])
def model(request: pytest.FixtureRequest, tiny_student_folder: Path, tiny_teacher_folder: Path) -> Path:
    return tiny_student_folder if request.param == "student" else tiny_teacher_folder


def load(model: Path, **options: Any) -> tiue.Pipeline:
    return tiue.load(model, device="cpu", **options)


def drawn(pipe: tiue.Pipeline, **options: Any) -> np.ndarray:
    steps = 2 if pipe.kind == "teacher" else None
    return np.stack(pipe(["a red star", "a tree"], seed=1, steps=steps, output="numpy", **options))


def test_adapters_are_switched_in_one_process_and_the_base_comes_back(model: Path, loras: list[Path]) -> None:
    with load(model) as pipe:
        bare = drawn(pipe)
        found = []
        for path in loras:
            name = pipe.load_lora(path)
            pipe.set_adapters(name, 0.9)
            assert pipe.adapters == {name: 0.9}
            found.append(drawn(pipe))
        assert len({pictures.tobytes() for pictures in (*found, bare)}) == 4
        pipe.set_adapters("style-0")
        assert np.array_equal(drawn(pipe), found[0])
        pipe.set_adapters([])
        assert np.array_equal(drawn(pipe), bare)
        pipe.set_adapters(["style-1", "style-2"], [0.5, -1])
        assert not np.array_equal(drawn(pipe), bare)
        pipe.unload_lora()
        assert np.array_equal(drawn(pipe), bare)
        assert pipe.adapters == {}
    with load(model, loras=[f"{loras[0]}:0.9"]) as pipe:
        assert pipe.adapters == {"style-0": 0.9}
        assert np.array_equal(drawn(pipe), found[0])


def test_a_failing_adapter_leaves_the_pipeline_as_it_was(
    tiny_student_folder: Path, loras: list[Path], tmp_path: Path
) -> None:
    from helpers import tiny_unet

    foreign = write_lora(tmp_path / "foreign.safetensors", draw_factors(tiny_unet("sd15", head_dim=32)))
    with load(tiny_student_folder) as pipe:
        pipe.load_lora(loras[0], adapter_name="mine")
        before = drawn(pipe)
        with pytest.raises(AdapterError, match=r"foreign\.safetensors"):
            pipe.load_lora(foreign)
        with pytest.raises(UsageError, match="called mine is there"):
            pipe.load_lora(loras[1], adapter_name="mine")
        with pytest.raises(UsageError, match="no adapter is called"):
            pipe.set_adapters(["style-1"])
        with pytest.raises(UsageError, match="2 weights for 1"):
            pipe.set_adapters(["mine"], [1.0, 2.0])
        assert pipe.adapters == {"mine": 1.0}
        assert np.array_equal(drawn(pipe), before)


def test_requests_with_different_adapters_do_not_share_a_batch(tiny_student_folder: Path, loras: list[Path]) -> None:
    """Mixed in one call, each picture is the one that its adapter alone draws."""
    wanted: list[tuple[str, ...] | None] = [(str(loras[0]),), (), (str(loras[1]),), None, (str(loras[0]),)]
    with load(tiny_student_folder, loras=[loras[2]]) as pipe:
        requests = [tiue.Request("a red star", seed=4, loras=each) for each in wanted]
        together = [picture.image for picture in pipe.draw(requests, output="numpy")]
        alone = [pipe.draw([request], output="numpy")[0].image for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1
    assert len({picture.tobytes() for picture in alone}) == 4
    assert np.array_equal(alone[0], alone[4])


def test_the_command_draws_and_records_them(tiny_student_folder: Path, loras: list[Path], tmp_path: Path) -> None:
    words = ["generate", "a red star", "--model", str(tiny_student_folder), "--seed", "1", "--device", "cpu"]
    with_loras = [*words, "--lora", f"{loras[0]}:0.5", "--lora", str(loras[1])]
    assert main([*words, "--out", str(tmp_path / "bare.png")]) == 0
    assert main([*with_loras, "--out", str(tmp_path / "both.png")]) == 0
    record = read_record(tmp_path / "both.png")
    assert isinstance(record, ImageRecord)
    assert [(use.name, use.weight) for use in record.loras] == [("style-0", 0.5), ("style-1", 1.0)]
    chunks = read_text_chunks(tmp_path / "both.png")
    assert f'Lora hashes: "style-0: {record.loras[0].sha256[:12]}, style-1' in chunks["parameters"]
    assert "loras" not in json.loads(read_text_chunks(tmp_path / "bare.png")["tiue"])
    # What the record calls its command makes the same picture again.
    again = [*shlex.split(record.command())[1:], "--out", str(tmp_path / "again.png")]
    assert main(again) == 0
    assert np.array_equal(read_pixels(tmp_path / "again.png"), read_pixels(tmp_path / "both.png"))
    assert not np.array_equal(read_pixels(tmp_path / "bare.png"), read_pixels(tmp_path / "both.png"))
    # A picture with other adapters is another picture; the same ones make it done.
    assert main([*with_loras, "--out", str(tmp_path / "both.png")]) == 0
    assert main([*words, "--out", str(tmp_path / "both.png")]) == 1


def test_rows_name_their_own(tiny_student_folder: Path, loras: list[Path], tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "seed": 0},
        {"prompt": "a", "seed": 1, "lora": f"{loras[1]}:2"},
        {"prompt": "a", "seed": 2, "lora": [str(loras[1]), str(loras[2])]},
        {"prompt": "a", "seed": 3, "lora": []},
    ]
    rows = [row_from_json(json.dumps(line), f"x.jsonl:{number}") for number, line in enumerate(lines, 1)]
    config = GenerateConfig(model=str(tiny_student_folder), loras=(str(loras[0]),), out=tmp_path)
    with Session(config) as session:
        plan = plan_images(config, session.target, rows)
        named = [[(use.name, use.weight) for use in image.spec.loras] for image in plan.images]
        assert named == [[("style-0", 1.0)], [("style-1", 2.0)], [("style-1", 1.0), ("style-2", 1.0)], []]
        wrong = row_from_json('{"prompt": "a", "lora": "nowhere.safetensors"}', "x.jsonl:9")
        with pytest.raises(PromptError, match=r"x\.jsonl:9: LoRA nowhere\.safetensors does not exist"):
            plan_images(config, session.target, [wrong])
    with pytest.raises(PromptError, match="field 'lora'"):
        row_from_json('{"prompt": "a", "lora": 3}', "x.jsonl:1")


def test_an_unusable_one_is_said_before_the_model_is_loaded(
    tiny_student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = write_tensors(tmp_path / "a.safetensors", {"lora_unet_mid_block.lokr_w1": torch.ones(1)})
    words = ["generate", "a", "--model", str(tiny_student_folder), "--lora", str(path), "--out", str(tmp_path / "o")]
    assert main(words) == 1
    assert "is LoKr" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
