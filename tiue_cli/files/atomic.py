"""Files and folders that tiue writes and reads again: names, manifests, hashes, atomic writes.

Standard library and pydantic only: the command line and the exported runtimes import this.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.errors import ManifestError, OutputError, TiueError, UsageError

STUDENT_MANIFEST = "tiue.json"
"""Name of the manifest beside a student's model_index.json."""

RUN_MANIFEST = "run.json"
"""Name of the record in the folder of a distillation, whose result lies in its ``student/``."""

HASHED_PATTERNS = ("*.safetensors", "*.json", "*.txt")
"""What makes a model folder the model it is: weights, configs and tokenizer files; not its README."""

_Manifest = TypeVar("_Manifest", bound=pydantic.BaseModel)
_Timestep = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StudentManifest(pydantic.BaseModel):
    """What a student folder is beyond the weights, stored as ``tiue.json``.

    ``decoder_timesteps`` run from noise to image (descending); ``encoder_timestep`` is the one the UNet encoder was
    trained at, the first of them. ``prediction_type`` says what each decoder output is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: int = 1
    kind: Literal["student"] = "student"
    decoder_timesteps: tuple[_Timestep, ...] = Field(min_length=1)
    encoder_timestep: _Timestep
    spacing: Literal["leading", "trailing", "explicit"]
    prediction_type: Literal["epsilon", "v_prediction"]
    teacher: str
    teacher_sha256: _Sha256 | None = None
    recipe_sha256: _Sha256 | None = None
    training_steps: int = Field(default=0, ge=0)
    license: str = "unknown"
    tiue_version: str

    @pydantic.field_validator("decoder_timesteps")
    @classmethod
    def _descending(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
            raise ValueError("must be strictly descending, from noise to image")
        return timesteps

    @pydantic.model_validator(mode="after")
    def _encoder_is_first(self) -> Self:
        if self.encoder_timestep != self.decoder_timesteps[0]:
            raise ValueError(f"encoder_timestep must be the first decoder timestep, {self.decoder_timesteps[0]}")
        return self


# --- manifests -----------------------------------------------------------------------------------------------------


def write_json(path: Path | str, content: pydantic.BaseModel | Mapping[str, Any]) -> Path:
    """Write a manifest or plain mapping as indented JSON, atomically; returns the path. Raises OutputError."""
    data = content.model_dump(mode="json") if isinstance(content, pydantic.BaseModel) else dict(content)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def read_manifest(path: Path | str, type_: type[_Manifest]) -> _Manifest:
    """Read and check a JSON manifest; ManifestError names the file, the field and the next step."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist", hint="give the folder that tiue wrote, whole") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}", hint=_RESTORE_HINT) from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error}", hint=_RESTORE_HINT) from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} must hold a JSON object, not {type(data).__name__}", hint=_RESTORE_HINT)
    _check_format_version(path, data, type_)
    try:
        return type_.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first, *others = error.errors()
        field = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        where = f"field {field!r}" if field else "the whole"
        raise ManifestError(f"{path}: {where}: {first['msg']}{more}", hint=_RESTORE_HINT) from error


_RESTORE_HINT = "restore the file, or write the folder again with the command that made it"


def _check_format_version(path: Path, data: dict[str, Any], type_: type[pydantic.BaseModel]) -> None:
    """Refuse another format version before its unknown fields are blamed. Raises ManifestError."""
    field = type_.model_fields.get("format_version")
    if field is None or "format_version" not in data:
        return
    found, known = data["format_version"], field.default
    if isinstance(found, int) and found != known:
        newer = found > known
        raise ManifestError(
            f"{path}: format_version {found} is {'newer' if newer else 'older'} than {known}, which this tiue reads",
            hint="upgrade: python -m pip install --upgrade tiue" if newer else "write the folder again with this tiue",
        )


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


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path | str, patterns: Sequence[str] = HASHED_PATTERNS) -> str:
    """SHA-256 over the names and contents of all files under ``path`` whose name matches a pattern.

    The order is that of the POSIX relative paths, so the hash depends on neither file system, times nor place.
    Hidden files and folders (a download cache) do not count. Raises UsageError where ``path`` is no folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder", hint="check the path")
    files = {
        file.relative_to(root): file
        for file in root.rglob("*")
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns)
    }
    visible = {
        name.as_posix(): file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)
    }
    digest = hashlib.sha256()
    for name in sorted(visible):
        # Both parts have a fixed or delimited length, so no two folders share one byte stream.
        digest.update(f"{name}\0{sha256_file(visible[name])}\n".encode())
    return digest.hexdigest()
