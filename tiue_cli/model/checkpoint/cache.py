"""Checkpoint files that were named as models, converted once and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import ModelFolderError, full_installation
from tiue_cli.files.access import is_file
from tiue_cli.files.caches import user_cache
from tiue_cli.files.hashes import fingerprint_of
from tiue_cli.model.checkpoint.kinds import check_checkpoint, check_vae_checkpoint

FORMAT = 1
"""Of what lies in the cache: another number makes all of it anew."""


def checkpoint_folder(path: Path) -> Path:
    """The model folder that the file ``path`` is, converted at the first call. Raises ModelFolderError, OutputError."""
    check_checkpoint(path)
    folder = _place(path, "models")
    if not is_file(folder / "model_index.json", error=ModelFolderError):
        with full_installation("a single-file checkpoint"):
            from tiue_cli.model.checkpoint.convert import convert_checkpoint

        convert_checkpoint(path, folder)
    return folder


def vae_checkpoint_folder(path: Path) -> Path:
    """The autoencoder's folder that the file ``path`` is or holds. Raises ModelFolderError, OutputError."""
    check_vae_checkpoint(path)
    folder = _place(path, "autoencoders")
    if not is_file(folder / "config.json", error=ModelFolderError):
        with full_installation("a single-file autoencoder"):
            from tiue_cli.model.checkpoint.convert import convert_vae

        convert_vae(path, folder)
    return folder


def _place(path: Path, kind: str) -> Path:
    """By content, under a name that a reader of the cache understands."""
    found = fingerprint_of({"checkpoint": path}, error=ModelFolderError)
    return user_cache() / "checkpoints" / kind / f"{path.stem[:60]}-{found[:16]}-{FORMAT}"
