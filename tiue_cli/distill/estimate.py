"""What a distillation will need, found without loading a weight: parameters, memory by part, disk.

Sizes come from the model folder's headers; activations from a forward pass over fake tensors (shapes without numbers),
counting what autograd would keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from tiue_cli.distill.config import DistillConfig, LoraSettings
from tiue_cli.distill.networks import StudentGenerator, lora_targets, teacher_source
from tiue_cli.model.autoencoder import latent_size
from tiue_cli.model.folder import ModelInfo, check_model_folder, read_json
from tiue_cli.model.hub import resolve_model
from tiue_cli.model.student import choose_timesteps, refuse_student

_FLOAT32, _HALF = 4, 2
_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes by part, for one process; parameters by network. Memory without the allocator's own slack."""

    timesteps: tuple[int, ...]
    parameters: dict[str, int]
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    steps: dict[str, int]

    @property
    def peak_memory_bytes(self) -> int:
        """All parts together."""
        return sum(self.memory_bytes.values())


def estimate_run(config: DistillConfig, *, prompts: int, half: bool) -> Estimate:
    """What ``config`` needs over ``prompts`` prompts; ``half``: mixed precision. Raises TiueError."""
    info = check_model_folder(resolve_model(teacher_source(config)))
    refuse_student(info)
    timesteps = _timesteps(config, info)
    batch = max(config.batch_size, (config.warm_start.batch_size or 0) if config.warm_start.steps else 0)
    if config.warm_start.keep_weight > 0:  # both go through the student at once
        batch = max(batch, config.batch_size + (config.warm_start.batch_size or config.batch_size))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _FakeRun(config, info, timesteps, batch)
    unet, lora = fake.unet_parameters, fake.lora_parameters
    others = sum(info.component(name).parameters for name in ("text_encoder", "vae"))
    frozen = _HALF if half else _FLOAT32
    moments = 1 if config.optimizer.name == "adamw8bit" else _FLOAT32
    memory = {
        "student, weights and gradients": 2 * _FLOAT32 * unet,
        "student, Adam": _ADAM_MOMENTS * moments * unet,
        "student, running mean": 0 if config.ema is None else _FLOAT32 * unet,
        "teacher's UNet": frozen * unet,
        "LoRA, with gradients and Adam": (2 + _ADAM_MOMENTS) * _FLOAT32 * lora,
        "text encoder and autoencoder": _FLOAT32 * others,
        "activations": round(fake.activation_bytes * (frozen / _FLOAT32)),
    }
    weights = _FLOAT32 * (unet + lora + (0 if config.ema is None else unet))
    checkpoint = weights + _ADAM_MOMENTS * (moments * unet + _FLOAT32 * lora)
    text = info.text_tokens * info.text_width * prompts * frozen if config.text_cache else 0
    pairs = config.warm_start.pairs if config.warm_start.needs_pairs else 0
    return Estimate(
        timesteps=timesteps,
        parameters={"student's UNet": unet, "LoRA": lora, "text encoder and autoencoder": others},
        memory_bytes={name: size for name, size in memory.items() if size},
        disk_bytes={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # the next is written before the oldest goes
            "student": _FLOAT32 * (unet + others),
            "cached text states": text,
            "cached pairs": pairs * _FLOAT32 * fake.latent_numbers,
        },
        steps={
            "warm start": min(config.warm_start.steps, config.max_steps),
            "distillation": max(0, config.max_steps - config.warm_start.steps),
        },
    )


def _timesteps(config: DistillConfig, info: ModelInfo) -> tuple[int, ...]:
    settings, scheduler = config.student, read_json(info.path / "scheduler" / "scheduler_config.json")
    chosen, _ = choose_timesteps(
        scheduler,
        steps=settings.steps,
        spacing=settings.spacing,
        timesteps=settings.timesteps,
        folder=info.path,
    )
    return chosen


class _FakeRun:
    """Forward passes without numbers. Made within a FakeTensorMode."""

    def __init__(self, config: DistillConfig, info: ModelInfo, timesteps: tuple[int, ...], batch: int) -> None:
        shape = (info.latent_channels, *info.sample_size)
        if config.size is not None:
            shape = (info.latent_channels, *latent_size(config.size, info.factor))
        self.latent_numbers = shape[0] * shape[1] * shape[2]
        unet_config = read_json(info.path / "unet" / "config.json")
        noise, states = torch.zeros(batch, *shape), torch.zeros(batch, info.text_tokens, info.text_width)

        unet: Any = UNet2DConditionModel.from_config(unet_config)
        self.unet_parameters = _count(unet)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        student = StudentGenerator(unet, timesteps, decoder=config.student.decoder)
        self.lora_parameters = lora_parameter_count(unet, config.lora)
        # The student's step keeps more than the LoRA teacher's, which follows it: that one trains adapters alone.
        self.activation_bytes = saved_bytes(student, lambda: student(noise, states))


def lora_parameter_count(unet: nn.Module, settings: LoraSettings) -> int:
    """Numbers in the adapters: rank·(in + out) for a linear layer, with the kernel's size for a convolution's input."""
    count = 0
    for name in lora_targets(unet, settings.targets):
        weight = unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        count += settings.rank * (weight[0].numel() + weight.shape[0])
    return count


def saved_bytes(module: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``call``, without the module's own parameters."""
    own = {_storage(parameter) for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
        size = sum(kept.values())
        del result
    return size


def _storage(tensor: Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
