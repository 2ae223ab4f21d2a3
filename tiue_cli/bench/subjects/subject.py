"""A thing that a bench measures: prompts and noise in, pictures and the times of their stages out.

Every subject gets the same prompts, the same noise (drawn from the seeds), the same size and precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiue_cli.bench.measure.clock import StageClock, StageMs, WallClock
from tiue_cli.bench.report.schema import Stage, SubjectRecord

Draw = Callable[[Sequence[str], np.ndarray], np.ndarray]
"""Pictures (B, H, W, 3) uint8, one a prompt, from noise (B, C, h, w) float32."""


@dataclass(frozen=True)
class Outcome:
    """Pictures (B, H, W, 3) uint8 of one run, and milliseconds of its stages."""

    images: np.ndarray
    stage_ms: StageMs


@dataclass
class Subject:
    """One thing that is measured, held ready. ``draw`` times its stages with ``clock``.

    ``flops`` counts each stage of a run of so many images; it is empty where they cannot be counted.
    """

    record: SubjectRecord
    draw: Draw
    clock: StageClock = field(default_factory=WallClock)
    flops: Callable[[int], dict[Stage, float]] = lambda batch: {}
    compiles: bool = False
    """Whether the first call at a batch builds something, so that it is build time and no latency."""
    timed: bool = True
    """Else it serves as a reference only."""
    reference: str | None = None
    """Key of the subject whose pictures must be these."""
    plain_pass: str | None = None
    """Key of the plain UNet pass to compare with."""
    unverified: str | None = None
    """Why nothing says that its pictures are right; None where something does, or nothing has to."""

    @property
    def key(self) -> str:
        """``SubjectRecord.key``."""
        return self.record.key

    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        """Draw once, with the times of this run's stages."""
        return Outcome(self.draw(prompts, noise), self.clock.take_ms())
