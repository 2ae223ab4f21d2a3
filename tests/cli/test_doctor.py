"""What is found out about the machine, and what ``tiue doctor`` makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tiue_cli.backends import trt_device
from tiue_cli.base import machine
from tiue_cli.base.machine import DiskInfo, GpuInfo, MachineInfo, TorchInfo, gpus
from tiue_cli.cli import diagnosis as doctor
from tiue_cli.cli.app import main
from tiue_cli.cli.diagnosis import Check, diagnose

GIB = 1024**3
H200 = GpuInfo("NVIDIA H200", "570.86.15", 143771 * 1024**2, 143000 * 1024**2, "9.0")
MACHINE = MachineInfo(
    system="Linux",
    python="3.12.1",
    executable=sys.executable,
    cpu="a CPU",
    cores=2,
    cpu_arithmetic=("AVX2",),
    memory_bytes=16 * GIB,
    memory_free_bytes=8 * GIB,
    gpus=(),
    packages={"torch": "2.10.0"},
    disks=(DiskInfo("/here", 100 * GIB, 50 * GIB), DiskInfo("/cache", 100 * GIB, 50 * GIB)),
)
CPU_TORCH = TorchInfo("2.10.0+cpu", None, cuda_usable=False, device_name=None, problem="a build without CUDA")


def check(
    monkeypatch: pytest.MonkeyPatch, name: str, *, found: MachineInfo = MACHINE, torch: object = CPU_TORCH
) -> Check:
    """The check ``name`` on an invented machine."""

    def answer() -> TorchInfo:
        if isinstance(torch, Exception):
            raise torch
        assert isinstance(torch, TorchInfo)
        return torch

    monkeypatch.setattr(doctor, "machine_info", lambda: found)
    monkeypatch.setattr(doctor, "torch_info", answer)
    return next(check for check in diagnose().checks if check.name == name)


def test_gpus_are_read_from_nvidia_smi() -> None:
    output = "NVIDIA H200, 570.86.15, 143771, 143000, 9.0\nNVIDIA X, 1.0, [N/A], [N/A], [N/A]\nnonsense\n"
    assert gpus(lambda command: output) == (H200, GpuInfo("NVIDIA X", "1.0", None, None, None))


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 1), PermissionError()])
def test_failing_nvidia_smi_means_no_gpu(error: Exception) -> None:
    def fail(command: list[str]) -> str:
        raise error

    assert gpus(fail) == ()


def test_memory_respects_the_containers_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.memory_bytes() == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("0\n")
    assert machine.memory_bytes() == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    assert machine.memory_bytes() == (4 * GIB, 1 * GIB)


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.disk_info(tmp_path / "a" / "b").total_bytes == machine.disk_info(tmp_path).total_bytes


def test_cpu_torch_beside_a_gpu_is_broken_and_the_command_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch, "CUDA", found=replace(MACHINE, gpus=(H200,)))
    assert found.status == "broken"
    assert "pip install --force-reinstall" in str(found.fix)


def test_cpu_torch_without_a_gpu_needs_no_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch, "CUDA")
    assert (found.status, found.fix) == ("missing", None)


def test_driver_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = TorchInfo("2.10.0", "13.0", cuda_usable=False, device_name=None, problem="driver too old")
    found = check(monkeypatch, "CUDA", found=replace(MACHINE, gpus=(H200,)), torch=torch)
    assert found.status == "broken"
    assert "driver too old" in found.detail
    assert H200.driver in str(found.fix)


@pytest.mark.parametrize("error", [ImportError("No module named 'torch'"), OSError("libcudart.so: cannot open")])
def test_torch_that_does_not_load_is_broken_and_the_rest_is_still_checked(monkeypatch, error) -> None:
    found = check(monkeypatch, "torch", torch=error)
    assert found.status == "broken"
    assert str(error) in found.detail
    assert "pip install" in str(found.fix)


def test_low_memory_and_disk_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(MACHINE, memory_free_bytes=GIB, disks=(DiskInfo("/here", 100 * GIB, GIB // 2), MACHINE.disks[1]))
    assert check(monkeypatch, "memory", found=full).detail.startswith("low")
    assert check(monkeypatch, "disk here", found=full).detail.startswith("low")
    assert check(monkeypatch, "disk for models", found=full).status == "ok"


def test_missing_package_is_broken_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == "diffusers" else "1.0")
    monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: None)
    found = check(monkeypatch, "diffusers")
    assert (found.status, found.fix) == ("broken", f"{sys.executable} -m pip install diffusers")


def test_both_onnx_runtimes_at_once_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "1.0")
    found = check(monkeypatch, "ONNX Runtime")
    assert found.status == "broken"
    assert "uninstall" in str(found.fix)


@pytest.mark.parametrize(
    ("providers", "fix"),
    [
        (("CPUExecutionProvider",), "pip uninstall -y onnxruntime && "),
        (("CUDAExecutionProvider", "CPUExecutionProvider"), "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    ],
)
def test_onnx_runtime_that_does_not_start_on_the_gpu_is_said_with_the_command(
    monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], fix: str
) -> None:
    monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: ("1.31.1", providers))
    monkeypatch.setattr(doctor, "provider_problem", lambda name: "libcudnn.so.9 cannot be loaded")
    found = check(monkeypatch, "ONNX Runtime", found=replace(MACHINE, gpus=(H200,)))
    assert found.status == "missing" and "libcudnn.so.9 cannot be loaded" in found.detail
    assert fix in str(found.fix)
    monkeypatch.setattr(doctor, "provider_problem", lambda name: None)
    assert check(monkeypatch, "ONNX Runtime", found=replace(MACHINE, gpus=(H200,))).status == "ok"


def test_the_cuda_libraries_that_lie_here_are_named_with_their_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = (
        "site/nvidia/cudnn/lib/libcudnn.so.9",
        "site/nvidia/cudnn/lib/libcudnn_ops.so.9",  # a part of it
        "site/tensorrt_libs/libnvinfer.so.10",
        "system/libcudart.so.12",
        "system/libcudnn.so.9",  # behind the package's
    )
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "none")])
    monkeypatch.setattr(machine, "_SYSTEM_LIBRARIES", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "system"))
    expected = {"cudart 12": files[3], "cudnn 9": files[0], "nvinfer 10": files[2]}
    assert machine.gpu_libraries() == tuple((name, tmp_path / file) for name, file in expected.items())


def test_tensorrt_is_named_as_the_driver_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_device, "driver_library", object)
    monkeypatch.setattr(trt_device, "driver_cuda", lambda: 12)
    monkeypatch.setattr(trt_device, "_is_installed", lambda distribution: distribution == "polygraphy")
    found = check(monkeypatch, "TensorRT", found=replace(MACHINE, gpus=(H200,)))
    assert found.status == "missing"
    assert found.fix == f"{sys.executable} -m pip install 'tensorrt-cu12>=10.8,<12'"


def test_doctor_on_this_machine_reports_the_versions_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    status = main(["doctor", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert status == (0 if found["ok"] else 1)
    assert found["ok"] == all(check["status"] != "broken" for check in found["checks"])
    assert checks["torch"]["detail"] == torch.__version__
    assert (checks["CUDA"]["status"] == "ok") == torch.cuda.is_available()
    assert found["machine"]["memory_bytes"] > 0
    assert all(check["fix"] for check in found["checks"] if check["status"] == "broken")
    main(["doctor"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in checks)


def test_what_openvino_would_bring_depends_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    old = check(monkeypatch, "OpenVINO")
    assert old.status == "missing" and "(AVX2)" in old.detail and "8-bit exports faster" in old.detail
    assert old.fix is not None and "tiue[openvino]" in old.fix
    modern = check(monkeypatch, "OpenVINO", found=replace(MACHINE, cpu_arithmetic=("AVX-512", "VNNI", "AMX")))
    assert "in bf16 in about half its time" in modern.detail


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fpu sse avx2", ("AVX2",)),
        ("avx2 avx512f avx512_vnni avx512_bf16", ("AVX2", "AVX-512", "VNNI", "AVX-512 BF16")),
        ("avx2 avx_vnni amx_tile amx_bf16", ("AVX2", "VNNI", "AMX")),
    ],
)
def test_the_cpus_arithmetic_is_read_from_its_flags(
    flags: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_arithmetic() == names
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert machine.cpu_arithmetic() == ()
