"""``tiue distill`` and ``tiue recipes`` as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiue_cli.cli import main
from tiue_cli.distill.request import DistillRequest
from tiue_cli.errors import UsageError

SETTINGS = (
    "lora.rank=2",
    "lora.targets=attention",
    "batch_size=2",
    "validation.every=0",
    "student.steps=2",
    "tracking.every=1",
)


@pytest.fixture
def words(v_teacher_folder: Path, prompts_file: Path, session_cache: Path) -> Callable[..., list[str]]:
    """The command line of a small run."""

    def make(out: Path, *more: str) -> list[str]:
        given = ["--teacher", str(v_teacher_folder), "--prompts", str(prompts_file), "--out", str(out)]
        settings = [word for key in (*SETTINGS, f"cache={session_cache}") for word in ("--set", key)]
        return ["distill", *given, *settings, "--max-steps", "2", *more]

    return make


def test_distil_then_generate_with_the_result(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(words(out, "--format", "json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["interrupted"]) == (2, False)
    assert {"vsd", "kl", "lora"} <= set(report["figures"])
    # The folder of the run stands for its student.
    assert main(["generate", "a red star", "--model", str(out), "--seed", "0", "--out", str(tmp_path / "i.png")]) == 0
    assert (tmp_path / "i.png").is_file()


def test_settings_that_were_given_are_shown_with_their_origin(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "run")) == 0
    shown = capsys.readouterr()
    assert "note: lora.rank = 2 (from --set)" in shown.err and "note: max_steps = 2 (from --max-steps)" in shown.err
    assert shown.out.splitlines()[-1] == str(tmp_path / "run" / "student")


def test_dry_run_says_what_it_needs_and_writes_nothing(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "run", "--dry-run", "--warm-start", "1", "--format", "json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == {"warm start": 1, "distillation": 1}
    assert plan["prompts"] == 5 and plan["origins"]["warm_start.steps"] == "--warm-start"
    assert set(plan["memory_bytes"]) >= {"activations", "student, Adam"} and plan["disk_bytes"]["cached pairs"] > 0
    assert not (tmp_path / "run").exists()
    assert main(words(tmp_path / "run", "--dry-run")) == 0
    assert "memory: together" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--set", "kl.weigth=1"], 2, "did you mean kl.weight?"),
        (["--config", "sd99"], 2, "there are: papercut"),
        (["--", "--num_processes", "2"], 2, "add --launch"),
    ],
)
def test_usage_errors_take_two_lines(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], status: int,
    says: str,
) -> None:  # fmt: skip
    assert main(words(tmp_path / "run", *more)) == status
    shown = capsys.readouterr().err
    assert says in shown and len(shown.strip().splitlines()) == 2
    assert not (tmp_path / "run").exists()


def test_no_prompts_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--teacher", "papercut", "--out", str(tmp_path / "run")]) == 2
    assert "no prompts" in capsys.readouterr().err


def test_request_survives_as_words() -> None:
    request = DistillRequest(
        out=Path("o"), teacher="t", prompts="p.txt", config="papercut", overrides=("seed=3",), max_steps=4, warm_start=0
    )
    words = request.arguments()
    assert words == [
        "--out", "o", "--teacher", "t", "--prompts", "p.txt", "--config", "papercut", "--set", "seed=3",
        "--max-steps", "4", "--warm-start", "0",
    ]  # fmt: skip
    assert request.resolve().origins["seed"] == "--set"
    with pytest.raises(UsageError, match="no prompts"):
        DistillRequest(out=Path("o"), teacher="t").resolve()


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls", "--format", "quiet"]) == 0
    assert "papercut" in capsys.readouterr().out.split()
    assert main(["recipes", "show", "sd15"]) == 0
    shown = capsys.readouterr().out
    assert main(["recipes", "copy", "sd15", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine.yaml").read_text() == shown


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TIUE_DEBUG": "1"}


def test_sigterm_finishes_the_step_saves_and_exits_with_0(words: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tiue_cli", *words(tmp_path / "run"), "--max-steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        log, deadline_s = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
        while not log.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert f"tiue distill --out {tmp_path / 'run'} --resume" in shown
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert (tmp_path / "run" / "student" / "tiue.json").is_file()


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(words: Callable[..., list[str]], tmp_path: Path) -> None:
    """accelerate launch with two CPU processes: they share the rows of each step, and their gradients are averaged."""
    pairs = ["--warm-start", "2", "--set", "warm_start.pairs=4", "--set", "warm_start.teacher_steps=2"]
    launch = [
        "--launch",
        "--",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tiue_cli", *words(tmp_path / "two", *pairs), *launch],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        str(tmp_path / "two" / "checkpoints" / "step_00000002"), str(tmp_path / "two" / "student"),
    ]  # fmt: skip
    assert main(words(tmp_path / "one", *pairs, "--set", "batch_size=4")) == 0
    file = Path("student", "unet", "diffusion_pytorch_model.safetensors")
    first, second = (load_file(tmp_path / name / file) for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)


def test_run_of_one_process_is_not_resumed_by_two(make_config: Any, tmp_path: Path) -> None:
    from tiue_cli.artifacts import read_manifest, write_json
    from tiue_cli.distill.loop import Distillation
    from tiue_cli.distill.run_folder import RUN_MANIFEST, RunRecord

    config = make_config(max_steps=1, warm_start__steps=0)
    for _ in Distillation(config, tmp_path / "run").events():
        pass
    record = read_manifest(tmp_path / "run" / RUN_MANIFEST, RunRecord)
    write_json(tmp_path / "run" / RUN_MANIFEST, record.model_copy(update={"processes": 2}))
    with pytest.raises(UsageError, match="processes: 2 → 1"):
        list(Distillation(config, tmp_path / "run", resume=True).events())
