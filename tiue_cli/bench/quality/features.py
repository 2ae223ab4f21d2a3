"""Feature extractors: images in, one row of numbers an image out, and all that must be said about how.

Two figures compare only where extractor, resizing and N are the same. The papercut checker ships; any other network
comes from the user: an ONNX graph (``onnx_features``, the way of FID's Inception) or a CLIP folder (``clip_features``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]
"""(N, H, W, 3)."""


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


@dataclass(frozen=True)
class Resizing:
    """What is done to drawn and to reference images alike, before any extractor: centre crop, then Pillow's Lanczos.

    ``side`` None leaves images as they are. COCO-2014-30k is 256 (GigaGAN's released evaluation).
    """

    side: int | None = None

    def describe(self) -> str:
        """For the report."""
        if self.side is None:
            return "none"
        return f"centre crop to a square, {self.side}x{self.side} by lanczos (Pillow, anti-aliased)"

    def image(self, image: Image.Image) -> Image.Image:
        """One image, as described."""
        if self.side is None:
            return image
        square = min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        cropped = image.crop((left, top, left + square, top + square))
        return cropped.resize((self.side, self.side), Image.Resampling.LANCZOS)

    def __call__(self, images: Images) -> Images:
        """Images (N, H, W, 3) → (N, side, side, 3)."""
        if self.side is None or images.shape[1:3] == (self.side, self.side):
            return images
        return np.stack([np.asarray(self.image(Image.fromarray(image))) for image in images])
