"""The micro-batcher alone, in front of a model that is a function of the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from tiue_cli.errors import OutOfMemoryError
from tiue_cli.serve.batcher import RECOVERY_BATCHES, MicroBatcher, Timed
from tiue_cli.serve.failures import RequestFailure


class Model:
    """Doubles numbers; remembers its batches and the threads that called it; ``hold`` makes a batch wait."""

    def __init__(self, *, fits: int = 1000) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.fits = fits
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        assert self.hold.wait(10)
        if len(items) > self.fits:
            raise OutOfMemoryError("the memory is full")
        return [2 * item for item in items]


def run(model: Model, scenario: Callable[[MicroBatcher[int, int]], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run ``scenario`` with a batcher; numbers below 100 are one kind, the others another."""

    async def main() -> None:
        settings = {"max_wait_ms": 20.0, "max_queue": 100, "max_batch": lambda item: 8, **options}
        batcher: MicroBatcher[int, int] = MicroBatcher(model, key=lambda item: item >= 100, **settings)
        batcher.start()
        await scenario(batcher)
        await batcher.drain()

    asyncio.run(asyncio.wait_for(main(), 20))


async def results(futures: Sequence[asyncio.Future[Timed[int]]]) -> list[int]:
    return [(await future).result for future in futures]


def test_requests_share_batches_of_one_kind_and_get_their_own_results() -> None:
    model = Model()

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        futures = [batcher.submit([number])[0] for number in (1, 100, 2, 101, 3)]
        assert await results(futures) == [2, 200, 4, 202, 6]

    run(model, scenario)
    assert sorted(model.batches) == [[1, 2, 3], [100, 101]]
    assert threading.get_ident() not in model.threads and len(model.threads) == 1


def test_a_full_batch_does_not_wait_and_none_is_too_large() -> None:
    model = Model()

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        assert await results(batcher.submit(list(range(20)))) == [2 * number for number in range(20)]

    run(model, scenario, max_wait_ms=200.0)
    assert [len(batch) for batch in model.batches] == [8, 8, 4]


def test_a_client_that_is_alone_waits_for_company_once() -> None:
    model = Model()
    waited_ms: list[float] = []

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        for asked in ([1], [2], [3, 4]):  # three requests, one after the other
            waited_ms.append((await asyncio.gather(*batcher.submit(asked)))[0].queue_ms)
        model.hold.clear()
        futures = batcher.submit([5])
        await asyncio.sleep(0.05)
        futures += [*batcher.submit([6]), *batcher.submit([7])]  # two that come while the model is busy
        model.hold.set()
        assert await results(futures) == [10, 12, 14]
        waited_ms.append((await asyncio.gather(*batcher.submit([8])))[0].queue_ms)

    run(model, scenario, max_wait_ms=400.0)
    assert model.batches == [[1], [2], [3, 4], [5], [6, 7], [8]]
    assert [wait >= 399 for wait in waited_ms] == [True, False, False, True]


def test_the_event_loop_goes_on_while_the_model_computes() -> None:
    model = Model()

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        model.hold.clear()
        (future,) = batcher.submit([1])
        while not model.batches:
            await asyncio.sleep(0.001)
        ticks = 0
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < 0.1:
            await asyncio.sleep(0.001)
            ticks += 1
        assert ticks > 10 and not future.done()
        model.hold.set()
        assert (await future).result == 2

    run(model, scenario)


def test_who_goes_away_frees_a_place_and_is_not_drawn() -> None:
    model = Model()

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        model.hold.clear()
        (first,) = batcher.submit([1])
        while not model.batches:
            await asyncio.sleep(0.001)
        waiting = batcher.submit([2, 3, 4, 5])
        with pytest.raises(RequestFailure) as refused:
            batcher.submit([6])
        assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
        for future in waiting[:3]:
            future.cancel()
        assert batcher.queued == 1
        later = batcher.submit([7, 8])
        model.hold.set()
        assert await results([first, waiting[3], *later]) == [2, 10, 14, 16]

    run(model, scenario, max_queue=4)
    assert sorted(number for batch in model.batches for number in batch) == [1, 5, 7, 8]


def test_too_little_memory_fails_its_requests_halves_the_batch_and_goes_on() -> None:
    model = Model(fits=3)

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        for expected in (8, 4):
            futures = batcher.submit(list(range(expected)))
            for outcome in await asyncio.gather(*futures, return_exceptions=True):
                assert isinstance(outcome, OutOfMemoryError)
        assert batcher.limit(0) == 2
        assert await results(batcher.submit([1, 2, 3])) == [2, 4, 6]
        assert batcher.limit(100) == 8, "another size is another question"

    run(model, scenario)
    assert [len(batch) for batch in model.batches] == [8, 4, 2, 1]


def test_a_halved_batch_grows_again_after_many_good_ones() -> None:
    model = Model(fits=4)

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        await asyncio.gather(*batcher.submit(list(range(8))), return_exceptions=True)
        assert batcher.limit(0) == 4
        for _ in range(RECOVERY_BATCHES):
            await results(batcher.submit([1]))
        assert batcher.limit(0) == 8

    run(model, scenario, max_wait_ms=0.0)


def test_another_failure_of_a_batch_is_its_own() -> None:
    def draw(items: Sequence[int]) -> list[int]:
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]

    async def scenario(batcher: MicroBatcher[int, int]) -> None:
        (bad,) = batcher.submit([13])
        with pytest.raises(ValueError, match="13"):
            await bad
        assert await results(batcher.submit([1])) == [2]

    run(draw, scenario)  # type: ignore[arg-type]


def test_draining_finishes_what_waits_and_takes_nothing_new() -> None:
    model = Model()

    async def main() -> None:
        batcher: MicroBatcher[int, int] = MicroBatcher(
            model, key=lambda item: 0, max_batch=lambda item: 2, max_wait_ms=1000.0, max_queue=100
        )
        batcher.start()
        futures = batcher.submit([1, 2, 3])
        draining = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        with pytest.raises(RequestFailure) as refused:
            batcher.submit([4])
        assert refused.value.status == 503
        await draining
        assert await results(futures) == [2, 4, 6]

    asyncio.run(asyncio.wait_for(main(), 20))
