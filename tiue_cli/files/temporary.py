"""Names of half-written files and folders, and clearing away what killed runs left of them.

``.STEM.OWNER.RANDOM.tmp.SUFFIX`` beside the final name: OWNER is the process, so that a later run knows whether it
still lives. What belongs to another machine or an older version goes after a day without a change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

UNTOUCHED_S: Final = 24 * 3600.0
"""No run leaves what it is writing alone for longer."""
_STEM_BYTES: Final = 100
_SUFFIX_BYTES: Final = 30
_NAME: Final = re.compile(
    r"\..*?\.(?:(?P<machine>[0-9a-f]{6})-(?P<pid>[0-9]+)\.)?[0-9a-f]{8}\.tmp(?:\.[^.]+)?", re.DOTALL
)


def temporary_sibling(path: Path) -> Path:
    """A free, hidden name beside ``path``, with its suffix, and never too long however long ``path``'s is."""
    # Cut in bytes: file systems count those.
    stem = os.fsencode(path.stem)[:_STEM_BYTES].decode(errors="ignore")
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _SUFFIX_BYTES else ""
    return path.parent / f".{stem}.{_machine()}-{os.getpid()}.{secrets.token_hex(4)}.tmp{suffix}"


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder in the system's place for temporary files, removed at the end; with those that killed runs left."""
    place = Path(tempfile.gettempdir())
    remove_leftovers(place)
    folder = temporary_sibling(place / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path, *, is_finished: bool = False) -> None:
    """Delete what killed runs left half-written in ``folder``; what a living process writes stays.

    ``is_finished``: whatever the folder was to hold is there, so what anybody still writes for it is waste as well (a
    worker of another machine, or one that its cluster has given up).
    """
    for path in leftovers(folder, is_finished=is_finished):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def leftovers(folder: Path, *, is_finished: bool = False) -> Iterator[Path]:
    """The abandoned temporaries in ``folder``, or all of them; nothing where it cannot be listed."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and (is_finished or _abandoned(path, machine=match["machine"], pid=match["pid"])):
                yield path


def _abandoned(path: Path, *, machine: str | None, pid: str | None) -> bool:
    if machine == _machine() and pid is not None:
        return not _lives(int(pid))
    try:
        newest = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
    except OSError:
        return False
    return time.time() - newest > UNTOUCHED_S


def _lives(pid: int) -> bool:
    if os.name != "posix":  # there the call below would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to somebody else
        return True
    # In a container whose first process reaps nobody, the dead keep their numbers.
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_bytes()
        return status.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return True


@functools.cache
def _machine() -> str:
    """Six digits for what process numbers are valid in: this machine, and this container of it."""
    space = ""
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()}\0{space}".encode()).hexdigest()[:6]
