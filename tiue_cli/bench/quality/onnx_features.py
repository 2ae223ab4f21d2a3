"""Any network as a feature extractor: an ONNX graph, run by ONNX Runtime.

The graph takes pixel values 0 to 255 and normalises inside, so that its hash says all there is to say. Its only input
is (N, 3, H, W) or (N, H, W, 3): uint8, or float32 with the metadata ``pixels`` = ``0..255`` (a float input may mean
anything). Where H and W are fixed, images are resized to them before; where they are free, the graph resizes. Its first
output is (N, F), or (N, F, 1, 1).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image

from tiue_cli.backends.onnx_session import choose_provider, open_session, run_session, session_errors
from tiue_cli.bench.quality.features import Images
from tiue_cli.errors import QualityError
from tiue_cli.files.access import is_file
from tiue_cli.files.hashes import sha256_file

PIXELS_KEY, PIXELS = "pixels", "0..255"
RESIZE_KEY = "resize"
"""Metadata in words, for the report: what the graph itself does to come to its size."""
_BATCH = 32
_CONTRACT = "make the graph with benchmarks/inception_to_onnx.py, or see benchmarks/PROTOCOL.md for what it must take"


class OnnxExtractor:
    """The first output of a graph; see the module for what the graph must be. Raises QualityError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sha256 = _sha256(path)
        self.name = f"{path.name} (ONNX)"
        self._provider = choose_provider("auto")
        self._session = open_session(path, self._provider)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise QualityError(f"{path} has {len(inputs)} inputs, not images alone", hint=_CONTRACT)
        self._input = inputs[0].name
        self._dtype = self._checked_dtype(inputs[0].type)
        self._channels_first, self._size, batch = _layout(path, inputs[0].shape)
        self._batch = _BATCH if batch is None else batch
        height, width = self._size or (64, 64)
        self.width = int(self._run(np.zeros((1, height, width, 3), np.uint8)).shape[1])

    @property
    def resize(self) -> str:
        """See ``Extractor``."""
        stated = self._session.get_modelmeta().custom_metadata_map.get(RESIZE_KEY)
        if self._size is None:
            return stated or "inside the graph"
        rounding = "8 bit" if self._dtype == np.uint8 else "not rounded, as clean-fid"
        before = f"to {self._size[0]}x{self._size[1]} where they are not, bicubic (Pillow, anti-aliased, {rounding})"
        return before if stated is None else f"{before}, then {stated}"

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """See ``Extractor``."""
        return np.concatenate([self._run(images[i : i + self._batch]) for i in range(0, len(images), self._batch)])

    def _run(self, images: Images) -> NDArray[np.float32]:
        count = len(images)
        pixels = self._sized(images)
        if count < self._batch:  # the last batch; free batches do not mind, and fixed ones need it
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self._batch - count, axis=0)])
        if self._channels_first:
            pixels = pixels.transpose(0, 3, 1, 2)
        with session_errors(self._path.name):
            outputs = run_session(self._session, {self._input: np.ascontiguousarray(pixels)}, self._provider)
        features: np.ndarray = next(iter(outputs.values())).numpy()
        features = features.reshape(features.shape[0], -1) if features.ndim == 4 else features
        if features.ndim != 2 or len(features) != self._batch or features.dtype.kind != "f":
            raise QualityError(
                f"{self._path}: the first output is {features.dtype} {features.shape} for {self._batch} images",
                hint="its first output must be the features, (N, F)",
            )
        return features[:count].astype(np.float32)

    def _sized(self, images: Images) -> np.ndarray:
        if self._size is None or images.shape[1:3] == self._size:
            return images.astype(self._dtype)
        target = (self._size[1], self._size[0])
        if self._dtype == np.uint8:
            return np.stack([np.asarray(Image.fromarray(i).resize(target, Image.Resampling.BICUBIC)) for i in images])
        return np.stack([_resized_float(image, target) for image in images])

    def _checked_dtype(self, kind: str) -> Any:
        if kind == "tensor(uint8)":
            return np.uint8
        stated = self._session.get_modelmeta().custom_metadata_map.get(PIXELS_KEY)
        if kind == "tensor(float)" and stated == PIXELS:
            return np.float32
        if kind == "tensor(float)":
            raise QualityError(
                f"{self._path} takes float32 and does not say which values pixels have",
                hint=f'add the metadata "{PIXELS_KEY}" = "{PIXELS}" if it normalises inside; {_CONTRACT}',
            )
        raise QualityError(f"{self._path} takes {kind}, not uint8 or float32", hint=_CONTRACT)


def _resized_float(image: NDArray[np.uint8], target: tuple[int, int]) -> NDArray[np.float32]:
    """Channel by channel without rounding, clipped to 0..255: clean-fid's resize (Parmar et al. 2022)."""
    channels = [
        np.asarray(Image.fromarray(image[..., channel].astype(np.float32)).resize(target, Image.Resampling.BICUBIC))
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.float32)


def _layout(path: Path, shape: list[Any]) -> tuple[bool, tuple[int, int] | None, int | None]:
    """(channels first?, fixed (H, W) or None, fixed batch or None) of an input's shape."""
    if len(shape) == 4 and 3 in (shape[1], shape[3]):
        channels_first = shape[1] == 3
        sides = shape[2:] if channels_first else shape[1:3]
        fixed = [isinstance(side, int) for side in sides]
        if all(fixed) or not any(fixed):
            return channels_first, (sides[0], sides[1]) if all(fixed) else None, _fixed(shape[0])
    raise QualityError(f"{path}: the input is {shape}, not (N, 3, H, W) or (N, H, W, 3)", hint=_CONTRACT)


def _fixed(dimension: Any) -> int | None:
    return dimension if isinstance(dimension, int) else None


def _sha256(path: Path) -> str:
    """Of the graph and of the weights beside it."""
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise QualityError(f"{path} cannot be read as ONNX: {error}", hint="check the file") from error
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    digest = hashlib.sha256(sha256_file(path).encode())
    for name in sorted(names):
        if not is_file(path.parent / name, error=QualityError):
            raise QualityError(f"{path} lacks its weights, {name}", hint="keep both files in one folder")
        digest.update(sha256_file(path.parent / name).encode())
    return sha256_file(path) if not names else digest.hexdigest()
