"""Distillation under Ray Train: the processes that it starts train as one with their batches together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiue_cli as tiue

pytestmark = pytest.mark.ray
pytest.importorskip("ray.train")

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 2, "targets": "attention"},
    "validation": {"every": 0},
    "student": {"steps": 2},
    "tracking": {"every": 1},
    "warm_start": {"steps": 2, "pairs": 4, "teacher_steps": 2, "learning_rate": 1e-2},
}


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(Path(tiue.__file__).resolve().parents[1]))
    # Accelerate looks for GPUs unless it is told that several processes on a CPU are meant.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}})  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.usefixtures("two_cores")
def test_two_workers_of_ray_train_are_one_process_with_twice_the_batch(
    v_teacher_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    import ray.train.torch
    import torch
    from safetensors.torch import load_file

    def train(call: dict[str, Any]) -> None:
        import tiue_cli

        tiue_cli.distill(call.pop("settings"), **call)

    call = {"teacher": str(v_teacher_folder), "prompts": str(prompts_file), "max_steps": 2}
    settings = SETTINGS | {"cache": str(tmp_path / "cache")}
    ray.train.torch.TorchTrainer(
        train,
        train_loop_config=call | {"settings": settings | {"batch_size": 2}, "out": str(tmp_path / "two")},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    tiue.distill(settings | {"batch_size": 4}, out=tmp_path / "one", **call)
    file = Path("unet", "diffusion_pytorch_model.safetensors")
    folders = (v_teacher_folder, tmp_path / "one" / "student", tmp_path / "two" / "student")
    start, one, two = (torch.cat([value.flatten() for value in load_file(path / file).values()]) for path in folders)
    # Adam's first steps are signs: where a gradient is all but 0, they may differ.
    assert (two - one).norm() < 0.05 * (one - start).norm()
