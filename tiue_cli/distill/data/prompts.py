"""Prompts to train on: read, cleaned and counted.

A missing text (null in JSON and parquet, an empty field in CSV, an empty line) is an empty prompt: dropped and counted.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_cli.base.text import excerpt
from tiue_cli.errors import MissingDependencyError, PromptError, UsageError
from tiue_cli.files.access import has_file, user_path
from tiue_cli.files.structured import parse_json
from tiue_cli.files.texts import STDIN, is_comment, read_lines
from tiue_cli.papercut.captions import training_captions

COLUMNS = ("prompt", "caption", "text")
"""Names that are looked for, in this order, where no column is given."""
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
DATASETS_PREFIX = "datasets:"
PAPERCUT = "papercut"
"""The source that needs no file: captions drawn from papercut's grammar, the same ones every time."""
_SHOWN = 3
csv.field_size_limit(2**24)  # of the whole module, and at most what one line may have; its default is 131,072

Row = tuple[str, Any]
"""Where a value stands (``captions.csv:7``), and the value; None where it is missing."""


class _Unusable(str):
    """In a row's place: what is wrong with it."""


@dataclass(frozen=True)
class TrainingPrompts:
    """Prompts without empties and duplicates, in the order of the file."""

    prompts: tuple[str, ...]
    empty: int
    duplicates: int

    @property
    def sha256(self) -> str:
        """Hash of the prompts and their order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(prompt.encode() + b"\0")
        return digest.hexdigest()

    def describe(self) -> str:
        """One sentence for people."""
        return f"{len(self.prompts):,} prompts ({self.duplicates:,} duplicates and {self.empty:,} empty ones dropped)"


def read_training_prompts(source: str, *, column: str | None = None, limit: int | None = None) -> TrainingPrompts:
    """Read a .txt, .jsonl, .csv or .parquet file, ``datasets:NAME[:SPLIT]`` (streamed), or ``papercut``'s captions.

    Raises PromptError for rows that are no prompts (the first with file and line), UsageError for another kind of
    source, MissingDependencyError where a reader is not installed.
    """
    seen: dict[str, None] = {}
    bad: list[str] = []
    empty = duplicates = 0
    for where, value in _rows(source, column):
        problem = _problem(value)
        if problem is not None:
            bad.append(f"{where} {problem}")
            continue
        prompt = "" if value is None else " ".join(value.split())
        if not prompt:
            empty += 1
        elif prompt in seen:
            duplicates += 1
        else:
            seen[prompt] = None
        if limit is not None and len(seen) >= limit:
            break
    if bad:
        more = f" (and {len(bad) - _SHOWN} more rows)" if len(bad) > _SHOWN else ""
        raise PromptError("; ".join(bad[:_SHOWN]) + more, hint="correct the rows; every row needs a text")
    if not seen:
        raise PromptError(f"{source} holds no prompts", hint="write one prompt a line")
    return TrainingPrompts(tuple(seen), empty=empty, duplicates=duplicates)


def _problem(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, _Unusable):
        return value
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    if "\0" in value:
        return "contains a NUL character"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "contains half a character, as of an emoji cut in the middle"
    return None


def _rows(source: str, column: str | None) -> Iterator[Row]:
    if source.startswith(DATASETS_PREFIX):
        return _dataset_rows(source.removeprefix(DATASETS_PREFIX), column)
    if source == PAPERCUT:
        return ((f"{PAPERCUT}:{number}", caption) for number, caption in enumerate(training_captions(), 1))
    path = _prompt_file(source)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, column)
    lines = read_lines(path)
    if suffix == ".txt":
        return ((where, line) for where, line in lines if not is_comment(line))
    return _json_rows(lines, column) if suffix == ".jsonl" else _csv_rows(path, lines, column)


def check_prompt_source(source: str) -> None:
    """Raise UsageError or PromptError for a source that cannot be read at all; quick, nothing is read."""
    if source != PAPERCUT and not source.startswith(DATASETS_PREFIX):
        _prompt_file(source)


def _prompt_file(source: str) -> Path:
    if source == STDIN:
        raise UsageError(
            "a distillation reads its prompts again when it is resumed, and standard input can be read once",
            hint="save them in a file first: cat > prompts.txt",
        )
    path = user_path(source, error=PromptError)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{source} is not a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file",
            hint=f"one prompt a line in .txt, or a hub dataset: {DATASETS_PREFIX}OWNER/NAME",
        )
    if not has_file(path, error=PromptError):
        raise PromptError(f"{path} does not exist", hint="check its path")
    return path


def _json_rows(lines: Iterable[tuple[str, str]], column: str | None) -> Iterator[Row]:
    for where, line in lines:
        if not line.strip():
            continue
        try:
            data = parse_json(line)
        except ValueError as error:
            raise PromptError(f"{where}: not JSON: {error}", hint='a line looks like {"prompt": "a star"}') from None
        if not isinstance(data, dict):
            raise PromptError(f"{where}: not a JSON object", hint='a line looks like {"prompt": "a star"}')
        yield where, data.get(_column(data, column, where))


def _csv_rows(path: Path, lines: Iterable[tuple[str, str]], column: str | None) -> Iterator[Row]:
    # The csv module joins quoted line breaks again; its own counter says where a row ends.
    reader = csv.DictReader((line + "\n" for _, line in lines), strict=True)
    end = 0
    try:
        header = reader.fieldnames or []
        # The only column is not taken for the prompts here: a file without a header would lose its first one.
        name = _column(dict.fromkeys(header), column, f"{path}:1", or_only=False)
        for row in reader:
            end = reader.line_num
            start = end - sum(value.count("\n") for value in row.values() if isinstance(value, str))
            yield f"{path}:{start}", _misfit(row) or row[name]
    except csv.Error as error:
        raise PromptError(
            f"{path}: the row after line {end or 1}: {error}", hint="save it as CSV with quotes in pairs"
        ) from None


def _misfit(row: Mapping[str | Any, Any]) -> _Unusable | None:
    """What is wrong with the number of a row's fields. DictReader keeps those beyond the header under None."""
    if None in row:
        return _Unusable("has more fields than the header")
    return _Unusable("has fewer fields than the header") if None in row.values() else None


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            f"{path} needs pyarrow to be read", hint='install it: python -m pip install "tiue[datasets]"'
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is not a parquet file: {error}", hint="check the file") from error
    name = _column(dict.fromkeys(file.schema_arrow.names), column, str(path))
    number = 0
    try:
        for batch in file.iter_batches(columns=[name]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path} row {number}", value
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is damaged after row {number}: {error}", hint="make the file again") from error


def _dataset_rows(name: str, column: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{DATASETS_PREFIX}{name} needs the datasets library",
            hint='install it: python -m pip install "tiue[datasets]"',
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        # Its versions before 4 can run code that lies in a dataset's repository.
        raise MissingDependencyError(
            f"{DATASETS_PREFIX}{name} needs datasets 4 or later; {datasets.__version__} is installed",
            hint="upgrade it: python -m pip install 'datasets>=4'",
        )
    repository, _, split = name.partition(":")
    split = split or "train"
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(repository, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"{DATASETS_PREFIX}{name} cannot be opened: {error}", hint="check the name, the split and the connection"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            where = f"{repository} row {number}"
            yield where, row.get(_column(row, column, where))
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"{DATASETS_PREFIX}{name} cannot be read after row {number}: {error}",
            hint="check the connection; max_prompts reads only the first so many",
        ) from error


def _column(row: Mapping[str, Any], column: str | None, where: str, *, or_only: bool = True) -> str:
    """The column to read: the one asked for, a known name, or (``or_only``) the only one. PromptError otherwise."""
    if column is not None:
        if column not in row:
            raise PromptError(f"{where}: there is no {column!r} among {_names(row)}", hint="check prompt_column")
        return column
    for name in COLUMNS:
        if name in row:
            return name
    if or_only and len(row) == 1:
        return next(iter(row))
    raise PromptError(
        f"{where}: none of {', '.join(COLUMNS)} among {_names(row) or 'no columns'}",
        hint="say which: --set prompt_column=NAME",
    )


def _names(row: Mapping[str, Any]) -> str:
    return excerpt(", ".join(map(str, row)))
