"""A bulk job: shards that are there are kept, the others written, here, by worker processes, or on a Ray cluster.

rows ─ shard_tasks ─▶ ShardTask ─ a writer ─▶ ShardStats ─▶ failed.jsonl, totals.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tiue_cli import __version__
from tiue_cli.errors import OutputError, UsageError
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.lock import held_lock
from tiue_cli.files.structured import parse_json
from tiue_cli.files.temporary import remove_leftovers
from tiue_cli.generate.bulk.config import MAX_SHARDS, BulkConfig, digest
from tiue_cli.generate.bulk.rows import estimated_rows, import_pyarrow, read_rows
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask, read_stats, shard_identity, shard_tasks, write_shard
from tiue_cli.generate.drawing import Pipeline
from tiue_cli.generate.session import Session

JOB = "job.json"
TOTALS = "totals.json"
FAILED = "failed.jsonl"


class Writer(Protocol):
    """Writes shards somewhere, in any order; yields each when it is there."""

    def __call__(self, tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]: ...


@dataclass(frozen=True)
class BulkProgress:
    """What there is so far: once when drawing begins, after each shard, and at the end.

    ``expected_shards`` is an estimate from the size of the prompt files, None for standard input. ``images_per_s``
    counts what this run drew, loading included.
    """

    shards: int
    expected_shards: int | None
    images: int
    kept: int
    failed: int
    images_per_s: float


def run_bulk(config: BulkConfig, *, on_progress: Callable[[BulkProgress], None]) -> dict[str, Any]:
    """Run the job to its end; returns the totals, which lie in ``totals.json`` as well.

    Raises UsageError, PromptError (a bad row of a strict job), OutputError (the folder holds another job, or another
    process writes it), and what loading, drawing and writing raise.
    """
    config.validate()
    import_pyarrow("pyarrow", "writing shards")
    config.out.mkdir(parents=True, exist_ok=True)
    with held_lock(config.out / ".tiue-bulk.lock") as held:
        if not held:
            raise OutputError(f"another process writes {config.out}", hint="wait for it, or give another --out")
        remove_leftovers(config.out)
        config, identity = _open_job(config)
        totals = _run(config, identity, on_progress)
        # Of workers that died on the way, on other machines too, or that their cluster has lost and that go on alone.
        remove_leftovers(config.out, is_finished=True)
        return totals


def _run(config: BulkConfig, identity: str, on_progress: Callable[[BulkProgress], None]) -> dict[str, Any]:
    started_s = time.perf_counter()
    stats: list[ShardStats] = []
    drawn = kept = 0
    begun = False
    reported = 0
    expected = expected_shards(config)

    def report() -> None:
        nonlocal reported
        reported = len(stats)
        rate = drawn / (time.perf_counter() - started_s)
        failed = sum(len(one.failed) for one in stats)
        on_progress(BulkProgress(len(stats), expected, drawn + kept, kept, failed, rate))

    def todo() -> Iterator[ShardTask]:
        nonlocal kept, begun
        for task in shard_tasks(read_rows(config.prompts), config):
            if task.number >= MAX_SHARDS:
                raise UsageError(f"more than {MAX_SHARDS} shards", hint="make them larger: --shards N")
            there = read_stats(config.out, task.number, identity=shard_identity(identity, task))
            if there is None:
                if not begun:
                    begun = True
                    report()
                yield task
            else:
                kept += there.images
                stats.append(there)

    for done in writer_of(config)(todo(), config, identity):
        stats.append(done)
        drawn += done.images
        report()
    if reported < len(stats):  # shards that were there already came last
        report()
    stats.sort(key=lambda one: one.number)
    return _finish(config, identity, stats)


def expected_shards(config: BulkConfig) -> int | None:
    """About how many shards the job has; None where its prompts come from standard input."""
    rows = estimated_rows(config.prompts)
    return None if rows is None else math.ceil(rows / config.rows_per_shard)


def writer_of(config: BulkConfig) -> Writer:
    """Who writes the shards: this process, several, or a Ray cluster."""
    if config.launch is not None:
        from tiue_cli.generate.bulk.ray_writer import write_on_ray

        return write_on_ray
    if config.workers > 1:
        from tiue_cli.generate.bulk.workers import write_in_processes

        return write_in_processes
    return write_here


def write_here(tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
    """One after the other in this process; the model is loaded for the first that must be written."""
    pipeline: Pipeline | None = None
    try:
        for task in tasks:
            if pipeline is None:
                pipeline = Pipeline(config.draw)
            yield write_shard(task, config, pipeline, identity=identity)
    finally:
        if pipeline is not None:
            pipeline.close()


def _open_job(config: BulkConfig) -> tuple[BulkConfig, str]:
    """The job of the folder: a new one, or the one that was begun there. Raises OutputError for another."""
    with Session(config.draw) as session:
        target = session.target
    path = config.out / JOB
    before = _read_job(path)
    if config.draw.seed is None:
        from secrets import randbelow

        from tiue_cli.generate.plan import RANDOM_SEEDS

        seed = randbelow(RANDOM_SEEDS) if before is None else int(before["seed"])
        config = replace(config, draw=replace(config.draw, seed=seed))
    data = config.identity(model_id=target.model_id, vae_id=target.vae_id, loras=target.loras)
    if before is not None:
        different = [name for name, value in data.items() if name != "model" and before.get(name) != value]
        if different:
            raise OutputError(
                f"{config.out} holds a job with other options ({', '.join(different)})",
                hint="give the same options to go on with it, or another --out",
            )
    else:
        if any(config.out.glob("*.tar")):
            raise OutputError(f"{config.out} holds tar files and no {JOB}", hint="give an empty folder")
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return config, digest({name: value for name, value in data.items() if name != "model"})


def _read_job(path: Path) -> dict[str, Any] | None:
    try:
        data = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read", hint="give another --out") from error
    if not isinstance(data, dict):
        raise OutputError(f"{path} is not a job of tiue's", hint="give another --out")
    return data


def _finish(config: BulkConfig, identity: str, stats: list[ShardStats]) -> dict[str, Any]:
    failed = [one for shard in stats for one in shard.failed]
    with atomic_file(config.out / FAILED) as temporary, temporary.open("w", encoding="utf-8") as file:
        for one in failed:
            line = {"id": one.id, "where": one.where, "reason": one.reason}
            file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    totals = {
        "format_version": 1,
        "job": identity,
        "seed": config.draw.seed,
        "shards": len(stats),
        "images": sum(shard.images for shard in stats),
        "failed_rows": len(failed),
        "tars": {f"{shard.number:05d}.tar": shard.tar_sha256 for shard in stats},
        "tiue_version": __version__,
    }
    with atomic_file(config.out / TOTALS) as temporary:
        temporary.write_text(json.dumps(totals, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return totals
