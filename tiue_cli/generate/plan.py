"""What ``tiue generate`` is asked, worked out before anything heavy is loaded: which images, where, and what is there.

GenerateConfig ─ open_target ─▶ ModelTarget ─ plan_images(rows) ─▶ Plan
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiue_cli.errors import OutputError, PromptError, TiueError, UsageError
from tiue_cli.files.atomic import output_error
from tiue_cli.files.hashes import fingerprint
from tiue_cli.files.png import GridRecord, ImageRecord, ImageSpec, Record, read_record
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.generate.target import ExportInfo, backend_for, check_export_options, find_export
from tiue_cli.model.folder import ModelInfo, check_model_folder, check_vae_folder, read_json
from tiue_cli.model.hub import EMBEDDED, EMBEDDED_GUIDANCE, EMBEDDED_TEACHER, resolve_model, resolve_vae
from tiue_cli.model.noise import check_seed

BackendName = Literal["auto", "torch", "onnx", "trt"]
DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "fp32", "fp16", "bf16"]
ProviderName = Literal["auto", "cuda", "tensorrt", "cpu"]

TEACHER_STEPS = 25
TEACHER_GUIDANCE = 7.5
RELEASED_STUDENT_STEPS = 4
"""Decoder timesteps of a student that was released without a manifest."""

RANDOM_SEEDS = 2**32
"""Seeds that are drawn stay below this: short enough to be typed again."""
SLUG_CHARS = 60
_OTHER_IMAGES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
SLUG_BYTES = 150


@dataclass(frozen=True)
class GenerateConfig:
    """What ``tiue generate`` can be asked, with the defaults of its options.

    None means: the model's own (``size`` in pixels (H, W), ``steps``, ``teacher_steps``, ``guidance``, ``vae``), one
    that fits (``batch``), or a random one (``seed``). ``out`` is a folder, or a file where it ends in ``.png``.
    """

    model: str = EMBEDDED
    vae: str | None = None
    steps: int | None = None
    teacher_steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    images: int = 1
    size: tuple[int, int] | None = None
    batch: int | None = None
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    provider: ProviderName = "auto"
    out: Path = Path("images")
    grid: bool = False
    metadata: bool = True
    overwrite: bool = False


# --- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTarget:
    """The model that a session uses, checked and not loaded."""

    source: str
    info: ModelInfo | ExportInfo
    model_id: str
    backend: str
    """``torch``, ``onnx`` or ``trt``."""
    vae: str | None
    vae_folder: Path | None
    vae_id: str | None
    provider: str = "auto"
    """Of ONNX Runtime."""

    @property
    def origin(self) -> str:
        """What the model is called where it comes from: an export's student, else ``source``."""
        return self.info.manifest.student.source if isinstance(self.info, ExportInfo) else self.source

    def steps(self, config: GenerateConfig, row: PromptRow | None = None) -> int:
        """Decoder timesteps of a student (checked against its training), or sampler steps of a teacher."""
        if self.info.kind == "teacher":
            return TEACHER_STEPS if config.teacher_steps is None else config.teacher_steps
        wanted = config.steps if row is None or row.steps is None else row.steps
        return len(student_timesteps(self.info, wanted))

    def guidance(self, config: GenerateConfig) -> float | None:
        """The guidance of a teacher; None for a student, which has none."""
        if self.info.kind == "student":
            return None
        if config.guidance is not None:
            return config.guidance
        return EMBEDDED_GUIDANCE if self.source == EMBEDDED_TEACHER else TEACHER_GUIDANCE


def open_target(config: GenerateConfig) -> ModelTarget:
    """Find and check the model and autoencoder of ``config``; raises what ``model.folder`` raises, and UsageError."""
    export = find_export(config.model)
    backend = backend_for(export, config.model, backend=config.backend)
    if export is not None:
        return _export_target(config, export, backend=backend)
    if config.provider != "auto":
        raise UsageError("--provider is for exported students", hint="use --device for a model folder")
    folder = resolve_model(config.model)
    info = check_model_folder(folder)
    _refuse_other_kinds_options(config, info)
    vae_folder = None if config.vae is None else check_vae_folder(resolve_vae(config.vae))
    return ModelTarget(
        # By its own name, so that the records hold when this version's stand-in has made way for a student.
        source=EMBEDDED_TEACHER if config.model == EMBEDDED and info.kind == "teacher" else config.model,
        info=info,
        model_id=fingerprint(folder),
        backend=backend,
        vae=config.vae,
        vae_folder=vae_folder,
        vae_id=None if vae_folder is None else fingerprint(vae_folder),
    )


def _export_target(config: GenerateConfig, info: ExportInfo, *, backend: str) -> ModelTarget:
    _refuse_other_kinds_options(config, info)
    provider = check_export_options(
        info,
        backend=backend,
        vae=config.vae,
        dtype=config.dtype,
        device=config.device,
        provider=config.provider,
    )
    return ModelTarget(
        source=config.model,
        info=info,
        model_id=info.model_id,
        backend=backend,
        vae=None,
        vae_folder=None,
        vae_id=None,
        provider=provider,
    )


@functools.lru_cache(maxsize=64)
def student_timesteps(info: ModelInfo | ExportInfo, steps: int | None) -> tuple[int, ...]:
    """The decoder timesteps of a run with ``steps`` of them (None: the student's own). Raises UsageError."""
    if isinstance(info, ExportInfo):
        return info.manifest.combine(steps).timesteps
    from tiue_cli.model.schedule import combine_for_run, decoder_timesteps

    scheduler_config = read_json(info.path / "scheduler" / "scheduler_config.json")
    if info.manifest is None:
        trained, spacing = decoder_timesteps(scheduler_config, RELEASED_STUDENT_STEPS, spacing="leading"), "leading"
    else:
        trained, spacing = info.manifest.decoder_timesteps, info.manifest.spacing
    return combine_for_run(scheduler_config, trained, spacing=spacing, steps=steps).timesteps


def _refuse_other_kinds_options(config: GenerateConfig, info: ModelInfo | ExportInfo) -> None:
    if info.kind == "teacher" and config.steps is not None:
        raise UsageError(
            f"--steps counts the decoder timesteps of a student, and {config.model} is a teacher",
            hint="use --teacher-steps N; a student without tiue.json is known by a folder name like loopfree-sd…",
        )
    if info.kind == "student" and (config.guidance is not None or config.teacher_steps is not None):
        option = "--guidance" if config.guidance is not None else "--teacher-steps"
        raise UsageError(
            f"{option} is for teachers, and {config.model} is a student",
            hint=f"leave {option} out: a student makes an image in one pass, without guidance",
        )


# --- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedImage:
    """One image to be made; ``path`` None goes onto the contact sheet only, ``done`` lies at ``path`` already."""

    spec: ImageSpec
    where: str
    path: Path | None
    done: bool = False


@dataclass(frozen=True)
class Plan:
    """All images of one call, in order; image i has ``seed`` + i unless its row has one of its own.

    ``seed_drawn``: the seed is random, none was asked for. ``sheet``: where the contact sheet goes, if one is wanted.
    """

    config: GenerateConfig
    folder: Path
    images: tuple[PlannedImage, ...]
    seed: int
    seed_drawn: bool
    sheet: Path | None
    sheet_done: bool

    @property
    def todo(self) -> list[int]:
        """Indexes of the images that must be made."""
        # A sheet without files beside it needs every picture again, and none once it is there.
        return [
            index
            for index, image in enumerate(self.images)
            if not image.done and not (image.path is None and self.sheet_done)
        ]


def plan_images(config: GenerateConfig, target: ModelTarget, rows: Sequence[PromptRow]) -> Plan:
    """Lay out rows x ``config.images`` images, row by row: image number i has seed + i, a row's own seed + its image.

    Looks at what lies on the disk: an image whose record equals the request is done, any other file in the way raises
    OutputError. Raises UsageError and PromptError for what cannot be.
    """
    if not rows:
        raise UsageError("no prompt was given", hint='say what to draw: tiue generate "a red heart at night"')
    seed = secrets.randbelow(RANDOM_SEEDS) if config.seed is None else check_seed(config.seed)
    specs: list[ImageSpec] = []
    for row in rows:
        specs += _specs_of_row(config, target, row, first_seed=seed + len(specs))
    wheres = [row.where for row in rows for _ in range(config.images)]
    layout = _lay_out(config, specs)
    images = tuple(
        PlannedImage(spec, where, path, done=path is not None and not config.overwrite and _is_done(path, spec))
        for spec, where, path in zip(specs, wheres, layout.paths, strict=True)
    )
    return Plan(
        config=config,
        folder=layout.folder,
        images=images,
        seed=seed,
        seed_drawn=config.seed is None and any(row.seed is None for row in rows),
        sheet=layout.sheet,
        sheet_done=layout.sheet is not None and not config.overwrite and _sheet_is_done(layout.sheet, specs),
    )


def _specs_of_row(config: GenerateConfig, target: ModelTarget, row: PromptRow, *, first_seed: int) -> list[ImageSpec]:
    info = target.info
    if info.kind == "teacher" and row.steps is not None:
        raise PromptError(
            f"{row.where}: steps counts the decoder timesteps of a student, and {target.source} is a teacher",
            hint="remove it, and use --teacher-steps N for all",
        )
    size = row.size or config.size or info.image_size
    try:
        steps = target.steps(config, row)
        if isinstance(info, ExportInfo):
            info.manifest.latent_shape(size)
        elif target.vae is None:
            _check_size(size, info.factor)
    except UsageError as error:
        if row.size is None and row.steps is None:
            raise
        raise PromptError(f"{row.where}: {error.message}", hint=error.hint) from error
    seed = first_seed if row.seed is None else row.seed
    return [
        ImageSpec(
            prompt=row.prompt,
            seed=check_seed(seed + number),
            size=size,
            kind=info.kind,
            steps=steps,
            guidance=target.guidance(config),
            model=target.source,
            model_id=target.model_id,
            vae=target.vae,
            vae_id=target.vae_id,
        )
        for number in range(config.images)
    ]


def _check_size(size: tuple[int, int], factor: int) -> None:
    if any(side % factor for side in size):
        nearest = "x".join(str(max(factor, round(side / factor) * factor)) for side in size)
        raise UsageError(
            f"size {size[0]}x{size[1]} does not fit: the model needs multiples of {factor} pixels",
            hint=f"the nearest is --size {nearest}",
        )


@dataclass(frozen=True)
class _Layout:
    folder: Path
    paths: list[Path | None]
    sheet: Path | None


def _lay_out(config: GenerateConfig, specs: Sequence[ImageSpec]) -> _Layout:
    """Where each image and the contact sheet go. Raises UsageError for an ``--out`` that cannot hold them."""
    out = config.out
    suffix = "" if out.is_dir() else out.suffix.lower()
    if suffix == ".png" and config.grid:
        return _Layout(out.parent, [None] * len(specs), out)
    if suffix == ".png" and len(specs) == 1:
        return _Layout(out.parent, [out], None)
    if suffix == ".png":
        raise UsageError(
            f"{out} can hold one image, and {len(specs)} are asked for",
            hint=f"give a folder: --out {out.with_suffix('')}, or one sheet of all: --grid",
        )
    if suffix in _OTHER_IMAGES:
        raise UsageError(f"{out}: images are written as PNG", hint=f"give --out {out.with_suffix('.png')}, or a folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, and a folder is needed", hint="give another --out")
    taken: Counter[str] = Counter()
    paths: list[Path | None] = []
    for spec in specs:
        stem = f"{slug(spec.prompt)}-{spec.seed}"
        taken[stem] += 1
        # The same prompt and seed twice in one call (at two sizes, say) must not fight for one name.
        paths.append(out / (f"{stem}.png" if taken[stem] == 1 else f"{stem}-{taken[stem]}.png"))
    sheet = out / f"{slug(specs[0].prompt)}-{specs[0].seed}-grid-{len(specs)}.png" if config.grid else None
    return _Layout(out, paths, sheet)


def slug(prompt: str) -> str:
    """A file name for a prompt: lower-case letters and digits of any script, hyphens between; at most 68 characters.

    A prompt that had to be cut gets six digits of its hash, so that two long ones stay apart.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", prompt).lower()).strip("-")
    short = words[:SLUG_CHARS].encode()[:SLUG_BYTES].decode(errors="ignore").strip("-")
    if short == words and short:
        return short
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{short}-{digest}" if short else f"image-{digest}"


_IN_THE_WAY = "add --overwrite to replace it, or write elsewhere: --out FOLDER"


def _is_done(path: Path, spec: ImageSpec) -> bool:
    """Whether ``path`` holds the very image; False where nothing is. Raises OutputError where something else is."""
    record = _record_in(path)
    if record is None:
        return False
    if not isinstance(record, ImageRecord):
        raise OutputError(f"{path} exists and is a contact sheet", hint=_IN_THE_WAY)
    if different := record.differences(spec):
        raise OutputError(f"{path} exists and is another picture ({'; '.join(different)})", hint=_IN_THE_WAY)
    return True


def _sheet_is_done(path: Path, specs: Sequence[ImageSpec]) -> bool:
    record = _record_in(path)
    if record is None:
        return False
    if not isinstance(record, GridRecord):
        raise OutputError(f"{path} exists and is no contact sheet", hint=_IN_THE_WAY)
    if different := record.differences(specs):
        raise OutputError(f"{path} exists and is another sheet ({different[0]})", hint=_IN_THE_WAY)
    return True


def _record_in(path: Path) -> Record | None:
    """The record of an existing image, None where nothing lies. Raises OutputError where no request can be read."""
    try:
        if not path.exists():
            return None
        record = read_record(path)
    except OSError as error:
        raise output_error(path, error) from error
    except TiueError as error:
        raise OutputError(f"{path} exists and cannot be compared: {error.message}", hint=_IN_THE_WAY) from error
    if record is None:
        raise OutputError(f"{path} exists and does not say what it is a picture of", hint=_IN_THE_WAY)
    return record
