"""Many students of one teacher at once on one GPU: the runs of papercut's tables, in their order of worth.

    python fleet.py --seconds 270 --parallel 14        # needs work/teacher, work/prompts.txt and work/guidance.txt

Each run is `tiue distill` (or train_lcm.py) in a process of its own: alone it leaves most of the GPU idle. Pairs are
made once a seed, beforehand. A run that would not end in time makes room: the last of the list goes first. What is
finished lies in work/fleet/NAME; `work/fleet.tar` has all of it, without the parts that are the teacher's own, fp16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import WORK

HERE = Path(__file__).parent
FLEET = WORK / "fleet"
SCALE = float(os.environ.get("PAPERCUT_SCALE", "1"))  # of the counts: a rehearsal
PAIRS, SOLVER_STEPS, BATCH = int(16_384 * SCALE), 12, 64
WARM, PROPER = int(1500 * SCALE), int(700 * SCALE)
LCM_PAIRS, LCM_STEPS = 10_240 if SCALE == 1 else PAIRS, int(1860 * SCALE)
"""Fewer pairs as data, the rest of the same teacher evaluations in its own steps."""
FASTER = 5.0
"""An adapter's learning rates, times the whole student's."""


@dataclass
class Entry:
    """A run: what differs from the base, `key.key=value`; `lcm` is the consistency student."""

    name: str
    seed: int = 0
    changes: tuple[str, ...] = ()
    lcm: bool = False
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    @property
    def out(self) -> Path:
        return FLEET / self.name

    def finished(self) -> bool:
        whole = self.out / "model_index.json" if self.lcm else self.out / "student" / "tiue.json"
        return whole.is_file() and self.process is not None and self.process.poll() == 0

    def steps(self) -> tuple[int, int]:
        """Steps done, and to do."""
        total = LCM_STEPS if self.lcm else int(self.values()["max_steps"])
        log = FLEET / f"{self.name}.txt" if self.lcm else self.out / "log.jsonl"
        if not log.is_file():
            return 0, total
        done = [line for line in log.read_text().splitlines() if line.startswith("{")]
        return (int(json.loads(done[-1])["step"]) if done else 0), total

    def values(self) -> dict[str, Any]:
        values = base(self.seed)
        for change in self.changes:
            key, _, value = change.partition("=")
            target = values
            *sections, last = key.split(".")
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = yaml.safe_load(value)
        return values

    def command(self) -> list[str]:
        config = FLEET / f"{self.name}.yaml"
        config.write_text(yaml.safe_dump(self.values(), sort_keys=False))
        if self.lcm:
            script = [str(HERE / "train_lcm.py"), "--prompts", str(WORK / "prompts.txt")]
            counts = ["--pairs", str(LCM_PAIRS), "--steps", str(LCM_STEPS)]
            return [sys.executable, *script, "--config", str(config), *counts, "--out", str(self.out)]
        return [sys.executable, "-m", "tiue_cli", "distill", "--config", str(config), "--out", str(self.out)]


def base(seed: int) -> dict[str, Any]:
    """The recipe `papercut`, shaped for a GPU: twice the batch, at rates that go with it."""
    guidance = float((WORK / "guidance.txt").read_text())
    return {
        "teacher": str(WORK / "teacher"), "prompts": str(WORK / "prompts.txt"), "cache": str(WORK / "cache"),
        "seed": seed, "max_steps": WARM + PROPER, "batch_size": BATCH, "ema": 0.99, "precision": "fp32",
        "student": {"steps": 4, "spacing": "trailing"},
        "warm_start": {
            "steps": WARM, "pairs": PAIRS, "teacher_steps": SOLVER_STEPS, "solver": "unipc", "guidance": guidance,
            "learning_rate": 5.6e-4, "decay": "linear",
        },
        "optimizer": {"learning_rate": 7e-5, "decay": "linear"},
        "vsd": {"guidance": guidance, "lora_guidance": 1.0},
        "lora": {"rank": 32, "alpha": 32, "targets": "all", "learning_rate": 1e-3, "head_start": 60},
        "kl": {"weight": 0.1, "kind": "mean"},
        "checkpoint": {"every": 100_000}, "validation": {"every": 0},
    }  # fmt: skip


def adapter(rank: int) -> tuple[str, ...]:
    rates = (f"warm_start.learning_rate={5.6e-4 * FASTER}", f"optimizer.learning_rate={7e-5 * FASTER}")
    return ("student.trainable=lora", f"student.rank={rank}", "student.targets=all", *rates)


REGRESSION = (f"max_steps={WARM}",)
ENTRIES = (
    Entry("k4-0"),
    Entry("k1-0", 0, ("student.steps=1",)),
    Entry("k4-1", 1),
    Entry("k1-1", 1, ("student.steps=1",)),
    Entry("lcm-0", 0, lcm=True),
    Entry("k2-0", 0, ("student.steps=2",)),
    Entry("rank32-0", 0, adapter(32)),
    Entry("regression-0", 0, REGRESSION),
    Entry("lcm-1", 1, lcm=True),
    Entry("k2-1", 1, ("student.steps=2",)),
    Entry("rank8-0", 0, adapter(8)),
    Entry("rank64-0", 0, adapter(64)),
    Entry("regression-1", 1, REGRESSION),
    Entry("kept-0", 0, ("warm_start.keep_weight=0.25",)),
    Entry("rank16-0", 0, adapter(16)),
    Entry("guided-lora-0", 0, ("vsd.lora_guidance=2.0",)),
    Entry("leading-0", 0, ("student.spacing=leading",)),
)


def fill_caches(args: argparse.Namespace) -> None:
    """Text states and pairs of both seeds, in large batches, beside each other."""
    entries = [Entry(f"fill-{seed}", seed, ("warm_start.batch_size=512", "max_steps=1")) for seed in (0, 1)]
    # The text states are the same for both: the second finds most of them.
    for entry in entries:
        start(entry, args)
        time.sleep(args.apart)
    for entry in entries:
        assert entry.process is not None
        entry.process.wait()
        print(f"{entry.name}: {entry.process.returncode}", flush=True)


def start(entry: Entry, args: argparse.Namespace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (FLEET / f"{entry.name}.txt").open("w") as log:
        entry.process = subprocess.Popen(
            entry.command(), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    entry.started = time.monotonic()


def stop(entry: Entry) -> None:
    if entry.process is not None and entry.process.poll() is None:
        os.killpg(entry.process.pid, signal.SIGKILL)


def ends_at(entry: Entry, *, start_s: float = 12.0) -> float | None:
    """When the run will have ended, as it goes; None while it is too early to say."""
    done, total = entry.steps()
    spent = time.monotonic() - entry.started - start_s
    if spent < 20 or done < 20:
        return None
    return time.monotonic() + (total - done) * spent / done * (1.0 if entry.lcm else 1.25)  # the last steps cost more


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=270.0)
    options.add_argument("--parallel", type=int, default=14)
    options.add_argument("--apart", type=float, default=3.0, help="seconds between two starts that fill caches")
    options.add_argument("--only", nargs="+", default=None, help="names of runs")
    args = options.parse_args()
    began = time.monotonic()
    deadline = began + args.seconds
    FLEET.mkdir(parents=True, exist_ok=True)
    fill_caches(args)
    waiting = [entry for entry in ENTRIES if args.only is None or entry.name in args.only]
    running: list[Entry] = []
    finished: list[Entry] = []
    last_said = last_stop = time.monotonic()
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < args.parallel:
            entry = waiting.pop(0)
            start(entry, args)
            running.append(entry)
        time.sleep(1)
        for entry in [entry for entry in running if entry.process is not None and entry.process.poll() is not None]:
            running.remove(entry)
            (finished if entry.finished() else []).append(entry)
            took = time.monotonic() - entry.started
            assert entry.process is not None
            print(f"{entry.name}: ended with {entry.process.returncode} after {took:.0f} s", flush=True)
            if not entry.finished():
                print((FLEET / f"{entry.name}.txt").read_text()[-1500:], flush=True)
        now = time.monotonic()
        late = [entry for entry in running[:2] if (ends_at(entry) or 0.0) > deadline - 5]
        if late and len(running) > 2 and now - last_stop > 8:
            last_stop, gone = now, running.pop()
            print(f"{gone.name} makes room for {late[0].name}", flush=True)
            stop(gone)
            waiting.clear()
            args.parallel = len(running)
        if now - last_said > 20:
            last_said = now
            print(f"{now - began:.0f} s:", {entry.name: entry.steps()[0] for entry in running}, flush=True)
    for entry in running:
        print(f"{entry.name}: stopped at {entry.steps()}", flush=True)
        stop(entry)
    pack([entry for entry in ENTRIES if entry in finished])


def pack(entries: list[Entry]) -> None:
    """What was trained, in fp16, into one archive; the parts that are the teacher's stay out."""
    import torch
    from safetensors.torch import load_file, save_file

    packed = WORK / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    for entry in entries:
        source = entry.out if entry.lcm else entry.out / "student"
        target = packed / entry.name
        left_out = shutil.ignore_patterns("vae", "text_encoder", "tokenizer")
        shutil.copytree(source, target, ignore=left_out)
        for file in target.rglob("*.safetensors"):
            tensors = load_file(file)
            whole = {key: value.half() if value.dtype == torch.float32 else value for key, value in tensors.items()}
            save_file(whole, file, metadata={"format": "pt"})
        if not entry.lcm:
            shutil.copy(entry.out / "log.jsonl", target / "log.jsonl")
        shutil.copy(FLEET / f"{entry.name}.yaml", target / "run.yaml")
    with tarfile.open(WORK / "fleet.tar", "w") as archive:
        for entry in entries:
            archive.add(packed / entry.name, arcname=entry.name)
    print("packed:", ", ".join(entry.name for entry in entries), flush=True)


if __name__ == "__main__":
    main()
