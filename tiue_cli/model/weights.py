"""Files of a model folder: JSON configs and safetensors, checked by their headers. No torch, no weights in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from tiue_cli.errors import ModelFolderError
from tiue_cli.files.structured import parse_json

WEIGHT_STEMS: Final = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Component → the name of its weights before ``.safetensors``."""
DOWNLOAD_AGAIN: Final = "download or copy the file again"

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1}
_BUFFER_DTYPES = ("I64", "I32", "U8")  # position ids of old text encoders
_CONVERT_HINT = (
    "look for a version with .safetensors files, or convert it where you trust it: "
    "StableDiffusionPipeline.from_pretrained(SOURCE).save_pretrained(FOLDER, safe_serialization=True)"
)


class ComponentInfo(BaseModel):
    """The weights of one component, from the headers of its files."""

    model_config = ConfigDict(frozen=True)

    name: str
    class_name: str
    files: tuple[str, ...]
    variant: str | None
    """``fp16`` in ``diffusion_pytorch_model.fp16.safetensors``; None for the plain names."""
    parameters: int
    size_bytes: int
    dtypes: tuple[str, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises ModelFolderError naming the file."""
    try:
        # diffusers writes -Infinity into the configs of some solvers.
        data = parse_json(path.read_bytes(), infinities=True)
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing", hint="download or copy the folder again") from None
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise ModelFolderError(f"{path} is not JSON: {error}", hint=DOWNLOAD_AGAIN) from error
    if not isinstance(data, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, not {type(data).__name__}", hint=DOWNLOAD_AGAIN)
    return data


def inspect_weights(folder: Path, *, name: str, class_name: str) -> ComponentInfo:
    """Find and check one component's safetensors. ModelFolderError: pickles only, missing, truncated or damaged."""
    variant, files = _weight_files(folder, WEIGHT_STEMS[name])
    headers = [_safetensors_header(file) for file in files]
    tensors = [tensor for header in headers for tensor in header.values()]
    return ComponentInfo(
        name=name,
        class_name=class_name,
        files=tuple(file.name for file in files),
        variant=variant,
        parameters=sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["dtype"] not in _BUFFER_DTYPES),
        size_bytes=sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
    )


def _weight_files(folder: Path, stem: str) -> tuple[str | None, tuple[Path, ...]]:
    """The variant (None: the plain name) and its files, sharded or not; plain names win, then fp16."""
    plain = folder / f"{stem}.safetensors"
    if plain.is_file():
        return None, (plain,)
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return None, _shards(index)
    variants: dict[str, tuple[Path, ...]] = {}
    for file in folder.glob(f"{stem}.*.safetensors"):
        variant = file.name.removeprefix(f"{stem}.").removesuffix(".safetensors")
        if "-of-" not in variant:
            variants[variant] = (file,)
    for index in folder.glob(f"{stem}.safetensors.index.*.json"):
        variants.setdefault(index.name.split(".")[-2], _shards(index))
    if variants:
        variant = "fp16" if "fp16" in variants else sorted(variants)[0]
        return variant, variants[variant]
    pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ModelFolderError(
            f"{pickles[0]} is a pickle, which can run code when it is opened, and there is no safetensors beside it",
            hint=_CONVERT_HINT,
        )
    raise ModelFolderError(f"{plain} is missing", hint="download or copy the folder again")


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index}: field 'weight_map' is missing or empty", hint=DOWNLOAD_AGAIN)
    shards = tuple(index.parent / name for name in sorted({str(name) for name in weight_map.values()}))
    for shard in shards:
        if shard.parent != index.parent:
            raise ModelFolderError(f"{index}: shard {shard.name} lies outside its folder", hint=DOWNLOAD_AGAIN)
        if not shard.is_file():
            raise ModelFolderError(
                f"{shard} is missing; {index.name} lists it", hint="download or copy the folder again"
            )
    return shards


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file, with the size that it promises checked against the file's.

    Format: 8 bytes little-endian header length, JSON header, tensor bytes without gaps
    (https://github.com/huggingface/safetensors, "Format"). Raises ModelFolderError.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    if start == b"version " and size < 1024:
        raise ModelFolderError(f"{path} is a Git LFS pointer, not the weights", hint="fetch the files: git lfs pull")
    if len(start) < 8 or 8 + length > size:
        raise ModelFolderError(f"{path} is truncated or not a safetensors file ({size} bytes)", hint=DOWNLOAD_AGAIN)
    try:
        header = parse_json(raw)
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        sizes = sum(_tensor_bytes(tensor) for tensor in tensors.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelFolderError(f"{path}: its header is damaged", hint=DOWNLOAD_AGAIN) from error
    if not tensors:
        raise ModelFolderError(f"{path} holds no weights", hint=DOWNLOAD_AGAIN)
    if 8 + length + end != size or sizes != end:
        raise ModelFolderError(
            f"{path} is truncated or damaged: {size} bytes, and its header promises {8 + length + end}",
            hint=DOWNLOAD_AGAIN,
        )
    return tensors


def _tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """Bytes of one tensor by its shape; by its offsets where the dtype is none that we know."""
    start, end = tensor["data_offsets"]
    item = _DTYPE_BYTES.get(tensor["dtype"])
    return int(end) - int(start) if item is None else item * math.prod(tensor["shape"])
