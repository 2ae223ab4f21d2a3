"""Hashes of files and folders, and a quick fingerprint that tells two models apart in milliseconds.

The fingerprint is for records and for "was this made by the same model?": a sample of the weights, so proof against
mix-ups, not against forgery. The full hash is ``sha256_folder``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path

from tiue_cli.errors import AccessError, TiueError, UsageError
from tiue_cli.files.access import access_error, is_file, is_folder, open_file

WEIGHTS = ".safetensors"
BLOCKS = 256
BLOCK_BYTES = 4096
HASHED_PATTERNS = ("*.safetensors", "*.json", "*.txt")
"""What makes a model folder the model it is: weights, configs and tokenizer files; not its README."""


def fingerprint(folder: Path) -> str:
    """``fingerprint_of`` all configs, tokenizer files and weights below ``folder``; hidden files do not count."""
    return fingerprint_of(_by_name(folder, _visible_files(folder, HASHED_PATTERNS)))


def fingerprint_of(files: Mapping[str, Path], *, error: type[TiueError] = AccessError) -> str:
    """32 hexadecimal digits over ``files`` by their names: configs whole, of weights 256 blocks of 4 KiB a file.

    Any retraining moves nearly every weight, and a change of 5 % of them escapes with probability 2e-6. Where the
    files lie does not count. Raises ``error`` for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        with _reading(file, error) as opened:
            size_bytes = os.fstat(opened.fileno()).st_size
            digest.update(f"{name}\0{size_bytes}\n".encode())
            digest.update(_sample(opened, size_bytes, whole=file.suffix != WEIGHTS))
    return digest.hexdigest()[:32]


def _sample(file: BufferedReader, size_bytes: int, *, whole: bool) -> bytes:
    if whole or size_bytes <= BLOCKS * BLOCK_BYTES:
        return hashlib.sha256(file.read()).digest()
    digest = hashlib.sha256()
    stride = (size_bytes - BLOCK_BYTES) // (BLOCKS - 1)
    for block in range(BLOCKS):
        file.seek(block * stride)
        digest.update(file.read(BLOCK_BYTES))
    return digest.digest()


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
    if not is_folder(root):
        raise UsageError(f"{root} is not a folder", hint="check the path")
    return sha256_of(_by_name(root, _visible_files(root, patterns)))


def sha256_of(files: Mapping[str, Path], *, error: type[TiueError] = AccessError) -> str:
    """``sha256_folder`` of ``files`` by the names given here. Raises ``error`` where one cannot be read."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        # Both parts have a fixed or delimited length, so no two folders share one byte stream.
        with _reading(file, error) as opened:
            digest.update(f"{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _visible_files(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for file in root.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if not hidden and any(fnmatch(file.name, pattern) for pattern in patterns) and is_file(file):
            yield file


def _by_name(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    return {file.relative_to(root).as_posix(): file for file in files}


@contextlib.contextmanager
def _reading(file: Path, error: type[TiueError]) -> Iterator[BufferedReader]:
    try:
        with open_file(file, error=error) as opened:
            yield opened
    except OSError as refusal:
        raise access_error(file, refusal, error=error) from refusal
