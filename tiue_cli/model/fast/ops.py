"""The few operations that are worth fusing, twice: in torch (what they mean, and what a compiler fuses), in Triton.

Tensors are (rows, C, h, w) in channels-last memory; rows are image-major (row b·K + k is image b at timestep k), so
``repeats`` = K rows in turn belong to one image.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Ops(Protocol):
    """Where a method takes a tensor to add to, it may do so in place: the caller goes on with what is returned."""

    def group_norm(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        """Group norm of ``cat([inputs, skip]) + shift``, and SiLU where ``silu``.

        ``inputs`` (R, C', h, w) and ``skip`` (R / repeats, C - C', h, w) may be slices of channels; ``shift`` (S, C):
        row r takes shift r mod S.
        """

    def add_rows(self, total: Tensor, addend: Tensor | None, bias: Tensor | None = None, *, repeats: int = 1) -> Tensor:
        """``total`` (R, C, h, w) plus ``addend`` (R / repeats, C, h, w), each row ``repeats`` times, plus bias (C,)."""

    def double(self, hidden: Tensor) -> Tensor:
        """Nearest upsampling: (R, C, h, w) → (R, C, 2h, 2w)."""

    def geglu(self, projected: Tensor) -> Tensor:
        """(…, 2D) → (…, D): the first half times the GELU of the second."""

    def quick_gelu(self, values: Tensor) -> Tensor:
        """x · sigmoid(1.702 x): CLIP's activation."""

    def add_layer_norm(
        self, tokens: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum (…, D), and its layer norm."""


class TorchOps:
    """The meaning of each, in torch; differentiable."""

    def group_norm(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        """See ``Ops``."""
        rows = inputs.shape[0]
        if skip is not None:
            inputs = torch.cat([inputs, skip if repeats == 1 else skip.repeat_interleave(repeats, dim=0)], dim=1)
        if shift is not None:
            inputs = inputs + shift.repeat(rows // shift.shape[0], 1)[:, :, None, None]
        hidden = F.group_norm(inputs, groups, weight, bias, eps)
        return F.silu(hidden) if silu else hidden

    def add_rows(self, total: Tensor, addend: Tensor | None, bias: Tensor | None = None, *, repeats: int = 1) -> Tensor:
        """See ``Ops``."""
        if addend is not None and repeats == 1:
            total = total + addend
        elif addend is not None:
            total = (total.unflatten(0, (-1, repeats)) + addend[:, None]).flatten(0, 1)
        return total if bias is None else total + bias[:, None, None]

    def double(self, hidden: Tensor) -> Tensor:
        """See ``Ops``."""
        return F.interpolate(hidden, scale_factor=2.0, mode="nearest")

    def geglu(self, projected: Tensor) -> Tensor:
        """See ``Ops``."""
        value, gate = projected.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def quick_gelu(self, values: Tensor) -> Tensor:
        """See ``Ops``."""
        return values * torch.sigmoid(1.702 * values)

    def add_layer_norm(
        self, tokens: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        total = tokens if addend is None else tokens + addend
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)


class TritonOps:
    """Each as one or two kernels of ``triton_kernels``; for inference, on CUDA."""

    def __init__(self) -> None:
        # Here rather than at the top: torch without CUDA comes without Triton.
        from tiue_cli.model.fast import triton_kernels

        self._kernels = triton_kernels

    def group_norm(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        groups: int,
        eps: float,
        silu: bool,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        """See ``Ops``."""
        return self._kernels.group_norm(
            inputs, skip, shift, weight, bias, groups=groups, eps=eps, silu=silu, repeats=repeats
        )

    def add_rows(self, total: Tensor, addend: Tensor | None, bias: Tensor | None = None, *, repeats: int = 1) -> Tensor:
        """See ``Ops``."""
        return self._kernels.add_rows(total, addend, bias, repeats=repeats)

    def double(self, hidden: Tensor) -> Tensor:
        """See ``Ops``."""
        return self._kernels.double(hidden)

    def geglu(self, projected: Tensor) -> Tensor:
        """See ``Ops``."""
        return self._kernels.geglu(projected)

    def quick_gelu(self, values: Tensor) -> Tensor:
        """See ``Ops``."""
        return self._kernels.quick_gelu(values)

    def add_layer_norm(
        self, tokens: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        return self._kernels.add_layer_norm(tokens, addend, weight, bias, eps=eps)
