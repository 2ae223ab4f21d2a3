"""The weights files that an ONNX graph names. The oracle is the onnx package, and ONNX Runtime's own refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from permissions import open_folder, unprivileged

from tiue_cli.errors import ManifestError
from tiue_cli.files.exports import FileSpec, GraphSpec, check_files
from tiue_cli.files.external_data import check_external_data, external_files
from tiue_cli.files.hashes import sha256_file

WEIGHTS = np.arange(64, dtype=np.float32)


def external(name: str, file: str) -> TensorProto:
    tensor = numpy_helper.from_array(WEIGHTS, name)
    set_external_data(tensor, location=file, offset=0, length=WEIGHTS.nbytes)
    tensor.ClearField("raw_data")
    return tensor


def write_model(folder: Path, *, initializer: str = "w.data", constant: str | None = None) -> GraphSpec:
    """x + w, with w in ``initializer``, and where asked for another tensor in a node of a subgraph."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "w.data").write_bytes(WEIGHTS.tobytes())
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    if constant is not None:
        inner = helper.make_node("Constant", [], ["c"], value=external("c", constant))
        z = helper.make_tensor_value_info("c", TensorProto.FLOAT, [64])
        branch = helper.make_graph([inner], "branch", [], [z])
        nodes.append(helper.make_node("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch))
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=[external("w", initializer)])
    path = folder / "g.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    specs = [
        FileSpec(file=name, sha256=sha256_file(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in ("g.onnx", "w.data")
    ]
    return GraphSpec(name="vae_decoder", precision="fp32", onnx=specs[0], data=(specs[1],), inputs=(), outputs=())


def test_the_files_are_those_that_the_onnx_package_finds(tmp_path: Path) -> None:
    write_model(tmp_path, constant="manifest.json")
    data = (tmp_path / "g.onnx").read_bytes()
    assert external_files(data) == {"w.data", "manifest.json"}
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    assert {entry.value for entry in model.graph.initializer[0].external_data if entry.key == "location"} == {"w.data"}


@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path, place: str) -> None:
    graph = write_model(tmp_path, **{place: "manifest.json"})  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=r"reads weights from 'manifest\.json', which manifest\.json does not list"):
        check_external_data(tmp_path, graph, hint="")


@pytest.mark.parametrize(
    "data",
    [b"\x0a", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", bytes(range(256))],
)
def test_damaged_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        external_files(data)


def opens(folder: Path) -> bool:
    try:
        onnxruntime.InferenceSession(str(folder / "g.onnx"), providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - each of its errors is a class of its own
        return False
    return True


@pytest.mark.parametrize("layout", ["plain", "data elsewhere", "link within", "hub cache", "folder is a link"])
def test_links_are_refused_exactly_where_onnx_runtime_refuses_them(tmp_path: Path, layout: str) -> None:
    folder, disk = tmp_path / "export", tmp_path / "disk"
    graph = write_model(folder)
    disk.mkdir()
    if layout == "data elsewhere":
        shutil.move(folder / "w.data", disk / "w.data")
        (folder / "w.data").symlink_to(disk / "w.data")
    elif layout == "link within":
        (folder / "w.data").rename(folder / "real.data")
        (folder / "w.data").symlink_to("real.data")
    elif layout == "hub cache":
        for name in ("g.onnx", "w.data"):
            shutil.move(folder / name, disk / f"blob-{name}")
            (folder / name).symlink_to(disk / f"blob-{name}")
    elif layout == "folder is a link":
        folder.rename(disk / "real")
        folder.symlink_to(disk / "real")
    try:
        check_external_data(folder, graph, hint="")
        refused = ""
    except ManifestError as error:
        refused = str(error)
    assert opens(folder) == (not refused)
    assert ("copy the files instead of linking" in refused) == (layout == "data elsewhere")


def test_data_that_may_not_be_read_is_not_to_be_exported_again() -> None:
    with open_folder() as folder:
        graph = write_model(folder / "export")
        (folder / "export" / "w.data").chmod(0o600)
        with unprivileged(), pytest.raises(ManifestError, match="permission denied") as caught:
            check_files(folder / "export", graph.data)
    assert "export" not in str(caught.value.hint)
