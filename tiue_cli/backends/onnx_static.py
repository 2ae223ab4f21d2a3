"""Runs of an ONNX Runtime session at fixed shapes, in memory that stays: what a CUDA graph can repeat.

ONNX Runtime records a run and repeats it where inputs and outputs are bound to the same addresses each time. So each
combination of shapes has a binding of its own: arrays are copied into its inputs, values that lie on the device
already are bound as they are (the outputs of another graph's binding do not move either), and its outputs are those
that the first, plain run was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tiue_cli.backends.few_entries import FewEntries
from tiue_cli.backends.onnx_session import Provider, import_onnxruntime, run_session, session_errors
from tiue_cli.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

SHAPES_HELD: Final = 4
"""Combinations of shapes at a time, each with inputs, outputs and a recorded graph."""
_GRAPH_ID: Final = "gpu_graph_id"
PLAIN: Final = -1
"""The graph id that neither records nor repeats."""


@dataclass
class _Shape:
    """One combination of shapes: ``number`` is its graph's."""

    number: int
    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class StaticRuns:
    """Called with inputs, as ``run_session`` is; the outputs are lent until the next call with the same shapes.

    The first run of a combination of shapes is plain, later ones are one launch. ``problem`` says why runs stay plain
    where ONNX Runtime could not record one.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, provider: Provider, *, name: str, held: int = SHAPES_HELD
    ) -> None:
        """``name`` is what errors call the graph; ``held``: combinations of shapes at a time."""
        self.problem: str | None = None
        self.recorded = 0
        self._session, self._provider, self._name = session, provider, name
        self._numbers = 0
        self._shapes: FewEntries[_Shape] = FewEntries(held, drop=self._release)

    def __call__(self, inputs: Mapping[str, np.ndarray | onnxruntime.OrtValue]) -> dict[str, onnxruntime.OrtValue]:
        """Outputs by name, on the provider's device. Raises DeviceError."""
        ort = import_onnxruntime()
        key = tuple((name, *_identity(ort, value)) for name, value in inputs.items())
        known = key in self._shapes.keys
        shape = self._shapes.get(key, lambda: self._make(inputs))
        if not known:
            return dict(shape.outputs)  # the first run has just been made
        for name, value in inputs.items():
            if not isinstance(value, ort.OrtValue):
                shape.inputs[name].update_inplace(value)
        self._run(shape)
        return dict(shape.outputs)

    def _make(self, inputs: Mapping[str, Any]) -> _Shape:
        ort = import_onnxruntime()
        device = self._provider.device
        placed = {
            name: value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value, device, 0)
            for name, value in inputs.items()
        }
        outputs = run_session(self._session, placed, self._provider, options=_run_options(PLAIN))
        binding = self._session.io_binding()
        for name, value in placed.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._numbers += 1
        return _Shape(self._numbers, binding, placed, outputs)

    def _run(self, shape: _Shape) -> None:
        if self.problem is None:
            try:
                with session_errors(self._name):
                    self._session.run_with_iobinding(shape.binding, _run_options(shape.number))
                self.recorded = max(self.recorded, shape.number)
            except DeviceError as error:
                self.problem = f"no CUDA graph, so each image takes longer: {error.message}"
            else:
                return
        with session_errors(self._name):
            self._session.run_with_iobinding(shape.binding, _run_options(PLAIN))

    def _release(self, shape: _Shape) -> None:
        # Before ONNX Runtime 1.31 a graph's memory stays until its session goes.
        if hasattr(self._session, "release_captured_graph") and self._provider.name == "cuda":
            self._session.release_captured_graph(shape.number)

    def close(self) -> None:
        """Let go of all shapes."""
        self._shapes.clear()


def _identity(ort: Any, value: Any) -> tuple[Any, ...]:
    """What two inputs have in common that one binding serves: shape and type, and for a value on the device its place.

    The binding holds the value, so its place cannot become another value's meanwhile.
    """
    if isinstance(value, ort.OrtValue):
        return (tuple(value.shape()), value.data_type(), value.data_ptr())
    return (value.shape, str(value.dtype))


def _run_options(graph: int) -> Any:
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(graph))
    return options
