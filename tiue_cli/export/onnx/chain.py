"""What the graphs must compute, in torch and float32: every tensor that crosses a border, for one case.

The reference for the parity check. It uses the plain decoder (a batch of K·B rows), not the sharing one that is
exported, so that the two have as little code in common as possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tiue_cli.files.exports import Size
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.schedule import LinearCombine, decoder_timesteps
from tiue_cli.model.student import StudentModel
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

CHECK_PROMPTS = ("a red heart above a blue house", "a yellow star at night")
"""The fixed prompts of every check: within papercut's vocabulary, and plain English for any other model."""

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A batch of images to compare: ``latent`` is the latents' (h, w), ``steps`` is K."""

    batch: int
    steps: int
    latent: Size

    @property
    def label(self) -> str:
        """Such as ``3 images, K=1, latents 8x12``."""
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{images}, K={self.steps}, latents {self.latent[0]}x{self.latent[1]}"


@torch.no_grad()
def run_chain(student: StudentModel, case: Case) -> dict[str, np.ndarray]:
    """All tensors of a case by their names in the graphs: float32, tokens and timesteps int64, images uint8."""
    input_ids = tokenize(student, check_prompts(case.batch))
    channels = int(student.unet.config["in_channels"])
    noise = torch.from_numpy(draw_noise(range(case.batch), (channels, *case.latent)))
    text_states = student.text_encoder(input_ids)[0]
    features = UNetEncoder(student.unet)(noise, text_states, student.manifest.encoder_timestep)
    combine = _combine(student, case.steps)
    timesteps = torch.tensor(combine.timesteps)
    latents = combine(noise, UNetDecoder(student.unet)(features, timesteps, text_states))
    tensors = {
        "input_ids": input_ids.numpy(),
        "text_states": text_states.numpy(),
        "noise": noise.numpy(),
        "mid": features.mid.numpy(),
        **{f"skip_{index:02}": skip.numpy() for index, skip in enumerate(features.skips)},
        "timesteps": timesteps.numpy(),
        "weights": np.array(combine.weights, dtype=np.float32),
        "latents": latents.numpy(),
    }
    return {**tensors, "images": ImageDecoder(student.vae).decode(latents)}


def check_prompts(batch: int) -> list[str]:
    """The fixed prompts of a batch, over and over."""
    return [CHECK_PROMPTS[index % len(CHECK_PROMPTS)] for index in range(batch)]


@contextlib.contextmanager
def largest_magnitude(module: nn.Module) -> Iterator[Callable[[], float]]:
    """Watch a module at work: yields a function that says the largest magnitude of any layer's output so far."""
    largest = [0.0]

    def look(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            largest.append(max(largest.pop(), float(output.detach().abs().max())))

    handles = [part.register_forward_hook(look) for part in module.modules()]
    try:
        yield lambda: largest[0]
    finally:
        for handle in handles:
            handle.remove()


def tokenize(student: StudentModel, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (B, L) int64, as ``model.text.encode_prompts`` makes them."""
    tokenizer = student.tokenizer
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    input_ids: torch.Tensor = tokens.input_ids
    return input_ids


def _combine(student: StudentModel, steps: int) -> LinearCombine:
    """The student's own timesteps where it has so many; else what the schedule gives: arithmetic is arithmetic."""
    if steps == len(student.manifest.decoder_timesteps):
        return student.linear_combine()
    config = student.scheduler_config
    return LinearCombine.from_scheduler_config(config, decoder_timesteps(config, steps, spacing="leading"))
