"""JSON, YAML and TOML from outside, parsed within bounds: the one place where such text becomes data.

A parser's own failures are of many kinds (RecursionError, OverflowError, AttributeError out of a YAML timestamp …), and
what it accepts can still break whoever uses it: half an emoji that cannot be written, a list that contains itself, a
number of 5,000 digits that cannot be printed. Here all of them are a ValueError in one short sentence; callers add the
file, the next step and the class of error.

Standard library only (PyYAML is imported when YAML is read): everything that reads a manifest imports this.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

from tiue_cli.base.text import excerpt

MAX_BYTES: Final = 128 * 2**20
"""Of a JSON document: safetensors allows headers of 100 MB, and a report with its grids stays below that."""
MAX_DEPTH: Final = 64
MAX_DIGITS: Final = 64
"""Of a whole number. transformers writes 10^30 for "unlimited", a counter never has more."""
_MAX_SETTINGS_BYTES: Final = 2**17
_MAX_SETTINGS_NODES: Final = 200_000
"""A YAML file can name one list a million times over in some lines."""
_LARGEST: Final = 10**MAX_DIGITS


def parse_json(source: str | bytes, *, infinities: bool = False) -> Any:
    """The data in a JSON text. Raises ValueError, in words that follow "is not JSON: " or "cannot be read: ".

    UTF-8 with or without byte order mark, UTF-16 by its mark. ``infinities`` lets NaN and ±Infinity pass, which are
    not JSON and which diffusers writes into scheduler configs. Refused besides malformed text: nesting beyond
    ``MAX_DEPTH``, whole numbers beyond ``MAX_DIGITS`` digits, floats beyond float64, and lone surrogates in keys and
    values.
    """
    if len(source) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    text = _decoded(source) if isinstance(source, bytes) else source.removeprefix("\ufeff")
    try:
        data = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=float if infinities else _refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} in line {error.lineno}, column {error.colno}") from None
    _check(data, max_nodes=None)
    return data


def parse_yaml(text: str) -> Any:
    """The data in a YAML document: mappings with text keys, lists, text, numbers, booleans, null.

    Raises ValueError for everything else: malformed text, dates and other tags, recursive aliases, and documents that
    are too large, too deep, or multiply by aliases.
    """
    import yaml

    if len(text) > _MAX_SETTINGS_BYTES:
        raise ValueError(f"it is larger than {_MAX_SETTINGS_BYTES // 2**10} KiB")
    if _open_brackets(text) > 8 * MAX_DEPTH:  # in texts and comments, too, hence the room
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(excerpt(" ".join(str(error).split()), 240)) from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        # Out of PyYAML's constructors of numbers, dates and tags, which trust their text.
        raise ValueError(f"a value cannot be read: {excerpt(str(error))}") from None
    _check(data, max_nodes=_MAX_SETTINGS_NODES)
    return data


def parse_toml(text: str) -> dict[str, Any]:
    """The data in a TOML document, without dates and times. Raises ValueError as ``parse_yaml`` does."""
    import tomllib

    if len(text) > _MAX_SETTINGS_BYTES:
        raise ValueError(f"it is larger than {_MAX_SETTINGS_BYTES // 2**10} KiB")
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(excerpt(" ".join(str(error).split()), 240)) from None
    _check(data, max_nodes=_MAX_SETTINGS_NODES)
    return data


def _open_brackets(text: str) -> int:
    """The most brackets that are open at one place: PyYAML's time grows with the square of them."""
    depth = deepest = 0
    for char in text:
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}" and depth:
            depth -= 1
    return deepest


def _decoded(data: bytes) -> str:
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8") from None


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"the number {excerpt(digits, 24)} has more than {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {excerpt(digits, 24)} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(data: Any, *, max_nodes: int | None) -> None:
    """Refuse what parses and cannot be used; without recursion, as the data may be as deep as it likes."""
    left: list[tuple[Any, int]] = [(data, 1)]
    nodes = 0
    while left:
        value, depth = left.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep, or contains itself")
        if max_nodes is not None and nodes > max_nodes:
            raise ValueError(f"it holds more than {max_nodes:,} values")
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {excerpt(repr(key))} is not text; put it in quotes")
                _check_text(key)
                left.append((item, depth + 1))
        elif isinstance(value, list):
            left += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            _check_text(value)
        elif isinstance(value, bool) or value is None or isinstance(value, float):
            continue
        elif not isinstance(value, int):
            raise ValueError(f"{excerpt(str(value))} is a {type(value).__name__}; put it in quotes if it is text")
        elif not -_LARGEST < value < _LARGEST:
            raise ValueError(f"a whole number has more than {MAX_DIGITS} digits")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} is half a character, as of an emoji cut in the middle") from None
