"""Exported students as subjects: the product's own backends, stopped between their graphs where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.bench.measure.clock import WallClock
from tiue_cli.bench.measure.flops import StageFlops
from tiue_cli.bench.report.schema import Stage, SubjectRecord
from tiue_cli.bench.subjects.torch_subjects import Outcome, Subject
from tiue_cli.files.exports import GraphName, Size

STAGE_OF_GRAPH: Final[dict[GraphName, Stage]] = {
    "text_encoder": "text",
    "unet_encoder": "unet_encoder",
    "unet_decoder": "unet_decoder",
    "vae_decoder": "vae",
}


class TimedOnnxBackend(OnnxBackend):
    """The ONNX Runtime backend with a clock on each graph; a run of a graph returns when it is done, on a GPU too."""

    def __init__(self, folder: Path, *, provider: str, threads: int | None) -> None:
        super().__init__(folder, provider=provider, threads=threads)
        self.clock = WallClock()

    def _run(self, name: GraphName, size: Size | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
        with self.clock.stage(STAGE_OF_GRAPH[name]):
            return super()._run(name, size, inputs)


class ExportedSubject(Subject):
    """A student's export at one K, on a backend that is entered already: the K of one export share it.

    ``flops`` None where the student is not at hand to be counted. TensorRT runs the whole image as one launch, so it
    has no times of its stages.
    """

    def __init__(self, record: SubjectRecord, backend: TimedOnnxBackend | TrtBackend, flops: StageFlops | None) -> None:
        super().__init__(record)
        self._backend = backend
        self._flops = flops

    def run(self, prompts: Sequence[str], noise: np.ndarray) -> Outcome:
        """See ``Subject.run``."""
        images = self._backend.generate(prompts, noise, steps=self.record.steps)
        stage_ms = self._backend.clock.take_ms() if isinstance(self._backend, TimedOnnxBackend) else {}
        return Outcome(images, stage_ms)

    def flops(self, batch: int) -> dict[Stage, float]:
        """See ``Subject.flops``: those of the student, as an export computes what the student computes."""
        return {} if self._flops is None else self._flops.student(batch, self.record.steps, "shared")
