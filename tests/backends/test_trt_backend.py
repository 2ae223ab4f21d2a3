"""The TensorRT backend and what it refuses to open, on the fakes; the oracle is the ONNX Runtime backend."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from tiny_export import write_tiny_export

from tiue_cli.backends import cuda as cuda_calls
from tiue_cli.backends import trt_backend, trt_device
from tiue_cli.backends.base import Backend
from tiue_cli.backends.onnx_backend import OnnxBackend
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError, ProfileError, UsageError
from tiue_cli.export.trt.engine import EngineConfig, build_engine
from tiue_cli.files.engines import ENGINE_MANIFEST
from tiue_cli.files.exports import EXPORT_MANIFEST
from tiue_cli.model.noise import draw_noise

PROMPTS = ["a red heart above a blue house", "a yellow star", "a blue heart at night"]
ENGINE = "nvidia-fake-4090-trt10.8.0.43-fp16"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with an engine, to be copied."""
    folder = tmp_path_factory.mktemp("built") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        fake_tensorrt.install(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        write_tiny_export(folder)
        build_engine(EngineConfig(folder, check=False))
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.State:
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def export(built: Path, cuda: fake_tensorrt.State, tmp_path: Path) -> Path:
    """A copy that a test may damage, on a machine that fits."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


@pytest.fixture
def backend(export: Path) -> Iterator[TrtBackend]:
    with TrtBackend(export) as opened:
        yield opened


def noise_for(backend: Backend, count: int, size: tuple[int, int] | None = None) -> np.ndarray:
    return draw_noise(range(count), backend.latent_shape(size or backend.default_size))


# --- what it draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_images_equal_those_of_onnx_runtime(export: Path, backend: TrtBackend, steps: int | None) -> None:
    noise = noise_for(backend, 3)
    with OnnxBackend(export, provider="cpu") as reference:
        expected = reference.generate(PROMPTS, noise, steps=steps)
    for _ in range(3):
        found = backend.generate(PROMPTS, noise, steps=steps)
        np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8 and found.shape == (3, 32, 32, 3)


def test_it_is_a_backend_like_the_others(backend: TrtBackend) -> None:
    checked: Backend = backend
    assert (checked.name, checked.device, checked.dtype) == ("trt", "cuda", "fp16")
    assert checked.default_size == (32, 32)
    assert checked.cut_text(["a red heart", "a red heart above a blue house at night"]) == ["", "house at night"]
    assert any("--no-check" in note for note in checked.notes)
    shares: list[float] = []
    checked.generate(PROMPTS[:1], noise_for(checked, 1), progress=shares.append)
    assert shares[-1] == 1.0


def test_one_image_takes_the_profile_for_one_image(backend: TrtBackend) -> None:
    assert backend._profile(batch=1, steps=4, size=(32, 32)) == 0
    assert backend._profile(batch=2, steps=4, size=(32, 32)) == 1
    backend.generate(PROMPTS[:1], noise_for(backend, 1))
    assert set(backend._chains) == {0}


def test_a_smaller_last_batch_and_other_steps_are_served(export: Path, backend: TrtBackend) -> None:
    with OnnxBackend(export, provider="cpu") as reference:
        for count, steps in ((3, 4), (3, 4), (2, 4), (1, 4), (3, 2), (3, 4)):
            noise = noise_for(backend, count)
            found = backend.generate(PROMPTS[:count], noise, steps=steps)
            np.testing.assert_array_equal(found, reference.generate(PROMPTS[:count], noise, steps=steps))


def test_shapes_that_alternate_are_graphs_and_the_oldest_but_the_first_makes_way(
    backend: TrtBackend, cuda: fake_tensorrt.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_backend, "SHAPES_HELD", 3)
    draw = {count: noise_for(backend, count) for count in (2, 3)}
    for count, steps in [(2, 4), (3, 4)] * 3:
        backend.generate(PROMPTS[:count], draw[count], steps=steps)
    chains = backend._chains[1]
    assert [chain.graph_runs for chain in chains.values()] == [2, 2], "shapes that alternate run as graphs"
    first, mallocs = next(iter(chains)), cuda.cudart.mallocs
    for count, steps in [(3, 1), (3, 2), (2, 4)]:
        backend.generate(PROMPTS[:count], draw[count], steps=steps)
    assert list(chains) == [first, (*draw[3].shape, 1), (*draw[3].shape, 2)]
    assert chains[first].graph_runs == 3 and cuda.cudart.mallocs == mallocs, "memory is one for a profile"


def test_everything_is_given_back(export: Path, cuda: fake_tensorrt.State) -> None:
    with TrtBackend(export) as backend:
        for _ in range(2):
            backend.generate(PROMPTS, noise_for(backend, 3))
        assert cuda.cudart.allocations and cuda.cudart.streams
    assert not cuda.cudart.allocations and not cuda.cudart.streams and not cuda.cudart.executables


def test_several_fixed_sizes_are_opened_when_they_are_needed(
    cuda: fake_tensorrt.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "sizes"
    write_tiny_export(folder, sizes=((32, 32), (32, 48)))
    build_engine(EngineConfig(folder, check=False))
    with TrtBackend(folder) as backend, OnnxBackend(folder, provider="cpu") as reference:
        assert {size for _, size in backend._plans} == {None, (32, 32)}
        for size in ((32, 48), (32, 32)):
            noise = noise_for(backend, 2, size)
            expected = reference.generate(PROMPTS[:2], noise)
            np.testing.assert_array_equal(backend.generate(PROMPTS[:2], noise), expected)
        with pytest.raises(UsageError, match="fixed sizes"):
            backend.latent_shape((48, 48))


def test_an_engine_folder_can_be_named_itself(export: Path) -> None:
    with TrtBackend(export / ENGINE) as backend:
        assert backend.folder == export.resolve() and backend.engine_folder == export / ENGINE
        assert backend.generate(PROMPTS, noise_for(backend, 3)).shape == (3, 32, 32, 3)


def test_an_engine_folder_that_was_renamed_is_found_by_its_manifest(export: Path) -> None:
    (export / ENGINE).rename(export / "mine")
    assert TrtBackend(export).engine_folder == export / "mine"


def test_latents_that_are_no_numbers_are_an_error(backend: TrtBackend, cuda: fake_tensorrt.State) -> None:
    cuda.spoil = lambda name, value: value * np.float32("nan") if name == "latents" else value
    with pytest.raises(DeviceError, match="produced NaN or infinity") as caught:
        backend.generate(PROMPTS, noise_for(backend, 3))
    assert caught.value.hint is not None and "fp32" in caught.value.hint


# --- what it refuses -----------------------------------------------------------------------------------------------


def test_a_batch_outside_every_profile_is_refused_with_the_command(backend: TrtBackend) -> None:
    with pytest.raises(ProfileError, match="batch 17 is outside 1 to 16") as caught:
        backend.generate(["a"] * 17, noise_for(backend, 17))
    assert "batch 17 is not 1" in caught.value.message
    assert caught.value.hint is not None and "tiue export" in caught.value.hint and ":17" in caught.value.hint


def test_a_size_outside_every_profile_is_refused_before_anything_runs(backend: TrtBackend) -> None:
    with pytest.raises(ProfileError, match="it takes 32x32") as caught:
        backend.latent_shape((64, 64))
    assert caught.value.hint is not None and "tiue export" in caught.value.hint
    assert backend.largest_batch((64, 64)) is None and backend.largest_batch((32, 32)) == 16


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder"])
def test_one_flipped_bit_in_a_plan_is_not_opened(export: Path, cuda: fake_tensorrt.State, graph: str) -> None:
    path = export / ENGINE / f"{graph}.plan"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=f"{graph}.plan is not the plan that was built") as caught:
        TrtBackend(export).__enter__()
    assert caught.value.hint is not None and f"tiue export {export} --trt" in caught.value.hint
    assert not cuda.cudart.streams and not cuda.cudart.allocations


def test_a_truncated_or_missing_plan_is_not_opened(export: Path) -> None:
    path = export / ENGINE / "unet_decoder.plan"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=r"bytes, and engine\.json says"):
        TrtBackend(export).__enter__()
    path.unlink()
    with pytest.raises(ManifestError, match="is missing"):
        TrtBackend(export).__enter__()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gpu", "NVIDIA H200", "the GPU NVIDIA H200, and this machine has NVIDIA Fake 4090"),
        ("compute_capability", "9.0", "compute capability 9.0, and this machine has 8.9"),
        ("tensorrt", "11.4.0.106", "TensorRT 11.4.0.106, and this machine has 10.8.0.43"),
        ("platform", "Windows-AMD64", "the platform Windows-AMD64, and this machine has"),
    ],
)
def test_an_engine_of_another_machine_is_refused_naming_both(
    export: Path, cuda: fake_tensorrt.State, field: str, value: str, message: str
) -> None:
    path = export / ENGINE / ENGINE_MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    data["device"][field] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    for place in (export, export / ENGINE):
        with pytest.raises(DeviceError, match=message) as caught:
            TrtBackend(place)
        assert caught.value.hint is not None and "tiue export" in caught.value.hint and "--trt" in caught.value.hint


def test_another_driver_alone_is_no_reason_to_refuse(export: Path) -> None:
    path = export / ENGINE / ENGINE_MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"cuda": "12.8"', '"cuda": "12.9"'), encoding="utf-8")
    assert TrtBackend(export).engine.device.cuda == "12.9"


def test_the_manifest_of_another_student_is_refused(export: Path, tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / EXPORT_MANIFEST, export / EXPORT_MANIFEST)
    with pytest.raises(ManifestError, match="was built from another text_encoder"):
        TrtBackend(export)


def test_a_damaged_engine_manifest_names_the_field(export: Path) -> None:
    path = export / ENGINE / ENGINE_MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    data["plans"][0]["plan"]["file"] = "../../elsewhere.plan"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ManifestError, match=r"plans\.0\.plan\.file"):
        TrtBackend(export)


def test_an_export_without_an_engine_names_the_command(cuda: fake_tensorrt.State, tmp_path: Path) -> None:
    write_tiny_export(tmp_path / "bare")
    with pytest.raises(DeviceError, match="has no TensorRT engine") as caught:
        TrtBackend(tmp_path / "bare")
    assert caught.value.hint == f"build one: tiue export {tmp_path / 'bare'} --trt"


# --- where TensorRT is missing -------------------------------------------------------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, *present: str) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.partition("-")[0] in ("tensorrt", "polygraphy") and name not in present:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name in present else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def driver(monkeypatch: pytest.MonkeyPatch, found: fake_cuda.FakeDriver | None) -> None:
    for module in (trt_device, cuda_calls):
        monkeypatch.setattr(module, "driver_library", lambda: found)


@pytest.mark.parametrize(
    ("cuda_version", "package"), [(12080, "tensorrt-cu12>=10.8,<12"), (13000, "tensorrt>=10.8,<12")]
)
def test_with_a_gpu_the_missing_packages_are_named_as_pip_wants_them(
    monkeypatch: pytest.MonkeyPatch, cuda_version: int, package: str
) -> None:
    driver(monkeypatch, fake_cuda.FakeDriver(cuda=cuda_version))
    installed(monkeypatch)
    with pytest.raises(MissingDependencyError) as caught:
        trt_device.require_tensorrt()
    assert "and polygraphy are not installed" in caught.value.message
    assert caught.value.hint == f"install them: {sys.executable} -m pip install '{package}' 'polygraphy>=0.53,<1'"
    installed(monkeypatch, "tensorrt-cu12")
    with pytest.raises(MissingDependencyError, match=r"^polygraphy is not installed") as caught:
        trt_device.require_tensorrt()
    assert caught.value.hint == f"install it: {sys.executable} -m pip install 'polygraphy>=0.53,<1'"


def test_without_a_gpu_that_is_said_with_what_else_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, None)
    installed(monkeypatch, "polygraphy")
    with pytest.raises(DeviceError, match=r"needs an NVIDIA GPU, .*; tensorrt is not installed") as caught:
        trt_device.require_tensorrt()
    assert caught.value.hint is not None and "pip install 'tensorrt>=10.8,<12'" in caught.value.hint
    installed(monkeypatch, "polygraphy", "tensorrt")
    with pytest.raises(DeviceError, match="the driver offers none") as caught:
        trt_device.require_tensorrt()
    assert "not installed" not in caught.value.message


@pytest.mark.parametrize("version", ["10.7.0", "8.6.1", "12.0.0"])
def test_a_tensorrt_outside_the_range_is_named(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_tensorrt.install(monkeypatch, version=version if version == "8.6.1" else "10.8.0.43")
    monkeypatch.setitem(fake_tensorrt.MODULE.__dict__, "__version__", version)
    with pytest.raises(MissingDependencyError, match=rf"TensorRT {version} is installed, but 10\.8 to 11 is needed"):
        trt_device.require_tensorrt()


@pytest.mark.parametrize("version", ["10.8.0.43", "10.13.2", "11.0.0", "11.4.0.106"])
def test_a_tensorrt_inside_the_range_is_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    fake_tensorrt.install(monkeypatch)
    monkeypatch.setitem(fake_tensorrt.MODULE.__dict__, "__version__", version)
    assert trt_device.require_tensorrt() == version


def test_the_current_device_is_what_the_driver_says(cuda: fake_tensorrt.State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_device, "_DRIVER_FILE", Path("/nowhere"))
    device = trt_device.current_device()
    assert (device.gpu, device.compute_capability) == ("NVIDIA Fake 4090", "8.9")
    assert (device.tensorrt, device.cuda, device.driver) == ("10.8.0.43", "12.8", "CUDA 12.8")
    assert trt_device.engine_name(device, "fp16") == ENGINE


def test_the_backend_loads_no_torch(export: Path) -> None:
    script = (
        "import sys\n"
        "from tiue_cli.backends.trt_backend import TrtBackend\n"
        "from tiue_cli.errors import TiueError\n"
        f"try: TrtBackend({str(export)!r})\n"
        "except TiueError as error: print(type(error).__name__)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=root, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_of_the_gpu_tests_is_sound(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trt_shapes import SHAPES

    monkeypatch.setattr(sys, "argv", ["script", str(export)])
    exec(compile(SHAPES, "shapes", "exec"), {})
