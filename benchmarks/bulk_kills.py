"""A bulk job that is killed again and again ends with every image once, and with the bytes of a job left in peace.

    python benchmarks/bulk_kills.py --model engines/papercut --images 20000 --kills 5 \\
        --out benchmarks/results/bulk_kills.json

Three jobs of the same prompts: one left in peace in one process; one with ``--workers 2``; one with ``--launch ray`` on
a local cluster of two nodes. The last two get SIGKILL at random moments (after a random shard and up to a second) and
are started again by the same command. Then the tars, the Parquet files and the lists of failures are compared, the ids
are counted from the tars by ``tar tf``, from the Parquet files by PyArrow, and from the pictures by webdataset.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.hashes import sha256_file

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white")
THINGS = ("star", "tree", "house", "fish", "heart", "moon", "flower", "boat")


@dataclass
class Job:
    """What one job did. ``kills_at`` counts the shards that were there at each kill."""

    name: str
    options: Sequence[str]
    kills_at: list[int] = field(default_factory=list)
    left_running: int = 0
    seconds: float = 0.0


def main() -> None:
    """Run the three jobs, compare them, write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export folder")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--shard", type=int, default=250)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--size", default="32", help="of the pictures, which do not matter here")
    parser.add_argument("--steps", default="1")
    parser.add_argument("--random", type=int, default=11, help="seed of the moments")
    parser.add_argument("--work", type=Path, help="keep the jobs here; those that a run before ended are not run again")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        prompts = work / "prompts.txt"
        prompts.write_text("".join(f"{prompt(number)}\n" for number in range(options.images)))
        command = [
            *(sys.executable, "-m", "tiue_cli", "generate", "--model", options.model, "--prompts", str(prompts)),
            *("--shards", str(options.shard), "--seed", "0", "--size", options.size, "--steps", options.steps),
        ]
        shards = -(-options.images // options.shard)
        jobs = [Job("in peace", ()), Job("local", ("--workers", "2")), Job("ray", ("--launch", "ray"))]
        for job in jobs:
            record = work / f"{job.name}.json"
            if record.exists():
                vars(job).update(json.loads(record.read_text()))
                continue
            kills = 0 if job.name == "in peace" else options.kills
            moments = random.Random(f"{options.random} {job.name}")
            with cluster() if job.name == "ray" else plain() as environment:
                run(job, command, work / job.name, environment, kills=kills, shards=shards, moments=moments)
            record.write_text(json.dumps(asdict(job)))
            print(f"{job.name}: {len(job.kills_at)} kills, {job.seconds:.0f} s", flush=True)
        report = {
            "images": options.images,
            "images_per_shard": options.shard,
            "size": options.size,
            "steps": options.steps,
            "jobs": {job.name: {**asdict(job), **counts(work / job.name)} for job in jobs},
            "equal_bytes": len({json.dumps(hashes(work / job.name)) for job in jobs}) == 1,
            "files_compared": len(hashes(work / "in peace")),
        }
    with atomic_file(options.out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    expected = {"tar_ids": options.images, "parquet_ids": options.images, "webdataset_ids": options.images}
    wrong = [job.name for job in jobs if any(report["jobs"][job.name][key] != n for key, n in expected.items())]
    if wrong or not report["equal_bytes"]:
        raise SystemExit(f"not every image once, or not the same bytes: {', '.join(wrong) or 'bytes'}")


def prompt(number: int) -> str:
    """One of 64 things, numbered so that no two prompts are the same."""
    return f"a {COLOURS[number % 8]} {THINGS[number // 8 % 8]} number {number}"


def run(
    job: Job,
    command: Sequence[str],
    out: Path,
    environment: Mapping[str, str],
    *,
    kills: int,
    shards: int,
    moments: random.Random,
) -> None:
    """Start the job, kill it ``kills`` times, and let the last start end by itself."""
    started_s = time.monotonic()
    words = [*command, "--out", str(out), *job.options]
    for wanted in sorted(moments.sample(range(shards - shards // 10), kills)):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*_stats.json"))) < wanted:
            time.sleep(0.05)
        time.sleep(moments.random())
        if process.poll() is not None:
            raise SystemExit(f"{job.name}: the job ended before it could be killed; give more --images")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        job.kills_at.append(len(list(out.glob("*_stats.json"))))
        # A worker sees that its parent is gone within a moment; one that stayed would hold the model for ever.
        _, alive = psutil.wait_procs(children, timeout=20)
        job.left_running += len(alive)
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)
    job.seconds = round(time.monotonic() - started_s, 1)


@contextlib.contextmanager
def plain() -> Iterator[dict[str, str]]:
    """The environment of a command on this machine."""
    yield {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of two nodes that outlives its drivers; yields the environment of a command that finds it."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(ROOT)  # of the actors, which the nodes start
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes.add_node(num_cpus=2)
    try:
        yield {**os.environ, "RAY_ADDRESS": nodes.address}
    finally:
        nodes.shutdown()


def counts(out: Path) -> dict[str, int]:
    """How many different ids three readers find; a negative number where one of them found an id twice."""
    import pyarrow.parquet as parquet
    import webdataset

    tars = sorted(out.glob("*.tar"))
    listed = [
        name.removesuffix(".png")
        for tar in tars
        for name in subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout.split()
        if name.endswith(".png")
    ]
    rows = [row for file in sorted(out.glob("*.parquet")) for row in parquet.read_table(file)["id"].to_pylist()]
    samples: list[Any] = [
        sample["__key__"] for tar in tars for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    ]
    found = {"tar_ids": listed, "parquet_ids": rows, "webdataset_ids": samples}
    return {name: len(ids) if len(set(ids)) == len(ids) else -len(ids) for name, ids in found.items()}


def hashes(out: Path) -> dict[str, str]:
    """A hash of every file that readers read, by name."""
    read = (".tar", ".parquet", ".jsonl")
    return {file.name: sha256_file(file) for file in sorted(out.iterdir()) if file.suffix in read}


if __name__ == "__main__":
    main()
