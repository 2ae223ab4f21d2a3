"""Put a model folder into the package, whose models keep what is the same in all of them once, in ``shared/``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tiue_cli.model.folder import COMPONENTS
from tiue_cli.model.parts import PACKAGED, SHARED

_WHERE = ("_name_or_path", "is_local", "local_files_only")
_BY_WHAT = ("_diffusers_version", "transformers_version")
"""Fields of configs that say nothing about the model: where the weights lay, and what wrote them."""


def package_model(folder: Path, name: str, *, package: Path = PACKAGED) -> Path:
    """Move the whole model ``folder`` into the package as ``name``; parts equal to the shared ones are left out."""
    shared, target = package / SHARED, package / name
    forget_places(folder)
    for part in COMPONENTS:
        if same_part(folder / part, shared / part):
            shutil.rmtree(folder / part)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(folder, target)
    return target


def share_parts(folder: Path, *, package: Path = PACKAGED) -> None:
    """Make the text encoder, tokenizer, autoencoder and scheduler of the whole model ``folder`` the shared ones.

    A packaged model that was made with others gets those as its own first, so that it draws what it drew.
    """
    shared = package / SHARED
    models = [model for model in package.iterdir() if model != folder and (model / "model_index.json").is_file()]
    forget_places(folder)
    for part in COMPONENTS:
        if part == "unet" or same_part(folder / part, shared / part):
            continue
        for model in models:
            if (shared / part).is_dir() and not (model / part).is_dir():
                shutil.copytree(shared / part, model / part)
        shutil.rmtree(shared / part, ignore_errors=True)
        shutil.copytree(folder / part, shared / part)


def same_part(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files; JSON may differ in where and by what it was written."""
    if not (one.is_dir() and other.is_dir()):
        return False
    names = _files(one)
    return names == _files(other) and all(_content(one / name) == _content(other / name) for name in names)


def forget_places(folder: Path) -> None:
    """Take out of the configs below ``folder`` where on this disk the weights lay."""
    for file in folder.rglob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in _WHERE}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _content(file: Path) -> Any:
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in (*_WHERE, *_BY_WHAT)}
