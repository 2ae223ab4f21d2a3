"""Manifests, atomic writes and hashes. The oracle is the file system after a failure at the worst moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_disk import small_disk

from tiue_cli.errors import ManifestError, OutputError, TakenError, UsageError
from tiue_cli.files import atomic, rename
from tiue_cli.files.atomic import atomic_file, atomic_folder
from tiue_cli.files.hashes import sha256_file, sha256_folder
from tiue_cli.files.manifests import read_manifest, write_json
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest
from tiue_cli.files.temporary import UNTOUCHED_S, remove_leftovers, temporary_folder, temporary_sibling

FIELDS: dict[str, Any] = {
    "decoder_timesteps": (751, 501, 251, 1),
    "encoder_timestep": 751,
    "spacing": "leading",
    "prediction_type": "epsilon",
    "teacher": "owner/teacher",
    "tiue_version": "0.1.0",
}


def manifest(**changes: Any) -> StudentManifest:
    return StudentManifest(**{**FIELDS, **changes})


# --- manifests


def test_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    written = manifest(teacher="Größe/日本", training_steps=3, recipe_sha256="0" * 64)
    assert read_manifest(write_json(tmp_path / "sub" / STUDENT_MANIFEST, written), StudentManifest) == written


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"spacing": "linspace"}, "spacing"),
        ({"decoder_timesteps": []}, "decoder_timesteps"),
        ({"decoder_timesteps": [1, 251]}, "decoder_timesteps"),
        ({"decoder_timesteps": ["751"]}, "decoder_timesteps"),
        ({"teacher_sha256": "abc"}, "teacher_sha256"),
        ({"training_steps": -1}, "training_steps"),
        ({"encoder_timestep": -1}, "encoder_timestep"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = tmp_path / STUDENT_MANIFEST
    path.write_text(json.dumps({**FIELDS, **changes}))
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, StudentManifest)
    assert str(path) in caught.value.message
    assert field in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 1}'])
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / STUDENT_MANIFEST
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=STUDENT_MANIFEST):
        read_manifest(path, StudentManifest)


def test_a_missing_manifest_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        read_manifest(tmp_path / STUDENT_MANIFEST, StudentManifest)


def test_a_newer_format_asks_for_an_upgrade_and_not_for_a_field(tmp_path: Path) -> None:
    path = tmp_path / STUDENT_MANIFEST
    path.write_text(json.dumps({**FIELDS, "format_version": 2, "something": "new"}))
    with pytest.raises(ManifestError, match="newer") as caught:
        read_manifest(path, StudentManifest)
    assert "upgrade" in str(caught.value.hint)


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


# --- atomic writes


class Stop(BaseException):
    """Stands for Ctrl-C: no Exception."""


def test_a_stopped_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_text("old")
    with pytest.raises(Stop), atomic_file(path) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("half")
        raise Stop
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]
    assert path.read_text() == "old"


def test_a_stopped_folder_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(Stop), atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "a").write_text("half")
        raise Stop
    assert [file.name for file in tmp_path.iterdir()] == ["student"]
    assert (folder / "a").read_text() == "old"


def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    program = (
        "import os, signal, sys; from tiue_cli.files.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1], overwrite=True) as temporary:\n"
        "    (temporary / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert (folder / "a").read_text() == "old"


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_overwrite_replaces_only_what_bears_the_marker(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with (
        pytest.raises(OutputError, match=r"holds no tiue\.json"),
        atomic_folder(home, overwrite=True, marker="tiue.json"),
    ):
        pytest.fail("the block must not run")
    (home / "tiue.json").write_text("{}")
    with atomic_folder(home, overwrite=True, marker="tiue.json") as temporary:
        (temporary / "new").write_text("")
    assert [file.name for file in home.iterdir()] == ["new"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["home"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("")
    assert (tmp_path / "out" / "a").exists()


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"result\.json: the disk is full"),
        atomic_file(tmp_path / "result.json"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "b" / "a.json"):
        with pytest.raises(OutputError, match="cannot write"):
            write_json(path, {})
    with pytest.raises(OutputError, match="is a file"), atomic_folder(tmp_path / "file"):
        pytest.fail("the block must not run")


def test_a_folder_in_the_way_of_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        write_json(tmp_path / "a.json", {})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="permission denied"):
            write_json(tmp_path / "a.json", {})
    finally:
        tmp_path.chmod(0o755)


def test_other_errors_of_the_block_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.json"):
        Path(tmp_path / "prompts.txt").read_text()


# --- hashes


def test_hash_equals_the_systems(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"tiue" * 300_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"tiue" * 300_000).hexdigest()


def build_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_folder_hash_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    names = ["unet/config.json", "unet/w.safetensors", "model_index.json", "tokenizer/merges.txt"]
    first = build_tree(tmp_path / "first", names)
    second = build_tree(tmp_path / "elsewhere" / "second", names[::-1])
    expected = sha256_folder(first)
    assert sha256_folder(second) == expected

    build_tree(second, ["README.md", ".cache/huggingface/x.json", "unet/old.bin"])
    assert sha256_folder(second) == expected, "what is no part of the model must not count"

    moved = build_tree(tmp_path / "moved", [*names[:3], "tokenizer/renamed.txt"])
    assert sha256_folder(moved) != expected
    (second / "unet" / "config.json").write_text("changed")
    assert sha256_folder(second) != expected


def test_folder_hash_does_not_confuse_a_name_with_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.json").write_text("1")
    (tmp_path / "a" / "y.json").write_text("")
    (tmp_path / "b" / "x.json").write_text("")
    (tmp_path / "b" / "y.json").write_text("1")
    assert sha256_folder(tmp_path / "a") != sha256_folder(tmp_path / "b")


def test_folder_hash_wants_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        sha256_folder(tmp_path / "missing")


def test_only_light_modules_are_needed() -> None:
    """errors and artifacts serve the exported runtimes and --help: the standard library and pydantic."""
    program = (
        "import sys; import tiue_cli.files.atomic, tiue_cli.errors\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- names that are taken, and names that are long


def test_of_two_writers_to_one_name_the_later_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(TakenError, match="written by another run"), atomic_file(path, replace=False) as mine:
        mine.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1
    with atomic_file(tmp_path / "free.json", replace=False) as mine:
        mine.write_text("mine")
    assert (tmp_path / "free.json").read_text() == "mine"


@pytest.mark.parametrize("lacks", ["nothing", "renameat2", "renameat2 and links"])
def test_of_many_writers_to_one_name_exactly_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks != "nothing":
        monkeypatch.setattr(rename, "_renameat2", lambda source, target, flags: False)
    if lacks == "renameat2 and links":

        def refuse(source: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)

    def write(number: int) -> bool:
        try:
            with atomic_file(tmp_path / "one", replace=False) as temporary:
                temporary.write_text(str(number))
        except TakenError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(write, range(40)))
    assert sum(wins) == 1
    assert (tmp_path / "one").read_text() == str(wins.index(True))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("length", [200, 243, 250, 255])
@pytest.mark.parametrize("suffix", [".yaml", ".png", "", "." + "x" * 120])
@pytest.mark.parametrize("letter", ["b", "é", "日"])
def test_every_legal_name_can_be_written(tmp_path: Path, length: int, suffix: str, letter: str) -> None:
    stem_bytes = length - len(suffix)
    letters = letter * (stem_bytes // len(letter.encode()))
    name = letters + "b" * (stem_bytes - len(letters.encode())) + suffix
    assert len(name.encode()) == length
    for path in (tmp_path / name, tmp_path / "folder" / name):
        with atomic_file(path) as temporary:
            temporary.write_text("x")
        assert path.read_text() == "x"
    with atomic_folder(tmp_path / "deep" / name) as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]


def test_a_name_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the name is too long"), atomic_file(tmp_path / ("b" * 256)):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


# --- what killed runs leave


KILLED = (
    "import os, signal, sys; from tiue_cli.files.atomic import atomic_file, atomic_folder\n"
    "with {writer}(sys.argv[1]) as temporary:\n"
    "    {write}; print(temporary, flush=True); {end}\n"
)
WRITERS = {
    "atomic_file": "temporary.write_text('half')",
    "atomic_folder": "(temporary / 'gigabytes').write_text('half')",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, writer: str) -> None:
    program = KILLED.format(writer=writer, write=WRITERS[writer], end="os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out.png")], check=False, capture_output=True)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(tmp_path / "another") as folder:
        (folder / "x").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_living_run_writes_stays(tmp_path: Path, writer: str) -> None:
    program = KILLED.format(writer=writer, write=WRITERS[writer], end="sys.stdin.readline()")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out.png")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as other:
        assert other.stdout is not None
        temporary = Path(other.stdout.readline().strip())
        remove_leftovers(tmp_path)
        with atomic_folder(tmp_path / "another") as folder:
            (folder / "x").write_text("")
        assert temporary.exists()
        other.communicate("\n")
    assert (tmp_path / "out.png").exists() and not temporary.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the dead are told from the living by /proc")
def test_the_dead_whom_nobody_has_reaped_write_nothing(tmp_path: Path) -> None:
    program = KILLED.format(writer="atomic_file", write=WRITERS["atomic_file"], end="os.kill(os.getpid(), 9)")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out.png")], stdout=subprocess.PIPE) as other:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its number is still taken
        os.kill(other.pid, 0)
        (left,) = tmp_path.iterdir()
        remove_leftovers(tmp_path)
        assert not left.exists()


def test_in_a_finished_folder_nobody_writes_any_more(tmp_path: Path) -> None:
    mine, precious = temporary_sibling(tmp_path / "00047.tar"), tmp_path / "00047.tar"
    for path in (mine, precious, tmp_path / ".00048.ffffff-1.0123abcd.tmp.tar"):
        path.write_text("")
    remove_leftovers(tmp_path, is_finished=True)
    assert list(tmp_path.iterdir()) == [precious]


@pytest.mark.parametrize("name", [".out.0123abcd.tmp", ".out.ffffff-1.0123abcd.tmp", ".out.ffffff-1.0123abcd.tmp.png"])
def test_what_another_machine_or_an_older_version_left_goes_after_a_day(tmp_path: Path, name: str) -> None:
    left = tmp_path / name
    left.write_text("half")
    remove_leftovers(tmp_path)
    assert left.exists()
    day_ago = time.time() - UNTOUCHED_S - 60
    os.utime(left, (day_ago, day_ago))
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_a_killed_runs_temporary_folder_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from tiue_cli.files.temporary import temporary_folder\n"
        "with temporary_folder('tiue-bench') as folder:\n"
        "    (folder / 'graph').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.iterdir()
    with temporary_folder("tiue-bench") as folder, temporary_folder("tiue-bench") as other:
        assert not left.exists() and folder != other and folder.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [".bashrc", "out.tmp", ".out.tmp", ".out.zz.tmp", "a.0123abcd.tmp", ".a.0123abcd.tmp.d.e"]
)
def test_files_of_others_are_never_leftovers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("precious")
    os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert path.read_text() == "precious"


# --- replacing a folder


def test_a_name_always_stands_for_a_whole_folder_while_it_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "export"

    def write(number: int) -> None:
        with atomic_folder(folder, overwrite=True) as temporary:
            for part in ("a", "b"):
                (temporary / part).write_text(str(number))

    write(0)
    (tmp_path / "x").mkdir()
    can_exchange = rename.exchange(folder, tmp_path / "x")
    if can_exchange:
        rename.exchange(folder, tmp_path / "x")
    (tmp_path / "x").rmdir()
    if not can_exchange:
        pytest.skip("this file system cannot exchange names")
    stop = threading.Event()

    def look() -> int:
        absent = 0
        while not stop.is_set():
            absent += not folder.is_dir()
        return absent

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(look)
        for number in range(1, 200):
            write(number)
        stop.set()
        absent = looks.result()
    assert absent == 0
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_without_an_exchange_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise Stop
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Stop), atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    monkeypatch.setattr(Path, "rename", real)
    folder.rename(tmp_path / ".export.old")
    with atomic_folder(folder, overwrite=True) as temporary:
        assert (folder / "a").read_text() == "old"
        (temporary / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# --- full disks, in the words of every library


@pytest.mark.parametrize(
    "error",
    [
        OSError("3145728 requested and 0 written"),
        OSError("problem writing element 4 to file"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_a_full_disk_has_one_name(tmp_path: Path, writer: Any, error: Exception) -> None:
    with pytest.raises(OutputError, match="out: the disk is full"), writer(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_numpys_own_words_for_a_full_disk_are_known(tmp_path: Path) -> None:
    with small_disk(tmp_path, size_bytes=64 * 1024) as disk:
        with pytest.raises(OutputError, match="the disk is full"), atomic_file(disk / "out") as temporary:
            np.zeros(10**6, dtype=np.float32).tofile(temporary)
        assert list(disk.iterdir()) == []
