"""The networks of a distillation: the student as one module, and two teachers over one frozen UNet."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tiue_cli.distill.config import DistillConfig, LoraSettings
from tiue_cli.distill.data.order import Stream, generator
from tiue_cli.distill.losses import guided
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_TEACHER
from tiue_cli.model.schedule import LinearCombine
from tiue_cli.model.shared import SharedUNetDecoder, merge_upsamplers
from tiue_cli.model.student import StudentModel, load_student, student_from_teacher
from tiue_cli.model.unet import UNetDecoder, UNetEncoder

_ENDINGS = {
    "attention-qv": ("to_q", "to_v"),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
}


class StudentGenerator(nn.Module):
    """The student's one pass: noise and text states in, predictions at every decoder timestep out."""

    timesteps: Tensor
    encoder_timestep: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        timesteps: Sequence[int],
        *,
        encoder_timestep: int | None = None,
        decoder: str = "shared",
        merged_upsampler: bool = False,
    ) -> None:
        super().__init__()
        self.unet_encoder = UNetEncoder(unet)
        shared = decoder == "shared"
        self.unet_decoder = SharedUNetDecoder(unet, merged_upsampler=merged_upsampler) if shared else UNetDecoder(unet)
        first = timesteps[0] if encoder_timestep is None else encoder_timestep
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.long), persistent=False)
        self.register_buffer("encoder_timestep", torch.tensor([first], dtype=torch.long), persistent=False)

    def forward(self, noise: Tensor, text_states: Tensor) -> Tensor:
        """Predictions (K, B, C, h, w) from noise (B, C, h, w) and text states (B, L, D)."""
        features = self.unet_encoder(noise, text_states, self.encoder_timestep)
        predictions: Tensor = self.unet_decoder(features, self.timesteps, text_states)
        return predictions


class ScoreModel(nn.Module):
    """The frozen teacher and, by adapters over the same weights, the LoRA teacher.

    Called as a module it is the LoRA teacher; within ``adapters_off`` it is the teacher. Only adapters can be trained.
    ``merged`` adds the adapters' product to the weights anew in each call instead of running it beside each layer: the
    same function and the same gradients, and faster where the rank is near the width. It needs weights in float32, as
    half precision would round small changes away; None chooses it there. ``merged_upsampler`` computes the UNet's
    upsamplers as the shared decoder can, which is faster on a CPU and not measured elsewhere; None chooses it there.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        settings: LoraSettings,
        *,
        seed: int,
        merged: bool | None = None,
        merged_upsampler: bool | None = None,
    ) -> None:
        super().__init__()
        if merged_upsampler or (merged_upsampler is None and unet.device.type == "cpu"):
            merge_upsamplers(unet)
        is_merged = unet.dtype == torch.float32 if merged is None else merged
        self._is_teacher = False
        unet.requires_grad_(False)
        adapter = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float works, and the ratio is what counts
            target_modules=lora_targets(unet, settings.targets),
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(seed, Stream.LORA_WEIGHTS).integers(2**31)))
            unet.add_adapter(adapter)
        cast_training_params(unet, torch.float32)
        self.unet = unet
        self._merged = MergedAdapters(unet, scale=settings.alpha / settings.rank) if is_merged else None

    def forward(self, x_t: Tensor, timesteps: Tensor, text_states: Tensor) -> Tensor:
        """Prediction (B, C, h, w) at x_t (B, C, h, w), timesteps (B,), text states (B, L, D)."""
        weights = {} if self._merged is None or self._is_teacher else self._merged.weights()
        inputs, options = (x_t, timesteps), {"encoder_hidden_states": text_states, "return_dict": False}
        prediction: Tensor = torch.func.functional_call(self.unet, weights, inputs, options)[0]
        return prediction

    def recompute(self) -> None:
        """Keep no activations of the blocks for the backward pass, but compute them again in it.

        Not where adapters are merged: their weights are in the network during a call alone, and recomputing comes
        after it. That is float32, which has no need on a GPU.
        """
        if self._merged is None:
            self.unet.enable_gradient_checkpointing()

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Within the block the module is the frozen teacher. No gradients may be taken in it."""
        self._is_teacher = True
        self._enable(False)
        try:
            yield
        finally:
            self._is_teacher = False
            self._enable(True)

    def _enable(self, wish: bool) -> None:
        for layer in self.unet.modules():
            if isinstance(layer, BaseTunerLayer):  # merged ones are out of the network
                layer.enable_adapters(wish)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in the UNet's order."""
        if self._merged is not None:
            return self._merged.named()
        return {name: value for name, value in self.unet.named_parameters() if ".lora_" in name}


def lora_targets(unet: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the layers that get adapters. UsageError where nothing matches."""
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if targets == "all" else (nn.Linear,)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    if targets in ("linear", "all"):
        return [name for name, module in layers.items() if isinstance(module, kinds)]
    endings = _ENDINGS[targets] if isinstance(targets, str) else tuple(targets)
    unused = [ending for ending in endings if not any(_ends(name, ending) for name in layers)]
    if unused:
        raise UsageError(
            f"lora.targets: no layer of the teacher's UNet is named {unused[0]}",
            hint="e.g. linear, attention, or [to_q, to_k, to_v, to_out.0]",
        )
    return [name for name in layers if any(_ends(name, ending) for ending in endings)]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


@torch.no_grad()
def guided_prediction(
    model: nn.Module,
    x_t: Tensor,
    timesteps: Tensor,
    *,
    text_states: Tensor,
    empty_states: Tensor,
    guidance: float | Tensor,
) -> Tensor:
    """A guided prediction (B, C, h, w) in float32: both halves in one batch, one half where guidance is 1.

    ``x_t`` (B, C, h, w), ``timesteps`` (B,), ``text_states`` (B, L, D), ``empty_states`` (1, L, D), ``guidance`` a
    number or (B, 1, 1, 1).
    """
    if isinstance(guidance, float) and guidance == 1.0:
        prediction: Tensor = model(x_t, timesteps, text_states)
        return prediction.float()
    both = model(
        torch.cat([x_t, x_t]),
        torch.cat([timesteps, timesteps]),
        torch.cat([text_states, empty_states.expand_as(text_states)]),
    ).float()
    conditional, unconditional = both.chunk(2)
    return guided(conditional, unconditional, guidance)


class MergedAdapters(nn.Module):
    """W + scale·B·A of every adapted layer, with the gradients of A and B.

    Takes the adapters that peft has put into a network out of it again: the network is then what it was, and calls none
    of peft's code. Linear layers of one shape are computed together, as there are many and they are small.
    """

    def __init__(self, network: nn.Module, *, scale: float) -> None:
        super().__init__()
        self.scale = scale
        adapters = {name: value for name, value in network.named_parameters() if ".lora_" in name}
        self._names = list(adapters)
        self._values = nn.ParameterList(adapters.values())
        shapes: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                base: Any = layer.get_base_layer()
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, base)
                # A convolution is alone.
                shapes[tuple(base.weight.shape) if isinstance(base, nn.Linear) else name].append((name, base))
        # No buffers: several processes would send them to each other in every step.
        self._groups: list[tuple[tuple[str, ...], Tensor]] = []
        for group in shapes.values():
            weights = torch.stack([base.weight.detach() for _, base in group])
            self._groups.append((tuple(name for name, _ in group), weights))
            for (_, base), weight in zip(group, weights, strict=True):
                base.weight = nn.Parameter(weight, requires_grad=False)  # a view: it is not held twice

    def named(self) -> dict[str, nn.Parameter]:
        """The adapters under the names that peft gave them, in the network's order."""
        return dict(zip(self._names, self._values, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """The sum of every adapted layer, by the name of its weight."""
        adapters = self.named()
        result: dict[str, Tensor] = {}
        for names, base in self._groups:
            a, b = (
                torch.stack([adapters[f"{name}.lora_{side}.default.weight"].flatten(1) for name in names])
                for side in ("A", "B")
            )
            if base.dim() == 3:
                sums = torch.baddbmm(base, b, a, alpha=self.scale)
            else:
                sums = base.add(torch.bmm(b, a).reshape(base.shape), alpha=self.scale)
            result |= {f"{name}.weight": value for name, value in zip(names, sums.unbind(), strict=True)}
        return result


def teacher_source(config: DistillConfig) -> str:
    """What to load as the teacher; the embedded model's plain name means its student elsewhere."""
    return EMBEDDED_TEACHER if config.teacher == EMBEDDED else config.teacher


def load_untrained(config: DistillConfig) -> StudentModel:
    """The teacher's parts with the manifest of the student to be, on the CPU in float32. Raises TiueError."""
    settings = config.student
    return student_from_teacher(
        teacher_source(config),
        steps=settings.steps,
        spacing=settings.spacing,
        timesteps=settings.timesteps,
        encoder_timestep=settings.encoder_timestep,
    )


def load_initial_weights(student: StudentModel, source: str) -> None:
    """Put the UNet weights of another student into ``student``. ModelFolderError where they are of another kind."""
    other = load_student(source)
    mine, theirs = student.manifest.prediction_type, other.manifest.prediction_type
    if mine != theirs:
        raise ModelFolderError(
            f"student.init {source} predicts {theirs}, and the teacher {mine}",
            hint="start from a student of this teacher, or leave student.init out",
        )
    weights = other.unet.state_dict()
    wanted = {name: value.shape for name, value in student.unet.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != wanted:
        raise ModelFolderError(
            f"student.init {source} has another UNet than the teacher",
            hint="start from a student of this teacher, or leave student.init out",
        )
    student.unet.load_state_dict(weights)


def prefixes_of(scheduler_config: Mapping[str, Any], timesteps: Sequence[int]) -> tuple[LinearCombine, ...]:
    """The weighted sums over the first 1 … K-1 of the decoder timesteps."""
    return tuple(
        LinearCombine.from_scheduler_config(scheduler_config, timesteps[:count]) for count in range(1, len(timesteps))
    )
