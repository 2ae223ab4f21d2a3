"""Distil papercut's teacher into a latent consistency model: one of the methods that TiUE is compared with.

    python train_lcm.py --config runs/warm.yaml --pairs 10240 --steps 1500 --out work/lcm

LCM (Luo et al. 2023, arXiv 2310.04378, algorithm 1): f(x_t, t) = c_skip·x_t + c_out·x_0(x_t, t) must agree along the
teacher's guided trajectory; one DDIM step of the teacher over k = 20 timesteps from the noisier point, the target from
the EMA of the student at the cleaner one, pseudo-Huber loss. Data-free like the others: x_0 are the teacher's solutions
that `tiue distill` caches for its warm start. The result is a diffusers folder with LCMScheduler, which samples it in
any number of steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn

from tiue_cli.distill.data.order import Stream, generator, normal
from tiue_cli.distill.data.pairs import PairData
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.losses import NoiseSchedule
from tiue_cli.distill.networks import guided_prediction
from tiue_cli.distill.resolve import Layer, read_config, resolve_config
from tiue_cli.distill.student_trainer import rate_factor
from tiue_cli.files.manifests import write_json
from tiue_cli.model.student import save_student

GRID, TIMESTEP_SCALING, SIGMA_DATA = 50, 10.0, 0.5


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B, 1, 1, 1), which make f the identity at t = 0; LCMScheduler's own."""
    scaled = timesteps.float().reshape(-1, 1, 1, 1) * TIMESTEP_SCALING
    root = (scaled.square() + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / root.square(), scaled / root


def consistency(unet: nn.Module, x_t: Tensor, timesteps: Tensor, states: Tensor, schedule: NoiseSchedule) -> Tensor:
    """f(x_t, t) (B, C, h, w)."""
    prediction = unet(x_t, timesteps, encoder_hidden_states=states, return_dict=False)[0]
    noise = schedule.noise_of(prediction, x_t, timesteps)
    root_abar, sigma = schedule.at(timesteps)
    skip, out = boundary(timesteps)
    return skip * x_t + out * (x_t - sigma * noise) / root_abar


def train(run: Distillation, args: argparse.Namespace) -> dict[str, Any]:
    trainer = run.prepare()
    networks, texts = trainer.networks, trainer.texts
    schedule, student = networks.schedule, networks.student
    pairs = PairData(run._pair_cache(), seed=run.config.seed, teacher_evaluations=run._pair_evaluations())
    target = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    grid = torch.arange(1, GRID + 1) * (len(schedule.sigma) // GRID) - 1
    guidance, batch = run.config.warm_start.guidance, run.config.batch_size
    started, lines = time.perf_counter(), []
    for step in range(args.steps):
        random = generator(run.config.seed, Stream.SCORE, step=step)
        rows = pairs.order.rows(step * batch, batch)
        _, x_0, states = pairs.batch(rows, texts)
        index = torch.from_numpy(random.integers(GRID, size=batch))
        t = grid[index].to(x_0.device)
        t_next = (t - len(schedule.sigma) // GRID).clamp_min(0)
        noise = normal(random, x_0.shape).to(x_0.device, memory_format=torch.channels_last)
        x_t = schedule.add_noise(x_0, noise, t)
        with torch.no_grad():
            with networks.score.adapters_off():
                predicted = guided_prediction(
                    networks.score, x_t, t, text_states=states, empty_states=texts.empty, guidance=guidance
                )
            predicted = schedule.noise_of(predicted, x_t, t)
            root_abar, sigma = schedule.at(t)
            root_abar_next, sigma_next = schedule.at(t_next)
            x_next = root_abar_next * (x_t - sigma * predicted) / root_abar + sigma_next * predicted
            wanted = consistency(target, x_next, t_next, states, schedule)
        difference = consistency(student, x_t, t, states, schedule) - wanted
        loss = (difference.square() + args.huber**2).sqrt().mean() - args.huber
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate_factor(step, args.steps, warmup_steps=20, decay="linear")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for mean, value in zip(target.parameters(), student.parameters(), strict=True):
                mean.lerp_(value, 1 - args.ema)
        if (step + 1) % 50 == 0:
            lines.append({"step": step + 1, "loss": float(loss), "seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(lines[-1]), flush=True)
            if not math.isfinite(lines[-1]["loss"]):
                raise SystemExit("the loss is not finite")
    student.load_state_dict(target.state_dict())
    return {"teacher_evaluations": pairs.teacher_evaluations + args.steps * batch * 2, "log": lines}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", type=Path, required=True, help="the distillation's YAML: its pairs are the data")
    options.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.txt")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--pairs", type=int, default=None, help="only the first so many")
    options.add_argument("--learning-rate", type=float, default=5e-4)
    options.add_argument("--huber", type=float, default=1e-3)
    options.add_argument("--ema", type=float, default=0.95)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "work" / "lcm")
    args = options.parse_args()
    values = {**read_config(args.config), "prompts": str(args.prompts)}
    if args.pairs is not None:
        values["warm_start"] = {**values["warm_start"], "pairs": args.pairs}
    run = Distillation(resolve_config([Layer("file", values)]).config, args.out)
    report = train(run, args)
    folder = save_student(run._student, args.out, overwrite=True)
    (folder / "tiue.json").unlink()  # not a one-pass student: it samples by LCM's own rule
    scheduler = LCMScheduler.from_config(run._student.scheduler_config, timestep_spacing="leading")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "LCMScheduler"]})
    write_json(folder / "training.json", report | {"settings": {key: str(value) for key, value in vars(args).items()}})


if __name__ == "__main__":
    main()
