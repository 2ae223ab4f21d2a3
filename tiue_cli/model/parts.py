"""Where the parts of a model folder lie: in the folder itself, as diffusers lays it out.

The models in the package share what is the same in all of them, so that it is stored and shipped once: what one of
them lacks lies in ``shared/`` beside it. A folder anywhere else has all its parts of its own.
"""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import ModelFolderError
from tiue_cli.files.access import is_file, is_folder
from tiue_cli.files.exports import EXPORT_MANIFEST

PACKAGED = Path(__file__).resolve().parent.parent / "papercut" / "model"
"""The models in the package: ``teacher/``, ``student/``, ``shared/`` with parts of both, and the student's graphs."""
SHARED, STUDENT = "shared", "student"


def part_folder(model: Path, name: str) -> Path:
    """The folder of a component, the tokenizer or the scheduler of ``model``; whether it is there is not asked."""
    own = model / name
    if is_folder(own, error=ModelFolderError) or model.resolve().parent != PACKAGED.resolve():
        return own
    return PACKAGED / SHARED / name


def packaged_graphs(model: Path) -> Path | None:
    """The folder with the graphs of the packaged student, where ``model`` is that one; None for any other.

    An export whose weights are those of ``student/`` and ``shared/``, so it lies above both. Where an installer has put
    links in place of files there is none: runtimes refuse weights behind a link that leads out of the folder.
    """
    manifest = PACKAGED / EXPORT_MANIFEST
    if model.resolve() != (PACKAGED / STUDENT).resolve() or not is_file(manifest, error=ModelFolderError):
        return None
    return None if manifest.is_symlink() else PACKAGED
