"""Prompts from arguments and files: what is read, and what is said about what cannot be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tiue_cli.base.text import parse_size
from tiue_cli.errors import PromptError, TiueError, UsageError
from tiue_cli.generate.prompts import bare_words_note, read_prompts, rows_from_arguments


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
        ('{"prompt": "a\\ud800"}', "half a character"),
        ('{"prompt": "a", "\\ud800": 1}', "half a character"),
        ('{"prompt": null}', "is empty"),
        ('{"prompt": "a", "seed": 1e999}', "too large"),
        ('{"prompt": "a", "seed": NaN}', "NaN"),
        (f'{{"prompt": "a", "seed": {"1" * 5000}}}', "digits"),
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
    assert len(caught.value.message) < len(str(file)) + 200


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_editor_s_text_gives_the_same_prompts(tmp_path: Path, encoding: str, end: str) -> None:
    file = tmp_path / "captions.txt"
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # the codecs without an order in their name write it themselves
    file.write_bytes((mark + end.join(["a red star", "", "ein Haus, 夜 🌙", ""])).encode(encoding))
    assert [(row.prompt, row.where) for row in read_prompts(file)] == [
        ("a red star", f"{file}:1"),
        ("ein Haus, 夜 🌙", f"{file}:3"),
    ]


def test_windows_quotes_are_suggested_as_windows_1252(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(b"the king\x92s castle\n")
    with pytest.raises(PromptError, match="not UTF-8") as caught:
        read_prompts(file)
    assert "\u2019" in str(caught.value.hint)
    assert "iconv -f cp1252" in str(caught.value.hint)


def test_utf16_without_a_mark_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("a red star\n".encode("utf-16-le"))
    with pytest.raises(PromptError, match="UTF-16 without a byte order mark") as caught:
        read_prompts(file)
    assert "iconv -f utf-16le" in str(caught.value.hint)


def test_comments_are_hash_and_blank(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("# my captions\n#\n#1 of ten\na star # not a comment\n")
    assert [row.prompt for row in read_prompts(file)] == ["#1 of ten", "a star # not a comment"]


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))

    typed("ein Haus, 夜\r\na star\n")
    assert [row.prompt for row in read_prompts(Path("-"))] == ["ein Haus, 夜", "a star"]
    typed("a tree\n")
    rows = rows_from_arguments(["a", "-"])
    assert [(row.prompt, row.where) for row in rows] == [("a", "prompt 1"), ("a tree", "standard input:1")]


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


@pytest.mark.parametrize("prompts", [["a", "red", "heart"], ["cat", "dog"]])
def test_several_bare_words_look_like_forgotten_quotes(prompts: list[str]) -> None:
    note = bare_words_note(prompts)
    assert note is not None and f'"{" ".join(prompts)}"' in note


@pytest.mark.parametrize("prompts", [[], ["heart"], ["a red heart", "dog"], ["a red heart", "a blue house"]])
def test_quoted_prompts_and_single_words_do_not(prompts: list[str]) -> None:
    assert bare_words_note(prompts) is None
