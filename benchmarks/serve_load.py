"""Load on ``tiue serve``, against the same images by ``tiue generate --batch 16``, in one run.

    python benchmarks/serve_load.py --model engines/papercut --out benchmarks/results/serve_load

The server is a process of its own on this machine; the clients live in this one, and their processor time is part of
what is measured, so they are lean: HTTP by hand over kept connections (``load_client.py``). Phases, each after a
warm-up that does not count:

| phase | what |
|---|---|
| bulk | ``tiue generate --batch 16`` of the same images, in this process, before and after the server |
| one client | its next request when the last is answered |
| clients | ``--clients`` of these: closed loop |
| open loop | requests at fixed times, at 70 % of the closed loop's rate; time counts from when one was due |
| soak | the closed loop for ``--soak-minutes``; memory is sampled |
| single | the closed loop against ``--max-batch 1`` |

Every answer is compared: the first picture of a seed with the pixels of ``tiue generate``, later ones with the first.
Writes OUT.json and OUT.md. Some 3 minutes and the soak.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from load_client import Connection, Connections
from load_report import as_markdown, cpu_name
from PIL import Image

import tiue_cli as tiue
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.exports import read_export_manifest
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.prompts import rows_from_arguments
from tiue_cli.generate.session import Session

PROMPTS = (
    "a red heart above a blue house",
    "a blue fish",
    "a yellow star above a green tree",
    "a red fish under the sea",
)
SAMPLE_S = 5.0
"""How often the server's memory is looked at."""


@dataclass
class Phase:
    """What one phase measured; times in milliseconds, memory (resident set of the server) in MiB."""

    name: str
    clients: int
    seconds: float = 0.0
    images: int = 0
    failed: int = 0
    images_per_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    model_p50_ms: float = 0.0
    mean_batch: float = 0.0
    server_cpu_ms_per_image: float = 0.0
    client_cpu_ms_per_image: float = 0.0
    memory_mib: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list, repr=False)
    model_ms: list[float] = field(default_factory=list, repr=False)
    batches: list[int] = field(default_factory=list, repr=False)

    def figures(self) -> dict[str, Any]:
        """Without the single values."""
        if self.images:
            self.images_per_s = self.images / self.seconds
            self.p50_ms, self.p99_ms = (float(np.percentile(self.latencies_ms, p)) for p in (50, 99))
            self.model_p50_ms = float(np.percentile(self.model_ms, 50))
            self.mean_batch = float(np.mean(self.batches))
        kept = {k: v for k, v in asdict(self).items() if k not in ("latencies_ms", "model_ms", "batches")}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in kept.items()}

    @property
    def memory_drift(self) -> float:
        """The last fifth of the samples over the first, less 1."""
        fifth = max(1, len(self.memory_mib) // 5)
        return float(np.mean(self.memory_mib[-fifth:]) / np.mean(self.memory_mib[:fifth]) - 1)


class Checker:
    """Knows what the picture of each seed must be."""

    def __init__(self, pixels: dict[int, np.ndarray]) -> None:
        """``pixels``: by seed, (H, W, 3) uint8, drawn by ``tiue generate``."""
        self._pixels = pixels
        self._base64: dict[int, str] = {}
        self.wrong = 0

    def check(self, seed: int, picture: str) -> bool:
        """Whether ``picture``, a PNG in base64, is that of ``seed``."""
        if seed not in self._base64:
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
            if not np.array_equal(found, self._pixels[seed]):
                return False
            self._base64[seed] = picture
        return self._base64[seed] == picture


class Load:
    """Phases against one server."""

    def __init__(self, url: str, process: psutil.Process, checker: Checker, *, seeds: int, warm_up_s: float) -> None:
        """``seeds`` different pictures are asked for, in turn."""
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._address = host, int(port)
        self._process = process
        self._checker = checker
        self._seeds = seeds
        self._warm_up_s = warm_up_s

    def closed(self, name: str, *, clients: int, seconds: float) -> Phase:
        """``clients`` clients, each with its next request when the last is answered."""

        async def run(connections: Connections) -> Phase:
            numbers = itertools.count()
            opened = [await connections.take() for _ in range(clients)]

            async def client(connection: Connection, until_s: float, phase: Phase) -> None:
                while time.perf_counter() < until_s:
                    await self._ask(connection, next(numbers), phase, due_s=time.perf_counter())

            async def clients_for(limit_s: float, phase: Phase) -> None:
                until_s = time.perf_counter() + limit_s
                await asyncio.gather(*(client(connection, until_s, phase) for connection in opened))

            await clients_for(self._warm_up_s, Phase("warm-up", clients))
            return await self._measured(Phase(name, clients), lambda phase: clients_for(seconds, phase))

        return self._run(run)

    def open(self, *, rate_per_s: float, seconds: float) -> Phase:
        """Requests at fixed times, whether the ones before are answered or not."""

        async def run(connections: Connections) -> Phase:
            async def one(number: int, due_s: float, phase: Phase) -> None:
                connection = await connections.take()
                await self._ask(connection, number, phase, due_s=due_s)
                connections.give_back(connection)

            async def requests(phase: Phase) -> None:
                started_s = time.perf_counter()
                tasks = []
                for number in range(int(rate_per_s * seconds)):
                    due_s = started_s + number / rate_per_s
                    if (left_s := due_s - time.perf_counter()) > 0:
                        await asyncio.sleep(left_s)
                    tasks.append(asyncio.create_task(one(number, due_s, phase)))
                await asyncio.gather(*tasks)

            return await self._measured(Phase(f"open loop, {rate_per_s:.0f} a second", 0), requests)

        return self._run(run)

    # --- inside ---

    def _run(self, phase: Callable[[Connections], Coroutine[Any, Any, Phase]]) -> Phase:
        async def main() -> Phase:
            async with Connections(*self._address) as connections:
                return await phase(connections)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())

    async def _measured(self, phase: Phase, work: Callable[[Phase], Coroutine[Any, Any, None]]) -> Phase:
        async def sample() -> None:
            while True:
                phase.memory_mib.append(round(self._process.memory_info().rss / 2**20, 1))
                await asyncio.sleep(SAMPLE_S)

        sampler = asyncio.create_task(sample())
        before, started_s = self._cpu_ms(), time.perf_counter()
        await work(phase)
        phase.seconds = time.perf_counter() - started_s
        server_ms, client_ms = (after - then for after, then in zip(self._cpu_ms(), before, strict=True))
        sampler.cancel()
        phase.server_cpu_ms_per_image = server_ms / max(1, phase.images)
        phase.client_cpu_ms_per_image = client_ms / max(1, phase.images)
        return phase

    def _cpu_ms(self) -> tuple[float, float]:
        times = self._process.cpu_times(), psutil.Process().cpu_times()
        return 1000 * (times[0].user + times[0].system), 1000 * (times[1].user + times[1].system)

    async def _ask(self, connection: Connection, number: int, phase: Phase, *, due_s: float) -> None:
        seed = number % self._seeds
        body = json.dumps({"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}).encode()
        try:
            status, data = await connection.post("/v1/images/generations", body)
            latency_ms = 1000 * (time.perf_counter() - due_s)
            answer = json.loads(data)
            right = status == 200 and self._checker.check(seed, answer["data"][0]["b64_json"])
        except (OSError, EOFError, ValueError, KeyError):
            right = False
        if not right:
            phase.failed += 1
            return
        phase.images += 1
        phase.latencies_ms.append(latency_ms)
        phase.model_ms.append(answer["timings"]["model_ms"])
        phase.batches.append(answer["timings"]["batch"])


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server process that is ready; yields its URL and the process."""
    words = [sys.executable, "-m", "tiue_cli", "serve", model, "--port", "0", "--max-queue", "1024", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        while asyncio.run(fetch(url, "/readyz"))[0] != 200:
            if process.poll() is not None:
                raise SystemExit(f"the server ended: tiue serve {model}")
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit("the server did not end with status 0")


async def fetch(url: str, path: str) -> tuple[int, bytes]:
    """One GET."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with Connections(host, int(port)) as connections:
        return await (await connections.take()).get(path)


def reference_pixels(model: str, seeds: int) -> dict[int, np.ndarray]:
    """What each seed's picture must be, (H, W, 3) uint8."""
    with tiue.load(model) as pipe:
        requests = [tiue.Request(PROMPTS[seed % len(PROMPTS)], seed) for seed in range(seeds)]
        return {picture.seed: picture.image for picture in pipe.draw(requests, output="numpy")}


def bulk_rate(model: str, *, seconds: float, seeds: int, warm_up_s: float) -> float:
    """Images a second of ``tiue generate --batch 16``: the same images again and again, PNGs written."""

    def plan_and_draw(session: Session, folder: Path, limit_s: float) -> float:
        drawn, spent_s = 0, 0.0
        for repeat in itertools.count():
            config = GenerateConfig(
                model=model, batch=16, seed=0, images=seeds // len(PROMPTS), out=folder / str(repeat)
            )
            plan = session.plan(rows_from_arguments(PROMPTS), config)
            started_s = time.perf_counter()
            drawn += sum(1 for _ in session.run(plan))
            spent_s += time.perf_counter() - started_s
            if spent_s >= limit_s:
                break
        return drawn / spent_s

    with tempfile.TemporaryDirectory() as folder, Session(GenerateConfig(model=model, batch=16)) as session:
        session.open()
        plan_and_draw(session, Path(folder) / "warm-up", warm_up_s)
        return plan_and_draw(session, Path(folder) / "measured", seconds)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All phases; returns the report."""
    bulk = {"seconds": options.seconds, "seeds": options.seeds, "warm_up_s": options.warm_up}
    load = {"seeds": options.seeds, "warm_up_s": options.warm_up}
    clients, seconds = options.clients, options.seconds
    checker = Checker(reference_pixels(options.model, options.seeds))
    bulk_before = bulk_rate(options.model, **bulk)
    phases: dict[str, Phase] = {}
    with server(options.model) as (url, process):
        at = Load(url, process, checker, **load)
        phases["alone"] = at.closed("one client", clients=1, seconds=seconds)
        phases["full"] = at.closed(f"{clients} clients", clients=clients, seconds=seconds)
        bulk_after = bulk_rate(options.model, **bulk)
        rate = 0.7 * phases["full"].images / phases["full"].seconds
        phases["open"] = at.open(rate_per_s=rate, seconds=seconds)
        if options.soak_minutes:
            name = f"{clients} clients, {options.soak_minutes:g} minutes"
            phases["soak"] = at.closed(name, clients=clients, seconds=60 * options.soak_minutes)
        metrics = asyncio.run(fetch(url, "/metrics"))[1].decode()
    with server(options.model, "--max-batch", "1", "--max-wait-ms", "0") as (url, process):
        at = Load(url, process, checker, **load)
        phases["single"] = at.closed(f"{clients} clients, --max-batch 1", clients=clients, seconds=seconds)
    return {
        "model": read_export_manifest(Path(options.model)).name,
        "tiue_version": tiue.__version__,
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "seconds_a_phase": seconds,
        "warm_up_s": options.warm_up,
        "bulk_images_per_s": [round(bulk_before, 2), round(bulk_after, 2)],
        "phases": {name: phase.figures() for name, phase in phases.items()},
        "stage_seconds": stage_seconds(metrics),
        "targets": targets(phases, (bulk_before + bulk_after) / 2),
    }


def targets(phases: dict[str, Phase], bulk_images_per_s: float) -> list[dict[str, Any]]:
    """What was aimed at, and what came out."""
    full, single, alone = phases["full"], phases["single"], phases["alone"]
    allowed_ms = 1.5 * alone.model_p50_ms + 5
    failed = sum(phase.failed for phase in phases.values())
    found = [
        ("throughput over that of tiue generate --batch 16", full.images_per_s / bulk_images_per_s, ">=", 0.85),
        ("throughput over that of --max-batch 1", full.images_per_s / single.images_per_s, ">=", 1.7),
        ("p99 of one client, ms, against 1.5 x the model's own + 5", alone.p99_ms, "<=", allowed_ms),
        ("requests lost or wrong", failed, "<=", 0),
    ]
    if "soak" in phases:
        found.append(("memory's drift in the soak, either way", abs(phases["soak"].memory_drift), "<=", 0.05))
    return [
        {
            "what": what,
            "value": round(value, 4),
            "target": f"{sign} {round(target, 4)}",
            "met": met(value, sign, target),
        }
        for what, value, sign, target in found
    ]


def met(value: float, sign: str, target: float) -> bool:
    """Whether ``value`` is on the right side of ``target``."""
    return bool(value >= target if sign == ">=" else value <= target)


def stage_seconds(metrics: str) -> dict[str, float]:
    """Mean seconds of each stage, from ``/metrics``: of the model's for a batch, of ``png`` for an image."""
    found = {
        kind: dict(re.findall(rf'tiue_stage_seconds_{kind}{{stage="(\w+)"}} (\S+)', metrics))
        for kind in ("sum", "count")
    }
    return {stage: round(float(total) / float(found["count"][stage]), 5) for stage, total in found["sum"].items()}


def main() -> None:
    """Run all phases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export folder: its pixels do not depend on the batch")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before each phase that do not count")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=64, help="different images; a multiple of 4")
    parser.add_argument("--soak-minutes", type=float, default=10.0, help="0 leaves it out")
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    options = parser.parse_args()
    report = measure(options)
    for path, text in (
        (options.out.with_suffix(".json"), json.dumps(report, indent=1) + "\n"),
        (options.out.with_suffix(".md"), as_markdown(report)),
    ):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(as_markdown(report))


if __name__ == "__main__":
    main()
