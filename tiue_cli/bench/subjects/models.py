"""The models of a bench, loaded once each: several subjects run on the same weights.

A many-step model stands for its own one-pass student where none is given: untrained, so its pictures mean nothing,
but as fast as a trained one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import nn

from tiue_cli.backends.torch_prepared import FastModel, FastOptions
from tiue_cli.bench.subjects.random_weights import random_components
from tiue_cli.model.autoencoder import ImageDecoder
from tiue_cli.model.components import Components, load_components
from tiue_cli.model.fast.layers import NotFusable
from tiue_cli.model.hub import EMBEDDED_GUIDANCE, EMBEDDED_NAMES, EMBEDDED_STUDENT, TEACHER_GUIDANCE
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.schedule import RELEASED_SPACING, LinearCombine, combine_for_run, ddim_config
from tiue_cli.model.student import StudentModel, assumed_manifest
from tiue_cli.model.teacher import Teacher

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """The parts of one model on the device, and how it can be run. ``sha256`` None: random weights, not on a disk."""

    name: str
    source: str
    components: Components
    sha256: str | None
    load_s: float
    random_weights: bool = False
    _fast: dict[FastOptions, FastModel | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_student(self) -> bool:
        """Whether it was made for one pass."""
        return self.components.info.kind == "student"

    @property
    def weights_bytes(self) -> int:
        """Of all parameters, as they lie in memory."""
        parts = self.components
        return sum(parameter_bytes(part) for part in (parts.text_encoder, parts.unet, parts.vae))

    @property
    def teacher(self) -> Teacher:
        """The model as a many-step sampler, over the same weights."""
        return Teacher(self.components)

    @property
    def student(self) -> StudentModel:
        """The model as a one-pass student, over the same weights; untrained where it is none."""
        parts, manifest = self.components, self.components.info.manifest
        if manifest is None:
            own = str(ddim_config(parts.scheduler_config)["timestep_spacing"])
            spacing = RELEASED_SPACING if self.is_student else own
            manifest = assumed_manifest(parts, spacing=spacing, teacher=self.name)
        return StudentModel(
            tokenizer=parts.tokenizer,
            text_encoder=parts.text_encoder,
            unet=parts.unet,
            vae=parts.vae,
            scheduler_config=parts.scheduler_config,
            manifest=manifest,
            source=self.source,
        )

    def fast(self, options: FastOptions) -> FastModel | None:
        """The networks as ``tiue generate`` prepares them, made once; None for those that it runs plainly.

        The model's own stay as they are: its plain passes run through them.
        """
        if options not in self._fast:
            parts = self.components
            try:
                self._fast[options] = FastModel(
                    text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae, options=options
                )
            except NotFusable:
                self._fast[options] = None
        return self._fast[options]

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) that the model was made for, with the autoencoder in use."""
        factor = ImageDecoder(self.components.vae).factor
        height, width = self.components.info.sample_size
        return height * factor, width * factor

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) for images of ``size`` (H, W) pixels. Raises UsageError."""
        decoder = ImageDecoder(self.components.vae)
        return (decoder.latent_channels, *decoder.latent_size(size))

    @property
    def steps(self) -> tuple[int, ...]:
        """Every K of the student; an explicit list of timesteps has no rule for fewer, so it runs whole."""
        manifest = self.student.manifest
        own = len(manifest.decoder_timesteps)
        return (own,) if manifest.spacing == "explicit" else tuple(range(1, own + 1))

    def combine(self, steps: int) -> LinearCombine:
        """The weighted sum of the student at ``steps`` decoder timesteps. Raises UsageError."""
        return combine_for(self.student, steps)

    def guidance(self, asked: float | None) -> float:
        """Of the model as a teacher: what was asked for, else what ``tiue generate`` takes."""
        if asked is not None:
            return asked
        return EMBEDDED_GUIDANCE if self.source in EMBEDDED_NAMES else TEACHER_GUIDANCE


def load_model(name: str, source: str, *, device: str, precision: str, vae: str | None = None) -> LoadedModel:
    """Load a folder, embedded name or hub id. Raises what ``load_components`` raises."""
    started = time.perf_counter()
    components = load_components(source, device=device, dtype=DTYPES[precision], vae=vae)
    _touch((components.text_encoder, components.unet, components.vae))
    load_s = time.perf_counter() - started
    return LoadedModel(name, source, components, model_sha256(components.info.path), load_s)


def random_model(shape: str, *, device: str, precision: str, seed: int, vae: str | None = None) -> LoadedModel:
    """Build ``shape`` with random weights; it is its own teacher and student."""
    started = time.perf_counter()
    components = random_components(shape, device=device, dtype=DTYPES[precision], seed=seed, vae=vae)
    return LoadedModel(shape, shape, components, sha256=None, load_s=time.perf_counter() - started, random_weights=True)


def named(source: str, taken: Iterable[str]) -> str:
    """A short name for a model, unlike those that are ``taken``: the last part of its path or hub id."""
    path = Path(source).expanduser()
    base = path.resolve().name if path.exists() else source.rpartition("/")[2]
    if base in ("student", "teacher") and path.exists() and path.resolve().parent.name:
        # runs/sd15/student: the run's name says more.
        base = f"{path.resolve().parent.name}-{base}"
    if source == EMBEDDED_STUDENT:
        base = "papercut"
    used, name, number = set(taken), base, 1
    while name in used:
        number += 1
        name = f"{base}-{number}"
    return name


def combine_for(student: StudentModel, steps: int) -> LinearCombine:
    """The weighted sum of a run with ``steps`` decoder timesteps. Raises UsageError."""
    manifest = student.manifest
    return combine_for_run(student.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _touch(modules: Iterable[nn.Module]) -> None:
    """Read every weight once: a file that is mapped into memory is read when it is used, and would count as latency."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.sum()
