"""Muon (Jordan et al. 2024): momentum, then every matrix of an update made orthogonal; AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic a x + b x³ + c x⁵, which moves singular values in (0, 1] to about 1 in five rounds."""
ROUNDS: Final = 5
SMALLEST: Final = 2000
"""Parameters with fewer elements are AdamW's, whatever their shape."""
ADAMW_SIZE: Final = 0.2
"""The root mean square of AdamW's updates, roughly: one learning rate serves both (Liu et al. 2025, Moonlight)."""


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (R, C) with its singular values moved to about 1 (0.68 to 1.2), its directions as they were.

    The rounds are polynomials in the Gram matrix of the shorter side, where they are cheap: the matrix itself is
    multiplied twice instead of ten times.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    scaled = matrix / (matrix.norm() + 1e-7)
    gram = scaled @ scaled.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    a, b, c = COEFFICIENTS
    whole = identity
    for _ in range(ROUNDS):
        step = a * identity + b * gram + c * gram @ gram
        whole = step @ whole
        gram = step @ gram @ step
    made: Tensor = whole @ scaled
    return made


class Muon(torch.optim.Optimizer):
    """Updates the large matrices of a network by Muon and the rest by AdamW, at learning rates of AdamW's size.

    Convolutions are matrices (out, in·k·k). ``betas[0]`` is Muon's momentum as well. Updates are scaled to the size of
    AdamW's. ``capturable``: the learning rates are tensors, and a step waits for nothing (CUDA graphs).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        values = list(parameters)
        matrices = [p for p in values if p.ndim >= 2 and p.numel() >= SMALLEST]
        known = set(map(id, matrices))
        rest = [p for p in values if id(p) not in known]
        groups = [{"params": part, "matrices": part is matrices} for part in (matrices, rest) if part]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": capturable}
        super().__init__(groups, defaults)
        if capturable:
            for group in self.param_groups:
                group["lr"] = torch.tensor(lr, device=group["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have gradients; there is no ``closure``."""
        assert closure is None
        for group in self.param_groups:
            values = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                for parameter in values:
                    self._turn(parameter, group)
            else:
                self._adamw(values, group)

    def _turn(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, (beta, _) = self.state[parameter], group["betas"]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - beta)
        update = orthogonal(parameter.grad.lerp(momentum, beta).reshape(len(parameter), -1))
        size = ADAMW_SIZE * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.view_as(parameter) * (group["lr"] * size))

    def _adamw(self, values: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in values]
        for parameter, state in zip(values, states, strict=True):
            if not state:
                device = parameter.device if group["capturable"] else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            list[Tensor](values),
            [parameter.grad for parameter in values if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
