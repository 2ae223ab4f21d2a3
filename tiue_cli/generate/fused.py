"""Adapters for an export: its student is exported again with them in the weights, and the copy is kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tiue_cli.files.caches import user_cache
from tiue_cli.files.exports import ExportManifest, is_export_folder
from tiue_cli.files.png import LoraUse, same_effect
from tiue_cli.model.lora.source import exported_student


def fused_export(
    folder: Path,
    manifest: ExportManifest,
    model_id: str,
    uses: Sequence[LoraUse],
    *,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The export in ``folder`` with ``uses`` in its weights: made at the first call, which takes what an export takes.

    In the same precision, opset and sizes, under a name made of the hashes of both. ``note`` is told that it begins.
    Raises AdapterError where the student is not at hand any more, UsageError, and what exporting raises.
    """
    if same_effect(uses, manifest.student.loras):
        return folder
    found = user_cache() / "exports" / f"{folder.resolve().name}-{_key(model_id, uses)}"
    if is_export_folder(found):
        return found
    exported_student(folder, manifest)
    if note is not None:
        note(f"exporting {manifest.student.source} with {', '.join(use.name for use in uses)}, once: {found}")
    from tiue_cli.export.config import ExportConfig
    from tiue_cli.export.run import run_export

    run_export(
        ExportConfig(
            student=manifest.student.source,
            out=found,
            precision=manifest.precision,
            opset=manifest.opset,
            sizes=manifest.sizes,
            vae=manifest.student.vae_source,
            loras=tuple(use.option for use in uses),
            check=False,
        )
    )
    return found


def _key(model_id: str, uses: Sequence[LoraUse]) -> str:
    lines = [model_id, *(f"{use.sha256} {use.weight!r}" for use in uses)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
