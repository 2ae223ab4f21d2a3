"""What a bench tells its caller while it runs; the caller owns the display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A sentence that the user should know."""

    text: str


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of a stage: parts loaded, subjects warmed up, runs timed, images drawn."""

    stage: str
    done: int
    total: int
    detail: str = ""


Event = Note | Progress
Emit = Callable[[Event], None]
