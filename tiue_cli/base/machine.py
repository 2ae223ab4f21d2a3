"""What this machine is: system, memory, GPU, driver, library versions. Facts only; ``doctor`` judges them.

Versions come from the installed packages' metadata, the GPU from ``nvidia-smi``: nothing heavy is imported except by
the functions that say so.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow")
"""Whose versions a report shows: those that can change a picture."""

TORCH: Final = "torch>=2.9,<2.14"
TENSORRT: Final = ((10, 8), (12, 0))
"""The oldest version, and the first that is too new; its distribution depends on the machine's CUDA."""
POLYGRAPHY: Final = "polygraphy>=0.53,<1"
"""What pip is asked for where something must be installed: the ranges of pyproject.toml, which a test compares."""

_GPU_LIBRARY = re.compile(r"lib(?P<name>cudart|cublas|cudnn|nvinfer)\.so\.(?P<major>\d+)")
_SYSTEM_LIBRARIES = (Path("/usr/local/cuda/lib64"), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))
_ARITHMETIC: Final = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AVX-512 BF16": {"avx512_bf16"},
    "AMX": {"amx_tile"},
}
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_SMI_FIELDS = "name,driver_version,memory.total,memory.free,compute_cap"
_SMI_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class GpuInfo:
    """One GPU as ``nvidia-smi`` sees it; None where the driver does not say."""

    name: str
    driver: str
    memory_bytes: int | None
    memory_free_bytes: int | None
    compute_capability: str | None


@dataclass(frozen=True)
class TorchInfo:
    """What the installed torch can do: the ``cuda`` it is built for, and the ``problem`` where that is not usable."""

    version: str
    cuda: str | None
    cuda_usable: bool
    device_name: str | None
    problem: str | None


@dataclass(frozen=True)
class DiskInfo:
    """Free and total bytes of the file system that ``path`` lies on."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class MachineInfo:
    """The machine without its libraries' opinions; sizes in bytes, None where the system does not say."""

    system: str
    python: str
    executable: str
    cpu: str
    cores: int
    cpu_arithmetic: tuple[str, ...]
    """Which of AVX2, AVX-512, VNNI, AVX-512 BF16 and AMX its instructions are; empty where the system does not say."""
    memory_bytes: int | None
    memory_free_bytes: int | None
    gpus: tuple[GpuInfo, ...]
    packages: dict[str, str | None]
    disks: tuple[DiskInfo, ...]


def machine_info() -> MachineInfo:
    """Collect everything that needs no heavy import; takes as long as ``nvidia-smi`` does."""
    total, free = memory_bytes()
    return MachineInfo(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        executable=sys.executable,
        cpu=_cpu_name(),
        cores=usable_cores(),
        cpu_arithmetic=cpu_arithmetic(),
        memory_bytes=total,
        memory_free_bytes=free,
        gpus=gpus(),
        packages={name: package_version(name) for name in PACKAGES},
        disks=tuple(disk_info(folder) for folder in dict.fromkeys((Path.cwd(), _hub_cache()))),
    )


def usable_cores() -> int:
    """Cores this process may use, which is fewer than the machine's in many containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_version(name: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus(run: Callable[[list[str]], str] | None = None) -> tuple[GpuInfo, ...]:
    """The NVIDIA GPUs; empty where there is no ``nvidia-smi`` or it fails. ``run`` replaces the call in tests."""
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        output = (run or _output_of)(command)
    except (OSError, subprocess.SubprocessError):
        return ()
    found = []
    for line in output.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(_SMI_FIELDS.split(",")):
            name, driver, total, free, capability = parts
            found.append(GpuInfo(name, driver, _mebibytes(total), _mebibytes(free), _known(capability)))
    return tuple(found)


def gpu_libraries() -> tuple[tuple[str, Path], ...]:
    """The CUDA, cuDNN and TensorRT libraries that lie here, as (name and major version, file); nothing is loaded.

    Those of Python packages come first, then ``LD_LIBRARY_PATH`` and the systems' usual folders.
    """
    packages = [folder for entry in sys.path for folder in _library_folders(Path(entry or "."))]
    listed = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    found: dict[str, Path] = {}
    for folder in (*packages, *listed, *_SYSTEM_LIBRARIES):
        for file in _files(folder):
            match = _GPU_LIBRARY.fullmatch(file.name)
            if match is not None:
                found.setdefault(f"{match['name']} {match['major']}", file)
    return tuple(sorted(found.items()))


def _library_folders(entry: Path) -> list[Path]:
    """Where NVIDIA's wheels keep their libraries, below one entry of ``sys.path``."""
    try:
        return [*sorted(entry.glob("nvidia/*/lib")), *sorted(entry.glob("tensorrt*_libs"))]
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def torch_info() -> TorchInfo:
    """Ask torch itself, with one small computation on the GPU if it sees one. Imports torch; raises ImportError."""
    import torch

    version, built_for = str(torch.__version__), torch.version.cuda
    if built_for is None:
        return TorchInfo(version, None, cuda_usable=False, device_name=None, problem="a build without CUDA")
    if not torch.cuda.is_available():
        return TorchInfo(version, built_for, cuda_usable=False, device_name=None, problem=_why_no_cuda())
    name = torch.cuda.get_device_name(0)
    try:
        # A device can be listed and still lack kernels in this build.
        (torch.ones(8, device="cuda") * 2).sum().item()
    except RuntimeError as error:
        return TorchInfo(version, built_for, cuda_usable=False, device_name=name, problem=_first_line(error))
    return TorchInfo(version, built_for, cuda_usable=True, device_name=name, problem=None)


def onnxruntime_providers() -> tuple[str, tuple[str, ...]] | None:
    """(version, execution providers) of ONNX Runtime, None where it is not installed. Imports onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__), tuple(onnxruntime.get_available_providers())


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, free) main memory in bytes, within the container's limit where there is one."""
    total = free = None
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        total = int(fields["MemTotal"].split()[0]) * 1024
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return _smaller(total, limit), _smaller(free, max(0, limit - used))


def disk_info(folder: Path) -> DiskInfo:
    """Space where ``folder`` is, or will be once it is created."""
    existing = next((place for place in (folder, *folder.parents) if place.exists()), Path.cwd())
    usage = shutil.disk_usage(existing)
    return DiskInfo(str(folder), usage.total, usage.free)


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S).stdout


def _why_no_cuda() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "no device is visible (CUDA_VISIBLE_DEVICES?)"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _cpu_name() -> str:
    try:
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_arithmetic() -> tuple[str, ...]:
    """The CPU's wide and short arithmetic by the names that people use, read from /proc/cpuinfo."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ()
    flags = set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
    return tuple(name for name, wanted in _ARITHMETIC.items() if flags & wanted)


def _hub_cache() -> Path:
    """Where downloaded models go; the rule is huggingface_hub's."""
    if (cache := os.environ.get("HF_HUB_CACHE")) is not None:
        return Path(cache)
    home = os.environ.get("HF_HOME", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    try:
        return Path(home).expanduser() / "hub"
    except RuntimeError:  # a user that there is not
        return Path(home) / "hub"


def _mebibytes(text: str) -> int | None:
    try:
        return int(text) * 1024**2
    except ValueError:
        return None


def _known(text: str) -> str | None:
    return None if text.startswith("[") or not text else text


def _smaller(known: int | None, limit: int) -> int:
    return limit if known is None else min(known, limit)
