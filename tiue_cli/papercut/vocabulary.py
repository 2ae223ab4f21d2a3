"""What the embedded model has never read: three dozen words are its whole world, and a newcomer should learn so."""

from __future__ import annotations

from collections.abc import Iterable

from tiue_cli.papercut.captions import BACKGROUNDS, COLORS, OBJECTS, RELATIONS, unknown_words

_NAMED = 8
"""How many unknown words a sentence lists."""


def vocabulary_note(prompts: Iterable[str], *, model: str) -> str | None:
    """One sentence on the words of ``prompts`` that papercut does not know, and those that it does; else None."""
    words = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt)))
    if not words:
        return None
    listed = f"{', '.join(words[:_NAMED])}{' …' if len(words) > _NAMED else ''}"
    known = "; ".join(", ".join(group) for group in (OBJECTS, COLORS, RELATIONS, BACKGROUNDS.values()))
    return f"{model} has never seen: {listed}. It knows {known}"
