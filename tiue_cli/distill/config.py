"""Everything that can be set about a distillation, in one typed tree: the single home of every default.

Layers of values (a recipe, a YAML file, ``--set``, options) are merged and checked here; each value remembers where it
came from. No torch: ``tiue recipes`` and ``--dry-run`` read this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pydantic
import yaml
from pydantic import ConfigDict, Field

from tiue_cli.errors import UsageError
from tiue_cli.files.access import user_path
from tiue_cli.files.caches import user_cache
from tiue_cli.model.noise import MAX_SEED

if TYPE_CHECKING:
    from torch import Tensor

_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Rate = Annotated[float, Field(gt=0.0)]
_Weight = Annotated[float, Field(ge=0.0)]
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Decay = Literal["constant", "linear", "cosine"]


class _Section(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StudentSettings(_Section):
    """What the student is: its decoder timesteps, and where its weights start."""

    steps: _Positive = 4
    """Decoder timesteps K; 1 is the one-step student of SwiftBrush."""
    spacing: Literal["leading", "trailing"] | None = None
    """How the timesteps are spaced; null takes the teacher's scheduler config."""
    timesteps: tuple[_Count, ...] | None = None
    """An explicit list, highest first, instead of steps and spacing."""
    encoder_timestep: _Count | None = Field(default=None, exclude_if=lambda timestep: timestep is None)
    """The one that the UNet encoder is given; null is the first of the decoder's, as the TiUE authors have it."""
    init: str | None = None
    """A student folder to start from; null starts from the teacher."""
    # Left out of hashes where they say nothing: what a full student's recipe is called has not changed.
    trainable: Literal["full", "lora"] = Field(default="full", exclude_if=lambda what: what == "full")
    """All weights, or an adapter alone: far less memory, and a folder of megabytes that needs its teacher."""
    rank: _Positive | None = Field(default=None, exclude_if=lambda rank: rank is None)
    """Of the adapter; null is 32."""
    targets: Literal["attention-qv", "attention", "linear", "all"] | tuple[str, ...] | None = Field(
        default=None, exclude_if=lambda targets: targets is None
    )
    """The adapter's layers, as lora.targets says them; null is linear."""
    decoder: Literal["shared", "plain"] = "shared"
    """How the UNet decoder computes its K rows: sharing what the timesteps have in common, or a plain batch."""

    @pydantic.model_validator(mode="after")
    def _adapter(self) -> Self:
        if self.trainable == "full" and (self.rank is not None or self.targets is not None):
            raise ValueError("rank and targets are an adapter's: set trainable to lora")
        if self.trainable == "lora" and self.init is not None:
            raise ValueError("an adapter starts from the teacher: leave init out")
        return self

    @property
    def adapter(self) -> LoraSettings | None:
        """The student's own adapter, its alpha equal to its rank; None where all weights are trained."""
        if self.trainable == "full":
            return None
        rank = self.rank or 32
        return LoraSettings(rank=rank, alpha=float(rank), targets=self.targets or "linear")


class OptimizerSettings(_Section):
    """The student's optimiser in the distillation proper; the warm start has its own learning rate and decay."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon makes the updates of matrices orthogonal, at learning rates of AdamW's size; the rest is AdamW's."""
    learning_rate: _Rate = 2e-5
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    epsilon: _Rate = 1e-8
    weight_decay: _Weight = 0.0
    warmup_steps: _Count = 20
    """Steps over which the learning rate rises from 0, in each phase."""
    decay: Decay = "constant"
    """From the end of the warm start to max_steps."""
    max_grad_norm: _Rate | None = 1.0


class WarmStartSettings(_Section):
    """Regression onto the teacher's many-step solution from the same noise, before the distillation proper."""

    steps: _Count = 0
    """Optimiser steps of regression; 0 leaves it out."""
    pairs: _Positive = 2048
    """Pairs of noise and solution that are generated once, cached and gone through again and again."""
    teacher_steps: _Positive = 25
    solver: Literal["ddim", "unipc"] = "ddim"
    """unipc (second order, multistep) solves the same equation in half the steps."""
    guidance: float = Field(default=4.5, ge=1.0)
    learning_rate: _Rate = 1e-4
    decay: Decay = "linear"
    batch_size: _Positive | None = None
    """Pairs a micro-batch and process; null takes batch_size."""
    prefix_weight: _Weight = 0.0
    """Weight of the same regression on the solver's result after each of the first K-1 timesteps."""
    keep_weight: _Weight = 0.0
    """Weight of the regression that goes on through the distillation proper, a batch of pairs a step, as in DMD (Yin et
    al. 2023, arXiv 2311.18828): it holds on to the teacher's variety. 0 ends it with the warm start."""

    @property
    def needs_pairs(self) -> bool:
        """Whether any step asks for pairs."""
        return self.steps > 0 or self.keep_weight > 0


class VsdSettings(_Section):
    """Variational score distillation: the gradient is the teacher's score minus that of the student's own pictures."""

    weight: _Weight = 1.0
    guidance: float = Field(default=4.5, ge=1.0)
    """Classifier-free guidance of the teacher's prediction. The command line gives papercut's teacher its own."""
    lora_guidance: float = Field(default=1.0, ge=1.0)
    """The same of the LoRA teacher's. At 1 the student's own score is what it is, and half of the pass is saved."""
    guidance_timesteps: tuple[_Count, _Count] | None = Field(default=None, exclude_if=lambda ends: ends is None)
    """Lowest and highest timestep at which the teacher is guided; elsewhere its guidance is 1. Guidance costs variety,
    most of it at high noise (Kynkäänniemi et al. 2024, arXiv 2404.07724, for sampling). null guides at every one."""
    min_timestep: _Count = 20
    max_timestep: _Count = 980
    """Both ends of the uniform draw are possible."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_timestep > self.max_timestep:
            raise ValueError("min_timestep is greater than max_timestep")
        if self.guidance_timesteps is not None:
            low, high = self.guidance_timesteps
            if low > high:
                raise ValueError("guidance_timesteps holds a greater timestep before a lower one")
            if self.guidance == 1.0:
                raise ValueError("guidance_timesteps is for a guidance above 1")
        return self

    def guidance_at(self, timesteps: Tensor) -> float | Tensor:
        """The teacher's guidance at ``timesteps`` (B,): a number where it is the same at all, else (B, 1, 1, 1)."""
        if self.guidance_timesteps is None:
            return self.guidance
        low, high = self.guidance_timesteps
        inside = ((timesteps >= low) & (timesteps <= high))[:, None, None, None]
        return 1.0 + (self.guidance - 1.0) * inside


class LoraSettings(_Section):
    """The LoRA teacher: adapters over the frozen teacher that follow the student's distribution."""

    rank: _Positive = 16
    alpha: _Rate = 16.0
    targets: Literal["attention-qv", "attention", "linear", "all"] | tuple[str, ...] = "linear"
    """Which layers: to_q and to_v; all attention projections; all linear layers; convolutions too; or name endings."""
    learning_rate: _Rate = 1e-3
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    head_start: _Count = 0
    """First steps of the distillation proper in which the LoRA teacher alone learns: it begins as the unguided teacher,
    and until it knows the student's guided pictures its score pushes them further."""
    updates: _Positive = 1
    """Updates of the LoRA teacher for each of the student's."""
    loss: Literal["prediction", "alpha-noise"] = "prediction"
    """Squared error of the model's own output, or of sqrt(abar)·noise as the TiUE authors have it."""
    empty_share: _Share = 0.1
    """Share of rows with the empty prompt."""
    max_grad_norm: _Rate | None = 1.0


class KlSettings(_Section):
    """KL of each predicted noise tensor's mean and variance against N(0, 1)."""

    weight: _Weight = 0.1
    kind: Literal["sum", "mean"] = "mean"
    """Over the K·B tensors of a micro-batch. weight of sum = weight of mean / (K·B); the authors sum."""


class ClipSettings(_Section):
    """Clamped CLIP loss: relu(threshold - cosine of text and image), with a weight that falls to 0."""

    weight: _Weight = 0.0
    threshold: float = Field(default=0.35, ge=-1.0, le=1.0)
    steps: _Positive = 10_000
    """Optimiser steps of the distillation proper after which the weight is 0."""
    model: str = "openai/clip-vit-base-patch32"
    """Folder or hub id of a CLIPModel with its tokenizer."""
    vae: str | None = None
    """Folder or hub id of the autoencoder that decodes for it, a tiny one; null takes the teacher's."""


class CheckpointSettings(_Section):
    every: _Positive = 500
    keep: _Positive = 2


class ValidationSettings(_Section):
    """Grids of fixed prompts and seeds, the teacher's pictures beside the student's."""

    every: _Count = 500
    """0 leaves the grids out."""
    prompts: tuple[str, ...] = ()
    """Empty takes the first of the training prompts."""
    count: _Positive = 8
    """How many, where prompts is empty."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """The picture in row i starts from the noise of seed + i, as in tiue generate."""
    teacher_steps: _Positive = 25
    teacher_guidance: float = Field(default=4.5, ge=1.0)


class TrackingSettings(_Section):
    trackers: tuple[str, ...] | None = None
    """Names of Accelerate's trackers: tensorboard, wandb, …; null is TensorBoard where it is installed."""
    project: str = "tiue"
    every: _Positive = 10
    """Steps between two lines of log.jsonl and of the trackers."""


class QuantizeSettings(_Section):
    """Quantisation-aware distillation: a student goes on learning, in rounded arithmetic, from its own pass in fp32."""

    precision: Literal["int8"] | None = None
    """What it is made ready for: --quantize. teacher is then the student, which is its own."""
    calibration_images: _Positive = 128
    """Pictures of the first prompts that ranges are measured on before the first step, as in tiue export."""


class DistillConfig(_Section):
    """A distillation. ``max_steps`` counts the student's optimiser steps, those of the warm start included."""

    teacher: str
    """Folder, hub id or embedded name of the many-step model."""
    prompts: str
    """A .txt, .jsonl, .csv or .parquet file, datasets:NAME, or papercut: captions drawn from its grammar."""
    prompt_column: str | None = None
    """Column or field of the prompts; null finds prompt, caption or text."""
    max_prompts: _Positive | None = None
    """Only the first so many are read."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    max_steps: _Positive = 10_000
    batch_size: _Positive = 8
    """Images a micro-batch and process."""
    accumulation: _Positive = 1
    """Micro-batches an optimiser step."""
    size: tuple[_Positive, _Positive] | None = None
    """Height and width in pixels; null takes the teacher's."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: what accelerate launch was told, else bf16 on a GPU that has it and fp32 elsewhere."""
    gradient_checkpointing: bool = False
    compile: bool = False
    text_cache: bool = True
    """Text states of all prompts on disk, computed once; false encodes each batch anew."""
    cache: str | None = None
    """Folder of cached text states and pairs; null takes ~/.cache/tiue/distill, or that in XDG_CACHE_HOME."""
    max_bad_steps: _Positive = 10
    """Steps in a row without a finite gradient after which the training stops."""
    ema: _Share | None = None
    """Decay of the running mean of the student's weights; null keeps none."""
    student: StudentSettings = StudentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    warm_start: WarmStartSettings = WarmStartSettings()
    vsd: VsdSettings = VsdSettings()
    lora: LoraSettings = LoraSettings()
    kl: KlSettings = KlSettings()
    clip: ClipSettings = ClipSettings()
    # Left out of hashes where there is none, as in ``StudentSettings``.
    quantize: QuantizeSettings = Field(default=QuantizeSettings(), exclude_if=lambda what: what == QuantizeSettings())
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def cache_folder(self) -> Path:
        """Where text states and pairs are kept between runs."""
        if self.cache is not None:
            return user_path(self.cache, error=UsageError)
        return user_cache() / "distill"


_UNUSED_WHEN_QUANTIZING = ("student", "warm_start", "vsd", "lora", "kl", "clip")


def refuse_unused(config: DistillConfig) -> None:
    """Raise UsageError for settings that quantisation-aware distillation has no use for."""
    for section in _UNUSED_WHEN_QUANTIZING:
        value, default = getattr(config, section), DistillConfig.model_fields[section].default
        for name, before in default:
            if (found := getattr(value, name)) != before and (section, name) != ("student", "decoder"):
                raise UsageError(
                    f"{section}.{name} is {found!r}, and with --quantize the student learns from its own pass alone",
                    hint=f"leave {section}.{name} out",
                )
    if config.compile:
        raise UsageError("compile does not go with --quantize", hint="set compile=false")


FREE_ON_RESUME = ("checkpoint.", "validation.", "tracking.", "cache", "max_bad_steps")
"""Keys (or beginnings of keys) that may change when a run is resumed: they do not touch the weights."""


# --- layers --------------------------------------------------------------------------------------------------------


def to_yaml(config: DistillConfig) -> str:
    """The whole config as YAML, in the order of the types; ``resolve_config`` of it gives the same config."""
    result: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and the values that are no mappings; an empty mapping sets nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- comparing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One key that two configs do not agree on."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} → {self.after!r}"


def differences(before: DistillConfig, after: DistillConfig) -> list[Difference]:
    """All keys in which the two differ, in the order of the types."""
    old, new = dict(flatten(before.model_dump(mode="json"))), dict(flatten(after.model_dump(mode="json")))
    return [Difference(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]


def forbidden_on_resume(before: DistillConfig, after: DistillConfig) -> list[Difference]:
    """The differences that make it another run. A longer one is the same where nothing decays to its end."""
    constant = after.optimizer.decay == "constant"
    return [
        difference
        for difference in differences(before, after)
        if not difference.key.startswith(FREE_ON_RESUME) and not (difference.key == "max_steps" and constant)
    ]


def recipe_sha256(config: DistillConfig, prompts_sha256: str) -> str:
    """SHA-256 of all that decides the weights: the config without its free keys, and the prompts' own hash."""
    values = {
        key: value
        for key, value in flatten(config.model_dump(mode="json"))
        if not key.startswith((*FREE_ON_RESUME, "prompts"))
    }
    text = json.dumps({**values, "prompts_sha256": prompts_sha256}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
