"""What a distillation or a bench tells its caller while it runs; the caller owns the display."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Note:
    """A sentence that the user should know."""

    text: str


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of a stage: steps, parts loaded, runs timed, images drawn.

    ``detail`` says what runs, ``figures`` are numbers of now, e.g. losses by name.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """Something was written to disk, completely."""

    kind: Literal["checkpoint", "grid", "student"]
    path: Path


@dataclass(frozen=True)
class Finished:
    """The last event. ``interrupted``: stopped by ``signal``, and to be continued with --resume."""

    out: Path
    student: Path | None
    step: int
    interrupted: bool
    signal: int | None = None


BenchEvent = Note | Progress
Emit = Callable[[BenchEvent], None]
Event = Note | Progress | Saved | Finished
