"""What ``tiue export`` can be asked; the one place of its defaults. Light: the command line reads it for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tiue_cli.errors import UsageError
from tiue_cli.export.manifest import Precision, Size, is_export_folder

ENGINES: Final = Path("engines")
OPSETS: Final = range(18, 24)


@dataclass(frozen=True)
class ExportConfig:
    """What ``tiue export`` can be asked, with the defaults of its options.

    ``out`` None is ``engines/NAME``. ``sizes`` in pixels (H, W) fix height and width, each with graphs of its own;
    empty leaves them free. ``vae`` replaces the student's autoencoder.
    """

    student: str
    out: Path | None = None
    precision: Precision = "fp32"
    opset: int = 21
    sizes: tuple[Size, ...] = ()
    vae: str | None = None
    check: bool = True
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the export goes: ``out``, or ``engines/`` and the student folder's name or the hub id's last part."""
        if self.out is not None:
            return self.out
        path = Path(self.student).expanduser()
        return ENGINES / (path.resolve().name if path.exists() else self.student.rpartition("/")[2])

    def validate(self) -> None:
        """Refuse what cannot be, before anything heavy is loaded. Raises UsageError."""
        if self.opset not in OPSETS:
            raise UsageError(f"opset {self.opset} is impossible", hint=f"choose {OPSETS[0]} to {OPSETS[-1]}")
        if len(set(self.sizes)) != len(self.sizes):
            raise UsageError("the same size was given twice", hint="name each size once")
        if is_export_folder(Path(self.student).expanduser()):
            raise UsageError(
                f"{self.student} is an export already", hint="give the student folder; tiue inspect says which it was"
            )
