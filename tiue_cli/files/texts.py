"""Lines of text from files and standard input, whatever editor wrote them: one reader for all commands.

UTF-8 with or without byte order mark; UTF-16 and UTF-32 by their mark, as Windows' Notepad and PowerShell write them.
Lines end in LF, CR LF or CR. In a ``.txt`` file, and on standard input, a line that begins with ``#`` and a blank is a
comment; ``#1 of ten`` is text.
"""

from __future__ import annotations

import codecs
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from tiue_cli.errors import PromptError
from tiue_cli.files.access import access_error, open_file

STDIN: Final = "-"
"""In the place of a file: read standard input."""

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BLOCK_BYTES: Final = 2**16
_MAX_LINE_CHARS: Final = 2**24
_UNDEFINED_IN_WINDOWS_1252: Final = frozenset(b"\x81\x8d\x8f\x90\x9d")


def is_comment(line: str) -> bool:
    """Whether a line of a ``.txt`` file is a comment: ``# …``, or ``#`` alone."""
    stripped = line.strip()
    return stripped == "#" or stripped.startswith(("# ", "#\t"))


def read_lines(path: Path | str) -> Iterator[tuple[str, str]]:
    """Yield (place such as ``captions.txt:7``, line without its end) of a file, or of standard input for ``-``.

    Raises PromptError with the line where the file cannot be read or decoded.
    """
    if str(path) == STDIN:
        yield from _lines(_stdin(), "standard input", None)
        return
    path = Path(path)
    try:
        with open_file(path, error=PromptError) as file:
            yield from _lines(file, str(path), path)
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist", hint="check its path") from None
    except OSError as error:
        raise access_error(path, error, error=PromptError) from error


def _stdin() -> BinaryIO:
    if sys.stdin is None or not hasattr(sys.stdin, "buffer"):
        raise PromptError("standard input is closed", hint="give a file: --prompts FILE.txt")
    return sys.stdin.buffer


def _lines(file: BinaryIO, name: str, path: Path | None) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_split(_decoded(file, name, path), name), 1):
        yield f"{name}:{number}", line


def _decoded(file: BinaryIO, name: str, path: Path | None) -> Iterator[str]:
    """Decode block by block; an error knows its line, as the line ends before it are counted."""
    block = file.read(_BLOCK_BYTES)
    encoding, mark = next(((name_, mark) for mark, name_ in _MARKS if block.startswith(mark)), ("utf-8", b""))
    if not mark and (wide := _unmarked_utf16(block)) is not None:
        raise PromptError(f"{name} looks like UTF-16 without a byte order mark", hint=_convert(wide, path))
    decoder = codecs.getincrementaldecoder(encoding)()
    block = block[len(mark) :]
    lines_before, last = 0, ""
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding, errors="ignore")
            # A block may end between the two characters of CR LF.
            line = 1 + lines_before + _line_ends(last + before) - _line_ends(last)
            raise PromptError(
                _undecodable(error, encoding, f"{name}:{line}"), hint=_hint(error, encoding, path)
            ) from None
        yield text
        if not block:
            return
        lines_before += _line_ends(last + text) - _line_ends(last)
        last = text[-1:] or last
        block = file.read(_BLOCK_BYTES)


def _line_ends(text: str) -> int:
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def _undecodable(error: UnicodeDecodeError, encoding: str, where: str) -> str:
    if encoding == "utf-8":
        return f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return f"{where}: its byte order mark says {encoding[:6].upper()}, and the text is not ({error.reason})"


def _hint(error: UnicodeDecodeError, encoding: str, path: Path | None) -> str:
    if encoding != "utf-8":
        return "save the file again as UTF-8"
    byte = error.object[error.start]
    if byte in _UNDEFINED_IN_WINDOWS_1252:
        return _convert("ENCODING", path)
    # Not latin1, whose 0x80 to 0x9f are invisible control characters, and quotes and dashes in Windows-1252.
    shown = bytes([byte]).decode("cp1252")
    return f"in Windows-1252 the byte is {shown!r}; if that is meant: {_convert('cp1252', path)}"


def _convert(encoding: str, path: Path | None) -> str:
    if path is None:
        return f"convert it: iconv -f {encoding} -t utf-8"
    return f"convert it: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > utf8{path.suffix}"


def _unmarked_utf16(block: bytes) -> str | None:
    """``utf-16le`` or ``utf-16be`` where every other byte of the beginning is mostly 0, which no text in UTF-8 has."""
    head = block[:512]
    if len(head) < 4:
        return None
    for first, name in ((1, "utf-16le"), (0, "utf-16be")):
        zeros = head[first::2].count(0)
        if zeros > len(head) // 4 and head[1 - first :: 2].count(0) < len(head) // 16 + 1:
            return name
    return None


def _split(blocks: Iterator[str], name: str) -> Iterator[str]:
    """Lines without their ends. A CR at the end of a block waits for the LF that may follow."""
    rest = ""
    for block in blocks:
        text = rest + block
        held = ""
        if block and text.endswith("\r"):
            text, held = text[:-1], "\r"
        *whole, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rest += held
        yield from whole
        if len(rest) > _MAX_LINE_CHARS:
            raise PromptError(f"{name} has a line of more than {_MAX_LINE_CHARS:,} characters", hint="check the file")
    if rest:
        yield from rest.replace("\r", "\n").removesuffix("\n").split("\n")
