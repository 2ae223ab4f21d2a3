"""Standard streams that are closed, full, narrow or told to stop: in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tiue_cli.cli import app as cli

ROOT = Path(cli.__file__).resolve().parents[2]
TIUE = f"{sys.executable} -m tiue_cli"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("tiue ", f"{TIUE} ", 1)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("tiue recipes show sd15 >&-", 0),
        ("tiue recipes show sd15 2>&-", 0),
        ("tiue nonsense 2>&-", 2),
        ("tiue generate --prompts - <&-", 1),
        ("tiue --version >&- 2>&- <&-", 0),
    ],
)
def test_closed_streams_are_no_fault(command: str, status: int) -> None:
    done = shell(command)
    assert done.returncode == status
    assert "fault of tiue" not in done.stderr + done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["tiue recipes show sd15", "tiue --version", "tiue --help"])
def test_full_stdout_is_one_error(command: str) -> None:
    done = shell(f"{command} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: cannot write to standard output: the disk is full"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_stderr_does_not_end_the_work() -> None:
    assert shell("tiue nonsense 2> /dev/full").returncode == 2


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A picture of another program, with escapes for the terminal and letters that few encodings have."""
    info = PngInfo()
    info.add_itxt("parameters", "猫 \x1b]0;title\x07 \x9b31m\rmake it again: rm \u202e\nSteps: 20")
    Image.new("RGB", (8, 8)).save(tmp_path / "猫\x1b.png", pnginfo=info)
    return tmp_path / "猫\x1b.png"


def controls(text: str) -> set[str]:
    return {char for char in text if (ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160 or char == "\u202e"}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_nothing_from_outside_controls_the_terminal(hostile: Path, encoding: str) -> None:
    """In all three formats, one after the other in one process that takes its encoding as it starts."""
    code = (
        "import sys; from tiue_cli.cli.app import main; from tiue_cli.cli.streams import prepare_streams\n"
        "prepare_streams()\n"
        "for name in ('human', 'json', 'quiet'):\n"
        f"    assert main(['inspect', {str(hostile)!r}, '--format', name]) == 0\n"
        "    print('=====', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert controls(done.stdout + done.stderr) == set()
    human, document, quiet, _ = done.stdout.split("=====\n")
    assert ("猫" in human) == ("猫" in quiet) == (encoding == "utf-8")
    assert "\x1b]0;title\x07 \x9b31m\rmake" in json.loads(document)["parameters"]


def test_messages_show_no_controls_of_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{tmp_path}/\x1b[31mred.png"]) == 2
    shown = capsys.readouterr().err
    assert controls(shown) == set()
    assert "\\x1b[31mred.png" in shown


def test_failures_are_documents_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, type_, status in (
        ("inspect nothing.png --format json", "UsageError", 2),
        ("generate --nonsense --format=json", "UsageError", 2),
        (f"generate --prompts {tmp_path}/none.txt --format json", "PromptError", 1),
    ):
        assert cli.main(command.split()) == status
        error = json.loads(capsys.readouterr().out)["error"]
        assert (error["type"], sorted(error)) == (type_, ["hint", "message", "type"])


@pytest.mark.slow
def test_sigterm_unwinds_with_status_143(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tiue_cli", "generate", "--interactive", "--out", str(tmp_path / "o")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        encoding="utf-8",
    )
    assert process.stderr is not None
    line = ""
    while ":quit" not in line:  # the session is open and waits
        line = process.stderr.readline()
        assert line, "the session ended by itself"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped: nothing was written" in err


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "a", "--model", ""],
        ["generate", "a", "--out="],
        ["distill", "--out", " ", "--dry-run"],
        ["bench", "papercut", "--compare", ""],
    ],
)
def test_an_empty_path_is_not_this_folder(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a script's variable that was not set; to Python an empty path is the working directory."""
    assert cli.main(words) == 2
    assert "was given an empty value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--negative-prompt fog", "no negative prompts"),
        ("--width 512", "--size HEIGHTxWIDTH"),
        ("--num-images 3", "--images N"),
        ("--device mps", "'mps' is not supported"),
        ("--device cuda:1", "CUDA_VISIBLE_DEVICES=1"),
        ("--sead 3", "--seed"),
        ("--num_inference_steps 20", "--teacher-steps N"),
        ("--cfg 7", "--guidance G"),
        ("--ckpt x", "--model FOLDER"),
    ],
)
def test_options_of_other_programs_get_their_name_here(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "a", *words.split(), "--format", "json"]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "generate",
        "serve",
        "inspect",
        "doctor",
        "export",
        "distill",
        "bench",
        "recipes",
        "recipes ls",
        "recipes copy",
    ],
)
def test_help_speaks_no_python(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "list[str]" not in shown and "<bool>" not in shown and "92233" not in shown
    assert max(map(len, shown.splitlines())) <= 80
