"""Which files make a model folder the model it is: what is hashed, and what its fingerprint samples.

The configs, the tokenizer and the weights that the loaders take (``weights.weight_files``), nothing else: a safety
checker, a stale copy of the weights or a single-file checkpoint beside them neither counts nor need be readable.
"""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import ModelFolderError
from tiue_cli.files.access import is_file, list_folder
from tiue_cli.files.hashes import fingerprint_of, sha256_of
from tiue_cli.files.students import STUDENT_MANIFEST
from tiue_cli.model.parts import part_folder
from tiue_cli.model.weights import WEIGHT_STEMS, weight_files

_TEXT_SUFFIXES = (".json", ".txt")


def model_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of what makes up a model or an autoencoder. Raises ModelFolderError."""
    return sha256_of(model_files(folder), error=ModelFolderError)


def model_fingerprint(folder: Path) -> str:
    """32 hexadecimal digits over the same files, sampled: milliseconds. Raises ModelFolderError."""
    return fingerprint_of(model_files(folder), error=ModelFolderError)


def unchanged_model(source: str, sha256: str) -> Path:
    """The folder of ``source``, if it still is the model that had this hash. Raises ModelFolderError."""
    from tiue_cli.model.hub import resolve_model  # above this module: an adapter student is put together there

    folder = resolve_model(source)
    if model_sha256(folder) != sha256:
        raise ModelFolderError(
            f"{folder} is another model than the one recorded: its hash differs", hint="find the original"
        )
    return folder


def model_files(folder: Path) -> dict[str, Path]:
    """What makes up a model folder, or the folder of an autoencoder alone. Raises ModelFolderError.

    The keys are the names that diffusers' layout has, wherever ``part_folder`` finds the files.
    """
    if not _is_file(folder / "model_index.json"):
        if _is_file(folder / "config.json"):
            return _component_files(folder, "vae", prefix="")
        return _component_files(folder / "vae", "vae", prefix="vae/")
    files = {name: folder / name for name in ("model_index.json", STUDENT_MANIFEST) if _is_file(folder / name)}
    for name in WEIGHT_STEMS:
        files |= _component_files(part_folder(folder, name), name, prefix=f"{name}/")
    for name in ("tokenizer", "scheduler"):
        files |= {
            f"{name}/{path.name}": path
            for path in list_folder(part_folder(folder, name), error=ModelFolderError)
            if path.suffix in _TEXT_SUFFIXES and not path.name.startswith(".") and _is_file(path)
        }
    return files


def _component_files(folder: Path, name: str, *, prefix: str) -> dict[str, Path]:
    weights = weight_files(folder, name=name)
    index = [] if weights.index_file is None else [weights.index_file]
    return {f"{prefix}{path.name}": path for path in (folder / "config.json", *index, *weights.files)}


def _is_file(path: Path) -> bool:
    return is_file(path, error=ModelFolderError)
