"""LoRA adapters that are added to the weights of a frozen network, instead of being run beside its layers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class MergedAdapters(nn.Module):
    """W + scale·B·A of every adapted layer, with the gradients of A and B.

    Takes the adapters that peft has put into a network out of it again: the network is then what it was, and calls none
    of peft's code. Linear layers of one shape are computed together, as there are many and they are small.
    """

    def __init__(self, network: nn.Module, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        adapters = {name: value for name, value in network.named_parameters() if ".lora_" in name}
        self._names = list(adapters)
        self._values = nn.ParameterList(adapters.values())
        shapes: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                base: Any = layer.get_base_layer()
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, base)
                # A convolution is alone.
                shapes[tuple(base.weight.shape) if isinstance(base, nn.Linear) else name].append((name, base))
        # No buffers: several processes would send them to each other in every step.
        self._groups: list[tuple[tuple[str, ...], Tensor]] = []
        for group in shapes.values():
            weights = torch.stack([base.weight.detach() for _, base in group])
            self._groups.append((tuple(name for name, _ in group), weights))
            for (_, base), weight in zip(group, weights, strict=True):
                base.weight = nn.Parameter(weight, requires_grad=False)  # a view: it is not held twice

    def named(self) -> dict[str, nn.Parameter]:
        """The adapters under the names that peft gave them, in the network's order."""
        return dict(zip(self._names, self._values, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """The sum of every adapted layer, by the name of its weight."""
        adapters = self.named()
        result: dict[str, Tensor] = {}
        for names, base in self._groups:
            a, b = (
                torch.stack([adapters[f"{name}.lora_{side}.default.weight"].flatten(1) for name in names])
                for side in ("A", "B")
            )
            if base.dim() == 3:
                sums = torch.baddbmm(base, b, a, alpha=self.scale)
            else:
                sums = base.add(torch.bmm(b, a).reshape(base.shape), alpha=self.scale)
            result |= {f"{name}.weight": value for name, value in zip(names, sums.unbind(), strict=True)}
        return result
