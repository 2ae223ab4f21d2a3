"""What a distillation tells its caller while it runs; the caller owns the display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Note:
    """A sentence that the user should know."""

    text: str


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of a stage. ``figures`` are its numbers of now, e.g. losses by name."""

    stage: Literal["text states", "pairs", "warm start", "distillation"]
    done: int
    total: int
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


Event = Note | Progress | Saved | Finished
