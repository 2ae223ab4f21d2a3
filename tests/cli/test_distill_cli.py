"""``tiue distill`` and ``tiue recipes`` as a user meets them."""

from __future__ import annotations

import contextlib
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

from tiue_cli.cli.app import main
from tiue_cli.cli.distill import _settings_notes, _time_row
from tiue_cli.cli.launch import WorkerError, launcher_arguments
from tiue_cli.distill.acceleration import StopRequest, _refuse_lost_processes
from tiue_cli.distill.resolve import DistillRequest
from tiue_cli.errors import UsageError

SETTINGS = (
    "lora.rank=2",
    "lora.targets=attention",
    "batch_size=2",
    "validation.every=0",
    "student.steps=2",
    "tracking.every=1",
)


LAUNCH = ("--launch", "--", "--cpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


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


def test_hours_are_said_from_a_rate_that_has_a_name(make_config: Callable[..., Any]) -> None:
    config = make_config(batch_size=8, accumulation=2, max_steps=1000)
    row = _time_row(config, 859_520_964)
    # 16,000 images at 0.735 s for 8 of them.
    assert row["time"].startswith("about 0.41 hours on an H100 (measured for Stable Diffusion 1.5 in bf16: 0.735 s")
    assert _time_row(config, 5_000_000) == {}, "nothing like it was measured"


def test_dry_run_says_what_it_needs_and_writes_nothing(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiue_cli.distill.estimate import Estimate

    assert main(words(tmp_path / "run", "--dry-run", "--warm-start", "1", "--format", "json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == {"warm start": 1, "distillation": 1}
    assert plan["prompts"] == 5 and plan["origins"]["warm_start.steps"] == "--warm-start"
    assert (
        set(plan["memory_bytes"]) >= {"gradients and activations, at their most", "student, Adam"}
        and plan["disk_bytes"]["cached pairs"] > 0
    )
    assert not (tmp_path / "run").exists()
    # A step is played once here: what is shown of it in two ways is the same.
    sizes = {name: plan[name] for name in ("parameters", "memory_bytes", "disk_bytes", "steps")}
    again = Estimate(timesteps=tuple(plan["decoder_timesteps"]), **sizes)
    monkeypatch.setattr("tiue_cli.distill.estimate.estimate_run", lambda config, **_: again)
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
    assert main(["distill", "--teacher", "OWNER/NAME", "--out", str(tmp_path / "run")]) == 2
    assert "no prompts" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"config": "papercut"}, {"config": "papercut-quick"}, {"teacher": "papercut"}])
def test_papercut_brings_its_own_prompts(given: dict[str, str], tmp_path: Path) -> None:
    assert DistillRequest(out=tmp_path, **given).resolve().config.prompts == "papercut"
    assert DistillRequest(out=tmp_path, prompts="p.txt", **given).resolve().config.prompts == "p.txt"
    with pytest.raises(UsageError, match="no prompts"):  # another teacher is not trained on them unasked
        DistillRequest(out=tmp_path, **{**given, "teacher": "OWNER/NAME"}).resolve()


def test_a_recipes_settings_are_counted_and_the_rest_listed(tmp_path: Path) -> None:
    request = DistillRequest(out=tmp_path, config="papercut", overrides=("seed=3",))
    notes = list(_settings_notes(request.resolve()))
    assert "seed = 3 (from --set)" in notes and "prompts = papercut (from the teacher)" in notes
    assert notes[-1].endswith("tiue recipes show papercut") and len(notes) == 3


def test_papercuts_teacher_has_a_guidance_of_its_own(prompts_file: Path, tmp_path: Path) -> None:
    """The one at which it follows captions best, unless something else is said; a recipe says something else."""

    def guidances(**given: Any) -> tuple[float, float, float]:
        config = DistillRequest(out=tmp_path / "run", prompts=str(prompts_file), **given).resolve().config
        return config.vsd.guidance, config.warm_start.guidance, config.validation.teacher_guidance

    assert guidances(teacher="papercut") == guidances(overrides=("teacher=papercut-teacher",)) == (2.0, 2.0, 2.0)
    assert guidances(teacher="OWNER/NAME") == (4.5, 4.5, 4.5)
    assert guidances(teacher="papercut", overrides=("vsd.guidance=3",)) == (3.0, 2.0, 2.0)
    assert guidances(teacher="papercut", config="sd15")[0] == 4.5


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


@pytest.mark.slow
def test_sigterm_finishes_the_step_saves_and_exits_with_143(words: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tiue_cli", *words(tmp_path / "run"), "--max-steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment()) as process:
        log, deadline_s = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
        while not log.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert f"tiue distill --out {tmp_path / 'run'} --resume" in shown
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert (tmp_path / "run" / "student" / "tiue.json").is_file()


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(
    words: Callable[..., list[str]], v_teacher_folder: Path, tmp_path: Path
) -> None:
    """accelerate launch with two CPU processes: they share the rows of each step, and their gradients are averaged."""
    settings = ("warm_start.pairs=4", "warm_start.teacher_steps=2", "warm_start.learning_rate=1e-2")
    pairs = ["--warm-start", "2", *(word for key in settings for word in ("--set", key))]
    done = subprocess.run(
        [sys.executable, "-m", "tiue_cli", *words(tmp_path / "two", *pairs), *LAUNCH, "--num_processes", "2"],
        capture_output=True, encoding="utf-8", env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "two" / "checkpoints" / "step_00000002"), str(tmp_path / "two" / "student"),
    ]  # fmt: skip
    assert main(words(tmp_path / "one", *pairs, "--set", "batch_size=4")) == 0
    file = Path("unet", "diffusion_pytorch_model.safetensors")
    folders = (v_teacher_folder, tmp_path / "one" / "student", tmp_path / "two" / "student")
    start, one, two = (torch.cat([value.flatten() for value in load_file(path / file).values()]) for path in folders)
    # Adam's first steps are signs: where a gradient is all but 0, they may differ.
    assert (two - one).norm() < 0.05 * (one - start).norm()


def test_several_cpu_processes_are_started_as_several_gpus() -> None:
    """Accelerate itself would start one."""
    words, added = launcher_arguments(["--num_processes", "2", "--cpu", "--mixed_precision", "no"])
    assert words == ["--num_processes", "2", "--multi_gpu", "--mixed_precision", "no"]
    assert added == {"ACCELERATE_USE_CPU": "true"}
    for alone in (["--cpu"], ["--num_processes=2"], ["--cpu", "--num_processes=2", "--mpirun_hostfile", "h"]):
        assert launcher_arguments(alone) == (alone, {})


def test_accelerate_that_lost_processes_is_refused(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``accelerate launch --cpu --num_processes 2`` leaves in the environment of the one process it starts."""
    from accelerate.commands.launch import launch_command_parser, prepare_simple_launcher_cmd_env

    arguments = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "x.py"]
    for processes, refused in (("1", False), ("2", True)):
        parsed = launch_command_parser().parse_args(["--num_processes", processes, *arguments])
        parsed.use_cpu, parsed.num_cpu_threads_per_process = True, 1
        for name, value in prepare_simple_launcher_cmd_env(parsed)[1].items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match="has started one") if refused else contextlib.nullcontext():
            _refuse_lost_processes()


@pytest.mark.slow
def test_sigterm_to_a_launched_run_reaches_its_workers(words: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tiue_cli", *words(out, "--max-steps", "100000"), *LAUNCH, "--num_processes", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=environment()) as process:
        deadline_s = time.monotonic() + 120
        while not (out / "log.jsonl").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=60)[1]
    assert process.returncode == 143, shown
    assert list((out / "checkpoints").glob("step_*"))
    assert f"tiue distill --out {out} --resume {' '.join(LAUNCH)} --num_processes 1" in shown


def launch_main(monkeypatch: pytest.MonkeyPatch, *worker: str) -> int:
    import tiue_cli.cli.launch as launch

    monkeypatch.setattr(sys, "argv", ["launch", *LAUNCH[2:], "--num_processes=1", *worker])
    return launch.main()


def test_worker_that_fails_says_so_once_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch_main(monkeypatch, "-m", "tiue_cli", "recipes", "show", "none") == 2
    shown = capfd.readouterr().err
    assert shown.count("error:") == 1 and "there is no recipe" in shown and "Traceback" not in shown


def test_worker_that_is_killed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(WorkerError, match="worker 0 was killed by signal 9"):
        launch_main(monkeypatch, str(tmp_path / "worker.py"))


@pytest.mark.parametrize(("after_s", "at_once"), [(0.01, False), (5.0, True)])
def test_a_later_sigint_interrupts_at_once(monkeypatch: pytest.MonkeyPatch, after_s: float, at_once: bool) -> None:
    clock = iter([100.0, 100.0 + after_s])
    monkeypatch.setattr("tiue_cli.distill.acceleration.time.monotonic", lambda: next(clock))
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt) if at_once else contextlib.nullcontext():
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)


def test_run_of_one_process_is_not_resumed_by_two(make_config: Any, tmp_path: Path) -> None:
    from tiue_cli.distill.loop import Distillation
    from tiue_cli.distill.run_folder import RUN_MANIFEST, RunRecord
    from tiue_cli.files.manifests import read_manifest, write_json

    config = make_config(max_steps=1, warm_start__steps=0)
    for _ in Distillation(config, tmp_path / "run").events():
        pass
    record = read_manifest(tmp_path / "run" / RUN_MANIFEST, RunRecord)
    write_json(tmp_path / "run" / RUN_MANIFEST, record.model_copy(update={"processes": 2}))
    with pytest.raises(UsageError, match="processes: 2 → 1"):
        list(Distillation(config, tmp_path / "run", resume=True).events())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_stops_what_would_follow_it(
    tmp_path: Path, prompts_file: Path, v_teacher_folder: Path, number: str, status: int
) -> None:
    """Acknowledged at once, saved, and not 0: ``tiue distill … && tiue export …`` must not go on."""
    command = [sys.executable, "-m", "tiue_cli", "distill", "--teacher", str(v_teacher_folder), "--prompts"]
    command += [str(prompts_file), "--out", str(tmp_path / "run"), "--max-steps", "100000", "--format", "quiet"]
    command += ["--set", f"cache={tmp_path / 'cache'}", "--set", "batch_size=1", "--set", "student.steps=2"]
    command += ["--set", "validation.every=0", "--set", "tracking.every=1", "--set", "tracking.trackers=[]"]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(root)}
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "stopping: after this step" in err
    assert "--resume" in err
