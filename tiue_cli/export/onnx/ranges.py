"""Ranges of a graph's tensors over recorded inputs, as ONNX Runtime's quantiser reads them.

Its own session holds all that a run of large pictures takes, and attention's products among it, which are not quantised
and whose ranges nobody reads: Stable Diffusion 1.5's decoder at 512 pixels took more than 20 GB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import save_tensors_data
from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

from tiue_cli.backends.onnx_session import session_options, session_source


def write_ranges(
    source: Path,
    rows: Iterator[Mapping[str, np.ndarray]],
    out: Path,
    *,
    kinds: Sequence[str],
    exclude: Collection[str],
    fused_attention: bool,
) -> None:
    """Run the graph in ``source`` over ``rows`` and write the least and the greatest value of each tensor to ``out``.

    Of what nodes of the ``kinds`` read and write, but for nodes named in ``exclude``. ``fused_attention`` computes
    self-attentions in one operator.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        finder = _RangeFinder(source, Path(folder) / "ranges.onnx", kinds, frozenset(exclude), fused=fused_attention)
        finder.augment_graph()
        finder.create_inference_session()
        finder.collect_data(_Reader(rows))
        save_tensors_data(finder.compute_data(), out)


class _RangeFinder(MinMaxCalibrater):  # type: ignore[misc]  # untyped
    """ONNX Runtime's, without the tensors that it need not know, in a session that gives memory back."""

    def __init__(self, source: Path, augmented: Path, kinds: Sequence[str], exclude: Collection[str], *, fused: bool):
        super().__init__(source, list(kinds), str(augmented), use_external_data_format=True)
        self._exclude, self._fused = exclude, fused

    def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], dict[str, onnx.ValueInfoProto]]:
        """The tensors' names, and what is known of each value; see the base class."""
        found, values = super().select_tensors_to_calibrate(model)
        nodes = [node for node in model.graph.node if node.op_type in self.op_types_to_calibrate]
        wanted = {name for node in nodes if node.name not in self._exclude for name in (*node.input, *node.output)}
        return found & wanted, values

    def create_inference_session(self) -> None:
        """Open the augmented graph."""
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = Path(self.augmented_model_path)
        source = session_source(path, options) if self._fused else path
        self.infer_session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
    def __init__(self, rows: Iterator[Mapping[str, np.ndarray]]) -> None:
        self._rows = rows

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """The inputs of the next run, None at the end."""
        return next(self._rows, None)
