from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tiue_cli.distill.data.order import EndlessOrder, Stream, generator
from tiue_cli.errors import OutputError
from tiue_cli.files.rows import RowCache, cache_key


def test_every_part_of_the_address_changes_the_draw() -> None:
    base = {"seed": 0, "stream": Stream.NOISE, "step": 0, "micro": 0, "process": 0}
    other = {"seed": 1, "stream": Stream.SCORE, "step": 1, "micro": 1, "process": 1}
    draws = {generator(**{**base, **change}).random() for change in [{}, *({key: other[key]} for key in base)]}  # type: ignore[arg-type]
    assert len(draws) == 6
    assert generator(**base).random() in draws  # type: ignore[arg-type]


def test_long_draws_do_not_run_into_the_next_address() -> None:
    long = generator(0, Stream.NOISE).standard_normal(100_000)
    assert not np.isin(generator(0, Stream.NOISE, micro=1).standard_normal(100), long).any()


def test_order_is_endless_fair_and_independent_of_where_one_starts() -> None:
    order = EndlessOrder(5, seed=0, stream=Stream.ORDER)
    rows = order.rows(0, 20)
    for epoch in range(4):
        assert sorted(rows[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert rows[:5] != rows[5:10]
    assert EndlessOrder(5, seed=0, stream=Stream.ORDER).rows(13, 7) == rows[13:]


def test_cache_gives_back_its_rows_and_knows_what_is_missing(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 10, (2, 3), max_chunk_rows=4)
    rows = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    assert cache.missing() == [0, 1, 2]
    for chunk in (2, 0, 1):
        cache.write(chunk, rows[cache.chunk_range(chunk).start : cache.chunk_range(chunk).stop])
    assert cache.missing() == []
    np.testing.assert_array_equal(
        RowCache(tmp_path, 10, (2, 3), max_chunk_rows=4).rows([9, 0, 4, 4]), rows[[9, 0, 4, 4]]
    )


def test_processes_share_the_chunks_whenever_they_look(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 5, (1,), max_chunk_rows=1)
    first = cache.missing((0, 2))
    cache.write(0, np.zeros((1, 1), np.float32))
    assert sorted(first + cache.missing((1, 2))) == [0, 1, 2, 3, 4]


def test_longer_cache_finds_the_whole_chunks_of_a_shorter_one(tmp_path: Path) -> None:
    short = RowCache(tmp_path, 5, (1,), max_chunk_rows=2)
    for chunk in short.missing():
        short.write(chunk, np.full((len(short.chunk_range(chunk)), 1), chunk, np.float32))
    longer = RowCache(tmp_path, 8, (1,), max_chunk_rows=2)
    assert longer.missing() == [2, 3]  # the shorter one's last chunk held one row
    assert longer.rows([0, 3]).flatten().tolist() == [0.0, 1.0]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_chunk_that_finds_no_room_is_one_clear_error(tmp_path: Path) -> None:
    import resource

    cache = RowCache(tmp_path, 1, (4096,))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            cache.write(0, np.zeros((1, 4096), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cache.missing() == [0] and not list(tmp_path.iterdir())


def test_damaged_chunk_is_named(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 2, (2,))
    cache.write(0, np.zeros((2, 2), np.float32))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OutputError, match="damaged"):
        RowCache(tmp_path, 2, (2,)).rows([0])


def test_cache_key_depends_on_values_not_order() -> None:
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1}) != cache_key({"a": 1, "b": 3})
