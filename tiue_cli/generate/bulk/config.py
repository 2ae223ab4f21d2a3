"""What a bulk job is: the model, the prompts, and how its images are laid out in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiue_cli.base.text import size_text
from tiue_cli.errors import UsageError
from tiue_cli.files.png import LoraUse
from tiue_cli.generate.config import GenerateConfig

ImageFormat = Literal["png", "jpeg", "webp"]
DEFAULT_SHARD = 1000
"""Images a shard where the command does not say."""
MAX_SHARDS = 10**5
"""Shards have five digits."""


@dataclass(frozen=True)
class BulkConfig:
    """A job. ``draw`` holds the model, the seed (drawn before, never None here), size, steps and where it runs.

    Image number ``row × draw.images + i`` has that number as its id, and ``draw.seed`` + id as its seed unless its row
    has one of its own. ``workers`` processes share the machine, or ``launch`` names a Ray cluster.
    """

    draw: GenerateConfig
    prompts: str
    out: Path
    shard: int = DEFAULT_SHARD
    image_format: ImageFormat = "png"
    strict: bool = False
    workers: int = 1
    launch: str | None = None

    @property
    def rows_per_shard(self) -> int:
        """Prompts of a shard: those whose images it has room for."""
        return self.shard // self.draw.images

    def validate(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.shard < self.draw.images:
            raise UsageError(
                f"a shard of {self.shard} cannot hold the {self.draw.images} images of a prompt",
                hint=f"give --shards {self.draw.images} or more",
            )
        if self.draw.grid:
            raise UsageError("--grid cannot be combined with --shards", hint="leave one of them out")
        if self.launch is not None and self.launch != "ray" and not self.launch.startswith("ray://"):
            raise UsageError(f"--launch {self.launch} is unknown", hint="give ray, or ray://HOST:PORT")
        if self.launch is not None and self.workers != 1:
            raise UsageError("--workers are processes on this machine, and --launch uses a cluster's", hint="give one")

    def identity(self, *, model_id: str, vae_id: str | None, loras: Sequence[LoraUse] = ()) -> dict[str, Any]:
        """What decides the bytes of the shards, besides the prompts: what a resumed job must have in common."""
        draw = self.draw
        return {
            "model": draw.model,
            "model_id": model_id,
            "vae_id": vae_id,
            "loras": [[lora.sha256, lora.weight] for lora in loras],
            "long_prompts": draw.long_prompts,
            "encoder_timestep": draw.encoder_timestep,
            "seed": draw.seed,
            "images": draw.images,
            "size": None if draw.size is None else size_text(draw.size),
            "steps": draw.steps,
            "teacher_steps": draw.teacher_steps,
            "guidance": draw.guidance,
            "batch": draw.batch,
            "shard": self.shard,
            "image_format": self.image_format,
            "metadata": draw.metadata,
        }


def digest(data: Any) -> str:
    """32 hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
