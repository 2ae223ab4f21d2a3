"""LoRA files for the tests, written key by key in the layouts that are met in the field.

Every layout holds the same adapter, so that all of them must draw the same picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from helpers import seeded_noise
from safetensors.torch import save_file
from torch import Tensor, nn

Layout = Literal["peft", "diffusers", "kohya", "processors"]

Factors = dict[str, tuple[Tensor, Tensor]]
"""``unet.LAYER`` or ``text_encoder.LAYER`` → (down, up)."""

_PROCESSOR = {"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}


def draw_factors(
    unet: nn.Module,
    text_encoder: nn.Module | None = None,
    *,
    ends: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.2"),
    text_ends: tuple[str, ...] = ("q_proj", "v_proj", "out_proj", "fc1"),
    rank: int = 3,
    std: float = 0.15,
    seed: int = 0,
) -> Factors:
    """Random factors for the layers whose names end so; ranks alternate between ``rank`` and ``rank`` + 1."""
    found: Factors = {}
    for part, module, wanted in (("unet", unet, ends), ("text_encoder", text_encoder, text_ends)):
        if module is None:
            continue
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or not name.endswith(wanted):
                continue
            own = rank + len(found) % 2
            shape = layer.weight.shape
            down = seeded_noise((own, *shape[1:]), seed=seed + 2 * len(found)) * std
            up = seeded_noise((shape[0], own, *(1 for _ in shape[2:])), seed=seed + 2 * len(found) + 1) * std
            found[f"{part}.{name}"] = (down, up)
    return found


def write_lora(
    path: Path, factors: Factors, layout: Layout = "peft", *, alpha: float | None = None, config: Any = None
) -> Path:
    """Write ``factors``; ``alpha`` is every layer's own (kohya), ``config`` diffusers' metadata."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        for which, tensor in (("down", down), ("up", up)):
            tensors[_key(name, which, layout)] = tensor
        if layout == "kohya" and alpha is not None:
            tensors[f"{_kohya(name)}.alpha"] = torch.tensor(alpha)
    metadata = {"format": "pt"} | ({} if config is None else {"lora_adapter_metadata": json.dumps(config)})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Any tensors, for what must be refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    return path


def attention_only(factors: Factors) -> Factors:
    """What an attention-processor file can hold: the UNet's queries, keys, values and outputs."""
    return {name: pair for name, pair in factors.items() if name.startswith("unet.") and ".attn" in name}


def _key(name: str, which: str, layout: Layout) -> str:
    if layout == "peft":
        return f"{name}.lora_{'A' if which == 'down' else 'B'}.weight"
    if layout == "kohya":
        return f"{_kohya(name)}.lora_{which}.weight"
    end = next((end for end in _PROCESSOR if name.endswith(f".{end}")), None)
    if name.startswith("text_encoder."):
        return f"{name}.lora_linear_layer.{which}.weight"
    if end is None:
        return f"{name}.lora.{which}.weight"
    processor = f"{name.removesuffix(end)}processor.{_PROCESSOR[end]}.{which}.weight"
    return processor if layout == "diffusers" else processor.removeprefix("unet.")


def _kohya(name: str) -> str:
    part, _, layer = name.partition(".")
    layer = layer if part == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
    return f"lora_{'unet' if part == 'unet' else 'te'}_{layer.replace('.', '_')}"
