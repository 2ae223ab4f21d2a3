"""What lies at a path, and whether it may be read: the one place that asks, for every reader and every check.

``pathlib`` answers "no" to a dangling link and raises PermissionError, RuntimeError or ValueError elsewhere; opening a
FIFO waits for ever. Here each of these is one sentence: what lies there, why it cannot be read, and what to do. What
cannot be *looked at* is never called missing, and nobody is told to delete what could not be read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Literal

from tiue_cli.errors import AccessError, TiueError

Kind = Literal["nothing", "file", "folder", "special"]

_PERMISSION = ("permission denied", "ask its owner for the right to read it, or give another path")
_REASONS = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENAMETOOLONG: ("the name is too long", "check the path: a name has at most 255 bytes"),
    errno.ELOOP: ("its links lead in a circle", "remove the link, or give another path"),
    errno.EIO: ("the disk reports an error", "check the disk, or copy the file from where it came"),
    errno.ESTALE: ("the network folder is gone", "mount it again, or give another path"),
    errno.ENOENT: ("it does not exist", "check the path"),
    errno.ENOTDIR: ("a part of its path is a file", "check the path"),
    errno.EISDIR: ("it is a folder", "give a file"),
    errno.ENXIO: ("it is not a regular file", "give a regular file"),
}
_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def user_path(text: str | Path, *, error: type[TiueError] = AccessError) -> Path:
    """``text`` as a path, with ``~`` and ``~user`` expanded. Raises ``error`` for an unknown user, NUL, and ""."""
    if text == "":  # to Path it is this folder
        raise error("a path is empty", hint="give a file or folder")
    if "\0" in str(text):
        raise error(f"{str(text)!r} is not a path: it contains a NUL character", hint="check the path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        raise error(
            f"{text} does not exist: this system has no home folder for {name}",
            hint=f"check the name; for a folder called {name} write ./{name}",
        ) from None


def kind_of(path: str | Path, *, error: type[TiueError] = AccessError) -> Kind:
    """What lies at ``path``, links followed; a dangling link is ``nothing``. Raises ``error`` where one may not look.

    A part of the path that is a file makes it ``nothing`` as well: there cannot be anything.
    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as refusal:
        raise access_error(path, refusal, error=error) from refusal
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "special"


def exists(path: str | Path, *, error: type[TiueError] = AccessError) -> bool:
    """Whether anything lies at ``path``. Raises ``error`` where one may not look."""
    return kind_of(path, error=error) != "nothing"


def is_file(path: str | Path, *, error: type[TiueError] = AccessError) -> bool:
    """Whether a regular file lies at ``path``; see ``require_file`` for a name that must not be taken by other things.

    Raises ``error`` where one may not look.
    """
    return kind_of(path, error=error) == "file"


def is_folder(path: str | Path, *, error: type[TiueError] = AccessError) -> bool:
    """Whether a folder lies at ``path``. Raises ``error`` where one may not look."""
    return kind_of(path, error=error) == "folder"


def has_file(path: str | Path, *, error: type[TiueError] = AccessError) -> bool:
    """Whether a file of a reserved name is there: False only where nothing bears the name.

    A dangling link, a folder, a FIFO at that name raise ``error``: a student with a broken ``tiue.json`` is a broken
    student, not a teacher.
    """
    if kind_of(path, error=error) == "file":
        return True
    if not os.path.lexists(path):
        return False
    raise error(f"{path} cannot be read: {_what_lies_at(path)}", hint="put the file that belongs there in its place")


def list_folder(path: str | Path, *, error: type[TiueError] = AccessError) -> list[Path]:
    """What a folder holds, sorted by name. Raises ``error`` where it may not be listed."""
    try:
        return sorted(Path(path).iterdir())
    except (OSError, ValueError) as refusal:
        raise access_error(path, refusal, error=error) from refusal


@contextlib.contextmanager
def open_file(path: str | Path, *, error: type[TiueError] = AccessError) -> Iterator[BufferedReader]:
    """A regular file, open for reading bytes. Raises ``error`` for anything else; a FIFO is never waited for.

    FileNotFoundError alone is left as it is, for a missing file often means something to who asks.
    """
    try:
        # Not to wait for the other end of a FIFO; for regular files it means nothing.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as refusal:
        raise access_error(path, refusal, error=error) from refusal
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} cannot be read: {_what_lies_at(path)}", hint="give a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: str | Path, *, error: type[TiueError] = AccessError, limit_bytes: int | None = None) -> bytes:
    """The bytes of a regular file, at most ``limit_bytes``. Raises ``error``, and FileNotFoundError."""
    with open_file(path, error=error) as file:
        try:
            data = file.read() if limit_bytes is None else file.read(limit_bytes + 1)
        except OSError as refusal:
            raise access_error(path, refusal, error=error) from refusal
    if limit_bytes is not None and len(data) > limit_bytes:
        raise error(f"{path} is too large: more than {limit_bytes:,} bytes", hint="check that it is the right file")
    return data


def access_error(path: str | Path, refusal: OSError | ValueError, *, error: type[TiueError] = AccessError) -> TiueError:
    """The operating system's refusal to let ``path`` be read, as one sentence and a next step."""
    if isinstance(refusal, ValueError):  # only a NUL character is refused by Python itself
        return error(f"{str(path)!r} is not a path: {refusal}", hint="check the path")
    number = refusal.errno or 0
    reason, hint = _REASONS.get(number, (refusal.strerror or str(refusal), "check the path"))
    where = _barrier(path) if number in (errno.EACCES, errno.EPERM) else None
    if where is not None:
        reason, hint = f"{reason} for the folder {where}", _PERMISSION[1]
    return error(f"{path} cannot be read: {reason}", hint=hint)


def _barrier(path: str | Path) -> Path | None:
    """The first folder above ``path`` that may not be searched; None where they all may."""
    effective = os.access in os.supports_effective_ids
    for folder in reversed(Path(path).parents):
        if not os.access(folder, os.X_OK, effective_ids=effective):
            return folder
    return None


def _what_lies_at(path: str | Path) -> str:
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return "it is a link to something that does not exist" if os.path.lexists(path) else "it does not exist"
    except OSError as refusal:
        return _REASONS.get(refusal.errno or 0, (str(refusal), ""))[0]
    if stat.S_ISDIR(mode):
        return "it is a folder, not a file"
    for test, name in _SPECIAL:
        if test(mode):
            return f"it is {name}, not a regular file"
    return "it is not a regular file"
