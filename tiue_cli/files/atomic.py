"""Files and folders appear whole or not at all: written aside, then renamed.

Standard library and pydantic only: the command line and the exported runtimes import this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tiue_cli.errors import OutputError, TiueError

# --- manifests -----------------------------------------------------------------------------------------------------


# --- atomic writes -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it becomes ``path``, on failure it is removed.

    The sibling keeps the suffix, because image libraries choose the format by it. Raises OutputError.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with _as_output_error(path, only=_WRITE_ERRNOS, within=temporary):
            yield temporary
        with _as_output_error(path):
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success it becomes ``path``, on failure it is removed.

    An existing folder that is not empty is refused without ``overwrite``, and even with it when ``marker`` is given
    and no file of that name lies in it: a mistyped ``--out ~`` must not delete a home. The old folder is moved aside
    before the new one takes its name and deleted after, so a kill leaves the old, the new, or none.
    Raises OutputError.
    """
    # Resolved: renaming over a link would replace the link and leave the folder that it names.
    path = Path(path).resolve()
    _check_replaceable(path, overwrite=overwrite, marker=marker)
    temporary = _temporary_sibling(path)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with _as_output_error(path, only=_WRITE_ERRNOS, within=temporary):
            yield temporary
        _check_replaceable(path, overwrite=overwrite, marker=marker)
        with _as_output_error(path):
            _swap_in(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM unwinds like Ctrl-C does (exit status 143), so that no temporary folder of gigabytes stays."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _swap_in(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = _temporary_sibling(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(path: Path, *, overwrite: bool, marker: str | None) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file, and a folder is to be written there", hint="choose another name")
    with _as_output_error(path):
        empty = not any(path.iterdir())
    if empty:
        return
    if not overwrite:
        raise OutputError(
            f"{path} exists and is not empty; nothing was written",
            hint="choose another folder, or replace it: --overwrite",
        )
    if marker is not None and not (path / marker).is_file():
        raise OutputError(
            f"{path} holds no {marker}, so tiue did not write it and does not replace it",
            hint="choose another folder, or remove this one yourself",
        )


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write to another disk"),
    errno.EACCES: ("permission denied", "choose a folder that you may write to"),
    errno.EPERM: ("permission denied", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.EISDIR: ("it is a folder", "give a file name"),
    errno.ENOTDIR: ("a part of its path is a file", "choose another folder"),
    errno.EEXIST: ("a part of its path is a file", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


def output_error(path: Path | str, error: OSError) -> OutputError:
    """Turn the operating system's refusal to write ``path`` into one clear line and a next step."""
    number = error.errno if error.errno is not None else 0
    reason, hint = _REASONS.get(number, (error.strerror or str(error), "choose another place to write to"))
    return OutputError(f"cannot write {path}: {reason}", hint=hint)


@contextlib.contextmanager
def _as_output_error(path: Path, *, only: frozenset[int] | None = None, within: Path | None = None) -> Iterator[None]:
    """Translate OSError; with ``only``, just those errnos and errors about files at or under ``within``."""
    try:
        yield
    except TiueError:
        raise
    except OSError as error:
        about = Path(error.filename) if isinstance(error.filename, str) else None
        ours = within is not None and about is not None and (about == within or within in about.parents)
        if only is not None and error.errno not in only and not ours:
            raise
        raise output_error(path, error) from error


# --- hashes --------------------------------------------------------------------------------------------------------
