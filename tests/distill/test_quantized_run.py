"""``tiue distill --quantize int8``: 8-bit graphs come nearer to what the student drew; resuming; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import build_small_student
from safetensors.torch import load_file

import tiue_cli as tiue
from tiue_cli.base.events import Event, Note, Saved
from tiue_cli.cli.app import main
from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.fake_quantization import stays_in_floats
from tiue_cli.distill.quantized_trainer import QuantizedTrainer
from tiue_cli.distill.resolve import DistillRequest
from tiue_cli.distill.start import open_run
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.student import load_student, save_student

Make = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student that is hard to round: a few weights set each scale, and most of the others vanish in it."""
    folder = tmp_path_factory.mktemp("hard")
    small = load_student(build_small_student(tiny_student_folder, folder / "small"))
    random = torch.Generator().manual_seed(5)
    for name, weight in small.unet.named_parameters():
        if weight.dim() > 1 and not stays_in_floats(name.removesuffix(".weight")):
            weight.data[torch.rand(weight.shape, generator=random) < 0.01] *= 30
            weight.data /= 3
    small.manifest = small.manifest.model_copy(update={"training_steps": 7})
    return save_student(small, folder / "student")


@pytest.fixture
def make(student: Path, prompts_file: Path, session_cache: Path, tmp_path: Path) -> Make:
    """A short run's config; keywords are dotted keys with ``__`` for the dot."""

    def made(teacher: Path = student, **changes: Any) -> DistillConfig:
        settings = {
            "max_steps": 4,
            "batch_size": 2,
            "cache": str(session_cache),
            "quantize.calibration_images": 6,
            "optimizer.learning_rate": 3e-5,
            "optimizer.warmup_steps": 5,
            "validation.every": 0,
            "tracking.every": 1,
        }
        request = DistillRequest(
            out=tmp_path / "none",
            teacher=str(teacher),
            prompts=str(prompts_file),
            quantize="int8",
            values=settings,
            overrides=[f"{key.replace('__', '.')}={value}" for key, value in changes.items()],
        )
        return request.resolve().config

    return made


def run(config: DistillConfig, out: Path, *, resume: bool = False) -> list[Event]:
    return list(open_run(config, out, resume=resume).events())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_rounded_student_comes_nearer_to_its_own_float_pass(make: Make, tmp_path: Path) -> None:
    """On noise and prompts that it was not trained with, against what it drew before the first step."""
    trainer = open_run(make(max_steps=40), tmp_path / "run").prepare()
    assert isinstance(trainer, QuantizedTrainer)
    trainer.calibrate()
    noise, states = torch.from_numpy(draw_noise(range(900, 908), (4, 8, 8))), trainer.texts.rows([0, 1, 2, 3] * 2)
    wanted = trainer.original_latents(noise, states)

    def error() -> float:
        return float((trainer._combine(noise, trainer.predictions(noise, states)) - wanted).square().mean())

    before = error()
    for _ in range(40):
        trainer.step()
    assert 0 < error() < 0.85 * before


def test_the_result_is_a_student(make: Make, student: Path, tmp_path: Path) -> None:
    events = run(make(max_steps=2, validation__every=2, validation__count=1), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all({"latents", "predictions", "grad_norm"} <= line.keys() for line in log)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("layers learn in 8 bits" in note for note in notes)
    assert [event.kind for event in events if isinstance(event, Saved)] == ["grid", "checkpoint", "grid", "student"]
    before = read_manifest(student / STUDENT_MANIFEST, StudentManifest)
    manifest = read_manifest(tmp_path / "run" / "student" / STUDENT_MANIFEST, StudentManifest)
    assert manifest.training_steps == 7 + 2
    assert (manifest.teacher, manifest.decoder_timesteps) == (before.teacher, before.decoder_timesteps)
    assert "precision: int8" in (tmp_path / "run" / "student" / "README.md").read_text()
    with tiue.load(tmp_path / "run" / "student", device="cpu") as pipe:
        assert pipe("a red star", seed=1)[0].size == (16, 16)


def test_interrupted_training_equals_uninterrupted(make: Make, tmp_path: Path) -> None:
    """Ranges and what is sensitive come from the checkpoint, not from the weights as they are by then."""
    settings: dict[str, Any] = {"ema": 0.9, "checkpoint__every": 2, "optimizer__decay": "constant"}
    run(make(**settings), tmp_path / "whole")
    run(make(**settings, max_steps=2), tmp_path / "half")
    notes = [event.text for event in run(make(**settings), tmp_path / "half", resume=True) if isinstance(event, Note)]
    assert not any("learn in 8 bits" in note for note in notes)
    mine, theirs = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(UsageError, match="calibration_images: 6 → 8"):
        run(make(**settings, quantize__calibration_images=8), tmp_path / "half", resume=True)


def test_a_layer_that_spoils_the_rest_stays_in_floats(make: Make, student: Path, tmp_path: Path) -> None:
    spoilt = load_student(student)
    # Weights that meet nothing but zeros set the scale of this layer, and all its others are rounded to nothing.
    resnet: Any = spoilt.unet.up_blocks[1].resnets[0]  # type: ignore[index, union-attr]
    resnet.norm2.weight.data[0] = resnet.norm2.bias.data[0] = 0
    resnet.conv2.weight.data[:, 0] = 500
    save_student(spoilt, tmp_path / "spoilt")
    trainer = open_run(make(teacher=tmp_path / "spoilt"), tmp_path / "run").prepare()
    assert isinstance(trainer, QuantizedTrainer)
    assert "up_blocks.1.resnets.0.conv2" in trainer.calibrate()
    assert "up_blocks.1.resnets.0.conv2" not in trainer.ranges and len(trainer.ranges) > 20


def test_what_does_not_fit_is_refused(
    make: Make, tiny_teacher_folder: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"vsd\.weight is 2\.0, and with --quantize"):
        make(vsd__weight=2)
    with pytest.raises(UsageError, match=r"student\.steps is 2"):
        make(student__steps=2)
    with pytest.raises(UsageError, match="compile does not go with --quantize"):
        make(compile="true")
    with pytest.raises(ModelFolderError, match="is a many-step teacher, and --quantize is for students"):
        open_run(make(teacher=tiny_teacher_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    words = ["distill", "--quantize", "int8", "--teacher", str(student), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "there are no prompts to train on" in capsys.readouterr().err


def test_the_dry_run_says_what_it_needs(
    make: Make, student: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "--quantize", "int8", "--teacher", str(student), "--prompts", str(prompts_file), "--dry-run"]
    assert main([*words, "--out", str(tmp_path / "run"), "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["max_steps"] == 300 and plan["config"]["quantize"]["precision"] == "int8"
    parameters = plan["parameters"]["student's UNet"]
    memory = plan["memory_bytes"]
    assert memory["student"] == memory["student as it was"] == 4 * parameters
    assert memory["gradients and activations, at their most"] > 4 * parameters
    assert plan["steps"] == {"8-bit arithmetic": 300}
    # A distillation's settings are called what they always were.
    plain = DistillConfig(teacher="t", prompts="p")
    assert "quantize" not in plain.model_dump()


@pytest.mark.slow  # traces two students' graphs
def test_the_8_bit_graphs_come_nearer_to_what_the_student_drew(make: Make, student: Path, tmp_path: Path) -> None:
    """Against the same pictures, the original's in float32: graphs of the trained student and of the original."""
    from tiue_cli.backends.onnx_backend import OnnxBackend
    from tiue_cli.export.config import ExportConfig
    from tiue_cli.export.onnx.export import export_student
    from tiue_cli.export.onnx.quantize import calibrate, quantize_graph
    from tiue_cli.files.exports import EXPORT_MANIFEST, read_export_manifest
    from tiue_cli.files.manifests import write_json

    prompts = ["a red star", "a blue house", "a tree", "a star above a tree"]
    noise = draw_noise(range(4), (4, 8, 8))

    def drawn(folder: Path) -> np.ndarray:
        with OnnxBackend(folder, provider="cpu") as backend:
            return backend.latents(prompts, noise)

    run(make(max_steps=100), tmp_path / "run")
    found = {}
    for name, source in (("original", student), ("trained", tmp_path / "run" / "student")):
        export = tmp_path / name
        export_student(ExportConfig(student=str(source), out=export, check=False))
        if name == "original":
            expected = drawn(export)
        scratch = tmp_path / f"{name}-scratch"
        scratch.mkdir()
        calibration = calibrate(export, prompts, 16, scratch)
        manifest = read_export_manifest(export)
        graphs = tuple(
            quantize_graph(export, graph, calibration, scratch)[0] if graph.name.startswith("unet") else graph
            for graph in manifest.graphs
        )
        write_json(export / EXPORT_MANIFEST, manifest.model_copy(update={"graphs": graphs, "precision": "int8"}))
        found[name] = float(np.linalg.norm(drawn(export) - expected) / np.linalg.norm(expected))
    assert found["original"] > 0.02, found  # hard to round, or this shows nothing
    assert found["trained"] < 0.9 * found["original"], found
