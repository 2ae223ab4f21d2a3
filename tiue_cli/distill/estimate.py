"""What a distillation will need, found without loading a weight: parameters, memory by part, disk.

Sizes come from the model folder's headers; what comes and goes in a step from playing one, see ``peak_memory``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from tiue_cli.distill.clip import recomputes
from tiue_cli.distill.config import DistillConfig, LoraSettings
from tiue_cli.distill.fake_quantization import FakeQuantization, every_layer, recomputing
from tiue_cli.distill.networks import StudentGenerator, lora_targets, teacher_source
from tiue_cli.distill.peak_memory import StepMemory, autocast, peak_bytes, recomputed, step_memory
from tiue_cli.distill.quantized_run import checked_student
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.autoencoder import ImageDecoder, latent_size
from tiue_cli.model.folder import ModelInfo, check_model_folder
from tiue_cli.model.hub import resolve_model, resolve_vae
from tiue_cli.model.pretrained import load_pretrained
from tiue_cli.model.schedule import RELEASED_SPACING, STEPS, decoder_timesteps
from tiue_cli.model.student import check_encoder_timestep, choose_timesteps, refuse_student
from tiue_cli.model.weights import read_json

_FLOAT32, _HALF = 4, 2
_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes by part, for one process; parameters by network.

    Memory as the allocator counts what is in use: it holds more, and a library's workspaces come on top.
    """

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
    if config.quantize.precision is not None:
        return _estimate_quantized(config, prompts=prompts, half=half)
    info = check_model_folder(resolve_model(teacher_source(config)))
    refuse_student(info)
    timesteps = _timesteps(config, info)
    batch = max(config.batch_size, (config.warm_start.batch_size or 0) if config.warm_start.steps else 0)
    if config.warm_start.keep_weight > 0:  # both go through the student at once
        batch = max(batch, config.batch_size + (config.warm_start.batch_size or config.batch_size))
    kind = torch.bfloat16 if half else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _FakeRun(config, info, timesteps, batch, half=kind)
        clip = None if config.clip.weight == 0 else _FakeClip(config, info, config.batch_size, half=kind)
    unet, lora, trained, step = fake.unet_parameters, fake.lora_parameters, fake.trained_parameters, fake.step
    others = sum(info.component(name).parameters for name in ("text_encoder", "vae"))
    frozen = _HALF if half else _FLOAT32
    optimizer, moments = _moments(config)
    # The running mean is moved by a copy of all weights, when nothing else of the step is left.
    moving = 0 if config.ema is None else _FLOAT32 * trained
    if trained == unet:
        working = max(step.peak, moving)
    else:  # frozen weights have no gradients, and are in half precision already: what is played has both
        working = max(step.forward - (_HALF * unet if half else 0) + _FLOAT32 * trained, step.lora, moving)
    memory = {
        # An adapter's frozen weights are the teacher's, which are counted there.
        "student": _FLOAT32 * trained,
        f"student, {optimizer}": moments * trained,
        "student, running mean": 0 if config.ema is None else _FLOAT32 * trained,
        "teacher's UNet": frozen * unet,
        "LoRA, with Adam": (1 + _ADAM_MOMENTS) * _FLOAT32 * lora,
        "text encoder and autoencoder": _FLOAT32 * others,
        "gradients and activations, at their most": working,
    }
    if clip is not None:
        memory["CLIP loss, its networks"] = _FLOAT32 * clip.parameters
        memory["CLIP loss, activations"] = max(0, step.forward + clip.activation_bytes - working)
    weights = _FLOAT32 * (trained + lora + (0 if config.ema is None else trained))
    checkpoint = weights + moments * trained + _ADAM_MOMENTS * _FLOAT32 * lora
    text = info.text_tokens * info.text_width * prompts * frozen if config.text_cache else 0
    pairs = config.warm_start.pairs if config.warm_start.needs_pairs else 0
    return Estimate(
        timesteps=timesteps,
        parameters={"student's UNet": trained, "LoRA": lora, "text encoder and autoencoder": others},
        memory_bytes={name: size for name, size in memory.items() if size},
        disk_bytes={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),  # the next is written before the oldest goes
            "student": _FLOAT32 * (unet + others if trained == unet else trained),
            "cached text states": text,
            "cached pairs": pairs * _FLOAT32 * fake.latent_numbers,
        },
        steps={
            "warm start": min(config.warm_start.steps, config.max_steps),
            "distillation": max(0, config.max_steps - config.warm_start.steps),
        },
    )


def _estimate_quantized(config: DistillConfig, *, prompts: int, half: bool) -> Estimate:
    """What quantisation-aware distillation needs: the student in training, and frozen in float32 what it was."""
    info = checked_student(config)
    kind = torch.bfloat16 if half else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet: Any = UNet2DConditionModel.from_config(read_json(info.path / "unet" / "config.json"))
        timesteps = _trained_timesteps(info)
        student = StudentGenerator(unet, timesteps, decoder=config.student.decoder)
        mode: Any = FakeQuantization(unet, every_layer(unet))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing(recomputing(lambda: mode))
        noise = torch.zeros(config.batch_size, *_latent_shape(config, info))
        states = torch.zeros(config.batch_size, info.text_tokens, info.text_width)

        def step() -> None:
            with mode, autocast(kind):
                predictions = student(noise, states).float()
            predictions.square().sum().backward()

        working = peak_bytes(step, half=kind)
    parameters = _count(unet)
    others = sum(info.component(name).parameters for name in ("text_encoder", "vae"))
    optimizer, moments = _moments(config)
    mean = 0 if config.ema is None else _FLOAT32 * parameters
    memory = {
        "student": _FLOAT32 * parameters,
        f"student, {optimizer}": moments * parameters,
        "student, running mean": mean,
        "student as it was": _FLOAT32 * parameters,
        "text encoder and autoencoder": _FLOAT32 * others,
        "gradients and activations, at their most": working,
    }
    checkpoint = (_FLOAT32 + moments) * parameters + mean
    text = info.text_tokens * info.text_width * prompts * (_HALF if half else _FLOAT32) if config.text_cache else 0
    return Estimate(
        timesteps=timesteps,
        parameters={"student's UNet": parameters, "text encoder and autoencoder": others},
        memory_bytes={name: size for name, size in memory.items() if size},
        disk_bytes={
            "checkpoints": checkpoint * (config.checkpoint.keep + 1),
            "student": _FLOAT32 * (parameters + others),
            "cached text states": text,
        },
        steps={"8-bit arithmetic": config.max_steps},
    )


def _trained_timesteps(info: ModelInfo) -> tuple[int, ...]:
    if info.manifest is not None:
        return info.manifest.decoder_timesteps
    scheduler = read_json(info.folder("scheduler") / "scheduler_config.json")
    return decoder_timesteps(scheduler, STEPS, spacing=RELEASED_SPACING)


def _timesteps(config: DistillConfig, info: ModelInfo) -> tuple[int, ...]:
    settings, scheduler = config.student, read_json(info.folder("scheduler") / "scheduler_config.json")
    chosen, _ = choose_timesteps(
        scheduler,
        steps=settings.steps,
        spacing=settings.spacing,
        timesteps=settings.timesteps,
        folder=info.path,
    )
    if settings.encoder_timestep is not None:
        check_encoder_timestep(scheduler, settings.encoder_timestep)
    return chosen


class _FakeRun:
    """A step without numbers. Made within a FakeTensorMode."""

    def __init__(
        self,
        config: DistillConfig,
        info: ModelInfo,
        timesteps: tuple[int, ...],
        batch: int,
        *,
        half: torch.dtype | None,
    ) -> None:
        shape = _latent_shape(config, info)
        self.latent_numbers = shape[0] * shape[1] * shape[2]
        unet_config = read_json(info.path / "unet" / "config.json")
        unet: Any = UNet2DConditionModel.from_config(unet_config)
        with _made_in(half):
            frozen: Any = UNet2DConditionModel.from_config(unet_config)
        self.unet_parameters = _count(unet)
        self.lora_parameters = lora_parameter_count(unet, config.lora)
        adapter = config.student.adapter
        self.trained_parameters = self.unet_parameters if adapter is None else lora_parameter_count(unet, adapter)
        self.step: StepMemory = step_memory(
            config,
            unet,
            frozen,
            timesteps=timesteps,
            noise=torch.zeros(batch, *shape),
            states=torch.zeros(batch, info.text_tokens, info.text_width),
            half=half,
        )


class _FakeClip:
    """The CLIP loss without numbers. Made within a FakeTensorMode."""

    def __init__(self, config: DistillConfig, info: ModelInfo, batch: int, *, half: torch.dtype | None) -> None:
        clip_config = load_pretrained(
            CLIPConfig,
            config.clip.model,
            what=f"clip.model {config.clip.model}",
            hint="give a CLIPModel's folder or hub id, or set clip.weight=0",
            error=ModelFolderError,
        )
        clip: Any = CLIPModel(clip_config)
        vae = _fake_vae(info.path if config.clip.vae is None else resolve_vae(config.clip.vae))
        decode = ImageDecoder(vae).decode_float
        for module in (clip, vae):
            module.requires_grad_(False)
        # The teacher's own autoencoder is counted with its text encoder.
        self.parameters = _count(clip) + (0 if config.clip.vae is None else _count(vae))
        latents = torch.zeros(batch, *_latent_shape(config, info), requires_grad=True)
        side = int(clip_config.vision_config.image_size)
        at_once = 1 if recomputes(config, half=half is not None) else batch

        def loss() -> Tensor:
            with autocast(half):
                if at_once == 1:
                    pieces = [recomputed(half, decode, one) for one in latents.split(1)]
                else:
                    pieces = [decode(latents)]
                seen = functional.interpolate(torch.cat(pieces), size=(side, side), mode="bilinear")
                features: Tensor = clip.get_image_features(pixel_values=seen).pooler_output
                return features.float().sum()

        self.activation_bytes = peak_bytes(lambda: loss().backward(), half=half)


@contextlib.contextmanager
def _made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block modules are made in ``dtype``: what has no numbers cannot be moved to another type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fake_vae(folder: Path) -> Any:
    path = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    values = read_json(path / "config.json")
    kind: Any = AutoencoderTiny if values.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    return kind.from_config(values)


def _latent_shape(config: DistillConfig, info: ModelInfo) -> tuple[int, int, int]:
    """(C, h, w)."""
    height, width = info.sample_size if config.size is None else latent_size(config.size, info.factor)
    return info.latent_channels, height, width


def lora_parameter_count(unet: nn.Module, settings: LoraSettings) -> int:
    """Numbers in the adapters: rank·(in + out) for a linear layer, with the kernel's size for a convolution's input."""
    count = 0
    for name in lora_targets(unet, settings.targets):
        weight = unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        count += settings.rank * (weight[0].numel() + weight.shape[0])
    return count


def _moments(config: DistillConfig) -> tuple[str, int]:
    """The optimiser's name, and the bytes that it keeps for a parameter."""
    if config.optimizer.name == "muon":  # the momentum; AdamW has two for the few that are no matrix
        return "Muon", _FLOAT32
    return "Adam", _ADAM_MOMENTS * (1 if config.optimizer.name == "adamw8bit" else _FLOAT32)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
