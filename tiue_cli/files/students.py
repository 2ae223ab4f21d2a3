"""What ``tiue.json`` of a student's folder holds."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.files.png import LoraUse

STUDENT_MANIFEST = "tiue.json"
"""Name of the manifest beside a student's model_index.json."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name of the file in an adapter's folder."""

RUN_MANIFEST = "run.json"
"""Name of the record in the folder of a distillation, whose result lies in its ``student/``."""


_Timestep = Annotated[int, Field(ge=0)]


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BaseModelSource(pydantic.BaseModel):
    """The model that an adapter belongs to: what it was called (a folder or hub id), and its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    sha256: _Sha256


class StudentManifest(pydantic.BaseModel):
    """What a student folder is beyond the weights, stored as ``tiue.json``.

    ``decoder_timesteps`` run from noise to image (descending); ``encoder_timestep`` is the one the UNet encoder was
    trained at, the first of them unless a recipe said otherwise. ``prediction_type`` says what each decoder output is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: int = 1
    kind: Literal["student"] = "student"
    decoder_timesteps: tuple[_Timestep, ...] = Field(min_length=1)
    encoder_timestep: _Timestep
    spacing: Literal["leading", "trailing", "explicit"]
    prediction_type: Literal["epsilon", "v_prediction"]
    teacher: str
    teacher_sha256: _Sha256 | None = None
    recipe_sha256: _Sha256 | None = None
    training_steps: int = Field(default=0, ge=0)
    license: str = "unknown"
    base: BaseModelSource | None = Field(default=None, exclude_if=lambda base: base is None)
    """What the folder's adapter belongs to; None for a full student."""
    loras: tuple[LoraUse, ...] = Field(default=(), exclude_if=lambda loras: not loras)
    """Adapters that are in its weights."""
    tiue_version: str

    @pydantic.field_validator("decoder_timesteps")
    @classmethod
    def _descending(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
            raise ValueError("must be strictly descending, from noise to image")
        return timesteps
