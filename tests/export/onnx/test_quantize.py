"""8-bit graphs: what is rounded and what is not, which layers stay, and that a folder of them draws what fp32 draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_graphs import attention_graph, inputs
from exports import exported
from onnx import TensorProto, helper, numpy_helper
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_attention import fuse_attention
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.cli.app import main
from tiue_cli.errors import ParityError, PromptError
from tiue_cli.export.onnx import quantize, quantized_export
from tiue_cli.export.onnx.quantize import (
    Calibration,
    calibrate,
    calibration_batch,
    products_of_activations,
    quantize_graph,
    structural_layers,
)
from tiue_cli.export.onnx.quantized_export import QuantizeRequest, quantize_export
from tiue_cli.export.onnx.sensitivity import gated_layers, layer_errors
from tiue_cli.export.onnx.trace import file_spec
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.files.exports import AttributeShare, GraphName, GraphSpec, Shares, read_export_manifest
from tiue_cli.model.hub import EMBEDDED, resolve_model
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.quantization import LayerError, sensitive

PROMPTS = ["a red heart", "a blue house", "a yellow star at night", "a heart above a star"]
UNET: tuple[GraphName, ...] = ("unet_encoder", "unet_decoder")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "tiny", precision="fp32")
    return tmp_path / "tiny"


def three_layers() -> onnx.ModelProto:
    """y = conv3(conv2(conv1(x))) with weights that make the second layer far harder to round than the others."""
    rng = np.random.default_rng(0)
    weights = {f"w{number}": rng.standard_normal((4, 4, 1, 1)).astype(np.float32) for number in (1, 2, 3)}
    weights["w2"][:, 0] *= 300  # within each output channel one weight sets the scale, and the others vanish in it
    nodes = [helper.make_node("Conv", [f"x{n}", f"w{n}"], [f"x{n + 1}"], name=f"layer{n}") for n in (1, 2, 3)]
    graph = helper.make_graph(
        nodes,
        "three",
        [helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("x4", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rounded(model: onnx.ModelProto, folder: Path, rows: list[dict[str, np.ndarray]], **options: Any) -> onnx.ModelProto:
    """ONNX Runtime's own 8-bit form of ``model``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self._rows = iter(rows)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return next(self._rows, None)

    onnx.save(model, folder / "plain.onnx")
    quantize_static(
        folder / "plain.onnx",
        folder / "8bit.onnx",
        Rows(),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        **options,
    )
    return onnx.load(folder / "8bit.onnx")


def run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


# --- the sweep -----------------------------------------------------------------------------------------------------


def test_switches_off_is_the_plain_graph_and_all_on_the_rounded_one(tmp_path: Path) -> None:
    rows = [{"x1": np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)}]
    model = three_layers()
    whole = rounded(model, tmp_path, rows)
    gated = gated_layers(model, whole)
    onnx.checker.check_model(gated.model, full_check=True)
    assert gated.layers == ("layer1", "layer2", "layer3")

    def drawn(*on: str) -> np.ndarray:
        return run(gated.model, {**rows[0], **gated.feeds(on)})

    np.testing.assert_allclose(drawn(), run(model, rows[0]), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(drawn(*gated.layers), run(whole, rows[0]), rtol=1e-5, atol=1e-3)


def test_layers_that_share_a_weight_are_rounded_one_by_one(tmp_path: Path) -> None:
    rows = [{"x1": np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)}]
    model = three_layers()
    for node in model.graph.node:
        if node.name == "layer2":
            node.input[1] = "w1"
    gated = gated_layers(model, rounded(model, tmp_path, rows))
    first, second = (gated.rounded_weights[layer] for layer in ("layer1", "layer2"))
    assert not set(first) & set(second)
    alone = run(gated.model, {**rows[0], **gated.feeds(["layer1"])})
    without = run(gated.model, {**rows[0], **gated.feeds([]), **{name: one.array() for name, one in second.items()}})
    assert not np.array_equal(alone, without)


def test_the_layer_that_is_hard_to_round_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scale = np.array([1e-3, 1, 1, 1], np.float32)[:, None, None]  # the channel that sets w2's scale carries little
    rows = [{"x1": rng.standard_normal((2, 4, 8, 8)).astype(np.float32) * scale}]
    model = three_layers()
    w1 = np.eye(4, dtype=np.float32)[..., None, None]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w1, "w1"))
    gated = gated_layers(model, rounded(model, tmp_path, rows))
    onnx.save(gated.model, tmp_path / "gated.onnx")
    errors = {error.layer: error.relative_error for error in layer_errors(tmp_path / "gated.onnx", gated, rows)}
    assert max(errors, key=lambda layer: errors[layer]) == "layer2"
    assert errors["layer2"] > 5 * errors["layer1"]
    assert [error.layer for error in sensitive([LayerError(*item) for item in errors.items()])] == ["layer2"]


def test_attention_as_one_operator_leaves_the_errors_of_the_layers_as_they_are(tmp_path: Path) -> None:
    rows = [inputs(48)]
    model = attention_graph(48, projected=True)
    chosen = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": ["products", "mixed"]}
    gated = gated_layers(model, rounded(model, tmp_path, rows, **chosen))
    errors = []
    for fused in (0, 1):
        assert fused == 0 or fuse_attention(gated.model) == 1
        onnx.save(gated.model, tmp_path / f"{fused}.onnx")
        errors.append([error.relative_error for error in layer_errors(tmp_path / f"{fused}.onnx", gated, rows)])
    assert sorted(gated.layers) == ["to_k", "to_q", "to_v"] and min(errors[0]) > 1e-3
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-3)


def test_more_layers_are_the_next_worst_ones() -> None:
    errors = [LayerError(name, value) for name, value in (("a", 0.01), ("b", 0.5), ("c", 0.02), ("d", 0.03))]
    assert [error.layer for error in sensitive(errors)] == ["b"]
    assert [error.layer for error in sensitive(errors, more=2)] == ["b", "d", "c"]


def test_first_last_and_time_stay_in_fp32() -> None:
    """By what they depend on: a layer fed by the timesteps alone is the time embedding's."""
    names = ["w", "t", "u"]
    nodes = [
        helper.make_node("MatMul", ["timesteps", "t"], ["e"], name="time"),
        helper.make_node("MatMul", ["mid", "u"], ["m"], name="attention"),
        helper.make_node("Add", ["e", "m"], ["s"]),
        helper.make_node("MatMul", ["s", "u"], ["r"], name="mixed"),
        helper.make_node("Conv", ["r", "w"], ["c"], name="inner"),
        helper.make_node("Conv", ["c", "w"], ["latents"], name="last"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("timesteps", "mid")]
    weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in names]
    outputs = [helper.make_tensor_value_info("latents", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, weights))
    assert structural_layers(model, "unet_decoder") == {"time": "time embedding", "last": "last convolution"}
    assert structural_layers(model, "vae_decoder") == {
        "time": "time embedding",
        "inner": "first convolution",
        "last": "last convolution",
    }


def test_products_of_two_activations_stay_in_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in attention: of the graph's two products the one with weights is rounded, on both sides of it."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["noise", "w"], ["keys"], name="projection"),
        helper.make_node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Tanh", ["noise"], ["queries"]),
        helper.make_node("MatMul", ["queries", "turned"], ["logits"], name="attention"),
        helper.make_node("Softmax", ["logits"], ["mid"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 8, 4])],
        [helper.make_tensor_value_info("mid", TensorProto.FLOAT, ["batch", 8, 8])],
        [numpy_helper.from_array(random.standard_normal((4, 4)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert products_of_activations(model) == ["attention"]
    export, records, scratch = (tmp_path / name for name in ("export", "records", "scratch"))
    for folder in (export, records, scratch):
        folder.mkdir()
    onnx.save(model, export / "unet_encoder.onnx")
    np.savez(records / "unet_encoder.onnx.000000.npz", noise=random.standard_normal((2, 8, 4)).astype(np.float32))
    spec = GraphSpec(
        name="unet_encoder", precision="fp32", onnx=file_spec(export / "unet_encoder.onnx"), inputs=(), outputs=()
    )
    monkeypatch.setattr(quantize, "sensitive", lambda errors, more: [])  # a single layer is all of the error
    _, kept, layers = quantize_graph(export, spec, Calibration(records), scratch)
    assert (layers, kept) == (1, ())
    made = onnx.load(export / "unet_encoder.onnx").graph
    producers = {name: node.op_type for node in made.node for name in node.output}
    inputs = {node.name: [producers.get(name) for name in node.input] for node in made.node}
    assert inputs["projection"] == ["DequantizeLinear", "DequantizeLinear"]
    assert inputs["attention"] == ["Tanh", "Transpose"]


# --- a folder ------------------------------------------------------------------------------------------------------


def test_graphs_are_symmetric_int8_and_the_same_bytes_again(tiny: Path, tmp_path: Path) -> None:
    """What TensorRT's explicit quantisation asks for: int8, no zero points, floats at the border."""
    manifest = read_export_manifest(tiny)
    shutil.copytree(tiny, tmp_path / "again")
    written = []
    for folder in (tiny, tmp_path / "again"):
        scratch = tmp_path / f"scratch-{folder.name}"
        scratch.mkdir()
        calibration = calibrate(folder, PROMPTS, 6, scratch)
        assert len(calibration.files(manifest.graph("unet_encoder"))) == 2  # batches of 4 and 2
        spec, kept, layers = quantize_graph(folder, manifest.graph("unet_encoder"), calibration, scratch)
        written.append((folder / spec.onnx.file).read_bytes())
    assert written[0] == written[1]
    assert spec.precision == "int8" and spec.inputs == manifest.graph("unet_encoder").inputs
    assert layers == 3 and {layer.reason for layer in kept} >= {"first convolution"}
    model = onnx.load(tiny / spec.onnx.file)
    zero_points = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert rounding
    for node in rounding:
        assert zero_points[node.input[2]].dtype == np.int8 and not zero_points[node.input[2]].any()


def request(graphs: tuple[GraphName, ...] = UNET, *, prompts: Path) -> QuantizeRequest:
    prompts.write_text("\n".join(PROMPTS))
    return QuantizeRequest(str(prompts), images=8, graphs=graphs)


def test_a_folder_in_8_bits_draws_what_fp32_draws(tiny: Path, tmp_path: Path) -> None:
    manifest = read_export_manifest(tiny)
    noise = draw_noise([5], (4, 8, 8))
    with OnnxBackend(tiny, provider="cpu") as backend:
        before = backend.generate(["a red heart"], noise)[0]
    said: list[str] = []
    graphs, record = quantize_export(tiny, manifest, request(prompts=tmp_path / "p.txt"), say=said.append)
    assert [graph.precision for graph in graphs] == ["fp32", "int8", "int8", "fp32"]
    assert record.image_psnr_db >= 25 and record.papercut is None and record.graphs == UNET
    with OnnxBackend(tiny, provider="cpu") as backend:
        assert backend.dtype == "int8"
        after = backend.generate(["a red heart"], noise)[0]
    assert 25 <= psnr_db(after, before) < 100, "rounded, and not by much"
    assert {path.name for path in tiny.iterdir()} == {
        "manifest.json", "tokenizer.json", *(graph.onnx.file for graph in graphs),
        *(spec.file for graph in graphs for spec in graph.data),
    }  # fmt: skip
    # What a session keeps by: a manifest with all of its parts can be hashed.
    shares = Shares(
        captions=1,
        attributes=(AttributeShare(name="objects", quantized=1, full=1),),
        frechet_distance=1,
        frechet_distance_full=1,
    )
    full = manifest.model_copy(update={"quantization": record.model_copy(update={"papercut": shares})})
    assert isinstance(hash(full), int)
    assert any("calibrate with 8 images" in text for text in said)


def test_pictures_below_the_bar_fail_and_more_layers_are_tried_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantized_export.REQUIRED_PSNR_DB, "int8", 1000.0)  # type: ignore[index]
    tried: list[int] = []
    quantize = quantized_export.quantize_graph

    def watched(*arguments: object, more: int, **options: object) -> object:
        tried.append(more)
        return quantize(*arguments, more=more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(quantized_export, "quantize_graph", watched)
    with pytest.raises(ParityError, match=r"dB from fp32's, and 1000 are needed, with \d of \d layers in fp32"):
        quantize_export(
            tiny, read_export_manifest(tiny), request(("unet_encoder",), prompts=tmp_path / "p.txt"), say=str
        )
    assert tried == [0, 4, 12, 28]


# --- the command line ----------------------------------------------------------------------------------------------


def test_prompts_are_asked_for_before_anything_is_loaded(
    tiny_student_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(tiny_student_folder), "--out", str(tmp_path / "e"), "--precision", "int8"]
    assert main(words) == 2
    assert "calibrated with pictures of prompts, and none were given" in capsys.readouterr().err
    assert main([*words, "--calibration", str(tmp_path / "none.txt")]) == PromptError.exit_code
    assert "none.txt" in capsys.readouterr().err
    assert main(["export", str(tiny_student_folder), "--calibration", "x.txt"]) == 2
    assert "--calibration is for 8-bit exports" in capsys.readouterr().err


@pytest.mark.slow
def test_papercut_in_8_bits() -> None:
    """The real thing: papercut is traced, calibrated with 128 pictures and swept, which takes most of a minute."""
    folder = exported(resolve_model(EMBEDDED), precision="int8", calibration="papercut")
    manifest = read_export_manifest(folder)
    record, parity = manifest.quantization, manifest.parity
    assert record is not None and record.papercut is not None and parity is not None
    assert record.calibration_images == 128 and record.image_psnr_db >= 25 and parity.image_psnr_db >= 25
    shares = {share.name: share for share in record.papercut.attributes}
    for name in ("background", "objects", "colors", "relation"):
        assert shares[name].quantized >= 0.99 * shares[name].full
    assert record.papercut.frechet_distance <= 1.15 * record.papercut.frechet_distance_full
    full = read_export_manifest(exported(resolve_model(EMBEDDED)))
    small, large = (sum(graph.size_bytes for graph in one.graphs[1:]) for one in (manifest, full))
    assert small < large / 2


@pytest.mark.parametrize(("side", "images"), [(16, 4), (32, 1), (64, 1), (96, 1)])
def test_large_pictures_are_calibrated_one_by_one(side: int, images: int) -> None:
    assert calibration_batch((4, side, side)) == images
