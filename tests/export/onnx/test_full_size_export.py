"""Stable Diffusion's real sizes through the whole command, random weights: memory, files over 2 GB, parity.

Ten minutes on one core that is free, 10 GB of memory and 19 GB of disk; figures are shown with -s:

TIUE_SLOW=1 python -m pytest -m slow -s tests/export/onnx/test_full_size_export.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from helpers import build_full_size_folder

from tiue_cli.export.tolerance import REQUIRED_PSNR_DB
from tiue_cli.files.exports import Precision, check_files, read_export_manifest
from tiue_cli.files.manifests import write_json
from tiue_cli.files.students import STUDENT_MANIFEST, StudentManifest

Kind = Literal["sd15", "sd21"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TIUE_SLOW" not in os.environ, reason="takes ten minutes and 10 GB of memory; set TIUE_SLOW=1"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it"),
]


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: Kind = request.param
    folder = build_full_size_folder(tmp_path_factory.mktemp("full") / f"{kind}-student", kind=kind)
    manifest = StudentManifest(
        decoder_timesteps=(751, 501, 251, 1),
        encoder_timestep=751,
        spacing="leading",
        prediction_type="epsilon",
        teacher=kind,
        tiue_version="0.1.0",
    )
    write_json(folder / STUDENT_MANIFEST, manifest)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_stays_below_20_gib_and_equals_torch(student: Path, precision: Precision, tmp_path: Path) -> None:
    out = tmp_path / "export"
    command = [sys.executable, "-m", "tiue_cli", "export", str(student), "--out", str(out), "--precision", precision]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak_bytes = time.perf_counter() - started, 1024 * usage.ru_maxrss
    assert os.waitstatus_to_exitcode(status) == 0
    assert peak_bytes < 20 * 2**30
    manifest = read_export_manifest(out)
    assert manifest.parity is not None and manifest.parity.image_psnr_db >= REQUIRED_PSNR_DB[precision]
    check_files(out, [file for graph in manifest.graphs for file in (graph.onnx, *graph.data)])
    # Protocol buffers end at 2 GiB: the weights lie beside the graphs, whatever their size.
    assert max(graph.onnx.size_bytes for graph in manifest.graphs) < 10 * 2**20
    decoder_bytes = manifest.graph("unet_decoder").size_bytes
    size = sum(graph.size_bytes for graph in manifest.graphs)
    print(  # noqa: T201 - shown with -s
        f"{student.name} {precision}: peak {peak_bytes / 2**30:.1f} GiB, {seconds:.0f} s"
        f" ({usage.ru_utime + usage.ru_stime:.0f} s of CPU),"
        f" {size / 1e9:.2f} GB (unet_decoder {decoder_bytes / 1e9:.2f}), images {manifest.parity.image_psnr_db:.1f} dB,"
        f" largest relative error {max(output.relative_error for output in manifest.parity.outputs):.1e}"
    )
