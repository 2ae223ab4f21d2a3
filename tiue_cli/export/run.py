"""What the command and the Python API call: checks of headers first, then the libraries that take seconds to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tiue_cli.errors import full_installation
from tiue_cli.export.config import EngineConfig, ExportConfig, checked_student

if TYPE_CHECKING:
    from tiue_cli.export.onnx.export import ExportResult
    from tiue_cli.export.trt.engine import EngineResult


def run_export(config: ExportConfig, *, stage: Callable[[str, int, int], None] | None = None) -> ExportResult:
    """``export_student`` once its folder has been checked; ``stage`` is told what begins, its number, of how many.

    Raises what ``checked_student`` and ``export_student`` raise, MissingDependencyError.
    """
    info = checked_student(config)
    with full_installation("exporting"):
        from tiue_cli.export.onnx.export import export_student

    return export_student(config, info=info, stage=stage)


def run_engine(config: EngineConfig, *, stage: Callable[[str, float, str], None] | None = None) -> EngineResult:
    """``build_engine`` once the export and TensorRT are known to be there; raises what both raise."""
    from tiue_cli.backends.trt_device import require_tensorrt
    from tiue_cli.files.exports import read_export_manifest

    read_export_manifest(config.export)
    require_tensorrt()
    from tiue_cli.export.trt.engine import build_engine

    return build_engine(config, stage=stage)
