"""What pictures are compared with: papercut scenes rendered on the fly, a folder of images, or a file of statistics.

A statistics file (.npz, read without pickle) holds ``mu`` (F,) and ``sigma`` (F, F), as those of pytorch-fid do, and,
where we wrote it, ``features`` (N, F), ``n``, and as text ``extractor``, ``extractor_sha256`` and ``resize``.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tiue_cli.bench.quality.features import Extractor, Images, Resizing
from tiue_cli.bench.quality.metrics import FeatureSet, Moments
from tiue_cli.errors import QualityError, UsageError
from tiue_cli.files.access import kind_of, open_file
from tiue_cli.files.atomic import atomic_file
from tiue_cli.files.hashes import sha256_file
from tiue_cli.papercut.captions import SceneSpec
from tiue_cli.papercut.scenes import render

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REFERENCE_SEED, CEILING_SEED = 2**40, 2**41
"""First render seeds of references, and of the renders that are measured against them; no training uses them."""
_CHUNK = 64

Progress = Callable[[int, int], None]
"""Called with images done, and their number."""


@dataclass(frozen=True)
class Reference:
    """A reference in an extractor's features. ``images`` 0: the file does not say; ``sha256`` of what was given."""

    description: str
    images: int
    sha256: str | None
    features: FeatureSet | Moments
    notes: tuple[str, ...] = ()


def open_reference(
    source: Path | None,
    *,
    specs: Sequence[SceneSpec] | None,
    extractor: Extractor,
    resizing: Resizing,
    size: tuple[int, int],
    progress: Progress = lambda done, total: None,
) -> Reference:
    """The reference behind ``--reference``; None renders papercut's scenes of the ``specs`` of the captions.

    ``size`` (H, W) is that of the drawn images before ``resizing``, and of the references unless they are resized.
    Raises UsageError where there is nothing to compare with, QualityError where it cannot be used.
    """
    if source is None:
        if specs is None:
            raise UsageError(
                "the quality of these pictures needs something to compare with",
                hint="give --reference FOLDER_OF_IMAGES or --reference STATS.npz",
            )
        return render_reference(specs, extractor=extractor, resizing=resizing, progress=progress)
    kind = kind_of(source, error=UsageError)
    if kind == "folder":
        return folder_reference(source, extractor=extractor, resizing=resizing, size=size, progress=progress)
    if kind == "file" and source.suffix == ".npz":
        return read_statistics(source, extractor=extractor, resizing=resizing)
    raise UsageError(
        f"--reference {source} {'does not exist' if kind == 'nothing' else 'is neither a folder nor an .npz file'}",
        hint="give a folder of images, or a file of statistics",
    )


# --- papercut ------------------------------------------------------------------------------------------------------


def render_reference(
    specs: Sequence[SceneSpec],
    *,
    extractor: Extractor,
    resizing: Resizing,
    seed: int = REFERENCE_SEED,
    progress: Progress = lambda done, total: None,
) -> Reference:
    """One fresh scene a spec, rendered in chunks: only features are kept."""
    parts = []
    for start, images in rendered_chunks(specs, seed):
        parts.append(extractor(resizing(images)))
        progress(start + len(images), len(specs))
    captions = hashlib.sha256("\n".join(spec.caption for spec in specs).encode()).hexdigest()
    return Reference(
        f"papercut scenes rendered from the same captions, seed {seed}",
        len(specs),
        captions,
        FeatureSet(np.concatenate(parts), name="the rendered references"),
    )


def rendered_chunks(specs: Sequence[SceneSpec], seed: int) -> Iterator[tuple[int, Images]]:
    """(first index, images) of consecutive chunks of scenes; the chunk counts, so a scene depends on its place."""
    for number, start in enumerate(range(0, len(specs), _CHUNK)):
        yield start, render(specs[start : start + _CHUNK], seed + number)


# --- a folder ------------------------------------------------------------------------------------------------------


def folder_reference(
    folder: Path,
    *,
    extractor: Extractor,
    resizing: Resizing,
    size: tuple[int, int] | None,
    progress: Progress = lambda done, total: None,
) -> Reference:
    """Every image under ``folder``, in the order of names; ``size`` (H, W) is what they must have without resizing.

    Raises QualityError for a folder without images, a damaged image, sizes that differ, and images that are all grey.
    """
    files = image_files(folder)
    digest, parts, converted = hashlib.sha256(), [], 0
    flat: list[Path] = []
    for start in range(0, len(files), _CHUNK):
        chunk = []
        for file in files[start : start + _CHUNK]:
            image, was_rgb = _read(file)
            digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
            pixels = _sized(image, file, resizing=resizing, size=size)
            converted += not was_rgb
            if (pixels == pixels[0, 0]).all():
                flat.append(file)
            chunk.append(pixels)
            size = size if resizing.side is not None else (image.height, image.width)
        parts.append(extractor(np.stack(chunk)))
        progress(start + len(chunk), len(files))
    if len(flat) > len(files) // 2:
        raise QualityError(
            f"{folder}: {len(flat)} of {len(files)} images are of one colour, {flat[0].name} for one",
            hint="give pictures of what the prompts ask for",
        )
    notes = [f"{len(flat)} of {len(files)} references are of one colour, {flat[0].name} for one"] if flat else []
    if converted:
        notes.append(f"{converted} of {len(files)} references were not RGB (grey, palette or transparent): converted")
    return Reference(
        f"{len(files)} images in {folder.name}",
        len(files),
        digest.hexdigest(),
        FeatureSet(np.concatenate(parts), name=str(folder)),
        tuple(notes),
    )


def image_files(folder: Path) -> list[Path]:
    """The images under a folder, sorted, hidden ones left out. Raises QualityError where there are fewer than two."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if len(found) < 2:
        raise QualityError(
            f"{folder} holds {len(found)} images ({', '.join(IMAGE_SUFFIXES)})", hint="give a folder of pictures"
        )
    return found


def _read(file: Path) -> tuple[Image.Image, bool]:
    """An RGB image, and whether it was one."""
    try:
        # No more formats than are asked for: for EPS Pillow would start Ghostscript.
        with (
            open_file(file, error=QualityError) as opened,
            Image.open(opened, formats=["PNG", "JPEG", "WEBP", "BMP"]) as image,
        ):
            return image.convert("RGB"), image.mode == "RGB"
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise QualityError(f"{file} cannot be read as an image: {error}", hint="replace or remove it") from error


def _sized(
    image: Image.Image, file: Path, *, resizing: Resizing, size: tuple[int, int] | None
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    if resizing.side is None and size is not None and (image.height, image.width) != size:
        raise QualityError(
            f"{file} is {image.height}x{image.width} and the other images are {size[0]}x{size[1]}",
            hint="have all resized alike, for example --resize 256",
        )
    if resizing.side is not None and min(image.size) < resizing.side:
        raise QualityError(
            f"{file} is {image.height}x{image.width}, smaller than {resizing.side}x{resizing.side}",
            hint="choose a smaller --resize, or larger references: enlarged pictures are blurred ones",
        )
    return np.asarray(resizing.image(image))


# --- statistics ----------------------------------------------------------------------------------------------------


def read_statistics(path: Path, *, extractor: Extractor, resizing: Resizing) -> Reference:
    """A .npz file; see the module. Raises QualityError where it is damaged or made by another extractor."""
    data = _load_npz(path)
    notes: list[str] = []
    for key, ours, what in (
        ("extractor_sha256", extractor.sha256, "the extractor"),
        ("resize", resizing.describe(), "the resizing"),
    ):
        theirs = str(data[key]) if key in data else None
        if theirs is None:
            notes.append(f"{path.name} does not say {what} it was made with: taken on trust")
        elif theirs != ours:
            raise QualityError(
                f"{path} was made with another {what.removeprefix('the ')}: {theirs}, not {ours}",
                hint="use the same, or make it again: benchmarks/reference_statistics.py",
            )
    found: FeatureSet | Moments
    if "features" in data:
        found = FeatureSet(_numbers(path, data, "features"), name=str(path))
        count = len(found)
    else:
        found = _moments(path, data)
        count = found.count or 0
        if not count:
            notes.append(f"{path.name} does not say of how many images it is")
    if found.width != extractor.width:
        raise QualityError(
            f"{path} holds {found.width} features an image, and {extractor.name} has {extractor.width}",
            hint="use the extractor that it was made with",
        )
    return Reference(path.name, count, sha256_file(path), found, tuple(notes))


def write_statistics(path: Path, reference: Reference, *, extractor: Extractor, resizing: Resizing) -> Path:
    """Store a reference with its features, so that it need not be read again. Raises OutputError."""
    features = reference.features
    moments = features if isinstance(features, Moments) else features.moments
    content: dict[str, np.ndarray] = {"mu": moments.mean, "sigma": moments.covariance}
    if isinstance(features, FeatureSet):
        content["features"] = features.features
    if moments.count is not None:
        content["n"] = np.array(moments.count)
    texts = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "resize": resizing.describe(),
        "source": reference.description,
    }
    content |= {key: np.array(value) for key, value in texts.items()}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **content)
    return path


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open_file(path, error=QualityError) as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of them")
            data = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, zipfile.BadZipFile) as error:
        raise QualityError(
            f"{path} cannot be read as statistics: {error}", hint="give an .npz file with mu and sigma, without pickles"
        ) from error
    if "features" not in data and not {"mu", "sigma"} <= data.keys():
        raise QualityError(
            f"{path} holds {', '.join(sorted(data)) or 'nothing'}, not mu and sigma",
            hint="make it with benchmarks/reference_statistics.py, or take one of pytorch-fid's",
        )
    return data


def _numbers(path: Path, data: dict[str, np.ndarray], key: str) -> np.ndarray:
    if data[key].dtype.kind not in "fiu":
        raise QualityError(f"{path}: {key} is {data[key].dtype}, not numbers", hint="make the file again")
    return data[key]


def _moments(path: Path, data: dict[str, np.ndarray]) -> Moments:
    mean, covariance = (_numbers(path, data, key).astype(np.float64) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise QualityError(
            f"{path}: mu is {mean.shape} and sigma {covariance.shape}, not (F,) and (F, F)", hint="make the file again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise QualityError(f"{path}: mu or sigma is not finite", hint="make the file again")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0.0)):
        raise QualityError(f"{path}: sigma is not symmetric, so no covariance", hint="make the file again")
    count = int(data["n"]) if "n" in data and data["n"].shape == () and data["n"].dtype.kind in "iu" else None
    return Moments(count, mean, covariance)
