"""``tiue distill --quantize int8``: a student goes on training so that its 8-bit export draws what it draws in fp32.

The student is its own teacher: text states ─▶ ranges and sensitive layers ─▶ steps ─▶ student folder, in floats.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tiue_cli.base.events import Event, Note
from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.networks import StudentGenerator
from tiue_cli.distill.quantized_trainer import QuantizedNetworks, QuantizedTrainer
from tiue_cli.distill.student_run import StudentRun
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.folder import ModelInfo, check_model_folder
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.student import StudentModel, load_student


class QuantizedRun(StudentRun[QuantizedTrainer]):
    """A quantisation-aware distillation in folder ``out``; see ``StudentRun``. ``config.teacher`` is the student."""

    def __init__(
        self, config: DistillConfig, out: Path, *, resume: bool = False, acknowledge: Callable[[], None] | None = None
    ) -> None:
        self._info = checked_student(config)
        super().__init__(config, out, resume=resume, acknowledge=acknowledge)

    # --- networks --------------------------------------------------------------------------------------------------

    def _load_student(self) -> StudentModel:
        student = load_student(self._info)
        self._trained_before = student.manifest.training_steps
        return student

    def _load_networks(self) -> None:
        student = self._student
        original = copy.deepcopy(student.unet).requires_grad_(False)
        original.to(self._accelerator.device, memory_format=torch.channels_last)
        self._place_student()
        combine = student.linear_combine()
        self._networks = QuantizedNetworks(
            student=student.unet,
            encoder_timestep=student.manifest.encoder_timestep,
            combine=combine,
            latent_shape=self._latent_shape,
            original=StudentGenerator(
                original,
                combine.timesteps,
                encoder_timestep=student.manifest.encoder_timestep,
                merged_upsampler=self._accelerator.device.type == "cpu",
            ).to(self._accelerator.device),
        )

    def _make_trainer(self) -> QuantizedTrainer:
        trainer = QuantizedTrainer(self.config, self._networks, self._texts, accelerator=self._accelerator)
        self._trainer = trainer
        return trainer

    @functools.cached_property
    def _teacher_sha256(self) -> str:
        return model_sha256(self._info.path)

    @property
    def _combine(self) -> LinearCombine:
        return self._networks.combine

    # --- stages ----------------------------------------------------------------------------------------------------

    def _begin(self, trainer: QuantizedTrainer) -> Iterator[Event]:
        if trainer.ranges:  # from the checkpoint
            return
        kept = trainer.calibrate()
        found = f", {', '.join(kept)} among them" if kept else ""
        yield Note(f"{len(trainer.ranges)} layers learn in 8 bits; what is sensitive stays in floats{found}")

    def _teacher_latents(self, noise: Tensor, states: Tensor) -> Tensor:
        return self._trainer.original_latents(noise, states)


def checked_student(config: DistillConfig) -> ModelInfo:
    """The student that ``config.teacher`` names, from its headers alone. Raises ModelFolderError."""
    info = check_model_folder(resolve_model(config.teacher))
    if info.kind == "teacher":
        raise ModelFolderError(
            f"{config.teacher} is a many-step teacher, and --quantize is for students",
            hint=f"distil one first: tiue distill --teacher {config.teacher}",
        )
    return info
