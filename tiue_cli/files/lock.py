"""Locks of the operating system: one process at a time, and the lock goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tiue_cli.errors import OutputError
from tiue_cli.files.atomic import output_error

_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EINTR})


class NoLocksError(OutputError):
    """This system, or this file system, has no file locks."""


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path`` inside; yields whether it could be had. The file is gone afterwards.

    Raises NoLocksError, OutputError.
    """
    file = try_lock(path)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        release_lock(path, file)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, None where another one does. Raises NoLocksError, OutputError."""
    try:
        import fcntl
    except ImportError as error:
        raise NoLocksError("this system has no file locks", hint="use Linux") from error
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except OSError as error:
        os.close(file)
        if error.errno not in _HELD:
            raise NoLocksError(f"{path.parent} has no file locks: {error.strerror}", hint="use a local disk") from error
        return None
    os.close(file)
    return None


def release_lock(path: Path, file: int) -> None:
    """Give the lock back."""
    # Removed while it is held: whoever waits for this file sees that it is no longer the one at the path.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(file)
