"""``benchmarks/serve_load.py``: it counts what it asked for, and it sees a wrong picture."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import serve_load as load
from serving import Running


@pytest.fixture(scope="module")
def checker(tiny_export: Path) -> object:
    return load.Checker(load.reference_pixels(str(tiny_export), 8))


def test_phases_count_every_request_and_find_the_pictures_of_generate(server: Running, checker: object) -> None:
    at = load.Load(server.url, psutil.Process(), checker, seeds=8, warm_up_s=0.05)
    closed = at.closed("clients", clients=4, seconds=0.3)
    opened = at.open(rate_per_s=50, seconds=0.3)
    assert closed.images >= 4 and opened.images == 15 and closed.failed == opened.failed == 0
    for phase in (closed, opened):
        figures = phase.figures()
        assert len(phase.latencies_ms) == len(phase.batches) == phase.images
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] and figures["images_per_s"] > 0
        assert phase.memory_mib and json.dumps(figures)


def test_a_wrong_picture_and_a_failure_are_seen(server: Running, tiny_export: Path) -> None:
    pixels = load.reference_pixels(str(tiny_export), 2)
    wrong = load.Checker({0: pixels[0], 1: 255 - pixels[1]})
    phase = load.Load(server.url, psutil.Process(), wrong, seeds=2, warm_up_s=0).closed("c", clients=1, seconds=0.2)
    assert phase.failed and phase.images and abs(phase.failed - phase.images) <= 1
    refused = load.Load(server.url, psutil.Process(), load.Checker({}), seeds=2, warm_up_s=0)
    assert refused.closed("c", clients=1, seconds=0.05).images == 0
