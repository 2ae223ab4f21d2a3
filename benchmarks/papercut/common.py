"""What the training scripts of papercut share: scenes on disk, a log, resumable checkpoints.

Everything is written below `benchmarks/papercut/work/` (ignored by git), or where `PAPERCUT_WORK` says; `package.py`
moves finished weights into the package. The same scripts run on a CPU and, with `--device cuda`, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tiue_cli.base.allocator import keep_freed_memory
from tiue_cli.papercut.world.captions import SceneSpec, random_specs
from tiue_cli.papercut.world.scenes import SIZE, render

WORK = Path(os.environ.get("PAPERCUT_WORK", Path(__file__).parent / "work"))
RENDER_CHUNK = 1000
SCENES = int(os.environ.get("PAPERCUT_SCENES", 48_000))  # what autoencoder, checker and teacher train on (seed 10)


def scenes(count: int, seed: int, *, processes: int | None = None) -> tuple[list[SceneSpec], np.ndarray]:
    """Specs and their renders (N, 128, 128, 3) uint8, drawn by several processes, cached as a memory-mapped array."""
    specs = random_specs(count, seed)
    path = WORK / f"scenes_{count}_{seed}.npy"
    if not path.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIZE, SIZE, 3)).flush()
        with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
            starts, parts, seeds = zip(*chunks(specs, seed), strict=True)
            list(pool.map(_render_part, [part] * len(starts), parts, seeds, starts))
        part.rename(path)
    return specs, np.load(path, mmap_mode="r")


def chunks(specs: Sequence[SceneSpec], seed: int) -> list[tuple[int, Sequence[SceneSpec], int]]:
    """Where each part of `scenes` starts, its specs, and the seed that its pictures are drawn from."""
    starts = range(0, len(specs), RENDER_CHUNK)
    return [(start, specs[start : start + RENDER_CHUNK], seed * 1_000_003 + start) for start in starts]


def _render_part(path: Path, specs: list[SceneSpec], seed: int, start: int) -> None:
    images = np.load(path, mmap_mode="r+")
    images[start : start + len(specs)] = render(specs, seed)
    images.flush()


def training_images(data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures to train on and held-out ones, (N, H, W, 3) uint8: rendered scenes, or those of a folder (`--data`)."""
    if data is None:
        return scenes(SCENES, seed=10)[1], scenes(512, seed=2)[1]
    return np.load(data / "images.npy", mmap_mode="r"), np.load(data / "held_out.npy")


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) float32 in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1)


def parser(description: str, *, minutes: float) -> argparse.ArgumentParser:
    """Options that every training takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--minutes", type=float, default=minutes, help="budget, over all resumed runs")
    options.add_argument("--threads", type=int, default=None, help="of torch, on a CPU")
    options.add_argument("--workers", type=int, default=1, help="processes that share a batch, on a CPU")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--name", default=None, help="name of the run's files in work/")
    options.add_argument("--fresh", action="store_true", help="start anew instead of resuming")
    options.add_argument("--data", type=Path, default=None, help="folder of another world: images.npy, captions.txt")
    return options


def begin(args: argparse.Namespace) -> None:
    """Seeds, threads and memory of a training."""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)


class Workers:
    """The processes that share a batch: gradients are averaged, the first one's clock holds for all.

    Two processes of one thread, each on its own core, did 5.2 steps a second of the autoencoder's training on two busy
    cores; one process did 3.3 with one thread and 2.7 with two, which wait for each other.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        if count > 1:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "29517")
            dist.init_process_group("gloo", rank=rank, world_size=count)
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[rank % len(cores)]})

    def average(self, parameters: Sequence[torch.nn.Parameter], loss: float, progress: float) -> tuple[float, float]:
        """Average the gradients in place; the mean loss, and the first process's progress."""
        if self.count == 1:
            return loss, progress
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat(
            [*(g.reshape(-1) for g in gradients), torch.tensor([loss, progress if self.rank == 0 else 0.0])]
        )
        dist.all_reduce(flat)
        *parts, losses, first = flat.split([*(g.numel() for g in gradients), 1, 1])
        for gradient, part in zip(gradients, parts, strict=True):
            torch.mul(part.view_as(gradient), 1 / self.count, out=gradient)
        return losses.item() / self.count, first.item()

    @staticmethod
    def run(train: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
        """Call `train(rank, args)` in `args.workers` processes; in this one where that is 1."""
        if args.workers == 1:
            train(0, args)
            return
        args.threads = 1
        torch.multiprocessing.spawn(train, (args,), nprocs=args.workers)


class Run:
    """A budgeted, resumable training: progress in [0, 1) drives the schedules, a JSON line a report is the log."""

    def __init__(self, name: str, *, minutes: float, fresh: bool) -> None:
        self.checkpoint_path, self.log_path = WORK / f"{name}.pt.safetensors", WORK / f"{name}.log.jsonl"
        WORK.mkdir(parents=True, exist_ok=True)
        self.budget_s, self.spent_s, self.step = minutes * 60, 0.0, 0
        # A training of one thread counts its own processor time, so that what else runs cannot shorten it.
        self._clock = time.process_time if torch.get_num_threads() == 1 else time.monotonic
        if fresh:
            self.checkpoint_path.unlink(missing_ok=True)
            self.log_path.unlink(missing_ok=True)
        self._resumed_at = self._clock()

    @property
    def elapsed_s(self) -> float:
        return self.spent_s + self._clock() - self._resumed_at

    @property
    def progress(self) -> float:
        return self.elapsed_s / self.budget_s

    def log(self, **figures: Any) -> None:
        line = {"step": self.step, "minutes": round(self.elapsed_s / 60, 2), **figures}
        with self.log_path.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def save(self, **states: dict[str, torch.Tensor]) -> None:
        """Write all states to one safetensors file, aside and renamed. Keys: `part/name`."""
        flat = {f"{part}/{key}": value.contiguous() for part, state in states.items() for key, value in state.items()}
        part = self.checkpoint_path.with_suffix(".part")
        save_file(flat, part, metadata={"step": str(self.step), "spent_s": str(self.elapsed_s)})
        part.replace(self.checkpoint_path)

    def load(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """The states of the last save, or None; restores step and time spent."""
        if not self.checkpoint_path.exists():
            return None
        from safetensors import safe_open

        with safe_open(self.checkpoint_path, "pt") as file:
            metadata = file.metadata()
        self.step, self.spent_s = int(metadata["step"]), float(metadata["spent_s"])
        self._resumed_at = self._clock()
        states: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(self.checkpoint_path).items():
            part, name = key.split("/", 1)
            states.setdefault(part, {})[name] = value
        return states


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's moments and step as a flat dict of tensors (safetensors holds nothing else)."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, one in state.items() for name, value in one.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trapezoid(progress: float, *, warmup: float = 0.01, decay: float = 0.5, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, flat, linear decay over the last `decay` of the run."""
    if progress < warmup:
        return max(progress / warmup, floor)
    return max(min((1 - progress) / decay, 1.0), floor)
