"""What manifests accept, refuse and answer; no graph is made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_export import write_tiny_export

from tiue_cli.errors import ManifestError, UsageError
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    ExportParity,
    OutputParity,
    check_files,
    is_export_folder,
    read_export_manifest,
)
from tiue_cli.files.manifests import write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "e", sizes=[(32, 32), (16, 48)])
    return tmp_path / "e"


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / EXPORT_MANIFEST).read_text())
    edit(data)
    (folder / EXPORT_MANIFEST).write_text(json.dumps(data))


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    manifest = read_export_manifest(folder)
    write_json(folder / EXPORT_MANIFEST, manifest)
    assert read_export_manifest(folder) == manifest
    assert is_export_folder(folder) and not is_export_folder(folder.parent)


def test_every_step_count_has_its_sum(folder: Path) -> None:
    manifest = read_export_manifest(folder)
    assert manifest.steps == (1, 2, 3, 4)
    assert manifest.combine().steps == 4
    assert manifest.combine(2).steps == 2 and len(manifest.combine(2).weights) == 3
    with pytest.raises(UsageError, match="7 steps"):
        manifest.combine(7)


def test_graphs_by_size(folder: Path) -> None:
    manifest = read_export_manifest(folder)
    assert manifest.graph("unet_decoder", size=(16, 48)).onnx.file == "unet_decoder_16x48.onnx"
    assert manifest.graph("unet_decoder").size == (32, 32)
    assert manifest.graph("text_encoder", size=(16, 48)).size is None
    assert manifest.latent_shape((16, 48)) == (4, 4, 12)
    with pytest.raises(UsageError, match="64x64"):
        manifest.graph("vae_decoder", size=(64, 64))


def test_the_digest_covers_graph_and_weights(folder: Path) -> None:
    graph = read_export_manifest(folder).graph("text_encoder")
    other = graph.onnx.model_copy(update={"sha256": "1" * 64})
    assert graph.digest != graph.model_copy(update={"onnx": other}).digest
    assert graph.digest != graph.model_copy(update={"data": (graph.onnx,)}).digest


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format_version=2), "format_version 2 is newer than 1"),
        (lambda data: data.update(kind="engine"), "field 'kind'"),
        (lambda data: data.update(surprise=1), "field 'surprise'"),
        (lambda data: data["graphs"].pop(), "graphs must be exactly"),
        (lambda data: data["graphs"].append(data["graphs"][0]), "graphs must be exactly"),
        (lambda data: data["combines"][0]["weights"].pop(), "1 timesteps need 2 weights"),
        (lambda data: data["combines"].reverse(), "ascending"),
        (lambda data: data["graphs"][0]["onnx"].update(sha256="x"), "sha256"),
        (lambda data: data["graphs"][0]["onnx"].update(file="/etc/passwd"), "file"),
        (lambda data: data["graphs"][0]["onnx"].update(file="../x"), "file"),
        (lambda data: data.update(default_size=[64, 64]), "default_size must be one of sizes"),
        (lambda data: data["student"].pop("sha256"), "sha256"),
    ],
)
def test_a_manifest_that_makes_no_sense_names_the_field(
    edit: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    change(folder, edit)
    with pytest.raises(ManifestError, match=message):
        read_export_manifest(folder)


def test_files_are_compared_by_size_and_hash(folder: Path) -> None:
    manifest = read_export_manifest(folder)
    files = [graph.onnx for graph in manifest.graphs]
    check_files(folder, files)
    path = folder / files[2].file
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ManifestError, match=rf"{files[2].file} is not the file .* SHA-256"):
        check_files(folder, files)
    path.write_bytes(original[:-1])
    with pytest.raises(
        ManifestError, match=rf"it has {len(original) - 1} bytes, and the manifest says {len(original)}"
    ):
        check_files(folder, files)
    path.unlink()
    with pytest.raises(ManifestError, match="is missing"):
        check_files(folder, files)


def test_the_parity_table_shows_the_worst_skip() -> None:
    def output(name: str, error: float) -> OutputParity:
        return OutputParity(
            graph="unet_encoder", output=name, cases=("one",), max_error=error, relative_error=error / 2
        )

    parity = ExportParity(
        provider="cpu",
        outputs=(output("mid", 1.0), output("skip_00", 2.0), output("skip_01", 5.0), output("skip_02", 3.0)),
        prompts=("a",),
        image_psnr_db=70.0,
        required_psnr_db=60.0,
    )
    rows = parity.rows()
    assert [row.output for row in rows] == ["mid", "skip_00 … skip_02"]
    assert (rows[1].max_error, rows[1].relative_error) == (5.0, 2.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latent_factor", 0),
        ("latent_factor", -4),
        ("default_size", [2**31, 2**31]),
        ("text_tokens", 2**40),
        ("latent_channels", 0),
        ("opset", -1),
    ],
)
def test_numbers_out_of_bounds_are_refused(folder: Path, field: str, value: object) -> None:
    change(folder, lambda data: data.update({field: value}))
    with pytest.raises(ManifestError, match=field):
        read_export_manifest(folder)


def test_numbers_that_are_none_are_refused(folder: Path) -> None:
    change(folder, lambda data: data["combines"][0].update(weights=[float("nan"), float("inf")]))
    with pytest.raises(ManifestError, match="is not JSON: NaN"):
        read_export_manifest(folder)
