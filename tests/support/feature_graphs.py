"""ONNX graphs that stand in for feature extractors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


def mean_color_graph(
    path: Path,
    shape: list[int | str],
    *,
    dtype: int = TensorProto.UINT8,
    metadata: dict[str, str] | None = None,
    external: bool = False,
) -> Path:
    """A graph whose features are each image's mean colour plus (1, 2, 3)."""
    axes = [2, 3] if shape[1] == 3 else [1, 2]
    initializers = [
        helper.make_tensor("axes", TensorProto.INT64, [2], axes),
        helper.make_tensor("offset", TensorProto.FLOAT, [3], np.array([1, 2, 3], "<f4").tobytes(), raw=True),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Add", ["mean", "offset"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [shape[0], 3])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path
