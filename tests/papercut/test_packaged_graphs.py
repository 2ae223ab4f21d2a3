"""The packaged student's graphs: over its own weights, drawing on a CPU by themselves, the same pictures as torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tiue_cli.backends import cuda
from tiue_cli.errors import UsageError
from tiue_cli.files.exports import read_export_manifest
from tiue_cli.files.external_data import external_files
from tiue_cli.files.png import LoraUse
from tiue_cli.generate.config import GenerateConfig
from tiue_cli.generate.packaged import PackagedBackend
from tiue_cli.generate.session import Session, open_backend
from tiue_cli.generate.target import open_target
from tiue_cli.model.hub import EMBEDDED, resolve_model
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.noise import draw_noise
from tiue_cli.model.parts import PACKAGED

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "make them anew: python benchmarks/papercut/package_graphs.py"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: 0)


def test_they_are_those_of_the_packaged_student_and_hold_no_weights() -> None:
    manifest = read_export_manifest(PACKAGED)
    assert manifest.student.sha256 == model_sha256(resolve_model(EMBEDDED)), AGAIN
    assert manifest.parity is not None and manifest.parity.image_psnr_db > 60
    for graph in manifest.graphs:
        content = (PACKAGED / graph.onnx.file).read_bytes()
        assert external_files(content) == {spec.file for spec in graph.data}
        assert all(spec.file.endswith(".safetensors") for spec in graph.data)
        model = onnx.load(PACKAGED / graph.onnx.file, load_external_data=False)
        inline = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
        assert all(len(tensor.raw_data) <= 16_000 for tensor in inline)
        onnx.checker.check_model(PACKAGED / graph.onnx.file)
    assert sum(graph.onnx.size_bytes for graph in manifest.graphs) < 500_000


def test_the_first_picture_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors', 'onnx'): sys.modules[name] = None\n"
        "from tiue_cli.cli.app import main\n"
        f"assert main(['generate', 'a red heart', '--device', 'cpu', '--out', {str(tmp_path)!r}, '--seed', '1']) == 0\n"
        "assert 'onnxruntime' in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_torch_draws_the_same_pictures() -> None:
    """Within one level: both compute in float32, in another order."""
    prompts = ["a red heart at night", "a blue fish under the sea", "a yellow star above a green tree"]
    noise, pictures = draw_noise(range(3), (4, 16, 16)), {}
    for backend in ("auto", "torch"):
        config = GenerateConfig(backend=backend, device="cpu")  # type: ignore[arg-type]
        with open_backend(config, open_target(config)) as opened:
            assert (opened.name, opened.device, opened.dtype) == (
                "onnx" if backend == "auto" else "torch",
                "cpu",
                "fp32",
            )
            pictures[backend] = [opened.generate(prompts, noise, steps=steps).astype(int) for steps in (None, 2)]
    for ours, theirs in zip(pictures["auto"], pictures["torch"], strict=True):
        difference = np.abs(ours - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_options_that_only_torch_has_choose_torch() -> None:
    def chosen(**options: Any) -> str:
        return open_target(GenerateConfig(**options)).backend

    assert chosen() == chosen(device="cpu") == chosen(dtype="fp32") == chosen(backend="onnx") == "onnx"
    assert chosen(long_prompts="chunk") == chosen(encoder_timestep="first") == chosen(dtype="bf16") == "torch"
    assert chosen(backend="torch") == chosen(model="papercut-teacher") == "torch"
    with pytest.raises(UsageError, match="--long-prompts chunk needs torch, and --backend says onnx"):
        chosen(backend="onnx", long_prompts="chunk")
    with pytest.raises(UsageError, match="--precision bf16 needs torch"):
        chosen(backend="onnx", dtype="bf16")
    with pytest.raises(UsageError, match="--backend trt runs exported students, and papercut is a model folder") as trt:
        chosen(backend="trt")
    assert trt.value.hint == "export it, and give --model that folder: tiue export papercut --trt"
    with pytest.raises(UsageError, match="runs exported students"):
        chosen(backend="onnx", model="papercut-teacher")


def test_where_there_is_a_gpu_torch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    assert open_target(GenerateConfig()).backend == "torch"
    assert open_target(GenerateConfig(device="cpu")).backend == "onnx"


def test_a_model_keeps_its_name_and_its_pictures(tmp_path: Path) -> None:
    """What the graphs draw is skipped as done where torch drew it before: it is the same model."""
    by_torch = open_target(GenerateConfig(backend="torch"))
    assert open_target(GenerateConfig()).model_id == by_torch.model_id
    with Session(GenerateConfig(out=tmp_path)) as session:
        assert session.target.info.kind == "student"


class Drawing:
    """A backend that answers with a number, and counts how often it was entered."""

    def __init__(self, number: int) -> None:
        self.number, self.entered, self.loras = number, 0, None

    def generate(self, *arguments: Any, **options: Any) -> int:
        return self.number

    def use_loras(self, loras: Any) -> None:
        self.loras = loras

    def __enter__(self) -> Drawing:
        self.entered += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self.entered -= 1


def test_adapters_are_drawn_by_torch_and_the_bare_model_by_its_graphs_again() -> None:
    class Graphs(Drawing):
        use_loras = None  # type: ignore[assignment]

    graphs, torch = Graphs(1), Drawing(2)
    use: Any = LoraUse.model_construct(source="x", weight=1.0)
    noise: Any = None
    with PackagedBackend(graphs, lambda: torch) as backend:  # type: ignore[arg-type, return-value]
        backend.use_loras(())
        assert backend.generate([], noise) == 1 and torch.entered == 0, "nothing is loaded unasked"
        backend.use_loras((use,))
        assert backend.generate([], noise) == 2 and torch.loras == (use,)
        backend.use_loras(())
        assert backend.generate([], noise) == 1 and torch.loras == ()
        assert (graphs.entered, torch.entered) == (1, 1)
    assert (graphs.entered, torch.entered) == (0, 0)
