"""Which training a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.student_run import StudentRun


def open_run(
    config: DistillConfig, out: Path, *, resume: bool = False, acknowledge: Callable[[], None] | None = None
) -> StudentRun[Any]:
    """A distillation, or with ``quantize.precision`` a quantisation-aware one; see ``StudentRun``. Raises TiueError."""
    if config.quantize.precision is not None:
        from tiue_cli.distill.quantized_run import QuantizedRun

        return QuantizedRun(config, out, resume=resume, acknowledge=acknowledge)
    from tiue_cli.distill.loop import Distillation

    return Distillation(config, out, resume=resume, acknowledge=acknowledge)
