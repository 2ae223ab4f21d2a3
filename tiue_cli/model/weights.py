"""Files of a model folder: JSON configs and safetensors, checked by their headers. No torch, no weights in memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from tiue_cli.errors import ModelFolderError, TiueError
from tiue_cli.files.access import access_error, is_file, list_folder, open_file, read_bytes
from tiue_cli.files.structured import parse_json

WEIGHT_STEMS: Final = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
"""Component → the name of its weights before ``.safetensors``."""
MAX_JSON_BYTES: Final = 256 * 2**20
"""Tokenizers and shard indexes are a hundredth of this: what is larger is no config."""
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
    tensors: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises ModelFolderError naming the file."""
    try:
        # diffusers writes -Infinity into the configs of some solvers.
        data = parse_json(read_bytes(path, error=ModelFolderError, limit_bytes=MAX_JSON_BYTES), infinities=True)
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing", hint="download or copy the folder again") from None
    except ValueError as error:
        raise ModelFolderError(f"{path} is not JSON: {error}", hint=DOWNLOAD_AGAIN) from error
    if not isinstance(data, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, not {type(data).__name__}", hint=DOWNLOAD_AGAIN)
    return data


def inspect_weights(folder: Path, *, name: str, class_name: str) -> ComponentInfo:
    """Find and check one component's safetensors. ModelFolderError: pickles only, missing, truncated or damaged."""
    variant, files, _ = weight_files(folder, name=name)
    headers = [safetensors_header(file) for file in files]
    refuse_foreign_tensors((name for header in headers for name in header), where=folder)
    tensors = [tensor for header in headers for tensor in header.values()]
    return ComponentInfo(
        name=name,
        class_name=class_name,
        files=tuple(file.name for file in files),
        variant=variant,
        parameters=sum(math.prod(tensor["shape"]) for tensor in tensors if tensor["dtype"] not in _BUFFER_DTYPES),
        size_bytes=sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors),
        dtypes=tuple(sorted({tensor["dtype"] for tensor in tensors})),
        tensors=len(tensors),
    )


IGNORABLE_TENSORS: Final = re.compile(
    r"position_ids$|^text_projection\.|^logit_scale$|^vision_model\.|^visual_projection\.|(^|\.)num_batches_tracked$"
)
"""Tensors of weights files that mean nothing to the part that is loaded: buffers, and the other half of CLIP."""
_FOREIGN: Final = (
    (
        re.compile(r"\.base_layer\."),
        "a LoRA that was not fused (peft's base_layer)",
        "fuse it: pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(FOLDER)",
    ),
    (
        re.compile(r"(^|[._])lora([._]|$)|lora_(A|B|down|up|magnitude)"),
        "LoRA tensors beside the weights",
        "fuse them: pipe.load_lora_weights(LORA); pipe.fuse_lora(); pipe.unload_lora_weights();"
        " pipe.save_pretrained(FOLDER)",
    ),
    (
        re.compile(r"^(module|_orig_mod)\."),
        "names with the prefix of DistributedDataParallel or torch.compile",
        'strip it: {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in'
        " weights.items()}, and save that",
    ),
    (
        re.compile(r"motion_modules\."),
        "motion modules (AnimateDiff)",
        "give the model without them: tiue makes single images",
    ),
    (re.compile(r"(^|\.)(ip_adapter|to_k_ip|to_v_ip)\b"), "an IP adapter", "give the model without it"),
)


def refuse_foreign_tensors(names: Iterable[str], *, where: Path) -> None:
    """Refuse tensors that the loaders would drop silently and that change the pictures. Raises ModelFolderError.

    By their names alone, so that ``inspect`` says it as well; what is left over for other reasons is found when the
    weights are loaded.
    """
    names = list(names)
    for pattern, what, remedy in _FOREIGN:
        found = sorted(name for name in names if pattern.search(name) is not None)
        if found:
            raise ModelFolderError(f"{where}: the weights hold {what}: {some_of(found)}", hint=remedy)


def some_of(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


class WeightFiles(NamedTuple):
    """The weights that the loader takes: variant (None: the plain names), files, and the index that lists shards."""

    variant: str | None
    files: tuple[Path, ...]
    index_file: Path | None


def weight_files(folder: Path, *, name: str) -> WeightFiles:
    """Which weights of a component's folder are loaded: the one rule for checks, counts, hashes and the loader.

    Plain names before variants, fp16 before other variants. Where shards with an index lie beside a single file,
    diffusers takes the shards and transformers the single file. Raises ModelFolderError: none, or pickles only.
    """
    stem, index_first = WEIGHT_STEMS[name], name != "text_encoder"
    files = {file.name: file for file in list_folder(folder, error=ModelFolderError)}
    variants = [None, *sorted(_variants(files, stem), key=lambda variant: (variant != "fp16", variant))]
    for variant in variants:
        found = _of_variant(files, stem, variant, index_first=index_first)
        if found is not None:
            return WeightFiles(variant, *found)
    pickles = [file for file in files.values() if file.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise ModelFolderError(
            f"{pickles[0]} is a pickle, which can run code when it is opened, and there is no safetensors beside it",
            hint=_CONVERT_HINT,
        )
    raise ModelFolderError(f"{folder / f'{stem}.safetensors'} is missing", hint="download or copy the folder again")


def _of_variant(
    files: Mapping[str, Path], stem: str, variant: str | None, *, index_first: bool
) -> tuple[tuple[Path, ...], Path | None] | None:
    """(weights, index or None) of one variant; None where there are none."""
    end = "" if variant is None else f".{variant}"
    # The second name of an index is what older diffusers wrote.
    names = [f"{stem}.safetensors.index{end}.json", *([f"{stem}.safetensors{end}.index.json"] if end else [])]
    index = next((files[name] for name in names if name in files), None)
    single = files.get(f"{stem}{end}.safetensors")
    if index is not None and (index_first or single is None):
        return _shards(index), index
    return None if single is None else ((single,), None)


def _variants(files: Iterable[str], stem: str) -> set[str]:
    """The variants that there are names of: ``fp16`` of ``STEM.fp16.safetensors`` and of its index."""
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<file>[^.]+)\.safetensors"
        r"|\.safetensors\.index\.(?P<index>[^.]+)\.json|\.safetensors\.(?P<old>[^.]+)\.index\.json)"
    )
    found = (pattern.fullmatch(name) for name in files)
    names = {next(group for group in match.groups() if group is not None) for match in found if match is not None}
    return {name for name in names if "-of-" not in name}


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index}: field 'weight_map' is missing or empty", hint=DOWNLOAD_AGAIN)
    shards = tuple(index.parent / name for name in sorted({str(name) for name in weight_map.values()}))
    for shard in shards:
        if shard.parent != index.parent:
            raise ModelFolderError(f"{index}: shard {shard.name} lies outside its folder", hint=DOWNLOAD_AGAIN)
        if not is_file(shard, error=ModelFolderError):
            raise ModelFolderError(
                f"{shard} is missing; {index.name} lists it", hint="download or copy the folder again"
            )
    return shards


def safetensors_header(path: Path, *, error: type[TiueError] = ModelFolderError) -> dict[str, Any]:
    """The tensor table of a safetensors file, with the size that it promises checked against the file's.

    Format: 8 bytes little-endian header length, JSON header, tensor bytes without gaps
    (https://github.com/huggingface/safetensors, "Format"). Raises ``error``.
    """
    try:
        with open_file(path, error=error) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if 8 + length <= size else b""
    except OSError as failure:
        raise access_error(path, failure, error=error) from failure
    if start == b"version " and size < 1024:
        raise error(f"{path} is a Git LFS pointer, not the weights", hint="fetch the files: git lfs pull")
    if len(start) < 8 or 8 + length > size:
        raise error(f"{path} is truncated or not a safetensors file ({size} bytes)", hint=DOWNLOAD_AGAIN)
    try:
        header = parse_json(raw)
        tensors = {name: _checked_tensor(tensor) for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        sizes = sum(_tensor_bytes(tensor) for tensor in tensors.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as failure:
        raise error(f"{path}: its header is damaged", hint=DOWNLOAD_AGAIN) from failure
    if not tensors:
        raise error(f"{path} holds no weights", hint=DOWNLOAD_AGAIN)
    if 8 + length + end != size or sizes != end:
        raise error(
            f"{path} is truncated or damaged: {size} bytes, and its header promises {8 + length + end}",
            hint=DOWNLOAD_AGAIN,
        )
    return tensors


def tensor_names(path: Path, *, error: type[TiueError] = ModelFolderError) -> list[str]:
    """What the tensors of a safetensors file are called. Raises ``error``."""
    return list(safetensors_header(path, error=error))


def _checked_tensor(tensor: Any) -> dict[str, Any]:
    """An entry of the table with the types that the format prescribes. Raises ValueError."""
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    # type(), as True is an int as well; the bound keeps a product of sizes printable.
    fits = all(type(number) is int and 0 <= number < 2**48 for number in numbers)
    if not isinstance(dtype, str) or not fits or len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > 16:
        raise ValueError("an entry of another type")
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _tensor_bytes(tensor: Mapping[str, Any]) -> int:
    """Bytes of one tensor by its shape; by its offsets where the dtype is none that we know."""
    start, end = tensor["data_offsets"]
    item = _DTYPE_BYTES.get(tensor["dtype"])
    return int(end) - int(start) if item is None else item * math.prod(tensor["shape"])
