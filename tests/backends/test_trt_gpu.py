"""The real thing, where there is a GPU, its driver and TensorRT; in processes of its own, away from the fakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_export import write_tiny_export
from trt_shapes import SHAPES

from tiue_cli.backends.cuda import driver_library
from tiue_cli.backends.trt_device import missing_packages
from tiue_cli.export.tolerance import psnr_db

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(driver_library() is None, reason="no NVIDIA GPU"),
    pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {', '.join(missing_packages())}"),
]


def python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("sizes", [(), ((32, 32), (32, 48))])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_engine_is_built_equals_its_graphs_and_draws(
    precision: str, sizes: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    write_tiny_export(folder, precision=precision, sizes=sizes)  # type: ignore[arg-type]
    document = json.loads(python("-m", "tiue_cli", "export", str(folder), "--trt", "--format", "json"))
    engine = document["engine"]["manifest"]
    assert engine["parity"]["image_psnr_db"] >= engine["parity"]["required_psnr_db"]
    assert document["engine"]["notes"] == [], "no CUDA graphs, or too little memory"
    pictures = []
    for backend in ("trt", "onnx"):
        file = tmp_path / f"{backend}.png"
        options = ["--backend", backend, "--seed", "3", "--out", str(file)]
        python("-m", "tiue_cli", "generate", "a red heart", "--model", str(folder), *options)
        pictures.append(np.asarray(Image.open(file)))
    assert psnr_db(*pictures) >= 35


def test_changing_shapes_stay_right_and_keep_their_memory(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_export(folder)
    python("-m", "tiue_cli", "export", str(folder), "--trt", "--format", "quiet")
    python("-c", SHAPES, str(folder))
