"""Checkpoints: everything that a run needs to continue as if it had not stopped.

    step_00000500/student/              weights of the UNet
                  ema/                  their running mean, where there is one
                  lora/                 adapters of the LoRA teacher
                  student_optimizer/    lora_optimizer/    see optimizer_state.py
                  state.json            step, counters, gradient scale

Written to a temporary sibling and renamed: a name without a leading dot is a whole checkpoint. Random numbers, data
order and learning rates are functions of the step (streams.py), so the step is their state.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiue_cli.base.text import excerpt
from tiue_cli.distill.optimizer_state import load_optimizer, save_optimizer
from tiue_cli.errors import OutputError
from tiue_cli.files.access import is_folder, list_folder, open_file
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.files.manifests import read_manifest, write_json

STATE = "state.json"
WEIGHTS = "weights.safetensors"
# What torch, safetensors and json raise for files that are not what they were.
_DAMAGE = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)
_NAME = re.compile(r"step_(\d{8})")


class TrainingState(BaseModel):
    """The numbers of a run after ``step`` optimiser steps of the student."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = 1
    step: int = 0
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    bad_steps_in_a_row: int = 0
    teacher_evaluations: int = 0
    """Rows that went through the frozen teacher, the unguided half of guidance included, over all processes."""
    ema_steps: int = 0
    scaler: dict[str, float] | None = None
    """State of the gradient scaler, in fp16."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder; weights and optimiser states by part."""

    state: TrainingState
    weights: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Mapping[str, Any]]


def write_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``root``/step_N and keep the ``keep`` newest. Raises OutputError, and then nothing has changed."""
    path = root / f"step_{checkpoint.state.step:08d}"
    if path.is_dir():  # the step at which this run began or stopped
        return path
    with atomic_folder(path) as folder:
        for part, tensors in checkpoint.weights.items():
            (folder / part).mkdir()
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, folder / part / WEIGHTS)
        for part, state in checkpoint.optimizers.items():
            (folder / part).mkdir()
            save_optimizer(dict(state), folder / part)
        write_json(folder / STATE, checkpoint.state)
    _rotate(root, keep)
    return path


def read_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint folder. OutputError or ManifestError where it is damaged."""
    for file in (path / STATE, *sorted(path.glob(f"*/{WEIGHTS}")), *sorted(path.glob("*/optimizer.*"))):
        # What may not be read is not damaged, and nobody should remove it.
        with contextlib.suppress(FileNotFoundError), open_file(file, error=OutputError):
            pass
    try:
        weights = {file.parent.name: load_file(file, device=str(device)) for file in sorted(path.glob(f"*/{WEIGHTS}"))}
        optimizers = {
            folder.name: load_optimizer(folder)
            for folder in sorted({file.parent for file in path.glob("*/optimizer.*")})
        }
    except _DAMAGE as error:
        raise OutputError(
            f"checkpoint {path} is damaged: {excerpt(' '.join(str(error).split()), 300)}",
            hint=f"remove {path} to resume from the one before",
        ) from error
    return Checkpoint(read_manifest(path / STATE, TrainingState), weights, optimizers)


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = _checkpoints(root)
    return found[-1] if found else None


def step_of(path: Path | None) -> int:
    """The step in a checkpoint's name; 0 without a checkpoint."""
    match = None if path is None else _NAME.fullmatch(path.name)
    return 0 if match is None else int(match[1])


def remove_leftovers(root: Path) -> None:
    """Delete what killed runs left half-written."""
    if root.is_dir():
        for path in root.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(root: Path) -> list[Path]:
    if not is_folder(root, error=OutputError):
        return []
    return sorted(path for path in list_folder(root, error=OutputError) if _NAME.fullmatch(path.name) and path.is_dir())


def _rotate(root: Path, keep: int) -> None:
    for path in _checkpoints(root)[:-keep]:
        # Renamed first: a kill while deleting must not leave half a checkpoint under a whole one's name.
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
