"""The OpenVINO backend: the pictures of ONNX Runtime from the same files, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import exported, torch_images
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.openvino_backend import CompiledGraph, OpenvinoBackend
from tiue_cli.errors import DeviceError
from tiue_cli.model.hub import EMBEDDED, resolve_model
from tiue_cli.model.noise import draw_noise

pytestmark = pytest.mark.openvino
pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'tiue[openvino]'")

PROMPTS = ["a red star above a blue house", "a heart", "a blue house at night"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No compiled model of another test, or of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tiue" / "openvino"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "tiny", precision="fp32")
    return tmp_path / "tiny"


def test_same_seed_same_image_as_onnx_runtime(tiny: Path) -> None:
    """At batches, sizes and K of all kinds; a value may be rounded to its neighbour."""
    with OpenvinoBackend(tiny) as backend, OnnxBackend(tiny, provider="cpu") as reference:
        for size, batch, steps in (((32, 32), 1, None), ((32, 32), 3, 2), ((16, 48), 2, 4), ((32, 32), 1, None)):
            noise = draw_noise(range(batch), backend.latent_shape(size))
            found = backend.generate(PROMPTS[:batch], noise, steps=steps).astype(int)
            expected = reference.generate(PROMPTS[:batch], noise, steps=steps).astype(int)
            assert found.shape == (batch, *size, 3) and np.abs(found - expected).max() <= 1
        assert (backend.name, backend.device, backend.dtype) == ("openvino", "cpu", "fp32")


def test_many_shapes_share_one_compiled_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server sees sixteen batch sizes: each graph is compiled for the first, and once more for all others."""
    compiled: list[tuple[str, bool]] = []
    compile_one = CompiledGraph._compile

    def counted(self: CompiledGraph, model: Any, shapes: Any) -> Any:
        compiled.append((self._path.name, shapes is None))
        return compile_one(self, model, shapes)

    monkeypatch.setattr(CompiledGraph, "_compile", counted)
    with OpenvinoBackend(tiny) as backend:
        for batch in (1, 2, 3, 1, 2):
            backend.generate(["a star"] * batch, draw_noise(range(batch), (4, 8, 8)))
    graphs = ("text_encoder.onnx", "unet_encoder.onnx", "unet_decoder.onnx", "vae_decoder.onnx")
    assert sorted(compiled) == sorted((graph, shared) for graph in graphs for shared in (False, True))


def test_a_second_start_finds_the_compiled_models(tiny: Path, cache: Path) -> None:
    noise = draw_noise([3], (4, 8, 8))
    with OpenvinoBackend(tiny) as backend:
        first = backend.generate(["a star"], noise)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.blob")}
    assert len(kept) == 4
    with OpenvinoBackend(tiny) as backend:
        np.testing.assert_array_equal(backend.generate(["a star"], noise), first)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.blob")} == kept


def test_pictures_outlive_the_next_run(tiny: Path) -> None:
    """The runtime lends its memory; what is handed out is a copy."""
    with OpenvinoBackend(tiny) as backend:
        latents = backend.latents(["a star"], draw_noise([1], (4, 8, 8)))
        images = backend.generate(["a star"], draw_noise([1], (4, 8, 8)))
        before = latents.copy(), images.copy()
        backend.generate(["a red heart"], draw_noise([2], (4, 8, 8)))
        np.testing.assert_array_equal(latents, before[0])
        np.testing.assert_array_equal(images, before[1])


def test_graphs_of_half_precision_are_computed_in_fp32_on_a_cpu(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "half", precision="fp16")
    with OpenvinoBackend(tmp_path / "half") as backend, OnnxBackend(tmp_path / "half", provider="cpu") as reference:
        noise = draw_noise([0], backend.latent_shape((32, 32)))
        found, expected = (side.generate(PROMPTS[:1], noise).astype(int) for side in (backend, reference))
        assert backend.dtype == "fp32" and np.abs(found - expected).max() <= 2


def test_latents_that_are_no_numbers_are_an_error(tiny: Path) -> None:
    noise = draw_noise([0], (4, 8, 8))
    noise[0, 0, 0, 0] = np.nan
    with OpenvinoBackend(tiny) as backend, pytest.raises(DeviceError, match="produced NaN or infinity in fp32"):
        backend.generate(["a star"], noise)


def test_a_run_needs_no_torch(tiny: Path, tmp_path: Path) -> None:
    """In a process where torch and ONNX Runtime cannot even be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors', 'onnx', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "from tiue_cli.cli.app import main\n"
        f"words = ['generate', 'a red heart', '--model', {str(tiny)!r}, '--seed', '0', '--out', 'o']\n"
        "code = main([*words, '--backend', 'openvino'])\n"
        "code += main(['inspect', 'o/a-red-heart-0.png'])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "openvino on cpu in fp32" in done.stdout


def test_papercut_in_openvino_is_papercut_in_torch() -> None:
    """A real student: pictures of seeds within a level of torch's, and the export's own check says so."""
    from tiue_cli.model.student import load_student

    folder = exported(resolve_model(EMBEDDED))
    with OpenvinoBackend(folder, precision="fp32") as backend:
        student = load_student(EMBEDDED)
        for size in (backend.default_size, (40, 56)):  # 10 x 14 latents: levels of odd sides
            noise = draw_noise([0, 1, 2], backend.latent_shape(size))
            found = backend.generate(PROMPTS, noise).astype(int)
            assert np.abs(found - torch_images(student, PROMPTS, noise).astype(int)).max() <= 1
        assert backend.manifest.parity is not None
        checked = [entry for entry in backend.manifest.parity.runtimes if entry.precision == "fp32"]
    assert len(checked) == 1 and checked[0].holds and checked[0].required_psnr_db == 60
