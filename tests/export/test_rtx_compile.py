"""A real compiler takes the exported graphs: TensorRT-RTX, ahead of time, on the CPU, through our own builder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from exports import build_small_student, exported

from tiue_cli.export.manifest import read_export_manifest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES),
    reason="TensorRT-RTX is not installed: pip install 'tiue[rtx-check]'",
)
def test_tensorrt_rtx_compiles_every_fp16_graph_with_two_profiles(tiny_student_folder: Path, tmp_path: Path) -> None:
    student = build_small_student(tiny_student_folder, tmp_path / "student")
    folder = exported(student, precision="fp16", sizes=((16, 12),), opset=23)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_rtx.py"), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["graph"] for one in built] == [graph.onnx.file for graph in read_export_manifest(folder).graphs]
    for one in built:
        assert one["profiles"] == 2 and one["layers"] > 0 and one["plan_bytes"] > 10_000
