"""File names from prompts."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata

SLUG_CHARS = 60


SLUG_BYTES = 150


def slug(prompt: str) -> str:
    """A file name for a prompt: lower-case letters and digits of any script, hyphens between; at most 68 characters.

    A prompt that had to be cut gets six digits of its hash, so that two long ones stay apart.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower()).strip("-")
    short = _storable(words)[:SLUG_CHARS].encode()[:SLUG_BYTES].decode(errors="ignore").strip("-")
    if short == words and short:
        return short
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{short}-{digest}" if short else f"image-{digest}"


def _storable(name: str) -> str:
    """Without what this system's file names cannot hold: all but ASCII, in the C locale without UTF-8 mode."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "".join(char for char in name if char.isascii())
    return name
