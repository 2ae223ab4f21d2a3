"""Papercut's trainings on one GPU: what takes two cores a night takes it minutes.

    cd benchmarks/papercut
    python checkpoints.py take                              # tokenizer and text encoder, and weights to go on from
    python on_gpu.py draw &                                 # scenes of two seeds and what is in them, on all cores
    python on_gpu.py autoencoder --seconds 110
    python on_gpu.py teacher --seconds 170                  # begins by encoding the scenes; waits for the autoencoder
    python on_gpu.py checker --seconds 240
    python package.py --out work/teacher

The networks, losses and learning rates are those of the scripts that train on a CPU. Everything lies on the device,
the batches are larger, and a whole step, draws included, is one CUDA graph. A budget is of seconds; the learning rate
falls to its end. Without a GPU the same commands run, slowly: a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WORK, Run, chunks, trapezoid
from layout_head import CHANNELS, SIDE, LayoutHead, layout_map
from torch import Tensor, nn

from tiue_cli.papercut.world.captions import random_specs, rough_phrase
from tiue_cli.papercut.world.checker import CELL, CELLS, HEADS, targets
from tiue_cli.papercut.world.scenes import SIZE, compositions, render

DRAWN = ((2, 512), (4, 2000), (10, 40_000), (12, 160_000))
"""Seeds and counts of the scenes, in the order in which they are needed: held out, the checker's, to train on."""
TRAINED_ON = (10, 12)
PHRASINGS = 2
"""Captions of each scene."""
WAIT_S = 600.0


# --- scenes -----------------------------------------------------------------------------------------------------------


def arrays(seed: int, count: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of what is kept of a seed's scenes."""
    return {
        "images": ((count, SIZE, SIZE, 3), np.uint8),
        "heads": ((count, len(HEADS)), np.int8),
        "cells": ((count, CELLS**2, len(CELL)), np.int8),
        "layouts": ((count, CHANNELS, SIDE, SIDE), np.uint8),
    }


def place(name: str, seed: int, count: int) -> Path:
    return WORK / f"gpu_{name}_{count}_{seed}.npy"


def draw(args: argparse.Namespace) -> None:
    """Draw all scenes; a file has its name when it is whole."""
    import train_checker  # noqa: F401  # once, before the processes part

    WORK.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.processes or os.cpu_count()) as pool:
        for seed, count in drawn(args):
            started = time.perf_counter()
            specs = random_specs(count, seed)
            for name, (shape, kind) in arrays(seed, count).items():
                np.lib.format.open_memmap(place(name, seed, count).with_suffix(".part"), "w+", kind, shape).flush()
            starts, parts, seeds = zip(*chunks(specs, seed), strict=True)
            list(pool.map(_draw_part, parts, seeds, [seed] * len(parts), [count] * len(parts), starts))
            for name in arrays(seed, count):
                place(name, seed, count).with_suffix(".part").rename(place(name, seed, count))
            seconds = time.perf_counter() - started
            print(json.dumps({"scenes": count, "seed": seed, "seconds": round(seconds, 1)}), flush=True)


def drawn(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Seeds and counts, the counts cut for a rehearsal."""
    return [(seed, max(200, int(count * args.scale))) for seed, count in DRAWN]


def _draw_part(specs: list[Any], chunk_seed: int, seed: int, count: int, start: int) -> None:
    from train_checker import cell_targets

    torch.set_num_threads(1)
    pieces = compositions(specs, chunk_seed)
    cells = cell_targets(pieces)
    values = {
        "images": render(specs, chunk_seed),
        "heads": torch.stack(list(targets([piece.scene for piece in pieces]).values()), 1).numpy(),
        "cells": torch.stack([cells[name] for name in CELL], 2).numpy(),
        "layouts": np.stack([layout_map(each) for each in pieces]),
    }
    for name, value in values.items():
        array = np.load(place(name, seed, count).with_suffix(".part"), mmap_mode="r+")
        array[start : start + len(specs)] = value
        array.flush()


def waited(path: Path) -> Path:
    """The path as soon as it is there."""
    ends = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > ends:
            raise SystemExit(f"waited {WAIT_S:.0f} s for {path}")
        time.sleep(0.2)
    return path


def scenes_of(args: argparse.Namespace, seed: int, name: str = "images") -> np.ndarray:
    """An array of a seed's scenes, waited for."""
    count = dict(drawn(args))[seed]
    return np.load(waited(place(name, seed, count)), mmap_mode="r")


def to_device(array: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device)


# --- a training -------------------------------------------------------------------------------------------------------


class Training:
    """Steps of one function within a budget of seconds; its learning rate follows the trapezoid.

    ``step()`` draws its batch, calls ``optimizer``'s step, returns the loss, and never waits for the device: on a GPU
    it is captured as one CUDA graph. What changes over the training, it reads from tensors.
    """

    def __init__(self, name: str, args: argparse.Namespace, *, learning_rate: float) -> None:
        self.name, self.device, self.seconds = name, args.device, args.seconds
        self.peak_rate = learning_rate
        self.rate = torch.tensor(learning_rate, device=self.device)
        self.progress_log = WORK / f"{name}.log.jsonl"
        self.steps = 0

    def optimizer(self, parameters: Sequence[nn.Parameter], *, weight_decay: float) -> torch.optim.Optimizer:
        on_gpu = self.device != "cpu"
        return torch.optim.AdamW(
            parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True, capturable=on_gpu
        )

    def run(
        self,
        step: Callable[[], Tensor],
        *,
        decay: float,
        every: int = 20,
        at: Callable[[float], None] = lambda progress: None,
    ) -> None:
        """Train; ``at(progress)`` is told every few steps."""
        self.rate.fill_(self.peak_rate * 0.01)
        started = time.perf_counter()
        step = captured(step) if self.device != "cpu" else step
        self.log(captured=round(time.perf_counter() - started, 1))
        started, said = time.perf_counter(), 0.0
        progress, losses = 0.0, []
        while progress < 1:
            self.rate.fill_(self.peak_rate * trapezoid(progress, warmup=0.02, decay=decay))
            at(progress)
            for _ in range(every if self.device != "cpu" else 1):
                loss = step()
                self.steps += 1
            losses.append(float(loss))  # waits for the device
            elapsed = time.perf_counter() - started
            progress = elapsed / self.seconds
            if elapsed - said > 10 or progress >= 1:
                said = elapsed
                rate = self.steps / elapsed
                self.log(
                    seconds=round(elapsed, 1), loss=round(float(np.mean(losses[-50:])), 4), steps_per_s=round(rate, 1)
                )
                if not np.isfinite(losses[-1]):
                    raise SystemExit(f"{self.name}: the loss is not finite")

    def log(self, **figures: Any) -> None:
        line = json.dumps({"step": self.steps, **figures})
        with self.progress_log.open("a") as log:
            log.write(line + "\n")
        print(f"{self.name}: {line}", flush=True)


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    *,
    most: float,
) -> Tensor:
    """One step of the optimiser, the gradients' norm at ``most``; returns the loss. Waits for nothing."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of_batch()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, most)
    optimizer.step()
    return loss.detach()


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph; as it is, and told, where it cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loss = step()
    except RuntimeError as error:
        print(f"not captured: {str(error)[:300]}", flush=True)
        torch.cuda.synchronize()
        return step

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def faster_format(module: nn.Module, run: Callable[[], Tensor], device: str) -> torch.memory_format:
    """Whether `run`, forward and backward, is faster with channels last; leaves the module in that format."""
    if device == "cpu":
        return torch.channels_last
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        nn.Module.to(module, memory_format=layout)
        for times in (2, 5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(times):
                run().backward()
            torch.cuda.synchronize()
            seconds[layout] = (time.perf_counter() - started) / times
    module.zero_grad(set_to_none=True)
    best = min(seconds, key=lambda layout: seconds[layout])
    nn.Module.to(module, memory_format=best)
    print({str(layout): round(value, 4) for layout, value in seconds.items()}, "chosen:", best, flush=True)
    return best


def pixels_of(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) in [-1, 1]; channels last in memory as they come."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def begin(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True


# --- autoencoder ------------------------------------------------------------------------------------------------------


def autoencoder(args: argparse.Namespace) -> None:
    """Go on from the kept weights, on whole pictures; with --decoder-only the latents stay what they are."""
    from diffusers import AutoencoderTiny
    from train_autoencoder import CONFIG, LATENT_NOISE, LEARNING_RATE, psnr, reconstruction_loss, whiteness_penalty

    begin(args)
    device, name = args.device, "autoencoder" + ("_decoder" if args.decoder_only else "")
    training = Training(name, args, learning_rate=LEARNING_RATE * (0.5 if args.decoder_only else 1.0))
    vae = AutoencoderTiny(**CONFIG).to(device)
    if args.decoder_only:
        vae = AutoencoderTiny.from_pretrained(waited(WORK / "vae_done").parent / "vae").to(device)
        vae.encoder.requires_grad_(False)
    elif not args.fresh and (states := Run("autoencoder", minutes=1, fresh=False).load()) is not None:
        vae.load_state_dict(states["model"])
    held_out = np.array(scenes_of(args, 2))
    images = to_device(scenes_of(args, 10), device)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = training.optimizer(parameters, weight_decay=1e-4)
    squares = torch.tensor(2.0, device=device)

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(images), (args.batch or 64,), device=device)
        target = pixels_of(images[rows])
        latents = vae.encode(target).latents
        output = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        fit = reconstruction_loss((output + 1) / 2, (target + 1) / 2, l2=squares)
        return fit if args.decoder_only else fit + 0.05 * whiteness_penalty(latents)

    def step() -> Tensor:
        return update(optimizer, parameters, loss_of_batch, most=1.0)

    faster_format(vae, loss_of_batch, device)
    training.run(step, decay=0.6, at=lambda progress: squares.fill_(2.0 if progress < 0.6 else 8.0))
    overall, edges = psnr(vae, held_out, device)
    training.log(final=True, psnr_db=round(overall, 3), edge_psnr_db=round(edges, 3), images=len(held_out))
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(WORK / "vae")
    (WORK / "vae_done").touch()


# --- teacher ----------------------------------------------------------------------------------------------------------


def teacher(args: argparse.Namespace) -> None:
    """The UNet on the latents of all scenes, its running mean kept; then the guidance that follows captions best."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from train_teacher import CONFIG, DECAY, DROPOUT, LEARNING_RATE, SCHEDULER, Text, make_unet, velocity_loss

    from tiue_cli.distill.muon import Muon

    begin(args)
    device, count = args.device, args.batch or 512
    training = Training("teacher", args, learning_rate=LEARNING_RATE)
    text = Text(device)
    states, empty = caption_states(args, text), text([""])
    waited(WORK / "vae_done")
    latents = scene_latents(args)
    layouts = torch.cat([to_device(scenes_of(args, seed, "layouts"), device) for seed in TRAINED_ON])
    training.log(scenes=len(latents), captions=len(states))
    unet = make_unet().to(device)
    head = LayoutHead(unet).to(device)
    mean = UNet2DConditionModel(**CONFIG).to(device).requires_grad_(False)
    mean.load_state_dict(unet.state_dict())
    parameters, means = list(unet.parameters()), list(mean.parameters())
    trained = [*parameters, *head.parameters()]
    optimizer = Muon(trained, lr=LEARNING_RATE, weight_decay=DECAY, capturable=device != "cpu")
    for group in optimizer.param_groups:
        group["lr"] = training.rate
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    share = torch.tensor(0.1, device=device)  # of the new weights in the mean

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(latents), (count,), device=device)
        said = states[rows + len(latents) * torch.randint(PHRASINGS, (count,), device=device)].float()
        said = torch.where(torch.rand(count, 1, 1, device=device) < DROPOUT, empty, said)
        clean = latents[rows].float()
        spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        timesteps = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
        loss = velocity_loss(unet, clean, torch.randn_like(clean), timesteps, said, alphas)
        return loss + training.rate / LEARNING_RATE * head.loss(layouts[rows].float() / 255)

    def step() -> Tensor:
        loss = update(optimizer, trained, loss_of_batch, most=1.0)
        with torch.no_grad():
            ahead = torch._foreach_sub(parameters, means)
            torch._foreach_mul_(ahead, share)
            torch._foreach_add_(means, ahead)
        return loss

    def follow(progress: float) -> None:
        share.fill_(max(1 - args.ema, min(0.1, 1 / (1 + training.steps))))

    faster_format(unet, loss_of_batch, device)
    training.run(step, decay=0.6, at=follow)
    mean.to(memory_format=torch.contiguous_format).save_pretrained(WORK / "unet")
    choose_guidance(mean.eval(), text, training, args)


def caption_states(args: argparse.Namespace, text: Any) -> Tensor:
    """(PHRASINGS·N, 24, 160) fp16 on the device; caption p·N + i is the p-th of scene i."""
    rng, parts = random.Random(3), []
    specs = [spec for seed in TRAINED_ON for spec in random_specs(dict(drawn(args))[seed], seed)]
    for _ in range(PHRASINGS):
        captions = [rough_phrase(spec, rng) for spec in specs]
        parts += [text(captions[i : i + 4096]).half() for i in range(0, len(captions), 4096)]
    return torch.cat(parts)


@torch.inference_mode()
def scene_latents(args: argparse.Namespace) -> Tensor:
    """(N, 12, 16, 16) fp16 on the device."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(args.device, memory_format=torch.channels_last)
    parts = []
    for seed in TRAINED_ON:
        images = scenes_of(args, seed)
        for start in range(0, len(images), 500):
            batch = pixels_of(to_device(images[start : start + 500], args.device))
            parts.append(vae.encode(batch).latents.half())
    return torch.cat(parts).clone()


def choose_guidance(unet: nn.Module, text: Any, training: Training, args: argparse.Namespace) -> None:
    """Write the guidance whose pictures of held-out captions are most often right in everything."""
    from train_teacher import evaluate

    best = (-1.0, 0.0)
    for guidance in args.guidance:
        figures = evaluate(unet, text, "teacher", count=args.images, steps=25, guidance=guidance, batch=512)
        training.log(guidance=guidance, **figures)
        best = max(best, (figures.get("all", 0.0), guidance))
    (WORK / "guidance.txt").write_text(f"{best[1]}\n")


# --- checker ----------------------------------------------------------------------------------------------------------


def checker(args: argparse.Namespace) -> None:
    """On renders and on their round trips through the autoencoder, half of each batch."""
    from diffusers import AutoencoderTiny
    from train_autoencoder import LATENT_NOISE
    from train_checker import LEARNING_RATE, disturbed, finish, training_loss

    from tiue_cli.papercut.world.checker import Checker

    begin(args)
    device, count = args.device, args.batch or 256
    training = Training("checker", args, learning_rate=LEARNING_RATE)
    images = torch.cat([to_device(scenes_of(args, seed), device) for seed in TRAINED_ON])
    heads = torch.cat([to_device(scenes_of(args, seed, "heads"), device) for seed in TRAINED_ON])
    cells = torch.cat([to_device(scenes_of(args, seed, "cells"), device) for seed in TRAINED_ON])
    waited(WORK / "vae_done")
    vae = AutoencoderTiny.from_pretrained(WORK / "vae").to(device, memory_format=torch.channels_last)
    network = Checker().to(device, memory_format=torch.channels_last)
    if not args.fresh and (states := Run("checker", minutes=1, fresh=False).load()) is not None:
        network.load_state_dict(states["model"])
    parameters = list(network.parameters())
    optimizer = training.optimizer(parameters, weight_decay=0.02)

    def loss_of_batch() -> Tensor:
        rows = torch.randint(len(images), (count,), device=device)
        pixels = pixels_of(images[rows])
        with torch.no_grad():
            latents = vae.encode(pixels[: count // 2]).latents
            again = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.clamp(-1, 1)
            pixels = disturbed(torch.cat([again, pixels[count // 2 :]]))
        wanted = dict(zip(HEADS, heads[rows].long().unbind(1), strict=True))
        there = dict(zip(CELL, cells[rows].long().unbind(2), strict=True))
        return training_loss(network, pixels, wanted, there)

    training.run(lambda: update(optimizer, parameters, loss_of_batch, most=2.0), decay=0.7)
    finish(network.to("cpu", memory_format=torch.contiguous_format).eval(), training.log)


ACTIONS = {"draw": draw, "autoencoder": autoencoder, "teacher": teacher, "checker": checker}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("action", choices=ACTIONS)
    options.add_argument("--seconds", type=float, default=120.0, help="of training")
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--ema", type=float, default=0.9995)
    options.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0, 2.5, 3.0, 4.0])
    options.add_argument("--images", type=int, default=1024, help="to choose the guidance by")
    options.add_argument("--decoder-only", action="store_true")
    options.add_argument("--fresh", action="store_true", help="not from the kept weights")
    options.add_argument("--processes", type=int, default=None, help="that draw")
    scale = float(os.environ.get("PAPERCUT_SCALE", "1"))
    options.add_argument("--scale", type=float, default=scale, help="of the counts of scenes: a rehearsal")
    args = options.parse_args()
    ACTIONS[args.action](args)


if __name__ == "__main__":
    main()
