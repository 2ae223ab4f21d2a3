"""Which part of a model is the first that is not finite: said by name, as every later part passes NaN on."""

from __future__ import annotations

import torch
from torch import nn

from tiue_cli.errors import DeviceError, ModelFolderError


class BadLatentsError(DeviceError):
    """NaN or infinity came before the autoencoder; whoever has the other parts can say from which."""


def bad_weight(module: nn.Module) -> str | None:
    """The name of the first weight or buffer with NaN or infinity; None where all are finite."""
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return name
    return None


def refuse_bad_weights(part: str, module: nn.Module, *, instead: str = "another model") -> None:
    """Raise ModelFolderError where a weight of ``part`` is NaN or infinity."""
    name = bad_weight(module)
    if name is not None:
        raise ModelFolderError(
            f"the {part}'s weights hold NaN or infinity ({name})",
            hint=f"download or copy them again, or use {instead}",
        )


def not_finite(part: str, module: nn.Module, *, instead: str = "another model") -> DeviceError:
    """The error for a ``part`` whose output holds NaN or infinity. Raises ModelFolderError where its weights do."""
    refuse_bad_weights(part, module, instead=instead)
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    hint = f"use {instead}" if dtype == "float32" else f"use float32: --precision fp32; or {instead}"
    return DeviceError(f"the {part} produced NaN or infinity in {dtype}", hint=hint)
