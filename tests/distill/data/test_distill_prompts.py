from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tiue_cli.distill.data.prompts import read_training_prompts
from tiue_cli.errors import MissingDependencyError, PromptError, UsageError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_empties_and_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    found = read_training_prompts(write(tmp_path / "p.txt", "\ufeffa star\r\n\r\n a  star \na tree\n  \n"))
    assert found.prompts == ("a star", "a tree")
    assert (found.empty, found.duplicates) == (2, 1)


def test_all_formats_give_the_same_prompts(tmp_path: Path) -> None:
    text = read_training_prompts(write(tmp_path / "p.txt", 'a "star", red\na tree\n'))
    lines = '{"caption": "a \\"star\\", red"}\n\n{"caption": "a tree", "id": 3}\n'
    jsonl = read_training_prompts(write(tmp_path / "p.jsonl", lines))
    table = read_training_prompts(write(tmp_path / "p.csv", 'id,text\n1,"a ""star"", red"\n2,a tree\n'))
    assert text.prompts == jsonl.prompts == table.prompts
    assert text.sha256 == jsonl.sha256 == table.sha256


def test_papercuts_captions_need_no_file_and_are_those_of_the_committed_one() -> None:
    committed = Path(__file__).resolve().parents[3] / "benchmarks" / "papercut" / "prompts.txt"
    drawn, read = read_training_prompts("papercut"), read_training_prompts(str(committed))
    assert len(drawn.prompts) == 6767 and drawn.sha256 == read.sha256
    assert read_training_prompts("papercut", limit=3).prompts == read.prompts[:3]


def test_order_counts_in_the_hash(tmp_path: Path) -> None:
    first, second = (
        read_training_prompts(write(tmp_path / f"{i}.txt", text)) for i, text in enumerate(("a\nb", "b\na"))
    )
    assert first.sha256 != second.sha256


def test_csv_field_with_a_line_break_is_one_prompt(tmp_path: Path) -> None:
    found = read_training_prompts(write(tmp_path / "p.csv", 'prompt\n"a star\nin the sea"\na tree\n'))
    assert found.prompts == ("a star in the sea", "a tree")


def test_only_so_many_are_read(tmp_path: Path) -> None:
    assert read_training_prompts(write(tmp_path / "p.txt", "a\nb\nc\n"), limit=2).prompts == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "column", "says"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', None, "p.jsonl:2 is int"),
        ("p.jsonl", '{"prompt": "a"}\n{"id": 3, "x": 1}\n', None, "p.jsonl:2"),
        ("p.jsonl", '{"prompt": "a"}\nnonsense\n', None, "p.jsonl:2: not JSON"),
        ("p.jsonl", '["a"]\n', None, "p.jsonl:1: not a JSON object"),
        ("p.csv", "id,title\n1,a\n", None, "none of prompt, caption, text"),
        ("p.csv", "id,title\n1,a\n", "words", "there is no 'words'"),
        ("p.csv", "id,prompt\n1\n", None, "p.csv:2 has fewer fields than the header"),
        ("p.csv", "id,prompt\n1,a star, red\n", None, "p.csv:2 has more fields than the header"),
        ("p.csv", 'id,prompt\n1,"a\nb\nc"\n\n2,"a\0\nb"\n', None, "p.csv:6 contains a NUL"),
        ("p.csv", 'id,prompt\n1,a\n2,"b\n3,c\n', None, "the row after line 2: unexpected end of data"),
        ("p.csv", "a red star\na tree\n", None, "p.csv:1: none of prompt, caption, text"),
        ("p.txt", "a\0b\n", None, "p.txt:1 contains a NUL"),
        ("p.txt", "\n \n", None, "holds no prompts"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(
    tmp_path: Path, name: str, text: str, column: str | None, says: str
) -> None:
    with pytest.raises(PromptError) as caught:
        read_training_prompts(write(tmp_path / name, text), column=column)
    assert says in caught.value.message


def test_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """Far from the start, as files are decoded in blocks."""
    (tmp_path / "p.txt").write_bytes(b"a star\n" * 5000 + b"f\xe9e\n" + b"a tree\n" * 5000)
    with pytest.raises(PromptError, match=r"p\.txt:5001: not UTF-8"):
        read_training_prompts(str(tmp_path / "p.txt"))


def test_missing_file_and_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_training_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match=r"is not a [.]txt"):
        read_training_prompts(str(tmp_path / "p.docx"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        read_training_prompts(write(tmp_path / "p.parquet", "x"))
    assert "pip install" in str(caught.value.hint)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a", "b", "a"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    assert read_training_prompts(str(tmp_path / "p.parquet")).prompts == ("a", "b")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_dataset_without_the_library_names_the_command() -> None:
    with pytest.raises(MissingDependencyError, match="datasets library"):
        read_training_prompts("datasets:OWNER/NAME")


def test_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in that fails when more is read than was asked for."""
    import sys
    from types import SimpleNamespace
    from typing import Any

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("OWNER/NAME", "validation", True)
        yield {"id": 1, "caption": "a star"}
        yield {"id": 2, "caption": "a tree"}
        raise AssertionError("read on")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __version__="4.0.0"))
    found = read_training_prompts("datasets:OWNER/NAME:validation", limit=2)
    assert found.prompts == ("a star", "a tree")


def test_datasets_that_could_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(MissingDependencyError, match="needs datasets 4"):
        read_training_prompts("datasets:OWNER/NAME")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_missing_text_is_an_empty_one_in_every_format(tmp_path: Path, name: str) -> None:
    content = {"p.jsonl": '{"prompt": null}\n{"prompt": ""}\n{"prompt": "a"}\n', "p.csv": 'prompt,n\n,1\n"",2\na,3\n'}
    found = read_training_prompts(write(tmp_path / name, content[name]))
    assert (found.prompts, found.empty) == (("a",), 2)


def test_half_an_emoji_is_named_with_file_and_line(tmp_path: Path) -> None:
    for line in ('{"prompt": "a cat \\ud83d"}', '{"prompt": "x", "\\ud800": 1}'):
        with pytest.raises(PromptError, match=r"p\.jsonl:2: not JSON: .*half a character"):
            read_training_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a star"}\n' + line + "\n"))


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    found = read_training_prompts(write(tmp_path / "p.csv", "prompt,html\na star," + "x" * 500_000 + "\n"))
    assert found.prompts == ("a star",)


def test_standard_input_is_refused_as_a_run_reads_again() -> None:
    with pytest.raises(UsageError, match="standard input can be read once"):
        read_training_prompts("-")


def test_dataset_whose_connection_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace
    from typing import Any

    def load_dataset(name: str, **options: Any) -> Any:
        yield {"caption": "a star"}
        raise ConnectionError("Server Disconnected")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __version__="4.0.0"))
    with pytest.raises(PromptError, match="after row 1: Server Disconnected"):
        read_training_prompts("datasets:OWNER/NAME")
