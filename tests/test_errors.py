"""The error tree: codes for the shell, a hint for the reader, and nothing lost on the way between processes."""

from __future__ import annotations

import pickle

import pytest

from tiue_cli import errors
from tiue_cli.errors import TiueError, UsageError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TiueError)]


def test_only_usage_errors_exit_with_two() -> None:
    assert {error.__name__: error.exit_code for error in ALL if error.exit_code != 1} == {"UsageError": 2}


@pytest.mark.parametrize("type_", ALL)
def test_message_and_hint_survive_a_worker_process(type_: type[TiueError]) -> None:
    error = pickle.loads(pickle.dumps(type_("what", hint="next")))
    assert type(error) is type_
    assert (error.message, error.hint) == ("what", "next")


def test_text_holds_message_and_hint() -> None:
    assert str(UsageError("size 63 does not fit", hint="use 64")) == "size 63 does not fit (use 64)"
    assert str(UsageError("size 63 does not fit")) == "size 63 does not fit"


def test_the_tree_in_the_docstring_is_complete() -> None:
    assert errors.__doc__ is not None
    assert [error.__name__ for error in ALL if error.__name__ not in errors.__doc__] == []
