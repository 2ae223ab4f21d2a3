"""What shapes an engine takes: profiles, said in images and pixels, and turned into tensor shapes.

    sd15-512.toml or --batch 1:4:16 ─▶ ProfileSet ─ fit to an export ─▶ ProfileSpec ─▶ (min, opt, max) of every input

A TensorRT plan runs any shape between a profile's minimum and maximum and is tuned for its optimum; a profile whose
three are equal is the fastest. Users never meet rows: a batch counts images, whatever K is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pydantic
from pydantic import ConfigDict, Field

from tiue_cli.base.text import excerpt, parse_size
from tiue_cli.errors import ProfileError, UsageError
from tiue_cli.files.access import read_bytes
from tiue_cli.files.engines import ProfileSpec, Range
from tiue_cli.files.exports import QUANTIZED, ExportManifest, GraphSpec, Precision, Size
from tiue_cli.files.structured import parse_toml

DEFAULT_BATCHES: Final = ((1, 1, 1), (1, 4, 16))
"""Without --profile and --batch: one image exactly, and up to sixteen."""

MAX_BATCH: Final = 1024

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input of a graph its (min, opt, max) shape."""


# --- profile files -------------------------------------------------------------------------------------------------


class _Model(pydantic.BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelFacts(_Model):
    """What an export must be for the profiles to mean anything; None does not matter."""

    family: str
    text_width: int | None = Field(default=None, ge=1)
    latent_channels: int | None = Field(default=None, ge=1)
    latent_factor: int | None = Field(default=None, ge=1)


class _ProfileTable(_Model):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    batch: int | str
    steps: int | str
    size: int | str


class _ProfileFile(_Model):
    format_version: int = Field(ge=1, le=1)
    precision: Precision
    model: ModelFacts
    profile: list[_ProfileTable] = Field(min_length=1)


@dataclass(frozen=True)
class ProfileSet:
    """Profiles that go into one engine. ``sizes`` are the fixed sizes (H, W) among them, in order."""

    name: str
    precision: Precision | None
    model: ModelFacts | None
    profiles: tuple[ProfileSpec, ...]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The exact image sizes that the profiles name, each once; empty where any of them is a range."""
        if any(len(set(sides)) > 1 for profile in self.profiles for sides in (profile.height, profile.width)):
            return ()
        return tuple(dict.fromkeys((profile.height[1], profile.width[1]) for profile in self.profiles))


_PROFILE_BYTES: Final = 2**20


def load_profiles(name_or_path: str) -> ProfileSet:
    """Profiles by the name of a file that ships with tiue (``sd15-512``), or a .toml file of the user's own.

    Raises ProfileError naming file and field, UsageError for a name that does not exist.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        shipped = shipped_profiles()
        if name_or_path not in shipped:
            raise UsageError(
                f"there is no profile {name_or_path!r}",
                hint=f"choose one of: {', '.join(shipped)}; or give a file: --profile FILE.toml",
            )
        path = shipped[name_or_path]
    try:
        data = parse_toml(read_bytes(path, error=ProfileError, limit_bytes=_PROFILE_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="check the path of --profile") from None
    except ValueError as error:
        raise ProfileError(f"{path} cannot be read: {error}", hint="compare it with engines/profiles/*.toml") from error
    return _profile_set(path, data)


def shipped_profiles() -> dict[str, Path]:
    """The profile files that come with tiue, by name."""
    package = Path(__file__).resolve().parents[2]
    # Beside the package in a checkout; inside it where a wheel was installed.
    folders = (package.parent / "engines" / "profiles", package / "engine_profiles")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _profile_set(path: Path, data: Mapping[str, Any]) -> ProfileSet:
    hint = "compare it with engines/profiles/*.toml"
    try:
        file = _ProfileFile.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{path}: {excerpt(where)}: {excerpt(first['msg'])}", hint=hint) from error
    names = [table.name for table in file.profile]
    if len(set(names)) != len(names):
        raise ProfileError(f"{path}: two profiles have the same name", hint=hint)
    profiles = []
    for table in file.profile:
        try:
            height, width = parse_sizes(str(table.size))
            batch, steps = parse_range(str(table.batch), what="batch"), parse_range(str(table.steps), what="steps")
        except UsageError as error:
            raise ProfileError(f"{path}: profile {table.name!r}: {error.message}", hint=hint) from error
        profiles.append(ProfileSpec(name=table.name, batch=batch, steps=steps, height=height, width=width))
    return ProfileSet(name=path.stem, precision=file.precision, model=file.model, profiles=tuple(profiles))


def parse_range(text: str, *, what: str = "batch") -> Range:
    """ "4" → (4, 4, 4); "1:4:16" → (1, 4, 16), minimum, optimum and maximum. Raises UsageError."""
    parts = text.split(":")
    hint = f"write one number, or minimum, optimum and maximum: --{what} 1:4:16"
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part, flags=re.ASCII) for part in parts):
        raise UsageError(f"{what} {excerpt(text)!r} is not understood", hint=hint)
    low, opt, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= low <= opt <= high <= MAX_BATCH:
        raise UsageError(
            f"{what} {excerpt(text)!r}: 1 ≤ minimum ≤ optimum ≤ maximum ≤ {MAX_BATCH} does not hold",
            hint=hint,
        )
    return low, opt, high


def parse_sizes(text: str) -> tuple[Range, Range]:
    """ "512", "512x768", or three of them with colons: the ranges of height and width in pixels. Raises UsageError."""
    parts = [parse_size(part) for part in text.split(":")]
    if len(parts) not in (1, 3):
        raise UsageError(f"size {excerpt(text)!r} is not understood", hint="write one size, or minimum:optimum:maximum")
    low, opt, high = parts * 3 if len(parts) == 1 else parts
    if not all(low[side] <= opt[side] <= high[side] for side in (0, 1)):
        raise UsageError(f"size {excerpt(text)!r}: minimum ≤ optimum ≤ maximum does not hold")
    return (low[0], opt[0], high[0]), (low[1], opt[1], high[1])


# --- fitting to an export ------------------------------------------------------------------------------------------


def batch_profiles(manifest: ExportManifest, batches: Sequence[Range] = DEFAULT_BATCHES) -> tuple[ProfileSpec, ...]:
    """One profile for each of the export's sizes and each batch range, for every K of the student."""
    profiles = []
    for size in manifest.sizes or (manifest.default_size,):
        for batch in batches:
            label = "batch-" + "-".join(str(number) for number in dict.fromkeys(batch))
            profiles.append(
                ProfileSpec(
                    name=label if len(manifest.sizes) < 2 else f"{size[0]}x{size[1]}-{label}",
                    batch=batch,
                    steps=_steps_range(manifest),
                    height=(size[0],) * 3,
                    width=(size[1],) * 3,
                )
            )
    return tuple(profiles)


def fit_profiles(profiles: ProfileSet, manifest: ExportManifest) -> tuple[ProfileSpec, ...]:
    """The profiles as this export can serve them: K cut to what the student has, sizes and model checked.

    Raises ProfileError for a model of another family, another precision, or a size that the export does not have.
    """
    _check_model(profiles, manifest)
    fitted = []
    for profile in profiles.profiles:
        low, _, high = _steps_range(manifest)
        steps = (max(profile.steps[0], low), profile.steps[1], min(profile.steps[2], high))
        if steps[0] > steps[2]:
            raise ProfileError(
                f"profile {profile.name!r} is for {profile.steps[0]} to {profile.steps[2]} steps, and this student has"
                f" {low} to {high}",
                hint="change its steps, or use --batch",
            )
        optimum = min(max(steps[1], steps[0]), steps[2])
        fitted.append(profile.model_copy(update={"steps": (steps[0], optimum, steps[2])}))
        _check_size(fitted[-1], manifest)
    return tuple(fitted)


def _steps_range(manifest: ExportManifest) -> Range:
    # Tuned for the K that the student was trained with, which is the default of every run.
    return manifest.steps[0], manifest.steps[-1], manifest.steps[-1]


def _check_model(profiles: ProfileSet, manifest: ExportManifest) -> None:
    # A profile's precision is what its export is made in where nobody says; 8 bits are always said.
    if profiles.precision not in (None, manifest.precision) and manifest.precision not in QUANTIZED:
        raise ProfileError(
            f"profile {profiles.name} is for {profiles.precision}, and the export is in {manifest.precision}",
            hint=f"export again with --precision {profiles.precision}, or use --batch instead of --profile",
        )
    if profiles.model is None:
        return
    for field in ("text_width", "latent_channels", "latent_factor"):
        wanted, found = getattr(profiles.model, field), getattr(manifest, field)
        if wanted is not None and wanted != found:
            raise ProfileError(
                f"profile {profiles.name} is for {profiles.model.family} models with {field} {wanted}, and this export"
                f" has {found}",
                hint=f"choose one of: {', '.join(shipped_profiles())}; or use --batch",
            )


def _check_size(profile: ProfileSpec, manifest: ExportManifest) -> None:
    corners = [(profile.height[index], profile.width[index]) for index in range(3)]
    for height, width in corners:
        if height % manifest.latent_factor or width % manifest.latent_factor:
            raise ProfileError(
                f"profile {profile.name!r}: {height}x{width} pixels are not multiples of {manifest.latent_factor}",
                hint="change its size",
            )
    if not manifest.sizes:
        return
    have = ", ".join(f"{height}x{width}" for height, width in manifest.sizes)
    if len(set(corners)) > 1 or corners[0] not in manifest.sizes:
        wanted = ":".join(f"{height}x{width}" for height, width in dict.fromkeys(corners))
        raise ProfileError(
            f"profile {profile.name!r} is for {wanted} pixels, and this export is fixed to {have}",
            hint=f"export again with --size {corners[1][0]}x{corners[1][1]}, or use --batch",
        )


# --- tensor shapes -------------------------------------------------------------------------------------------------


def input_shapes(graph: GraphSpec, profile: ProfileSpec, *, factor: int) -> Shapes:
    """(min, opt, max) shape of every input of ``graph`` under ``profile``; empty where the graph has another size.

    ``factor`` is pixels per latent. Raises ManifestError for a free dimension whose name means nothing.
    """
    if graph.size is not None and graph.size != (profile.height[1], profile.width[1]):
        return {}
    low, opt, high = (
        graph.input_shapes(
            batch=profile.batch[index],
            steps=profile.steps[index],
            size=(profile.height[index], profile.width[index]),
            factor=factor,
        )
        for index in range(3)
    )
    return {name: (low[name], opt[name], high[name]) for name in low}
