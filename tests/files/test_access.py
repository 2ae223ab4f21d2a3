"""What lies at a path, and may it be read: every answer is a fact or an error of the tree, at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy  # noqa: F401 - nobody may not be able to import it later
import PIL.Image  # noqa: F401
import pytest
from permissions import open_folder, unprivileged

from tiue_cli.bench.quality.extractors import open_extractor
from tiue_cli.bench.quality.references import _load_npz
from tiue_cli.cli.inspection import inspect_source
from tiue_cli.distill.data.prompts import read_training_prompts
from tiue_cli.distill.resolve import config_layer, copy_recipe
from tiue_cli.distill.run_folder import check_out_folder
from tiue_cli.errors import AccessError, ManifestError, ModelFolderError, PromptError, TiueError
from tiue_cli.export.config import ExportConfig
from tiue_cli.files import access
from tiue_cli.files.atomic import atomic_file, atomic_folder
from tiue_cli.files.exports import is_export_folder
from tiue_cli.files.manifests import read_manifest
from tiue_cli.files.png import read_pixels, read_text_chunks
from tiue_cli.files.students import StudentManifest
from tiue_cli.generate.bulk.rows import estimated_rows, read_rows
from tiue_cli.generate.prompts import read_prompts
from tiue_cli.generate.target import find_export
from tiue_cli.model.folder import check_model_folder, check_vae_folder
from tiue_cli.model.hub import resolve_model, resolve_vae
from tiue_cli.model.weights import read_json
from tiue_cli.serve.security import read_keys


def write_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("x")


def write_folder(path: Path) -> None:
    with atomic_folder(path, overwrite=True) as temporary:
        (temporary / "x").write_text("x")


READERS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: inspect_source(str(path)),
    "generate --model": lambda path: find_export(str(path)) or check_model_folder(resolve_model(str(path))),
    "generate --vae": lambda path: check_vae_folder(resolve_vae(str(path))),
    "generate --prompts": lambda path: read_prompts(path.with_suffix(".txt")),
    "export": lambda path: ExportConfig(student=str(path)).folder,
    "generate --shards": lambda path: list(read_rows(str(path.with_suffix(".txt")))),
    "generate --shards, CSV": lambda path: list(read_rows(str(path.with_suffix(".csv")))),
    "generate --shards, counted": lambda path: estimated_rows(str(path.with_suffix(".csv"))),
    "serve --api-keys": lambda path: read_keys(path),
    "bench --reference": lambda path: _load_npz(path.with_suffix(".npz")),
    "bench --extractor": lambda path: open_extractor(path.with_suffix(".onnx"), papercut=False),
    "distill --prompts": lambda path: read_training_prompts(str(path.with_suffix(".txt"))),
    "distill --config": lambda path: config_layer(str(path.with_suffix(".yaml"))),
    "distill --out": lambda path: check_out_folder(path, resume=False),
    "distill --resume": lambda path: check_out_folder(path, resume=True),
    "recipes copy": lambda path: copy_recipe("sd15", path),
    "a config": read_json,
    "a manifest": lambda path: read_manifest(path, StudentManifest),
    "a picture": read_text_chunks,
    "pixels": read_pixels,
    "an export": is_export_folder,
    "writing a file": write_file,
    "writing a folder": write_folder,
}
SUFFIXES = ("", ".txt", ".yaml", ".csv", ".npz", ".onnx")
MISSING_IS_FINE = {
    "generate --shards, counted",
    "export",
    "distill --out",
    "recipes copy",
    "an export",
    "writing a file",
    "writing a folder",
}


@pytest.fixture
def place() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.mark.parametrize("reader", READERS)
def test_below_a_folder_that_may_not_be_searched_the_folder_is_named(place: Path, reader: str) -> None:
    private = place / "private"
    private.mkdir()
    private.chmod(0o700 if os.geteuid() == 0 else 0o000)
    with unprivileged(), pytest.raises(TiueError, match="permission denied") as caught:
        READERS[reader](private / "below" / "it")
    assert "remove" not in str(caught.value) and "delete" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a" * 300, "nul\0nul", "loop", "~nobody-of-this-name/x"])
def test_a_name_that_cannot_be_is_an_error_of_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in SUFFIXES:
        Path(f"loop{suffix}").symlink_to(f"loop{suffix}")
    if name.startswith("~") and reader in MISSING_IS_FINE | {"distill --resume"}:
        pytest.skip("there a tilde is a letter like any other, as the shell expands it")
    if name == "loop" and reader.startswith("writing a file"):
        pytest.skip("the link itself is replaced")
    with pytest.raises((TiueError, FileNotFoundError)):
        READERS[reader](Path(name))


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"export", "an export", "distill --out"}))
@pytest.mark.parametrize("what", ["fifo", "socket", "device"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path, reader: str, what: str) -> None:
    path = tmp_path / "x"
    for name in (path.with_suffix(suffix) for suffix in SUFFIXES):
        if what == "fifo":
            os.mkfifo(name)
        elif what == "device":
            name.symlink_to("/dev/zero")
        else:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(name))
    if reader == "distill --resume":
        (tmp_path / "run").mkdir()
        path.rename(tmp_path / "run" / "run.json")
        path = tmp_path / "run"
    with pytest.raises(TiueError):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_deleted_working_folder_is_no_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        READERS[reader](Path("x"))
    except (TiueError, FileNotFoundError):
        return
    assert reader in MISSING_IS_FINE


@pytest.mark.parametrize("what", ["dangling", "folder", "fifo"])
def test_a_student_whose_manifest_is_no_file_is_not_a_teacher(
    tiny_student_folder: Path, tmp_path: Path, what: str
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for part in tiny_student_folder.iterdir():
        if part.name != "tiue.json":
            (student / part.name).symlink_to(part)
    manifest = student / "tiue.json"
    if what == "dangling":
        manifest.symlink_to(tmp_path / "nowhere")
    elif what == "folder":
        manifest.mkdir()
    else:
        os.mkfifo(manifest)
    with pytest.raises(ManifestError, match=r"tiue\.json cannot be read: it is"):
        check_model_folder(student)


def test_what_is_there_is_told_from_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    kinds = {name: access.kind_of(tmp_path / name) for name in ("file", "", "dangling", "nothing", "file/below")}
    assert kinds == {"file": "file", "": "folder", "dangling": "nothing", "nothing": "nothing", "file/below": "nothing"}
    assert not access.has_file(tmp_path / "nothing")
    with pytest.raises(AccessError, match="a link to something that does not exist"):
        access.has_file(tmp_path / "dangling")


def test_a_file_that_is_too_large_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ManifestError, match="too large"):
        access.read_bytes(path, error=ManifestError, limit_bytes=2**20)
    with pytest.raises(ModelFolderError, match="too large"):
        read_json(path)


def test_an_unknown_user_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no home folder for ~nobody-of-this-name"):
        access.user_path("~nobody-of-this-name/x", error=PromptError)
    assert access.user_path("~/x") == Path.home() / "x"
