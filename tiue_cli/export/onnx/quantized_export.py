"""An export in floats becomes one in 8 bits that proves itself: against its own pictures, and papercut's checker.

pictures in floats ─ calibrate ─▶ quantise each graph ─▶ the same pictures in 8 bits ─ near enough? ─▶ record
                                     ▲                                                │ no
                                     └───────────── keep more layers in floats ◀──────┘
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.base.moments import gaussian_distance
from tiue_cli.distill.data.prompts import read_training_prompts
from tiue_cli.errors import ParityError
from tiue_cli.export.onnx.parity import PROVIDER
from tiue_cli.export.onnx.quantize import Kind, calibrate, quantize_graph
from tiue_cli.export.tolerance import REQUIRED_PSNR_DB, psnr_db
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    AttributeShare,
    ExportManifest,
    GraphName,
    GraphSpec,
    KeptLayer,
    QuantizationSpec,
    Shares,
)
from tiue_cli.files.manifests import write_json
from tiue_cli.model.hub import EMBEDDED_TEACHER
from tiue_cli.model.noise import draw_noise
from tiue_cli.papercut.checker import embed
from tiue_cli.papercut.evaluation import balanced_specs, prompt_following, shipped_checker
from tiue_cli.papercut.scenes import render

PICTURES: Final = 8
"""Pictures that are compared with those before; of large models two."""
CAPTIONS: Final = 512
MORE_LAYERS: Final = (0, 4, 12, 28)
"""How many layers beyond those that stand out stay in floats, in turn, until the pictures hold."""
SHARES_OF_FULL: Final = 0.99
"""Each attribute that papercut's checker reads must be right in this share of the cases before at least."""
DISTANCE_OF_FULL: Final = 1.15
"""The Fréchet distance may be this much of that before at most."""
_SCHEMES: Final[Mapping[Kind, tuple[str, str]]] = {
    "int8": (
        "int8, symmetric, a scale a channel, 7 bits used",
        "int8, symmetric, a scale a tensor, from minimum and maximum",
    ),
    "fp8": (
        "float8 E4M3, a scale a tensor, from the largest magnitude",
        "float8 E4M3, a scale a tensor, from minimum and maximum; inputs of layers only",
    ),
}
"""Weights and activations, in words."""
_RENDER_SEED: Final = 7_000_000
_BATCH: Final = 16
_FEATURE_SCALE: Final = 8.0  # the unit of the distances that tiue bench reports
_HINT = "use --precision fp32 or fp16; or give prompts like those that will be drawn: --calibration FILE"


@dataclass(frozen=True)
class QuantizeRequest:
    """Prompts to calibrate with (a file as ``tiue distill`` reads it, or ``papercut``), how many images, and graphs."""

    calibration: str
    images: int
    graphs: tuple[GraphName, ...]
    kind: Kind = "int8"


def quantize_export(
    folder: Path, manifest: ExportManifest, request: QuantizeRequest, *, say: Callable[[str], None]
) -> tuple[tuple[GraphSpec, ...], QuantizationSpec]:
    """Bring the graphs of ``request`` in ``folder`` to 8 bits; returns all graphs, and how it was done.

    ``manifest`` is that of the folder in floats. Raises PromptError for the prompts, ParityError where the pictures are
    too far from those, MissingDependencyError.
    """
    kind, before = request.kind, manifest.precision
    prompts = read_training_prompts(request.calibration, limit=request.images).prompts
    papercut = manifest.student.teacher == EMBEDDED_TEACHER
    write_json(folder / EXPORT_MANIFEST, manifest)
    say(f"pictures in {before}")
    pictures = _pictures(folder, prompts, count=PICTURES if papercut else 2)
    drawn = _papercut_pictures(folder) if papercut else None
    # Inside the folder that is being written, so that a kill leaves one thing to remove.
    with tempfile.TemporaryDirectory(dir=folder, prefix="quantize.") as scratch:
        say(f"calibrate with {request.images} images")
        calibration = calibrate(folder, prompts, request.images, Path(scratch))
        for more in MORE_LAYERS:
            graphs, kept, layers = _quantize_graphs(
                folder,
                manifest,
                request.graphs,
                functools.partial(
                    quantize_graph, folder, calibration=calibration, scratch=Path(scratch), kind=kind, more=more
                ),
                say,
            )
            changed = manifest.model_copy(update={"graphs": graphs, "precision": kind})
            write_json(folder / EXPORT_MANIFEST, changed)
            say(f"pictures in {kind}")
            worst = min(map(psnr_db, _pictures(folder, prompts, count=len(pictures)), pictures))
            if worst >= REQUIRED_PSNR_DB[kind]:
                break
            say(f"{worst:.1f} dB from {before}'s, {REQUIRED_PSNR_DB[kind]:.0f} needed, {len(kept)} layers kept")
        else:
            raise ParityError(
                f"a picture in {kind} is {worst:.1f} dB from {before}'s, and {REQUIRED_PSNR_DB[kind]:.0f} are needed,"
                f" with {len(kept)} of {layers} layers in {before}",
                hint=_HINT,
            )
    shares = None if drawn is None else _shares(drawn, _papercut_pictures(folder), kind=kind)
    weights, activations = _SCHEMES[kind]
    return graphs, QuantizationSpec(
        quantizer=f"ONNX Runtime {onnxruntime.__version__}, quantize_static",
        weights=weights,
        activations=activations,
        calibration_images=request.images,
        calibration_prompts=len(prompts),
        calibration_source=request.calibration,
        graphs=request.graphs,
        layers=layers,
        kept=kept,
        image_psnr_db=worst,
        papercut=shares,
    )


def _quantize_graphs(
    folder: Path,
    manifest: ExportManifest,
    names: Sequence[GraphName],
    quantize: Callable[[GraphSpec], tuple[GraphSpec, tuple[KeptLayer, ...], int]],
    say: Callable[[str], None],
) -> tuple[tuple[GraphSpec, ...], tuple[KeptLayer, ...], int]:
    """All graphs with those of ``names`` in 8 bits, the layers that were kept, and how many there are."""
    graphs: list[GraphSpec] = []
    kept: list[KeptLayer] = []
    layers = 0
    for graph in manifest.graphs:
        if graph.name not in names:
            graphs.append(graph)
            continue
        say(f"{graph.onnx.file.removesuffix('.onnx')}: quantise")
        made, stayed, count = quantize(graph)
        graphs.append(made)
        kept += stayed
        layers += count
    used = {spec.file for graph in graphs for spec in graph.data}
    for graph in manifest.graphs:
        for spec in graph.data:
            if spec.file not in used:
                (folder / spec.file).unlink(missing_ok=True)
    return tuple(graphs), tuple(kept), layers


def _pictures(folder: Path, prompts: Sequence[str], *, count: int) -> list[np.ndarray]:
    """``count`` pictures (H, W, 3) uint8 of the default size, from seeds that nothing was calibrated with."""
    with OnnxBackend(folder, provider=PROVIDER) as backend:
        latent = backend.latent_shape(backend.default_size)
        return [
            backend.generate([prompts[-1 - seed % len(prompts)]], draw_noise([seed], latent))[0]
            for seed in range(count)
        ]


# --- papercut ------------------------------------------------------------------------------------------------------


def _papercut_pictures(folder: Path) -> np.ndarray:
    """(CAPTIONS, 64, 64, 3) uint8 of the held-out captions."""
    prompts = [spec.caption for spec in balanced_specs(CAPTIONS)]
    with OnnxBackend(folder, provider=PROVIDER) as backend:
        latent = backend.latent_shape(backend.default_size)
        return np.concatenate(
            [
                backend.generate(prompts[start : start + _BATCH], draw_noise(range(start, start + _BATCH), latent))
                for start in range(0, CAPTIONS, _BATCH)
            ]
        )


def _shares(before: np.ndarray, after: np.ndarray, *, kind: Kind) -> Shares:
    """The checker's shares and the Fréchet distances of both. Raises ParityError where 8 bits cost too much."""
    specs = balanced_specs(CAPTIONS)
    renders = embed(shipped_checker(), render(specs, _RENDER_SEED)).astype(np.float64) / _FEATURE_SCALE

    def distance(images: np.ndarray) -> float:
        features = embed(shipped_checker(), images).astype(np.float64) / _FEATURE_SCALE
        return gaussian_distance(
            features.mean(0), np.cov(features, rowvar=False), renders.mean(0), np.cov(renders, rowvar=False)
        )

    found, full = prompt_following(after, specs), prompt_following(before, specs)
    shares = Shares(
        captions=CAPTIONS,
        attributes=tuple(AttributeShare(name=name, quantized=found[name], full=full[name]) for name in full),
        frechet_distance=distance(after),
        frechet_distance_full=distance(before),
    )
    for name in ("background", "objects", "colors", "relation"):
        if found[name] < (wanted := SHARES_OF_FULL * full[name]):
            raise ParityError(
                f"in {kind} papercut's checker finds {name} right in {found[name]:.3f} of {CAPTIONS} pictures, and"
                f" {wanted:.3f} are needed",
                hint=_HINT,
            )
    if shares.frechet_distance > DISTANCE_OF_FULL * shares.frechet_distance_full:
        raise ParityError(
            f"in {kind} the Fréchet distance is {shares.frechet_distance:.2f}, and {DISTANCE_OF_FULL} times the"
            f" {shares.frechet_distance_full:.2f} before it are allowed",
            hint=_HINT,
        )
    return shares
