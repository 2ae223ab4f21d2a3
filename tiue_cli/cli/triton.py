"""``tiue export --triton``: a model repository from an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiue_cli.cli.console import Console
from tiue_cli.errors import ManifestError, UsageError
from tiue_cli.export.triton.pbtxt import TritonBackend
from tiue_cli.files.access import has_file
from tiue_cli.files.engines import ENGINE_MANIFEST
from tiue_cli.files.exports import is_export_folder

TRITON = "Triton"


def check_triton_options(
    triton: Path | None, backend: TritonBackend, steps: Sequence[int] | None, *, trt: bool
) -> None:
    """Raise UsageError for options that go with ``--triton`` alone, and for what does not go with it."""
    if triton is None:
        if backend != "onnx" or steps:
            option = "--steps" if steps else "--triton-backend"
            raise UsageError(f"{option} is for Triton's repositories", hint="add --triton FOLDER")
    elif trt:
        raise UsageError(
            "--trt builds plans for this machine, and Triton's server builds its own",
            hint="leave --trt out, and give --triton-backend tensorrt",
        )


def export_of(source: Path) -> Path | None:
    """The export folder that ``source`` is, or lies in as an engine folder; None for a student."""
    if is_export_folder(source):
        return source
    parent = source.resolve().parent
    return parent if has_file(source / ENGINE_MANIFEST, error=ManifestError) and is_export_folder(parent) else None


def run_triton(
    export: Path,
    out: Path,
    console: Console,
    *,
    backend: TritonBackend,
    steps: Sequence[int] | None,
    sizes: Sequence[tuple[int, int]],
    overwrite: bool,
) -> None:
    """Write the repository and show where it is and what to ask it for."""
    from tiue_cli.export.triton.repository import write_repository

    if len(sizes) > 1:
        raise UsageError("a Triton repository draws one size", hint="give --size once, and write a repository for each")
    size = sizes[0] if sizes else None
    result = write_repository(export, out, backend=backend, steps=steps or (), size=size, overwrite=overwrite)
    console.path(str(result.folder))
    console.document({"folder": str(result.folder), "ensembles": list(result.ensembles)})
    console.summary(f"ensembles: {', '.join(result.ensembles)}; next: tritonserver --model-repository={result.folder}")
