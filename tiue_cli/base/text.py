"""Text from people and for people: sizes, numbers, and the cleaner for what came from outside."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final

from tiue_cli.errors import UsageError

MAX_SIDE_PX = 8192
"""Longest side that is taken for meant; a size beyond it is a slip of the finger."""


def parse_size(text: str) -> tuple[int, int]:
    """Read "512" or "384x640" (height x width) as (height, width) in pixels; UsageError says what is wrong."""
    match = re.fullmatch(r"(\d{1,9})(?:\s*[xX×]\s*(\d{1,9}))?", text.strip(), flags=re.ASCII)
    if match is None:
        raise UsageError(
            f"size {excerpt(text)!r} is not understood", hint="write --size 512, or height x width: --size 384x640"
        )
    height = int(match[1])
    width = int(match[2]) if match[2] is not None else height
    if not (1 <= height <= MAX_SIDE_PX and 1 <= width <= MAX_SIDE_PX):
        raise UsageError(f"size {height}x{width} is out of range", hint=f"each side is 1 to {MAX_SIDE_PX} pixels")
    return height, width


def number(value: float, digits: int = 3) -> str:
    """At least ``digits`` significant digits, in plain notation where that is short: 0.0123, 1.23, 123, 12,346."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > 6:
        return f"{value:.{digits - 1}e}"
    # Rounding may carry into another digit: 9.996 is 10.0, not 10.00.
    decimals = digits - 1 - math.floor(math.log10(abs(round(value, decimals))))
    return f"{value:,.{max(0, decimals)}f}"


def size_text(size: tuple[int, int]) -> str:
    """(height, width) as ``512 × 768``."""
    return f"{size[0]} × {size[1]}"


def bytes_text(count: float) -> str:
    """In KiB, MiB or GiB, e.g. ``3.42 GiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{number(count / 2**10)} KiB"


def excerpt(text: str, limit: int = 100) -> str:
    """At most ``limit`` characters of what came from outside, cut in the middle: a message must fit a screen."""
    if len(text) <= limit:
        return text
    head = (limit - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - limit :]}"


def visible(text: str) -> str:
    """``text`` as a terminal may show it: controls, bidirectional marks and halves of characters are escaped.

    A string of a PNG, a manifest or a file name could otherwise move the cursor, change colours and titles, or forge
    lines (ESC, CR, the C1 controls of ECMA-48). Line feeds and tabs stay; joiners, which scripts and emoji need, too.
    """
    return UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """One line without control characters, which SVG and HTML cannot hold or which would reorder what is around it."""
    return " ".join("".join(" " if unicodedata.category(char) in _CONTROLS else char for char in text).split())


_CONTROLS: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
