"""Whether a faster way to run a student still draws the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tiue_cli.bench.report.schema import ParityRecord
from tiue_cli.export.tolerance import IDENTICAL_DB, REQUIRED_PSNR_DB, psnr_db

REQUIRED_DB: Final[dict[str, float]] = {
    "fp32": REQUIRED_PSNR_DB["fp32"],
    "fp16": REQUIRED_PSNR_DB["fp16"],
    "bf16": REQUIRED_PSNR_DB["fp16"],
}
"""The export's bars; bf16 has fewer digits than fp16 and is held to the same."""


def compare_images(pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, reference: str, precision: str) -> ParityRecord:
    """The worst picture of all batches; each pair holds (B, H, W, 3) uint8 of the subject and of its reference.

    A picture of one colour only shows nothing, and does not pass.
    """
    worst_db, passed = IDENTICAL_DB, True
    for images, expected in pairs:
        if images.shape != expected.shape:
            return ParityRecord(reference=reference, psnr_db=0.0, required_db=REQUIRED_DB[precision], passed=False)
        for image, wanted in zip(images, expected, strict=True):
            worst_db = min(worst_db, psnr_db(image, wanted))
            passed = passed and image.std() > 0
    return ParityRecord(
        reference=reference,
        psnr_db=None if worst_db >= IDENTICAL_DB else worst_db,
        required_db=REQUIRED_DB[precision],
        passed=passed and worst_db >= REQUIRED_DB[precision],
    )
