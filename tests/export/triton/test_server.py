"""A real Triton server with the repository: 32 requests at once, the very pixels of ``tiue generate``, in batches.

Needs an environment of its own: ``TIUE_TRITON_PYTHON`` names its interpreter (see docs/triton.md), which has
nvidia-pytriton (for the server), numpy 1, onnxruntime and tokenizers.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.export.triton.repository import write_repository
from tiue_cli.model.noise import draw_noise

pytestmark = pytest.mark.triton
PYTHON = os.environ.get("TIUE_TRITON_PYTHON", "")
grpc = pytest.importorskip("tritonclient.grpc")
from tritonclient.utils import InferenceServerException  # noqa: E402


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """papercut's export where TIUE_TRITON_EXPORT names one, else a tiny one."""
    if named := os.environ.get("TIUE_TRITON_EXPORT"):
        return Path(named)
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    write_tiny_export(folder, precision="fp32")
    return folder


@pytest.fixture(scope="module")
def server(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(gRPC address, URL of the metrics) of a running server."""
    if not PYTHON:
        pytest.skip("TIUE_TRITON_PYTHON names no interpreter")
    repository = tmp_path_factory.mktemp("triton") / "models"
    write_repository(export, repository, backend="python", steps=(4, 2))
    asked = "import pytriton, sys; print(pytriton.__path__[0], '%d.%d' % sys.version_info[:2])"
    told = subprocess.run([PYTHON, "-c", asked], capture_output=True, encoding="utf-8", check=True).stdout
    home, version = told.split()
    triton = Path(home) / "tritonserver"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    backends = tmp_path_factory.mktemp("backends") / "python"
    backends.mkdir()
    for file in (triton / "backends" / "python").iterdir():
        (backends / file.name).symlink_to(file)
    (backends / stub.name).unlink(missing_ok=True)
    (backends / stub.name).symlink_to(stub)
    http, rpc, metrics = free_port(), free_port(), free_port()
    words = [f"--model-repository={repository}", f"--backend-directory={backends.parent}"]
    for name, port in (("http", http), ("grpc", rpc), ("metrics", metrics)):
        words += [f"--{name}-address", "127.0.0.1", f"--{name}-port", str(port)]
    # The stub takes its Python from PATH.
    environment = {**os.environ, "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    environment["VIRTUAL_ENV"] = str(Path(PYTHON).parent.parent)
    environment.pop("PYTHONPATH", None)
    with (repository.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(triton / "bin" / "tritonserver"), *words], env=environment, stdout=log, stderr=log
        )
    try:
        client = grpc.InferenceServerClient(f"127.0.0.1:{rpc}")
        until_s = time.monotonic() + 120
        while True:
            # While nothing listens yet, the client raises.
            with contextlib.suppress(InferenceServerException):
                if client.is_server_ready():
                    break
            said = (repository.parent / "log").read_text(errors="replace")
            assert process.poll() is None and time.monotonic() < until_s, said[-4000:]
            time.sleep(0.2)
        yield f"127.0.0.1:{rpc}", f"http://127.0.0.1:{metrics}/metrics"
    finally:
        process.terminate()
        process.wait(60)


def ask(client: Any, model: str, prompt: str, seed: int) -> np.ndarray:
    prompts = grpc.InferInput("prompt", [1, 1], "BYTES")
    prompts.set_data_from_numpy(np.array([[prompt.encode()]], dtype=object))
    seeds = grpc.InferInput("seed", [1, 1], "INT64")
    seeds.set_data_from_numpy(np.array([[seed]], dtype=np.int64))
    answer = client.infer(model, [prompts, seeds], outputs=[grpc.InferRequestedOutput("images")])
    images: np.ndarray = answer.as_numpy("images")
    return images[0]


def executions(url: str) -> dict[str, tuple[int, int]]:
    """(images, runs) of each model so far."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()

    def counts(name: str) -> dict[str, int]:
        return {model: int(float(n)) for model, n in re.findall(rf'^{name}{{model="(\w+)".*}} (\S+)$', text, re.M)}

    images, runs = counts("nv_inference_count"), counts("nv_inference_exec_count")
    return {model: (images[model], runs[model]) for model in runs}


def test_32_requests_at_once_share_runs_and_have_the_pixels_of_generate(server: tuple[str, str], export: Path) -> None:
    client = grpc.InferenceServerClient(server[0])
    before = executions(server[1])
    asked = [("tiue_k4" if i % 2 else "tiue_k2", ("a red star", "a blue house", "a tree")[i % 3], i) for i in range(96)]
    with ThreadPoolExecutor(32) as threads:
        images = list(threads.map(lambda one: ask(client, *one), asked))
    with OnnxBackend(export, provider="cpu") as backend:
        shape = backend.latent_shape(backend.default_size)
        for (model, prompt, seed), image in zip(asked, images, strict=True):
            steps = int(model.removeprefix("tiue_k"))
            (own,) = backend.generate([prompt], draw_noise([seed], shape), steps=steps)
            assert np.abs(own.astype(int) - image.astype(int)).max() <= EDGE, (model, prompt, seed)
    after = executions(server[1])
    for model in ("unet_decoder_k4", "unet_decoder_k2", "vae_decoder"):
        drawn, runs = (now - then for now, then in zip(after[model], before[model], strict=True))
        assert drawn >= 48 and runs < drawn, f"{model}: {drawn} images in {runs} runs"


EDGE = 0 if os.environ.get("TIUE_TRITON_EXPORT") else 1
"""The tiny export's matrix products round by the batch, so a value on the edge of two levels may take either."""


@pytest.mark.parametrize(("prompt", "seed", "said"), [("", 0, "empty"), ("a", -1, "out of range")])
def test_what_cannot_be_drawn_is_an_error_of_the_request(
    server: tuple[str, str], prompt: str, seed: int, said: str
) -> None:
    client = grpc.InferenceServerClient(server[0])
    with pytest.raises(InferenceServerException, match=said):
        ask(client, "tiue_k4", prompt, seed)
    assert ask(client, "tiue_k4", "a", 0).ndim == 3
