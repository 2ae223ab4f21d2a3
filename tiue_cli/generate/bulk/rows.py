"""Prompts as a stream, in constant memory, from whatever holds them: text, JSON lines, CSV, Parquet, a folder of these.

A row that cannot be used becomes a ``BadRow`` and keeps its number, so that fixing one row moves no other's images.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_cli.errors import MissingDependencyError, PromptError, UsageError
from tiue_cli.files.access import has_file, kind_of, list_folder, open_file, user_path
from tiue_cli.files.structured import parse_json
from tiue_cli.files.texts import STDIN, is_comment, read_lines
from tiue_cli.generate.prompts import PromptRow, check_prompt, row_from_fields, row_from_json

if TYPE_CHECKING:
    from types import ModuleType

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_FIELDS = ("prompt", "seed", "size", "steps", "lora")
_PARQUET_ROWS = 4096
_SAMPLE_BYTES = 2**20
_WHOLE = re.compile(r"[0-9]{1,20}")
"""Python refuses to read a number of thousands of digits."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn: where it is and why."""

    where: str
    reason: str


Row = PromptRow | BadRow


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a file, of every file in a folder by name, or of standard input (``-``).

    Standard input is text or, where its first line begins with ``{``, JSON lines. Raises PromptError and UsageError for
    what cannot be read at all.
    """
    if source == STDIN:
        yield from _stdin_rows()
        return
    for file in files_of(source):
        yield from _file_rows(file)


def files_of(source: str) -> list[Path]:
    """The files that ``source`` names. Raises UsageError."""
    path = user_path(source, error=PromptError)
    if kind_of(path, error=PromptError) != "folder":
        if path.suffix.lower() not in KINDS:
            raise UsageError(f"{path} is none of {', '.join(KINDS)}", hint="give one of these, a folder of them, or -")
        return [path]
    found = sorted(_files_below(path))
    if not found:
        raise PromptError(f"{path} holds no {', '.join(KINDS)} file", hint="check the folder given to --prompts")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of all kinds, in folders below as well; one that may not be listed is an error, and never left out."""
    for path in list_folder(folder, error=PromptError):
        if not path.is_symlink() and kind_of(path, error=PromptError) == "folder":
            yield from _files_below(path)
        elif path.suffix.lower() in KINDS and not path.name.startswith("."):
            yield path


def estimated_rows(source: str) -> int | None:
    """About how many rows ``source`` has, without reading it whole; None for standard input.

    Exact for Parquet; elsewhere line ends are counted, in a long file those of its first ``_SAMPLE_BYTES``.
    """
    if source == STDIN:
        return None
    return sum(
        _parquet_count(file) if file.suffix.lower() == ".parquet" else _line_count(file) for file in files_of(source)
    )


def _line_count(file: Path) -> int:
    try:
        size = file.stat().st_size
        with open_file(file, error=PromptError) as opened:
            sample = opened.read(_SAMPLE_BYTES)
    except FileNotFoundError:  # reading its rows says so
        return 0
    ends = max(sample.count(b"\n"), sample.count(b"\r")) + (not sample.endswith((b"\n", b"\r")))
    return round(ends * size / len(sample)) if sample else 0


def _file_rows(file: Path) -> Iterator[Row]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet_rows(file)
    elif kind == ".csv":
        yield from _csv_rows(file)
    else:
        yield from _line_rows(read_lines(file), json_lines=kind == ".jsonl")


def _stdin_rows() -> Iterator[Row]:
    lines = read_lines(STDIN)
    blank = []
    for where, text in lines:
        if text.strip():
            yield from _line_rows(itertools.chain([(where, text)], lines), json_lines=text.lstrip().startswith("{"))
            return
        blank.append(where)


def _line_rows(lines: Iterator[tuple[str, str]], *, json_lines: bool) -> Iterator[Row]:
    for where, text in lines:
        stripped = text.strip()
        if not stripped or (not json_lines and is_comment(stripped)):
            continue
        try:
            yield row_from_json(stripped, where) if json_lines else PromptRow(check_prompt(stripped, where), where)
        except PromptError as error:
            yield BadRow(where, error.message)


def _csv_rows(file: Path) -> Iterator[Row]:
    reader = csv.reader(text + "\n" for _, text in read_lines(file))
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        _check_columns(names, file)
        for cells in reader:
            if not cells:
                continue
            where = f"{file}:{reader.line_num}"
            if len(cells) != len(names):
                yield BadRow(where, f"{where}: {len(cells)} cells, and the first line has {len(names)}")
                continue
            yield _row(_typed(dict(zip(names, cells, strict=True))), where)
    except csv.Error as error:
        raise PromptError(f"{file}:{reader.line_num}: not CSV: {error}", hint="repair this line") from None


def _typed(cells: Mapping[str, str]) -> dict[str, object]:
    """CSV knows text only: empty is absent, whole numbers are numbers, and ``["a", "b"]`` or ``[]`` are adapters."""
    found: dict[str, object] = {}
    for name, text in cells.items():
        if name == "prompt":
            found[name] = text
        elif name == "lora" and text.strip():
            found[name] = _adapters(text.strip())
        elif text.strip():
            found[name] = int(text) if _WHOLE.fullmatch(text.strip()) else text.strip()
    return found


def _adapters(text: str) -> object:
    """One adapter, which may be called 7, or a list as JSON lines have it."""
    if not text.startswith("["):
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text


def _parquet_rows(file: Path) -> Iterator[Row]:
    parquet = import_pyarrow("pyarrow.parquet", f"reading {file.name}")
    arrow = import_pyarrow("pyarrow", f"reading {file.name}")
    if not has_file(file, error=PromptError):
        raise PromptError(f"{file} does not exist", hint="check the path given to --prompts")
    try:
        table = parquet.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if name in _FIELDS]
        _check_columns(names, file)
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
            for fields in batch.to_pylist():
                number += 1
                yield _row({name: value for name, value in fields.items() if value is not None}, f"{file}:{number}")
    except (OSError, arrow.ArrowException) as error:
        raise PromptError(f"{file} cannot be read: {error}", hint="check the file given to --prompts") from error


def _parquet_count(file: Path) -> int:
    parquet = import_pyarrow("pyarrow.parquet", f"reading {file.name}")
    arrow = import_pyarrow("pyarrow", f"reading {file.name}")
    if not has_file(file, error=PromptError):
        return 0
    try:
        return int(parquet.read_metadata(file).num_rows)
    except (OSError, arrow.ArrowException):  # reading its rows says what is wrong
        return 0


def _row(fields: Mapping[str, object], where: str) -> Row:
    try:
        return row_from_fields({name: value for name, value in fields.items() if name in _FIELDS}, where)
    except PromptError as error:
        return BadRow(where, error.message)


def _check_columns(names: list[str], file: Path) -> None:
    if "prompt" not in names:
        raise PromptError(f"{file} has no column named prompt", hint="name the column of the captions prompt")


def import_pyarrow(module: str, what: str) -> ModuleType | Any:
    """A module of PyArrow. Raises MissingDependencyError: ``what`` needs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise MissingDependencyError(
            f"{what} needs pyarrow", hint="install it: python -m pip install 'tiue[bulk]'"
        ) from None
