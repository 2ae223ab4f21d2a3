"""The Triton repository: configs that Triton's own protobuf reads, and graphs that draw what the export draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tiny_export import write_tiny_export

from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.tokenizer import PromptTokenizer
from tiue_cli.errors import ManifestError, OutputError, UsageError
from tiue_cli.export.triton.repository import TRITON_MANIFEST, write_repository
from tiue_cli.files.hashes import sha256_file
from tiue_cli.model.noise import draw_noise


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    write_tiny_export(folder, precision="fp32")
    return folder


def configs(repository: Path) -> dict[str, Any]:
    """Every config.pbtxt, parsed by Triton's own protobuf."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    found = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        found[path.parent.name] = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    return found


def test_a_graph_that_is_no_onnx_is_one_clear_error(export: Path, tmp_path: Path) -> None:
    """Its hash is right, so that it was exported like this, or the manifest was changed with it."""
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    file = next(graph["onnx"] for graph in manifest["graphs"] if graph["name"] == "unet_decoder")
    (folder / file["file"]).write_bytes(b"\xff" * 100)
    file |= {"sha256": sha256_file(folder / file["file"]), "size_bytes": 100}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="cannot be read as ONNX"):
        write_repository(folder, tmp_path / "repository")


@pytest.mark.parametrize("backend", ["onnx", "tensorrt", "python"])
def test_triton_reads_the_configs_and_every_port_of_the_ensemble_is_fed(
    export: Path, tmp_path: Path, backend: Any
) -> None:
    result = write_repository(export, tmp_path / "repo", backend=backend, steps=(4, 2), max_batch=8)
    found = configs(tmp_path / "repo")
    assert result.ensembles == ("tiue_k4", "tiue_k2")
    models = {"tokenize", "text_encoder", "unet_encoder", "unet_decoder_k4", "unet_decoder_k2", "vae_decoder"}
    assert set(found) == models | set(result.ensembles)
    for name, config in found.items():
        assert (config.name, config.max_batch_size) == (name, 8)
        assert (tmp_path / "repo" / name / "1").is_dir()
        if name not in result.ensembles:
            assert config.dynamic_batching.max_queue_delay_microseconds == 5000
            assert max(config.dynamic_batching.preferred_batch_size) <= 8
            assert config.backend == "python" if name == "tokenize" or backend == "python" else config.platform
    for name in result.ensembles:
        known = {port.name: (port.data_type, tuple(port.dims)) for port in found[name].input}
        for step in found[name].ensemble_scheduling.step:
            model = found[step.model_name]
            assert set(step.input_map) == {port.name for port in model.input}
            assert set(step.output_map) == {port.name for port in model.output}
            for port in model.input:
                data_type, dims = known[step.input_map[port.name]]
                assert port.data_type == data_type
                assert all(-1 in pair or pair[0] == pair[1] for pair in zip(dims, port.dims, strict=True))
            known |= {step.output_map[port.name]: (port.data_type, tuple(port.dims)) for port in model.output}
        assert [port.name for port in found[name].output] == ["images"]


@pytest.mark.parametrize("steps", [2, 4])
def test_the_graphs_of_an_ensemble_draw_what_the_export_draws(export: Path, tmp_path: Path, steps: int) -> None:
    write_repository(export, tmp_path / "repo", steps=(steps,))
    prompts, shape = ["a red star", "a tree"], (4, 16, 16)
    with OnnxBackend(export, provider="cpu") as backend:
        shape = backend.latent_shape(backend.default_size)
        expected = backend.generate(prompts, draw_noise([3, 4], shape), steps=steps)
    ids = PromptTokenizer(tmp_path / "repo" / "tokenize" / "1" / "tokenizer.json")(prompts)
    values: dict[str, Any] = {"input_ids": ids, "noise": draw_noise([3, 4], shape)}
    for model in ("text_encoder", "unet_encoder", f"unet_decoder_k{steps}", "vae_decoder"):
        path = tmp_path / "repo" / model / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = {port.name: values[port.name] for port in session.get_inputs()}
        values |= zip([port.name for port in session.get_outputs()], session.run(None, inputs), strict=True)
    assert (values["images"] == expected).all()


def test_the_manifest_has_a_hash_of_every_file(export: Path, tmp_path: Path) -> None:
    write_repository(export, tmp_path / "repo")
    data = json.loads((tmp_path / "repo" / TRITON_MANIFEST).read_text())
    there = {
        path.relative_to(tmp_path / "repo").as_posix() for path in (tmp_path / "repo").rglob("*") if path.is_file()
    }
    assert set(data["files"]) == there - {TRITON_MANIFEST}
    assert all(sha256_file(tmp_path / "repo" / name) == digest for name, digest in data["files"].items())


def test_what_cannot_be_is_refused_and_leaves_nothing(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="9 steps"):
        write_repository(export, tmp_path / "repo", steps=(9,))
    with pytest.raises(UsageError, match="33x33"):
        write_repository(export, tmp_path / "repo", size=(33, 33))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputError):
        write_repository(export, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "file").exists()


def test_the_models_need_nothing_of_ours() -> None:
    import ast

    import tiue_cli.export.triton.repository as module

    for path in (Path(module.__file__).parent / "models").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        standard = {"json", "os", "pathlib", "typing"}
        assert names - standard <= {"numpy", "onnxruntime", "tokenizers", "triton_python_backend_utils"}
