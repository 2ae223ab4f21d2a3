"""The runner of TensorRT plans, on a CUDA and a TensorRT that are fakes and strict; the oracle is ONNX Runtime."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
from tiny_export import CHANNELS, TOKENS, write_tiny_export

from tiue_cli import errors
from tiue_cli.backends import cuda as cuda_calls
from tiue_cli.backends import trt_messages, trt_plan, trt_runner
from tiue_cli.backends.cuda import open_stream
from tiue_cli.backends.trt_messages import cannot_start
from tiue_cli.backends.trt_plan import Plan, open_plan
from tiue_cli.backends.trt_runner import PlanChain
from tiue_cli.errors import DeviceError, MissingDependencyError, ProfileError
from tiue_cli.export.trt.builder import build_plan
from tiue_cli.export.trt.profiles import batch_profiles, input_shapes
from tiue_cli.files.exports import GRAPHS, ExportManifest

BATCHES = ((1, 1, 1), (1, 2, 4))


class Engine:
    """A tiny export with its plans, built for one image exactly and for one to four."""

    def __init__(self, folder: Path, manifest: ExportManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.profiles = batch_profiles(manifest, BATCHES)
        self.data: dict[str, bytes] = {}
        for graph in manifest.graphs:
            shapes = [input_shapes(graph, profile, factor=manifest.latent_factor) for profile in self.profiles]
            path = folder / f"{graph.name}.plan"
            build_plan(folder / graph.onnx.file, path, shapes, workspace_bytes=2**28)
            self.data[graph.name] = path.read_bytes()

    def plans(self) -> list[Plan]:
        return [open_plan(name, self.data[name]) for name in GRAPHS]

    def chain(self, stream: Any, profile: int = 1) -> PlanChain:
        return PlanChain([(plan, profile) for plan in self.plans()], stream)

    def inputs(self, batch: int, *, steps: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        combine = self.manifest.combine(steps)
        return {
            "input_ids": random.integers(0, 8, (batch, TOKENS)),
            "noise": random.standard_normal((batch, CHANNELS, 8, 8), dtype=np.float32),
            "timesteps": np.array(combine.timesteps),
            "weights": np.array(combine.weights, np.float32),
        }

    def expected(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All tensors, graph after graph in ONNX Runtime."""
        tensors = dict(inputs)
        for graph in self.manifest.graphs:
            session = onnxruntime.InferenceSession(self.folder / graph.onnx.file, providers=["CPUExecutionProvider"])
            names = [output.name for output in graph.outputs]
            feeds = {port.name: tensors[port.name].astype(port.dtype) for port in graph.inputs}
            tensors |= dict(zip(names, session.run(names, feeds), strict=True))
        return tensors


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.State:
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def engine(cuda: fake_tensorrt.State, tmp_path: Path) -> Engine:
    return Engine(tmp_path, write_tiny_export(tmp_path))


@pytest.fixture
def stream(cuda: fake_tensorrt.State) -> Iterator[Any]:
    with open_stream() as opened:
        yield opened


# --- what it computes ----------------------------------------------------------------------------------------------


def test_a_chain_of_plans_equals_the_graphs_run_one_by_one(engine: Engine, stream: Any) -> None:
    inputs = engine.inputs(3)
    expected = engine.expected(inputs)
    with engine.chain(stream) as chain:
        assert chain.inputs == ("input_ids", "noise", "timesteps", "weights")
        for _ in range(3):
            found = chain.run(inputs, ["latents", "images", "mid"])
            for name, value in found.items():
                np.testing.assert_array_equal(value, expected[name])
                assert value.dtype == expected[name].dtype


def test_inputs_of_another_type_are_cast(engine: Engine, stream: Any) -> None:
    inputs = engine.inputs(2)
    with engine.chain(stream) as chain:
        expected = chain.run(inputs, ["latents"])["latents"]
        other = {
            "input_ids": inputs["input_ids"].astype(np.int32),
            "noise": np.asfortranarray(inputs["noise"].astype(np.float64)),
            "timesteps": [int(timestep) for timestep in inputs["timesteps"]],
            "weights": inputs["weights"].tolist(),
        }
        np.testing.assert_array_equal(chain.run(other, ["latents"])["latents"], expected)


def test_results_are_the_callers_own(engine: Engine, stream: Any) -> None:
    first, second = engine.inputs(2, seed=1), engine.inputs(2, seed=2)
    with engine.chain(stream) as chain:
        kept = chain.run(first, ["images"])["images"]
        before = kept.copy()
        kept_after = chain.run(second, ["images"])["images"]
        np.testing.assert_array_equal(kept, before)
        kept_after[:] = 0
        np.testing.assert_array_equal(chain.run(first, ["images"])["images"], before)
    np.testing.assert_array_equal(kept, before)


def test_a_runtime_that_tensorrt_does_not_make_is_told_with_its_reason(cuda: fake_tensorrt.State) -> None:
    cuda.refusal = "CUDA initialization failure with error: 2"
    with pytest.raises(DeviceError, match=r"cannot start to open x\.plan: .*error: 2") as caught:
        open_plan("x.plan", b"")
    assert caught.value.hint is not None and "nvidia-smi" in caught.value.hint


def test_a_type_error_of_our_own_stays_one() -> None:
    error = TypeError("an integer is required")
    assert cannot_start(error, "open x") is error


# --- buffers -------------------------------------------------------------------------------------------------------


def test_what_one_plan_writes_is_where_the_next_one_reads(
    engine: Engine, stream: Any, cuda: fake_tensorrt.State
) -> None:
    with engine.chain(stream) as chain:
        addresses: dict[str, set[int]] = {}
        for context in chain._contexts:
            for name, address in context._addresses.items():
                addresses.setdefault(name, set()).add(address)
        assert {"mid", "skip_00", "skip_01", "text_states", "latents", "noise"} <= set(addresses)
        assert all(len(places) == 1 for places in addresses.values()), addresses
        flat = [address for places in addresses.values() for address in places]
        assert len(set(flat)) == len(flat), "two tensors share a buffer"


def test_memory_is_allocated_once_and_given_back(engine: Engine, stream: Any, cuda: fake_tensorrt.State) -> None:
    with engine.chain(stream) as chain:
        mallocs = cuda.cudart.mallocs
        for batch, steps in ((1, 1), (4, 4), (2, 3), (4, 4), (4, 4)):
            chain.run(engine.inputs(batch, steps=steps), ["images"])
        assert cuda.cudart.mallocs == mallocs
        assert cuda.cudart.allocations and cuda.cudart.executables
    assert not cuda.cudart.allocations and not cuda.cudart.executables and not cuda.cudart.graphs
    assert not cuda.cudart.pinned


def test_every_copy_goes_through_pinned_memory(engine: Engine, stream: Any, cuda: fake_tensorrt.State) -> None:
    with engine.chain(stream) as chain:
        for batch in (1, 4, 2):
            chain.run(engine.inputs(batch), ["images", "noise"])
        assert cuda.cudart.pinned and cuda.cudart.pageable_copies == 0


def test_chains_that_share_memory_keep_a_graph_each(engine: Engine, stream: Any, cuda: fake_tensorrt.State) -> None:
    plans = [(plan, 1) for plan in engine.plans()]
    with PlanChain(plans, stream) as first:
        mallocs = cuda.cudart.mallocs
        with PlanChain(plans, stream, memory=first.memory) as second:
            assert cuda.cudart.mallocs == mallocs
            for number in range(3):
                for chain, batch in ((first, 2), (second, 3)):
                    inputs = engine.inputs(batch, seed=number)
                    found = chain.run(inputs, ["images"])["images"]
                    np.testing.assert_array_equal(found, engine.expected(inputs)["images"])
            assert (first.plain_runs, first.captures, first.graph_runs) == (1, 1, 2)
            assert (second.plain_runs, second.captures, second.graph_runs) == (1, 1, 2)
        assert cuda.cudart.allocations, "the second chain gave back what was lent to it"
        first.run(engine.inputs(2), ["images"])
    assert not cuda.cudart.allocations and not cuda.cudart.pinned


def test_a_gpu_without_room_is_one_clear_error_and_nothing_is_lost(
    engine: Engine, stream: Any, cuda: fake_tensorrt.State
) -> None:
    cuda.cudart.memory_bytes = 4096
    with pytest.raises(DeviceError, match="memory of the GPU is full") as caught, engine.chain(stream):
        pass
    assert caught.value.hint is not None and "--batch" in caught.value.hint
    assert not cuda.cudart.allocations


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


def test_the_first_run_of_a_shape_is_plain_and_the_others_are_one_launch(
    engine: Engine, stream: Any, cuda: fake_tensorrt.State
) -> None:
    with engine.chain(stream) as chain:
        for _ in range(4):
            chain.run(engine.inputs(2), ["images"])
        assert (chain.plain_runs, chain.captures, chain.graph_runs) == (1, 1, 3)
        assert cuda.cudart.launches == 3
        assert cuda.executed == list(GRAPHS) * 4


def test_another_shape_is_captured_anew(engine: Engine, stream: Any) -> None:
    wanted = [(2, 4), (2, 4), (3, 4), (3, 4), (3, 1), (3, 1), (2, 4), (2, 4)]
    with engine.chain(stream) as chain:
        for number, (batch, steps) in enumerate(wanted):
            inputs = engine.inputs(batch, steps=steps, seed=number)
            found = chain.run(inputs, ["images"])["images"]
            np.testing.assert_array_equal(found, engine.expected(inputs)["images"])
        assert (chain.plain_runs, chain.captures, chain.graph_runs) == (4, 4, 4)


def test_the_fake_finds_a_graph_that_outlived_its_shape(
    engine: Engine, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.chain(stream) as chain:
        for _ in range(2):
            chain.run(engine.inputs(2), ["images"])
        with monkeypatch.context() as patch, pytest.raises(DeviceError, match="700"):
            patch.setattr(chain, "_forget_graph", lambda: None)
            chain.run(engine.inputs(3), ["images"])


def test_a_capture_that_fails_leaves_plain_runs_and_the_reason(
    engine: Engine, stream: Any, cuda: fake_tensorrt.State
) -> None:
    cuda.cudart.fail_capture = True
    inputs = engine.inputs(2)
    with engine.chain(stream) as chain:
        for _ in range(3):
            found = chain.run(inputs, ["images"])["images"]
            np.testing.assert_array_equal(found, engine.expected(inputs)["images"])
        assert (chain.plain_runs, chain.captures, chain.graph_runs) == (3, 0, 0)
        assert chain.graph_problem is not None and "901" in chain.graph_problem


def test_without_graphs_every_run_is_plain(engine: Engine, stream: Any) -> None:
    with PlanChain([(plan, 1) for plan in engine.plans()], stream, graphs=False) as chain:
        for _ in range(3):
            chain.run(engine.inputs(1), ["images"])
        assert (chain.plain_runs, chain.captures) == (3, 0)


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "batch"), [(0, 2), (1, 5)])
def test_shapes_outside_the_profile_are_refused_with_the_range(
    engine: Engine, stream: Any, profile: int, batch: int
) -> None:
    with engine.chain(stream, profile) as chain:
        with pytest.raises(ProfileError, match="outside the engine's range") as caught:
            chain.run(engine.inputs(batch), ["images"])
        limits = "1x8" if profile == 0 else "1x8 to 4x8"
        assert limits in caught.value.message
        inputs = engine.inputs(1)
        np.testing.assert_array_equal(chain.run(inputs, ["images"])["images"], engine.expected(inputs)["images"])


def test_a_plan_that_is_none_is_refused_in_tensorrts_words(cuda: fake_tensorrt.State) -> None:
    with pytest.raises(DeviceError, match="magic tag"):
        open_plan("unet_decoder.plan", b"not a plan at all")


def test_plans_whose_types_differ_are_not_chained(engine: Engine, stream: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Engine(tmp_path / "other", write_tiny_export(tmp_path / "other", precision="fp32"))
    mixed = [engine.plans()[0], *other.plans()[1:]]
    with pytest.raises(DeviceError, match="text_states is float32, and float16"):
        PlanChain([(plan, 1) for plan in mixed], stream)


def test_a_failing_plan_says_why(engine: Engine, stream: Any) -> None:
    with engine.chain(stream) as chain:
        chain._contexts[2]._addresses.pop("mid")
        with pytest.raises(DeviceError, match=r"unet_decoder failed: .*Address is not set for \['mid'\]"):
            chain.run(engine.inputs(1), ["images"])


def test_without_a_cuda_runtime_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import polygraphy.cuda.cuda

    def missing() -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(polygraphy.cuda, "wrapper", missing)
    with pytest.raises(MissingDependencyError, match="libcudart") as caught:
        cuda_calls.cuda_wrapper()
    assert caught.value.hint is not None and "nvidia-cuda-runtime" in caught.value.hint


def test_the_cuda_runtime_of_python_packages_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("nvidia/cuda_runtime/lib/libcudart.so.12", "nvidia/cu13/lib/libcudart.so.13"):
        file = tmp_path / place
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    newest, older = tmp_path / "nvidia/cu13/lib", tmp_path / "nvidia/cuda_runtime/lib"
    assert cuda_calls.cudart_folders() == [str(newest), str(older)]
    assert cuda_calls.cudart_folders(12) == [str(older)]


# --- versions of TensorRT and Python -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.8.0.43", "11.4.0.106"])
def test_one_runner_for_every_version_of_tensorrt(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = fake_tensorrt.install(monkeypatch, version=version)
    engine = Engine(tmp_path, write_tiny_export(tmp_path))
    inputs = engine.inputs(2)
    with open_stream() as stream:
        with engine.chain(stream) as chain:
            for _ in range(3):
                found = chain.run(inputs, ["images"])["images"]
                np.testing.assert_array_equal(found, engine.expected(inputs)["images"])
            assert (chain.plain_runs, chain.captures, chain.graph_runs) == (1, 1, 2)
        assert not state.cudart.allocations


# What benchmarks/trt86_check.py takes to a machine that has TensorRT 8.6, NumPy and Polygraphy under Python 3.9 alone.
CARRIED = [Path(str(module.__file__)) for module in (cuda_calls, trt_messages, trt_plan, trt_runner, errors)]


@pytest.mark.parametrize("file", CARRIED, ids=lambda file: file.stem)
def test_the_runner_needs_numpy_polygraphy_and_the_standard_library_only(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 9))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    ours = {name for name in modules if name.startswith("tiue_cli")}
    others = {name.partition(".")[0] for name in modules - ours} - set(sys.stdlib_module_names)
    assert ours <= {f"tiue_cli.{'' if one is CARRIED[-1] else 'backends.'}{one.stem}" for one in CARRIED}, ours
    assert others <= {"numpy", "polygraphy", "tensorrt"}, others


def _python39() -> str | None:
    """A Python 3.9 of this machine, if there is one."""
    places = [shutil.which("python3.9"), *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python"))]
    for place in filter(None, places):
        done = subprocess.run([place, "--version"], capture_output=True, encoding="utf-8", check=False)
        if re.search(r"3\.9\.", done.stdout):
            return place
    return None


def test_the_runner_can_be_imported_by_python_3_9() -> None:
    python = _python39()
    if python is None:
        pytest.skip("no Python 3.9 on this machine")
    script = (
        "import sys, types\n"
        "sys.modules['numpy'] = numpy = types.ModuleType('numpy')\n"
        "for name in ('float32', 'float16', 'int64', 'int32', 'int8', 'uint8', 'bool_'): setattr(numpy, name, name)\n"
        "import tiue_cli.backends.trt_runner\n"
        "from tiue_cli.backends.trt_plan import Plan, TensorInfo\n"
        "print(Plan._fields, TensorInfo._fields)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(CARRIED[0].parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", script], capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["Runtime", "ICudaEngine", "IExecutionContext", "Builder", "IBuilderConfig"])
def test_the_fake_has_no_method_that_tensorrt_lacks(kind: str) -> None:
    fake = getattr(fake_tensorrt, kind)
    public = {name for name in vars(fake) if not name.startswith("_")}
    versions = [set(fake_tensorrt._API[version].get(kind, "").split()) for version in ("8.6", "10.8", "11.4")]
    assert public <= set.union(*versions), public - set.union(*versions)
