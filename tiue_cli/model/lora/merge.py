"""A model with LoRAs in its weights, as a folder: what ``tiue merge`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from tiue_cli.errors import UsageError
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.model.components import Components, load_components
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.lora.adapters import Adapters
from tiue_cli.model.lora.files import lora_uses
from tiue_cli.model.student import save_student, student_of, write_parts

_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16}


def merge_loras(source: str | Path, out: Path, loras: Sequence[str], *, overwrite: bool = False) -> Path:
    """Write ``source``, a student or teacher, with ``loras`` (``SOURCE[:WEIGHT]``) in its weights; returns ``out``.

    In the precision of its UNet's weights; sums are made in float32 and rounded once. Raises UsageError, AdapterError,
    OutputError, and what loading the model raises.
    """
    if not loras:
        raise UsageError("no LoRA was given", hint="name one or several: --lora FILE")
    uses = lora_uses(loras)
    components = merged_components(source, loras)
    if components.info.kind == "student":
        student = student_of(components, source=str(source))
        student.manifest = student.manifest.model_copy(update={"loras": (*student.manifest.loras, *uses)})
        return save_student(student, out, overwrite=overwrite)
    with atomic_folder(out, overwrite=overwrite, marker="model_index.json") as folder:
        write_parts(components, folder)
    return out


def merged_components(source: str | Path, loras: Sequence[str]) -> Components:
    """The parts of a model on the CPU, in the precision of its UNet's weights, with ``loras`` in them."""
    stored = check_model_folder(resolve_model(source)).component("unet").dtypes
    dtype = _DTYPES.get(stored[0], torch.float32) if len(stored) == 1 else torch.float32
    components = load_components(source, dtype=dtype)
    Adapters(unet=components.unet, text_encoder=components.text_encoder).use(lora_uses(loras))
    return components
