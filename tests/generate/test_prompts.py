"""Prompts from arguments and files: what is read, and what is said about what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiue_cli.errors import PromptError, TiueError, UsageError
from tiue_cli.generate.prompts import read_prompts, rows_from_arguments
from tiue_cli.text import parse_size


def test_text_file_gives_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa red star\r\n\n  ein grünes Haus, 夜 \n".encode())
    rows = read_prompts(file)
    assert [row.prompt for row in rows] == ["a red star", "ein grünes Haus, 夜"]
    assert [row.where for row in rows] == [f"{file}:1", f"{file}:3"]


def test_json_lines_override_seed_size_and_steps(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(
        '{"prompt": "a", "seed": 0, "size": 64, "steps": 2}\n\n{"prompt": "b", "size": "32x48"}\n{"prompt": "c"}\n'
    )
    first, second, third = read_prompts(file)
    assert (first.seed, first.size, first.steps) == (0, (64, 64), 2)
    assert (second.seed, second.size, second.steps) == (None, (32, 48), None)
    assert (third.seed, third.size, third.steps) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a"]', "not a JSON object"),
        ('{"seed": 3}', "'prompt'"),
        ('{"prompt": 3}', "'prompt'"),
        ('{"prompt": "  "}', "is empty"),
        ('{"prompt": "a", "seed": -1}', "'seed'"),
        ('{"prompt": "a", "seed": true}', "'seed'"),
        ('{"prompt": "a", "seed": "5"}', "'seed'"),
        ('{"prompt": "a", "steps": 0}', "'steps'"),
        ('{"prompt": "a", "size": "big"}', "size 'big'"),
        ('{"prompt": "a", "size": 0}', "out of range"),
        ('{"prompt": "a", "sede": 5}', "'sede'"),
        ('{"prompt": "a\\u0000b"}', "NUL"),
        ('{"prompt": "a\\ud800"}', "UTF-8"),
    ],
)
def test_bad_json_line_is_reported_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(PromptError) as caught:
        read_prompts(file)
    assert caught.value.message.startswith(f"{file}:2")
    assert said in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_file_that_is_not_utf8_is_reported_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("a star\nein grünes Haus\n".encode("latin-1"))
    with pytest.raises(PromptError, match=r"captions\.txt:2: not UTF-8 \(byte 0xfc\)") as caught:
        read_prompts(file)
    assert "iconv" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("missing.txt", None, PromptError),
        ("empty.txt", b"\n \n", PromptError),
        ("captions.csv", b"a", UsageError),
    ],
)
def test_unusable_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes | None, kind: type) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(kind) as caught:
        read_prompts(file)
    assert isinstance(caught.value, TiueError)
    assert name in caught.value.message
    assert caught.value.hint


def test_folder_instead_of_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "folder.txt")


def test_empty_argument_is_named_by_its_number() -> None:
    assert [row.prompt for row in rows_from_arguments([" a star ", "b"])] == ["a star", "b"]
    with pytest.raises(PromptError, match="the prompt is empty"):
        rows_from_arguments([""])
    with pytest.raises(PromptError, match="prompt 2 is empty"):
        rows_from_arguments(["a", " \n"])


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("48x64", (48, 64)), (" 48 X 64 ", (48, 64))])
def test_size_is_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "x64", "64x", "-64", "64.5", "1e3", "99999", "64x64x64", "٣٢"])
def test_bad_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.hint
