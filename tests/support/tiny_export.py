"""A hand-made export folder of a few kilobytes: the four graphs with the names of the format, and arithmetic that mixes
everything that enters. Written in a blink, for tests that are about what comes after the export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from tiue_cli import __version__
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    TOKENIZER,
    CombineSpec,
    ExportManifest,
    FileSpec,
    GraphName,
    GraphSpec,
    Precision,
    Size,
    StudentSource,
    TensorSpec,
    Versions,
)
from tiue_cli.files.hashes import sha256_file
from tiue_cli.files.manifests import write_json

TOKENS, WIDTH, CHANNELS, FACTOR = 8, 6, 4, 4
DEFAULT_SIZE = (32, 32)
OPSET = 18

_ONNX_TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
_WORDS = ("a", "red", "heart", "above", "blue", "house", "yellow", "star", "at", "night")


def write_tiny_export(
    folder: Path, *, precision: Precision = "fp16", sizes: Sequence[Size] = (), seed: int = 0, steps: int = 4
) -> ExportManifest:
    """Write the folder; ``sizes`` fix height and width, another ``seed`` is another student."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed)
    floats = "float16" if precision == "fp16" else "float32"
    graphs = [_text_encoder(folder, floats, weights)]
    for size in sizes or (None,):
        graphs += [
            _unet_encoder(folder, floats, weights, size, several=len(sizes) > 1),
            _unet_decoder(folder, floats, weights, size, several=len(sizes) > 1),
            _vae_decoder(folder, floats, weights, size, several=len(sizes) > 1),
        ]
    timesteps = (751, 501, 251, 1)
    manifest = ExportManifest(
        name=folder.name,
        student=StudentSource(
            source="tiny",
            sha256="0" * 64,
            teacher="tiny-teacher",
            license="unknown",
            training_steps=0,
            vae_class="AutoencoderTiny",
        ),
        versions=Versions(tiue=__version__, torch="0", onnx=onnx.__version__, onnxruntime="0"),
        opset=OPSET,
        precision=precision,
        encoder_timestep=timesteps[0],
        spacing="leading",
        prediction_type="epsilon",
        combines=tuple(
            CombineSpec(timesteps=timesteps[:number], weights=(0.9, *(-0.4 / (index + 1) for index in range(number))))
            for number in range(1, steps + 1)
        ),
        text_tokens=TOKENS,
        text_width=WIDTH,
        pad_token_id=0,
        latent_channels=CHANNELS,
        latent_factor=FACTOR,
        default_size=sizes[0] if sizes else DEFAULT_SIZE,
        sizes=tuple(sizes),
        tokenizer=_tokenizer(folder),
        graphs=tuple(graphs),
        parity=None,
    )
    write_json(folder / EXPORT_MANIFEST, manifest)
    return manifest


def _tokenizer(folder: Path) -> FileSpec:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, **{word: 1 + i for i, word in enumerate(_WORDS)}}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=0, pad_token="<pad>")
    tokenizer.save(str(folder / TOKENIZER))
    return _file(folder / TOKENIZER)


# --- the graphs ----------------------------------------------------------------------------------------------------


def _text_encoder(folder: Path, floats: str, weights: np.random.Generator) -> GraphSpec:
    table = weights.standard_normal((len(_WORDS) + 1, WIDTH))
    return _write(
        folder / "text_encoder.onnx",
        "text_encoder",
        inputs=[_spec("input_ids", "int64", "batch", TOKENS)],
        outputs=[_spec("text_states", floats, "batch", TOKENS, WIDTH)],
        nodes=[helper.make_node("Gather", ["table", "input_ids"], ["text_states"])],
        floats=floats,
        constants={"table": table.astype(floats)},
    )


def _unet_encoder(
    folder: Path, floats: str, weights: np.random.Generator, size: Size | None, *, several: bool
) -> GraphSpec:
    kernel = weights.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 6
    project = weights.standard_normal((WIDTH, CHANNELS))
    nodes = [
        _cast("noise", "noise_half", floats),
        helper.make_node("Conv", ["noise_half", "kernel"], ["skip_00"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["text_states", "axis_1"], ["text_mean"], keepdims=0),
        helper.make_node("MatMul", ["text_mean", "project"], ["text_bias"]),
        helper.make_node("Unsqueeze", ["text_bias", "axes_23"], ["text_map"]),
        helper.make_node("Add", ["skip_00", "text_map"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["bent"]),
        helper.make_node("Conv", ["bent", "kernel"], ["skip_01"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Tanh", ["skip_01"], ["mid"]),
    ]
    return _write(
        folder / _name("unet_encoder", size, several=several),
        "unet_encoder",
        size=size,
        inputs=[_spec("noise", "float32", "batch", CHANNELS, *_sides(size)), _text(floats)],
        outputs=_features(floats, size),
        nodes=nodes,
        floats=floats,
        constants={
            "kernel": kernel.astype(floats),
            "project": project.astype(floats),
            "axis_1": np.array([1]),
            "axes_23": np.array([2, 3]),
        },
    )


def _unet_decoder(
    folder: Path, floats: str, weights: np.random.Generator, size: Size | None, *, several: bool
) -> GraphSpec:
    kernel = weights.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 6
    nodes = [
        helper.make_node("Resize", ["mid", "", "twice"], ["mid_up"], mode="nearest"),
        helper.make_node("Resize", ["skip_01", "", "twice"], ["skip_up"], mode="nearest"),
        helper.make_node("Conv", ["mid_up", "kernel"], ["up"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["up", "skip_00"], ["joined"]),
        helper.make_node("Add", ["joined", "skip_up"], ["shared"]),
        helper.make_node("ReduceMean", ["text_states", "axes_12"], ["text_mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["text_mean", "axes_123"], ["text_map"]),
        helper.make_node("Mul", ["shared", "text_map"], ["told"]),
        helper.make_node("Add", ["shared", "told"], ["shared_told"]),
        _cast("shared_told", "features", "float32"),
        # One prediction a timestep: (K, 1, 1, 1, 1) scales against (1, B, C, h, w) features.
        _cast("timesteps", "times", "float32"),
        helper.make_node("Mul", ["times", "per_thousand"], ["phases"]),
        helper.make_node("Cos", ["phases"], ["scales"]),
        helper.make_node("Slice", ["weights", "one", "huge", "zero"], ["betas"]),
        helper.make_node("Mul", ["scales", "betas"], ["factors"]),
        helper.make_node("Unsqueeze", ["factors", "axes_1234"], ["factor_map"]),
        helper.make_node("Unsqueeze", ["features", "zero"], ["feature_row"]),
        helper.make_node("Mul", ["factor_map", "feature_row"], ["terms"]),
        helper.make_node("ReduceSum", ["terms", "zero"], ["sum"], keepdims=0),
        helper.make_node("Slice", ["weights", "zero", "one", "zero"], ["alpha"]),
        helper.make_node("Mul", ["noise", "alpha"], ["kept"]),
        helper.make_node("Add", ["kept", "sum"], ["latents"]),
    ]
    return _write(
        folder / _name("unet_decoder", size, several=several),
        "unet_decoder",
        size=size,
        inputs=[
            *_features(floats, size),
            _text(floats),
            _spec("noise", "float32", "batch", CHANNELS, *_sides(size)),
            _spec("timesteps", "int64", "steps"),
            _spec("weights", "float32", "steps_plus_1"),
        ],
        outputs=[_spec("latents", "float32", "batch", CHANNELS, *_sides(size))],
        nodes=nodes,
        floats=floats,
        constants={
            "kernel": kernel.astype(floats),
            "twice": np.array([1, 1, 2, 2], np.float32),
            "axes_12": np.array([1, 2]),
            "axes_123": np.array([1, 2, 3]),
            "axes_1234": np.array([1, 2, 3, 4]),
            "per_thousand": np.array(1e-3, np.float32),
            "zero": np.array([0]),
            "one": np.array([1]),
            "huge": np.array([2**31]),
        },
    )


def _vae_decoder(
    folder: Path, floats: str, weights: np.random.Generator, size: Size | None, *, several: bool
) -> GraphSpec:
    kernel = weights.standard_normal((3 * FACTOR**2, CHANNELS, 3, 3)) / 6
    nodes = [
        _cast("latents", "latents_half", floats),
        helper.make_node("Conv", ["latents_half", "kernel"], ["blocks"], pads=[1, 1, 1, 1]),
        helper.make_node("DepthToSpace", ["blocks"], ["pixels"], blocksize=FACTOR),
        _cast("pixels", "pixels_32", "float32"),
        helper.make_node("Sigmoid", ["pixels_32"], ["unit"]),
        helper.make_node("Mul", ["unit", "white"], ["levels"]),
        helper.make_node("Transpose", ["levels"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Round", ["last"], ["whole"]),
        _cast("whole", "images", "uint8"),
    ]
    pixels = ("image_height", "image_width") if size is None else size
    return _write(
        folder / _name("vae_decoder", size, several=several),
        "vae_decoder",
        size=size,
        inputs=[_spec("latents", "float32", "batch", CHANNELS, *_sides(size))],
        outputs=[_spec("images", "uint8", "batch", *pixels, 3)],
        nodes=nodes,
        floats=floats,
        constants={"kernel": kernel.astype(floats), "white": np.array(255, np.float32)},
    )


# --- parts ---------------------------------------------------------------------------------------------------------


def _sides(size: Size | None, level: int = 1) -> tuple[int | str, int | str]:
    if size is not None:
        return size[0] // FACTOR // level, size[1] // FACTOR // level
    suffix = "" if level == 1 else f"_{level}"
    return f"height{suffix}", f"width{suffix}"


def _features(floats: str, size: Size | None) -> list[TensorSpec]:
    return [
        _spec("mid", floats, "batch", CHANNELS, *_sides(size, 2)),
        _spec("skip_00", floats, "batch", CHANNELS, *_sides(size)),
        _spec("skip_01", floats, "batch", CHANNELS, *_sides(size, 2)),
    ]


def _text(floats: str) -> TensorSpec:
    return _spec("text_states", floats, "batch", TOKENS, WIDTH)


def _spec(name: str, dtype: Literal["float16", "float32", "int64", "uint8"] | str, *shape: int | str) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": shape})


def _name(graph: str, size: Size | None, *, several: bool) -> str:
    return f"{graph}_{size[0]}x{size[1]}.onnx" if size is not None and several else f"{graph}.onnx"


def _cast(source: str, target: str, dtype: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=_ONNX_TYPES[dtype])


def _write(
    path: Path,
    name: GraphName,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    floats: str,
    size: Size | None = None,
) -> GraphSpec:
    def values(specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], list(spec.shape)) for spec in specs]

    for number, node in enumerate(nodes):
        node.name = f"{node.op_type.lower()}_{number}"  # as exported graphs have them
    tensors = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(list(nodes), name, values(inputs), values(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return GraphSpec(
        name=name,
        size=size,
        precision="fp16" if floats == "float16" else "fp32",
        onnx=_file(path),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _file(path: Path) -> FileSpec:
    return FileSpec(file=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
