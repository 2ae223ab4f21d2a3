"""From a checked request to encoded pictures: seeds, the batcher, encoding in threads, counting.

Order ─ check ─▶ jobs ─ MicroBatcher ─▶ pictures ─ encoder threads ─▶ Picture (bytes)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tiue_cli.backends.stages import listening
from tiue_cli.base.machine import usable_cores
from tiue_cli.errors import TiueError
from tiue_cli.files.png import ImageRecord
from tiue_cli.generate.pictures import Request
from tiue_cli.generate.plan import RANDOM_SEEDS
from tiue_cli.model.noise import MAX_SEED
from tiue_cli.serve.batcher import MicroBatcher, Timed
from tiue_cli.serve.config import KEPT_BYTES, KEPT_IMAGES, KEPT_S, ServeConfig
from tiue_cli.serve.engine import Drawn, Engine, Job, batch_key, warm_up_request
from tiue_cli.serve.failures import RequestFailure, from_tiue_error, not_ready
from tiue_cli.serve.images import ImageStore, OutputFormat, encode
from tiue_cli.serve.metrics import Metrics

_T = TypeVar("_T")

MOST_ENCODERS = 16
"""Threads that encode, where there are as many cores; Pillow lets go of the interpreter while it compresses."""


@dataclass(frozen=True)
class Order:
    """What one request asks for, with sizes as (height, width)."""

    prompt: str
    model: str | None
    count: int
    size: tuple[int, int] | None
    steps: int | None
    seed: int | None
    output_format: OutputFormat = "png"
    quality: int | None = None
    loras: tuple[str, ...] | None = None
    """``NAME[:WEIGHT]`` on the server's shelf; None for those that the server was started with."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture, what it is of, and where its time went."""

    data: bytes
    record: ImageRecord
    queue_ms: float
    model_ms: float
    batch: int


class Service:
    """Everything behind the routes; belongs to the event loop's thread."""

    def __init__(self, engine: Engine, config: ServeConfig, *, log: Callable[[str], None]) -> None:
        """Nothing is loaded before ``start``. ``log`` takes one line, in which no prompt may stand."""
        self.engine = engine
        self.config = config
        self.metrics = Metrics()
        self.store = ImageStore(most=KEPT_IMAGES, most_bytes=KEPT_BYTES, keep_s=KEPT_S)
        self.ready = False
        self.draining = False
        self.failed: str | None = None
        self._log = log
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._encoders = ThreadPoolExecutor(min(MOST_ENCODERS, usable_cores()), thread_name_prefix="tiue-encode")
        self.batcher: MicroBatcher[Job, Drawn] = MicroBatcher(
            self._draw_batch,
            key=batch_key,
            max_batch=lambda job: min(config.max_batch, engine.largest_batch(job)),
            max_wait_ms=config.max_wait_ms,
            max_queue=config.max_queue,
            on_batch=self.metrics.observe_batch,
        )
        self.metrics.queue.set_function(lambda: self.batcher.queued)
        self.metrics.kept_images.set_function(lambda: len(self.store))

    async def start(self) -> None:
        """Load the model and draw the first picture; ready after that. Raises what loading and drawing raise."""
        self.batcher.start()
        await self._load(self.engine.name)
        jobs = self.engine.check([warm_up_request(self.engine)], model=self.engine.name)
        await asyncio.gather(*self.batcher.submit(jobs))
        pipeline = self.engine.loaded(self.engine.name)
        assert pipeline is not None
        labels = (self.engine.name, pipeline.backend, pipeline.precision, str(self.engine.default_steps))
        self.metrics.model_info.labels(*labels).set(1)
        self.ready = True

    async def drain(self) -> None:
        """Finish what has begun, take nothing new, let go of the model."""
        self.draining = True
        self.ready = False
        await self.batcher.drain()
        self._encoders.shutdown(wait=True)
        self.engine.close()

    def _draw_batch(self, jobs: Sequence[Job]) -> Sequence[Drawn]:
        """In the model thread."""
        with listening(self.metrics.observe_stage):
            return self.engine.draw(jobs)

    async def draw(self, order: Order, *, gone: asyncio.Task[None] | None = None) -> list[Picture]:
        """The pictures of ``order``, in order of their seeds. Raises RequestFailure.

        Where the task ``gone`` ends first (the client has left), places in the queue are given back and
        ``ClientGone`` is raised.
        """
        started_s = time.perf_counter()
        outcome = "error"
        try:
            async with asyncio.timeout(self.config.timeout_s):
                pictures = await _unless(gone, self._pictures(order))
            outcome = "ok"
        except TimeoutError:
            outcome = "timeout"
            raise RequestFailure(504, f"it took longer than {self.config.timeout_s:g} s", code="timeout") from None
        except ClientGone:
            outcome = "gone"
            raise
        except RequestFailure as failure:
            outcome = {429: "queue_full", 507: "out_of_memory", 503: "not_ready"}.get(failure.status, "refused")
            if failure.status == 500:
                outcome = "error"
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()
            self.metrics.request_seconds.observe(time.perf_counter() - started_s)
        self.metrics.images.inc(len(pictures))
        return pictures

    async def _pictures(self, order: Order) -> list[Picture]:
        jobs = await self._jobs(order)
        futures = self.batcher.submit(jobs)
        try:
            drawn = [await future for future in futures]
        except TiueError as error:
            failure = from_tiue_error(error)
            if failure.status >= 500:
                self._log(f"a batch failed: {type(error).__name__}")
            raise failure from error
        finally:
            for future in futures:
                future.cancel()
        return await self._encoded(drawn, order)

    async def _jobs(self, order: Order) -> list[Job]:
        """Check ``order`` and give every image its seed. Raises RequestFailure."""
        if self.draining:
            raise not_ready("shutting down")
        if not self.ready:
            raise not_ready("loading the model" if self.failed is None else "unable to load its model")
        model = self.engine.name if order.model is None else order.model
        if model not in self.engine.models:
            known = ", ".join(self.engine.models)
            raise RequestFailure(
                404, f"this model is not served; there is: {known}", code="model_not_found", param="model"
            )
        if order.count > self.config.max_images:
            raise RequestFailure(
                400,
                f"more than the {self.config.max_images} images that one request may ask for",
                code="too_many_images",
                param="n",
            )
        seed = secrets.randbelow(RANDOM_SEEDS) if order.seed is None else order.seed
        if seed + order.count - 1 > MAX_SEED:
            raise RequestFailure(400, "seed + n is out of range", code="invalid_value", param="seed")
        await self._load(model)
        try:
            loras = None if order.loras is None else self.engine.loras.resolve(order.loras)
            requests = [
                Request(order.prompt, seed + index, order.size, order.steps, loras) for index in range(order.count)
            ]
        except TiueError as error:
            raise from_tiue_error(error, param="lora") from error
        try:
            return self.engine.check(requests, model=model)
        except TiueError as error:
            raise from_tiue_error(error, param=self.engine.cause(requests[0], model=model)) from error

    async def _load(self, name: str) -> None:
        """Load a model in the model thread, once however many ask for it."""
        if self.engine.loaded(name) is not None:
            return
        if name not in self._loading:
            self._loading[name] = asyncio.get_running_loop().create_task(self._load_now(name))
        # Shielded: a client that goes away must not stop what others wait for.
        await asyncio.shield(self._loading[name])

    async def _load_now(self, name: str) -> None:
        try:
            await self.batcher.run_in_model_thread(lambda: self.engine.load(name))
        finally:
            self._loading.pop(name, None)

    async def _encoded(self, drawn: Sequence[Timed[Drawn]], order: Order) -> list[Picture]:
        loop = asyncio.get_running_loop()

        def work(timed: Timed[Drawn]) -> Picture:
            started_s = time.perf_counter()
            data = encode(
                timed.result,
                output_format=order.output_format,
                quality=order.quality,
                metadata=self.config.metadata,
            )
            self.metrics.observe_stage(order.output_format, time.perf_counter() - started_s)
            return Picture(data, timed.result.record, timed.queue_ms, timed.model_ms, timed.batch)

        return list(await asyncio.gather(*(loop.run_in_executor(self._encoders, work, timed) for timed in drawn)))


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def _unless(gone: asyncio.Task[None] | None, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``; ClientGone, and ``work`` cancelled, where ``gone`` ends before it."""
    if gone is None:
        return await work
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            # Its finally clauses give places back; they must have run before this returns.
            await asyncio.wait({task})
