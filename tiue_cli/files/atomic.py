"""Files and folders appear whole or not at all: written aside, then renamed.

Standard library and pydantic only: the command line and the exported runtimes import this.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tiue_cli.errors import OutputError, TakenError, TiueError
from tiue_cli.files.access import exists, is_file, kind_of, list_folder
from tiue_cli.files.rename import exchange, rename_new
from tiue_cli.files.temporary import remove_leftovers, temporary_sibling


@contextlib.contextmanager
def atomic_file(path: Path | str, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling to write to; on success it becomes ``path``, on failure it is removed.

    Without ``replace`` the file system itself refuses a name that is taken by then (TakenError): of two runs that write
    to one name, one fails. The sibling keeps the suffix, because image libraries choose the format by it. Raises
    OutputError.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    kind = kind_of(path, error=OutputError)
    if kind == "folder":
        raise output_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if kind == "special":
        raise OutputError(f"cannot write {path}: it is not a regular file", hint="choose another name")
    try:
        with _writing(path, temporary):
            yield temporary
        with _as_output_error(path):
            if replace:
                temporary.replace(path)
            else:
                _take(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before is what counts
            temporary.unlink(missing_ok=True)
        raise


def _take(temporary: Path, path: Path) -> None:
    try:
        rename_new(temporary, path)
    except FileExistsError:
        raise TakenError(
            f"{path} was written by another run meanwhile; it was not replaced", hint="choose another name"
        ) from None


@contextlib.contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yield an empty temporary sibling folder; on success it becomes ``path``, on failure it is removed.

    An existing folder that is not empty is refused without ``overwrite``, and even with it when ``marker`` is given
    and no file of that name lies in it: a mistyped ``--out ~`` must not delete a home. Old and new folder exchange
    their names in one step where the system can (Linux), else by two renames; a kill between these leaves the old one
    under a hidden name, which the next run puts back. Files get the mode that the umask says, whatever the library that
    wrote them thinks. Raises OutputError.
    """
    kind_of(path, error=OutputError)  # what cannot be looked at cannot be resolved either
    # Resolved: renaming over a link would replace the link and leave the folder that it names.
    with _as_output_error(Path(path)):
        path = Path(path).resolve()
    _recover(path)
    check_replaceable(path, overwrite=overwrite, marker=marker)
    temporary = temporary_sibling(path)
    with _as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary.mkdir()
    try:
        with _writing(path, temporary):
            yield temporary
        _apply_umask(temporary)
        check_replaceable(path, overwrite=overwrite, marker=marker)
        with _as_output_error(path):
            _swap_in(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _apply_umask(folder: Path) -> None:
    """Give the files the mode that the umask lets new ones have; safetensors writes them for their owner alone."""
    # The folder itself was just made, so its mode says what the umask is.
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        found = file.lstat()
        # A file with a second name is another folder's as well.
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
            with contextlib.suppress(OSError):  # file systems without modes
                file.chmod(mode)


class Terminated(SystemExit):
    """SIGTERM came: everything unwinds, and the process ends with status 143."""


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM unwinds like Ctrl-C does (exit status 143), so that no temporary folder of gigabytes stays."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_OLD_SUFFIX = ".old"


def _swap_in(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    if exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = _aside(path)
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where the old folder lies while two renames put the new one in its place; one name for each ``path``."""
    name = path.name
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = f"{name[:_KEPT_CHARS]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return path.with_name(f".{name}{_OLD_SUFFIX}")


_NAME_BYTES = 200
_KEPT_CHARS = 40


def _recover(path: Path) -> None:
    """Put back the folder that a run had moved aside when it was killed."""
    old = _aside(path)
    with contextlib.suppress(OSError):
        if not os.path.lexists(path) and old.is_dir():
            old.rename(path)


def check_replaceable(path: Path, *, overwrite: bool, marker: str | None) -> None:
    """Refuse a folder that ``atomic_folder`` may not write to or replace, without writing. Raises OutputError."""
    kind = kind_of(path, error=OutputError)
    if kind == "nothing":
        return
    if kind != "folder":
        raise OutputError(f"{path} is a file, and a folder is to be written there", hint="choose another name")
    if not list_folder(path, error=OutputError):
        return
    if not overwrite:
        raise OutputError(
            f"{path} exists and is not empty; nothing was written",
            hint="choose another folder, or replace it: --overwrite",
        )
    if marker is not None and not is_file(path / marker, error=OutputError):
        raise OutputError(
            f"{path} holds no {marker}, so tiue did not write it and does not replace it",
            hint="choose another folder, or remove this one yourself",
        )


def free_bytes(folder: Path | str) -> int | None:
    """Bytes free where ``folder`` is or will be; None where the system does not say."""
    with contextlib.suppress(OSError, TiueError):
        return shutil.disk_usage(_existing(Path(folder))).free
    return None


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    return next((place for place in (folder, *folder.parents) if exists(place, error=OutputError)), folder)


def check_writable(folder: Path | str) -> None:
    """Fail before minutes of work rather than after, and leave no trace. Raises OutputError.

    A folder that is yet to be made is as writable as the one that it will be made in.
    """
    folder = Path(folder)
    with _as_output_error(folder), tempfile.TemporaryFile(dir=_existing(folder)):
        pass


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
    errno.ENOENT: ("its folder does not exist and cannot be made", "choose a folder that exists"),
    errno.ELOOP: ("its links lead in a circle", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


def output_error(path: Path | str, error: OSError) -> OutputError:
    """Turn the operating system's refusal to write ``path`` into one clear line and a next step."""
    number = error.errno if error.errno is not None else 0
    reason, hint = _REASONS.get(number, (error.strerror or str(error), "choose another place to write to"))
    return OutputError(f"cannot write {path}: {reason}", hint=hint)


@contextlib.contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


@contextlib.contextmanager
def _writing(path: Path, temporary: Path) -> Iterator[None]:
    """Inside, whatever a library makes of a full disk becomes an OutputError about ``path``; other errors stay."""
    try:
        yield
    except TiueError:
        raise
    except Exception as error:
        failure = _write_failure(path, temporary, error)
        if failure is None:
            raise
        raise failure from error


_FULL_DISK = re.compile(
    # NumPy's tofile (its OSError has no number), torch's archive writer
    r"no space left|disk quota|\d+ requested and \d+ written|problem writing element|unexpected pos"
    r"|PytorchStreamWriter failed",
    re.IGNORECASE,
)

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""The operating system's number in an error of safetensors or tokenizers."""


def _write_failure(path: Path, temporary: Path, error: Exception) -> OutputError | None:
    """What a failed write means for ``path``; None for an error that is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        about = Path(error.filename) if isinstance(error.filename, str) else None
        ours = about is not None and (about == temporary or temporary in about.parents)
        return output_error(path, error) if error.errno in _WRITE_ERRNOS or ours else None
    if _FULL_DISK.search(str(error)) is not None:
        return output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    number = _RUST_ERROR.search(str(error))
    return None if number is None else output_error(path, OSError(int(number[1]), os.strerror(int(number[1]))))
