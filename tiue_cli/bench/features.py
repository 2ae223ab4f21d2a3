"""Feature extractors: images in, one row of numbers an image out, and by whom."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tiue_cli.artifacts import sha256_file
from tiue_cli.papercut.checker import FEATURES, WEIGHTS, embed
from tiue_cli.papercut.evaluation import shipped_checker
from tiue_cli.papercut.scenes import SIZE


class Extractor(Protocol):
    """What distances are measured in. Two figures compare only where all of this is the same."""

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
        """How images come to the extractor's size, for the report."""

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, F) of images (N, H, W, 3)."""


class PapercutChecker:
    """The penultimate features of papercut's attribute checker, which ships with the package, divided by 8.

    Their root mean square over renders is 7.7, and the kernel distance's (xᵀy/F + 1)³ is made for features near 1. All
    other figures but the units of the Fréchet distance and the diversity are the same.
    """

    name = "papercut checker, penultimate layer / 8"
    width = FEATURES
    resize = f"{SIZE}x{SIZE}: none; other sizes bilinear with anti-aliasing (torch)"

    def __init__(self) -> None:
        self.sha256 = sha256_file(WEIGHTS)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return embed(shipped_checker(), images) / np.float32(8)
