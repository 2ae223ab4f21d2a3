"""LoRA files: from what a user types to a checked safetensors file with its hash. No torch, no weights in memory.

    FILE | FOLDER | OWNER/NAME[/FILE][:WEIGHT]  ─ find_lora ─▶  LoraFile

What a file holds is known by its tensors' names. What we cannot add to a model is refused here, by its own name.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiue_cli.base.text import excerpt
from tiue_cli.errors import AdapterError, UsageError
from tiue_cli.files.access import exists, is_file, is_folder, list_folder, open_file, user_path
from tiue_cli.files.png import LoraUse
from tiue_cli.files.students import LORA_FILE
from tiue_cli.model.hub import download_files, is_hub_id, list_hub_files
from tiue_cli.model.parts import PACKAGED
from tiue_cli.model.weights import some_of, tensor_names

PEFT_FILE: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"
MAX_WEIGHT: Final = 100.0
"""Beyond this a weight is a slip: useful ones lie between -2 and 2."""

_HUB_FILE = re.compile(r"(?P<hub_id>[^/]+/[^/]+)/(?P<file>.+\.safetensors)")
_EMBEDDED_NAME = re.compile(r"papercut-[a-z]+")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_REFUSED: Final = (
    (r"dora_scale|lora_magnitude_vector", "DoRA", "a weight-decomposed LoRA"),
    (r"\.lokr_", "LoKr", "Kronecker products"),
    (r"\.hada_", "LoHa", "Hadamard products"),
    (r"\.oft_|oft_blocks", "OFT", "orthogonal rotations"),
    (r"lora_mid\.", "LoCon with a Tucker core (lora_mid)", "three factors a layer"),
    (r"\.glora_|\.(a1|a2|b1|b2)\.weight$", "GLoRA", "generalised LoRA"),
    (r"\.on_input$", "(IA)^3", "scales of activations"),
    (r"\.(diff|diff_b)$", "full differences (LyCORIS 'full')", "whole weights"),
    (r"lora_(B|up)\.bias$", "LoRA with biases (lora_bias)", "biases beside the factors"),
    (r"^bundle_emb|^emb_params$|string_to_param", "a textual inversion", "embeddings of new words"),
)
_OTHER_MODELS: Final = (
    (r"double_blocks|single_transformer_blocks|single_blocks", "Flux"),
    (r"^(transformer\.|diffusion_model\.|lora_transformer_)|joint_blocks|txt_attn", "a diffusion transformer"),
    # Stable Diffusion 1.x and 2.x have one transformer block in each attention.
    (r"^(lora_te2_|text_encoder_2\.)|transformer_blocks[._][1-9][._]", "SDXL"),
)
_LORA_NAME = re.compile(r"(^|[._])lora([._]|$)|lora_(A|B|down|up)\b")


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA file; ``sha256`` is that of the file, 64 hexadecimal digits."""

    path: Path
    sha256: str


# --- what is typed -------------------------------------------------------------------------------------------------


def parse_lora(text: str) -> tuple[str, float]:
    """(source, weight) of ``SOURCE[:WEIGHT]``; weight 1 where none is given. Raises UsageError.

    A file whose own name ends in ``:0.5`` is that file.
    """
    source, colon, weight = text.rpartition(":")
    if not colon or not source or exists(text, error=AdapterError) or not _is_number(weight):
        return text, 1.0
    return source, check_weight(float(weight), text)


def check_weight(weight: float, where: str) -> float:
    """``weight`` where it is one; UsageError that names ``where`` it was given."""
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise UsageError(
            f"{excerpt(where)}: {weight:g} is not a weight of a LoRA",
            hint=f"give a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; 1 is as it was trained",
        )
    return weight


def lora_use(text: str) -> LoraUse:
    """What ``SOURCE[:WEIGHT]`` asks for, found, checked and hashed. Raises UsageError, AdapterError."""
    source, weight = parse_lora(text)
    return LoraUse(source=source, weight=weight, sha256=find_lora(source).sha256)


def lora_uses(texts: Iterable[str]) -> tuple[LoraUse, ...]:
    """``lora_use`` of several; one that is named twice would be added twice, which is refused. Raises UsageError."""
    uses = tuple(lora_use(text) for text in texts)
    for number, use in enumerate(uses):
        if use.sha256 in {other.sha256 for other in uses[:number]}:
            raise UsageError(f"LoRA {use.source} is given twice", hint="give it once, with the sum of the weights")
    return uses


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- what is found -------------------------------------------------------------------------------------------------


def find_lora(source: str) -> LoraFile:
    """The LoRA file that ``source`` names: a file, a folder, or a hub id. Raises AdapterError.

    A folder holds ``pytorch_lora_weights.safetensors``, ``adapter_model.safetensors`` or a single ``.safetensors``; a
    repository of the hub likewise, or its file is named: ``OWNER/NAME/FILE.safetensors``.
    """
    path = _embedded(source) or _local(source) or _from_hub(source)
    return _checked(path, _stamp(path))


def _embedded(source: str) -> Path | None:
    """The adapter of that name in the package, for the embedded model; it goes before a file that lies here."""
    path = PACKAGED / "loras" / f"{source}.safetensors"
    return path if _EMBEDDED_NAME.fullmatch(source) is not None and is_file(path, error=AdapterError) else None


def _local(source: str) -> Path | None:
    """The file here that ``source`` names; None where it can only mean the hub."""
    path = user_path(source, error=AdapterError)
    if is_folder(path, error=AdapterError):
        return _in_folder(path)
    if is_file(path, error=AdapterError):
        if path.suffix.lower() in _PICKLES:
            raise AdapterError(
                f"{path} is a pickle, which can run code when it is opened",
                hint="look for a .safetensors version of the LoRA",
            )
        if path.suffix.lower() != ".safetensors":
            raise AdapterError(
                f"{path} is no LoRA: not a .safetensors file", hint="give a .safetensors file or a folder"
            )
        return path
    match = _HUB_FILE.fullmatch(source)
    if is_hub_id(source) or (match is not None and is_hub_id(match["hub_id"])):
        return None
    raise AdapterError(f"LoRA {path} does not exist", hint="check the path, or give a hub id OWNER/NAME")


def _in_folder(folder: Path) -> Path:
    files = {file.name: file for file in list_folder(folder, error=AdapterError)}
    return files[_choose(sorted(files), where=str(folder))]


def _from_hub(source: str) -> Path:
    match = _HUB_FILE.fullmatch(source)
    hub_id = source if match is None else match["hub_id"]
    name = _choose(list_hub_files(hub_id), where=hub_id) if match is None else match["file"]
    folder = download_files(hub_id, [name, PEFT_CONFIG])
    if not is_file(folder / name, error=AdapterError):
        raise AdapterError(f"{hub_id} has no file {name}", hint=f"see https://huggingface.co/{hub_id}/tree/main")
    return folder / name


def _choose(names: Iterable[str], *, where: str) -> str:
    """Which of the files is the LoRA. Raises AdapterError."""
    names = list(names)
    for usual in (LORA_FILE, PEFT_FILE):
        if usual in names:
            return usual
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(found) == 1:
        return found[0]
    if not found:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        raise AdapterError(
            f"{where} holds no LoRA ({LORA_FILE})" + (f", only a pickle ({pickles[0]})" if pickles else ""),
            hint="give a .safetensors file; pickles can run code and are not opened",
        )
    raise AdapterError(
        f"{where} holds {len(found)} .safetensors files, and which is meant is not clear",
        hint=f"name one: {where}/{found[0]}",
    )


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when the file does: its size and its time."""
    with open_file(path, error=AdapterError) as file:
        status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _checked(path: Path, stamp: tuple[int, int]) -> LoraFile:
    """The file, once its tensors' names have been looked at; ``stamp`` makes a changed file another one."""
    refuse_other_adapters(tensor_names(path, error=AdapterError), where=path)
    with open_file(path, error=AdapterError) as file:
        return LoraFile(path, hashlib.file_digest(file, "sha256").hexdigest())


def refuse_other_adapters(names: Iterable[str], *, where: Path) -> None:
    """Refuse, by its name, what is no LoRA of Stable Diffusion 1.x or 2.x. Raises AdapterError."""
    names = list(names)
    for pattern, kind, what in _REFUSED:
        found = sorted(name for name in names if re.search(pattern, name) is not None)
        if found:
            raise AdapterError(
                f"{where} is {kind}: {what} ({some_of(found)})",
                hint="plain LoRA is supported (up and down factors of linear and convolution layers)",
            )
    for pattern, family in _OTHER_MODELS:
        found = sorted(name for name in names if re.search(pattern, name) is not None)
        if found:
            raise AdapterError(
                f"{where} was made for {family} ({some_of(found)})",
                hint="tiue takes LoRAs of Stable Diffusion 1.x and 2.x",
            )
    if not any(_LORA_NAME.search(name) for name in names):
        raise AdapterError(
            f"{where} holds no LoRA: none of its {len(names)} tensors is named like one (the first is"
            f" {excerpt(min(names, default='none'))})",
            hint="a whole model goes to --model, an autoencoder to --vae",
        )
