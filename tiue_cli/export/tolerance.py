"""How far two computations of the same thing may lie apart, and how far they do; NumPy only.

The same bars hold for ONNX against torch and for TensorRT against ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from tiue_cli.errors import ParityError
from tiue_cli.files.exports import Precision

REQUIRED_PSNR_DB: Final[Mapping[Precision, float]] = {"fp32": 60.0, "fp16": 35.0, "int8": 25.0, "fp8": 25.0}
ALLOWED_RELATIVE_ERROR: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "fp16": 5e-2, "int8": 0.25, "fp8": 0.25}
"""Of every output of every graph. Measured: 1e-6 and 1e-3; a wrong graph is off by 1e-1 and more. In 8 bits the
pictures are the proof, and this finds a graph that is broken."""
CHECK_PROMPTS: Final = ("a red heart above a blue house", "a yellow star at night")
"""The fixed prompts of every check: within papercut's vocabulary, and plain English for any other model."""
IDENTICAL_DB: Final = 100.0
"""PSNR that stands for images without any difference; uint8 images that differ at all stay below it."""


def output_errors(
    found: np.ndarray, expected: np.ndarray, *, where: str, reference: str, hint: str
) -> tuple[float, float]:
    """(largest absolute error, norm of the difference over the norm). Raises ParityError for no numbers.

    ``where`` and ``reference`` name the two sides in messages, ``hint`` is what to do.
    """
    if found.shape != expected.shape:
        raise ParityError(f"{where} has shape {found.shape}, not {expected.shape} as in {reference}", hint=hint)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(expected).all():
        raise ParityError(
            f"{where} contains NaN or infinity in {reference} as well", hint="check the student: tiue generate"
        )
    if not np.isfinite(found).all():
        raise ParityError(f"{where} contains NaN or infinity", hint=f"try --precision fp32; {hint}")
    difference = found - expected
    norm = float(np.linalg.norm(expected))
    relative = float(np.linalg.norm(difference)) / norm if norm > 0 else float(np.abs(difference).max())
    return float(np.abs(difference).max()), relative


def check_relative_error(relative: float, *, where: str, precision: Precision, hint: str) -> None:
    """Raises ParityError where an output is further off than its precision allows."""
    if relative > (allowed := ALLOWED_RELATIVE_ERROR[precision]):
        raise ParityError(
            f"{where} has a relative error of {relative:.1e}; {allowed:.0e} is allowed in {precision}",
            hint=hint if precision == "fp32" else f"try --precision fp32; {hint}",
        )


def check_image(
    image: np.ndarray, expected: np.ndarray, *, where: str, reference: str, precision: Precision, hint: str
) -> float:
    """PSNR in dB of an image (H, W, 3) uint8. Raises ParityError for one colour only, or below the precision's bar."""
    hint = hint if precision == "fp32" else f"try --precision fp32; {hint}"
    if image.shape != expected.shape:
        raise ParityError(f"{where} has shape {image.shape}, not {expected.shape} as in {reference}", hint=hint)
    if image.std() == 0:
        raise ParityError(f"{where} is a single colour", hint=hint)
    found_db = psnr_db(image, expected)
    if found_db < (required := REQUIRED_PSNR_DB[precision]):
        raise ParityError(
            f"{where} differs from {reference}'s: PSNR {found_db:.1f} dB, and {precision} needs {required:.0f}",
            hint=hint,
        )
    return found_db


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images; IDENTICAL_DB where nothing differs."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return IDENTICAL_DB if error == 0 else min(IDENTICAL_DB, 10 * math.log10(255**2 / error))
