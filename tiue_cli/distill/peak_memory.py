"""The memory of a training step at its fullest moment, found over fake tensors: shapes and types, no numbers.

What is played is a step as ``Trainer`` makes it on a GPU: the student's pass, the teachers' guided passes beside it,
the backward pass in which gradients come as activations go, and after it the LoRA teacher's own step. Every storage is
counted from the operation that makes it to the moment nobody holds it, as an allocator would see it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tiue_cli.distill.config import DistillConfig, LoraSettings
from tiue_cli.distill.networks import StudentGenerator, lora_targets


class LiveMemory(TorchDispatchMode):
    """Within the block: bytes of storages that operations made and that are held; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # By their number: two results may be views of one storage.
        new = {id(storage): storage for storage in _storages(result) if not hasattr(storage, "_counted")}
        if new:  # asked first, because most calls are views, or ask for a device
            before = {id(storage) for storage in _storages((args, kwargs))}
            for number in new.keys() - before:
                self._count(new[number])
        return result

    def _count(self, storage: Any) -> None:
        storage._counted = True  # the wrapper lives as long as the storage: torch gives the same one each time
        size = int(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    @contextlib.contextmanager
    def peak_of_block(self) -> Iterator[Callable[[], int]]:
        """What the block adds at most to what is held before it; asked for after the block."""
        before, held, self.peak = self.peak, self.live, self.live
        found = [0]
        try:
            yield lambda: found[0]
        finally:
            found[0] = self.peak - held
            self.peak = max(before, self.peak)


def _storages(values: Any) -> list[Any]:
    """Of every tensor in an operation's arguments or results."""
    if isinstance(values, Tensor):
        return [values.untyped_storage()]
    if isinstance(values, dict):
        return _storages(list(values.values()))
    return [found for one in values for found in _storages(one)] if isinstance(values, list | tuple) else []


class NormsInFloat32(TorchFunctionMode):
    """CUDA's autocast runs norms in float32, and keeps their inputs so; the CPU's, which is played on, does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (functional.group_norm, functional.layer_norm):
            return func(*args, **kwargs)
        widened = [_in_float32(value) for value in args]
        return func(*widened, **{name: _in_float32(value) for name, value in kwargs.items()})


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights and optimiser: ``student`` through its step, ``forward`` of it when its forward pass is
    over, ``lora`` through the LoRA teacher's step."""

    student: int
    forward: int
    lora: int

    @property
    def peak(self) -> int:
        """Of a step: the student's gradients and activations are gone when the LoRA teacher's come."""
        return max(self.student, self.lora)


def step_memory(
    config: DistillConfig,
    unet: UNet2DConditionModel,
    frozen: UNet2DConditionModel,
    *,
    timesteps: tuple[int, ...],
    noise: Tensor,
    states: Tensor,
    half: torch.dtype | None,
) -> StepMemory:
    """Play one step over fake networks, within a FakeTensorMode.

    ``unet`` is the student's (float32), ``frozen`` the teachers' in the type that it is held in; ``noise`` (B, C, h, w)
    and ``states`` (B, L, D) of the student's batch; ``half`` the type of autocast.
    """
    student = StudentGenerator(unet, timesteps, decoder=config.student.decoder)
    frozen.requires_grad_(False)
    teacher = functools.partial(_predict, frozen)
    adapters = Adapters(frozen, config.lora, merged=half is None)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing(functools.partial(recomputed, half))
        if half is not None:  # merged adapters are not computed again; see ``ScoreModel.recompute``
            frozen.enable_gradient_checkpointing(functools.partial(recomputed, half))
    with _casting(half), LiveMemory() as memory:
        with memory.peak_of_block() as student_bytes:
            with autocast(half):
                x_0 = student(noise, states).float().sum(0)
            forward = memory.live
            rows = config.batch_size
            with torch.no_grad(), autocast(half):
                # One after the other, and neither leaves anything: the larger of the two is the fullest.
                times = 1 if config.vsd.guidance == config.vsd.lora_guidance == 1.0 else 2
                teacher(noise[:rows].repeat(times, 1, 1, 1), states[:rows].repeat(times, 1, 1))
            x_0.sum().backward()
            del x_0
        for parameter in unet.parameters():
            parameter.grad = None
        with memory.peak_of_block() as lora_bytes:
            with autocast(half), adapters.active():
                prediction = adapters.predict(noise[: config.batch_size], states[: config.batch_size]).float()
            (prediction**2).mean().backward()
            del prediction
    return StepMemory(student=student_bytes(), forward=forward, lora=lora_bytes())


def peak_bytes(call: Callable[[], None], *, half: torch.dtype | None) -> int:
    """The most that ``call`` holds at once of what it makes, within a FakeTensorMode."""
    with _casting(half), LiveMemory() as memory:
        call()
    return int(memory.peak)


@contextlib.contextmanager
def _casting(half: torch.dtype | None) -> Iterator[None]:
    with contextlib.nullcontext() if half is None else NormsInFloat32():
        yield


def autocast(half: torch.dtype | None) -> Any:
    """Mixed precision as ``accelerate`` switches it on."""
    return contextlib.nullcontext() if half is None else torch.autocast("cpu", half)


def _predict(unet: Any, x_t: Tensor, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    options = {"encoder_hidden_states": states, "return_dict": False}
    prediction: Tensor = torch.func.functional_call(unet, dict(weights or {}), (x_t, 0), options)[0]
    return prediction


def recomputed(half: torch.dtype | None, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call, keeping nothing for the backward pass, which calls again."""

    def within(*inner: Any) -> Tensor:
        with _casting(half):  # a backward pass leaves the modes around it
            return function(*inner)

    # The states of random numbers, which there are none of here, cannot be asked for within a FakeTensorMode.
    result: Tensor = checkpoint(within, *args, use_reentrant=False, preserve_rng_state=False)
    return result


class Adapters:
    """Adapters as ``ScoreModel`` has them, for a network without numbers, which peft itself cannot handle.

    ``merged``: their product is added to the weights in each call; else they run beside frozen layers, as peft's do.
    """

    def __init__(self, unet: UNet2DConditionModel, settings: LoraSettings, *, merged: bool) -> None:
        self._unet, self._merged = unet, merged
        self._pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for name in lora_targets(unet, settings.targets):
            self._pairs[name] = _adapter(unet.get_submodule(name), settings.rank)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the network has them."""
        hooks = []
        if not self._merged:
            for name, (down, up) in self._pairs.items():
                hook = functools.partial(_beside, down, up)
                hooks.append(self._unet.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            # Recomputing calls the layers again, with their adapters, after the block.
            if not self._unet.is_gradient_checkpointing:
                for one in hooks:
                    one.remove()

    def predict(self, x_t: Tensor, states: Tensor) -> Tensor:
        """The LoRA teacher's prediction (B, C, h, w)."""
        weights: dict[str, Tensor] = {}
        if self._merged:
            for name, (down, up) in self._pairs.items():
                base: Any = self._unet.get_submodule(name).weight
                product = up.weight.flatten(1) @ down.weight.flatten(1)  # type: ignore[operator]
                weights[f"{name}.weight"] = base + product.reshape(base.shape)
        return _predict(self._unet, x_t, states, weights)


def _adapter(layer: Any, rank: int) -> tuple[nn.Module, nn.Module]:
    if isinstance(layer, nn.Conv2d):
        conv: Any = nn.Conv2d  # a layer's own numbers are tuples of unknown length to the type checker
        down: nn.Module = conv(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
        return down, nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)


def _beside(down: nn.Module, up: nn.Module, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    added: Tensor = up(down(inputs[0]))
    return output + added.to(output.dtype)
