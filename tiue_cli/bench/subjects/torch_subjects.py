"""The things that a bench measures: prompts and noise in, pictures and the times of their stages out.

On CUDA, students, teachers and plain UNet passes run as ``tiue generate`` runs them there, prepared and captured; the
authors' K-fold batch stays what they wrote: diffusers' modules, launched one by one.

Here are those that run in torch; exports are in ``exported_subjects``, other pipelines in ``peers``. Every subject gets
the same prompts, the same noise (drawn from the seeds), the same size and precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from torch import nn

from tiue_cli.backends.torch_cuda import FastOptions, StudentPass, TeacherSteps
from tiue_cli.bench.measure.clock import StageMs, clock_for
from tiue_cli.bench.measure.flops import StageFlops
from tiue_cli.bench.report.schema import Stage, SubjectRecord
from tiue_cli.bench.subjects.models import LoadedModel, combine_for
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.schedule import ddim_steps
from tiue_cli.model.shared import SharedUNetDecoder, merge_upsamplers, with_same_weights
from tiue_cli.model.text import encode_prompts
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

Variant = Literal["shared", "plain", "merged"]
"""The sharing decoder that ships; the TiUE authors' K-fold batch; the sharing one with merged upsamplers."""


SHAPES_HELD: Final = 64
"""More than any bench has batches: a shape that is captured anew would be timed as latency."""


@dataclass(frozen=True)
class Outcome:
    """Pictures (B, H, W, 3) uint8 of one run, and milliseconds of its stages."""

    images: np.ndarray
    stage_ms: StageMs


class Subject(ABC):
    """One thing that is measured, held ready between ``__enter__`` and ``__exit__``.

    ``reference`` is the key of the subject whose pictures must be these, ``plain_pass`` that of the plain UNet pass to
    compare with; None where there is none. What is not ``timed`` serves as a reference only.
    """

    reference: str | None = None
    plain_pass: str | None = None
    unverified: str | None = None
    """Why nothing says that its pictures are right; None where something does, or nothing has to."""
    timed: bool = True
    compiles: bool = False
    """Whether the first call at a batch builds something, so that it is build time and no latency."""

    def __init__(self, record: SubjectRecord) -> None:
        self.record = record

    @property
    def key(self) -> str:
        """``SubjectRecord.key``."""
        return self.record.key

    @property
    def clock_kind(self) -> Literal["wall", "cuda-events"]:
        """What times its stages."""
        return "wall"

    @abstractmethod
    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        """Draw one picture a prompt from ``noise`` (B, C, h, w) float32."""

    def flops(self, batch: int) -> dict[Stage, float]:
        """FLOPs of each stage of a run of ``batch`` images; empty where they cannot be counted."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _TorchSubject(Subject):
    """What the subjects over a ``LoadedModel`` share."""

    def __init__(self, record: SubjectRecord, model: LoadedModel, flops: StageFlops) -> None:
        super().__init__(record)
        self._model = model
        self._flops = flops
        self._clock = clock_for(record.device)
        self._decoder = ImageDecoder(model.components.vae)

    @property
    def clock_kind(self) -> Literal["wall", "cuda-events"]:
        """``wall`` on a CPU, ``cuda-events`` on a GPU."""
        return self._clock.kind

    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        """See ``Subject.run``."""
        with torch.inference_mode():
            images = self._prepared(prompts, noise)
            if images is None:
                images = self._draw(list(prompts), torch.from_numpy(noise).to(self.record.device))
        return Outcome(images, self._clock.take_ms())

    def _prepared(self, prompts: Sequence[str], noise: np.ndarray) -> np.ndarray | None:
        """Pictures by the prepared networks; None where this subject has none."""
        return None

    @abstractmethod
    def _draw(self, prompts: list[str], noise: torch.Tensor) -> np.ndarray:
        """Pictures from placed float32 noise."""

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        parts = self._model.components
        with self._clock.stage("text"):
            return encode_prompts(parts.tokenizer, parts.text_encoder, prompts).to(parts.unet.dtype)

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        with self._clock.stage("vae"):
            return self._decoder.decode(latents)


class TeacherSubject(_TorchSubject):
    """Many DDIM steps with classifier-free guidance: diffusers' own pipeline, and on CUDA one captured step.

    ``prepared`` None: on CUDA.
    """

    def __init__(
        self, record: SubjectRecord, model: LoadedModel, flops: StageFlops, *, prepared: bool | None = None
    ) -> None:
        super().__init__(record, model, flops)
        self._teacher = model.teacher
        self._guidance = 1.0 if record.guidance is None else record.guidance
        self._sampled = ddim_steps(model.components.scheduler_config, record.steps)
        fast = model.fast(FastOptions()) if _is_prepared(record, prepared) else None
        self._steps = None if fast is None else TeacherSteps(fast, model.components.tokenizer, held=SHAPES_HELD)
        self.compiles = self._steps is not None

    def _prepared(self, prompts: Sequence[str], noise: np.ndarray) -> np.ndarray | None:
        if self._steps is None:
            return None
        return self._steps(prompts, noise, self._sampled, guidance=self._guidance, clock=self._clock)

    def _draw(self, prompts: list[str], noise: torch.Tensor) -> np.ndarray:
        text_states = self._encode(prompts)
        unconditional = self._encode([""] * len(prompts)) if self._guidance > 1.0 else None
        with self._clock.stage("unet"):
            latents = self._teacher.denoise(
                text_states, noise, unconditional=unconditional, steps=self.record.steps, guidance=self._guidance
            )
        return self._decode(latents)

    def flops(self, batch: int) -> dict[Stage, float]:
        """See ``Subject.flops``; guidance doubles the rows of text encoder and UNet."""
        rows = 2 * batch if self._guidance > 1.0 else batch
        counted = self._flops
        unet = self.record.steps * counted.unet(rows, merged_upsampler=self.record.merged_upsampler)
        return {"text": counted.text(rows), "unet": unet, "vae": counted.vae(batch)}


class PlainUNetSubject(_TorchSubject):
    """One whole UNet pass without guidance and the one-step sum: what a one-step student of any method costs.

    ``prepared`` None: on CUDA, as the students that it is compared with.
    """

    def __init__(
        self, record: SubjectRecord, model: LoadedModel, flops: StageFlops, *, prepared: bool | None = None
    ) -> None:
        super().__init__(record, model, flops)
        self._unet: Any = model.components.unet
        if record.merged_upsampler:
            self._unet = with_same_weights(self._unet)
            merge_upsamplers(self._unet)
        self._combine = combine_for(model.student, 1)
        options = FastOptions(merged=record.merged_upsampler)
        fast = model.fast(options) if _is_prepared(record, prepared) else None
        self._steps = None if fast is None else TeacherSteps(fast, model.components.tokenizer, held=SHAPES_HELD)
        self.compiles = self._steps is not None

    def _prepared(self, prompts: Sequence[str], noise: np.ndarray) -> np.ndarray | None:
        if self._steps is None:
            return None
        # At one timestep the sum is a step of the sampler.
        noise_weight, weight = self._combine.weights
        step = (self._combine.timesteps[0], noise_weight, weight)
        return self._steps(prompts, noise, [step], guidance=1.0, clock=self._clock)

    def _draw(self, prompts: list[str], noise: torch.Tensor) -> np.ndarray:
        text_states = self._encode(prompts)
        with self._clock.stage("unet"):
            rounded = noise.to(text_states.dtype)
            (prediction,) = self._unet(
                rounded, self._combine.timesteps[0], encoder_hidden_states=text_states, return_dict=False
            )
            latents = self._combine(noise, prediction[None])
        return self._decode(latents)

    def flops(self, batch: int) -> dict[Stage, float]:
        """See ``Subject.flops``."""
        counted = self._flops
        unet = counted.unet(batch, merged_upsampler=self.record.merged_upsampler)
        return {"text": counted.text(batch), "unet": unet, "vae": counted.vae(batch)}


class StudentSubject(_TorchSubject):
    """One pass: the UNet encoder once, the UNet decoder at K timesteps as one batch, the weighted sum, the autoencoder.

    With the record's backend ``compile``, the UNet's halves and the autoencoder's decoder go through ``torch.compile``
    in its default mode. ``prepared`` None: on CUDA, but for the authors' batch.
    """

    def __init__(
        self,
        record: SubjectRecord,
        model: LoadedModel,
        flops: StageFlops,
        *,
        variant: Variant,
        prepared: bool | None = None,
    ) -> None:
        super().__init__(record, model, flops)
        self._variant = variant
        student = model.student
        self._combine = combine_for(student, record.steps)
        self._encoder_timestep = student.manifest.encoder_timestep
        self._timesteps = torch.tensor(self._combine.timesteps, device=record.device)
        self._unet_encoder: Any = UNetEncoder(student.unet)
        self._unet_decoder: Any = _decoder(student.unet, variant)
        compiled = record.backend == "compile"
        fast = None
        if variant != "plain" and _is_prepared(record, prepared):
            fast = model.fast(FastOptions(merged=variant == "merged", kernels=not compiled, compiled=compiled))
        self._pass = None
        if fast is not None:
            self._pass = StudentPass(fast, student.tokenizer, encoder_timestep=self._encoder_timestep, held=SHAPES_HELD)
        elif compiled:
            self._compile()
        self.compiles = compiled or fast is not None

    def _prepared(self, prompts: Sequence[str], noise: np.ndarray) -> np.ndarray | None:
        return None if self._pass is None else self._pass(prompts, noise, self._combine, clock=self._clock)

    def _compile(self) -> None:
        self._unet_encoder = torch.compile(self._unet_encoder)
        self._unet_decoder = torch.compile(self._unet_decoder)
        vae: Any = with_same_weights(self._model.components.vae)
        vae.decoder = torch.compile(vae.decoder)
        self._decoder = ImageDecoder(vae)

    def _draw(self, prompts: list[str], noise: torch.Tensor) -> np.ndarray:
        text_states = self._encode(prompts)
        with self._clock.stage("unet_encoder"):
            features = self._unet_encoder(noise.to(text_states.dtype), text_states, self._encoder_timestep)
        with self._clock.stage("unet_decoder"):
            predictions = self._unet_decoder(features, self._timesteps, text_states)
            # The sum takes the unrounded noise, as the product does: its weight is the largest.
            latents = self._combine(noise, predictions)
        return self._decode(latents)

    def flops(self, batch: int) -> dict[Stage, float]:
        """See ``Subject.flops``."""
        return self._flops.student(batch, self.record.steps, self._variant)


def _is_prepared(record: SubjectRecord, asked: bool | None) -> bool:
    return record.device == "cuda" if asked is None else asked


def _decoder(unet: Any, variant: Variant) -> nn.Module:
    if variant == "plain":
        return UNetDecoder(unet)
    return SharedUNetDecoder(unet, merged_upsampler=variant == "merged")
