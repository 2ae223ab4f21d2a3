"""The command line itself: help, version, exit statuses, and errors in two lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiue_cli import __version__
from tiue_cli.cli import app as cli
from tiue_cli.cli.app import app, main
from tiue_cli.errors import ModelFolderError
from tiue_cli.generate.config import GenerateConfig

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: tiue {command}" in shown
    examples = shown.partition("Examples")[2]
    assert f"tiue {command}" in examples


def test_help_shows_the_configs_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--help"])
    shown = capsys.readouterr().out
    for value in (GenerateConfig().model, GenerateConfig().images, GenerateConfig().out, GenerateConfig().device):
        assert f"[default: {value}]" in shown


def test_help_advertises_no_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        main(words)
    shown = capsys.readouterr().out
    for line in shown.splitlines():
        words = line.split()
        if words[:1] == ["tiue"]:
            assert words[1] in COMMANDS, line


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tiue {__version__}\n"


def test_python_m_runs_the_same_command_line() -> None:
    root = Path(cli.__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tiue_cli", "--version"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tiue {__version__}\n", "")


@pytest.mark.parametrize("words", [["nonsense"], ["generate", "--nonsense"], ["generate", "a", "--images", "many"]])
def test_usage_error_exits_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err


def failing(error: Exception) -> object:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_failure_takes_one_line_and_one_hint(monkeypatch, capsys) -> None:
    error = ModelFolderError("x/unet is [bold]missing[/bold]\nand more", hint="copy :smile: it " + "again " * 60)
    monkeypatch.setattr("tiue_cli.cli.inspection.inspect_source", failing(error))
    assert main(["inspect", "x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: x/unet is [bold]missing[/bold] and more"
    assert lines[1].startswith("hint: copy :smile: it again")
    assert len(lines) == 2


def test_memory_that_is_full_is_no_fault_of_tiue(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiue_cli.cli.inspection.inspect_source", failing(MemoryError()))
    assert main(["inspect", "x"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: the memory of this machine is full") and "fault" not in shown


def test_fault_of_our_own_names_itself_and_says_how_to_see_where(monkeypatch, capsys) -> None:
    monkeypatch.setattr("tiue_cli.cli.inspection.inspect_source", failing(KeyError("skip_00")))
    assert main(["inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'skip_00'" in err
    assert "TIUE_DEBUG=1" in err
    assert "Traceback" not in err


def test_debugging_shows_the_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TIUE_DEBUG", "1")
    monkeypatch.setattr("tiue_cli.cli.inspection.inspect_source", failing(ModelFolderError("gone")))
    with pytest.raises(ModelFolderError):
        main(["inspect", "x"])
