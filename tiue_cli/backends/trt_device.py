"""Is TensorRT usable here, on which GPU, and do an engine and this machine belong together?

A plan is machine code for one kind of GPU and one version of TensorRT: elsewhere it crashes or, worse, runs.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import Any, Final

from tiue_cli.backends.cuda import driver_cuda, driver_library, runtime_version
from tiue_cli.backends.trt_messages import import_tensorrt
from tiue_cli.base.machine import POLYGRAPHY, TENSORRT
from tiue_cli.errors import DeviceError, ManifestError, MissingDependencyError
from tiue_cli.files.access import is_file
from tiue_cli.files.engines import ENGINE_MANIFEST, EngineDevice, EngineManifest, engine_manifests, read_engine_manifest

OLDEST, NEWER_THAN_ALL = TENSORRT
_NO_GPU: Final = "it runs on Linux and Windows with an NVIDIA driver; elsewhere use --backend onnx"


def require_tensorrt() -> str:
    """TensorRT's version, where everything it needs is there: GPU, driver, packages of the right versions.

    Raises MissingDependencyError naming exactly what to install, DeviceError without a GPU.
    """
    missing = missing_packages()
    install = f"install {'it' if len(missing) == 1 else 'them'}: {install_command(missing)}"
    if driver_library() is None:
        also = f"; {' and '.join(_names(missing))} {_are(missing)} not installed either" if missing else ""
        raise DeviceError(
            f"TensorRT needs an NVIDIA GPU, and the driver offers none{also}",
            hint=f"on a machine that has one, {install}" if missing else _NO_GPU,
        )
    if missing:
        raise MissingDependencyError(f"{' and '.join(_names(missing))} {_are(missing)} not installed", hint=install)
    version = str(import_tensorrt().__version__)
    if not OLDEST <= _numbers(version) < NEWER_THAN_ALL:
        raise MissingDependencyError(
            f"TensorRT {version} is installed, but {OLDEST[0]}.{OLDEST[1]} to {NEWER_THAN_ALL[0] - 1} is needed",
            hint=f"install another: {install_command([tensorrt_requirement()])}",
        )
    return version


def missing_packages() -> list[str]:
    """Requirements of what is not installed, in pip's words."""
    wanted = {"tensorrt": tensorrt_requirement(), "polygraphy": POLYGRAPHY}
    found = {name: _is_installed(name) for name in wanted}
    # TensorRT for an older CUDA is a distribution of another name, with the same module.
    found["tensorrt"] = found["tensorrt"] or any(_is_installed(f"tensorrt-cu{number}") for number in (12, 13))
    return [wanted[name] for name in wanted if not found[name]]


def tensorrt_requirement(newest_cuda: int | None = None) -> str:
    """What pip must be asked for, given the newest CUDA that the driver runs (None: ask it)."""
    newest = driver_cuda() if newest_cuda is None else newest_cuda
    distribution = "tensorrt-cu12" if newest == 12 else "tensorrt"
    return f"{distribution}>={OLDEST[0]}.{OLDEST[1]},<{NEWER_THAN_ALL[0]}"


def install_command(requirements: list[str]) -> str:
    """The pip command line for ``requirements``, in this interpreter."""
    return " ".join([sys.executable, "-m pip install", *(f"'{requirement}'" for requirement in requirements)])


def current_device() -> EngineDevice:
    """The GPU that TensorRT would use, and the versions that a plan depends on. Raises DeviceError and as above."""
    version = require_tensorrt()
    driver = driver_library()
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    # The first device of the process: the driver's own count heeds CUDA_VISIBLE_DEVICES, nvidia-smi does not.
    status = driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDeviceGetName(name, 256, device)
    status = status or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    status = status or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    if status != 0:
        raise DeviceError(
            f"the NVIDIA driver offers no GPU (error {status})", hint="see what it lists: nvidia-smi; tiue doctor"
        )
    return EngineDevice(
        gpu=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        tensorrt=version,
        cuda=runtime_version(),
        driver=_driver_version(driver),
        platform=f"{platform.system()}-{platform.machine()}",
    )


_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_CAPABILITY_MINOR = 76
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def _driver_version(driver: Any) -> str:
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        match = None
    if match:
        return match[1]
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


# --- engines and machines ------------------------------------------------------------------------------------------


def engine_name(device: EngineDevice, precision: str) -> str:
    """The folder's name inside the export: ``nvidia-h200-trt10.8.0.43-fp16``."""
    gpu = re.sub(r"[^a-z0-9]+", "-", device.gpu.lower()).strip("-")
    return f"{gpu}-trt{device.tensorrt}-{precision}"


def find_engine(export: Path, device: EngineDevice, precision: str) -> tuple[Path, EngineManifest]:
    """The engine of ``export`` for this machine; DeviceError where there is none, naming both sides."""
    folder = export / engine_name(device, precision)
    if is_file(folder / ENGINE_MANIFEST, error=ManifestError):
        manifest = read_engine_manifest(folder)
        check_device(folder, manifest, device, rebuild=rebuild_command(export))
        return folder, manifest
    others = [path.parent for path in engine_manifests(export)]
    if not others:
        raise DeviceError(f"{export} has no TensorRT engine", hint=f"build one: {rebuild_command(export)}")
    # The name is a convenience: a folder that was renamed is still what its manifest says.
    for other in others:
        manifest = read_engine_manifest(other)
        if manifest.precision == precision and device_difference(manifest.device, device) is None:
            return other, manifest
    check_device(others[0], read_engine_manifest(others[0]), device, rebuild=rebuild_command(export))
    raise ManifestError(f"{others[0]} is not in {precision}", hint=f"build one: {rebuild_command(export)}")


def check_device(folder: Path, manifest: EngineManifest, device: EngineDevice, *, rebuild: str) -> None:
    """Refuse an engine that was built elsewhere. Raises DeviceError naming both sides and the command to rebuild."""
    difference = device_difference(manifest.device, device)
    if difference is not None:
        raise DeviceError(f"{folder} was built for {difference}", hint=f"build it for this machine: {rebuild}")


def device_difference(built: EngineDevice, here: EngineDevice) -> str | None:
    """In what a plan's machine and this one differ, in words; None where the plan may be opened."""
    names = {
        "platform": "the platform",
        "gpu": "the GPU",
        "compute_capability": "compute capability",
        "tensorrt": "TensorRT",
    }
    for field, what in names.items():
        before, now = getattr(built, field), getattr(here, field)
        if before != now:
            return f"{what} {before}, and this machine has {now}"
    return None


def rebuild_command(export: Path | str) -> str:
    """How to build the engine of an export folder again."""
    return f"tiue export {export} --trt"


# --- small things --------------------------------------------------------------------------------------------------


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _names(requirements: list[str]) -> list[str]:
    return [re.split(r"[<>=]", requirement)[0] for requirement in requirements]


def _are(things: list[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])
