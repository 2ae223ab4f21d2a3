"""A bulk job on Ray: a pool of actors, each with the model and a share of the GPUs, writes whole shards.

Shards are functions of their rows, written aside and renamed, so doing one again is harmless: what a lost worker or
node had begun is given to another, and a driver that was killed goes on where its shards end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from tiue_cli.errors import MissingDependencyError
from tiue_cli.generate.bulk.config import BulkConfig
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask, write_shard
from tiue_cli.generate.drawing import Pipeline

WAITING_PER_ACTOR = 2


class ShardWriter:
    """The actor: loads the model once, then writes shards."""

    def __init__(self, config: BulkConfig, identity: str) -> None:
        """Load the model of ``config``."""
        self._config = config
        self._identity = identity
        self._pipeline = Pipeline(config.draw)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch of tasks; returns their stats."""
        tasks: list[ShardTask] = list(batch["task"])
        stats = [write_shard(task, self._config, self._pipeline, identity=self._identity) for task in tasks]
        return {"stats": stats}


def write_on_ray(tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
    """Write shards by actors of the cluster that ``config.launch`` names (``ray``: this machine's or RAY_ADDRESS's).

    ``--out`` and the model must be reachable under one path on every node. Raises MissingDependencyError.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "--launch ray needs Ray", hint="install it: python -m pip install 'tiue[ray]'"
        ) from None

    if not ray.is_initialized():
        address = config.launch if config.launch != "ray" else os.environ.get("RAY_ADDRESS")
        ray.init(address=address, log_to_driver=False)
    # Nodes may have another working folder than this one.
    config = replace(config, out=config.out.resolve())
    yield from _pool(ray, iter(tasks), config, identity)


def _pool(ray: Any, tasks: Iterator[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
    """Hand tasks to actors as they become free; a task of an actor that died goes to another."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)
    share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
    writer = ray.remote(ShardWriter).options(max_restarts=-1, max_task_retries=-1, **share)
    actors = [writer.remote(config, identity) for _ in range(count)]
    running: dict[Any, int] = {}
    load = [0] * count
    try:
        while True:
            while sum(load) < WAITING_PER_ACTOR * count and (task := next(tasks, None)) is not None:
                actor = min(range(count), key=load.__getitem__)
                running[actors[actor].__call__.remote({"task": [task]})] = actor
                load[actor] += 1
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            load[running.pop(ready)] -= 1
            yield from ray.get(ready)["stats"]
    finally:
        for actor in actors:
            ray.kill(actor)
