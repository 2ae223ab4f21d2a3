"""Worker processes on one machine: each holds the model and writes whole shards; the cores are shared out."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tiue_cli.errors import TiueError
from tiue_cli.generate.bulk.config import BulkConfig
from tiue_cli.generate.bulk.shards import ShardStats, ShardTask, write_shard
from tiue_cli.generate.drawing import Pipeline

_pipeline: Pipeline | None = None


def write_in_processes(tasks: Iterable[ShardTask], config: BulkConfig, identity: str) -> Iterator[ShardStats]:
    """Write shards in ``config.workers`` processes; at most two tasks a worker wait, so prompts stay a stream."""
    waiting = iter(tasks)
    # Spawned: torch's and ONNX Runtime's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start, initargs=(config,)) as pool:
        running: set[Future[ShardStats]] = set()
        try:
            while True:
                for task in itertools.islice(waiting, 2 * config.workers - len(running)):
                    running.add(pool.submit(_write, task, config, identity))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise TiueError(
                "a worker died without a message, as happens when the machine runs out of memory",
                hint="run the same command again: it goes on; with fewer --workers it needs less memory",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(config: BulkConfig) -> None:
    """Give the worker its share of the cores, before a library counts them, and load the model."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        rank = (multiprocessing.current_process()._identity or (1,))[-1] - 1
        share = max(1, len(cores) // config.workers)
        start = (rank * share) % len(cores)
        os.sched_setaffinity(0, cores[start : start + share] or cores)
    global _pipeline
    _pipeline = Pipeline(config.draw)


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever: it holds both ends of the queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(task: ShardTask, config: BulkConfig, identity: str) -> ShardStats:
    assert _pipeline is not None, "the worker has been started"
    return write_shard(task, config, _pipeline, identity=identity)
