"""Whole runs on a tiny teacher: result, resuming, killing, signals, and everything that may go wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from helpers import copy_folder, edit_json
from PIL import Image
from safetensors.torch import load_file

from tiue_cli.base.events import Event, Finished, Note, Progress, Saved
from tiue_cli.distill.checkpoint import latest_checkpoint, read_checkpoint
from tiue_cli.distill.config import to_yaml
from tiue_cli.distill.grid import GridLayout
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.student_trainer import NotFiniteError
from tiue_cli.distill.trainer import Trainer
from tiue_cli.errors import DeviceError, MissingDependencyError, ModelFolderError, OutputError, TiueError, UsageError
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.model.folder import check_model_folder

MakeConfig = Callable[..., Any]


def run(config: Any, out: Path, *, resume: bool = False) -> list[Event]:
    return list(Distillation(config, out, resume=resume).events())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_state(first: Path, second: Path) -> None:
    """Students and every part of the last checkpoints are equal, bit for bit."""
    mine, theirs = weights(first), weights(second)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    a, b = (read_checkpoint(latest_checkpoint(out / "checkpoints")) for out in (first, second))  # type: ignore[arg-type]
    assert a.state == b.state
    assert a.weights.keys() == b.weights.keys() >= {"student", "ema", "lora"}
    for part in a.weights:
        assert all(torch.equal(a.weights[part][name], b.weights[part][name]) for name in a.weights[part]), part
    for part in ("student_optimizer", "lora_optimizer"):
        for index, moments in a.optimizers[part]["state"].items():
            assert all(torch.equal(value, b.optimizers[part]["state"][index][name]) for name, value in moments.items())


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long") / "run"


SETTINGS: dict[str, Any] = {"max_steps": 5, "ema": 0.9, "checkpoint__every": 2, "accumulation": 2, "batch_size": 1}


@pytest.fixture
def uninterrupted(long_run: Path, make_config: MakeConfig) -> Path:
    """Five steps, two of them warm start, in one go; made once."""
    if not long_run.exists():
        run(make_config(**SETTINGS), long_run)
    return long_run


def test_run_gives_a_student_that_loads_and_says_how_it_was_made(make_config: MakeConfig, tmp_path: Path) -> None:
    from tiue_cli.model.student import load_student

    out = tmp_path / "run"
    events = run(make_config(validation__every=4, validation__teacher_steps=2), out)
    assert isinstance(events[-1], Finished)
    assert events[-1].student == out / "student" and not events[-1].interrupted
    manifest = read_manifest(out / "student" / STUDENT_MANIFEST, StudentManifest)
    assert (manifest.training_steps, manifest.spacing, len(manifest.decoder_timesteps)) == (4, "leading", 2)
    assert manifest.recipe_sha256 is not None and manifest.teacher_sha256 is not None
    assert load_student(out / "student").manifest == manifest
    assert "max_steps: 4" in (out / "student" / "README.md").read_text()
    grids = [event.path for event in events if isinstance(event, Saved) and event.kind == "grid"]
    assert [path.name for path in grids] == ["step_00000000.png", "step_00000004.png"]
    with Image.open(grids[0]) as image:
        assert image.width > 5 * 32  # five prompts, teacher above student
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "regression" in lines[1] and {"vsd", "kl", "lora"} <= set(lines[2])
    # 5 pairs of 2 guided steps; then 2 steps of 2 images, guided.
    assert [line["teacher_evaluations"] for line in lines] == [20, 20, 24, 28]


@pytest.mark.parametrize("encoder_timestep", [None, 17])
def test_grid_shows_what_generate_draws(encoder_timestep: int | None, make_config: MakeConfig, tmp_path: Path) -> None:
    from tiue_cli.backends.torch_backend import StudentTorchBackend
    from tiue_cli.model.folder import check_model_folder
    from tiue_cli.model.noise import draw_noise

    levers = {} if encoder_timestep is None else {"vsd__guidance_timesteps": [200, 700]}
    config = make_config(
        validation__every=4,
        validation__teacher_steps=2,
        validation__seed=3,
        validation__count=1,
        student__encoder_timestep="null" if encoder_timestep is None else encoder_timestep,
        **levers,
    )
    events = run(config, tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "student" / STUDENT_MANIFEST, StudentManifest)
    assert manifest.encoder_timestep == (manifest.decoder_timesteps[0] if encoder_timestep is None else 17)
    grid = next(event.path for event in reversed(events) if isinstance(event, Saved) and event.kind == "grid")
    with StudentTorchBackend(check_model_folder(tmp_path / "run" / "student"), device="cpu") as backend:
        image = backend.generate(["a red star"], draw_noise([3], backend.latent_shape((32, 32))))[0]
    top, left = GridLayout(("teacher", "student"), 1, 32, 32).corner(1, 0)
    with Image.open(grid) as picture:
        shown = np.asarray(picture)[top : top + 32, left : left + 32]
    assert np.abs(shown.astype(int) - image.astype(int)).max() <= 1


def test_interrupted_training_equals_uninterrupted(
    make_config: MakeConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    """Stopped in the middle of the warm start, and again in the distillation, between two checkpoints."""
    out = tmp_path / "run"
    for _ in range(3):
        for event in Distillation(make_config(**SETTINGS), out, resume=out.exists()).events():
            if isinstance(event, Progress) and event.stage != "pairs" and event.done in (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(event, Finished)
        if not event.interrupted:
            break
    assert event.step == 5 and not event.interrupted
    assert_same_state(uninterrupted, out)


MEASURED = ("images_per_s", "seconds_per_step", "memory_bytes")

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import yaml
import tiue_cli.distill.checkpoint as checkpoint
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.resolve import Layer, resolve_config

real, calls = checkpoint.save_file, []
def save_file(tensors, path):
    calls.append(path)
    if len(calls) == 5:  # the second part of the second checkpoint
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, path)
checkpoint.save_file = save_file
config = resolve_config([Layer("file", yaml.safe_load(Path(sys.argv[1]).read_text()))]).config
for event in Distillation(config, Path(sys.argv[2])).events():
    pass
"""


@pytest.mark.slow
def test_run_killed_while_writing_a_checkpoint_equals_uninterrupted(
    make_config: MakeConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    config, out = make_config(**SETTINGS), tmp_path / "run"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    arguments = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "config.yaml"), str(out)]
    # Sums depend on how many threads share them, and the child may see other cores than this process.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(arguments, capture_output=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names[-1] == "step_00000002" and names[0].startswith(".step_00000004")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 99}\n{"step"')  # what a kill may leave
    run(config, out, resume=True)
    assert_same_state(uninterrupted, out)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    mine, theirs = ((folder / "log.jsonl").read_text().splitlines() for folder in (out, uninterrupted))
    assert [json.loads(line)["step"] for line in mine] == [1, 2, 3, 4, 5]
    for a, b in zip(map(json.loads, mine), map(json.loads, theirs), strict=True):
        assert {key: a[key] for key in a if key not in MEASURED} == {key: b[key] for key in b if key not in MEASURED}


def test_batches_make_no_difference_to_what_is_seen(make_config: MakeConfig, uninterrupted: Path) -> None:
    """Two micro-batches of one image draw other noise than one of two, but the same prompts in the same order."""
    one = Distillation(make_config(**{**SETTINGS, "accumulation": 1, "batch_size": 2}), uninterrupted.parent / "x")
    two = Distillation(make_config(**SETTINGS), uninterrupted.parent / "x")
    first, second = one.prepare(), two.prepare()
    rows = first._prompt_order.rows(first._position(0, 2), 2)
    assert rows == [
        *second._prompt_order.rows(second._position(0, 1), 1),
        *second._prompt_order.rows(second._position(1, 1), 1),
    ]


def test_shared_decoder_trains_as_the_plain_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """Equal losses on equal seeds."""
    lines = []
    for decoder in ("shared", "plain"):
        run(make_config(student__decoder=decoder), tmp_path / decoder)
        lines.append([json.loads(line) for line in (tmp_path / decoder / "log.jsonl").read_text().splitlines()])
    for a, b in zip(*lines, strict=True):
        for name in {"regression", "vsd", "kl", "lora", "grad_norm"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-7), name


def test_pairs_are_made_once_and_an_interruption_loses_no_more_than_a_chunk(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiue_cli.distill.loop.CHUNK_PAIRS", 2)
    config = make_config(cache=tmp_path / "cache", max_steps=2)
    for event in Distillation(config, tmp_path / "run").events():
        if isinstance(event, Progress) and event.stage == "pairs" and event.done == 4:
            os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(event, Finished) and event.interrupted and event.step == 0
    resumed = run(config, tmp_path / "run", resume=True)
    assert [event.done for event in resumed if isinstance(event, Progress) and event.stage == "pairs"] == [4, 5]
    again = run(config, tmp_path / "other")
    assert not [event for event in again if isinstance(event, Progress) and event.stage == "pairs"]
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_without_finite_gradient_are_skipped_counted_and_end_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._vsd_gradient

    def broken(self: Trainer, x_0: torch.Tensor, states: torch.Tensor, micro: int) -> torch.Tensor:
        return real(self, x_0, states, micro) * (float("nan") if self.state.step >= 1 else 1.0)

    monkeypatch.setattr(Trainer, "_vsd_gradient", broken)
    config = make_config(warm_start__steps=0, max_steps=9, max_bad_steps=3, checkpoint__every=1)
    trainer = Distillation(config, tmp_path / "none").prepare()
    trainer.step()
    before = {name: value.clone() for name, value in trainer.networks.student.state_dict().items()}
    trainer.step()
    assert trainer.state.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.networks.student.state_dict().items())
    with pytest.raises(NotFiniteError, match="3 steps in a row"):
        run(config, tmp_path / "run")
    good = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert good is not None and read_checkpoint(good).state.step == 3
    assert all(torch.isfinite(value).all() for value in read_checkpoint(good).weights["student"].values())


def test_infinite_loss_with_finite_gradients_is_skipped(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiue_cli.distill.trainer.vsd_loss", lambda latents, gradient: latents.mean() + float("inf"))
    trainer = Distillation(make_config(warm_start__steps=0), tmp_path / "none").prepare()
    before = {name: value.clone() for name, value in trainer.networks.student.state_dict().items()}
    assert "lora" not in trainer.step() and trainer.state.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.networks.student.state_dict().items())


def test_broken_weights_do_not_replace_a_good_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def step(self: Trainer) -> dict[str, float]:
        figures = real(self)
        if self.state.step == 2:
            self._adapters[0].data.fill_(float("nan"))
        return figures

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(NotFiniteError, match="no longer finite at step 2"):
        run(make_config(warm_start__steps=0, checkpoint__every=1, checkpoint__keep=1), tmp_path / "run")
    good = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert good is not None and good.name == "step_00000001" and not (tmp_path / "run" / "student").exists()


def test_head_start_moves_the_lora_teacher_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(warm_start__steps=0, lora__head_start=1, accumulation=2)
    trainer = Distillation(config, tmp_path / "none").prepare()
    networks = trainer.networks
    student = {name: value.clone() for name, value in networks.student.state_dict().items()}
    adapters = {name: value.detach().clone() for name, value in networks.score.adapter_parameters().items()}
    assert set(trainer.step()) == {"lora"}
    assert all(torch.equal(value, student[name]) for name, value in networks.student.state_dict().items())
    assert not all(torch.equal(value, adapters[name]) for name, value in networks.score.adapter_parameters().items())
    assert "vsd" in trainer.step()
    assert not all(torch.equal(value, student[name]) for name, value in networks.student.state_dict().items())


def test_kept_regression_alone_equals_the_warm_start(make_config: MakeConfig, tmp_path: Path) -> None:
    warm = make_config(max_steps=1, warm_start__steps=1, warm_start__learning_rate=1e-3)
    alone = {"vsd__weight": 0.0, "kl__weight": 0.0, "optimizer__learning_rate": 1e-3}
    kept = make_config(max_steps=1, warm_start__steps=0, warm_start__keep_weight=1.0, **alone)
    run(warm, tmp_path / "warm")
    run(kept, tmp_path / "kept")
    lines = [
        json.loads((tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("warm", "kept")
    ]
    assert lines[0]["regression"] == pytest.approx(lines[1]["regression"], rel=1e-5)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kept_regression_is_resumed_with_its_pairs(make_config: MakeConfig, tmp_path: Path, optimizer: str) -> None:
    settings = {"warm_start__steps": 1, "warm_start__keep_weight": 0.5, "optimizer__name": optimizer}
    settings |= {"checkpoint__every": 1}
    run(make_config(max_steps=3, **settings), tmp_path / "whole")
    run(make_config(max_steps=2, **settings), tmp_path / "parts")
    run(make_config(max_steps=3, **settings), tmp_path / "parts", resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_two_students_of_other_kinds(make_config: MakeConfig, tmp_path: Path) -> None:
    """K = 1 is the one-step student; an explicit list is a setting; a student can start from another."""
    run(make_config(student__steps=1, max_steps=1, warm_start__steps=0), tmp_path / "one")
    manifest = read_manifest(tmp_path / "one" / "student" / STUDENT_MANIFEST, StudentManifest)
    assert (manifest.decoder_timesteps, manifest.spacing) == ((999,), "trailing")
    init = tmp_path / "one" / "student"
    config = make_config(
        student__timesteps=[900, 400, 100], student__init=init, max_steps=1, warm_start__prefix_weight=0.5
    )
    trainer = Distillation(config, tmp_path / "three").prepare()
    started = trainer.networks.student.state_dict()
    assert all(torch.equal(started[name], value) for name, value in weights(tmp_path / "one").items())
    teacher = {
        name.replace(".base_layer", ""): value for name, value in trainer.networks.score.unet.state_dict().items()
    }
    assert not all(torch.equal(teacher[name], value) for name, value in started.items())
    assert trainer.networks.combine.timesteps == (900, 400, 100)


def test_a_timestep_outside_the_schedule_is_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="encoder_timestep 1000 lies outside the schedule of 1000"):
        run(make_config(student__encoder_timestep=1000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_states_without_cache_are_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    cached, fresh = (Distillation(make_config(text_cache=flag), tmp_path / "none") for flag in ("true", "false"))
    cached._load()
    fresh._load()
    for _ in cached._texts.fill(process=(0, 1)):
        pass
    torch.testing.assert_close(cached._texts.rows([3, 0]), fresh._texts.rows([3, 0]))


# --- what may go wrong ---------------------------------------------------------------------------------------------


def says(error: TiueError) -> str:
    return f"{error.message} | {error.hint}"


def test_out_folder_of_another_run_is_left_alone(make_config: MakeConfig, uninterrupted: Path) -> None:
    before = sorted(path.name for path in uninterrupted.rglob("*"))
    with pytest.raises(OutputError, match="holds a distillation already") as caught:
        Distillation(make_config(**SETTINGS), uninterrupted)
    assert "--resume" in says(caught.value)
    assert sorted(path.name for path in uninterrupted.rglob("*")) == before


def test_run_killed_before_it_was_written_down_can_be_started_and_after_it_resumed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    out, config = tmp_path / "run", make_config(max_steps=1, warm_start__steps=0)
    out.mkdir()
    (out / ".run.0123abcd.tmp.json").write_text("{")  # what a kill leaves
    run(config, out)
    (out / "config.yaml").unlink()  # written after run.json
    (out / ".student.0123abcd.tmp").mkdir()
    events = run(make_config(max_steps=2, warm_start__steps=0), out, resume=True)
    assert isinstance(events[-1], Finished) and events[-1].step == 2
    assert (out / "config.yaml").is_file() and not list(out.glob(".*"))


def test_folder_with_other_things_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        Distillation(make_config(), tmp_path)


def test_nothing_to_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume"):
        Distillation(make_config(), tmp_path / "none", resume=True)


def test_resume_with_another_config_shows_the_difference(
    make_config: MakeConfig, uninterrupted: Path, v_teacher_folder: Path, tmp_path: Path
) -> None:
    changed = make_config(**{**SETTINGS, "vsd__guidance": 2.0, "seed": 1})
    with pytest.raises(UsageError) as caught:
        run(changed, uninterrupted, resume=True)
    assert "seed: 0 → 1" in caught.value.message and "vsd.guidance: 4.5 → 2.0" in caught.value.message


def test_resume_with_other_prompts_or_teacher_is_refused(
    make_config: MakeConfig, prompts_file: Path, v_teacher_folder: Path, tmp_path: Path
) -> None:
    prompts, teacher = tmp_path / "p.txt", copy_folder(v_teacher_folder, tmp_path / "teacher")
    prompts.write_text(prompts_file.read_text())
    config = make_config(prompts=prompts, teacher=teacher, max_steps=1, warm_start__steps=0)
    run(config, tmp_path / "run")
    prompts.write_text("a blue tree\n")
    edit_json(teacher / "scheduler" / "scheduler_config.json", comment="another")
    with pytest.raises(UsageError) as caught:
        run(config, tmp_path / "run", resume=True)
    assert "prompts have changed" in caught.value.message and "teacher's weights have changed" in caught.value.message


def test_teacher_without_unet_is_refused(make_config: MakeConfig, v_teacher_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.rmtree(copy_folder(v_teacher_folder, tmp_path / "teacher") / "unet")
    with pytest.raises(ModelFolderError, match="unet"):
        run(make_config(teacher=tmp_path / "teacher"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_student_of_another_prediction_type_is_refused(
    make_config: MakeConfig, tiny_student_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelFolderError, match="predicts epsilon, and the teacher v_prediction"):
        run(make_config(student__init=tiny_student_folder), tmp_path / "run")


@pytest.mark.parametrize("how", ["weights", "optimizer"])
def test_full_disk_keeps_the_checkpoint_before(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    import errno

    from safetensors import SafetensorError

    import tiue_cli.distill.checkpoint as checkpoint

    real_save, real_optimizer_save, count = checkpoint.save_file, checkpoint.save_optimizer, [0]

    def save_file(*arguments: Any) -> None:
        count[0] += 1
        if how == "weights" and count[0] > 2:
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        real_save(*arguments)

    def save_optimizer(*arguments: Any) -> None:
        if how == "optimizer" and count[0] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_optimizer_save(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(checkpoint, "save_optimizer", save_optimizer)
    config = make_config(checkpoint__every=1, max_steps=3)
    with pytest.raises(OutputError) as caught:
        run(config, tmp_path / "run")
    assert "space" in says(caught.value)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    events = run(config, tmp_path / "run", resume=True)
    assert isinstance(events[-1], Finished) and events[-1].step == 3


def test_damaged_checkpoint_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    run(make_config(max_steps=1, warm_start__steps=0), tmp_path / "run")
    file = next((tmp_path / "run" / "checkpoints").glob("*/lora/*"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OutputError, match="damaged"):
        run(make_config(max_steps=2, warm_start__steps=0), tmp_path / "run", resume=True)


def test_unknown_tracker_is_one_clear_error(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tracking\.trackers"):
        run(make_config(tracking__trackers=["nonesuch"]), tmp_path / "run")


def test_prompts_are_counted_in_a_note(make_config: MakeConfig, tmp_path: Path) -> None:
    events = run(make_config(max_steps=1, warm_start__steps=0), tmp_path / "run")
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes[0] == "5 prompts (0 duplicates and 0 empty ones dropped)"


class MemoryTracker(GeneralTracker):
    """A tracker as a third party would write one."""

    name, requires_logging_directory, main_process_only = "memory", False, True
    lines: ClassVar[list[dict[str, Any]]] = []
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.lines.append({"step": step, **values})


def test_trackers_get_settings_and_figures(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "memory", MemoryTracker)
    run(make_config(tracking__trackers=["memory"], max_steps=1, warm_start__steps=0), tmp_path / "run")
    assert [line["step"] for line in MemoryTracker.lines] == [1] and "vsd" in MemoryTracker.lines[0]
    assert MemoryTracker.config["kl.weight"] == "0.1"


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_figures_and_grids(make_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(max_steps=2, warm_start__steps=0, validation__every=2, validation__teacher_steps=1)
    assert config.tracking.trackers is None  # it is the default where it is installed
    run(config, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tiue"))
    events.Reload()
    assert [event.step for event in events.Scalars("vsd")] == [1, 2]
    grids = events.Images("teacher above student")
    with Image.open(tmp_path / "run" / "grids" / "step_00000002.png") as grid:
        assert [(shown.step, shown.width, shown.height) for shown in grids] == [(step, *grid.size) for step in (0, 2)]


@pytest.mark.slow
def test_a_compiled_run_trains_as_a_plain_one_and_saves_the_same_names(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced and run without a code generator, which would take minutes.
    compile_, compiled = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda module: compiled.append(type(module).__name__) or compile_(module, backend="eager")
    )
    losses = {}
    for wish in (False, True):
        folder = tmp_path / str(wish)
        config = make_config(compile=wish, max_steps=2, warm_start__steps=0)
        finished = [event for event in Distillation(config, folder).events() if isinstance(event, Finished)]
        assert finished[0].student is not None
        check_model_folder(finished[0].student)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[wish] = [line["vsd"] for line in lines if "vsd" in line]
    assert compiled == ["StudentGenerator"]
    assert losses[False] and losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_compiler_that_does_not_work_is_one_error(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def compile_later(module: torch.nn.Module) -> torch.nn.Module:
        module.forward = fail  # type: ignore[method-assign]
        return module

    def fail(*_: Any) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", compile_later)
    with pytest.raises(DeviceError, match=r"torch\.compile does not work here: .*no C\+\+ compiler") as caught:
        run(make_config(compile=True), tmp_path / "run")
    assert caught.value.hint == "set compile=false"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_tracker_that_is_not_installed_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="wandb is not installed"):
        run(make_config(tracking__trackers=["wandb"]), tmp_path / "run")
