"""Examples in docstrings (``>>>``) become code blocks on the site; Markdown would take them for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> ).+\n?)*)+", re.MULTILINE)


def fenced(docstring: str) -> str:
    """Each run of ``>>>`` lines with what they print, up to the blank line after it, as a block of ``pycon``."""
    return _EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", docstring)


class DoctestFences(griffe.Extension):
    """Applied by mkdocstrings to every object that a page shows."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of ``obj``, where it has one with an example."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
