"""The ONNX Runtime backend: an exported student in one pass, on the CPU or a GPU, without torch.

What passes between the graphs stays on the device; noise goes in, latents (to be checked) and pixels come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.onnx_session import Provider, choose_provider, open_session, run_session, session_errors
from tiue_cli.files.exports import GraphSpec

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime


class OnnxBackend(ExportBackend["onnxruntime.InferenceSession"]):
    """An export folder held ready in ONNX Runtime; see ``backends.base.Backend``."""

    name = "onnx"

    def __init__(self, folder: Path | str, *, provider: str = "auto", threads: int | None = None) -> None:
        """``provider`` is ``auto``, ``cuda``, ``tensorrt`` or ``cpu``; ``threads`` None takes every core.

        Reads the manifest and nothing else. Raises ManifestError, DeviceError.
        """
        super().__init__(folder)
        self.provider: Provider = choose_provider(provider)
        self._threads = threads

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
        """What the user should know about the export."""
        notes = [] if self.provider.note is None else [self.provider.note]
        notes += super().notes
        if self.device == "cpu" and self.dtype == "fp16":
            notes.append("fp16 graphs are slow on a CPU: ONNX Runtime computes in fp32 there and converts; export fp32")
        return tuple(notes)

    def _open(self, graph: GraphSpec) -> onnxruntime.InferenceSession:
        return open_session(self.folder / graph.onnx.file, self.provider, threads=self._threads)

    def _call(
        self, opened: onnxruntime.InferenceSession, graph: GraphSpec, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        with session_errors(graph.onnx.file):
            return run_session(opened, inputs, self.provider)

    @staticmethod
    def _array(value: Any) -> np.ndarray:
        array: np.ndarray = value.numpy()
        return array
