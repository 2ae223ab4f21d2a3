"""Adapters on a loaded model: added to its weights, exchanged, and taken off again bit for bit.

The sum is written into the layers' own weights, so that whatever reads them (the split and the sharing UNet, CUDA
graphs, an export) needs to know nothing of adapters, and a picture costs what it costs without. The weights that were
there are kept aside and copied back; they are never worked out by subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiue_cli.errors import AdapterError
from tiue_cli.files.png import LoraUse, same_effect
from tiue_cli.model.lora.files import find_lora
from tiue_cli.model.lora.layers import PARTS, Layers, Part, read_layers, touched_layers

HELD = 8
"""Adapters whose factors stay in memory after their use, so that a change back reads no file."""


class Adapters:
    """The adapters of one UNet and text encoder. The modules stay the caller's; only ``use`` changes their weights."""

    def __init__(self, *, unet: nn.Module, text_encoder: nn.Module) -> None:
        self._modules: dict[Part, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
        self._layers: dict[str, Layers] = {}
        self._originals: dict[tuple[Part, str], Tensor] = {}
        self._uses: tuple[LoraUse, ...] = ()

    @property
    def uses(self) -> tuple[LoraUse, ...]:
        """What is on the model now."""
        return self._uses

    @property
    def touched(self) -> frozenset[tuple[Part, str]]:
        """The layers whose weights are not their own now."""
        return frozenset(self._originals)

    @torch.no_grad()
    def use(self, uses: Sequence[LoraUse]) -> bool:
        """Put exactly these on the model, () none; returns whether its weights changed. Raises AdapterError.

        The sum is W + Σ weight · delta in float32, rounded once to the weights' precision. A failure changes nothing.
        """
        uses = tuple(uses)
        if same_effect(uses, self._uses):
            self._uses = uses
            return False
        layers = [self._load(use) for use in uses]
        touched = touched_layers(layers)
        self._restore()
        for part in PARTS:
            for name in touched[part]:
                weight = self._weight(part, name)
                # On the CPU: what is not in use should not take a GPU's memory.
                self._originals[part, name] = weight.detach().to("cpu", copy=True)
                total = weight.float()
                for use, each in zip(uses, layers, strict=True):
                    if name in each[part]:
                        total = total + use.weight * each[part][name].delta(weight.shape).to(weight.device)
                weight.copy_(total.to(weight.dtype))
        self._uses = uses
        return True

    def _restore(self) -> None:
        for (part, name), original in self._originals.items():
            self._weight(part, name).copy_(original)
        self._originals.clear()
        self._uses = ()

    def _weight(self, part: Part, name: str) -> Tensor:
        weight: Tensor = self._modules[part].get_submodule(name).weight  # type: ignore[assignment]
        return weight

    def _load(self, use: LoraUse) -> Layers:
        if use.sha256 not in self._layers:
            file = find_lora(use.source)
            if file.sha256 != use.sha256:
                raise AdapterError(
                    f"LoRA {file.path} is another file than when this began", hint="start again with the file it is now"
                )
            while len(self._layers) >= HELD:
                del self._layers[next(iter(self._layers))]
            self._layers[use.sha256] = read_layers(
                file.path, unet=self._modules["unet"], text_encoder=self._modules["text_encoder"]
            )
        return self._layers[use.sha256]
