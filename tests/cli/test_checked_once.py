"""A command looks at the headers of a model's weights once: with weights on a slow disk, each look costs."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.model import components, folder, weights


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How often the weights of each component were inspected."""
    counted: collections.Counter[str] = collections.Counter()

    def inspect(path: Path, **options: Any) -> Any:
        counted[path.name] += 1
        return weights.inspect_weights(path, **options)

    for module in (components, folder):
        monkeypatch.setattr(module, "inspect_weights", inspect)
    yield counted


ONCE = {"text_encoder": 1, "unet": 1, "vae": 1}


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_generate_looks_once(
    kind: str, tiny_student_folder: Path, tiny_teacher_folder: Path, looks: Any, tmp_path: Path
) -> None:
    model = tiny_student_folder if kind == "student" else tiny_teacher_folder
    options = [] if kind == "student" else ["--teacher-steps", "1"]
    assert main(["generate", "a red tree", "--model", str(model), "--out", str(tmp_path), *options]) == 0
    assert looks == ONCE


def test_loading_from_python_looks_once(tiny_student_folder: Path, looks: Any) -> None:
    tiue.load(tiny_student_folder).close()
    assert looks == ONCE


def test_inspect_looks_once(tiny_student_folder: Path, looks: Any) -> None:
    assert main(["inspect", str(tiny_student_folder)]) == 0
    assert looks == ONCE
