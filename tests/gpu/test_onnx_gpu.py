"""ONNX Runtime on a real GPU, in a process of its own; skipped where its CUDA provider is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import read_cuda_options
from tiue_cli.export.tolerance import psnr_db
from tiue_cli.model.noise import draw_noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable GPU"),
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime-gpu is not installed"
    ),
]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_cuda_draws_what_the_cpu_draws(precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_export(folder, precision=precision)
    prompts = ["a red star", "a blue tree"]
    images: dict[str, np.ndarray] = {}
    for provider in ("cpu", "cuda"):
        with OnnxBackend(folder, provider=provider) as backend:
            noise = draw_noise([0, 1], backend.latent_shape(backend.default_size))
            images[provider] = backend.generate(prompts, noise)
            for batch in (1, 2):  # alternating shapes
                again = backend.generate(prompts[:batch], noise[:batch])
                assert psnr_db(again, images[provider][:batch]) >= 35.0
    assert psnr_db(images["cuda"], images["cpu"]) >= (60.0 if precision == "fp32" else 35.0)


@pytest.mark.parametrize("words", ["graphs", "nhwc", "search", "memory=4", "graphs,nhwc,search"])
def test_every_option_draws_what_the_default_draws(words: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_export(folder, precision="fp16")
    prompts = ["a red star", "a blue tree", "a house"]
    with OnnxBackend(folder, provider="cuda") as backend:
        noise = draw_noise([0, 1, 2], backend.latent_shape(backend.default_size))
        wanted = {batch: backend.generate(prompts[:batch], noise[:batch]) for batch in (1, 3)}
    with OnnxBackend(folder, provider="cuda", cuda=read_cuda_options(words)) as backend:
        for _ in range(3):  # plain, recorded, repeated
            for batch, images in wanted.items():
                assert psnr_db(backend.generate(prompts[:batch], noise[:batch]), images) >= 35.0, batch
        if "graphs" in words:
            assert not any("CUDA graph" in note for note in backend.notes), backend.notes
            assert backend._static and all(runs.recorded > 0 for runs in backend._static)
