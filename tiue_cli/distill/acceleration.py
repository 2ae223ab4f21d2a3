"""Accelerate, set up from the config and from what ``accelerate launch`` said."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from tiue_cli.distill.config import DistillConfig
from tiue_cli.errors import UsageError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of frozen weights under Accelerate's names of mixed precision."""

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""One process may fill a cache for hours while the others wait."""


def make_accelerator(config: DistillConfig) -> Accelerator:
    """The Accelerator of a run. Raises UsageError for what Accelerate refuses."""
    precision = None if config.precision == "auto" else _PRECISIONS[config.precision]
    if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "no"
    try:
        return Accelerator(
            mixed_precision=precision,
            log_with=list(config.tracking.trackers) or None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"accelerate refuses these settings: {error}", hint="see precision and tracking.trackers"
        ) from error
