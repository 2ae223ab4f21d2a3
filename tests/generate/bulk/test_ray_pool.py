"""The pool of actors on a cluster that is played: who gets which shard when actors die, join and fail."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tiue_cli.errors import PromptError, TiueError
from tiue_cli.generate.bulk.config import BulkConfig
from tiue_cli.generate.bulk.ray_writer import ActorPool
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask
from tiue_cli.generate.config import GenerateConfig


class RayTaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RayActorError(Exception):
    pass


@dataclass
class Method:
    actor: Actor
    name: str

    def remote(self, *arguments: Any) -> int:
        return self.actor.cluster.call(self.actor, self.name, arguments)


@dataclass(eq=False)
class Actor:
    cluster: Cluster
    alive: bool = True
    did: list[str] = field(default_factory=list)

    @property
    def open(self) -> Method:
        return Method(self, "open")

    @property
    def write(self) -> Method:
        return Method(self, "write")


class Cluster:
    """Ray's module as the pool sees it. ``happens`` is asked before each call of an actor runs."""

    exceptions = type("exceptions", (), {"RayTaskError": RayTaskError, "RayActorError": RayActorError})

    def __init__(self, *, cpus: int, gpus: int = 0, happens: Callable[[Actor, str], None] | None = None) -> None:
        self.resources: dict[str, float] = {"CPU": cpus, "GPU": gpus}
        self.happens = happens or (lambda actor, what: None)
        self.actors: list[Actor] = []
        self.options: dict[str, Any] = {}
        self.waiting: dict[int, tuple[Actor, str]] = {}

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, kind: type) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return type("Remote", (), {"remote": staticmethod(self.start)})

        return type("Kind", (), {"options": staticmethod(options)})

    def start(self, config: BulkConfig, identity: str) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]

    def call(self, actor: Actor, name: str, arguments: tuple[Any, ...]) -> int:
        number = len(self.waiting) + sum(len(one.did) for one in self.actors)
        while number in self.waiting:
            number += 1
        self.waiting[number] = actor, "open" if name == "open" else str(arguments[0].number)
        return number

    def wait(self, references: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        assert set(references) <= set(self.waiting) and references
        return references[:1], references[1:]

    def get(self, reference: int) -> ShardStats | None:
        actor, what = self.waiting.pop(reference)
        if actor.alive:
            self.happens(actor, what)
        if not actor.alive:
            raise RayActorError
        actor.did.append(what)
        return None if what == "open" else ShardStats(int(what), 1, (), "")

    def kill(self, actor: Actor) -> None:
        actor.alive = False

    @property
    def written(self) -> list[int]:
        return sorted(int(what) for actor in self.actors for what in actor.did if what != "open")


def tasks(count: int) -> Iterator[ShardTask]:
    return (ShardTask(number, number, ()) for number in range(count))


def write(cluster: Cluster, count: int) -> list[int]:
    config = BulkConfig(draw=GenerateConfig(), prompts="-", out=Path("out"))
    return [stats.number for stats in ActorPool(cluster, config, "job").write(tasks(count))]


def test_every_shard_is_written_once_by_actors_that_have_the_model() -> None:
    cluster = Cluster(cpus=6)
    assert sorted(write(cluster, 20)) == cluster.written == list(range(20))
    assert len(cluster.actors) == 3 and all(actor.did[0] == "open" and len(actor.did) > 3 for actor in cluster.actors)
    assert cluster.options == {"max_restarts": 0, "num_cpus": 1}
    with_gpus = Cluster(cpus=32, gpus=4)
    write(with_gpus, 4)
    assert len(with_gpus.actors) == 4 and with_gpus.options == {"max_restarts": 0, "num_cpus": 1, "num_gpus": 1}


def test_a_job_whose_shards_are_there_starts_no_actor() -> None:
    cluster = Cluster(cpus=4)
    assert write(cluster, 0) == [] and not cluster.actors


def test_what_a_dead_actor_had_goes_to_another_and_a_new_one_is_started() -> None:
    def happens(actor: Actor, what: str) -> None:
        if what == "7":
            actor.alive = len(cluster.actors) > 2  # only the first that gets it dies

    cluster = Cluster(cpus=4, happens=happens)
    assert sorted(write(cluster, 20)) == cluster.written == list(range(20))
    assert [actor.alive for actor in cluster.actors].count(False) == 1 and len(cluster.actors) == 3


def test_a_lost_node_leaves_a_smaller_pool_and_one_that_joins_a_larger() -> None:
    def happens(actor: Actor, what: str) -> None:
        if what == "10" and cluster.resources["CPU"] == 4:
            cluster.resources["CPU"], actor.alive = 2, False
        if what == "15":
            cluster.resources["CPU"] = 8

    cluster = Cluster(cpus=4, happens=happens)
    assert sorted(write(cluster, 60)) == list(range(60))
    assert sum(actor.alive for actor in cluster.actors) == 4 and all(actor.did for actor in cluster.actors)


@pytest.mark.parametrize(("deadly", "message"), [("3", "wrote shard 3"), ("open", "loaded the model")])
def test_a_shard_that_kills_every_actor_ends_the_job(deadly: str, message: str) -> None:
    def happens(actor: Actor, what: str) -> None:
        actor.alive = what != deadly

    with pytest.raises(TiueError, match=f"5 actors died while they {message}"):
        write(Cluster(cpus=4, happens=happens), 20)


def test_errors_of_ours_come_through_as_they_are() -> None:
    told = PromptError("p.txt:3: it is empty", hint="repair the row")

    def happens(actor: Actor, what: str) -> None:
        if what == "3":
            raise RayTaskError(pickle.loads(pickle.dumps(told)))

    with pytest.raises(PromptError, match=r"p\.txt:3") as caught:
        write(Cluster(cpus=2, happens=happens), 5)
    assert caught.value.hint == "repair the row"
