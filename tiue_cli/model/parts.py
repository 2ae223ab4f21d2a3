"""Where the parts of a model folder lie: in the folder itself, as diffusers lays it out.

The models in the package share what is the same in all of them, so that it is stored and shipped once: what one of
them lacks lies in ``shared/`` beside it. A folder anywhere else has all its parts of its own.
"""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import ModelFolderError
from tiue_cli.files.access import is_folder

PACKAGED = Path(__file__).resolve().parent.parent / "papercut" / "model"
"""The models in the package: ``teacher/``, ``student/``, and ``shared/`` with the parts of both."""
SHARED = "shared"


def part_folder(model: Path, name: str) -> Path:
    """The folder of a component, the tokenizer or the scheduler of ``model``; whether it is there is not asked."""
    own = model / name
    if is_folder(own, error=ModelFolderError) or model.resolve().parent != PACKAGED.resolve():
        return own
    return PACKAGED / SHARED / name
