"""Building engines, on the fakes: what is written, what is retried, what is refused, and what an interrupt leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from tiny_export import FACTOR, write_tiny_export

from tiue_cli.backends.onnx_session import Provider
from tiue_cli.backends.trt_backend import TrtBackend
from tiue_cli.errors import DeviceError, ManifestError, ParityError, ProfileError, UsageError
from tiue_cli.export.trt import builder as plan_build
from tiue_cli.export.trt import engine as to_plan
from tiue_cli.export.trt.builder import BuildWatch, build_plan, workspace_bytes, workspace_limits
from tiue_cli.export.trt.engine import EngineConfig, build_engine, build_lock
from tiue_cli.export.trt.parity import Reference, plan_cases
from tiue_cli.export.trt.profiles import batch_profiles
from tiue_cli.files.engines import ENGINE_MANIFEST, read_engine_manifest
from tiue_cli.files.exports import GRAPHS, read_export_manifest
from tiue_cli.files.hashes import sha256_file

ENGINE = "nvidia-fake-4090-trt10.8.0.43-fp16"
MIB = 1024**2


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake_tensorrt.State:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def export(cuda: fake_tensorrt.State, tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "tiny")
    return tmp_path / "tiny"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what is written -----------------------------------------------------------------------------------------------


def test_an_engine_names_its_source_machine_profiles_and_figures(export: Path, cuda: fake_tensorrt.State) -> None:
    result = build_engine(EngineConfig(export))
    assert result.folder == export / ENGINE and not result.reused
    assert names(result.folder) == {ENGINE_MANIFEST, *(f"{graph}.plan" for graph in GRAPHS)}
    engine, manifest = read_engine_manifest(result.folder), read_export_manifest(export)
    assert engine == result.manifest
    assert (engine.device.gpu, engine.device.tensorrt, engine.precision) == ("NVIDIA Fake 4090", "10.8.0.43", "fp16")
    assert [(profile.batch, profile.steps) for profile in engine.profiles] == [
        ((1, 1, 1), (1, 4, 4)),
        ((1, 4, 16), (1, 4, 4)),
    ]
    for plan in engine.plans:
        assert plan.onnx_sha256 == manifest.graph(plan.graph).digest
        assert plan.plan.sha256 == sha256_file(result.folder / plan.plan.file)
        assert plan.layers is not None and plan.layers > 0 and plan.device_memory_bytes == 2048
    assert engine.parity is not None and engine.parity.image_psnr_db == 100.0
    assert {(one.graph, one.output) for one in engine.parity.outputs} == {
        (graph.name, output.name) for graph in manifest.graphs for output in graph.outputs
    }
    assert not cuda.cudart.allocations and not cuda.cudart.streams


def test_networks_are_strongly_typed_and_tf32_is_off(export: Path, cuda: fake_tensorrt.State) -> None:
    build_engine(EngineConfig(export, check=False))
    strongly_typed = 1 << int(fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert len(cuda.flags) == 4 and all(flags & strongly_typed for flags in cuda.flags)


@pytest.mark.parametrize("version", ["10.8.0.43", "11.4.0.106"])
def test_it_builds_with_every_supported_tensorrt(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake_tensorrt.install(monkeypatch, version=version)
    write_tiny_export(tmp_path / "tiny")
    assert build_engine(EngineConfig(tmp_path / "tiny")).manifest.device.tensorrt == version


def test_batches_and_profile_files_decide_the_profiles(export: Path, tmp_path: Path) -> None:
    built = build_engine(EngineConfig(export, batches=((1, 2, 3),), check=False))
    assert [profile.batch for profile in built.manifest.profiles] == [(1, 2, 3)]
    file = tmp_path / "wide.toml"
    file.write_text(
        'format_version = 1\nprecision = "fp16"\n[model]\nfamily = "tiny"\n'
        '[[profile]]\nname = "wide"\nbatch = 2\nsteps = 4\nsize = "32x48"\n',
        encoding="utf-8",
    )
    built = build_engine(EngineConfig(export, profile=str(file), check=False))
    assert [(profile.name, profile.width) for profile in built.manifest.profiles] == [("wide", (48, 48, 48))]
    with TrtBackend(export) as backend:
        noise = np.zeros((2, 4, 8, 12), np.float32)
        assert backend.generate(["a", "a"], noise).shape == (2, 32, 48, 3)
    with pytest.raises(UsageError, match="both given"):
        build_engine(EngineConfig(export, profile=str(file), batches=((1, 1, 1),)))
    with pytest.raises(UsageError, match="given twice"):
        build_engine(EngineConfig(export, batches=((1, 1, 1), (1, 1, 1))))
    with pytest.raises(ProfileError, match="Stable Diffusion"):
        build_engine(EngineConfig(export, profile="sd15-512"))


def test_progress_has_a_stage_a_graph_and_never_goes_back(
    export: Path, cuda: fake_tensorrt.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_build, "BEAT_S", 0.01)
    cuda.on_step = lambda phase, step: time.sleep(0.05)
    heard: list[tuple[str, float, str]] = []
    build_engine(EngineConfig(export), stage=lambda what, share, detail: heard.append((what, share, detail)))
    stages = list(dict.fromkeys(what for what, _, _ in heard))
    assert stages == [
        *(f"build {graph}" for graph in GRAPHS),
        "compare: reference",
        "compare: plans",
        "compare: images",
    ]
    for stage in stages:
        shares = [share for what, share, _ in heard if what == stage]
        assert shares == sorted(shares) and shares[0] >= 0.0 and shares[-1] <= 1.0
    # The beat: during the build somebody says what it is at and for how long.
    assert any("Timing graph nodes, 0 s" in detail for _, _, detail in heard)


def test_a_second_build_uses_the_timing_cache_of_this_device(export: Path, cuda: fake_tensorrt.State) -> None:
    first = build_engine(EngineConfig(export, check=False))
    assert cuda.cache_hits == 0
    build_engine(EngineConfig(export, check=False, rebuild=True))
    assert cuda.cache_hits >= 4
    path = plan_build.timing_cache_file(first.manifest.device)
    assert path.is_file() and "trt10.8.0.43" in path.name and "cc8.9" in path.name
    other = first.manifest.device.model_copy(update={"tensorrt": "11.4.0.106"})
    assert plan_build.timing_cache_file(other) != path


# --- again, or not -------------------------------------------------------------------------------------------------


def test_an_engine_that_fits_is_not_built_again(export: Path, cuda: fake_tensorrt.State) -> None:
    build_engine(EngineConfig(export))
    built = len(cuda.workspaces)
    assert build_engine(EngineConfig(export)).reused and len(cuda.workspaces) == built
    assert not build_engine(EngineConfig(export, rebuild=True)).reused
    assert not build_engine(EngineConfig(export, batches=((1, 1, 1),))).reused


def test_an_engine_that_was_damaged_or_not_compared_is_built_again(export: Path) -> None:
    folder = build_engine(EngineConfig(export, check=False)).folder
    assert build_engine(EngineConfig(export, check=False)).reused
    assert not build_engine(EngineConfig(export)).reused
    plan = folder / "vae_decoder.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert not build_engine(EngineConfig(export)).reused
    assert build_engine(EngineConfig(export)).reused


def test_a_damaged_graph_is_not_built(export: Path) -> None:
    graph = export / "unet_decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ManifestError, match=r"unet_decoder\.onnx is not the file that was written"):
        build_engine(EngineConfig(export))
    assert not (export / ENGINE).exists()


# --- memory --------------------------------------------------------------------------------------------------------


def test_when_memory_runs_out_it_is_tried_with_less(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.builds = ["ok", "oom", "oom", "ok"]
    result = build_engine(EngineConfig(export))
    text, first, second, third, *_ = cuda.workspaces
    assert text > first and (second, third) == (first // 2, first // 4)
    assert any("unet_encoder was built with" in note and "memory ran out" in note for note in result.notes)
    assert result.manifest.parity is not None


def test_when_memory_never_suffices_that_is_the_error(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.builds = ["oom"] * 10
    with pytest.raises(DeviceError, match=r"not enough GPU memory to build text_encoder\.onnx") as caught:
        build_engine(EngineConfig(export))
    assert caught.value.hint is not None and "--batch" in caught.value.hint and "nvidia-smi" in caught.value.hint
    assert len(cuda.workspaces) == 4
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))


@pytest.mark.parametrize(
    ("outcome", "attempts", "said"),
    [("bad_alloc", 1, r"the main memory is not enough to build text_encoder\.onnx"), ("oom-fixed", 2, "main memory")],
)
def test_a_shortage_that_less_workspace_does_not_change_is_not_retried_for_ever(
    export: Path, cuda: fake_tensorrt.State, outcome: str, attempts: int, said: str
) -> None:
    cuda.builds = [outcome] * 10
    with pytest.raises(DeviceError, match=said) as caught:
        build_engine(EngineConfig(export))
    assert caught.value.hint is not None and "memory limit" in caught.value.hint
    assert len(cuda.workspaces) == attempts
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))


def test_a_builder_that_tensorrt_does_not_make_is_told_with_tensorrts_reason(
    export: Path, cuda: fake_tensorrt.State
) -> None:
    cuda.refusal = "CUDA initialization failure with error: 35. Please check your CUDA installation"
    with pytest.raises(
        DeviceError, match=r"cannot start to build text_encoder\.onnx: .*failure with error: 35"
    ) as caught:
        build_engine(EngineConfig(export))
    assert caught.value.hint is not None and "nvidia-smi" in caught.value.hint
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))


def test_another_failure_is_not_retried_and_says_tensorrts_reason(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.builds = ["ok", "ok", "fail"]
    with pytest.raises(DeviceError, match=r"cannot build unet_decoder\.onnx: .*Could not find any implementation"):
        build_engine(EngineConfig(export))
    assert len(cuda.workspaces) == 3
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))


def test_the_workspace_follows_what_is_free() -> None:
    assert workspace_bytes(24 * 1024 * MIB, 1024 * MIB) == int(22 * 1024 * MIB * 0.75)
    assert workspace_bytes(1024 * MIB, 2048 * MIB) == 256 * MIB
    assert workspace_limits(4096 * MIB) == [4096 * MIB, 2048 * MIB, 1024 * MIB, 512 * MIB]
    assert workspace_limits(400 * MIB) == [400 * MIB, 256 * MIB]
    assert workspace_limits(256 * MIB) == [256 * MIB]


# --- parity --------------------------------------------------------------------------------------------------------


def test_an_engine_that_computes_something_else_fails_and_leaves_nothing(
    export: Path, cuda: fake_tensorrt.State
) -> None:
    def spoil(name: str, value: np.ndarray) -> np.ndarray:
        return (value * np.float16(1.3)).astype(value.dtype) if name == "skip_01" else value

    cuda.spoil = spoil
    with pytest.raises(ParityError, match="unet_encoder: skip_01 with batch-1: 1 image, K=4") as caught:
        build_engine(EngineConfig(export))
    assert "relative error of 3.0e-01; 5e-02 is allowed in fp16" in caught.value.message
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))
    assert not cuda.cudart.allocations and not cuda.cudart.streams


def test_an_error_in_the_last_image_of_the_largest_batch_is_found(export: Path, cuda: fake_tensorrt.State) -> None:
    def spoil(name: str, value: np.ndarray) -> np.ndarray:
        if name != "latents" or len(value) < 16:
            return value
        return np.concatenate([value[:-1], np.zeros_like(value[-1:])])

    cuda.spoil = spoil
    with pytest.raises(ParityError, match="batch-1-4-16: 16 images, K=1"):
        build_engine(EngineConfig(export))


def test_an_error_that_only_shows_in_a_row_of_plans_is_found(export: Path, cuda: fake_tensorrt.State) -> None:
    # Every plan passes on the reference's inputs; in a row the third one reads what the first one should not change.
    runs = {"count": 0}

    def spoil(name: str, value: np.ndarray) -> np.ndarray:
        runs["count"] += name == "latents"
        return value * np.float32(0.2) if name == "latents" and runs["count"] > 4 else value

    cuda.spoil = spoil
    with pytest.raises(ParityError, match=r"TensorRT's image 1 .* run plain, differs from ONNX Runtime"):
        build_engine(EngineConfig(export))


@pytest.mark.parametrize(
    ("bad", "message"), [(float("nan"), "contains NaN or infinity"), (float("inf"), "contains NaN or infinity")]
)
def test_nan_and_inf_fail(export: Path, cuda: fake_tensorrt.State, bad: float, message: str) -> None:
    cuda.spoil = lambda name, value: np.full_like(value, bad) if name == "mid" else value
    with pytest.raises(ParityError, match=message):
        build_engine(EngineConfig(export))


def test_no_check_builds_all_the_same_and_the_backend_says_so(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.spoil = lambda name, value: value * 0
    result = build_engine(EngineConfig(export, check=False))
    assert result.manifest.parity is None
    with TrtBackend(export) as backend:
        assert any("not compared" in note for note in backend.notes)


def test_an_engine_without_cuda_graphs_says_so(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.cudart.fail_capture = True
    result = build_engine(EngineConfig(export))
    assert any("without CUDA graphs" in note for note in result.notes)
    assert read_engine_manifest(result.folder).notes == result.notes


def test_every_corner_of_every_profile_is_compared(export: Path) -> None:
    manifest = read_export_manifest(export)
    cases = plan_cases(batch_profiles(manifest), manifest)
    assert [(case.profile, case.batch, case.steps) for case in cases] == [(0, 1, 4), (0, 1, 1), (1, 1, 4), (1, 16, 1)]


def test_the_reference_repeats_its_images_to_fill_a_batch(export: Path) -> None:
    manifest = read_export_manifest(export)
    cases = plan_cases(batch_profiles(manifest), manifest)
    reference = Reference(export, manifest, provider=Provider("cpu"))
    reference.compute(cases)
    tensors = reference.tensors(cases[3])
    assert tensors["images"].shape == (16, 32, 32, 3) and tensors["timesteps"].shape == (1,)
    assert tensors["noise"].shape == (16, 4, 32 // FACTOR, 32 // FACTOR)
    for row in range(16):
        np.testing.assert_array_equal(tensors["images"][row], tensors["images"][row % 2])
    assert (tensors["images"][0] != tensors["images"][1]).any()


# --- one at a time, and interrupts ---------------------------------------------------------------------------------


def test_the_lock_keeps_another_process_out_until_it_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tiue_cli.export.trt.engine import build_lock\n"
        f"with build_lock(Path({str(folder)!r})):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd=root
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        waited: list[float] = []

        def waiting(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                other.stdin.write("\n")
                other.stdin.flush()

        with build_lock(folder, waiting=waiting):
            assert len(waited) >= 2
            assert other.wait(timeout=10) == 0
    assert names(tmp_path) == set(), "the lock file goes with the lock"


def test_a_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".engine.lock").touch()
    with build_lock(tmp_path / "engine", waiting=lambda seconds: pytest.fail("nobody holds it")):
        pass


def test_two_builds_at_once_make_one_engine(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.on_step = lambda phase, step: time.sleep(0.02)
    results: list[to_plan.EngineResult] = []
    threads = [threading.Thread(target=lambda: results.append(build_engine(EngineConfig(export)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.reused for result in results) == [False, True]
    assert len(cuda.workspaces) == 4
    assert not list(export.glob(".*"))


def test_what_a_killed_build_left_is_removed_by_the_next(export: Path) -> None:
    leftover = export / ".nvidia-fake-4090-trt10.8.0.0badcafe.tmp.43-fp16"
    leftover.mkdir()
    (leftover / "unet_encoder.plan").write_bytes(b"half")
    other = export / ".nvidia-fake-4090-trt11.4.0.0badcafe.tmp.106-fp16"
    other.mkdir()
    build_engine(EngineConfig(export, check=False))
    assert not leftover.exists()
    assert other.exists(), "another engine's build may be running"


class _Interrupt:
    """Raises in the main thread's progress after some calls, as a signal handler would."""

    def __init__(self, error: BaseException, stage: str) -> None:
        self._error, self._stage = error, stage

    def __call__(self, what: str, share: float, detail: str) -> None:
        if what == self._stage and "Timing" in detail:
            raise self._error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_build_stops_tensorrt_and_leaves_nothing(
    export: Path, cuda: fake_tensorrt.State, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_build, "BEAT_S", 0.02)
    cuda.builds = ["ok", "hang"]
    with pytest.raises(type(error)):
        build_engine(EngineConfig(export), stage=_Interrupt(error, "build unet_encoder"))
    assert cuda.cancelled == 1
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))
    assert not any(thread.name.startswith("tensorrt") for thread in threading.enumerate())


def test_an_interrupted_rebuild_leaves_the_old_engine(
    export: Path, cuda: fake_tensorrt.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_engine(EngineConfig(export)).manifest
    monkeypatch.setattr(plan_build, "BEAT_S", 0.02)
    cuda.builds = ["hang"]
    with pytest.raises(KeyboardInterrupt):
        build_engine(EngineConfig(export, rebuild=True), stage=_Interrupt(KeyboardInterrupt(), "build text_encoder"))
    assert read_engine_manifest(export / ENGINE) == before
    assert build_engine(EngineConfig(export)).reused


def test_sigterm_unwinds_like_an_interrupt(export: Path, cuda: fake_tensorrt.State) -> None:
    cuda.builds = ["hang"]
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit) as stopped:
        build_engine(EngineConfig(export))
    timer.join()
    assert stopped.value.code == 143 and cuda.cancelled == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (export / ENGINE).exists() and not list(export.glob(".*"))


# --- parts ---------------------------------------------------------------------------------------------------------


def test_nested_phases_make_one_share() -> None:
    watch = BuildWatch()
    assert watch.share == 0.0 and watch.phase == ""
    watch.phase_start("build", None, 4)
    watch.step_complete("build", 0)
    assert watch.share == 0.25
    watch.phase_start("tactics", "build", 2)
    watch.step_complete("tactics", 0)
    assert watch.share == pytest.approx(0.375) and watch.phase == "tactics"
    watch.phase_start("nodes", "tactics", 10)
    watch.step_complete("nodes", 4)
    assert watch.share == pytest.approx(0.4375)
    watch.phase_finish("tactics")
    watch.step_complete("build", 1)
    assert watch.share == 0.5 and watch.phase == "build"
    for step in (2, 3):
        assert watch.step_complete("build", step)
    assert watch.share == 1.0
    watch.cancelled = True
    assert not watch.step_complete("build", 3)


def test_a_graph_that_is_no_onnx_says_what_the_parser_says(tmp_path: Path, cuda: fake_tensorrt.State) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(DeviceError, match=r"cannot build bad\.onnx: .*MODEL_DESERIALIZE_FAILED"):
        build_plan(tmp_path / "bad.onnx", tmp_path / "bad.plan", [{}], workspace_bytes=MIB)
    assert not (tmp_path / "bad.plan").exists()


def test_the_engine_manifest_is_plain_json_with_no_path_of_this_machine(export: Path, tmp_path: Path) -> None:
    folder = build_engine(EngineConfig(export)).folder
    text = (folder / ENGINE_MANIFEST).read_text(encoding="utf-8")
    assert json.loads(text)["kind"] == "engine" and str(tmp_path) not in text
