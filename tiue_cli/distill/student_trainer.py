"""One optimiser step of a student, whatever it learns from: optimiser, gradients, data order, checkpoints.

What a step computes depends on the weights, the config and the step alone (data/order.py), so that a resumed run
repeats it bit for bit (on a CPU with as many threads).
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
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
from tiue_cli.distill.data.text_states import TextStates
from tiue_cli.distill.muon import Muon
from tiue_cli.distill.networks import StudentGenerator
from tiue_cli.errors import MissingDependencyError, TiueError
from tiue_cli.model.schedule import LinearCombine


@dataclass(frozen=True)
class StudentNetworks:
    """The UNet that is trained, and how its one pass becomes latents."""

    student: UNet2DConditionModel
    encoder_timestep: int
    combine: LinearCombine
    latent_shape: tuple[int, int, int]


class NotFiniteError(TiueError):
    """Weights that are not finite, or too many steps in a row without a finite gradient."""


class StudentTrainer(ABC):
    """The state of a student's training; ``step`` advances it. What a step does to the student, subclasses say."""

    def __init__(
        self,
        config: DistillConfig,
        networks: StudentNetworks,
        texts: TextStates,
        *,
        accelerator: Accelerator,
        merged_upsampler: bool,
        companion: nn.Module | None = None,
        companion_parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        """``companion`` is a second network that learns beside the student, by ``config.lora``."""
        self.config, self.texts = config, texts
        self.accelerator = accelerator
        self.state = TrainingState()
        self._student = networks.student
        self._combine, self._latent_shape = networks.combine, networks.latent_shape
        generator_ = StudentGenerator(
            networks.student,
            networks.combine.timesteps,
            encoder_timestep=networks.encoder_timestep,
            decoder=config.student.decoder,
            merged_upsampler=merged_upsampler,
        )
        self.generator = generator_
        self._student_parameters = [value for value in networks.student.parameters() if value.requires_grad]
        module = torch.compile(generator_) if config.compile else generator_
        student_optimizer = make_optimizer(self._student_parameters, config.optimizer)
        self._student_ddp: nn.Module
        if companion is None:
            self._student_ddp, self._student_optimizer = accelerator.prepare(module, student_optimizer)
        else:
            companion_optimizer = make_optimizer(companion_parameters, config.lora)
            self._companion_ddp: nn.Module
            self._student_ddp, self._companion_ddp, self._student_optimizer, self._companion_optimizer = (
                accelerator.prepare(module, companion, student_optimizer, companion_optimizer)
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

    @abstractmethod
    def _advance(self) -> dict[str, float]:
        """The work of one step; figures, of which ``finite`` is 1 where the gradients were."""

    def step(self) -> dict[str, float]:
        """Do one optimiser step and return its figures. Raises NotFiniteError after too many steps without effect."""
        state = self.state
        figures = self._advance()
        state.step += 1
        state.bad_steps_in_a_row = 0 if figures["finite"] else state.bad_steps_in_a_row + 1
        state.skipped_steps += 0 if figures.pop("finite") else 1
        if state.bad_steps_in_a_row >= self.config.max_bad_steps:
            raise NotFiniteError(
                f"no finite gradient in {state.bad_steps_in_a_row} steps in a row, up to step {state.step}",
                hint=f"lower {self._rates}; the last checkpoint is untouched",
            )
        return figures

    _rates = "optimizer.learning_rate"
    """The settings that a diverging run should lower."""

    @torch.no_grad()
    def predictions(self, noise: Tensor, states: Tensor) -> Tensor:
        """What the student predicts now, (K, B, C, h, w), in the run's precision."""
        with self.accelerator.autocast():
            result: Tensor = self.generator(noise, states)
        return result

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
        noise = normal(self._random(stream, micro), (rows, *self._latent_shape), self.accelerator.device)
        return noise.contiguous(memory_format=torch.channels_last)

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
        weights: dict[str, Mapping[str, Tensor]] = {"student": self._student_weights(), **self._other_weights()}
        if self.ema is not None:
            weights["ema"] = {str(index): value for index, value in enumerate(self.ema.shadow_params)}
        scaler = self.accelerator.scaler
        self.state.scaler = (
            None if scaler is None else {key: float(value) for key, value in scaler.state_dict().items()}
        )
        optimizers = {"student_optimizer": self._student_optimizer.optimizer.state_dict(), **self._other_optimizers()}
        return Checkpoint(self.state, weights, optimizers)

    @abstractmethod
    def _other_weights(self) -> dict[str, Mapping[str, Tensor]]:
        """What a checkpoint holds beside the student."""

    @abstractmethod
    def _other_optimizers(self) -> dict[str, Any]:
        """States of the other optimisers."""

    @abstractmethod
    def _restore_others(self, checkpoint: Checkpoint) -> None:
        """Take back what ``_other_weights`` and ``_other_optimizers`` gave."""

    @property
    def _is_adapter(self) -> bool:
        return self.config.student.adapter is not None

    def _student_weights(self) -> dict[str, Tensor]:
        """All of a full student's; of an adapter what is trained, for the rest is the teacher's."""
        return adapter_weights(self._student) if self._is_adapter else self._student.state_dict()

    def _trained(self) -> Sequence[nn.Parameter]:
        """Everything that a step changes."""
        return self._student_parameters

    def check_finite(self) -> None:
        """Raise NotFiniteError where a weight is not: such a state must not take the place of a good checkpoint."""
        if not all(bool(value.isfinite().all()) for value in self._trained()):
            raise NotFiniteError(
                f"weights are no longer finite at step {self.state.step}",
                hint=f"lower {self._rates}; the last checkpoint is untouched",
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same config."""
        self._student.load_state_dict(checkpoint.weights["student"], strict=not self._is_adapter)
        self._student_optimizer.optimizer.load_state_dict(checkpoint.optimizers["student_optimizer"])
        self._restore_others(checkpoint)
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
    """AdamW or Muon over the parameters. Raises MissingDependencyError for 8-bit AdamW without bitsandbytes."""
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
    if settings.name == "muon":
        return Muon(values, **arguments)  # type: ignore[arg-type]
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
