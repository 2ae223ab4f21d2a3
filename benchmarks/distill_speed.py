"""The same distillation step twice, plainly written and as tiue does it, on equal seeds in one run.

    python benchmarks/distill_speed.py --teacher papercut --steps 20

The ceiling: with K = 4 the plain decoder costs 4 · 67.5 % of a UNet pass and the UNet encoder 32.5 %; sharing saves
what does not depend on the timestep (10 % of the decoder at Stable Diffusion's size). Batching guided pairs saves
launches and small-batch losses, cached text states a pass of the text encoder. Plain is: a K-fold decoder batch, four
separate calls of the two teachers, adapters beside their layers as peft runs them, text and empty prompt encoded in
every step, contiguous memory. Both optimise; the losses must agree. Time is the process's own CPU time on a CPU (other
processes do not count) and wall time on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiue_cli.distill import loop as loop_module
from tiue_cli.distill import trainer as trainer_module
from tiue_cli.distill.config import Layer, parse_overrides, resolve_config
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.losses import guided
from tiue_cli.distill.networks import ScoreModel, guided_prediction
from tiue_cli.distill.trainer import Trainer
from tiue_cli.machine import machine_info


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
    loop_module.ScoreModel = partial(ScoreModel, merged=False) if plain else ScoreModel  # type: ignore[assignment, misc]
    trainer = run.prepare()
    if plain:
        for unet in (trainer.networks.student, trainer.networks.score.unet):
            unet.to(memory_format=torch.contiguous_format)
    return run, trainer


def timed_step(run: Distillation, trainer: Trainer, *, plain: bool) -> tuple[float, dict[str, float]]:
    on_gpu = trainer.accelerator.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    trainer_module.guided_prediction = separate_calls if plain else guided_prediction  # type: ignore[assignment]
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    if plain:  # without a cache the empty prompt is encoded with the others
        run._texts.empty = run._texts._encode([""]).to(trainer.accelerator.device)
    figures = trainer.step()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started, figures


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
        runs = {kind: make_trainer(args, plain=kind == "plain", folder=folder) for kind in ("plain", "tiue")}
        seconds: dict[str, list[float]] = {"plain": [], "tiue": []}
        worst = 0.0
        for step in range(args.warm_up + args.steps):
            found = {}
            for kind, (run, trainer) in runs.items():  # in turns, so that both meet the same machine
                spent, found[kind] = timed_step(run, trainer, plain=kind == "plain")
                if step >= args.warm_up:
                    seconds[kind].append(spent)
            for name_, value in found["plain"].items():
                if value != 0.0:
                    worst = max(worst, abs(found["tiue"][name_] - value) / abs(value))
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        report = {
            "teacher": args.teacher,
            "batch_size": args.batch_size,
            "settings": args.set,
            "steps": args.steps,
            "threads": torch.get_num_threads(),
            "clock": "CPU time" if runs["tiue"][1].accelerator.device.type == "cpu" else "wall time",
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
