"""A student's exports in a bench: found where ``tiue export`` puts them or made for the run, and opened in a runtime.

A runtime of exports is added here, as a line of ``RUNTIMES`` (its name and words are in ``bench.config``): everything
else, from the command line to the report, goes by that table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tiue_cli.backends.exported import ExportBackend
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.openvino_backend import OpenvinoBackend
from tiue_cli.backends.stages import listening
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.bench.config import BACKEND_NAMES, StudentBackend
from tiue_cli.bench.measure.clock import WallClock
from tiue_cli.bench.report.schema import Stage
from tiue_cli.bench.subjects.models import LoadedModel
from tiue_cli.bench.subjects.subject import Draw
from tiue_cli.errors import DeviceError, ManifestError, UsageError
from tiue_cli.export.config import EngineConfig, ExportConfig
from tiue_cli.files.exports import GraphName, Size, is_export_folder, read_export_manifest
from tiue_cli.generate.target import ExportInfo
from tiue_cli.model.hub import EMBEDDED

Say = Callable[[str], None]
"""Called with what begins."""
Runtime = ExportBackend[Any] | TrtBackend

STAGE_OF_GRAPH: Final[dict[GraphName, Stage]] = {
    "text_encoder": "text",
    "unet_encoder": "unet_encoder",
    "unet_decoder": "unet_decoder",
    "vae_decoder": "vae",
}


def stored_in(precision: str) -> str:
    """What an export's weights are in that computes in ``precision``: OpenVINO computes bf16 of fp32."""
    return "fp32" if precision == "bf16" else precision


def _onnx(export: ExportInfo, device: str, precision: str) -> Runtime:
    _refuse_bf16(precision, "onnx")
    provider = "cuda" if device == "cuda" else "cpu"
    return OnnxBackend(export.path, provider=provider, threads=torch.get_num_threads())


def _trt(export: ExportInfo, device: str, precision: str) -> Runtime:
    _refuse_bf16(precision, "trt")
    return TrtBackend(export.path, engine=export.engine)


def _openvino(export: ExportInfo, device: str, precision: str) -> Runtime:
    # What the run is in, and no faster precision of its own choice: the report's column says which it was.
    asked = "auto" if precision == "fp16" else precision
    return OpenvinoBackend(export.path, device="cpu", precision=asked, threads=torch.get_num_threads())


def _refuse_bf16(precision: str, backend: StudentBackend) -> None:
    if precision == "bf16":
        raise DeviceError(
            f"there are no exports in bf16 for {BACKEND_NAMES[backend]}",
            hint="choose --precision fp32 or int8, or --backend torch,openvino",
        )


RUNTIMES: Final[dict[StudentBackend, Callable[[ExportInfo, str, str], Runtime]]] = {
    "onnx": _onnx,
    "trt": _trt,
    "openvino": _openvino,
}
"""What runs an export on a device, ``cpu`` or ``cuda``, in a precision, by the backend's name.

Raises DeviceError where it cannot."""
ONLY_ASKED: Final[frozenset[StudentBackend]] = frozenset({"openvino"})
"""Runtimes that are measured where --backend names them: an extra that most installations are without."""


class OpenedExport:
    """An export held ready in a runtime, which its subjects (one for each K) share.

    TensorRT runs the whole image as one launch, so it has no times of its stages.
    """

    def __init__(
        self, export: ExportInfo, backend: StudentBackend, stack: ExitStack, *, device: str, precision: str
    ) -> None:
        """Open it until ``stack`` closes. Raises what the runtime raises."""
        started = time.perf_counter()
        self.clock = WallClock()
        self.running = RUNTIMES[backend](export, device, precision)
        stack.enter_context(self.running)
        self.load_s = time.perf_counter() - started

    def draw(self, steps: int) -> Draw:
        """Drawing at ``steps`` decoder timesteps. A run of a graph returns when it is done, on a GPU too."""

        def run(prompts: Sequence[str], noise: np.ndarray) -> np.ndarray:
            with listening(lambda name, seconds: self.clock.add(STAGE_OF_GRAPH[name], 1000.0 * seconds)):
                return self.running.generate(prompts, noise, steps=steps)

        return run


def find_export_of(model: LoadedModel, *, precision: str, size: Size, vae: str | None) -> ExportInfo | str:
    """The student's export in its usual place (``engines/NAME``), or why there is none that fits, in words."""
    if model.sha256 is None or not model.is_student:
        return "random weights have no export" if model.is_student else f"{model.source} is not a trained student"
    folder = ExportConfig(student=model.source).folder
    if not is_export_folder(folder):
        return f"there is no export in {folder} (tiue export {model.source})"
    try:
        manifest = read_export_manifest(folder)
        manifest.latent_shape(size)
    except (ManifestError, UsageError) as error:
        return error.message
    if manifest.student.sha256 != model.sha256:
        return f"{folder} is the export of another student than {model.source}"
    if manifest.student.vae_source != vae:
        return f"{folder} was exported with another autoencoder"
    if manifest.precision != precision:
        return f"{folder} was exported in {manifest.precision}"
    return ExportInfo(folder, manifest)


def export_now(
    model: LoadedModel, folder: Path, *, precision: Any, size: Size, prompts: Path | None, say: Say
) -> tuple[ExportInfo, float]:
    """(the student exported into ``folder`` at one fixed size, seconds). Raises what exporting raises, UsageError.

    In 8 bits it is calibrated with the run's ``prompts``, or the scenes that stand for them.
    """
    from tiue_cli.export.onnx.export import export_student
    from tiue_cli.model.student import save_student

    started = time.perf_counter()
    # Saved as it is loaded: random weights, another autoencoder and a teacher's untrained student have no folder.
    student = save_student(model.student, folder / "student")
    config = ExportConfig(
        student=str(student),
        out=folder / "export",
        precision=precision,
        sizes=(size,),
        check=False,
        calibration=None if precision != "int8" else EMBEDDED if prompts is None else str(prompts),
    )
    result = export_student(
        config, stage=lambda what, number, total: say(f"exporting {model.name}: {what} ({number} of {total})")
    )
    return ExportInfo(result.folder, result.manifest), time.perf_counter() - started


def engine_now(export: ExportInfo, *, batches: Sequence[int], say: Say) -> tuple[ExportInfo, float]:
    """(the export with a new engine with a profile for each batch, seconds). Raises what ``build_engine`` raises."""
    from tiue_cli.export.trt.engine import build_engine

    started = time.perf_counter()
    config = EngineConfig(export=export.path, batches=tuple((batch, batch, batch) for batch in batches), check=False)
    result = build_engine(config, stage=lambda what, share, text: say(f"{what}: {share:.0%} {text}"))
    return ExportInfo(export.path, export.manifest, engine=result.folder), time.perf_counter() - started


def check_engine(export: ExportInfo, *, size: Size, batches: Sequence[int]) -> None:
    """Raise DeviceError, ManifestError or MissingDependencyError where no engine lies ready that takes every batch."""
    largest = TrtBackend(export.path, engine=export.engine).largest_batch(size)
    if largest is None or largest < max(batches):
        raise DeviceError(
            f"the engine in {export.path} takes"
            f" {'no pictures of this size' if largest is None else f'{largest} images'}",
            hint=f"build it for more: tiue export {export.path} --trt --batch {max(batches)}",
        )
