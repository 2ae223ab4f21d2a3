"""Prompts longer than a text encoder takes: cut with a note, or read whole in several sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_export import write_tiny_export

import tiue_cli as tiue
from tiue_cli.cli.app import main
from tiue_cli.errors import UsageError
from tiue_cli.files.png import ImageRecord, read_record

BEGIN = "a red tree above a blue house a red tree above a blue house "  # the 14 tokens that one sequence takes
LONG = (BEGIN + "a star", BEGIN + "a blue star")


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_the_end_of_a_long_prompt_counts_in_chunks(
    kind: str, tiny_student_folder: Path, tiny_teacher_folder: Path
) -> None:
    model = tiny_student_folder if kind == "student" else tiny_teacher_folder
    prompts = ["a star", *LONG]

    def drawn(way: str, asked: list[str], seed: int = 3) -> list[np.ndarray]:
        with tiue.load(model, device="cpu", long_prompts=way) as pipe:
            assert [picture.cut_text == "" for picture in pipe.stream(asked, seed=seed, steps=1)] == [
                way == "chunk" or len(text) < len(BEGIN) for text in asked
            ]
            return [p.image for p in pipe.stream(asked, seed=seed, steps=1, output="latents")]

    cut, chunked = drawn("cut", prompts), drawn("chunk", prompts)
    assert apart(cut[0], chunked[0]) <= 1e-5
    assert apart(cut[1], chunked[1]) >= 5e-4
    # Two that differ behind the cut alone, with one noise.
    one, other = (drawn("chunk", [text])[0] for text in LONG)
    assert apart(one, other) >= 5e-4
    assert np.array_equal(*(drawn("cut", [text])[0] for text in LONG))
    # A short neighbour changes nothing.
    assert apart(chunked[1], drawn("chunk", [LONG[0]], seed=4)[0]) <= 1e-5


def test_it_is_recorded_and_weights_are_said_to_be_literal(
    tiny_student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", f"(a star:1.3) {LONG[0]}", "--model", str(tiny_student_folder), "--device", "cpu"]
    out = tmp_path / "a.png"
    assert main([*words, "--seed", "1", "--long-prompts", "chunk", "--out", str(out)]) == 0
    captured = capsys.readouterr().err
    assert "(a star:1.3) is read literally" in captured
    assert "is longer than" not in captured
    record = read_record(out)
    assert isinstance(record, ImageRecord) and record.long_prompts == "chunk"
    assert "--long-prompts chunk" in record.command()


def test_an_export_reads_what_its_graphs_take(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "export")
    with pytest.raises(UsageError, match="the graphs of an export read"):
        tiue.load(tmp_path / "export", long_prompts="chunk")
