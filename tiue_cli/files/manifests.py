"""JSON files with a format version: written aside and renamed, read with errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from tiue_cli.base.text import excerpt
from tiue_cli.errors import ManifestError
from tiue_cli.files.access import read_bytes
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.structured import parse_json

_Manifest = TypeVar("_Manifest", bound=pydantic.BaseModel)

MAX_BYTES = 64 * 2**20
"""No manifest is near this: what is larger is another file."""


def write_json(path: Path | str, content: pydantic.BaseModel | Mapping[str, Any]) -> Path:
    """Write a manifest or plain mapping as indented JSON, atomically; returns the path. Raises OutputError."""
    data = content.model_dump(mode="json") if isinstance(content, pydantic.BaseModel) else dict(content)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def read_manifest(path: Path | str, type_: type[_Manifest]) -> _Manifest:
    """Read and check a JSON manifest; ManifestError names the file, the field and the next step."""
    path = Path(path)
    try:
        raw = read_bytes(path, error=ManifestError, limit_bytes=MAX_BYTES)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist", hint="give the folder that tiue wrote, whole") from None
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error}", hint=_RESTORE_HINT) from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} must hold a JSON object, not {type(data).__name__}", hint=_RESTORE_HINT)
    _check_format_version(path, data, type_)
    try:
        return type_.model_validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        first, *others = error.errors()
        field = excerpt(".".join(str(part) for part in first["loc"]))
        more = f" (and {len(others)} more)" if others else ""
        where = f"field {field!r}" if field else "the whole"
        raise ManifestError(f"{path}: {where}: {excerpt(first['msg'])}{more}", hint=_RESTORE_HINT) from error


_RESTORE_HINT = "restore the file, or write the folder again with the command that made it"


def _check_format_version(path: Path, data: dict[str, Any], type_: type[pydantic.BaseModel]) -> None:
    """Refuse another format version before its unknown fields are blamed. Raises ManifestError."""
    field = type_.model_fields.get("format_version")
    if field is None or "format_version" not in data:
        return
    found, known = data["format_version"], field.default
    if isinstance(found, int) and found != known:
        newer = found > known
        raise ManifestError(
            f"{path}: format_version {found} is {'newer' if newer else 'older'} than {known}, which this tiue reads",
            hint="upgrade: python -m pip install --upgrade tiue" if newer else "write the folder again with this tiue",
        )
