"""What ``tiue export`` can be asked; the one place of its defaults. Light: the command line reads it for ``--help``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from tiue_cli.base.text import excerpt
from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.export.trt.profiles import load_profiles
from tiue_cli.files.access import exists, user_path
from tiue_cli.files.atomic import check_replaceable, check_writable
from tiue_cli.files.engines import Range
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    GRAPHS,
    QUANTIZED,
    GraphName,
    Precision,
    Size,
    is_export_folder,
)
from tiue_cli.files.students import STUDENT_MANIFEST
from tiue_cli.model.folder import ModelInfo, check_model_folder, check_vae_folder
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_TEACHER, resolve_model, resolve_vae
from tiue_cli.model.lora.files import lora_uses

ENGINES: Final = Path("engines")
OPSETS: Final = range(18, 24)
NO_REFIT_IN_8_BITS: Final = "--refit is for fp16 and fp32: 8-bit weights have scales of their own"
FIRST_FLOAT8_OPSET: Final = 19
"""QuantizeLinear and DequantizeLinear have float8 from here on."""

Part = Literal["text", "unet", "vae"]
_GRAPHS_OF_PART: Final[Mapping[Part, tuple[GraphName, ...]]] = {
    "text": ("text_encoder",),
    "unet": ("unet_encoder", "unet_decoder"),
    "vae": ("vae_decoder",),
}
QUANTIZED_PARTS: Final[Mapping[Precision, tuple[Part, ...]]] = {"int8": ("unet", "vae"), "fp8": ("unet",)}
"""What 8 bits are for where nobody says: of an autoencoder, float8's three digits would be seen."""


def parse_part(text: str) -> Part:
    """``text``, ``unet`` or ``vae`` as ``--quantize`` is given it. Raises UsageError."""
    for part in _GRAPHS_OF_PART:
        if text == part:
            return part
    raise UsageError(f"--quantize {excerpt(text)} is no part of a model", hint=f"choose {', '.join(_GRAPHS_OF_PART)}")


@dataclass(frozen=True)
class ExportConfig:
    """What ``tiue export`` can be asked, with the defaults of its options.

    ``out`` None is ``engines/NAME``. ``sizes`` in pixels (H, W) fix height and width, each with graphs of its own;
    empty leaves them free, or with ``fixed`` takes the student's own size. ``vae`` replaces the student's autoencoder,
    ``loras`` (``SOURCE[:WEIGHT]`` each) are added to its weights first.
    In 8 bits (``int8``, ``fp8``) ``calibration`` is a source of prompts as ``tiue distill --prompts`` takes it (None:
    papercut's own, for its students), ``calibration_images`` are drawn of them, and ``quantized`` are the parts it is
    for; empty: what the precision is usually for.
    """

    student: str
    out: Path | None = None
    precision: Precision = "fp32"
    opset: int = 21
    sizes: tuple[Size, ...] = ()
    fixed: bool = False
    vae: str | None = None
    loras: tuple[str, ...] = ()
    check: bool = True
    overwrite: bool = False
    calibration: str | None = None
    calibration_images: int = 128
    quantized: tuple[Part, ...] = ()

    @property
    def quantized_graphs(self) -> tuple[GraphName, ...]:
        """The graphs that 8 bits are for, in their order."""
        parts = self.quantized or QUANTIZED_PARTS.get(self.precision, ())
        wanted = {graph for part in parts for graph in _GRAPHS_OF_PART[part]}
        return tuple(name for name in GRAPHS if name in wanted)

    @property
    def folder(self) -> Path:
        """Where the export goes: ``out``, or ``engines/`` and the student folder's name or the hub id's last part."""
        if self.out is not None:
            return self.out
        path = user_path(self.student, error=ModelFolderError)
        local = exists(path, error=ModelFolderError)
        return ENGINES / (path.resolve().name if local else self.student.rpartition("/")[2])

    def validate(self) -> None:
        """Refuse what cannot be, before anything heavy is loaded. Raises UsageError."""
        if self.opset not in OPSETS:
            raise UsageError(
                f"opset {self.opset} is outside {OPSETS[0]}–{OPSETS[-1]}", hint="leave --opset out for the usual one"
            )
        for option, given in (("--calibration", self.calibration is not None), ("--quantize", bool(self.quantized))):
            if given and self.precision not in QUANTIZED:
                raise UsageError(f"{option} is for 8-bit exports", hint="add --precision int8 or fp8, or leave it out")
        if self.precision == "fp8" and self.opset < FIRST_FLOAT8_OPSET:
            raise UsageError(
                f"opset {self.opset} has no float8, and --precision says fp8",
                hint=f"leave --opset out, or give {FIRST_FLOAT8_OPSET} or more",
            )
        if self.calibration_images < 1:
            raise UsageError("calibration needs at least one image", hint=f"e.g. {ExportConfig.calibration_images}")
        if self.calibration == "-":
            raise UsageError("calibration prompts are read from a file, not from stdin", hint="--calibration FILE")
        if len(set(self.sizes)) != len(self.sizes):
            raise UsageError("the same size was given twice", hint="name each size once")
        if is_export_folder(user_path(self.student, error=ModelFolderError)):
            raise UsageError(
                f"{self.student} is an export already", hint="give the student folder; tiue inspect says which it was"
            )


def calibration_source(config: ExportConfig, info: ModelInfo) -> str:
    """Where the prompts of an 8-bit export come from. Raises UsageError where nobody has said."""
    if config.calibration is not None:
        return config.calibration
    if info.manifest is not None and info.manifest.teacher == EMBEDDED_TEACHER:
        return EMBEDDED
    raise UsageError(
        "an 8-bit export is calibrated with pictures of prompts, and none were given",
        hint="give some hundred of the kind that will be drawn: --calibration captions.txt",
    )


def checked_student(config: ExportConfig) -> ModelInfo:
    """The student's folder, if it is one and can be exported to where it is to go; from headers alone, nothing loaded.

    Raises UsageError, OutputError, AdapterError, and what ``check_model_folder`` raises.
    """
    config.validate()
    with contextlib.suppress(FileNotFoundError):  # a working folder that is gone is said when it is written to
        check_replaceable(config.folder.resolve(), overwrite=config.overwrite, marker=EXPORT_MANIFEST)
    check_writable(config.folder.parent)
    info = check_model_folder(resolve_model(config.student))
    if info.kind == "teacher":
        raise ModelFolderError(
            f"{config.student} is a many-step teacher (it has no {STUDENT_MANIFEST}), and only students are exported",
            hint=f"distil one first: tiue distill --teacher {config.student}",
        )
    if config.vae is not None:
        check_vae_folder(resolve_vae(config.vae))
    lora_uses(config.loras)
    if config.precision in QUANTIZED:
        from tiue_cli.distill.data.prompts import read_training_prompts

        read_training_prompts(calibration_source(config, info), limit=config.calibration_images)
    return info


@dataclass(frozen=True)
class EngineRequest:
    """What ``tiue export --trt`` can be asked beyond the export itself; see ``EngineConfig``."""

    profile: str | None = None
    batches: tuple[Range, ...] = ()
    refit: bool = False

    def fit(self, config: ExportConfig, *, precision: Precision | None) -> ExportConfig:
        """``config`` as an engine wants it where the user does not say otherwise: in fp16, with fixed sizes.

        A profile knows both. ``precision`` is what the user says. Raises UsageError, ProfileError.
        """
        if self.profile is not None and self.batches:
            raise UsageError("--profile and --batch were both given", hint="a profile names its batches: leave one out")
        if self.refit and config.loras:
            raise UsageError(
                "--refit is for LoRAs that come and go, and --lora adds one for good", hint="leave one of them out"
            )
        if self.refit and precision in QUANTIZED:
            raise UsageError(NO_REFIT_IN_8_BITS, hint="export in fp16, or add the LoRA first: --lora FILE")
        profiles = None if self.profile is None else load_profiles(self.profile)
        known = "fp16" if profiles is None or profiles.precision is None else profiles.precision
        sizes = config.sizes or (() if profiles is None else profiles.sizes)
        # A profile with a range of sizes needs graphs that take them.
        fixed = not sizes and profiles is None
        return replace(config, precision=precision or known, sizes=sizes, fixed=fixed)


@dataclass(frozen=True)
class EngineConfig:
    """An engine to be built from the export folder ``export``.

    ``profile`` names a file of profiles and ``batches`` are ranges of images; only one of them may be given, and
    neither means ``profiles.DEFAULT_BATCHES`` at the export's sizes. ``rebuild`` builds even where a fitting engine
    lies. With ``refit`` the weights that a LoRA changes can be exchanged in the engine without building it again.
    """

    export: Path
    profile: str | None = None
    batches: tuple[Range, ...] = ()
    check: bool = True
    rebuild: bool = False
    refit: bool = False
