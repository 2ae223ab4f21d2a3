"""Requests of one model, size and K share a batch; one thread computes, the event loop never waits for it.

    submit ─▶ waiting, by key ─ full, or the oldest has waited long enough ─▶ model thread ─▶ the futures' results

A picture is a function of its own prompt and seed, so whoever shares a batch changes nothing about it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tiue_cli.errors import OutOfMemoryError
from tiue_cli.serve.failures import not_ready, queue_full

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Contra = TypeVar("_Contra", contravariant=True)
_Co = TypeVar("_Co", covariant=True)

RECOVERY_BATCHES = 64
"""Batches without a failure after which a halved batch may grow again, to twice its size."""


class Draw(Protocol[_Contra, _Co]):
    """Computes one batch; called in the model thread, never twice at a time."""

    def __call__(self, items: Sequence[_Contra], /) -> Sequence[_Co]:
        """One result an item."""


@dataclass
class Timed(Generic[_Result]):
    """A result with the milliseconds it waited and the milliseconds that its batch, of ``batch`` items, took."""

    result: _Result
    queue_ms: float
    model_ms: float
    batch: int


@dataclass
class _Waiting(Generic[_Item, _Result]):
    item: _Item
    future: asyncio.Future[Timed[_Result]]
    since_s: float


class MicroBatcher(Generic[_Item, _Result]):
    """A queue in front of a model. Every method but ``__init__`` belongs to the event loop's thread."""

    def __init__(
        self,
        draw: Draw[_Item, _Result],
        *,
        key: Callable[[_Item], Hashable],
        max_batch: Callable[[_Item], int],
        max_wait_ms: float,
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """``max_batch`` says how many items like this one may be computed at once, by engine and configuration.

        ``on_batch`` is called with the size of each batch and the seconds that it took.
        """
        self._draw = draw
        self._key = key
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._waiting: dict[Hashable, deque[_Waiting[_Item, _Result]]] = {}
        self._limits: dict[Hashable, int] = {}
        self._good: dict[Hashable, int] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiue-model")
        self._loop_task: asyncio.Task[None] | None = None
        self._running = 0
        self._closing = False
        self._expects_company = True
        self._item_s = 0.05
        """Seconds an image took lately; what Retry-After is worked out from."""

    @property
    def queued(self) -> int:
        """Items that wait, without those whose client has gone."""
        return sum(not waiting.future.done() for queue in self._waiting.values() for waiting in queue)

    @property
    def busy(self) -> int:
        """Items that wait or are being computed."""
        return self.queued + self._running

    def limit(self, item: _Item) -> int:
        """The largest batch for items like ``item`` now: halved each time memory did not suffice."""
        most = max(1, self._max_batch(item))
        return min(most, self._limits.get(self._key(item), most))

    def start(self) -> None:
        """Begin to work."""
        self._loop_task = asyncio.get_running_loop().create_task(self._work(), name="tiue-batcher")

    async def run_in_model_thread(self, function: Callable[[], object]) -> None:
        """Run something else where the model lives (load it, say), between batches."""
        await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def submit(self, items: Sequence[_Item]) -> list[asyncio.Future[Timed[_Result]]]:
        """Queue ``items``, all or none; cancel a future to give its place back.

        Raises RequestFailure: 429 where they do not fit in the queue, 503 while closing.
        """
        if self._closing:
            raise not_ready("shutting down")
        queued = self.queued
        if queued + len(items) > self._max_queue:
            raise queue_full(queued * self._item_s)
        loop, now_s = asyncio.get_running_loop(), time.perf_counter()
        futures = []
        for item in items:
            future: asyncio.Future[Timed[_Result]] = loop.create_future()
            self._waiting.setdefault(self._key(item), deque()).append(_Waiting(item, future, now_s))
            futures.append(future)
        self._wake.set()
        return futures

    async def drain(self) -> None:
        """Take nothing new, finish what waits, and stop the thread."""
        self._closing = True
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
        # Not wait=True: that would block the loop; the thread is idle by now.
        self._thread.shutdown(wait=False, cancel_futures=True)

    # --- inside ---

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            key = self._oldest()
            if key is None:
                if self._closing:
                    return
                await self._wake.wait()
                continue
            await self._gather(key)
            batch = self._take(key)
            if batch:
                await self._run(key, batch)

    def _oldest(self) -> Hashable | None:
        """The key whose first item has waited longest: no size starves another."""
        for key in list(self._waiting):
            queue = self._waiting[key]
            while queue and queue[0].future.done():
                queue.popleft()
            if not queue:
                del self._waiting[key]
        if not self._waiting:
            return None
        return min(self._waiting, key=lambda key: self._waiting[key][0].since_s)

    async def _gather(self, key: Hashable) -> None:
        """Wait for company until the batch is full or its oldest item has waited ``max_wait_ms``.

        Not where the last batch was of one request: a client that is alone would wait for nobody, every time. Should
        others have come meanwhile, they share a batch as soon as the model is free.
        """
        while not self._closing and self._expects_company:
            queue = self._waiting.get(key)
            if not queue:
                return
            left_s = queue[0].since_s + self._max_wait_s - time.perf_counter()
            if left_s <= 0 or len(queue) >= self.limit(queue[0].item):
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _take(self, key: Hashable) -> list[_Waiting[_Item, _Result]]:
        queue = self._waiting.get(key, deque())
        batch: list[_Waiting[_Item, _Result]] = []
        while queue and (not batch or len(batch) < self.limit(batch[0].item)):
            waiting = queue.popleft()
            if not waiting.future.done():
                batch.append(waiting)
        return batch

    async def _run(self, key: Hashable, batch: list[_Waiting[_Item, _Result]]) -> None:
        started_s = time.perf_counter()
        self._running = len(batch)
        # What one request asks for is queued at one time.
        self._expects_company = len({waiting.since_s for waiting in batch}) > 1
        try:
            items = [waiting.item for waiting in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._draw, items)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer to these requests, and work goes on)
            if isinstance(error, OutOfMemoryError):
                self._halve(key, len(batch))
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        finally:
            self._running = 0
        seconds = time.perf_counter() - started_s
        self._item_s = 0.8 * self._item_s + 0.2 * seconds / len(batch)
        self._grow(key)
        self._on_batch(len(batch), seconds)
        for waiting, result in zip(batch, results, strict=True):
            if not waiting.future.done():
                queue_ms = 1000 * (started_s - waiting.since_s)
                waiting.future.set_result(Timed(result, queue_ms, 1000 * seconds, len(batch)))

    def _halve(self, key: Hashable, size: int) -> None:
        self._limits[key] = max(1, size // 2)
        self._good[key] = 0

    def _grow(self, key: Hashable) -> None:
        """Memory that another program held may be free again: after many good batches a larger one is tried."""
        if key not in self._limits:
            return
        self._good[key] += 1
        if self._good[key] >= RECOVERY_BATCHES:
            self._limits[key] *= 2
            self._good[key] = 0
