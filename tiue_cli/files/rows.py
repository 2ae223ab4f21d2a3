"""Rows of numbers on disk, made once and read at random: text states and the teacher's solutions.

Rows lie in chunks, one ``.npy`` file each, written aside and renamed: what is interrupted goes on where it stopped, and
several processes fill one cache by taking different chunks.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from tiue_cli.base.text import bytes_text
from tiue_cli.errors import OutputError
from tiue_cli.files.access import is_file, open_file
from tiue_cli.files.atomic import atomic_file, check_writable, free_bytes

_CHUNK_BYTES = 32 * 2**20
# What NumPy raises for a header that is none: it reads it as Python.
_DAMAGE = (OSError, ValueError, EOFError, SyntaxError, TypeError, LookupError, OverflowError, MemoryError, TokenError)


def cache_key(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits over everything that the cached numbers depend on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class RowCache:
    """``count`` rows of one shape and dtype in a folder. ``max_chunk_rows`` bounds what an interruption loses."""

    def __init__(
        self, folder: Path, count: int, shape: Sequence[int], dtype: str = "float32", *, max_chunk_rows: int = 4096
    ) -> None:
        self.folder, self.count, self.shape, self.dtype = folder, count, tuple(shape), np.dtype(dtype)
        self._row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.chunk_rows = max(1, min(max_chunk_rows, _CHUNK_BYTES // self._row_bytes))
        self.size_bytes = count * self._row_bytes
        self._open: dict[int, np.ndarray] = {}

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk_rows)

    def chunk_range(self, chunk: int) -> range:
        """The rows of a chunk."""
        return range(chunk * self.chunk_rows, min(self.count, (chunk + 1) * self.chunk_rows))

    def missing(self, process: tuple[int, int] = (0, 1)) -> list[int]:
        """The chunks that are not there yet, of those that fall to a ``process`` (index, count)."""
        index, processes = process
        return [
            chunk for chunk in range(index, self.chunks, processes) if not is_file(self._path(chunk), error=OutputError)
        ]

    def check_room(self, what: str, *, hint: str) -> None:
        """Refuse to begin what the disk has no room for; rows that are there already need none. Raises OutputError."""
        needed = sum(len(self.chunk_range(chunk)) for chunk in self.missing()) * self._row_bytes
        if needed == 0:
            return
        check_writable(self.folder)
        free = free_bytes(self.folder)
        if free is not None and needed > free:
            raise OutputError(
                f"{what} need {bytes_text(needed)} in {self.folder.parent}, and {bytes_text(free)} are free", hint=hint
            )

    def write(self, chunk: int, rows: np.ndarray) -> None:
        """Store a chunk, whole or not at all. Raises OutputError."""
        expected = (len(self.chunk_range(chunk)), *self.shape)
        assert rows.shape == expected, f"chunk {chunk} is {rows.shape}, not {expected}"
        # By way of memory: np.save to a file reports a full disk without an errno to know it by.
        content = io.BytesIO()
        np.save(content, rows.astype(self.dtype, copy=False))
        with atomic_file(self._path(chunk)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """The rows (len(indices), *shape), copied. Raises OutputError for a damaged chunk."""
        result = np.empty((len(indices), *self.shape), self.dtype)
        for position, index in enumerate(indices):
            chunk, offset = divmod(index, self.chunk_rows)
            result[position] = self._chunk(chunk)[offset]
        return result

    def _chunk(self, chunk: int) -> np.ndarray:
        if chunk not in self._open:
            path = self._path(chunk)
            if not is_file(path, error=OutputError):
                raise OutputError(
                    f"{path} has disappeared", hint="start again, or give another folder: --set cache=FOLDER"
                )
            try:
                with open_file(path, error=OutputError):  # what may not be read is not damaged
                    rows: np.ndarray = np.load(path, mmap_mode="r")
                if rows.shape != (len(self.chunk_range(chunk)), *self.shape) or rows.dtype != self.dtype:
                    raise ValueError(f"{rows.dtype} {rows.shape}")
            except _DAMAGE as error:
                raise OutputError(f"{path} is damaged: {error}", hint=f"delete {path} and start again") from error
            self._open[chunk] = rows
        return self._open[chunk]

    def _path(self, chunk: int) -> Path:
        # Named by its rows, not by the length: a longer cache of the same key finds the whole chunks of a shorter one.
        rows = self.chunk_range(chunk)
        return self.folder / f"{rows.start:08d}-{rows.stop:08d}.npy"
