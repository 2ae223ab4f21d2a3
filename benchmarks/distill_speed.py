"""The same distillation step twice, plainly written and as tiue does it, on equal seeds in one run.

    python benchmarks/distill_speed.py --teacher papercut --steps 20

The ceiling: with K = 4 the plain decoder costs 4 · 67.5 % of a UNet pass and the UNet encoder 32.5 %; sharing saves
what does not depend on the timestep (10 % of the decoder at Stable Diffusion's size). Batching guided pairs saves
launches and small-batch losses, cached text states a pass of the text encoder. Plain is: a K-fold decoder batch, four
separate calls of the two teachers, adapters beside their layers as peft runs them, upsamplers in two operations, text
and empty prompt encoded in every step, contiguous memory, the C library's allocator as it comes. Both optimise; the
losses must agree. Each has a process of its own, and they take turns, so that both meet the same machine. Time is the
process's own CPU time on a CPU (other processes do not count) and wall time on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiue_cli.base.machine import machine_info
from tiue_cli.distill import acceleration as acceleration_module
from tiue_cli.distill import loop as loop_module
from tiue_cli.distill import trainer as trainer_module
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.losses import guided
from tiue_cli.distill.networks import ScoreModel
from tiue_cli.distill.resolve import Layer, parse_overrides, resolve_config
from tiue_cli.distill.trainer import Trainer


@torch.no_grad()
def separate_calls(
    model: Any, x_t: Tensor, timesteps: Tensor, *, text_states: Tensor, empty_states: Tensor, guidance: float
) -> Tensor:
    """``guided_prediction`` in two calls."""
    conditional = model(x_t, timesteps, text_states).float()
    unconditional = model(x_t, timesteps, empty_states.expand_as(text_states)).float()
    return guided(conditional, unconditional, guidance)


def make_trainer(args: argparse.Namespace, *, plain: bool, folder: Path) -> tuple[Distillation, Trainer]:
    values = {
        "teacher": args.teacher,
        "prompts": str(folder / "prompts.txt"),
        "cache": str(folder / "cache"),
        "batch_size": args.batch_size,
        "text_cache": not plain,
        "student": {"decoder": "plain" if plain else "shared", "spacing": "trailing"},
        "validation": {"every": 0},
    }
    layers = [Layer("bench", values), Layer("--set", parse_overrides(args.set))]
    run = Distillation(resolve_config(layers).config, folder / "never written")
    if plain:
        loop_module.ScoreModel = partial(ScoreModel, merged=False, merged_upsampler=False)  # type: ignore[assignment, misc]
        trainer_module.guided_prediction = separate_calls  # type: ignore[assignment]
        acceleration_module.keep_freed_memory = lambda: False
    trainer = run.prepare()
    if plain:
        for unet in (trainer.networks.student, trainer.networks.score.unet):
            unet.to(memory_format=torch.contiguous_format)
    return run, trainer


def timed_step(run: Distillation, trainer: Trainer, *, plain: bool) -> tuple[float, dict[str, float]]:
    on_gpu = trainer.accelerator.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    if plain:  # without a cache the empty prompt is encoded with the others
        run._texts.empty = run._texts._encode([""]).to(trainer.accelerator.device)
    figures = trainer.step()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started, figures


def work(pipe: Connection, args: argparse.Namespace, plain: bool, folder: Path) -> None:
    """A process: whatever comes through the pipe is answered with a step; None ends it."""
    run, trainer = make_trainer(args, plain=plain, folder=folder)
    pipe.send((trainer.accelerator.device.type, torch.get_num_threads()))
    while pipe.recv() is not None:
        pipe.send(timed_step(run, trainer, plain=plain))


def start(args: argparse.Namespace, *, plain: bool, folder: Path) -> tuple[Connection, str, int]:
    """A working process: the pipe to it, its device and its number of threads."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    context.Process(target=work, args=(its, args, plain, folder), daemon=True).start()
    device, threads = mine.recv()
    return mine, device, threads


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--teacher", default="papercut")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--warm-up", type=int, default=3)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--out", type=Path, default=None)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"a {color} {thing}" for color in ("red", "blue", "pink") for thing in ("star", "tree", "fish")]
        (folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
        workers = {}
        for kind in ("plain", "tiue"):
            workers[kind], device, threads = start(args, plain=kind == "plain", folder=folder)
        seconds: dict[str, list[float]] = {"plain": [], "tiue": []}
        worst = 0.0
        for step in range(args.warm_up + args.steps):
            found = {}
            for kind, pipe in workers.items():
                pipe.send(step)
                spent, found[kind] = pipe.recv()
                if step >= args.warm_up:
                    seconds[kind].append(spent)
            for name_, value in found["plain"].items():
                if value != 0.0:
                    worst = max(worst, abs(found["tiue"][name_] - value) / abs(value))
        for pipe in workers.values():
            pipe.send(None)
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        report = {
            "teacher": args.teacher,
            "batch_size": args.batch_size,
            "settings": args.set,
            "steps": args.steps,
            "threads": threads,
            "clock": "CPU time" if device == "cpu" else "wall time",
            "median_seconds_per_step": {kind: round(value, 4) for kind, value in medians.items()},
            "quartiles_s": {
                kind: [round(value, 4) for value in statistics.quantiles(values, n=4)]
                for kind, values in seconds.items()
            },
            "speedup": round(medians["plain"] / medians["tiue"], 3),
            "largest_relative_difference_of_losses": float(f"{worst:.2g}"),
            "machine": machine_info().cpu,
        }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
