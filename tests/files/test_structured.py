"""JSON, YAML and TOML from outside: whatever it is, data within bounds or a ValueError in one sentence."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tiue_cli.files.structured import MAX_DEPTH, MAX_DIGITS, parse_json, parse_toml, parse_yaml

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

Parser = Callable[[Any], Any]

BAD_JSON = [
    "[" * 100_000,
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    '"a cat \\ud83d"',
    '{"\\ud83d": 1}',
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5_000,
    "9" * (MAX_DIGITS + 1),
    b"\xff\xfe\x00",
    b'{"a": "\xe9"}',
    "",
    "{'a': 1}",
]
BAD_YAML = [
    "[" * 10_000,
    "a: " + "9" * 5_000,
    "a: 0x" + "f" * 5_000,
    "a: &x [*x]",
    "a: &x {b: *x}",
    "a: !!timestamp x",
    "a: !!int ''",
    "a: !!float x",
    "a: !!binary '*'",
    "a: 2026-01-01",
    "a: !!set {x}",
    "a: !!python/object:os.system {}",
    "? [1]\n: 2",
    "1: 2",
    "a: b: c",
    "&a [1, 2]: 3",
    '"\\ud800": 1',
    "\x00",
    "a: &1 [x,x,x,x,x,x,x,x]\n" + "\n".join(f"k{i}: &{i + 2} [{','.join([f'*{i + 1}'] * 8)}]" for i in range(9)),
]
BAD_TOML = ["a=" + "[" * 10_000, "a=" + "9" * 5_000, "a=0x" + "f" * 5_000, "a=1979-05-27", "a=", "[[", "a=nan\x00"]


@pytest.mark.parametrize(
    ("parse", "source"),
    [(parse_json, bad) for bad in BAD_JSON]
    + [(parse_yaml, bad) for bad in BAD_YAML]
    + [(parse_toml, bad) for bad in BAD_TOML],
)
def test_every_refusal_is_one_short_sentence(parse: Parser, source: str | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse(source)
    assert 0 < len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert type(caught.value) is ValueError


def test_what_libraries_write_is_read() -> None:
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}') == {"model_max_length": int(1e30)}
    assert parse_json('{"lambda_min_clipped": -Infinity}', infinities=True) == {"lambda_min_clipped": float("-inf")}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert parse_json('{"a": "猫 🌙"}'.encode(encoding)) == {"a": "猫 🌙"}
    assert parse_json('\ufeff{"a": 1}') == {"a": 1}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN)
@settings(max_examples=60, deadline=None)
def test_json_comes_back_as_it_was_written(data: Any) -> None:
    assert parse_json(json.dumps(data)) == data


@given(st.text(max_size=200) | st.text("[]{}:,&*!-|>'\"#%@ \n0aexn", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_data_or_a_value_error(text: str) -> None:
    for parse, oracle in ((parse_json, json.loads), (parse_yaml, yaml.safe_load), (parse_toml, tomllib.loads)):
        try:
            data = parse(text)
        except ValueError:
            continue
        assert data == oracle(text.removeprefix("\ufeff") if parse is parse_json else text)


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_data_or_a_value_error(data: bytes) -> None:
    try:
        json.dumps(parse_json(data), allow_nan=False).encode()
    except ValueError:
        return
