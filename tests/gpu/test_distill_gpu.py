"""Distillation on a real GPU: bf16, and fp16 whose gradient scaler serves two optimisers; compiled; recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.resolve import Layer, resolve_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable GPU"),
]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process, its precision included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(teacher: Path, folder: Path, *, steps: int = 3, **values: Any) -> list[float]:
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red star\na blue tree\na green fish\na pink house\n", encoding="utf-8")
    settings = {
        "teacher": str(teacher),
        "prompts": str(folder / "prompts.txt"),
        "cache": str(folder / "cache"),
        "batch_size": 2,
        "warm_start": {"steps": 0},
        "student": {"steps": 4, "spacing": "leading"},
        "validation": {"every": 0},
        "max_steps": 10,
        **values,
    }
    run = Distillation(resolve_config([Layer("test", settings)]).config, folder / "run")
    trainer = run.prepare()
    before = [parameter.detach().clone() for parameter in trainer.networks.student.parameters()]
    found = [float(trainer.step()["vsd"]) for _ in range(steps)]
    after = list(trainer.networks.student.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)), "nothing was learnt"
    assert all(math.isfinite(float(parameter.float().sum())) for parameter in after)
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_stays_near_float32(
    precision: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    exact = losses(tiny_teacher_folder, tmp_path / "fp32", precision="fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    # fp16's scaler starts high and skips steps until it fits: more of them, so that some count.
    half = losses(tiny_teacher_folder, tmp_path / precision, precision=precision, steps=3 if precision == "bf16" else 8)
    assert half[0] == pytest.approx(exact[0], rel=0.1)
    assert all(map(math.isfinite, half))


def test_recomputing_gives_the_same_losses(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    kept = losses(tiny_teacher_folder, tmp_path / "kept", precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    recomputed = losses(tiny_teacher_folder, tmp_path / "recomputed", precision="bf16", gradient_checkpointing=True)
    assert recomputed == pytest.approx(kept, rel=0.05)


@pytest.mark.slow
def test_compiled_steps_give_the_same_losses(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    plain = losses(tiny_teacher_folder, tmp_path / "plain", precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    compiled = losses(tiny_teacher_folder, tmp_path / "compiled", precision="bf16", compile=True)
    assert compiled == pytest.approx(plain, rel=0.1)
