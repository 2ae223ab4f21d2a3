"""Fixtures shared by all tests: tiny model folders, built once a session. Copy before you damage one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before any library of the hub is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"


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
