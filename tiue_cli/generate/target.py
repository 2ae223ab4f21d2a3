"""An exported student as the model of ``tiue generate``: what a plan needs to know of it, from its manifest alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiue_cli.errors import ModelFolderError, UsageError
from tiue_cli.files.exports import ENGINE_MANIFEST, ExportManifest, is_export_folder, read_export_manifest
from tiue_cli.model.hub import EMBEDDED_NAMES


@dataclass(frozen=True)
class ExportInfo:
    """An export folder: the counterpart of ``model.folder.ModelInfo``; ``engine``: the engine folder that was named."""

    path: Path
    manifest: ExportManifest
    engine: Path | None = None
    kind: Literal["student"] = "student"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about it."""
        return self.manifest.notes

    @property
    def text_tokens(self) -> int:
        """Length of the token sequence, start and end token included."""
        return self.manifest.text_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels (H, W) where none are asked for."""
        return self.manifest.default_size

    @property
    def model_id(self) -> str:
        """32 hexadecimal digits of graphs, weights and timesteps; figures and engines beside them do not count."""
        lines = [*(graph.digest for graph in self.manifest.graphs), self.manifest.tokenizer.sha256]
        lines += [repr(combine) for combine in self.manifest.combines]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def find_export(source: str) -> ExportInfo | None:
    """The export folder that ``source`` names, itself or by one of its engine folders; None where it is no export.

    Raises ManifestError for a damaged manifest, ModelFolderError for an engine folder without its export.
    """
    path = Path(source).expanduser()
    if source in EMBEDDED_NAMES:  # whatever folder of that name lies here
        return None
    if is_export_folder(path):
        return ExportInfo(path, read_export_manifest(path))
    if not (path / ENGINE_MANIFEST).is_file():
        return None
    parent = path.resolve().parent
    if not is_export_folder(parent):
        raise ModelFolderError(
            f"{path} holds TensorRT engines, and their export is not in {parent}",
            hint="engines run inside the export folder that they were built from: move it back there",
        )
    return ExportInfo(parent, read_export_manifest(parent), engine=path)


def backend_for(info: ExportInfo | None, source: str, *, backend: str) -> str:
    """``torch``, ``onnx`` or ``trt`` for what ``--backend`` says of a model. Raises UsageError for a misfit."""
    if info is None:
        if backend in ("auto", "torch"):
            return "torch"
        option = " --trt" if backend == "trt" else ""
        raise UsageError(
            f"--backend {backend} runs exported students, and {source} is a model folder",
            hint=f"export it, and give --model that folder: tiue export {source}{option}",
        )
    if backend == "torch":
        raise UsageError(
            f"--backend torch runs model folders, and {source} is an export",
            hint=f"give the student that it was exported from: --model {info.manifest.student.source}",
        )
    if backend == "auto":
        return "onnx" if info.engine is None else "trt"
    return backend


def check_export_options(
    info: ExportInfo, *, backend: str, vae: str | None, dtype: str, device: str, provider: str
) -> str:
    """ONNX Runtime's provider for what the options say together. Raises UsageError for what an export cannot change."""
    precision = info.manifest.precision
    if vae is not None:
        raise UsageError(
            "the autoencoder is part of an export", hint=f"export with it: tiue export STUDENT --vae {vae}"
        )
    if dtype not in ("auto", precision):
        raise UsageError(
            f"{info.path} was exported in {precision}, and --dtype {dtype} is asked for",
            hint=f"export in it: tiue export STUDENT --precision {dtype}" if dtype != "bf16" else "leave --dtype out",
        )
    if backend == "trt" and device == "cpu":
        raise UsageError("TensorRT runs on a GPU, and --device cpu is asked for", hint="use --backend onnx")
    if device == "auto":
        return provider
    if provider != "auto" and (provider == "cpu") != (device == "cpu"):
        raise UsageError(f"--provider {provider} does not run on --device {device}", hint="leave one of them out")
    return device if provider == "auto" else provider
