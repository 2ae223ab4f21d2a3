"""A real compiler takes the graphs: TensorRT-RTX, ahead of time, on the CPU, through our own builder code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_export
from exports import build_small_student, export_copy, exported
from tiny_export import write_tiny_export

from tiue_cli.export.onnx.quantized_export import QuantizeRequest, quantize_export
from tiue_cli.files.exports import EXPORT_MANIFEST, GRAPHS, read_export_manifest
from tiue_cli.files.manifests import write_json
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.hub import EMBEDDED, resolve_model

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in PACKAGES),
        reason="TensorRT-RTX is not installed: python -m pip install -e '.[rtx-check]'",
    ),
]


def python(*arguments: str) -> str:
    """A Python of its own: Polygraphy decides once a process which TensorRT it uses."""
    # The packages may lie where only PYTHONPATH finds them.
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    out = python(str(ROOT / "tests" / "support" / "compile_rtx.py"), str(folder), *options)
    return [json.loads(line) for line in out.splitlines()]


def test_papercuts_four_graphs_compile_in_fp16_with_two_profiles() -> None:
    student = resolve_model(EMBEDDED)
    folder = exported(student, precision="fp16", sizes=(check_model_folder(student).image_size,))
    built = compiled(folder)
    assert [one["graph"] for one in built] == [f"{name}.onnx" for name in GRAPHS]
    for one in built:
        assert one["profiles"] == 2 and one["layers"] > 20 and one["plan_bytes"] > 1_000_000


def test_papercuts_graphs_in_8_bits_compile() -> None:
    student = resolve_model(EMBEDDED)
    sizes = (check_model_folder(student).image_size,)
    folder = exported(student, precision="int8", calibration="papercut", calibration_images=16, sizes=sizes)
    built = compiled(folder)
    assert [one["graph"] for one in built] == [f"{name}.onnx" for name in GRAPHS]
    for one in built:
        assert one["profiles"] == 2 and one["layers"] > 10 and one["plan_bytes"] > 100_000


@pytest.mark.slow
def test_the_weights_that_adapters_change_have_the_names_that_the_parser_gives_them(
    tiny_student_folder: Path, tmp_path: Path
) -> None:
    student = build_small_student(tiny_student_folder, tmp_path / "student")
    folder = export_copy(student, tmp_path / "small", precision="fp16", sizes=((16, 12),), check=False)
    marked = compiled(folder, "--refit")
    assert [one["graph"] for one in marked] == [f"{name}.onnx" for name in GRAPHS[:3]]
    for one in marked:
        assert one["weights"] > 10 and one["unknown"] == [] and one["fixed"] == []


@pytest.mark.slow
def test_every_fp16_graph_with_attention_as_one_operator_compiles(tiny_student_folder: Path, tmp_path: Path) -> None:
    student = build_small_student(tiny_student_folder, tmp_path / "student")
    folder = exported(student, precision="fp16", sizes=((16, 12),), opset=23)
    built = compiled(folder)
    assert [one["graph"] for one in built] == [graph.onnx.file for graph in read_export_manifest(folder).graphs]
    for one in built:
        assert one["profiles"] == 2 and one["layers"] > 0 and one["plan_bytes"] > 10_000


@pytest.mark.parametrize("sizes", [(), ((32, 32), (32, 48))])
def test_free_and_fixed_graphs_compile_for_the_default_profiles(sizes: tuple[Any, ...], tmp_path: Path) -> None:
    write_tiny_export(tmp_path, sizes=sizes)
    built = compiled(tmp_path)
    assert len(built) == (4 if not sizes else 7)
    assert {one["profiles"] for one in built} == {2}


def test_graphs_in_float8_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_export, "OPSET", 19)
    folder, prompts = tmp_path / "tiny", tmp_path / "prompts.txt"
    manifest = write_tiny_export(folder, sizes=((32, 32),))
    prompts.write_text("a red heart\na blue house\n")
    request = QuantizeRequest(str(prompts), images=4, graphs=("unet_encoder", "unet_decoder"), kind="fp8")
    graphs, _ = quantize_export(folder, manifest, request, say=str)
    write_json(folder / EXPORT_MANIFEST, manifest.model_copy(update={"graphs": graphs, "precision": "fp8"}))
    assert {one["graph"]: one["profiles"] for one in compiled(folder)} == {graph.onnx.file: 2 for graph in graphs}


INTERRUPTED = """
import sys
from pathlib import Path
from compile_rtx import provide_tensorrt_rtx
provide_tensorrt_rtx()
from tiue_cli.export.trt import builder as plan_build
plan_build.BEAT_S = 0.001
folder = Path(sys.argv[1])
shapes = [{"latents": ((1, 4, 8, 8), (1, 4, 8, 8), (4, 4, 8, 8))}]

def interrupt(share, detail):
    if "starting" not in detail:
        raise KeyboardInterrupt

try:
    plan_build.build_plan(
        folder / "vae_decoder.onnx", folder / "plan", shapes, workspace_bytes=2**28, progress=interrupt
    )
    raise SystemExit("it was not interrupted")
except KeyboardInterrupt:
    assert not (folder / "plan").exists()
    print(plan_build.collect_messages().errors()[0])
"""


def test_an_interrupt_ends_a_real_build(tmp_path: Path) -> None:
    write_tiny_export(tmp_path)
    assert "BuildCanceled" in python("-c", INTERRUPTED, str(tmp_path))
