"""Some hundred of the inputs of benchmarks/fuzz.py: no reader ends in anything but an error of the tree."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readers(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return list(fuzz.targets(tmp_path_factory.mktemp("good")))


@given(st.integers(0, 2**32))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_every_reader_ends_in_data_or_an_error_of_ours(
    fuzz: ModuleType, readers: list[object], tmp_path: Path, seed: int
) -> None:
    choose = random.Random(seed)
    for target in readers:
        if target.every == 1:  # type: ignore[attr-defined]
            count = fuzz.Count()
            fuzz.try_one(target, choose, tmp_path, count)
            assert (count.faults, count.hangs, count.long_messages) == (0, 0, 0), count.examples


def test_a_campaign_finds_a_fault(fuzz: ModuleType, tmp_path: Path) -> None:
    """The counter-test: a reader that lets an exception of Python out is counted, and so is one that never ends."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "n.json").write_text('{"n": 1}')

    def careless(folder: Path) -> None:
        import json

        json.loads((folder / "n.json").read_bytes())["n"] + 1

    count = fuzz.Count()
    target = fuzz.Target("careless", tmp_path / "good", ("n.json",), careless)
    for seed in range(30):
        fuzz.try_one(target, random.Random(seed), tmp_path / "work", count)
    assert count.faults > 5 and count.examples
