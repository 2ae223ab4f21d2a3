"""A distillation: a student that learns from a many-step teacher.

text states ─▶ pairs of noise and solution, for the warm start ─▶ steps ─▶ student folder
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiue_cli.base.events import Event
from tiue_cli.distill.adapter import adapt_student, save_adapter_student
from tiue_cli.distill.checkpoint import step_of
from tiue_cli.distill.data.pairs import CHUNK_PAIRS, PairData, fill_pairs, solve
from tiue_cli.distill.losses import NoiseSchedule
from tiue_cli.distill.networks import (
    ScoreModel,
    load_initial_weights,
    load_untrained,
    prefixes_of,
    teacher_source,
)
from tiue_cli.distill.student_run import OTHER_DISK, StudentRun
from tiue_cli.distill.trainer import Networks, Trainer
from tiue_cli.files.rows import RowCache, cache_key
from tiue_cli.files.students import BaseModelSource, StudentManifest
from tiue_cli.model.components import quiet
from tiue_cli.model.hub import EMBEDDED_NAMES, is_hub_id
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.student import StudentModel


class Distillation(StudentRun[Trainer]):
    """A distillation in folder ``out``; see ``StudentRun``."""

    _room_hints: ClassVar[Mapping[str, str]] = {
        **StudentRun._room_hints,
        "pairs": f"{OTHER_DISK}; or fewer: --set warm_start.pairs=N",
    }
    _pairs: PairData | None = None

    # --- networks --------------------------------------------------------------------------------------------------

    def _load_student(self) -> StudentModel:
        return load_untrained(self.config)

    def _load_networks(self) -> None:
        config, student, device, half = self.config, self._student, self._accelerator.device, self._half
        frozen = copy.deepcopy(student.unet).to(device, memory_format=torch.channels_last)
        if half is not None:
            with quiet():
                frozen.to(half)
        if config.student.init is not None:
            load_initial_weights(student, config.student.init)
        self._place_student()
        score = ScoreModel(frozen, config.lora, seed=config.seed)
        if config.gradient_checkpointing:
            score.recompute()
        if config.student.adapter is not None:
            adapt_student(student.unet, score, config.student.adapter, seed=config.seed)
        combine = student.linear_combine()
        self._networks = Networks(
            student=student.unet,
            score=score,
            schedule=NoiseSchedule.from_config(student.scheduler_config, device),
            encoder_timestep=student.manifest.encoder_timestep,
            combine=combine,
            prefixes=prefixes_of(student.scheduler_config, combine.timesteps),
            latent_shape=self._latent_shape,
        )

    def _make_trainer(self) -> Trainer:
        clip = None
        if self.config.clip.weight > 0:
            from tiue_cli.distill.clip import make_clip_loss, recomputes

            clip = make_clip_loss(
                self.config.clip,
                teacher_vae=self._student.vae,
                device=self._accelerator.device,
                half=self._half,
                recompute=recomputes(self.config, half=self._half is not None),
            )
        return Trainer(
            self.config, self._networks, self._texts, accelerator=self._accelerator, pairs=self._pairs, clip=clip
        )

    @property
    def _teacher_sha256(self) -> str:
        sha256 = self._student.manifest.teacher_sha256
        assert sha256 is not None
        return sha256

    @property
    def _combine(self) -> LinearCombine:
        return self._networks.combine

    # --- pairs -----------------------------------------------------------------------------------------------------

    def _before_training(self, found: Path | None) -> Iterator[Event]:
        warm_start = self.config.warm_start
        if (step_of(found) < warm_start.steps or warm_start.keep_weight > 0) and not self._stopping:
            cache = self._pair_cache()
            with self._networks.score.adapters_off():
                yield from self._fill(cache, self._solve_pairs(cache), "pairs")
            self._pairs = PairData(cache, seed=self.config.seed, teacher_evaluations=self._pair_evaluations())

    def _pair_cache(self) -> RowCache:
        config, settings = self.config, self.config.warm_start
        key = cache_key(
            {
                "teacher": self._student.manifest.teacher_sha256,
                "prompts": self.prompts.sha256,
                "seed": config.seed,
                "steps": settings.teacher_steps,
                "solver": settings.solver,
                "guidance": settings.guidance,
                "shape": self._networks.latent_shape,
                "precision": self._accelerator.mixed_precision,
            }
        )
        folder = config.cache_folder / f"pairs-{key}"
        return RowCache(folder, settings.pairs, self._networks.latent_shape, max_chunk_rows=CHUNK_PAIRS)

    def _pair_evaluations(self) -> int:
        settings = self.config.warm_start
        return settings.pairs * settings.teacher_steps * (1 if settings.guidance == 1.0 else 2)

    def _solve_pairs(self, cache: RowCache) -> Iterator[int]:
        settings = self.config.warm_start
        batch = settings.batch_size or self.config.batch_size

        def solution_of(noise: Tensor, states: Tensor) -> Tensor:
            return self._solve(noise, states, steps=settings.teacher_steps, guidance=settings.guidance)

        return fill_pairs(
            cache, self._texts, solution_of, seed=self.config.seed, batch_size=batch, process=self._process
        )

    def _solve(self, noise: Tensor, states: Tensor, *, steps: int, guidance: float, solver: Any = None) -> Tensor:
        with self._accelerator.autocast():
            return solve(
                self._networks.score,
                noise,
                scheduler_config=self._student.scheduler_config,
                text_states=states,
                empty_states=self._texts.empty,
                steps=steps,
                guidance=guidance,
                solver=self.config.warm_start.solver if solver is None else solver,
            )

    # --- teacher and result ----------------------------------------------------------------------------------------

    def _teacher_latents(self, noise: Tensor, states: Tensor) -> Tensor:
        settings = self.config.validation
        with self._networks.score.adapters_off():
            return self._solve(
                noise, states, steps=settings.teacher_steps, guidance=settings.teacher_guidance, solver="ddim"
            )

    def _write_student(self, manifest: StudentManifest) -> Path:
        if self.config.student.adapter is None:
            return super()._write_student(manifest)
        base = BaseModelSource(source=self._base_source(), sha256=self._teacher_sha256)
        return save_adapter_student(self._student.unet, manifest.model_copy(update={"base": base}), self.folder.student)

    def _base_source(self) -> str:
        """The teacher as the adapter's folder names it: where a folder lies, whatever the working folder will be."""
        source = teacher_source(self.config)
        return source if is_hub_id(source) or source in EMBEDDED_NAMES else str(Path(source).expanduser().resolve())
