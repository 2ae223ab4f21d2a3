"""A quick fingerprint of a model folder: tells two models apart in milliseconds.

For records and for "was this made by the same model?"; a sample of the weights, so proof against mix-ups, not against
forgery. The full hash is ``artifacts.sha256_folder``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS = ".safetensors"
BLOCKS = 256
BLOCK_BYTES = 4096


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits over configs, tokenizer files (whole) and weights (256 blocks of 4 KiB a file).

    Any retraining moves nearly every weight, and a change of 5 % of them escapes with probability 2e-6. Names are
    relative to ``folder``: the place does not count, nor do hidden files, READMEs or images.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*"), key=lambda file: file.relative_to(folder).as_posix()):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or file.suffix not in {WEIGHTS, ".json", ".txt"} or not file.is_file():
            continue
        digest.update(f"{name.as_posix()}\0{file.stat().st_size}\n".encode())
        digest.update(_sample(file))
    return digest.hexdigest()[:32]


def _sample(file: Path) -> bytes:
    size_bytes = file.stat().st_size
    if file.suffix != WEIGHTS or size_bytes <= BLOCKS * BLOCK_BYTES:
        return hashlib.sha256(file.read_bytes()).digest()
    digest = hashlib.sha256()
    stride = (size_bytes - BLOCK_BYTES) // (BLOCKS - 1)
    with file.open("rb") as weights:
        for block in range(BLOCKS):
            weights.seek(block * stride)
            digest.update(weights.read(BLOCK_BYTES))
    return digest.digest()
