"""One optimiser step of the student and of the LoRA teacher that follows it.

The networks, their optimisers and the numbers that a checkpoint holds. What a step computes depends on the weights, the
config and the step alone (streams.py), so that a resumed run repeats it bit for bit (on a CPU with as many threads).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from tiue_cli.distill.adapter import adapter_weights
from tiue_cli.distill.checkpoint import Checkpoint, TrainingState
from tiue_cli.distill.config import Decay, DistillConfig, LoraSettings, OptimizerSettings
from tiue_cli.distill.data.order import EndlessOrder, Stream, generator, normal
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
from tiue_cli.distill.networks import ScoreModel, StudentGenerator, guided_prediction
from tiue_cli.errors import MissingDependencyError, TiueError
from tiue_cli.model.schedule import LinearCombine

ClipLoss = Callable[[Tensor, Sequence[str]], Tensor]
"""Clamped CLIP loss of latents (B, C, h, w) under their prompts."""


@dataclass(frozen=True)
class Networks:
    """What a distillation trains and asks, and the arithmetic between them."""

    student: UNet2DConditionModel
    score: ScoreModel
    schedule: NoiseSchedule
    combine: LinearCombine
    prefixes: tuple[LinearCombine, ...]
    latent_shape: tuple[int, int, int]


class NotFiniteError(TiueError):
    """Weights that are not finite, or too many steps in a row without a finite gradient."""


class Trainer:
    """The state of a training; ``step`` advances it."""

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
        self.config, self.networks, self.texts, self.pairs, self.clip = config, networks, texts, pairs, clip
        self.accelerator = accelerator
        self.state = TrainingState(teacher_evaluations=0 if pairs is None else pairs.teacher_evaluations)
        generator_ = StudentGenerator(
            networks.student,
            networks.combine.timesteps,
            decoder=config.student.decoder,
            merged_upsampler=accelerator.device.type == "cpu",
        )
        self.generator = generator_
        self._student_parameters = [value for value in networks.student.parameters() if value.requires_grad]
        self._adapters = list(networks.score.adapter_parameters().values())
        student_optimizer = make_optimizer(self._student_parameters, config.optimizer)
        lora_optimizer = make_optimizer(self._adapters, config.lora)
        self._student_ddp: nn.Module
        self._score_ddp: nn.Module
        self._student_ddp, self._score_ddp, self._student_optimizer, self._lora_optimizer = accelerator.prepare(
            torch.compile(generator_) if config.compile else generator_,
            networks.score,
            student_optimizer,
            lora_optimizer,
        )
        self.ema = None
        if config.ema is not None:
            self.ema = EMAModel(self._student_parameters, decay=config.ema, foreach=True)
        self._prompt_order = EndlessOrder(texts.count, seed=config.seed, stream=Stream.ORDER)

    # --- one step --------------------------------------------------------------------------------------------------

    @property
    def in_warm_start(self) -> bool:
        """Whether the next step is one of regression."""
        return self.state.step < self.config.warm_start.steps

    def step(self) -> dict[str, float]:
        """Do one optimiser step and return its figures. Raises NotFiniteError after too many steps without effect."""
        state, settings = self.state, self.config.warm_start
        if state.step == settings.steps and settings.steps > 0:
            # Another loss of another size: the moments of the first say nothing about it.
            self._student_optimizer.optimizer.state.clear()
        if self.in_warm_start:
            figures = self._warm_start_step()
        elif state.step < settings.steps + self.config.lora.head_start:
            figures = self._head_start_step()
        else:
            figures = self._distillation_step()
        state.step += 1
        state.bad_steps_in_a_row = 0 if figures["finite"] else state.bad_steps_in_a_row + 1
        state.skipped_steps += 0 if figures.pop("finite") else 1
        if state.bad_steps_in_a_row >= self.config.max_bad_steps:
            raise NotFiniteError(
                f"no finite gradient in {state.bad_steps_in_a_row} steps in a row, up to step {state.step}",
                hint="lower optimizer.learning_rate or lora.learning_rate; the last checkpoint is untouched",
            )
        return figures

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

        def noise_at(guidance: float) -> Tensor:
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
            teacher_noise = noise_at(settings.guidance)
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

    # --- updates ---------------------------------------------------------------------------------------------------

    def _update_student(self, rate: float) -> dict[str, float]:
        parameters = self._student_parameters
        norm, finite = self._apply(self._student_optimizer, parameters, rate, self.config.optimizer.max_grad_norm)
        if finite and self.ema is not None:
            self.ema.step(parameters)
            self.state.ema_steps += 1
        return {"grad_norm": norm, "learning_rate": rate, "finite": float(finite)}

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``; where it is not finite they are NaN, so that all processes skip the step.

        Infinity by itself can have finite gradients: a square that overflows does.
        """
        self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def _apply(
        self, optimizer: Any, parameters: Sequence[nn.Parameter], rate: float, max_norm: float | None
    ) -> tuple[float, bool]:
        """Clip, set the learning rate, step and clear; returns the gradient's norm, and whether it was finite.

        The norm is that of the gradient summed over all processes, so all of them decide alike.
        """
        norm = float(self.accelerator.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))
        finite = math.isfinite(norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if finite or self.accelerator.scaler is not None:  # the scaler must see overflows, and then does not step
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def _rate_factor(self, done: int, length: int, decay: Decay) -> float:
        return rate_factor(done, length, warmup_steps=self.config.optimizer.warmup_steps, decay=decay)

    def _clip_weight(self) -> float:
        settings = self.config.clip
        return annealed(settings.weight, self.state.step - self.config.warm_start.steps, settings.steps)

    # --- data and randomness ---------------------------------------------------------------------------------------

    def _position(self, micro: int, batch: int) -> int:
        """Where this process's micro-batch begins in the endless sequence of rows."""
        accelerator = self.accelerator
        group = self.state.step * self.config.accumulation + micro
        result: int = (group * accelerator.num_processes + accelerator.process_index) * batch
        return result

    def _random(self, stream: Stream, micro: int) -> Any:
        return generator(
            self.config.seed, stream, step=self.state.step, micro=micro, process=self.accelerator.process_index
        )

    def _normal(self, stream: Stream, micro: int, rows: int) -> Tensor:
        noise = normal(self._random(stream, micro), (rows, *self.networks.latent_shape), self.accelerator.device)
        return noise.contiguous(memory_format=torch.channels_last)

    def _count_evaluations(self, rows: int, guidance: float) -> None:
        self.state.teacher_evaluations += rows * (1 if guidance == 1.0 else 2) * self.accelerator.num_processes

    def _accumulating(self, module: nn.Module, micro: int) -> contextlib.AbstractContextManager[Any]:
        """Gradients travel between processes in the last micro-batch only."""
        if micro + 1 < self.config.accumulation:
            result: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(module)
            return result
        return contextlib.nullcontext()

    def _add(self, sums: dict[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()

    def _means(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: float(value) / self.config.accumulation for name, value in sums.items()}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Everything that ``restore`` needs; tensors are the live ones, to be written at once."""
        networks = self.networks
        weights: dict[str, Mapping[str, Tensor]] = {
            "student": self._student_weights(),
            "lora": networks.score.adapter_parameters(),
        }
        if self.ema is not None:
            weights["ema"] = {str(index): value for index, value in enumerate(self.ema.shadow_params)}
        scaler = self.accelerator.scaler
        self.state.scaler = (
            None if scaler is None else {key: float(value) for key, value in scaler.state_dict().items()}
        )
        optimizers = {
            "student_optimizer": self._student_optimizer.optimizer.state_dict(),
            "lora_optimizer": self._lora_optimizer.optimizer.state_dict(),
        }
        return Checkpoint(self.state, weights, optimizers)

    @property
    def _is_adapter(self) -> bool:
        return self.config.student.adapter is not None

    def _student_weights(self) -> dict[str, Tensor]:
        """All of a full student's; of an adapter what is trained, for the rest is the teacher's."""
        return adapter_weights(self.networks.student) if self._is_adapter else self.networks.student.state_dict()

    def check_finite(self) -> None:
        """Raise NotFiniteError where a weight is not: such a state must not take the place of a good checkpoint."""
        if not all(bool(value.isfinite().all()) for value in (*self._student_parameters, *self._adapters)):
            raise NotFiniteError(
                f"weights are no longer finite at step {self.state.step}",
                hint="lower optimizer.learning_rate or lora.learning_rate; the last checkpoint is untouched",
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same config."""
        networks = self.networks
        networks.student.load_state_dict(checkpoint.weights["student"], strict=not self._is_adapter)
        for name, parameter in networks.score.adapter_parameters().items():
            parameter.data.copy_(checkpoint.weights["lora"][name])
        self._student_optimizer.optimizer.load_state_dict(checkpoint.optimizers["student_optimizer"])
        self._lora_optimizer.optimizer.load_state_dict(checkpoint.optimizers["lora_optimizer"])
        if self.ema is not None:
            for index, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(checkpoint.weights["ema"][str(index)])
            self.ema.optimization_step = checkpoint.state.ema_steps
        if self.accelerator.scaler is not None and checkpoint.state.scaler is not None:
            saved = checkpoint.state.scaler
            self.accelerator.scaler.load_state_dict({**saved, "_growth_tracker": int(saved["_growth_tracker"])})
        self.state = checkpoint.state.model_copy()

    @contextlib.contextmanager
    def averaged_weights(self) -> Any:
        """Within the block the student has its running mean, where there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._student_parameters)
        self.ema.copy_to(self._student_parameters)
        try:
            yield
        finally:
            self.ema.restore(self._student_parameters)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings | LoraSettings) -> Any:
    """AdamW over the parameters. Raises MissingDependencyError for the 8-bit one without bitsandbytes."""
    values = list(parameters)
    if isinstance(settings, LoraSettings):
        return torch.optim.AdamW(values, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0, fused=True)
    arguments = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(values, fused=True, **arguments)  # type: ignore[arg-type]
    try:
        import bitsandbytes
    except ImportError:
        raise MissingDependencyError(
            "optimizer.name adamw8bit needs bitsandbytes",
            hint='install it: python -m pip install "tiue[adam8bit]", or use adamw',
        ) from None
    return bitsandbytes.optim.AdamW8bit(values, **arguments)


def rate_factor(done: int, length: int, *, warmup_steps: int, decay: Decay) -> float:
    """The learning rate at step ``done`` of ``length`` as a share of its setting: linear rise, then the decay."""
    rise = min(1.0, (done + 1) / (warmup_steps + 1))
    progress = min(1.0, done / max(1, length))
    if decay == "linear":
        return rise * (1.0 - progress)
    if decay == "cosine":
        return rise * 0.5 * (1.0 + math.cos(math.pi * progress))
    return rise
