"""The student that an export was made of, where it still is that student: adapters are added to its weights."""

from __future__ import annotations

from pathlib import Path

from tiue_cli.errors import AdapterError, ModelFolderError, UsageError
from tiue_cli.files.exports import ExportManifest
from tiue_cli.model.identity import unchanged_model


def exported_student(folder: Path, manifest: ExportManifest) -> Path:
    """The folder of the student that the export in ``folder`` was made of.

    Raises UsageError where the export has adapters in its weights already, AdapterError where the student is not at
    hand any more.
    """
    student = manifest.student
    if student.loras:
        raise UsageError(
            f"{folder} has LoRAs in its weights already",
            hint=f"export its student, {student.source}, without them: tiue export {student.source} --out FOLDER",
        )
    try:
        return unchanged_model(student.source, student.sha256)
    except ModelFolderError as error:
        raise AdapterError(
            f"a LoRA on {folder} needs the student that it was exported from, and {student.source} cannot be used:"
            f" {error.message}",
            hint=f"where it is now: tiue export STUDENT --lora … --out {folder}-with-lora",
        ) from error
