"""The OpenVINO backend: an exported student in one pass on Intel's and other CPUs, GPUs and NPUs, without torch.

It reads the ONNX files as they are. Compiled models are kept in tiue's cache folder: the second start is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_cli.backends import exported
from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.openvino_device import (
    choose_arithmetic,
    find_device,
    model_cache,
    open_core,
    openvino_errors,
)
from tiue_cli.base.machine import usable_cores
from tiue_cli.errors import DeviceError, UsageError
from tiue_cli.files.exports import GRAPHS, GraphSpec

if TYPE_CHECKING:
    import numpy as np
    import openvino

Shapes = tuple[tuple[int, ...], ...]
"""Of a graph's inputs, in their order."""


class CompiledGraph:
    """One graph, compiled for the first shapes that it meets; whatever else comes shares one model of any shape.

    A model of its own shape is some 5 to 15 % faster than one that takes any, and compiling costs as much as dozens of
    images: so many shapes get one model between them, and memory holds a graph's weights twice at most.
    """

    def __init__(
        self, core: openvino.Core, path: Path, spec: GraphSpec, *, device: str, options: Mapping[str, Any]
    ) -> None:
        """Read the graph; nothing is compiled yet. Raises DeviceError for one that OpenVINO cannot read."""
        self._core = core
        self._path = path
        self._spec = spec
        self._device = device
        self._options = dict(options)
        self._model: openvino.Model | None = self._read()
        self._first: tuple[Shapes, openvino.InferRequest] | None = None
        self._any: openvino.InferRequest | None = None

    def prepare(self, shapes: Shapes) -> None:
        """Compile for ``shapes``, unless a first shape is there already. Raises DeviceError."""
        if self._first is None:
            model = self._read() if self._model is None else self._model
            self._model = None  # the compiled one holds what it needs of it
            named = {port.name: list(shape) for port, shape in zip(self._spec.inputs, shapes, strict=True)}
            self._first = (shapes, self._compile(model, named))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs by name; they lie in the runtime's memory until the graph runs again. Raises DeviceError."""
        shapes = tuple(tuple(inputs[port.name].shape) for port in self._spec.inputs)
        self.prepare(shapes)
        assert self._first is not None
        request = self._first[1] if self._first[0] == shapes else self._of_any_shape(shapes)
        with openvino_errors(self._path.name):
            results = request.infer(
                {port.name: inputs[port.name] for port in self._spec.inputs}, share_inputs=True, share_outputs=True
            )
            return {port.name: results[port.name] for port in self._spec.outputs}

    def _of_any_shape(self, shapes: Shapes) -> openvino.InferRequest:
        if self._any is None:
            if self._device == "NPU":
                raise DeviceError(
                    f"an NPU runs one shape a process, and {self._path.name} is compiled for another",
                    hint="keep to one --size and --batch in a run",
                )
            self._any = self._compile(self._read(), None)
        return self._any

    def _read(self) -> openvino.Model:
        with openvino_errors(self._path.name):
            return self._core.read_model(str(self._path))

    def _compile(self, model: openvino.Model, shapes: Mapping[str, list[int]] | None) -> openvino.InferRequest:
        with openvino_errors(self._path.name):
            if shapes is not None:
                model.reshape(dict(shapes))
            compiled = self._core.compile_model(model, self._device, self._options)
            return compiled.create_infer_request()


class OpenvinoBackend(ExportBackend[CompiledGraph]):
    """An export folder held ready in OpenVINO; see ``backends.base.Backend``."""

    name = "openvino"

    def __init__(
        self, folder: Path | str, *, device: str = "auto", precision: str = "auto", threads: int | None = None
    ) -> None:
        """``device`` is ``auto``, ``cpu``, ``gpu`` or ``npu``; ``threads`` None takes every core.

        ``precision`` is ``fp32``, ``bf16`` or ``fp16``, of an 8-bit export also ``int8``; see ``choose_arithmetic`` for
        ``auto``. Reads the manifest and asks the device; no graph is opened. Raises ManifestError, DeviceError,
        UsageError for an export in float8, MissingDependencyError.
        """
        super().__init__(folder)
        if self.manifest.precision == "fp8":
            raise UsageError(
                f"{self.folder} is in fp8, which is for TensorRT on NVIDIA GPUs from Ada and Hopper on",
                hint="8 bits for OpenVINO are another export: tiue export STUDENT --precision int8",
            )
        self._core = open_core(cache=model_cache())
        self._device = find_device(self._core, device)
        self._arithmetic = choose_arithmetic(self._core, self._device, self.manifest, precision)
        self._threads = threads

    @property
    def device(self) -> str:
        """``cpu``, ``gpu`` or ``npu``."""
        return self._device.lower()

    @property
    def dtype(self) -> str:
        """What floats are computed in; of an 8-bit export ``int8`` where they are fp32."""
        floats = self._arithmetic.floats
        return "int8" if self.manifest.precision == "int8" and floats == "fp32" else floats

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the export and the choice of precision."""
        return super().notes if self._arithmetic.note is None else (*super().notes, self._arithmetic.note)

    @property
    def _finite_hint(self) -> str:
        if self._arithmetic.floats != "fp32":
            return "use --precision fp32"
        return super()._finite_hint

    def _open(self, graph: GraphSpec) -> CompiledGraph:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self._arithmetic.hint, "PERFORMANCE_HINT": "LATENCY"}
        if self._device == "CPU":
            # OpenVINO itself would count the machine's cores, which in a container are more; and pinned threads of two
            # processes may sit on the same cores.
            options["INFERENCE_NUM_THREADS"] = usable_cores() if self._threads is None else self._threads
            options["ENABLE_CPU_PINNING"] = False
        return CompiledGraph(self._core, self.folder / graph.onnx.file, graph, device=self._device, options=options)

    def _prepare(self, *, batch: int, steps: int, size: tuple[int, int]) -> None:
        """Compile what a run needs, two graphs at a time: the first picture waits for it."""
        at_once = min(batch, max(1, exported.PIXELS_AT_ONCE // (size[0] * size[1])))
        factor = self.manifest.latent_factor

        def compile_one(spec: GraphSpec) -> None:
            images = at_once if spec.name == "vae_decoder" else batch
            shapes = spec.input_shapes(batch=images, steps=steps, size=size, factor=factor)
            self._graph(spec).prepare(tuple(shapes.values()))

        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(compile_one, [self.manifest.graph(name, size=size) for name in GRAPHS]))

    def _call(self, opened: CompiledGraph, graph: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return opened.run(inputs)

    @staticmethod
    def _array(value: Any) -> np.ndarray:
        # The runtime overwrites its own at the next run.
        array: np.ndarray = value.copy()
        return array
