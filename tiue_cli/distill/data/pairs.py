"""Pairs for the warm start: noise, and what the teacher's solver makes of it under a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

from tiue_cli.distill.data.order import EndlessOrder, Stream, generator, normal
from tiue_cli.distill.data.text_states import TextStates
from tiue_cli.distill.networks import guided_prediction
from tiue_cli.files.rows import RowCache
from tiue_cli.model.schedule import ddim_config

CHUNK_PAIRS = 256
"""An interruption loses at most the pairs of one file."""


@torch.no_grad()
def solve(
    model: torch.nn.Module,
    noise: Tensor,
    *,
    scheduler_config: Mapping[str, Any],
    text_states: Tensor,
    empty_states: Tensor,
    steps: int,
    guidance: float,
    solver: Literal["ddim", "unipc"],
) -> Tensor:
    """The guided teacher's x_0 (B, C, h, w) in float32 from noise (B, C, h, w), by the probability-flow ODE.

    ``ddim`` spaces its steps as the scheduler config says, so it equals ``tiue generate``'s teacher; ``unipc`` is
    UniPC (Zhao et al. 2023, arXiv 2302.04867), second order, Karras' spacing. Against 200 DDIM steps of papercut's
    teacher at guidance 3, 12 of its steps are off by 2.3 % of the latents' deviation, 25 of DDIM's by 3.3 %.
    """
    config = ddim_config(scheduler_config)
    scheduler: Any
    if solver == "ddim":
        scheduler = DDIMScheduler.from_config(config)
    else:
        scheduler = UniPCMultistepScheduler.from_config(
            {**config, "_class_name": "UniPCMultistepScheduler"}, use_karras_sigmas=True, final_sigmas_type="sigma_min"
        )
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise.float()
    for timestep in scheduler.timesteps:
        timesteps = timestep.to(torch.long).expand(len(noise))
        prediction = guided_prediction(
            model, latents, timesteps, text_states=text_states, empty_states=empty_states, guidance=guidance
        )
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def pair_noises(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise (len(indices), C, h, w) of pairs; not stored, since it can be drawn again."""
    return torch.stack([normal(generator(seed, Stream.PAIR_NOISE, step=index), shape) for index in indices])


def pair_prompt(index: int, prompts: int) -> int:
    """The prompt of a pair: through the list in order, and again from the start."""
    return index % prompts


def fill_pairs(
    cache: RowCache,
    texts: TextStates,
    solution_of: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    batch_size: int,
    process: tuple[int, int],
) -> Iterator[int]:
    """Generate the missing chunks that fall to this ``process`` (index, count); yields the pairs of each batch done.

    ``solution_of(noise, text_states)`` solves a batch.
    """
    for chunk in cache.missing(process):
        rows, parts = cache.chunk_range(chunk), []
        for start in range(rows.start, rows.stop, batch_size):
            batch = range(start, min(start + batch_size, rows.stop))
            noise = pair_noises(seed, batch, cache.shape).to(texts.device)
            states = texts.rows([pair_prompt(pair, texts.count) for pair in batch])
            parts.append(solution_of(noise, states).cpu())
            yield len(batch)
        cache.write(chunk, torch.cat(parts).numpy())


class PairData:
    """Filled pairs, to be gone through in an endless shuffled order."""

    def __init__(self, cache: RowCache, *, seed: int, teacher_evaluations: int) -> None:
        """``teacher_evaluations``: rows through the teacher that these pairs cost, whenever they were made."""
        self.cache, self.seed, self.teacher_evaluations = cache, seed, teacher_evaluations
        self.order = EndlessOrder(cache.count, seed=seed, stream=Stream.PAIR_ORDER)

    def batch(self, rows: Sequence[int], texts: TextStates) -> tuple[Tensor, Tensor, Tensor]:
        """Noise and solution (B, C, h, w) and text states (B, L, D) of some pairs, on the device."""
        noise = pair_noises(self.seed, rows, self.cache.shape).to(texts.device, memory_format=torch.channels_last)
        solution = torch.from_numpy(self.cache.rows(rows)).to(texts.device)
        return noise, solution, texts.rows([pair_prompt(row, texts.count) for row in rows])
