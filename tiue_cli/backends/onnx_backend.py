"""The ONNX Runtime backend: an exported student in one pass, on the CPU or a GPU, without torch.

What passes between the graphs stays on the device; noise goes in, latents (to be checked) and pixels come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.onnx_attention import MIN_TOKENS
from tiue_cli.backends.onnx_session import (
    CudaOptions,
    Provider,
    choose_provider,
    open_session,
    run_session,
    session_errors,
)
from tiue_cli.backends.onnx_static import StaticRuns
from tiue_cli.errors import DeviceError, OutOfMemoryError
from tiue_cli.files.exports import GraphSpec

if TYPE_CHECKING:
    import numpy as np

_Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Runs one graph: outputs by name, on the device."""


class OnnxBackend(ExportBackend[_Run]):
    """An export folder held ready in ONNX Runtime; see ``backends.base.Backend``."""

    name = "onnx"

    def __init__(
        self,
        folder: Path | str,
        *,
        provider: str = "auto",
        threads: int | None = None,
        cuda: CudaOptions | None = None,
    ) -> None:
        """``provider`` is ``auto``, ``cuda``, ``tensorrt`` or ``cpu``; ``threads`` None takes every core.

        ``cuda`` None takes the options of TIUE_ORT_CUDA. Reads the manifest and nothing else. Raises ManifestError,
        DeviceError, UsageError.
        """
        super().__init__(folder)
        self.provider: Provider = choose_provider(provider, cuda=cuda)
        self._threads = threads
        self._static: list[StaticRuns] = []
        self._problems: list[str] = []

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.provider.device

    @property
    def dtype(self) -> str:
        """The precision of the export."""
        return self.manifest.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the export, and about how it was run so far."""
        notes = [] if self.provider.note is None else [self.provider.note]
        notes += super().notes
        if self.device == "cpu" and self.dtype == "fp16":
            notes.append("fp16 graphs are slow on a CPU: ONNX Runtime computes in fp32 there and converts; export fp32")
        if self.dtype == "fp8":
            notes.append(
                "fp8 graphs are for TensorRT on Ada, Hopper and newer: ONNX Runtime rounds to float8 and computes in"
                " floats, which is slow; the pictures are the same"
            )
        notes += self._problems
        notes += [runs.problem for runs in self._static if runs.problem is not None]
        return tuple(notes)

    def _open(self, graph: GraphSpec) -> _Run:
        path, file = self.folder / graph.onnx.file, graph.onnx.file
        if self.provider.cuda.graphs:
            try:
                session = open_session(path, self.provider, threads=self._threads, graphs=True)
            except OutOfMemoryError:
                raise
            except DeviceError as error:
                # Refused as a whole where a part of the graph stays on the CPU; if anything else is wrong with it,
                # opening it plainly says so.
                self._problems.append(f"{file} runs without a CUDA graph, which is slower: {error.message}")
            else:
                self._static.append(StaticRuns(session, self.provider, name=file))
                return self._static[-1]
        session = open_session(path, self.provider, threads=self._threads, fused_attention=self._fuses(graph))

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            with session_errors(file):
                return run_session(session, inputs, self.provider)

        return run

    def _fuses(self, graph: GraphSpec) -> bool:
        """Whether attention is worth rewriting: of large pictures, on the CPU, in what its operator computes."""
        _, height, width = self.latent_shape(graph.size or self.default_size)
        return self.device == "cpu" and graph.precision in ("fp32", "int8") and height * width >= MIN_TOKENS

    def _call(self, opened: _Run, graph: GraphSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return opened(inputs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for runs in self._static:
            runs.close()
        self._static.clear()

    @staticmethod
    def _array(value: Any) -> np.ndarray:
        array: np.ndarray = value.numpy()
        return array
