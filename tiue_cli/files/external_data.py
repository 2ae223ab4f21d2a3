"""Where an ONNX file keeps its weights: read from the file itself, without the onnx package, which runtimes lack.

A graph names its external files inside. Only files that the manifest lists, and so hashes, may be among them, and ONNX
Runtime refuses those that a link leads out of the folder to: both are said here, before a session is opened.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tiue_cli.errors import ManifestError
from tiue_cli.files.access import read_bytes
from tiue_cli.files.exports import GraphSpec

# Field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto that lead to a tensor, message by message.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_external_data(folder: Path, graph: GraphSpec, *, hint: str) -> None:
    """Refuse weights that the manifest does not list, and links that ONNX Runtime refuses. Raises ManifestError."""
    onnx = folder / graph.onnx.file
    try:
        named = external_files(read_bytes(onnx, error=ManifestError))
    except FileNotFoundError:
        raise ManifestError(f"{onnx} is missing", hint=hint) from None
    except ValueError as error:
        raise ManifestError(f"{onnx} is not an ONNX file: {error}", hint=hint) from error
    unknown = sorted(named - {file.file for file in graph.data})
    if unknown:
        raise ManifestError(f"{onnx} reads weights from {unknown[0]!r}, which manifest.json does not list", hint=hint)
    homes = folder.resolve(), onnx.resolve().parent
    for name in sorted(named):
        place = folder / name
        if not any(place.resolve().is_relative_to(home) for home in homes):
            real, here = shlex.quote(str(place.resolve())), shlex.quote(str(place))
            raise ManifestError(
                f"{place} is a link out of its folder, and ONNX Runtime refuses weights behind one",
                hint=f"copy the files instead of linking: cp --remove-destination {real} {here}",
            )


def external_files(model: bytes) -> set[str]:
    """The file names in the external data of an ONNX model. Raises ValueError for bytes that are no such message."""
    names = set()
    left: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    while left:
        kind, message = left.pop()
        if kind == "entry":
            entry = {number: bytes(value) for number, value in _fields(message)}
            if entry.get(1) == b"location":
                names.add(entry.get(2, b"").decode(errors="backslashreplace"))
            continue
        inner = _FIELDS[kind]
        left += [(inner[number], value) for number, value in _fields(message) if number in inner]
    return names


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of the fields that have a length: messages, texts and bytes."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, at = _varint(message, at)
            if at + length > end:
                raise ValueError("it is cut off")
            yield tag >> 3, message[at : at + length]
            at += length
        else:
            raise ValueError(f"it has a field of kind {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(value, place after it) of a number in groups of seven bits, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut off")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number in it does not end")
