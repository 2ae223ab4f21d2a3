"""A runtime installation: an empty environment, ``requirements/runtime.txt``, the wheel without its dependencies.

The installing test downloads, so it is of the group ``install`` (``pytest -m install``), which runs in CI.
"""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tiue_cli.base.machine import POLYGRAPHY, TENSORRT, TORCH
from tiue_cli.errors import FULL_INSTALLATION, MissingDependencyError, full_installation

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LARGEST_BYTES = 350 * 1000**2
"""Of the environment's packages without pip: 260 MB on Linux x86-64 with ONNX Runtime 1.31."""

_DRAW = """
import json, sys
import tiue_cli as tiue
with tiue.load("export") as pipe:
    pipe("a red heart", seed=3, steps=4)[0].save("python.png")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def requirements(file: str) -> dict[str, str]:
    """Requirement by distribution name, without extras and markers."""
    lines = (REQUIREMENTS / file).read_text(encoding="utf-8").splitlines()
    return dict(split(line) for line in lines if line and not line.startswith("#"))


def split(requirement: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[[^\]]*\])?([^;]*?)\s*(?:;.*)?", requirement)
    assert match is not None, requirement
    return match[1], match[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as opened:
        found: dict[str, Any] = tomllib.load(opened)["project"]
    return found


def test_what_pip_is_asked_for_is_what_the_package_asks_for(project: dict[str, Any]) -> None:
    assert {TORCH, POLYGRAPHY} <= set(project["dependencies"])
    oldest, newest = (".".join(map(str, version)).removesuffix(".0") for version in TENSORRT)
    assert project["optional-dependencies"]["trt"] == [f"tensorrt>={oldest},<{newest}"]


@pytest.mark.parametrize("file", ["runtime.txt", "runtime-cuda.txt", "serve.txt"])
def test_runtime_ranges_are_those_of_the_package(file: str, project: dict[str, Any]) -> None:
    whole = dict(split(line) for line in project["dependencies"])
    asked = requirements(file)
    assert asked.items() <= whole.items()
    assert not set(asked) & {name.replace("_", "-") for name in FULL_INSTALLATION}


def test_the_absence_of_a_library_is_one_error_that_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match="drawing needs torch") as caught, full_installation("drawing"):
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert caught.value.hint == "install the rest: python -m pip install tiue"
    # What is not ours to know about stays what it is.
    with pytest.raises(ModuleNotFoundError), full_installation("drawing"):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")


@pytest.mark.install
def test_an_empty_environment_draws_from_an_export_without_torch(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    from tiny_export import write_tiny_export

    from tiue_cli.backends.onnx_backend import OnnxBackend
    from tiue_cli.model.noise import draw_noise

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=900
        )
        assert (done.returncode == 0) is ok, done.stderr
        return done

    python, tiue = tmp_path / "venv/bin/python", tmp_path / "venv/bin/tiue"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "-r", REQUIREMENTS / "runtime.txt")
    run(python, "-m", "pip", "install", "--no-deps", next(tmp_path.glob("tiue-*.whl")))

    write_tiny_export(tmp_path / "export", precision="fp32")
    loaded = run(python, "-c", _DRAW).stdout
    assert not FULL_INSTALLATION & set(re.findall(r'"(\w+)"', loaded))
    run(tiue, "generate", "a red heart", "--seed", "3", "--model", "export", "--out", "command.png")
    run(tiue, "doctor")
    run(tiue, "inspect", "export")
    drawn = [np.asarray(Image.open(tmp_path / name)) for name in ("python.png", "command.png")]
    with OnnxBackend(tmp_path / "export", provider="cpu") as backend:
        wanted = backend.generate(["a red heart"], draw_noise([3], backend.latent_shape(backend.default_size)))[0]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    # Another build of ONNX Runtime may round otherwise.
    assert np.abs(drawn[0].astype(int) - wanted).max() <= 1

    # Papercut draws by its packaged graphs; its teacher is a model folder like any other.
    run(tiue, "generate", "a red heart", "--seed", "3", "--out", "papercut.png")
    refused = run(tiue, "generate", "a red heart", "--model", "papercut-teacher", ok=False).stderr
    assert "needs torch" in refused and "python -m pip install tiue" in refused and "Traceback" not in refused
    refused = run(python, "-c", "import tiue_cli; tiue_cli.TiuePipeline", ok=False).stderr
    assert "MissingDependencyError: TiuePipeline needs" in refused and "python -m pip install tiue" in refused

    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    installed = {path.name.partition("-")[0] for path in site.glob("*.dist-info")}
    assert not installed & FULL_INSTALLATION
    size_bytes = sum(
        file.stat().st_size for file in site.rglob("*") if file.is_file() and file.relative_to(site).parts[0] != "pip"
    )
    record_property("size_bytes", size_bytes)
    assert size_bytes < LARGEST_BYTES, (
        f"{size_bytes / 1000**2:.0f} MB in {len(installed)} packages: {sorted(installed)}"
    )

    run(python, "-m", "pip", "install", "-r", REQUIREMENTS / "serve.txt")
    words = [tiue, "serve", "export", "--port", "0"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            served = _served(url, {"prompt": "a red heart", "seed": 3})
        finally:
            server.terminate()
    assert server.returncode == 0
    np.testing.assert_array_equal(served, drawn[0])


def _served(url: str, asked: dict[str, Any]) -> np.ndarray:
    """The picture that a server sends once it is ready."""
    answer = httpx.get(f"{url}/readyz", timeout=60)
    until_s = time.monotonic() + 60
    while answer.status_code != 200 and time.monotonic() < until_s:
        time.sleep(0.1)
        answer = httpx.get(f"{url}/readyz", timeout=60)
    data = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60).json()["data"][0]["b64_json"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
