"""Float8 graphs: valid ONNX that two evaluators agree on, near the graph they were made of; and who refuses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_export
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.cli.app import main
from tiue_cli.errors import DeviceError, UsageError
from tiue_cli.export.config import ExportConfig
from tiue_cli.export.onnx.float8 import LARGEST, as_float8
from tiue_cli.export.onnx.quantized_export import QuantizeRequest, quantize_export
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.export.trt.engine import _check_float8
from tiue_cli.files.engines import EngineDevice
from tiue_cli.files.exports import EXPORT_MANIFEST, read_export_manifest
from tiue_cli.files.manifests import write_json
from tiue_cli.model.noise import draw_noise

PROMPTS = ["a red heart", "a blue house", "a yellow star at night", "a heart above a star"]


def int8_layer(*, floats: type[np.floating]) -> tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray]:
    """A convolution, plain and with int8 Q/DQ as ONNX Runtime's quantiser writes it, and an input within its range."""
    random = np.random.default_rng(0)
    kind = TensorProto.FLOAT16 if floats is np.float16 else TensorProto.FLOAT
    weight = random.standard_normal((6, 4, 3, 3)).astype(floats)
    values = random.uniform(-2, 2, (1, 4, 8, 8)).astype(floats)
    values[0, 0, 0, 0] = 2
    ports = [helper.make_tensor_value_info("x", kind, [1, 4, 8, 8])], [helper.make_tensor_value_info("y", kind, None)]
    ports[1][0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_value_info("y", kind, [1, 6, 6, 6]).type.tensor_type.shape
    )
    plain = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], "g", *ports, [numpy_helper.from_array(weight, "w")]
    )
    scale = np.abs(weight).max((1, 2, 3)).astype(np.float32) / 127
    integers = np.round(weight / scale[:, None, None, None]).astype(np.int8)
    tensors = {
        "x_scale": np.array(2 / 127, floats),
        "x_zero": np.array(0, np.int8),
        "w_quantized": integers,
        "w_scale": scale.astype(floats),
        "w_zero": np.zeros(6, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero"], ["w_dq"], axis=0),
        helper.make_node("Conv", ["x_dq", "w_dq"], ["y"], name="conv"),
    ]
    rounded = helper.make_graph(nodes, "g", *ports, [numpy_helper.from_array(v, name) for name, v in tensors.items()])
    models = [
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        for graph in (plain, rounded)
    ]
    return models[0], models[1], values


@pytest.mark.parametrize("floats", [np.float32, np.float16])
def test_two_evaluators_agree_on_a_valid_graph_near_the_plain_one(floats: type[np.floating]) -> None:
    plain, rounded, values = int8_layer(floats=floats)
    made = as_float8(rounded, plain)
    onnx.checker.check_model(made, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert {kinds[name] for name in ("x_zero", "w_quantized", "w_zero")} == {TensorProto.FLOAT8E4M3FN}
    reference = np.asarray(ReferenceEvaluator(made).run(None, {"x": values})[0], np.float64)
    expected = np.asarray(ReferenceEvaluator(plain).run(None, {"x": values})[0], np.float64)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(None, {"x": values})[0], np.float64)
    size = np.linalg.norm(expected)
    assert np.linalg.norm(found - reference) < 0.01 * size  # ties fall either way
    # Each factor is rounded to four digits of the mantissa, a sixteenth at most: 3.6 % of a product's size.
    assert 0.005 * size < np.linalg.norm(found - expected) < 0.05 * size


def test_the_largest_weight_and_value_fill_the_range() -> None:
    plain, rounded, _ = int8_layer(floats=np.float32)
    tensors = {tensor.name: tensor for tensor in as_float8(rounded, plain).graph.initializer}
    assert float(numpy_helper.to_array(tensors["x_scale"])) == pytest.approx(2 / LARGEST)
    weight = np.abs(numpy_helper.to_array(tensors["w_quantized"]).astype(np.float32))
    assert np.isfinite(weight).all() and weight.max() == LARGEST


def test_a_folder_in_fp8_draws_what_fp16_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_export, "OPSET", 19)
    folder = tmp_path / "tiny"
    manifest = write_tiny_export(folder, precision="fp16")
    noise = draw_noise([5], (4, 8, 8))
    with OnnxBackend(folder, provider="cpu") as backend:
        before = backend.generate(["a red heart"], noise)[0]
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    request = QuantizeRequest(str(tmp_path / "p.txt"), images=8, graphs=("unet_encoder", "unet_decoder"), kind="fp8")
    graphs, record = quantize_export(folder, manifest, request, say=str)
    assert [graph.precision for graph in graphs] == ["fp16", "fp8", "fp8", "fp16"]
    assert record.image_psnr_db >= 25 and "E4M3" in record.weights
    with OnnxBackend(folder, provider="cpu") as backend:
        assert backend.dtype == "fp8" and any("fp8 graphs are for TensorRT" in note for note in backend.notes)
        after = backend.generate(["a red heart"], noise)[0]
    assert 25 <= psnr_db(after, before) < 100, "rounded, and not by much"
    for graph in graphs[1:3]:
        model = onnx.load(folder / graph.onnx.file)
        onnx.checker.check_model(model)
        kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert {kinds[node.input[2]] for node in rounding} <= {TensorProto.FLOAT8E4M3FN}
        producers = {name: node.op_type for node in model.graph.node for name in node.output}
        # On the way in only.
        assert not any(producers.get(node.input[0]) in ("Conv", "MatMul") for node in rounding)


def device(capability: str) -> EngineDevice:
    return EngineDevice(
        gpu="NVIDIA X", compute_capability=capability, tensorrt="10.8.0", cuda="12.8", driver="570.1", platform="Linux"
    )


def test_who_cannot_compute_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_tiny_export(tmp_path / "tiny").model_copy(update={"precision": "fp8"})
    write_json(tmp_path / "tiny" / EXPORT_MANIFEST, manifest)
    with pytest.raises(DeviceError, match=r"compute capability 8\.6, and fp8 needs 8\.9"):
        _check_float8(manifest, device("8.6"))
    for capability in ("8.9", "9.0", "12.0"):
        _check_float8(read_export_manifest(tmp_path / "tiny"), device(capability))
    with pytest.raises(UsageError, match="opset 18 has no float8"):
        ExportConfig("s", precision="fp8", opset=18).validate()
    words = ["generate", "a red heart", "--model", str(tmp_path / "tiny"), "--out", str(tmp_path / "out")]
    pytest.importorskip("openvino")
    assert main([*words, "--backend", "openvino"]) == 2
    assert "is in fp8, which is for TensorRT" in capsys.readouterr().err


def test_parts_are_chosen_by_name_and_only_in_8_bits() -> None:
    assert ExportConfig("s", precision="int8").quantized_graphs == ("unet_encoder", "unet_decoder", "vae_decoder")
    assert ExportConfig("s", precision="fp8").quantized_graphs == ("unet_encoder", "unet_decoder")
    chosen = ExportConfig("s", precision="int8", quantized=("vae", "text"))
    assert chosen.quantized_graphs == ("text_encoder", "vae_decoder")
    with pytest.raises(UsageError, match="--quantize is for 8-bit exports"):
        ExportConfig("s", quantized=("vae",)).validate()
