"""Load on ``tiue serve``: closed and open loop, against the same images by the bulk path, in one run.

    python benchmarks/serve_load.py --model engines/papercut --seconds 20 --out benchmarks/serve_load.json

The server is a process of its own on this machine; the clients live in this one, and their time is part of what is
measured. Phases, each after a warm-up that does not count: one client alone; ``--clients`` clients, each with its next
request when the last is answered (closed loop); the same with ``--max-batch 1``; requests at fixed times, whether
answered or not, at 70 % of the closed loop's rate (open loop). Memory is the server's resident set, sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

import tiue_cli as tiue
from tiue_cli.files.atomic import atomic_file

PROMPTS = (
    "a red heart above a blue house",
    "a blue fish",
    "a yellow star above a green tree",
    "a red fish under the sea",
)


@dataclass
class Phase:
    """What one phase measured; times in milliseconds."""

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
    rss_first_bytes: int = 0
    rss_last_bytes: int = 0
    latencies_ms: list[float] = field(default_factory=list, repr=False)
    model_ms: list[float] = field(default_factory=list, repr=False)
    batches: list[int] = field(default_factory=list, repr=False)

    def finish(self) -> dict[str, Any]:
        """The figures without the single values."""
        self.images_per_s = self.images / self.seconds
        if self.latencies_ms:
            self.p50_ms, self.p99_ms = (float(np.percentile(self.latencies_ms, p)) for p in (50, 99))
            self.model_p50_ms = float(np.percentile(self.model_ms, 50))
            self.mean_batch = float(np.mean(self.batches))
        hidden = ("latencies_ms", "model_ms", "batches")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


@contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server process that is ready; yields its URL and the process."""
    words = [sys.executable, "-m", "tiue_cli", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(60) == 0, "the server did not drain"


async def ask(client: httpx.AsyncClient, phase: Phase, seed: int, references: dict[int, bytes]) -> None:
    """One request, measured and its picture kept for the comparison."""
    started_s = time.perf_counter()
    body = {"prompt": PROMPTS[seed % len(PROMPTS)], "seed": seed}
    try:
        response = await client.post("/v1/images/generations", json=body)
        answer = response.json()
        picture = base64.b64decode(answer["data"][0]["b64_json"])
    except (httpx.HTTPError, KeyError, ValueError):
        phase.failed += 1
        return
    phase.latencies_ms.append(1000 * (time.perf_counter() - started_s))
    phase.images += 1
    phase.model_ms.append(answer["timings"]["model_ms"])
    phase.batches.append(answer["timings"]["batch"])
    # A seed's bytes are the same whenever it is asked for: whatever shares its batch.
    if references.setdefault(seed, picture) != picture:
        phase.failed += 1


async def closed_loop(
    url: str, process: psutil.Process, *, name: str, clients: int, seconds: float, seeds: int, warm_up_s: float
) -> Phase:
    """``clients`` clients, each with its next request when the last is answered."""
    phase, references = Phase(name, clients), {}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:

        async def loop(number: int, until_s: float, into: Phase) -> None:
            seed = number
            while time.perf_counter() < until_s:
                await ask(client, into, seed % seeds, references)
                seed += clients

        warm_until_s = time.perf_counter() + warm_up_s
        await asyncio.gather(*(loop(number, warm_until_s, Phase("warm-up", clients)) for number in range(clients)))
        phase.rss_first_bytes = process.memory_info().rss
        started_s = time.perf_counter()
        await asyncio.gather(*(loop(number, started_s + seconds, phase) for number in range(clients)))
        phase.seconds = time.perf_counter() - started_s
        phase.rss_last_bytes = process.memory_info().rss
    return phase


async def open_loop(url: str, process: psutil.Process, *, rate_per_s: float, seconds: float, seeds: int) -> Phase:
    """Requests at fixed times, whether the ones before are answered or not."""
    phase, references = Phase("open loop", 0), {}
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=512), timeout=60) as client:
        phase.rss_first_bytes = process.memory_info().rss
        started_s = time.perf_counter()
        tasks = []
        for number in range(int(rate_per_s * seconds)):
            await asyncio.sleep(max(0.0, started_s + number / rate_per_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, phase, number % seeds, references)))
        await asyncio.gather(*tasks)
        phase.seconds = time.perf_counter() - started_s
        phase.rss_last_bytes = process.memory_info().rss
    return phase


def bulk_rate(model: str, *, seconds: float, seeds: int, warm_up_s: float) -> float:
    """Images a second of the same images in batches of 16, encoded and written, in a process that does nothing else."""
    with tiue.load(model) as pipe, tempfile.TemporaryDirectory() as folder:

        def draw_for(limit_s: float) -> float:
            drawn, started_s = 0, time.perf_counter()
            while (spent_s := time.perf_counter() - started_s) < limit_s or drawn == 0:
                requests = [
                    tiue.Request(PROMPTS[seed % seeds % len(PROMPTS)], seed % seeds)
                    for seed in range(drawn, drawn + 16)
                ]
                for number, picture in enumerate(pipe.draw(requests)):
                    picture.save(Path(folder) / f"{number}.png")
                drawn += 16
            return drawn / spent_s

        draw_for(warm_up_s)
        return draw_for(seconds)


def main() -> None:
    """Run all phases and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="papercut")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before each phase that do not count")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=64, help="different images")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    common = {"seconds": options.seconds, "seeds": options.seeds}
    warm = {"warm_up_s": options.warm_up}
    phases = []
    bulk_before = bulk_rate(options.model, **common, **warm)
    with server(options.model) as (url, process):
        alone = asyncio.run(closed_loop(url, process, name="one client", clients=1, **common, **warm))
        name = f"{options.clients} clients"
        full = asyncio.run(closed_loop(url, process, name=name, clients=options.clients, **common, **warm))
        rate = 0.7 * full.images / full.seconds
        opened = asyncio.run(open_loop(url, process, rate_per_s=rate, **common))
        metrics = httpx.get(f"{url}/metrics").text
    with server(options.model, "--max-batch", "1", "--max-wait-ms", "0") as (url, process):
        name = f"{options.clients} clients, --max-batch 1"
        single = asyncio.run(closed_loop(url, process, name=name, clients=options.clients, **common, **warm))
    bulk_after = bulk_rate(options.model, **common, **warm)
    phases = [phase.finish() for phase in (alone, full, opened, single)]
    bulk = (bulk_before + bulk_after) / 2
    report = {
        "model": options.model,
        "cores": len(os.sched_getaffinity(0)),
        "bulk_images_per_s": [bulk_before, bulk_after],
        "phases": phases,
        "of_bulk": phases[1]["images_per_s"] / bulk,
        "batching": phases[1]["images_per_s"] / phases[3]["images_per_s"],
        "alone_p99_over_model_ms": phases[0]["p99_ms"] - 1.5 * phases[0]["model_p50_ms"],
        "requests": {
            outcome: float(n) for outcome, n in re.findall(r'requests_total\{outcome="(\w+)"\} (\S+)', metrics)
        },
    }
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
