"""Graphs over the weights of a safetensors file: whole, transposed and cut, in float16 and float32, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from tiue_cli.errors import ManifestError, ParityError
from tiue_cli.export.onnx.shared_weights import share_weights, stored_tensors
from tiue_cli.export.onnx.trace import file_spec
from tiue_cli.files.exports import FileSpec, GraphSpec
from tiue_cli.files.external_data import check_external_data


def stored(folder: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {
        "linear": random.standard_normal((24, 24)).astype(np.float16),
        "conv": random.standard_normal((8, 6, 3, 3)).astype(np.float16),
        "exact": random.standard_normal((24, 12)).astype(np.float32),
        "count": np.array([3], np.int64),
    }
    (folder / "unet").mkdir(parents=True)
    save_file(tensors, folder / "unet" / "weights.safetensors")
    return tensors


def graph_of(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """y = x·turned·exact, z = conv(cut channels) + a small constant; what a traced graph holds of such a model."""
    nodes = [
        helper.make_node("MatMul", ["x", "turned"], ["a"]),
        helper.make_node("MatMul", ["a", "exact"], ["y"]),
        helper.make_node("Conv", ["i", "cut"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "small"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 24]),
            helper.make_tensor_value_info("i", TensorProto.FLOAT, [1, 4, 5, 5]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 12]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 8, 5, 5]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def traced(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "turned": tensors["linear"].astype(np.float32).T,  # square: only its values say that it is turned
        "exact": tensors["exact"],
        "cut": tensors["conv"].astype(np.float32)[:, 2:],
        "small": np.array(0.5, np.float32),
    }


def test_a_graph_computes_the_same_over_the_models_own_file(tmp_path: Path) -> None:
    weights = traced(stored(tmp_path))
    model, shared = graph_of(weights), graph_of(weights)
    share_weights(shared, stored_tensors(tmp_path, {"unet": "unet/weights.safetensors"}))
    path = tmp_path / "g.onnx"
    path.write_bytes(shared.SerializeToString())
    onnx.checker.check_model(path)
    assert path.stat().st_size < 2_500 < sum(value.nbytes for value in weights.values())
    feeds = {"x": np.ones((2, 24), np.float32), "i": np.ones((1, 4, 5, 5), np.float32)}
    options = {"providers": ["CPUExecutionProvider"]}
    expected = onnxruntime.InferenceSession(model.SerializeToString(), **options).run(None, feeds)
    found = onnxruntime.InferenceSession(path, **options).run(None, feeds)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    other = {**traced(tensors), "exact": tensors["exact"] + 1}
    with pytest.raises(ParityError, match="no tensor of the model holds the weight exact"):
        share_weights(graph_of(other), stored_tensors(tmp_path, {"unet": "unet/weights.safetensors"}))


def test_weights_may_lie_below_the_graph_and_nowhere_else(tmp_path: Path) -> None:
    weights = traced(stored(tmp_path / "export"))
    shared = graph_of(weights)
    share_weights(shared, stored_tensors(tmp_path / "export", {"unet": "unet/weights.safetensors"}))
    path = tmp_path / "export" / "g.onnx"
    path.write_bytes(shared.SerializeToString())
    data = file_spec(tmp_path / "export" / "unet" / "weights.safetensors").model_copy(
        update={"file": "unet/weights.safetensors"}
    )
    spec = GraphSpec(name="unet_encoder", precision="fp32", onnx=file_spec(path), data=(data,), inputs=(), outputs=())
    check_external_data(tmp_path / "export", spec, hint="h")
    weights_file = tmp_path / "export" / "unet" / "weights.safetensors"
    weights_file.rename(tmp_path / "elsewhere.safetensors")
    weights_file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ManifestError, match="is a link out of its folder"):
        check_external_data(tmp_path / "export", spec, hint="h")
    for name in ("../x", "/x", "a/../x", "a//x", "a/"):
        with pytest.raises(ValueError, match="should match pattern"):
            FileSpec(file=name, sha256="0" * 64, size_bytes=1)
