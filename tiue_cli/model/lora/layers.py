"""LoRA tensors in one form, whatever wrote them: for each layer two factors and a scale.

    W' = W + weight · (alpha / rank) · up @ down                                  (Hu et al. 2021, section 4.1)

Names are brought into PEFT's by diffusers' own converters: its own files of all ages, kohya's and A1111's, attention
processors. What is left over after that is refused by name, for it would be missing from the pictures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from tiue_cli.base.text import excerpt
from tiue_cli.errors import AdapterError
from tiue_cli.files.access import has_file
from tiue_cli.model.components import quiet
from tiue_cli.model.lora.files import PEFT_CONFIG, PEFT_FILE
from tiue_cli.model.weights import read_json, some_of

Part = Literal["unet", "text_encoder"]
PARTS: Final[tuple[Part, ...]] = ("unet", "text_encoder")

_ROOTS: Final = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)\.")
_FACTOR: Final = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_ALPHA: Final = re.compile(r"(?P<layer>.+?)(\.lora_[AB](\.weight)?)?\.alpha")
_HINT_OTHER_MODEL: Final = "a LoRA belongs to one family: Stable Diffusion 1.x, 2.x, or papercut"


@dataclass(frozen=True)
class LoraLayer:
    """One layer's factors: ``down`` (rank, …) and ``up`` (out, rank, …); ``scale`` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: torch.Size) -> Tensor:
        """scale · up @ down in float32, in the layer's ``shape``: (out, in) or (out, in, kh, kw)."""
        return (self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())).reshape(shape)


Layers = dict[Part, dict[str, LoraLayer]]
"""For each part, layers by their module's name in it."""


def read_layers(path: Path, *, unet: nn.Module, text_encoder: nn.Module) -> Layers:
    """The layers of a checked LoRA file that fit this model. Raises AdapterError, which names what does not."""
    tensors, config = _read(path)
    named = _converted(tensors, unet, where=path)
    modules: dict[Part, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    found: Layers = {}
    left = set(named)
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): named[name] for name in named if name.startswith(f"{part}.")}
        left -= {f"{part}.{name}" for name in own}
        scales = _Scales.of(config, part)
        found[part] = _layers(_peft_names(own, part, modules[part]), scales, part=part, where=path)
        _check_fit(found[part], modules[part], part=part, where=path)
    if left:
        raise AdapterError(
            f"{path} holds tensors that belong to no part of the model: {some_of(sorted(left))}",
            hint=_HINT_OTHER_MODEL,
        )
    return found


# --- reading -------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the adapter's configuration by ``PART.field``): diffusers' in the file, PEFT's beside it."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        config = {} if text is None else json.loads(text)
    except Exception as error:  # the library's own exception, and JSON's
        raise AdapterError(f"{path} cannot be read: {excerpt(str(error))}", hint="download the file again") from error
    beside = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE and has_file(beside, error=AdapterError):
        config = {f"unet.{name}": value for name, value in read_json(beside).items()}
    return tensors, config if isinstance(config, dict) else {}


def _converted(tensors: dict[str, Tensor], unet: nn.Module, *, where: Path) -> dict[str, Tensor]:
    """Tensors and alphas by diffusers' names, with the part in front."""
    # PEFT's own prefix, and attention processors from before the parts were named.
    tensors = {_with_part(name.removeprefix("base_model.model.")): tensor for name, tensor in tensors.items()}
    config: Any = unet.config
    try:
        with quiet():
            named, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)
    except Exception as error:  # plain ValueErrors and KeyErrors of the converters, about the file
        raise AdapterError(
            f"{where} is no LoRA that diffusers can convert: {excerpt(' '.join(str(error).split()), 200)}",
            hint=_HINT_OTHER_MODEL,
        ) from error
    return {**named, **{name: torch.tensor(alpha) for name, alpha in (alphas or {}).items()}}


def _with_part(name: str) -> str:
    return f"unet.{name}" if _ROOTS.match(name) is not None else name


def _peft_names(tensors: Mapping[str, Tensor], part: Part, module: nn.Module) -> dict[str, Tensor]:
    if part == "unet":
        renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(tensors)
        return renamed
    # The map for the oldest names holds those for all later ones.
    renamed = convert_state_dict_to_peft(tensors, original_type=StateDictType.DIFFUSERS_OLD)
    # transformers 5 has one level of modules less.
    return renamed if hasattr(module, "text_model") else {k.removeprefix("text_model."): renamed[k] for k in renamed}


# --- layers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scales:
    """alpha / rank of a layer, where a configuration says; its patterns name layers by the end of their names."""

    alpha: float | None
    alphas: Mapping[str, float]
    root: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], part: Part) -> _Scales:
        fields = {name.removeprefix(f"{part}."): value for name, value in config.items() if name.startswith(f"{part}.")}
        alpha, patterns = fields.get("lora_alpha"), fields.get("alpha_pattern") or {}
        return cls(None if alpha is None else float(alpha), dict(patterns), bool(fields.get("use_rslora")))

    def scale(self, layer: str, *, rank: int, own: float | None) -> float:
        """``own`` is the alpha that lies beside the layer; without any the factors are meant as they are."""
        alpha = own if own is not None else self._of(layer)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.root else rank)

    def _of(self, layer: str) -> float | None:
        for pattern, alpha in self.alphas.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None:
                return float(alpha)
        return self.alpha


def _layers(tensors: Mapping[str, Tensor], scales: _Scales, *, part: Part, where: Path) -> dict[str, LoraLayer]:
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for name, tensor in tensors.items():
        if (match := _FACTOR.fullmatch(name)) is not None:
            factors.setdefault(match["layer"], {})[match["which"]] = tensor
        elif (match := _ALPHA.fullmatch(name)) is not None:
            alphas[match["layer"]] = float(tensor)
        else:
            unknown.append(name)
    unknown += sorted(alphas.keys() - factors.keys())
    if unknown:
        raise AdapterError(
            f"{where}: {some_of([f'{part}.{name}' for name in sorted(unknown)])} is nothing that a LoRA has",
            hint="the picture would lack it; plain LoRA has a down and an up factor, and an alpha, for each layer",
        )
    for layer, found in factors.items():
        if len(found) == 1:
            raise AdapterError(
                f"{where}: layer {part}.{layer} has only one of its two factors", hint="download the file again"
            )
        if found["A"].ndim < 2 or found["B"].ndim < 2 or found["A"].shape[0] != found["B"].shape[1]:
            raise AdapterError(
                f"{where}: the factors of {part}.{layer} do not fit each other: {_shape(found['A'])} and"
                f" {_shape(found['B'])}",
                hint="download the file again",
            )
    return {
        layer: LoraLayer(found["A"], found["B"], scales.scale(layer, rank=found["A"].shape[0], own=alphas.get(layer)))
        for layer, found in factors.items()
    }


def _check_fit(layers: Mapping[str, LoraLayer], module: nn.Module, *, part: Part, where: Path) -> None:
    modules = dict(module.named_modules())
    absent = sorted(layers.keys() - modules.keys())
    if absent:
        raise AdapterError(
            f"{where}: this model's {_WORDS[part]} has no layer {some_of(absent)}", hint=_HINT_OTHER_MODEL
        )
    for name, layer in layers.items():
        target = modules[name]
        if not isinstance(target, nn.Linear | nn.Conv2d):
            raise AdapterError(
                f"{where}: layer {name} of the {_WORDS[part]} is a {type(target).__name__}, not a linear or convolution"
                " layer",
                hint=_HINT_OTHER_MODEL,
            )
        shape = target.weight.shape
        if layer.up.shape[0] != shape[0] or layer.down[0].numel() != math.prod(shape[1:]) or _wide(layer.up):
            raise AdapterError(
                f"{where}: layer {name} of the {_WORDS[part]} is {_shape(target.weight)}, and the LoRA's factors are"
                f" {_shape(layer.down)} and {_shape(layer.up)}",
                hint=f"it was trained for another model; {_HINT_OTHER_MODEL}",
            )
        if not bool(torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()):
            raise AdapterError(f"{where}: layer {name} holds NaN or infinity", hint="its training went wrong")


_WORDS: Final = {"unet": "UNet", "text_encoder": "text encoder"}


def _wide(up: Tensor) -> bool:
    return math.prod(up.shape[2:]) != 1


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)


def touched_layers(layers: Iterable[Layers]) -> dict[Part, list[str]]:
    """The layers that any of the adapters changes, sorted, part by part."""
    found: dict[Part, set[str]] = {part: set() for part in PARTS}
    for each in layers:
        for part in PARTS:
            found[part] |= each[part].keys()
    return {part: sorted(names) for part, names in found.items()}
