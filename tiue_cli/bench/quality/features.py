"""Feature extractors: images in, one row of numbers an image out, and all that must be said about how.

Two figures compare only where extractor, resizing and N are the same. The papercut checker ships; any other network
comes from the user: an ONNX graph (``onnx_features``, the way of FID's Inception) or a CLIP folder (``clip_features``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tiue_cli.errors import UsageError
from tiue_cli.files.atomic import sha256_file
from tiue_cli.papercut.checker import FEATURES, WEIGHTS, embed
from tiue_cli.papercut.evaluation import shipped_checker
from tiue_cli.papercut.scenes import SIZE

Images = NDArray[np.uint8]
"""(N, H, W, 3)."""
Filter = Literal["lanczos", "bicubic", "bilinear", "box"]

_EXTRACTOR_HINT = "give --extractor INCEPTION.onnx (benchmarks/inception_to_onnx.py makes it), or a CLIP model's folder"


class Extractor(Protocol):
    """What distances are measured in."""

    @property
    def name(self) -> str:
        """For the report, e.g. ``papercut checker``."""

    @property
    def sha256(self) -> str:
        """Of the weights."""

    @property
    def width(self) -> int:
        """Features an image, F."""

    @property
    def resize(self) -> str:
        """How images come to the extractor's own size, for the report."""

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Features (N, F) of images (N, H, W, 3) uint8. Raises QualityError for images that it cannot take."""


class PapercutChecker:
    """The penultimate features of papercut's attribute checker, which ships with the package, divided by 8.

    Their root mean square over renders is 7.7, and the kernel distance's (xᵀy/F + 1)³ is made for features near 1. All
    other figures but the units of the Fréchet distance and the diversity are the same.
    """

    name = "papercut checker, penultimate layer / 8"
    width = FEATURES
    resize = f"none at {SIZE}x{SIZE}, else bilinear with anti-aliasing (torch)"
    scale = np.float32(8)

    def __init__(self) -> None:
        self.sha256 = sha256_file(WEIGHTS)

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """See ``Extractor``."""
        return embed(shipped_checker(), images) / self.scale


class Sharpness:
    """One feature an image, the mean length of its brightness's gradient: S = mean |∇Y|₂, forward differences.

    Y = 0.299 R + 0.587 G + 0.114 B (Rec. 601) in levels 0 to 255; S is in levels a pixel. Networks that recognise
    objects hardly see blur, and regression to a mean blurs: sharpness as the references' is right, neither more nor
    less.
    """

    name = "sharpness"
    sha256 = hashlib.sha256(b"mean length of forward differences of Rec. 601 brightness").hexdigest()
    width = 1
    resize = "none"

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """See ``Extractor``."""
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        # One by one: the float copy of a batch would be its largest part.
        return np.array([[_sharpness(image @ weights)] for image in images], np.float32)


def _sharpness(brightness: NDArray[np.float32]) -> float:
    down, right = np.diff(brightness, axis=0)[:, :-1], np.diff(brightness, axis=1)[:-1]
    return float(np.hypot(down, right).mean())


@dataclass(frozen=True)
class Resizing:
    """What is done to drawn and to reference images alike, before any extractor: centre crop, then Pillow's resize.

    ``side`` None leaves images as they are. COCO-2014-30k is 256 with Lanczos (GigaGAN's released evaluation).
    """

    side: int | None = None
    filter: Filter = "lanczos"

    def describe(self) -> str:
        """For the report."""
        if self.side is None:
            return "none"
        return f"centre crop to a square, {self.side}x{self.side} by {self.filter} (Pillow, anti-aliased)"

    def image(self, image: Image.Image) -> Image.Image:
        """One image, as described."""
        if self.side is None:
            return image
        square = min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        cropped = image.crop((left, top, left + square, top + square))
        if square == self.side:
            return cropped
        return cropped.resize((self.side, self.side), Image.Resampling[self.filter.upper()])

    def __call__(self, images: Images) -> Images:
        """Images (N, H, W, 3) → (N, side, side, 3)."""
        if self.side is None or images.shape[1:3] == (self.side, self.side):
            return images
        return np.stack([np.asarray(self.image(Image.fromarray(image))) for image in images])


def open_extractor(source: Path | None, *, papercut: bool) -> Extractor:
    """The extractor behind ``--extractor``: an .onnx file or a CLIP folder; None is papercut's checker on papercut.

    Raises UsageError where there is none to choose, QualityError where the file or folder cannot be used.
    """
    if source is None:
        if not papercut:
            raise UsageError("the quality of these pictures needs a feature extractor", hint=_EXTRACTOR_HINT)
        return PapercutChecker()
    if not source.exists():
        raise UsageError(f"--extractor {source} does not exist", hint=_EXTRACTOR_HINT)
    # Here, because both know this module's types.
    from tiue_cli.bench.quality.clip_features import ClipExtractor
    from tiue_cli.bench.quality.onnx_features import OnnxExtractor

    if source.is_dir():
        return ClipExtractor(source)
    if source.suffix == ".onnx":
        return OnnxExtractor(source)
    raise UsageError(f"--extractor {source} is neither an .onnx file nor a folder", hint=_EXTRACTOR_HINT)
