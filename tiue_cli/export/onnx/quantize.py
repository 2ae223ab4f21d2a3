"""8-bit graphs: ranges from the student's own features, standard Q/DQ ONNX, and what is sensitive left in floats.

    graphs in floats ─ prompts, noise ─▶ inputs of each graph ─▶ ranges ─▶ Q/DQ graph ─ sweep ─▶ layers kept ─▶ again

The quantiser is ONNX Runtime's. Weights are int8 a channel, activations int8 a tensor, both symmetric, and biases stay
in fp32: what ONNX Runtime, OpenVINO and TensorRT (explicit quantisation) all take. Products of two activations, as in
attention, norms and the weighted sum are not quantised. In float8, for TensorRT on Hopper and Ada, the rest is in fp16.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx

from tiue_cli.backends.onnx_attention import fuse_attention
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.errors import MissingDependencyError
from tiue_cli.export.onnx.float8 import as_float8
from tiue_cli.export.onnx.sensitivity import gated_layers, layer_errors
from tiue_cli.export.onnx.trace import INLINE_BYTES, file_spec
from tiue_cli.files.exports import GraphName, GraphSpec, KeptLayer
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.quantization import CALIBRATION_BATCH, LayerError, sensitive

LAYERS: Final = ("Conv", "Gemm", "MatMul")
"""Operators with weights: what is computed in 8 bits."""
CALIBRATION_SEED: Final = 2**32
"""Noise of the first calibration image; far from the seeds that checks draw with."""
SWEEP_ROWS: Final = 1
"""Calibration batches that the sweep measures on."""

Kind = Literal["int8", "fp8"]


@dataclass(frozen=True)
class Calibration:
    """Inputs of every graph, one file a run, in the order in which they were drawn."""

    folder: Path

    def files(self, graph: GraphSpec) -> list[Path]:
        """The recorded inputs of ``graph``."""
        return sorted(self.folder.glob(f"{graph.onnx.file}.*.npz"))

    def rows(self, graph: GraphSpec, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Inputs of ``graph`` by name, run by run."""
        for path in self.files(graph)[:limit]:
            with np.load(path) as data:
                yield {name: data[name] for name in data.files}


def calibrate(export: Path, prompts: Sequence[str], images: int, folder: Path) -> Calibration:
    """Draw ``images`` of ``prompts`` with the graphs in floats and record in ``folder`` what each graph is fed.

    Every fixed size and the largest K get their share; on disk, because a UNet's features do not fit in memory.
    """
    with _Recorder(export, folder) as backend:
        sizes = backend.manifest.sizes or (backend.default_size,)
        for size in sizes:
            latent = backend.latent_shape(size)
            batch = calibration_batch(latent)
            for start in range(0, images, batch):
                numbers = range(start, min(images, start + batch))
                noise = draw_noise([CALIBRATION_SEED + number for number in numbers], latent)
                backend.generate([prompts[number % len(prompts)] for number in numbers], noise)
    return Calibration(folder)


def calibration_batch(latent: tuple[int, ...]) -> int:
    """Images that are drawn at once for latents (C, h, w).

    Ranges do not depend on it, memory does: a row's self-attention holds (h·w)² products a head, so four images of 512
    pixels would take 17 GB (of Stable Diffusion 1.5, K = 4), and one takes 4.
    """
    _, height, width = latent
    return max(1, min(CALIBRATION_BATCH, 1024 // (height * width)))


class _Recorder(OnnxBackend):
    """ONNX Runtime on the CPU, writing down what goes into each graph."""

    def __init__(self, export: Path, folder: Path) -> None:
        super().__init__(export, provider="cpu")
        self._records = folder
        self._count = 0

    def _call(self, opened: Any, graph: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            name: value if isinstance(value, np.ndarray) else self._array(value) for name, value in inputs.items()
        }
        np.savez(self._records / f"{graph.onnx.file}.{self._count:06}.npz", **arrays)
        self._count += 1
        return super()._call(opened, graph, inputs)


def quantize_graph(
    export: Path,
    graph: GraphSpec,
    calibration: Calibration,
    scratch: Path,
    *,
    kind: Kind = "int8",
    more: int = 0,
) -> tuple[GraphSpec, tuple[KeptLayer, ...], int]:
    """Replace one graph in the folder ``export`` by its 8-bit form; returns it, what stayed in floats, and of how many.

    ``more`` keeps so many of the next most sensitive layers as well. ``scratch`` holds the graph in floats and the
    ranges between calls. Raises MissingDependencyError for an ONNX Runtime that cannot.
    """
    source = _kept_source(export, graph, scratch)
    model = onnx.load(source)
    structural = structural_layers(model, graph.name)
    products = products_of_activations(model)
    quantized = functools.partial(_quantized, source, graph, calibration, scratch, kind=kind, products=products)
    whole = quantized(kept=structural)
    errors = _swept(model, whole, graph, calibration, scratch)
    kept = structural | {error.layer: "sensitive" for error in sensitive(errors, more=more)}
    if set(kept) != set(structural):
        whole = quantized(kept=kept)
    found = {error.layer: error.relative_error for error in errors}
    spec = _write(whole, export, graph, kind=kind)
    layers = tuple(
        KeptLayer.model_validate(
            {
                "graph": graph.name,
                "size": graph.size,
                "layer": name,
                "reason": reason,
                "relative_error": found.get(name),
            }
        )
        for name, reason in sorted(kept.items())
    )
    return spec, layers, len(weighted_layers(model))


# --- which layers --------------------------------------------------------------------------------------------------


def weighted_layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that multiply by weights, in order: what 8 bits are for."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node for node in model.graph.node if node.op_type in LAYERS and len(node.input) > 1 and node.input[1] in weights
    ]


def products_of_activations(model: onnx.ModelProto) -> list[str]:
    """Names of the products of two activations, as attention has them: they stay in floats.

    ONNX Runtime's quantiser leaves them out of its own operators only; its Q/DQ form takes every MatMul (1.31).
    """
    weighted = {node.name for node in weighted_layers(model)}
    return [node.name for node in model.graph.node if node.op_type in LAYERS and node.name not in weighted]


def structural_layers(model: onnx.ModelProto, graph: GraphName) -> dict[str, str]:
    """Layers that stay in fp32 whatever they measure, with the reason: published practice for diffusion models.

    The first and the last convolution of the UNet and of the autoencoder touch what is seen; the time embedding is K
    rows of nearly no arithmetic, and its error reaches every block.
    """
    layers = weighted_layers(model)
    names = {node.name for node in layers}
    convolutions = [node.name for node in layers if node.op_type == "Conv"]
    kept: dict[str, str] = {}
    if convolutions and graph in ("unet_encoder", "vae_decoder"):
        kept[convolutions[0]] = "first convolution"
    if convolutions and graph in ("unet_decoder", "vae_decoder"):
        kept[convolutions[-1]] = "last convolution"
    inputs = {value.name for value in model.graph.input}
    timed = {"timesteps"} & inputs
    others = inputs - timed
    if not timed:
        return kept
    for node in model.graph.node:
        used = {name for name in node.input if name in timed or name in others}
        if used & others:
            others |= set(node.output)
        elif used:
            timed |= set(node.output)
            if node.name in names:
                kept[node.name] = "time embedding"
    return kept


def _swept(
    model: onnx.ModelProto, whole: onnx.ModelProto, graph: GraphSpec, calibration: Calibration, scratch: Path
) -> list[LayerError]:
    """What each layer alone in 8 bits costs; measured once, read again where more layers are to be kept."""
    measured = scratch / f"{graph.onnx.file}.sweep.json"
    if measured.exists():
        return [LayerError(layer, error) for layer, error in json.loads(measured.read_text())]
    path = scratch / f"{graph.onnx.file}.sweep.onnx"
    gated = gated_layers(model, whole)
    rows = list(calibration.rows(graph, SWEEP_ROWS))
    if any(map(_is_of_large_pictures, rows)):
        # Attention's products are no layer's, and take a third of the time and most of the memory of a run.
        fuse_attention(gated.model)
    onnx.save(gated.model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=INLINE_BYTES)
    errors = layer_errors(path, gated, [_swept_inputs(row) for row in rows])
    measured.write_text(json.dumps([(error.layer, error.relative_error) for error in errors]))
    return errors


def _swept_inputs(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of one run of a sweep: of large pictures the UNet decoder takes its first timestep alone.

    Its weight is the largest; all K of Stable Diffusion 1.5 at 512 pixels, once a layer, would take a quarter of an
    hour on two cores.
    """
    if "timesteps" not in row or not _is_of_large_pictures(row):
        return row
    return row | {"timesteps": row["timesteps"][:1], "weights": row["weights"][:2]}


def _is_of_large_pictures(row: dict[str, np.ndarray]) -> bool:
    return any(value.ndim == 4 and calibration_batch(value.shape[1:]) == 1 for value in row.values())


# --- ONNX Runtime's quantiser --------------------------------------------------------------------------------------


def _quantized(
    source: Path,
    graph: GraphSpec,
    calibration: Calibration,
    scratch: Path,
    *,
    kind: Kind,
    products: Sequence[str],
    kept: Collection[str],
) -> onnx.ModelProto:
    """The graph with Q/DQ around every layer but those ``kept`` and the ``products`` of activations.

    Ranges are measured once and stay in ``scratch``.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if "calibration_cache_path" not in inspect.signature(quantize_static).parameters:
        raise MissingDependencyError(
            "8-bit exports need ONNX Runtime 1.31 or newer",
            hint="python -m pip install --upgrade 'onnxruntime-gpu>=1.31' (or onnxruntime)",
        )
    from tiue_cli.export.onnx.ranges import write_ranges  # which an older ONNX Runtime cannot import

    out, ranges = scratch / f"{graph.onnx.file}.8bit.onnx", scratch / f"{graph.onnx.file}.ranges.json"
    with _quiet_root():
        if not ranges.exists():
            large = any(map(_is_of_large_pictures, calibration.rows(graph, 1)))
            write_ranges(source, calibration.rows(graph), ranges, kinds=LAYERS, exclude=products, fused_attention=large)
        quantize_static(
            source,
            out,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            # Seven bits: CPUs without VNNI add pairs of products in 16 bits, which overflow with eight.
            reduce_range=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted({*kept, *products}),
            use_external_data_format=True,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=ranges,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                # Three digits of a float8 would cost more on the way out than they save.
                "OpTypesToExcludeOutputQuantization": list(LAYERS) if kind == "fp8" else [],
            },
        )
    made = onnx.load(out)
    return as_float8(made, onnx.load(source)) if kind == "fp8" else made


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """The quantiser advises its developers on the root logger; a failure still raises."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- files ---------------------------------------------------------------------------------------------------------


def _kept_source(export: Path, graph: GraphSpec, scratch: Path) -> Path:
    """The graph in floats, moved out of the folder at the first call: its 8-bit form takes the names."""
    path = scratch / graph.onnx.file
    if not path.exists():
        for spec in (graph.onnx, *graph.data):
            target = scratch / spec.file
            if not target.exists():
                (export / spec.file).replace(target)
    return path


def _write(model: onnx.ModelProto, export: Path, graph: GraphSpec, *, kind: Kind) -> GraphSpec:
    """Write an 8-bit graph under the name of its form in floats; the same model gives the same bytes."""
    path = export / graph.onnx.file
    data = path.with_name(f"{path.name}.data")
    for stale in (path, data):
        stale.unlink(missing_ok=True)
    model.producer_name, model.producer_version, model.doc_string = "tiue", "", ""
    del model.metadata_props[:]
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=INLINE_BYTES)
    return graph.model_copy(
        update={
            "precision": kind,
            "onnx": file_spec(path),
            "data": (file_spec(data),) if data.exists() else (),
        }
    )
