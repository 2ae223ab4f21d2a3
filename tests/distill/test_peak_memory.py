"""The memory of a step: against sums by hand, against what a real step makes, against what an H100 was seen to hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_full_size_folder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tiue_cli.distill.estimate import estimate_run
from tiue_cli.distill.loop import Distillation
from tiue_cli.distill.peak_memory import LiveMemory, NormsInFloat32
from tiue_cli.distill.resolve import Layer, resolve_config

STEP = "gradients and activations, at their most"
MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "distill_step_h100_sd15.json"


@pytest.mark.parametrize("fake", [False, True])
def test_storages_count_while_they_are_held(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        before = torch.zeros(1000)
        with LiveMemory() as memory:
            one = before + 1  # 4000 bytes
            view = one[:10].reshape(2, 5)  # the same storage
            two = torch.cat([one, one])  # 8000 bytes more
            assert (memory.live, memory.peak) == (12000, 12000)
            del one
            assert memory.live == 12000, "the view holds it"
            del view
            assert memory.live == 8000
            two += 1
            before.mul_(2)
            assert (memory.live, memory.peak) == (8000, 12000)
            with memory.peak_of_block() as added:
                three = two * 2
                del three
            assert added() == 8000 and memory.live == 8000 and memory.peak == 16000


def test_gradients_come_as_activations_go() -> None:
    layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(4)))
    inputs = torch.zeros(10, 100)
    with LiveMemory() as memory:
        layers(inputs).sum().backward()
        assert memory.live == 4 * 40_000  # the gradients alone
        # At the end: all gradients, and the gradient of what the first layer gave.
        assert 160_000 <= memory.peak <= 160_000 + 3 * 4_000 + 100


def test_norms_keep_their_inputs_in_float32_as_cuda_does() -> None:
    norm = nn.GroupNorm(2, 8)
    values = torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)
    with NormsInFloat32(), torch.autocast("cpu", torch.bfloat16):
        assert norm(values).dtype == torch.float32


@pytest.mark.parametrize("recomputing", [False, True])
def test_a_played_step_holds_what_a_real_one_does(
    recomputing: bool, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = make_config(
        batch_size=4, warm_start__steps=0, max_steps=9, precision="fp32", gradient_checkpointing=recomputing
    )
    run = Distillation(config, tmp_path / "run")
    trainer = run.prepare()
    trainer.step()  # Adam's moments are there now
    with LiveMemory() as memory:
        trainer.step()
    played = estimate_run(config, prompts=5, half=False).memory_bytes[STEP]
    assert played == pytest.approx(memory.peak, rel=0.15)


def test_recomputing_in_half_precision_computes_norms_as_before(make_config: Callable[..., Any]) -> None:
    def played(**changes: Any) -> int:
        config = make_config(batch_size=8, warm_start__steps=0, precision="bf16", **changes)
        return estimate_run(config, prompts=5, half=True).memory_bytes[STEP]

    assert played(gradient_checkpointing=True) < played()


@pytest.mark.slow
def test_the_dry_run_says_what_an_h100_held(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's shapes; over ten seconds, as thousands of operations are played.

    43.1 GiB, where 43.25 were measured. Recomputing is not held against an H100: what was measured of it, 20.4 GiB at
    batch 4, was before the LoRA teacher recomputed its activations as well.
    """
    folder = build_full_size_folder(tmp_path / "sd15", hollow=True)
    (tmp_path / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
    values = {
        "teacher": str(folder),
        "prompts": str(tmp_path / "prompts.txt"),
        "cache": str(tmp_path / "cache"),
        "precision": "bf16",
        "batch_size": 8,
        "warm_start": {"steps": 0},
        "student": {"steps": 4, "spacing": "leading"},
        "ema": 0.9999,
    }
    config = resolve_config([Layer("test", values)]).config
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["settings"]["bf16-batch-8"]["peak_gib"]
    assert estimate_run(config, prompts=2, half=True).peak_memory_bytes / 2**30 == pytest.approx(measured, rel=0.12)
