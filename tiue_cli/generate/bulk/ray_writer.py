"""A bulk job on Ray: a pool of actors, each with the model and a share of the GPUs, writes whole shards.

The pool follows the cluster: nodes that join get actors, and what an actor that died had begun goes to another. A shard
is a function of its rows, written aside and renamed, so doing one again is harmless.

Not Ray Data: its pools of actors do the same, but it wants to read the prompts on a node (standard input could not be
used), replays that reader from the start where its node dies, and cuts blocks by bytes, while a shard is cut by rows
whose numbers are the images' ids, and the driver knows which shards are there. What is left of it is this file.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tiue_cli.errors import MissingDependencyError, TiueError
from tiue_cli.generate.bulk.config import BulkConfig
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask, write_shard
from tiue_cli.generate.drawing import Pipeline

WAITING_PER_ACTOR = 2
"""Shards that an actor is given at a time, so that it never waits for the driver."""
LOOK_S = 2.0
"""How often the size of the cluster is looked at."""
MOST_DEATHS = 5
"""Actors that may die of one shard, or in a row while they load the model."""


class ShardWriter:
    """The actor: loads the model once, then writes shards."""

    def __init__(self, config: BulkConfig, identity: str) -> None:
        """Nothing is loaded yet: what a constructor raises, Ray would tell as the death of the actor."""
        self._config = config
        self._identity = identity
        self._pipeline: Pipeline | None = None

    def open(self) -> None:
        """Load the model. Raises what loading raises."""
        self._pipeline = Pipeline(self._config.draw)

    def write(self, task: ShardTask) -> ShardStats:
        """Write a shard. Raises what `write_shard` raises."""
        assert self._pipeline is not None, "the actor has been opened"
        return write_shard(task, self._config, self._pipeline, identity=self._identity)


def write_on_ray(tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
    """Write shards by actors of the cluster that ``config.launch`` names (``ray``: this machine's or RAY_ADDRESS's).

    ``--out`` and the model must be reachable under one path on every node. Raises MissingDependencyError, what an actor
    raises, and TiueError where actors die again and again.
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
    pool = ActorPool(ray, config, identity)
    try:
        yield from pool.write(iter(tasks))
    finally:
        pool.close()


@dataclass(eq=False)
class _Actor:
    handle: Any
    is_open: bool = False
    load: int = 0


class ActorPool:
    """Actors of a cluster, as many as it has room for now."""

    def __init__(self, ray: Any, config: BulkConfig, identity: str) -> None:
        """``ray`` is the module, initialised."""
        self._ray = ray
        self._config = config
        self._identity = identity
        self._actors: list[_Actor] = []
        self._running: dict[Any, tuple[_Actor, ShardTask | None]] = {}  # None: it loads the model
        self._again: deque[ShardTask] = deque()
        self._deaths: Counter[int | None] = Counter()

    def write(self, tasks: Iterator[ShardTask]) -> Iterator[ShardStats]:
        """Hand tasks out as actors become free; yields each shard when it is there. Raises as `write_on_ray`."""
        while not self._is_done(tasks):
            self._grow()
            self._hand_out(tasks)
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=LOOK_S)
            for reference in ready:
                if (stats := self._take(reference)) is not None:
                    yield stats

    def close(self) -> None:
        """Let the actors go."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()

    # --- inside ---

    def _is_done(self, tasks: Iterator[ShardTask]) -> bool:
        if any(task is not None for _, task in self._running.values()):
            return False
        task = self._next(tasks)
        if task is not None:
            self._again.appendleft(task)
        return task is None

    def _grow(self) -> None:
        """One actor a GPU; where the cluster has none, one for two cores."""
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        room = gpus or max(1, int(resources.get("CPU", 1)) // 2)
        share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 1}
        while len(self._actors) < room:
            # Never restarted by Ray: that would wait for room as large as was lost, and its shards with it.
            remote = self._ray.remote(ShardWriter).options(max_restarts=0, **share)
            actor = _Actor(remote.remote(self._config, self._identity))
            self._actors.append(actor)
            self._running[actor.handle.open.remote()] = actor, None

    def _next(self, tasks: Iterator[ShardTask]) -> ShardTask | None:
        return self._again.popleft() if self._again else next(tasks, None)

    def _hand_out(self, tasks: Iterator[ShardTask]) -> None:
        """Only to actors that have the model: one that waits for room in the cluster would hold its tasks up."""
        while free := [actor for actor in self._actors if actor.is_open and actor.load < WAITING_PER_ACTOR]:
            task = self._next(tasks)
            if task is None:
                return
            actor = min(free, key=lambda actor: actor.load)
            actor.load += 1
            self._running[actor.handle.write.remote(task)] = actor, task

    def _take(self, reference: Any) -> ShardStats | None:
        """The shard that is ready; None where an actor has loaded the model or died."""
        actor, task = self._running[reference]
        # Were it to die, then of what it was doing: the first that it was given.
        doing = next(given for owner, given in self._running.values() if owner is actor)
        del self._running[reference]
        try:
            result: ShardStats | None = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TiueError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError:
            self._lost(actor, doing)
            if task is not None:
                self._again.append(task)
            return None
        if task is None:
            actor.is_open = True
            self._deaths[None] = 0
            return None
        actor.load -= 1
        return result

    def _lost(self, actor: _Actor, doing: ShardTask | None) -> None:
        """Count the death of an actor, once though each of its tasks fails; another is started where there is room."""
        if actor not in self._actors:
            return
        self._actors.remove(actor)
        number = None if doing is None else doing.number
        self._deaths[number] += 1
        if self._deaths[number] >= MOST_DEATHS:
            what = "loaded the model" if number is None else f"wrote shard {number}"
            raise TiueError(
                f"{MOST_DEATHS} actors died while they {what}",
                hint="see the logs of the cluster's nodes; where memory is full, give a smaller --batch",
            )
