"""Self-attention as one operator: the same numbers, in a fraction of the memory, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from attention_graphs import Change, attention, attention_graph, inputs
from exports import build_small_student, exported
from onnx import TensorProto, helper

from tiue_cli.backends import onnx_backend
from tiue_cli.backends.onnx_attention import fuse_attention, with_fused_attention
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.onnx_session import Provider, open_session, run_session
from tiue_cli.model.noise import draw_noise


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_operator_computes_the_same(dynamic: bool) -> None:
    model = attention_graph(96, dynamic=dynamic)
    assert fuse_attention(model) == 1
    kinds = [node.op_type for node in model.graph.node]
    assert "MultiHeadAttention" in kinds and not {"Softmax", "MatMul", "Transpose", "Mul"} & set(kinds)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, inputs(96))[0]
    np.testing.assert_allclose(found, attention(**inputs(96)), rtol=0, atol=2e-6)


def _reads_the_weights_twice(nodes: dict[str, onnx.NodeProto]) -> None:
    nodes["mixed"].input[1] = "weights"


def _set(name: str, attribute: str, value: object) -> Change:
    def change(nodes: dict[str, onnx.NodeProto]) -> None:
        node = nodes[name]
        kept = [each for each in node.attribute if each.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(attribute, value)])

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("softmax", "axis", 2),
        _set("transpose_k", "perm", [0, 2, 1, 3]),
        _set("back", "perm", [0, 1, 2, 3]),
        _reads_the_weights_twice,
        lambda nodes: nodes["reshape_k"].input.__setitem__(1, "together"),
        lambda nodes: nodes["scaled"].input.__setitem__(1, "mask"),
        lambda nodes: nodes["softmax"].input.__setitem__(0, "qs"),
        lambda nodes: setattr(nodes["softmax"], "op_type", "LogSoftmax"),
        lambda nodes: nodes["joined"].output.__setitem__(0, "weights"),
        lambda nodes: nodes["joined"].input.__setitem__(1, "apart"),
    ],
)
def test_what_is_anything_else_stays_as_it_is(change: Change) -> None:
    model = attention_graph(16, change=change)
    before = model.SerializeToString()
    assert fuse_attention(model) == 0
    assert model.SerializeToString() == before


def test_a_value_that_someone_else_reads_stays() -> None:
    model = attention_graph(16)
    model.graph.output.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, None))
    assert fuse_attention(model) == 0


def test_the_products_are_never_in_memory_whole(tmp_path: Path) -> None:
    """3 rows, 2 heads, 2048² products: 96 MiB as the graph stands, and the softmax once more."""
    path, provider, fed = tmp_path / "large.onnx", Provider("cpu"), inputs(2048)
    onnx.save(attention_graph(2048), path)
    peaks = {}
    for fused in (True, False):
        session = open_session(path, provider, fused_attention=fused)
        peaks[fused] = _peak(lambda session=session: run_session(session, fed, provider))  # type: ignore[misc]
    assert peaks[True] < 32 * 2**20 < 80 * 2**20 < peaks[False]


def _peak(run: Callable[[], object]) -> int:
    """Bytes that the process held more at most while ``run`` ran, looked at by a thread."""
    import threading

    process, stop, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        stop.set()
        thread.join()
    return most[0]


def test_a_damaged_graph_is_left_to_the_session(tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(attention_graph(16).SerializeToString()[:-40])
    assert with_fused_attention(tmp_path / "torn.onnx") is None


def test_an_export_draws_the_same_pictures(
    tiny_student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pictures are drawn as the graphs stand; with the bound at 1 every self-attention is rewritten."""
    folder = exported(build_small_student(tiny_student_folder, tmp_path / "student"))
    rewritten = [with_fused_attention(path) is not None for path in sorted(folder.glob("unet_*.onnx"))]
    assert rewritten and all(rewritten)
    latents = []
    for bound in (1, 10**9):
        monkeypatch.setattr(onnx_backend, "MIN_TOKENS", bound)
        with OnnxBackend(folder, provider="cpu") as backend:
            noise = draw_noise([1, 2], backend.latent_shape(backend.default_size))
            latents.append(backend.latents(["a red star", "a tree"], noise))
    assert np.abs(latents[0] - latents[1]).max() < 1e-4 * latents[1].std()
    assert not np.array_equal(latents[0], latents[1])
