"""The LoRAs that a server lets its clients use: those in one folder, by their names and by nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tiue_cli.errors import AdapterError, TiueError, UsageError
from tiue_cli.files.access import is_folder, list_folder
from tiue_cli.model.lora.files import find_lora, parse_lora

_SUFFIX = ".safetensors"


class LoraShelf:
    """The folder's ``NAME.safetensors`` and ``NAME/`` as adapters called NAME; None is an empty shelf.

    What a client sends is compared with names that were listed, and never becomes a path.
    """

    def __init__(self, folder: Path | None) -> None:
        """Check every adapter, so that none fails at its first request. Raises AdapterError."""
        self._folder = folder
        if folder is not None and not is_folder(folder, error=AdapterError):
            raise AdapterError(f"--lora-dir {folder} is not a folder", hint="give the folder that holds the LoRAs")
        for path in self._paths().values():
            find_lora(str(path))

    @property
    def names(self) -> tuple[str, ...]:
        """What is there now, sorted; what is put there later counts from then on."""
        return tuple(self._paths())

    def resolve(self, texts: Iterable[str]) -> tuple[str, ...]:
        """``NAME[:WEIGHT]`` as ``tiue generate --lora`` takes them. Raises UsageError for a name that is not there."""
        paths, found = self._paths(), []
        for text in texts:
            name, weight = (text, 1.0) if text in paths else parse_lora(text)
            if name not in paths:
                raise UsageError(f"this LoRA is not served; there is: {', '.join(paths) or 'none'}")
            try:
                find_lora(str(paths[name]))
            except TiueError as error:  # put there after the start; where it lies is nobody's business
                raise UsageError(f"LoRA {name} cannot be used") from error
            found.append(f"{paths[name]}:{weight!r}")
        return tuple(found)

    def _paths(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        entries = list_folder(self._folder, error=AdapterError)
        found = {path.name: path for path in entries if path.is_dir() and not path.name.startswith(".")}
        files = [path for path in entries if path.suffix == _SUFFIX and not path.name.startswith(".")]
        found |= {path.name.removesuffix(_SUFFIX): path for path in files}
        return dict(sorted(found.items()))
