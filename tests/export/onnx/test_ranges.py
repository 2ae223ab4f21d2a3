"""Ranges of tensors: those of ONNX Runtime's own calibration, without the tensors that nobody reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_graphs import attention_graph, inputs
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, create_calibrator

from tiue_cli.export.onnx.quantize import products_of_activations
from tiue_cli.export.onnx.ranges import write_ranges

PRODUCTS = {"products", "mixed"}


class Rows:
    """Inputs as ONNX Runtime asks for them."""

    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rows, None)


@pytest.mark.parametrize("fused", [False, True])
def test_ranges_are_those_of_onnx_runtime(fused: bool, tmp_path: Path) -> None:
    model = attention_graph(48, projected=True)
    rows = [inputs(48), {name: 2 * value for name, value in inputs(48).items()}]
    path, out = tmp_path / "plain.onnx", tmp_path / "ranges.json"
    onnx.save(model, path)
    assert set(products_of_activations(model)) == PRODUCTS
    write_ranges(path, iter(rows), out, kinds=["MatMul"], exclude=PRODUCTS, fused_attention=fused)
    found = {
        name: [entry["lowest"]["data"][0], entry["highest"]["data"][0]]
        for name, entry in json.loads(out.read_text())["data"].items()
    }

    theirs = create_calibrator(path, ["MatMul"], str(tmp_path / "aug.onnx"), CalibrationMethod.MinMax)
    theirs.collect_data(Rows(rows))
    expected = {name: data.range_value for name, data in theirs.compute_data().items() if isinstance(data, TensorData)}
    assert set(found) == {"q", "k", "v", "qp", "kp", "vp"} < set(expected)
    for name, ends in found.items():
        np.testing.assert_allclose(ends, np.ravel(expected[name]), rtol=1e-6)
        assert ends[0] < 0 < ends[1]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_older_onnx_runtime_exports_in_floats_and_says_what_8_bits_need(tmp_path: Path) -> None:
    """Before 1.31 there is no cache of ranges: nothing of it may be imported before that is said."""
    script = """
import onnxruntime.quantization as quantization
del quantization.save_tensors_data
quantization.quantize_static = lambda model_input, model_output, calibration_data_reader=None: None
from tiue_cli.errors import MissingDependencyError
import tiue_cli.export.onnx.export
from tiue_cli.export.onnx.quantize import _quantized
try:
    _quantized(None, None, None, None, kind="int8", products=[], kept=[])
except MissingDependencyError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "8-bit exports need ONNX Runtime 1.31 or newer\n"
