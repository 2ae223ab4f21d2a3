"""What a distillation will need, found without loading a weight: parameters, memory by part, disk.

Sizes come from the model folder's headers; activations from a forward pass over fake tensors (shapes without numbers),
counting what autograd would keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CLIPConfig, CLIPModel

from tiue_cli.distill.clip import recomputes
from tiue_cli.distill.config import DistillConfig, LoraSettings
from tiue_cli.distill.networks import StudentGenerator, lora_targets, teacher_source
from tiue_cli.errors import ModelFolderError
from tiue_cli.model.autoencoder import ImageDecoder, latent_size
from tiue_cli.model.folder import ModelInfo, check_model_folder
from tiue_cli.model.hub import resolve_model, resolve_vae
from tiue_cli.model.pretrained import load_pretrained
from tiue_cli.model.student import choose_timesteps, refuse_student
from tiue_cli.model.weights import read_json

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
        fake = _FakeRun(config, info, timesteps, batch, half=half)
        clip = None if config.clip.weight == 0 else _FakeClip(config, info, config.batch_size, half=half)
    unet, lora, trained = fake.unet_parameters, fake.lora_parameters, fake.trained_parameters
    others = sum(info.component(name).parameters for name in ("text_encoder", "vae"))
    frozen = _HALF if half else _FLOAT32
    moments = 1 if config.optimizer.name == "adamw8bit" else _FLOAT32
    memory = {
        # An adapter's frozen weights are the teacher's, which are counted there.
        "student, weights and gradients": 2 * _FLOAT32 * trained,
        "student, Adam": _ADAM_MOMENTS * moments * trained,
        "student, running mean": 0 if config.ema is None else _FLOAT32 * trained,
        "teacher's UNet": frozen * unet,
        "LoRA, with gradients and Adam": (2 + _ADAM_MOMENTS) * _FLOAT32 * lora,
        "text encoder and autoencoder": _FLOAT32 * others,
        "weights in half precision, kept by autocast": _HALF * trained if half else 0,
        "activations": round(fake.activation_bytes * (frozen / _FLOAT32)),
    }
    if clip is not None:
        memory["CLIP loss, its networks"] = _FLOAT32 * clip.parameters
        memory["CLIP loss, activations"] = round(clip.activation_bytes * (frozen / _FLOAT32))
    weights = _FLOAT32 * (trained + lora + (0 if config.ema is None else trained))
    checkpoint = weights + _ADAM_MOMENTS * (moments * trained + _FLOAT32 * lora)
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


def _timesteps(config: DistillConfig, info: ModelInfo) -> tuple[int, ...]:
    settings, scheduler = config.student, read_json(info.folder("scheduler") / "scheduler_config.json")
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

    def __init__(
        self, config: DistillConfig, info: ModelInfo, timesteps: tuple[int, ...], batch: int, *, half: bool
    ) -> None:
        shape = _latent_shape(config, info)
        self.latent_numbers = shape[0] * shape[1] * shape[2]
        unet_config = read_json(info.folder("unet") / "config.json")
        noise, states = torch.zeros(batch, *shape), torch.zeros(batch, info.text_tokens, info.text_width)

        unet: Any = UNet2DConditionModel.from_config(unet_config)
        self.unet_parameters = _count(unet)
        again = 0
        if config.gradient_checkpointing:
            # In the backward pass one block's activations are there again, the decoder's for all timesteps at once.
            rows = (noise.repeat(len(timesteps), 1, 1, 1), 0, states.repeat(len(timesteps), 1, 1))
            again = largest_block_bytes(unet, lambda: unet(rows[0], rows[1], rows[2], return_dict=False)[0])
            unet.enable_gradient_checkpointing()
        student = StudentGenerator(unet, timesteps, decoder=config.student.decoder)
        self.lora_parameters = lora_parameter_count(unet, config.lora)
        adapter = config.student.adapter
        self.trained_parameters = self.unet_parameters if adapter is None else lora_parameter_count(unet, adapter)
        kept = saved_bytes(student, lambda: student(noise, states)) + again
        # The LoRA teacher's step follows the student's, whose activations are gone by then: the larger one counts.
        if not half:  # merged adapters, in float32, are not computed again; see ``ScoreModel.recompute``
            unet.disable_gradient_checkpointing()
        _add_adapters(unet, config.lora)
        lora = saved_bytes(unet, lambda: unet(noise, 0, states, return_dict=False)[0])
        self.activation_bytes = max(kept, lora + (again if half else 0))


def _add_adapters(unet: Any, settings: LoraSettings) -> None:
    """Adapters beside frozen layers, as peft puts them there; peft itself cannot handle tensors without numbers."""
    unet.requires_grad_(False)
    adapters = nn.ModuleList()
    for name in lora_targets(unet, settings.targets):
        layer: Any = unet.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            conv: Any = nn.Conv2d  # a layer's own numbers are tuples of unknown length to the type checker
            down: nn.Module = conv(
                layer.in_channels, settings.rank, layer.kernel_size, layer.stride, layer.padding, bias=False
            )
            up: nn.Module = nn.Conv2d(settings.rank, layer.out_channels, 1, bias=False)
        else:
            down = nn.Linear(layer.in_features, settings.rank, bias=False)
            up = nn.Linear(settings.rank, layer.out_features, bias=False)
        adapters += [down, up]
        layer.register_forward_hook(functools.partial(_beside, down, up))
    unet.adapters = adapters


def _beside(down: nn.Module, up: nn.Module, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    added: Tensor = up(down(inputs[0]))
    return output + added


class _FakeClip:
    """The CLIP loss without numbers. Made within a FakeTensorMode."""

    def __init__(self, config: DistillConfig, info: ModelInfo, batch: int, *, half: bool) -> None:
        clip_config = load_pretrained(
            CLIPConfig,
            config.clip.model,
            what=f"clip.model {config.clip.model}",
            hint="give a CLIPModel's folder or hub id, or set clip.weight=0",
            error=ModelFolderError,
        )
        clip: Any = CLIPModel(clip_config)
        vae = _fake_vae(info.path if config.clip.vae is None else resolve_vae(config.clip.vae))
        decoder, shape = ImageDecoder(vae), _latent_shape(config, info)
        for module in (clip, vae):
            module.requires_grad_(False)
        # The teacher's own autoencoder is counted with its text encoder.
        self.parameters = _count(clip) + (0 if config.clip.vae is None else _count(vae))
        at_once = 1 if recomputes(config, half=half) else batch
        latents = torch.zeros(at_once, *shape, requires_grad=True)
        side = int(clip_config.vision_config.image_size)
        images = torch.zeros(batch, 3, side, side, requires_grad=True)
        self.activation_bytes = saved_bytes(vae, lambda: decoder.decode_float(latents)) + saved_bytes(
            clip, lambda: clip.get_image_features(pixel_values=images).pooler_output
        )


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


def largest_block_bytes(unet: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps within the block that keeps most: those that checkpointing computes again at once."""
    own = {_storage(parameter) for parameter in unet.parameters()}
    kept: dict[int, int] = {}
    entered: dict[nn.Module, int] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def enter(block: nn.Module, _: Any) -> None:
        entered[block] = sum(kept.values())

    def leave(block: nn.Module, _: Any, __: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(kept.values()) - entered.pop(block))

    blocks = [module for module in unet.modules() if isinstance(module, (ResnetBlock2D, BasicTransformerBlock))]
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call()  # held, so that no storage's number is given to another one
        del result
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _storage(tensor: Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
