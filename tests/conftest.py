"""Fixtures shared by all tests: tiny model folders, built once a session. Copy before you damage one."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before any library of the hub is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Before torch is imported: as many threads as there are cores, over all workers.
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

MOST_WORKERS = 4
"""A worker takes one to two gigabytes of memory."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-group",
        action="store_true",
        help="run all marked groups in place of the unmarked tests; what skips itself or has no test fails",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a shell starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.every_group:
        from every_group import GROUPS, EveryGroup

        config.option.markexpr = " or ".join(GROUPS)
        if "PYTEST_XDIST_WORKER" not in os.environ:
            config.pluginmanager.register(EveryGroup())


def pytest_collection_finish() -> None:
    """Libraries' objects live as long as the run: without this, each of the many collections would look at them all."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share the whole suite among several processes, a file in one of them; ``-n 0`` keeps it in one.

    Some files, or a group of slow tests, are sooner done in this process, and a debugger needs it.
    """
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    a_group = any(word.startswith("-m") for word in config.invocation_params.args)
    if config.option.numprocesses is None and whole and not a_group and not config.option.usepdb:
        config.option.numprocesses = min(MOST_WORKERS, os.cpu_count() or 1)
        config.option.dist = "loadfile"


LONGEST_FILES = (
    "docs/test_examples.py",
    "bench/test_run.py",
    "distill/test_peak_memory.py",
    "distill/test_distill_run.py",
)
"""Begun first, so that no worker starts one of them when the others have nothing left to do."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{name}" for name in LONGEST_FILES)))


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder (SD 1.5 structure, KL autoencoder, epsilon prediction, SD's scheduler)."""
    from helpers import build_sd_folder

    return build_sd_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def tiny_student_folder(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student of ``tiny_teacher_folder``: four leading timesteps, and a tiue.json beside it."""
    from tiue_cli.model.student import save_student, student_from_teacher

    student = student_from_teacher(tiny_teacher_folder, steps=4)
    return save_student(student, tmp_path_factory.mktemp("models") / "student")


# --- distillation: a tiny teacher, prompts and a run's config

PROMPTS = "a red star\na blue house\na tree\na star above a tree\na red tree\n"


@pytest.fixture(scope="session")
def v_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher like papercut's: v prediction and a tiny autoencoder; of two levels, as it is trained with."""
    from helpers import build_sd_folder

    folder = tmp_path_factory.mktemp("models") / "v_teacher"
    return build_sd_folder(folder, prediction_type="v_prediction", vae="tiny", levels=2)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text states and pairs, shared by all runs of a test session as by all runs of a user."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(v_teacher_folder: Path, prompts_file: Path, session_cache: Path) -> Callable[..., Any]:
    """Build a small, fast config; keywords are dotted keys with ``__`` for the dot."""

    def make(**changes: Any) -> Any:
        from tiue_cli.distill.resolve import Layer, parse_overrides, resolve_config

        base = {
            "teacher": str(v_teacher_folder),
            "prompts": str(prompts_file),
            "cache": str(session_cache),
            "max_steps": 4,
            "batch_size": 2,
            "student": {"steps": 2},
            "lora": {"rank": 2, "targets": "attention"},
            "optimizer": {"warmup_steps": 0},
            "warm_start": {"steps": 2, "pairs": 5, "teacher_steps": 2},
            "validation": {"every": 0},
            "tracking": {"every": 1},
        }
        words = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return resolve_config([Layer("test", base), Layer("changes", parse_overrides(words))]).config

    return make
