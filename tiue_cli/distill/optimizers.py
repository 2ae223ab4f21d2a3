"""Optimisers, and how the learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tiue_cli.distill.config import Decay, LoraSettings, OptimizerSettings
from tiue_cli.errors import MissingDependencyError


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings | LoraSettings) -> Any:
    """AdamW over the parameters. Raises MissingDependencyError for the 8-bit one without bitsandbytes."""
    values = list(parameters)
    if isinstance(settings, LoraSettings):
        return torch.optim.AdamW(values, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0, fused=True)
    arguments = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(values, fused=True, **arguments)  # type: ignore[arg-type]
    try:
        import bitsandbytes
    except ImportError:
        raise MissingDependencyError(
            "optimizer.name adamw8bit needs bitsandbytes",
            hint='install it: python -m pip install "tiue[adam8bit]", or use adamw',
        ) from None
    return bitsandbytes.optim.AdamW8bit(values, **arguments)


def rate_factor(done: int, length: int, *, warmup_steps: int, decay: Decay) -> float:
    """The learning rate at step ``done`` of ``length`` as a share of its setting: linear rise, then the decay."""
    rise = min(1.0, (done + 1) / (warmup_steps + 1))
    progress = min(1.0, done / max(1, length))
    if decay == "linear":
        return rise * (1.0 - progress)
    if decay == "cosine":
        return rise * 0.5 * (1.0 + math.cos(math.pi * progress))
    return rise
