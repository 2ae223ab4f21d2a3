"""What ``tiue export`` does with a config: write the folder and show that it is equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiue_cli.console import Console

if TYPE_CHECKING:
    from tiue_cli.export.config import ExportConfig


def run_export(config: ExportConfig, console: Console) -> None:
    """Export with a line a step, the parity table, the path of the folder, and the next command."""
    config.validate()
    from tiue_cli.export.to_onnx import export_student

    with console.steps() as begin:
        result = export_student(config, stage=begin)
    console.export(result)
