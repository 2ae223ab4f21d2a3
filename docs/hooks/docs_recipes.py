"""Recipes and settings of ``tiue distill`` as Markdown, from the YAML and the types that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic

from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.resolve import all_recipes


def render_recipes() -> str:
    """Each recipe as a block that can be folded out."""
    lines = []
    for recipe in all_recipes():
        lines += [f'??? note "{recipe.name}"', "    ```yaml"]
        lines += [f"    {line}".rstrip() for line in recipe.text.splitlines()]
        lines += ["    ```", ""]
    return "\n".join(lines)


def render_settings() -> str:
    """A table of every key with its default and what it means."""
    rows = ["| key | default | what it is |", "|---|---|---|"]
    rows += [f"| `{key}` | {default} | {words} |" for key, default, words in _rows(DistillConfig, "")]
    return "\n".join(rows)


def _rows(section: type[pydantic.BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            yield from _rows(kind, f"{prefix}{name}.")
            continue
        default = "needed" if field.is_required() else f"`{_shown(field.default)}`"
        words = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"{prefix}{name}", default, words


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
