"""A student small enough to be exported in a test run, and its exports: written once, kept by content.

The cache lies in the system's temporary folder; its key holds everything that the bytes depend on, so that a stale
export cannot pass for a fresh one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from helpers import TINY_TEXT_WIDTH
from onnxscript.optimizer import optimize

from tiue_cli.export.config import ExportConfig
from tiue_cli.export.onnx.trace import Trace, _write
from tiue_cli.files.exports import EXPORT_MANIFEST, GraphSpec, read_export_manifest
from tiue_cli.files.manifests import write_json
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.parts import packaged_graphs
from tiue_cli.model.student import StudentModel, load_student, save_student

_PACKAGE = Path(__file__).resolve().parents[2] / "tiue_cli"
_SOURCES = ("export", "model", "backends", "files")
_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
)


def build_small_student(source: Path, out: Path) -> Path:
    """A student of two levels with a tiny autoencoder of factor 2: its four graphs take half a minute to trace.

    Biases and norms are random as well: at their defaults they would hide a term that is left out.
    """
    student = load_student(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        student.unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 48),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TINY_TEXT_WIDTH,
            attention_head_dim=2,
        ).eval()
        student.vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()
        with torch.no_grad():
            for parameter in (*student.unet.parameters(), *student.text_encoder.parameters()):
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return save_student(student, out)


def exported(student: Path, **options: Any) -> Path:
    """The export folder of ``student`` with these options of ``ExportConfig``; copy it before you damage it."""
    from tiue_cli.export.onnx.export import export_student

    folder = _cache() / _key(student, options) / "export"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes share a test run: the second one waits for the first one's export.
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / EXPORT_MANIFEST).is_file():
            config = ExportConfig(student=str(student), out=folder, overwrite=True, **options)
            with _packaged_traces(config):
                export_student(config)
    return folder


@contextlib.contextmanager
def _packaged_traces(config: ExportConfig) -> Iterator[None]:
    """Within the block the packaged student is not traced where the package has the very graphs.

    Tracing it takes a minute. The export compares the graphs with torch as it does any others.
    """
    from tiue_cli.export.onnx import export

    packaged = packaged_graphs(Path(config.student))
    usual = ExportConfig(config.student, config.out, overwrite=config.overwrite, check=config.check)
    if packaged is None or config != usual or read_export_manifest(packaged).opset != config.opset:
        yield
        return

    def copied(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
        # There the nodes that cast and transpose the model's own weights stand in the graph: folded, it is the trace.
        model = ir.load(packaged / f"{trace.name}.onnx")
        optimize(model, input_size_limit=2**40, output_size_limit=2**40)
        ordered = sorted((name, value) for name, value in model.graph.initializers.items() if value.uses())
        model.graph.initializers.clear()
        model.graph.initializers.update(ordered)
        return _write(model, trace, path)

    with mock.patch.object(export, "export_graph", copied):
        yield


def export_copy(student: Path, folder: Path, **options: Any) -> Path:
    """A copy of that export in ``folder``, which names this very folder as its student."""
    shutil.copytree(exported(student, **options), folder)
    manifest = read_export_manifest(folder)
    source = manifest.student.model_copy(update={"source": str(student)})
    write_json(folder / EXPORT_MANIFEST, manifest.model_copy(update={"student": source}))
    return folder


def torch_images(
    student: StudentModel, prompts: list[str], noise: np.ndarray, *, steps: int | None = None
) -> np.ndarray:
    """The one pass in torch, float32, with the plain decoder: what every runtime must draw."""
    from tiue_cli.model.autoencoder import ImageDecoder
    from tiue_cli.model.schedule import combine_for_run
    from tiue_cli.model.text import encode_prompts
    from tiue_cli.model.unet import UNetDecoder, UNetEncoder

    manifest = student.manifest
    combine = combine_for_run(
        student.scheduler_config, manifest.decoder_timesteps, spacing=manifest.spacing, steps=steps
    )
    with torch.no_grad():
        text_states = encode_prompts(student.tokenizer, student.text_encoder, prompts)
        start = torch.from_numpy(noise)
        features = UNetEncoder(student.unet)(start, text_states, manifest.encoder_timestep)
        predictions = UNetDecoder(student.unet)(features, torch.tensor(combine.timesteps), text_states)
        return ImageDecoder(student.vae).decode(combine(start, predictions))


def _cache() -> Path:
    user = os.environ.get("USER", "user")
    return Path(os.environ.get("TIUE_TEST_CACHE", str(Path(tempfile.gettempdir()) / f"tiue-tests-{user}")))


def _key(student: Path, options: dict[str, Any]) -> str:
    digest = hashlib.sha256(f"{sorted(options.items())}\n{model_sha256(student)}\n".encode())
    for source in _SOURCES:
        path = _PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    for library in _LIBRARIES:
        try:
            digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()[:24]
