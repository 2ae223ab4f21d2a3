"""What is asked for: prompts from the command line, from a text file (one a line) or from JSON lines.

A JSON line is an object with ``prompt`` and, where it differs from the command line, ``seed``, ``size`` (a number or
"HEIGHTxWIDTH"), ``steps`` and ``lora`` ("SOURCE:WEIGHT", or a list of them; [] is none). In a text file a line that
begins with ``#`` and a blank is a comment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.base.text import excerpt, parse_size
from tiue_cli.errors import PromptError, UsageError
from tiue_cli.files.structured import parse_json
from tiue_cli.files.texts import STDIN, is_comment, read_lines
from tiue_cli.model.noise import MAX_SEED


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what it overrides; ``where`` names its place in error messages, e.g. ``scenes.jsonl:3``."""

    prompt: str
    where: str
    seed: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    loras: tuple[str, ...] | None = None


def rows_from_arguments(prompts: Sequence[str]) -> list[PromptRow]:
    """Check prompts given as words of a command; ``-`` stands for the lines of standard input.

    Raises PromptError that names the unusable one by its number.
    """
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if prompt == STDIN:
            rows += read_prompts(Path(STDIN))
            continue
        where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        rows.append(PromptRow(check_prompt(prompt, where), where))
    return rows


def bare_words_note(prompts: Sequence[str]) -> str | None:
    """What to tell someone who seems to have forgotten the quotes; None where nothing looks like that."""
    if len(prompts) < 2 or any(len(prompt.split()) != 1 for prompt in prompts):
        return None
    together = excerpt(" ".join(prompts), 60)
    return f'{len(prompts)} prompts of one word each; for one picture of all of them: tiue generate "{together}"'


def read_prompts(path: Path) -> list[PromptRow]:
    """Read a ``.txt`` (one prompt a line) or ``.jsonl`` file, or standard input (``-``, one prompt a line).

    Encodings, line ends and comments: see ``files.texts``. Blank lines are skipped. Raises PromptError with file and
    line, UsageError for another kind of file.
    """
    kind = ".txt" if str(path) == STDIN else path.suffix.lower()
    if kind not in {".txt", ".jsonl"}:
        bulk = "; with --shards .csv, .parquet and folders are read too"
        raise UsageError(
            f"{path} is neither .txt nor .jsonl", hint=f"one prompt a line in .txt, one object in .jsonl{bulk}"
        )
    lines = [(text.strip(), where) for where, text in read_lines(path) if text.strip()]
    if kind == ".txt":
        lines = [(text, where) for text, where in lines if not is_comment(text)]
    if not lines:
        name = "standard input" if str(path) == STDIN else path
        raise PromptError(f"{name} holds no prompts", hint="write one prompt a line")
    if kind == ".txt":
        return [PromptRow(check_prompt(text, where), where) for text, where in lines]
    return [row_from_json(text, where) for text, where in lines]


class _JsonRow(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    size: int | str | None = None
    steps: int | None = Field(default=None, ge=1)
    lora: str | list[str] | None = None

    @property
    def loras(self) -> tuple[str, ...] | None:
        """``lora`` as a tuple; None where the row does not say."""
        if self.lora is None:
            return None
        return (self.lora,) if isinstance(self.lora, str) else tuple(self.lora)


def row_from_json(text: str, where: str) -> PromptRow:
    """The row of one JSON line. Raises PromptError."""
    try:
        data = parse_json(text)
    except ValueError as error:
        raise PromptError(
            f"{where}: not JSON: {error}", hint='a line looks like {"prompt": "a star", "seed": 5}'
        ) from None
    if not isinstance(data, dict):
        raise PromptError(f"{where}: not a JSON object", hint='a line looks like {"prompt": "a star", "seed": 5}')
    return row_from_fields(data, where)


def row_from_fields(data: Mapping[str, object], where: str) -> PromptRow:
    """The row of ``prompt`` and, if wanted, ``seed``, ``size``, ``steps`` and ``lora``. Raises PromptError."""
    try:
        row = _JsonRow.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise PromptError(
            f"{where}: field {excerpt(str(first['loc'][0]))!r}: {excerpt(first['msg'])}",
            hint="the fields are prompt, and if wanted seed, size, steps and lora",
        ) from None
    try:
        size = None if row.size is None else parse_size(str(row.size))
    except UsageError as error:
        raise PromptError(f"{where}: {error.message}", hint='write "size": 512, or "size": "384x640"') from None
    prompt = check_prompt(row.prompt or "", where)
    return PromptRow(prompt, where, seed=row.seed, size=size, steps=row.steps, loras=row.loras)


def check_prompt(prompt: str, where: str) -> str:
    """Return the prompt without the blanks around it; PromptError where nothing or nothing printable is left."""
    stripped = prompt.strip()
    if not stripped:
        raise PromptError(f"{where} is empty", hint='say what to draw: tiue generate "a red heart at night"')
    if "\0" in stripped:
        raise PromptError(f"{where} contains a NUL character", hint="remove it")
    try:
        stripped.encode("utf-8")
    except UnicodeEncodeError:
        # Lone surrogates: what Python makes of argument bytes in another encoding.
        raise PromptError(f"{where} is not valid UTF-8", hint="use a UTF-8 terminal, or --prompts FILE.txt") from None
    return stripped
