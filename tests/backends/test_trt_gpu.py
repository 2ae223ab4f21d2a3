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

from tiue_cli.backends.trt_device import missing_packages
from tiue_cli.backends.trt_runner import driver_library
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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
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


SHAPES = """
import sys
import numpy as np
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.backends.trt_runner import memory_bytes
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.model.noise import draw_noise

with TrtBackend(sys.argv[1]) as backend, OnnxBackend(sys.argv[1], provider="cpu") as reference:
    free = []
    for round in range(20):
        for batch, steps in ((1, 4), (3, 4), (16, 1), (3, 4), (3, 2), (1, 1)):
            noise = draw_noise(range(batch), backend.latent_shape((32, 32)))
            prompts = (["a red heart", "a yellow star"] * 8)[:batch]
            found = backend.generate(prompts, noise, steps=steps)
            if round in (0, 1, 19):
                expected = reference.generate(prompts, noise, steps=steps)
                assert psnr_db(found, expected) >= 35, (round, batch, steps)
        free.append(memory_bytes()[0])
    assert backend.graph_problem is None, backend.graph_problem
    assert sum(chain.captures for chain in backend._chains.values()) == 0, "every shape changed before its second run"
    for _ in range(5):
        backend.generate(["a red heart"] * 3, draw_noise(range(3), backend.latent_shape((32, 32))))
    chain = backend._chains[1]
    assert (chain.captures, chain.graph_runs) == (1, 4), (chain.captures, chain.graph_runs)
    assert free[-1] >= free[1] - 2**20, "memory leaks away"
"""


def test_changing_shapes_stay_right_and_keep_their_memory(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_export(folder)
    python("-m", "tiue_cli", "export", str(folder), "--trt", "--format", "quiet")
    python("-c", SHAPES, str(folder))
