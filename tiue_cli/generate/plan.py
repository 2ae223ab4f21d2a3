"""What ``tiue generate`` is asked, worked out before anything heavy is loaded: which images, where, and what is there.

GenerateConfig ─ open_target ─▶ ModelTarget ─ plan_images(rows) ─▶ Plan
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tiue_cli.errors import AdapterError, ModelFolderError, OutputError, PromptError, TiueError, UsageError
from tiue_cli.files.access import has_file, kind_of
from tiue_cli.files.naming import slug
from tiue_cli.files.png import GridRecord, ImageRecord, ImageSpec, LoraUse, Record, read_record
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.prompts import PromptRow
from tiue_cli.generate.target import ExportInfo, ModelTarget
from tiue_cli.model.noise import check_seed

MAX_IMAGES = 100_000
"""Of one call: each is planned before the first is made."""
RANDOM_SEEDS = 2**32
"""Seeds that are drawn stay below this: short enough to be typed again."""
_OTHER_IMAGES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})


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

    Looks at what is on disk: an image whose record equals the request is done, any other file in the way raises
    OutputError. Raises UsageError and PromptError for what cannot be.
    """
    if not rows:
        raise UsageError("no prompt was given", hint='say what to draw: tiue generate "a red heart at night"')
    if len(rows) * config.images > MAX_IMAGES:
        raise UsageError(
            f"{len(rows) * config.images:,} images are more than the {MAX_IMAGES:,} that one call may draw",
            hint="call it several times, each with another --seed",
        )
    seed = secrets.randbelow(RANDOM_SEEDS) if config.seed is None else check_seed(config.seed)
    specs: list[ImageSpec] = []
    for row in rows:
        specs += row_specs(config, target, row, first_seed=seed + len(specs))
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


def check_settings(config: GenerateConfig, target: ModelTarget) -> None:
    """Raise UsageError where no prompt could be drawn with the size and steps of ``config``."""
    row_specs(replace(config, images=1), target, PromptRow("any", "any"), first_seed=0)


def row_specs(config: GenerateConfig, target: ModelTarget, row: PromptRow, *, first_seed: int) -> list[ImageSpec]:
    """The ``config.images`` images of one row, with ``first_seed`` and the next ones unless the row has its own.

    Raises UsageError and PromptError for a size, steps or seed that the model cannot take.
    """
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
    loras = target.loras if row.loras is None else _row_loras(target, row)
    return [
        ImageSpec(
            prompt=row.prompt,
            seed=check_seed(seed + number),
            size=size,
            kind=info.kind,
            steps=steps,
            guidance=target.guidance(config),
            encoder_timestep=target.moved_encoder(config, row),
            model=target.source,
            model_id=target.model_id,
            vae=target.vae,
            vae_id=target.vae_id,
            loras=loras,
            long_prompts=config.long_prompts,
        )
        for number in range(config.images)
    ]


def _row_loras(target: ModelTarget, row: PromptRow) -> tuple[LoraUse, ...]:
    """The adapters that a row names itself. Raises PromptError."""
    try:
        return target.find_loras(row.loras or ())
    except (UsageError, AdapterError, ModelFolderError) as error:
        raise PromptError(f"{row.where}: {error.message}", hint=error.hint) from error


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
    kind = kind_of(out, error=OutputError)
    suffix = "" if kind == "folder" else out.suffix.lower()
    if suffix == ".png" and config.grid:
        return _Layout(out.parent, [None] * len(specs), out)
    if suffix == ".png" and len(specs) == 1:
        return _Layout(out.parent, [out], None)
    if suffix == ".png":
        raise UsageError(
            f"{out} can hold one image, not {len(specs)}",
            hint=f"give a folder: --out {out.with_suffix('')}, or one sheet of all: --grid",
        )
    if suffix in _OTHER_IMAGES:
        raise UsageError(f"{out}: images are written as PNG", hint=f"give --out {out.with_suffix('.png')}, or a folder")
    if kind in ("file", "special"):
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
        raise OutputError(f"{path} exists and is not a contact sheet", hint=_IN_THE_WAY)
    if different := record.differences(specs):
        raise OutputError(f"{path} exists and is another sheet ({different[0]})", hint=_IN_THE_WAY)
    return True


def _record_in(path: Path) -> Record | None:
    """The record of an existing image, None where there is no file. Raises OutputError where no request can be read."""
    if not has_file(path, error=OutputError):
        return None
    try:
        record = read_record(path)
    except TiueError as error:
        raise OutputError(f"{path} exists and cannot be compared: {error.message}", hint=_IN_THE_WAY) from error
    if record is None:
        raise OutputError(f"{path} exists and does not say what it is a picture of", hint=_IN_THE_WAY)
    return record
