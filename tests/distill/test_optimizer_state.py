"""An optimiser's state survives safetensors and JSON bit for bit; a pickle of 0.1 is read, and runs nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tiue_cli.distill.checkpoint import STATE, Checkpoint, TrainingState, read_checkpoint, write_checkpoint
from tiue_cli.distill.optimizer_state import PICKLE, TENSORS, TREE, load_optimizer, save_optimizer
from tiue_cli.errors import OutputError


def adam_state(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 4, dtype=dtype)), torch.nn.Parameter(torch.randn((), dtype=dtype))]
    optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "betas": (0.8, 0.95)}])
    for _ in range(3):
        (weights[0].sum() * weights[1]).backward()
        optimizer.step()
    return optimizer.state_dict()


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return list(mine) == list(theirs) and all(equal(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return type(mine) is type(theirs) and len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return type(mine) is type(theirs) and bool(mine == theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = adam_state(dtype)
    save_optimizer(state, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [TREE, TENSORS]
    assert equal(load_optimizer(tmp_path), state)


def test_order_in_memory_comes_back(tmp_path: Path) -> None:
    """Sums over channels-last moments round otherwise: a resumed run would drift from one that did not stop."""
    for shape in ((4, 3, 3, 3), (4, 3, 1, 1)):
        moments = torch.randn(shape).to(memory_format=torch.channels_last)
        save_optimizer({"state": {0: {"exp_avg": moments}}}, tmp_path)
        assert equal(load_optimizer(tmp_path)["state"][0]["exp_avg"], moments)


def test_shared_tables_are_stored(tmp_path: Path) -> None:
    """8-bit Adam has one quantisation table for all parameters."""
    table = torch.arange(256, dtype=torch.uint8)
    save_optimizer({"state": {0: {"qmap": table, "step": 3}, 1: {"qmap": table}}}, tmp_path)
    assert equal(load_optimizer(tmp_path)["state"][1]["qmap"], table)


def test_a_pickle_of_before_is_read(tmp_path: Path) -> None:
    state = adam_state()
    torch.save(state, tmp_path / PICKLE)
    assert equal(load_optimizer(tmp_path), state)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_an_evil_or_damaged_pickle_is_a_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(
        tmp_path, Checkpoint(TrainingState(step=3), {}, {"student_optimizer": adam_state()}), keep=1
    )
    folder = path / "student_optimizer"
    for file in (TREE, TENSORS):
        (folder / file).unlink()
    for content in (pickle.dumps(Evil()), b"", b"PK\x03\x04", b"\x80\x02]q\x00K\xff", os.urandom(200)):
        (folder / PICKLE).write_bytes(content)
        with pytest.raises(OutputError, match="is damaged"):
            read_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"state": 3}', '{"state": {"tensor": ["99", []]}}', '{"state": {"a": 1, "b": 2}}']
)
def test_a_damaged_tree_is_a_damaged_checkpoint(tmp_path: Path, content: str) -> None:
    path = write_checkpoint(
        tmp_path, Checkpoint(TrainingState(step=3), {}, {"student_optimizer": adam_state()}), keep=1
    )
    assert (path / STATE).is_file()
    (path / "student_optimizer" / TREE).write_text(content)
    with pytest.raises(OutputError, match="is damaged"):
        read_checkpoint(path)
