"""One optimiser step of the distillation: of the student, and of the LoRA teacher that follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tiue_cli.distill.checkpoint import Checkpoint
from tiue_cli.distill.config import DistillConfig
from tiue_cli.distill.data.order import Stream, normal
from tiue_cli.distill.data.pairs import PairData
from tiue_cli.distill.data.text_states import TextStates
from tiue_cli.distill.losses import (
    NoiseSchedule,
    annealed,
    kl_to_standard_normal,
    lora_loss,
    prefix_loss,
    regression_loss,
    vsd_gradient,
    vsd_loss,
)
from tiue_cli.distill.networks import ScoreModel, guided_prediction
from tiue_cli.distill.student_trainer import StudentNetworks, StudentTrainer
from tiue_cli.model.schedule import LinearCombine

ClipLoss = Callable[[Tensor, Sequence[str]], Tensor]
"""Clamped CLIP loss of latents (B, C, h, w) under their prompts."""


@dataclass(frozen=True)
class Networks(StudentNetworks):
    """What a distillation trains and asks, and the arithmetic between them."""

    score: ScoreModel
    schedule: NoiseSchedule
    prefixes: tuple[LinearCombine, ...]


class Trainer(StudentTrainer):
    """The state of a distillation; ``step`` advances it."""

    _rates = "optimizer.learning_rate or lora.learning_rate"

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        texts: TextStates,
        *,
        accelerator: Accelerator,
        pairs: PairData | None,
        clip: ClipLoss | None = None,
    ) -> None:
        self.networks, self.pairs, self.clip = networks, pairs, clip
        self._adapters = list(networks.score.adapter_parameters().values())
        super().__init__(
            config,
            networks,
            texts,
            accelerator=accelerator,
            merged_upsampler=accelerator.device.type == "cpu",
            companion=networks.score,
            companion_parameters=self._adapters,
        )
        self._score_ddp, self._lora_optimizer = self._companion_ddp, self._companion_optimizer
        self.state.teacher_evaluations = 0 if pairs is None else pairs.teacher_evaluations

    # --- one step --------------------------------------------------------------------------------------------------

    def _advance(self) -> dict[str, float]:
        state, settings = self.state, self.config.warm_start
        if state.step == settings.steps and settings.steps > 0:
            # Another loss of another size: the moments of the first say nothing about it.
            self._student_optimizer.optimizer.state.clear()
        if self.in_warm_start:
            return self._warm_start_step()
        if state.step < settings.steps + self.config.lora.head_start:
            return self._head_start_step()
        return self._distillation_step()

    def _warm_start_step(self) -> dict[str, float]:
        pairs, settings = self.pairs, self.config.warm_start
        assert pairs is not None
        batch = settings.batch_size or self.config.batch_size
        sums: dict[str, Tensor] = {}
        for micro in range(self.config.accumulation):
            rows = pairs.order.rows(self._position(micro, batch), batch)
            noise, solution, states = pairs.batch(rows, self.texts)
            with self._accumulating(self._student_ddp, micro):
                predictions = self._student_ddp(noise, states)
                x_0 = self.networks.combine(noise, predictions)
                parts = {"regression": regression_loss(x_0, solution)}
                total = parts["regression"]
                if settings.prefix_weight > 0:
                    parts["prefix"] = prefix_loss(noise, predictions, solution, self.networks.prefixes)
                    total = total + settings.prefix_weight * parts["prefix"]
                self._backward(total / self.config.accumulation)
            self._add(sums, parts)
        rate = settings.learning_rate * self._rate_factor(self.state.step, settings.steps, settings.decay)
        figures = self._update_student(rate)
        return {**self._means(sums), **figures}

    @torch.no_grad()
    def _student_latents(self, micro: int) -> tuple[Tensor, Tensor]:
        """Latents of a micro-batch and the text states they were made under, without gradients."""
        rows = self._prompt_order.rows(self._position(micro, self.config.batch_size), self.config.batch_size)
        states, noise = self.texts.rows(rows), self._normal(Stream.NOISE, micro, len(rows))
        with self.accelerator.autocast():
            predictions = self.generator(noise, states)
        return self.networks.combine(noise, predictions), states

    def _head_start_step(self) -> dict[str, float]:
        return self._update_lora([self._student_latents(micro) for micro in range(self.config.accumulation)])

    def _distillation_step(self) -> dict[str, float]:
        config = self.config
        sums: dict[str, Tensor] = {}
        made = []
        for micro in range(config.accumulation):
            rows = self._prompt_order.rows(self._position(micro, config.batch_size), config.batch_size)
            states = self.texts.rows(rows)
            noise = self._normal(Stream.NOISE, micro, len(rows))
            kept = self._kept_pairs(micro)
            with self._accumulating(self._student_ddp, micro):
                if kept is None:
                    predictions = self._student_ddp(noise, states)
                else:  # in one pass, as gradients of several processes meet once a pass
                    both = self._student_ddp(torch.cat([noise, kept[0]]), torch.cat([states, kept[2]]))
                    predictions, of_pairs = both[:, : len(rows)], both[:, len(rows) :]
                x_0 = self.networks.combine(noise, predictions)
                parts = {"vsd": vsd_loss(x_0, self._vsd_gradient(x_0.detach(), states, micro))}
                total = config.vsd.weight * parts["vsd"]
                if kept is not None:
                    parts["regression"] = regression_loss(self.networks.combine(kept[0], of_pairs), kept[1])
                    total = total + config.warm_start.keep_weight * parts["regression"]
                if config.kl.weight > 0:
                    noises = self.networks.combine.noise_predictions(noise, predictions)
                    parts["kl"] = kl_to_standard_normal(noises, kind=config.kl.kind)
                    total = total + config.kl.weight * parts["kl"]
                if (clip_weight := self._clip_weight()) > 0:
                    assert self.clip is not None
                    parts["clip"] = self.clip(x_0, [self.texts.prompts[row] for row in rows])
                    total = total + clip_weight * parts["clip"]
                self._backward(total / config.accumulation)
            made.append((x_0.detach(), states))
            self._add(sums, parts)
        done, length = self.state.step - config.warm_start.steps, config.max_steps - config.warm_start.steps
        rate = config.optimizer.learning_rate * self._rate_factor(done, length, config.optimizer.decay)
        figures = {**self._means(sums), **self._update_student(rate)}
        if figures["finite"]:  # else these latents may be what was not finite
            figures |= self._update_lora(made)
        return figures

    def _kept_pairs(self, micro: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Noise, solution and text states of the pairs that go beside a micro-batch; None where none do."""
        settings = self.config.warm_start
        if settings.keep_weight == 0:
            return None
        assert self.pairs is not None
        batch = settings.batch_size or self.config.batch_size
        return self.pairs.batch(self.pairs.order.rows(self._position(micro, batch), batch), self.texts)

    def _vsd_gradient(self, x_0: Tensor, states: Tensor, micro: int) -> Tensor:
        """The distillation's gradient at detached latents (B, C, h, w)."""
        networks, settings = self.networks, self.config.vsd
        random = self._random(Stream.SCORE, micro)
        draw = random.integers(settings.min_timestep, settings.max_timestep, size=len(x_0), endpoint=True)
        timesteps = torch.from_numpy(draw).to(x_0.device)
        x_t = networks.schedule.add_noise(x_0, normal(random, x_0.shape, x_0.device), timesteps)

        def noise_at(guidance: float | Tensor) -> Tensor:
            with self.accelerator.autocast():
                prediction = guided_prediction(
                    networks.score,
                    x_t,
                    timesteps,
                    text_states=states,
                    empty_states=self.texts.empty,
                    guidance=guidance,
                )
            return networks.schedule.noise_of(prediction, x_t, timesteps)

        with networks.score.adapters_off():
            teacher_noise = noise_at(settings.guidance_at(timesteps))
        self._count_evaluations(len(x_0), settings.guidance)
        lora_noise = noise_at(settings.lora_guidance)
        return vsd_gradient(teacher_noise, lora_noise, networks.schedule.at(timesteps)[1])

    def _update_lora(self, made: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Fit the LoRA teacher to the student's latents of this step: ``lora.updates`` optimiser steps."""
        settings, schedule = self.config.lora, self.networks.schedule
        sums: dict[str, Tensor] = {}
        all_finite = True
        for update in range(settings.updates):
            for micro, (x_0, states) in enumerate(made):
                random = self._random(Stream.LORA, update * len(made) + micro)
                draw = random.integers(len(schedule.sigma), size=len(x_0))
                timesteps = torch.from_numpy(draw).to(x_0.device)
                empty = torch.from_numpy(random.random(len(x_0)) < settings.empty_share).to(x_0.device)
                noise = normal(random, x_0.shape, x_0.device)
                x_t = schedule.add_noise(x_0, noise, timesteps)
                shown = torch.where(empty[:, None, None], self.texts.empty.to(states.dtype), states)
                with self._accumulating(self._score_ddp, micro):
                    prediction = self._score_ddp(x_t, timesteps, shown)
                    loss = lora_loss(
                        prediction,
                        latents=x_0,
                        noise=noise,
                        timesteps=timesteps,
                        schedule=schedule,
                        kind=settings.loss,
                    )
                    self._backward(loss / len(made))
                self._add(sums, {"lora": loss})
            _, finite = self._apply(
                self._lora_optimizer, self._adapters, settings.learning_rate, settings.max_grad_norm
            )
            all_finite &= finite
        return {"lora": float(sums["lora"]) / (settings.updates * len(made)), "finite": float(all_finite)}

    def _clip_weight(self) -> float:
        settings = self.config.clip
        return annealed(settings.weight, self.state.step - self.config.warm_start.steps, settings.steps)

    def _count_evaluations(self, rows: int, guidance: float) -> None:
        self.state.teacher_evaluations += rows * (1 if guidance == 1.0 else 2) * self.accelerator.num_processes

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _other_weights(self) -> dict[str, Mapping[str, Tensor]]:
        return {"lora": self.networks.score.adapter_parameters()}

    def _other_optimizers(self) -> dict[str, Any]:
        return {"lora_optimizer": self._lora_optimizer.optimizer.state_dict()}

    def _restore_others(self, checkpoint: Checkpoint) -> None:
        for name, parameter in self.networks.score.adapter_parameters().items():
            parameter.data.copy_(checkpoint.weights["lora"][name])
        self._lora_optimizer.optimizer.load_state_dict(checkpoint.optimizers["lora_optimizer"])

    def _trained(self) -> Sequence[nn.Parameter]:
        return (*self._student_parameters, *self._adapters)
