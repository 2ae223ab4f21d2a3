"""Subjects that run in torch: a teacher's steps, plain UNet passes, and students.

They run as ``tiue generate`` runs them, prepared, and on CUDA captured; the authors' K-fold batch stays what they
wrote: diffusers' modules, launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from tiue_cli.backends.torch_prepared import FastOptions, StudentPass, TeacherSteps
from tiue_cli.bench.measure.clock import StageClock, clock_for
from tiue_cli.bench.measure.flops import DecoderKind, StageFlops
from tiue_cli.bench.report.schema import SubjectRecord
from tiue_cli.bench.subjects.models import LoadedModel
from tiue_cli.bench.subjects.subject import Draw, Subject
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.schedule import ddim_steps
from tiue_cli.model.shared import SharedUNetDecoder, merge_upsamplers, with_same_weights
from tiue_cli.model.text import encode_prompts
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

SHAPES_HELD: Final = 64
"""More than any bench has batches: a shape that is captured anew would be timed as latency."""


def teacher_subject(record: SubjectRecord, model: LoadedModel, flops: StageFlops, *, prepared: bool = True) -> Subject:
    """Many DDIM steps with classifier-free guidance: one prepared step again and again, or diffusers' own pipeline."""
    guidance = 1.0 if record.guidance is None else record.guidance
    teacher, clock = model.teacher, clock_for(record.device)
    counted = partial(flops.whole_unet, steps=record.steps, guided=guidance > 1.0, merged=record.merged_upsampler)

    def denoise(text_states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        unconditional = _encode(model, clock, [""] * len(noise)) if guidance > 1.0 else None
        with clock.stage("unet"):
            return teacher.denoise(
                text_states, noise, unconditional=unconditional, steps=record.steps, guidance=guidance
            )

    fast = model.fast(FastOptions()) if prepared else None
    if fast is None:
        return Subject(record, _drawing(model, clock, denoise), clock, counted)
    run = TeacherSteps(fast, model.components.tokenizer, held=SHAPES_HELD)
    sampled = ddim_steps(model.components.scheduler_config, record.steps)
    draw = partial(run, steps=sampled, guidance=guidance, clock=clock)
    return Subject(record, torch.inference_mode()(draw), clock, counted, compiles=True)


def plain_unet_subject(
    record: SubjectRecord, model: LoadedModel, flops: StageFlops, *, prepared: bool = True
) -> Subject:
    """One whole UNet pass without guidance and the one-step sum: what a one-step student of any method costs."""
    merged, clock = record.merged_upsampler, clock_for(record.device)
    combine = model.combine(1)
    counted = partial(flops.whole_unet, merged=merged)
    unet: Any = model.components.unet
    if merged:
        unet = with_same_weights(unet)
        merge_upsamplers(unet)

    def denoise(text_states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with clock.stage("unet"):
            (prediction,) = unet(
                noise.to(text_states.dtype), combine.timesteps[0], encoder_hidden_states=text_states, return_dict=False
            )
            latents: torch.Tensor = combine(noise, prediction[None])
        return latents

    fast = model.fast(FastOptions(merged=merged)) if prepared else None
    if fast is None:
        return Subject(record, _drawing(model, clock, denoise), clock, counted)
    run = TeacherSteps(fast, model.components.tokenizer, held=SHAPES_HELD)
    # At one timestep the sum is a step of the sampler.
    noise_weight, weight = combine.weights
    draw = partial(run, steps=[(combine.timesteps[0], noise_weight, weight)], guidance=1.0, clock=clock)
    return Subject(record, torch.inference_mode()(draw), clock, counted, compiles=True)


def student_subject(
    record: SubjectRecord,
    model: LoadedModel,
    flops: StageFlops,
    *,
    variant: DecoderKind,
    prepared: bool = True,
) -> Subject:
    """One pass: the UNet encoder once, the UNet decoder at K timesteps as one batch, the weighted sum, the autoencoder.

    ``variant``: the sharing decoder that ships, the TiUE authors' plain K-fold batch, or the sharing one with merged
    upsamplers. With the record's backend ``compile``, the UNet's halves and the autoencoder's decoder go through
    ``torch.compile`` in its default mode.
    """
    student, clock = model.student, clock_for(record.device)
    combine, timestep = model.combine(record.steps), student.manifest.encoder_timestep
    counted = partial(flops.student, steps=record.steps, kind=variant)
    compiled = record.backend == "compile"
    if variant != "plain" and prepared:
        fast = model.fast(FastOptions(merged=variant == "merged", kernels=not compiled, compiled=compiled))
        if fast is not None:
            run = StudentPass(fast, student.tokenizer, encoder_timestep=timestep, held=SHAPES_HELD)
            draw = partial(run, combine=combine, clock=clock)
            return Subject(record, torch.inference_mode()(draw), clock, counted, compiles=True)
    shared = partial(SharedUNetDecoder, merged_upsampler=variant == "merged")
    encoder: Any = UNetEncoder(student.unet)
    decoder: Any = UNetDecoder(student.unet) if variant == "plain" else shared(student.unet)
    vae: Any = student.vae
    if compiled:
        encoder, decoder = torch.compile(encoder), torch.compile(decoder)
        vae = with_same_weights(vae)
        vae.decoder = torch.compile(vae.decoder)
    timesteps = torch.tensor(combine.timesteps, device=record.device)

    def denoise(text_states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with clock.stage("unet_encoder"):
            features = encoder(noise.to(text_states.dtype), text_states, timestep)
        with clock.stage("unet_decoder"):
            # The sum takes the unrounded noise, as the product does: its weight is the largest.
            latents: torch.Tensor = combine(noise, decoder(features, timesteps, text_states))
        return latents

    return Subject(record, _drawing(model, clock, denoise, vae=vae), clock, counted, compiles=compiled)


def _drawing(
    model: LoadedModel,
    clock: StageClock,
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    vae: Any = None,
) -> Draw:
    """Text states, ``denoise`` of them and of placed float32 noise, pixels; ``vae`` None is the model's."""
    images = ImageDecoder(model.components.vae if vae is None else vae)

    @torch.inference_mode()
    def draw(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
        text_states = _encode(model, clock, list(prompts))
        latents = denoise(text_states, torch.from_numpy(noise).to(text_states.device))
        with clock.stage("vae"):
            return images.decode(latents)

    return draw


def _encode(model: LoadedModel, clock: StageClock, prompts: list[str]) -> torch.Tensor:
    parts = model.components
    with clock.stage("text"):
        return encode_prompts(parts.tokenizer, parts.text_encoder, prompts).to(parts.unet.dtype)
