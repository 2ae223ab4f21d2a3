"""An export folder as a Triton model repository: one ensemble for each K, and no loop, because one pass needs none.

    prompt, seed ─▶ tokenize ─▶ text_encoder ─▶ unet_encoder ─▶ unet_decoder_kK ─▶ vae_decoder ─▶ images

``timesteps`` (K) and ``weights`` (K + 1) have no batch dimension, and Triton's batching wants one on every input: they
become constants of the decoder, so K belongs to the repository and not to a request.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from tiue_cli import __version__
from tiue_cli.errors import ManifestError, UsageError
from tiue_cli.export.triton.pbtxt import Port, Step, TritonBackend, ensemble_config, model_config, port_of
from tiue_cli.files.atomic import atomic_folder
from tiue_cli.files.exports import GRAPHS, CombineSpec, ExportManifest, GraphSpec, check_files, read_export_manifest
from tiue_cli.files.hashes import sha256_file

TRITON_MANIFEST: Final = "tiue-triton.json"
MAX_BATCH: Final = 16
_CONSTANTS: Final = ("timesteps", "weights")


@dataclass(frozen=True)
class TritonResult:
    """The repository that was written, and the names of its ensembles."""

    folder: Path
    ensembles: tuple[str, ...]


def write_repository(
    export: Path,
    out: Path,
    *,
    backend: TritonBackend = "onnx",
    steps: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    max_batch: int = MAX_BATCH,
    overwrite: bool = False,
) -> TritonResult:
    """Write a repository for ``export`` to ``out``, aside and then renamed.

    ``steps`` are the K to offer, one ensemble each; none means the student's own. ``size`` (H, W) is that of the
    images; None means the export's default. Raises ManifestError for an export that is not whole, UsageError for K or a
    size that it lacks, OutputError.
    """
    manifest = read_export_manifest(export)
    size = manifest.default_size if size is None else size
    shape = manifest.latent_shape(size)
    combines = [manifest.combine(k) for k in dict.fromkeys(steps)] if steps else [manifest.combine()]
    if max_batch < 1:
        raise UsageError(f"a batch of {max_batch} is out of range", hint="give 1 or more")
    graphs = {name: manifest.graph(name, size=size) for name in GRAPHS}
    specs = [manifest.tokenizer, *(spec for graph in graphs.values() for spec in (graph.onnx, *graph.data))]
    check_files(export, specs, hint="write the folder again with tiue export")
    with atomic_folder(out, overwrite=overwrite, marker=TRITON_MANIFEST) as folder:
        _write_tokenize(folder, export, manifest, shape, max_batch=max_batch)
        for name, graph in graphs.items():
            if name != "unet_decoder":
                _write_graph(folder, export, graph, name=name, backend=backend, max_batch=max_batch)
        for combine in combines:
            name = decoder_name(combine.steps)
            graph = graphs["unet_decoder"]
            _write_graph(folder, export, graph, name=name, backend=backend, max_batch=max_batch, combine=combine)
            _write_ensemble(folder, graphs, combine, size, max_batch=max_batch)
        ensembles = tuple(ensemble_name(combine.steps) for combine in combines)
        _write_manifest(folder, manifest, backend=backend, size=size, ensembles=ensembles)
    return TritonResult(out, ensembles)


def ensemble_name(steps: int) -> str:
    """What a client asks for: ``tiue_k4``."""
    return f"tiue_k{steps}"


def decoder_name(steps: int) -> str:
    """``unet_decoder_k4``."""
    return f"unet_decoder_k{steps}"


def _version(folder: Path, model: str) -> Path:
    place = folder / model / "1"
    place.mkdir(parents=True)
    return place


def _program(name: str) -> bytes:
    return (files("tiue_cli.export.triton") / "models" / f"{name}.py").read_bytes()


def _write_tokenize(
    folder: Path, export: Path, manifest: ExportManifest, shape: tuple[int, int, int], *, max_batch: int
) -> None:
    place = _version(folder, "tokenize")
    shutil.copyfile(export / manifest.tokenizer.file, place / "tokenizer.json")
    (place / "settings.json").write_text(json.dumps({"latent_shape": shape}) + "\n", encoding="utf-8")
    (place / "model.py").write_bytes(_program("tokenize"))
    outputs = [Port("input_ids", "int64", (manifest.text_tokens,)), Port("noise", "float32", shape)]
    text = model_config("tokenize", _ASKED, outputs, backend="python", max_batch=max_batch)
    (folder / "tokenize" / "config.pbtxt").write_text(text, encoding="utf-8")


_ASKED: Final = (Port("prompt", "string", (1,)), Port("seed", "int64", (1,)))


def _write_graph(
    folder: Path,
    export: Path,
    graph: GraphSpec,
    *,
    name: str,
    backend: TritonBackend,
    max_batch: int,
    combine: CombineSpec | None = None,
) -> None:
    place = _version(folder, name)
    for spec in graph.data:
        # The graph names its weights' file, so that keeps its name; only the graph is called model.onnx.
        shutil.copyfile(export / spec.file, place / Path(spec.file).name)
    if combine is None:
        shutil.copyfile(export / graph.onnx.file, place / "model.onnx")
    else:
        _save_with_constants(export / graph.onnx.file, place / "model.onnx", combine)
    if backend == "python":
        (place / "model.py").write_bytes(_program("graph"))
    inputs = [port_of(spec) for spec in graph.inputs if combine is None or spec.name not in _CONSTANTS]
    outputs = [port_of(spec) for spec in graph.outputs]
    text = model_config(name, inputs, outputs, backend=backend, max_batch=max_batch)
    (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")


def _save_with_constants(source: Path, target: Path, combine: CombineSpec) -> None:
    """The decoder with ``timesteps`` and ``weights`` as constants; its external weights stay where they are."""
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(source, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ManifestError(f"{source} cannot be read as ONNX: {error}", hint="export the student again") from error
    values: dict[str, Any] = {
        "timesteps": np.array(combine.timesteps, dtype=np.int64),
        "weights": np.array(combine.weights, dtype=np.float32),
    }
    for port in [port for port in model.graph.input if port.name in values]:
        model.graph.input.remove(port)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values[port.name], port.name))
    target.write_bytes(model.SerializeToString())


def _write_ensemble(
    folder: Path, graphs: dict[Any, GraphSpec], combine: CombineSpec, size: tuple[int, int], *, max_batch: int
) -> None:
    name = ensemble_name(combine.steps)
    # Triton wants a version folder of an ensemble as well, and in it nothing.
    _version(folder, name)
    steps = [Step("tokenize", ("prompt", "seed"), ("input_ids", "noise"))]
    for graph_name, graph in graphs.items():
        inputs = tuple(spec.name for spec in graph.inputs if spec.name not in _CONSTANTS)
        outputs = tuple(spec.name for spec in graph.outputs)
        model = decoder_name(combine.steps) if graph_name == "unet_decoder" else str(graph_name)
        steps.append(Step(model, inputs, outputs))
    images = Port("images", "uint8", (*size, 3))
    text = ensemble_config(name, _ASKED, [images], steps, max_batch=max_batch)
    (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")


def _write_manifest(
    folder: Path,
    manifest: ExportManifest,
    *,
    backend: TritonBackend,
    size: tuple[int, int],
    ensembles: tuple[str, ...],
) -> None:
    hashes = {file.relative_to(folder).as_posix(): sha256_file(file) for file in folder.rglob("*") if file.is_file()}
    data = {
        "format_version": 1,
        "kind": "triton",
        "student": manifest.student.source,
        "backend": backend,
        "size": list(size),
        "ensembles": list(ensembles),
        "tiue_version": __version__,
        "files": dict(sorted(hashes.items())),
    }
    (folder / TRITON_MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
