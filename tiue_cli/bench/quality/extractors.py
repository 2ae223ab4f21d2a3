"""Which feature extractor a bench uses, and the ones that need no download."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tiue_cli.bench.quality.features import Extractor, Images
from tiue_cli.errors import UsageError
from tiue_cli.files.access import kind_of
from tiue_cli.files.hashes import sha256_file
from tiue_cli.papercut.checker import FEATURES, WEIGHTS, embed
from tiue_cli.papercut.evaluation import shipped_checker
from tiue_cli.papercut.scenes import SIZE

_EXTRACTOR_HINT = "give --extractor INCEPTION.onnx (benchmarks/inception_to_onnx.py makes it), or a CLIP model's folder"


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


def open_extractor(source: Path | None, *, papercut: bool) -> Extractor:
    """The extractor behind ``--extractor``: an .onnx file or a CLIP folder; None is papercut's checker on papercut.

    Raises UsageError where there is none to choose, QualityError where the file or folder cannot be used.
    """
    if source is None:
        if not papercut:
            raise UsageError("the quality of these pictures needs a feature extractor", hint=_EXTRACTOR_HINT)
        return PapercutChecker()
    kind = kind_of(source, error=UsageError)
    if kind == "nothing":
        raise UsageError(f"--extractor {source} does not exist", hint=_EXTRACTOR_HINT)
    # Here, because both know this module's types.
    from tiue_cli.bench.quality.clip_features import ClipExtractor
    from tiue_cli.bench.quality.onnx_features import OnnxExtractor

    if kind == "folder":
        return ClipExtractor(source)
    if kind == "file" and source.suffix == ".onnx":
        return OnnxExtractor(source)
    raise UsageError(f"--extractor {source} is neither an .onnx file nor a folder", hint=_EXTRACTOR_HINT)
