"""The export: what the files hold, that they equal torch where nobody traced, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exports import build_small_student, exported
from helpers import copy_folder, edit_json
from lora_files import draw_factors, write_lora
from small_disk import small_disk
from tiny_export import write_tiny_export
from torch import nn

from tiue_cli.cli.app import main
from tiue_cli.errors import ModelFolderError, OutputError, ParityError, UsageError
from tiue_cli.export.config import ENGINES, ExportConfig
from tiue_cli.export.onnx import export as to_onnx
from tiue_cli.export.onnx.export import FLOAT16_LIMIT, export_student, fitting_precision
from tiue_cli.export.onnx.graphs import folded_time
from tiue_cli.export.onnx.parity import Case, largest_magnitude, run_chain
from tiue_cli.export.onnx.trace import Trace, _save, file_spec
from tiue_cli.export.tolerance import check_image
from tiue_cli.files.engines import ENGINE_MANIFEST, EngineDevice, EngineManifest, PlanSpec, ProfileSpec
from tiue_cli.files.exports import (
    EXPORT_MANIFEST,
    GRAPHS,
    ExportManifest,
    FileSpec,
    GraphSpec,
    TensorSpec,
    read_export_manifest,
)
from tiue_cli.files.hashes import sha256_folder
from tiue_cli.files.manifests import write_json
from tiue_cli.model.schedule import combine_for_run
from tiue_cli.model.student import load_student
from tiue_cli.model.unet import UNetEncoder


@pytest.fixture(scope="module")
def student(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_student(tiny_student_folder, tmp_path_factory.mktemp("small") / "student")


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def fake_export(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
    """In place of the tracer: an empty file with the ports that the trace asks for."""
    path.write_bytes(f"{path.name} {opset} {trace.precision}".encode())
    dtypes = {torch.float16: "float16", torch.float32: "float32", torch.int64: "int64"}
    flat = [part for argument in trace.arguments for part in (argument if isinstance(argument, list) else [argument])]
    return GraphSpec(
        name=trace.name,
        size=trace.size,
        precision=trace.precision,
        onnx=file_spec(path),
        inputs=tuple(
            TensorSpec.model_validate({"name": port.name, "dtype": dtypes[value.dtype], "shape": tuple(port.dims)})
            for port, value in zip(trace.inputs, flat, strict=True)
        ),
        outputs=tuple(TensorSpec(name=port.name, dtype="float32", shape=tuple(port.dims)) for port in trace.outputs),
    )


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(1, 4, (8, 8)), Case(1, 1, (1, 1)), Case(5, 1, (4, 6)), Case(3, 6, (7, 5)), Case(2, 3, (2, 16))],
    ids=lambda case: case.label,
)
def test_every_graph_equals_torch_where_nobody_traced(student: Path, case: Case) -> None:
    folder = exported(student)
    reference = run_chain(load_student(student), case)
    for graph in read_export_manifest(folder).graphs:
        session = onnxruntime.InferenceSession(folder / graph.onnx.file, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {port.name: reference[port.name] for port in graph.inputs})
        for port, found in zip(graph.outputs, outputs, strict=True):
            expected = reference[port.name].astype(np.float64)
            assert found.shape == expected.shape and found.dtype == port.dtype
            difference = np.linalg.norm(found.astype(np.float64) - expected)
            # Pixels are rounded: one of them may fall to the other side.
            bar = 1e-5 if port.dtype == "float32" else 1e-2
            assert difference <= bar * np.linalg.norm(expected), (graph.name, port.name)


@pytest.mark.slow
def test_float16_graphs_of_a_fixed_size(student: Path) -> None:
    folder = exported(student, precision="fp16", sizes=((16, 12),), opset=23)
    manifest = read_export_manifest(folder)
    assert manifest.parity is not None and manifest.parity.image_psnr_db >= 35
    assert (manifest.default_size, manifest.sizes, manifest.opset) == ((16, 12), ((16, 12),), 23)
    dtypes = {port.name: port.dtype for graph in manifest.graphs for port in (*graph.inputs, *graph.outputs)}
    wide = {"input_ids": "int64", "timesteps": "int64", "noise": "float32", "weights": "float32", "latents": "float32"}
    assert dtypes == {**dict.fromkeys(dtypes, "float16"), **wide, "images": "uint8"}
    for graph in manifest.graphs:
        model = onnx.load(folder / graph.onnx.file)
        assert model.opset_import[0].version == 23
        floats = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        # What is left in float32 are the ones and zeros of the norms and a few scalars.
        assert sum(int(np.prod(tensor.dims)) for tensor in floats) < 200, graph.name
    assert operators(folder / "unet_decoder.onnx")["Attention"] == 4
    shapes = {port.name: port.shape for port in manifest.graph("unet_encoder").outputs}
    assert (shapes["mid"], shapes["skip_00"]) == (("batch", 48, 4, 3), ("batch", 32, 8, 6))


def test_folding_the_time_changes_nothing(student: Path) -> None:
    """In float64, so that only a wrong term could show; and the UNet is afterwards what it was."""
    unet = load_student(student).unet.double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, 4, 6, 5), generator=generator, dtype=torch.float64)
    text_states = torch.randn((2, 7, unet.config.cross_attention_dim), generator=generator, dtype=torch.float64)
    names = [name for name, _ in unet.named_parameters()]
    with torch.no_grad():
        expected = UNetEncoder(unet)(noise, text_states, 501)
        with folded_time(unet, 501):
            found = UNetEncoder(unet)(noise, text_states, 3)
        again = UNetEncoder(unet)(noise, text_states, 501)
    for a, b, c in zip(
        (expected.mid, *expected.skips), (found.mid, *found.skips), (again.mid, *again.skips), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(a, c)
    assert [name for name, _ in unet.named_parameters()] == names


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_and_manifest_agree(student: Path) -> None:
    folder = exported(student)
    manifest = read_export_manifest(folder)
    assert [graph.name for graph in manifest.graphs] == list(GRAPHS)
    assert {path.name for path in folder.iterdir()} == {
        EXPORT_MANIFEST,
        "tokenizer.json",
        *(f"{name}.onnx{suffix}" for name in GRAPHS for suffix in ("", ".data")),
    }
    for graph in manifest.graphs:
        model = onnx.load(folder / graph.onnx.file, load_external_data=False)
        for ports, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [port.name for port in ports] == [value.name for value in values]
            for port, value in zip(ports, values, strict=True):
                dims = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
                assert dims == port.shape
        onnx.checker.check_model(str(folder / graph.onnx.file), full_check=True)
    names = {graph.name: [port.name for port in graph.inputs] for graph in manifest.graphs}
    skips = [f"skip_{index:02}" for index in range(4)]
    assert names == {
        "text_encoder": ["input_ids"],
        "unet_encoder": ["noise", "text_states"],
        "unet_decoder": ["mid", *skips, "text_states", "noise", "timesteps", "weights"],
        "vae_decoder": ["latents"],
    }
    assert [port.name for port in manifest.graph("unet_encoder").outputs] == ["mid", *skips]
    loaded = load_student(student)
    assert manifest.student.sha256 == sha256_folder(student)
    for combine in manifest.combines:
        expected = combine_for_run(
            loaded.scheduler_config,
            loaded.manifest.decoder_timesteps,
            spacing=loaded.manifest.spacing,
            steps=combine.steps,
        )
        assert (combine.timesteps, combine.weights) == (expected.timesteps, expected.weights)


@pytest.mark.slow
def test_the_unet_encoder_knows_no_time_and_no_graph_carries_dead_weights(student: Path) -> None:
    folder = exported(student)
    assert not {"Sin", "Cos", "Gemm"} & set(operators(folder / "unet_encoder.onnx"))
    sizes = {graph.name: graph.size_bytes for graph in read_export_manifest(folder).graphs}
    unet = load_student(student).unet
    whole = sum(4 * parameter.numel() for parameter in unet.parameters())
    # Together the two halves hold the UNet once: the time layers of the encoder's half are gone.
    assert sizes["unet_encoder"] + sizes["unet_decoder"] < 1.1 * whole
    # Weights are cut, transposed and cast before they are written.
    for graph in ("unet_encoder", "unet_decoder"):
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        weights = {tensor.name for tensor in model.graph.initializer}
        idle = [node for node in model.graph.node if node.input and all(name in weights for name in node.input)]
        assert [node.op_type for node in idle] == []


@pytest.mark.slow
def test_graphs_say_nothing_of_the_machine_that_made_them(student: Path) -> None:
    folder = exported(student)
    for graph in GRAPHS:
        raw = (folder / f"{graph}.onnx").read_bytes()
        for word in (b"site-packages", b".py", str(Path.home()).encode(), str(student).encode(), b"pkg.torch"):
            assert word not in raw
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        assert not model.metadata_props and not model.doc_string
        # Shapes of weights are known anyway; those of what is computed would carry the tracer's symbols.
        weights = {tensor.name for tensor in model.graph.initializer}
        assert {value.name for value in model.graph.value_info} <= weights
        assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)


@pytest.mark.slow
def test_the_same_module_gives_the_same_bytes_in_another_process(student: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tiue_cli.export.onnx.trace import export_graph\n"
        "from tiue_cli.export.onnx.graphs import trace_unet_encoder\n"
        "from tiue_cli.export.onnx.graphs import folded_time\n"
        "from tiue_cli.model.student import load_student\n"
        f"student = load_student({str(student)!r})\n"
        "with folded_time(student.unet, student.manifest.encoder_timestep):\n"
        "    export_graph(trace_unet_encoder(student, None), Path(sys.argv[1]), opset=21)\n"
    )
    path = tmp_path / "unet_encoder.onnx"
    environment = {**os.environ, "PYTHONHASHSEED": "4321"}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment, timeout=300, cwd=tmp_path)
    for suffix in ("", ".data"):
        expected = exported(student) / f"unet_encoder.onnx{suffix}"
        assert (
            hashlib.sha256(Path(f"{path}{suffix}").read_bytes()).digest()
            == hashlib.sha256(expected.read_bytes()).digest()
        )


def test_several_sizes_have_graphs_of_their_own(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "export_graph", fake_export)
    config = ExportConfig(str(student), tmp_path / "e", sizes=((16, 16), (8, 20)), check=False, precision="fp16")
    stages: list[tuple[str, int, int]] = []
    manifest = export_student(config, stage=lambda *stage: stages.append(stage)).manifest
    assert len(manifest.graphs) == 7 and manifest.parity is None
    decoder = manifest.graph("unet_decoder", size=(8, 20))
    assert decoder.onnx.file == "unet_decoder_8x20.onnx"
    assert {port.name: port.shape for port in decoder.inputs}["skip_00"] == ("batch", 32, 4, 10)
    assert manifest.graph("vae_decoder", size=(8, 20)).outputs[0].shape == ("batch", 8, 20, 3)
    assert [number for _, number, _ in stages] == list(range(1, 8)) and {total for *_, total in stages} == {7}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 17}, UsageError, "opset 17 is outside 18–23"),
        ({"sizes": ((16, 16), (16, 16))}, UsageError, "the same size was given twice"),
        ({"sizes": ((16, 15),)}, UsageError, "16x15 pixels do not fit"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, object], error: type[Exception], message: str, student: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_student(ExportConfig(str(student), tmp_path / "e", **options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_is_not_exported(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is a many-step teacher") as caught:
        export_student(ExportConfig(str(tiny_teacher_folder), tmp_path / "e"))
    assert "tiue distill" in str(caught.value)


def test_an_export_is_not_exported_again(tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "e")
    with pytest.raises(UsageError, match="is an export already"):
        export_student(ExportConfig(str(tmp_path / "e"), tmp_path / "f"))


def test_a_text_encoder_that_wants_the_padding_mask_is_refused(student: Path, tmp_path: Path) -> None:
    masked = copy_folder(student, tmp_path / "masked")
    edit_json(masked / "text_encoder" / "config.json", use_attention_mask=True)
    with pytest.raises(ModelFolderError, match="use_attention_mask"):
        export_student(ExportConfig(str(masked), tmp_path / "e", check=False))
    assert not (tmp_path / "e").exists()


def test_a_folder_of_something_else_is_never_replaced(student: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(OutputError, match=r"holds no manifest\.json"):
        export_student(ExportConfig(str(student), tmp_path, overwrite=True, check=False))
    assert (tmp_path / "letters").read_text() == "dear"


def test_sigterm_and_ctrl_c_leave_nothing(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = iter((signal.SIGTERM, signal.SIGINT))

    def signalled(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
        path.write_bytes(b"half a graph")
        os.kill(os.getpid(), next(numbers))
        time.sleep(1)  # the handler runs here
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(to_onnx, "export_graph", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        export_student(ExportConfig(str(student), tmp_path / "e", check=False))
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(student), "--out", str(tmp_path / "e"), "--no-check"]) == 130
    assert "stopped: nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- a wrong graph -------------------------------------------------------------------------------------------------


class Wrong:
    """In place of the tracer: the cached export's graphs, one of them with other weights."""

    def __init__(self, folder: Path, graph: str, factor: float) -> None:
        self.folder, self.graph, self.factor = folder, graph, factor

    def __call__(self, trace: Trace, path: Path, *, opset: int) -> GraphSpec:
        right = read_export_manifest(self.folder).graph(trace.name)
        for name in (right.onnx.file, *(file.file for file in right.data)):
            shutil.copy(self.folder / name, path.with_name(name))
        if trace.name == self.graph:
            data = path.with_name(f"{path.name}.data")
            weights = np.fromfile(data, dtype=np.float32)
            (weights * np.float32(self.factor)).tofile(data)
        return right.model_copy(
            update={
                "onnx": file_spec(path),
                "data": tuple(file_spec(path.with_name(file.file)) for file in right.data),
            }
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "factor", "message"),
    [
        ("text_encoder", 1.01, "text_encoder: text_states with 1 image, .* relative error"),
        ("unet_encoder", 0.99, "unet_encoder: .* relative error"),
        ("unet_decoder", float("nan"), "unet_decoder: latents .* contains NaN or infinity"),
        ("vae_decoder", 0.0, "vae_decoder: images .* relative error"),
    ],
)
def test_a_graph_that_is_not_equal_leaves_no_folder_and_exits_1(
    graph: str,
    factor: float,
    message: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(to_onnx, "export_graph", Wrong(exported(student), graph, factor))
    with pytest.raises(ParityError, match=message):
        export_student(ExportConfig(str(student), tmp_path / "e"))
    assert main(["export", str(student), "--out", str(tmp_path / "e")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_shows_the_figures_and_the_next_command(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(to_onnx, "export_graph", Wrong(exported(student), "none", 1.0))
    out = tmp_path / "e"
    assert main(["export", str(student), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "skip_00 … skip_03" in shown.out and "dB against torch in fp32" in shown.out
    assert f'tiue generate --model {out} "a prompt"' in shown.out
    assert "unet_decoder: compare" in shown.err
    assert main(["export", str(student), "--out", str(out)]) == 1
    assert main(["export", str(student), "--out", str(out), "--overwrite", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert ExportManifest.model_validate_json(json.dumps(document["manifest"])) == read_export_manifest(out)
    assert main(["export", str(student), "--out", str(out), "--overwrite", "--format", "quiet"]) == 0
    assert capsys.readouterr().out == f"{out}\n"


def test_an_image_of_one_colour_fails() -> None:
    grey = np.full((4, 4, 3), 127, np.uint8)
    with pytest.raises(ParityError, match="is a single colour"):
        check_image(grey, grey, where="it", reference="torch", precision="fp32", hint="")


def test_a_vae_that_leaves_float16s_range_stays_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, -1000.0)
    with largest_magnitude(nn.Sequential(layer, nn.Tanh())) as largest:
        assert largest() == 0
        nn.Sequential(layer, nn.Tanh())(torch.tensor([[2.0]]))
        assert largest() == 2000
    assert fitting_precision("fp16", FLOAT16_LIMIT) == ("fp16", None)
    precision, note = fitting_precision("fp16", 70_000.0)
    assert precision == "fp32" and note is not None and "70000" in note
    assert fitting_precision("fp32", 70_000.0) == ("fp32", None)


# --- the folder ----------------------------------------------------------------------------------------------------


def test_where_an_export_goes(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ExportConfig(str(student)).folder == ENGINES / "student"
    assert ExportConfig("owner/some-model").folder == ENGINES / "some-model"
    assert ExportConfig("papercut").folder == ENGINES / "papercut"
    assert ExportConfig("papercut", Path("x")).folder == Path("x")


def engine_of(folder: Path, name: str, manifest: ExportManifest, *, stale: bool) -> None:
    """An engine folder that says it was built from the graphs of ``manifest``, or from others."""
    plan = folder / name / "text_encoder.plan"
    plan.parent.mkdir()
    plan.write_bytes(b"plan")
    graph = manifest.graph("text_encoder")
    spec = PlanSpec(
        graph="text_encoder",
        plan=FileSpec(file=plan.name, sha256="0" * 64, size_bytes=4),
        onnx_sha256="f" * 64 if stale else graph.digest,
        inputs=graph.inputs,
        outputs=graph.outputs,
        shapes=(),
        build_s=1.0,
    )
    engine = EngineManifest(
        name=name,
        tiue_version="0",
        device=EngineDevice(gpu="g", compute_capability="9.0", tensorrt="11", cuda="13", driver="1", platform="p"),
        precision="fp32",
        export_sha256="0" * 64,
        profiles=(ProfileSpec(name="one", batch=(1, 1, 1), steps=(1, 4, 4), height=(8, 8, 8), width=(8, 8, 8)),),
        plans=(spec,),
        build_s=1.0,
        parity=None,
    )
    write_json(folder / name / ENGINE_MANIFEST, engine)


def test_engines_of_the_same_graphs_outlive_a_new_export(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "export_graph", fake_export)
    config = ExportConfig(str(student), tmp_path / "e", check=False, overwrite=True)
    first = export_student(config)
    engine_of(first.folder, "fits", first.manifest, stale=False)
    engine_of(first.folder, "stale", first.manifest, stale=True)
    second = export_student(config)
    assert (second.folder / "fits" / "text_encoder.plan").read_bytes() == b"plan"
    assert not (second.folder / "stale").exists()
    assert any("stale" in note for note in second.notes)


def test_a_full_disk_is_one_clear_error_and_the_old_export_stays(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, by the real writer of weights, whose OSError has no number; only nothing is traced."""

    def heavy_export(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
        weight = ir.tensor(np.ones(100_000, np.float32), name="weight")
        graph = ir.Graph([], [], nodes=[], initializers=[ir.Value(name="weight", const_value=weight)])
        _save(ir.Model(graph, ir_version=10), path, path.with_name(f"{path.name}.data"))
        return fake_export(trace, path, opset=opset)

    monkeypatch.setattr(to_onnx, "export_graph", heavy_export)
    with small_disk(tmp_path, size_bytes=280 * 1024) as disk:
        out = disk / "engine"
        write_tiny_export(out)
        before = sha256_folder(out)
        assert main(["export", str(student), "--no-check", "--overwrite", "--out", str(out)]) == 1
        error, hint = capsys.readouterr().err.splitlines()[-2:]
        assert error == f"error: cannot write {out}: the disk is full" and hint.startswith("hint: free some space")
        assert sha256_folder(out) == before and [path.name for path in disk.iterdir()] == ["engine"]


def test_an_export_with_a_lora_traces_the_weights_with_it(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W + weight · up · down of each layer. That the graphs then draw it: ``tests/generate/test_fused.py``."""
    parts = load_student(student)
    before = {**parts.unet.state_dict(), **parts.text_encoder.state_dict()}
    factors = draw_factors(parts.unet, parts.text_encoder)
    lora = write_lora(tmp_path / "ink.safetensors", factors)
    traced: dict[str, torch.Tensor] = {}

    def keep(trace: Trace, path: Path, *, opset: int) -> GraphSpec:
        traced.update({name: value.clone() for name, value in trace.module.state_dict().items()})
        return fake_export(trace, path, opset=opset)

    monkeypatch.setattr(to_onnx, "export_graph", keep)
    config = ExportConfig(str(student), tmp_path / "e", check=False, loras=(f"{lora}:0.7",))
    manifest = export_student(config).manifest
    assert [(use.name, use.weight) for use in manifest.student.loras] == [("ink", 0.7)]
    held = 0
    for name, (down, up) in factors.items():
        layer = f"{name.partition('.')[2]}.weight"
        expected = before[layer] + 0.7 * (up.flatten(1) @ down.flatten(1)).reshape(before[layer].shape)
        for found in (value for key, value in traced.items() if key.endswith(layer)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            held += 1
    assert held >= len(factors)
