"""``tiue doctor``: judge the machine, and say the command that mends what does not work."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tiue_cli import __version__
from tiue_cli.backends.onnx_session import provider_problem
from tiue_cli.backends.openvino_device import native_precisions, open_core
from tiue_cli.backends.trt_device import require_tensorrt
from tiue_cli.base.machine import (
    TORCH,
    MachineInfo,
    TorchInfo,
    gpu_libraries,
    machine_info,
    onnxruntime_providers,
    package_version,
    torch_info,
)
from tiue_cli.base.text import bytes_text
from tiue_cli.errors import DeviceError, MissingDependencyError, TiueError
from tiue_cli.model.folder import check_model_folder
from tiue_cli.model.hub import EMBEDDED, resolve_model

Status = Literal["ok", "missing", "broken"]

LOW_MEMORY_BYTES = 2 * 1024**3
LOW_DISK_BYTES = 1024**3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``missing`` is optional and absent; ``broken`` must be mended, by ``fix``."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the facts they rest on."""

    checks: tuple[Check, ...]
    machine: MachineInfo

    @property
    def ok(self) -> bool:
        """Whether images can be made."""
        return all(check.status != "broken" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--format json``; sizes in bytes."""
        return {"ok": self.ok, "tiue": __version__, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at everything; imports torch, and ONNX Runtime and TensorRT where they are installed."""
    machine = machine_info()
    torch_found, torch_problem = _try_torch()
    libraries = _full_libraries(torch_found, torch_problem)
    checks = [
        Check("Python", "ok", f"{machine.python} ({machine.executable})"),
        Check("tiue", "ok", __version__),
        *libraries,
        _gpu_check(machine),
        _cuda_check(torch_found, machine),
        *_library_check(machine),
        _adam8bit_check(),
        _onnxruntime_check(machine),
        _openvino_check(machine),
        _tensorrt_check(machine),
        _memory_check(machine),
        *_disk_checks(machine),
        _model_check(),
    ]
    return Diagnosis(tuple(checks), machine)


def _try_torch() -> tuple[TorchInfo | None, str]:
    try:
        return torch_info(), ""
    except (ImportError, OSError) as error:
        # OSError: a shared library of torch does not load.
        return None, " ".join(str(error).split())


def _full_libraries(found: TorchInfo | None, problem: str) -> list[Check]:
    """What drawing from model folders needs; a runtime installation is whole without."""
    names = ("diffusers", "transformers")
    runs_exports = any(package_version(name) is not None for name in ("onnxruntime", "onnxruntime-gpu"))
    if runs_exports and all(package_version(name) is None for name in ("torch", *names)):
        return [
            Check(
                "torch",
                "missing",
                "not installed: this is a runtime installation, which draws from exports alone",
                _pip("tiue"),
            )
        ]
    return [_torch_check(found, problem), *(_package_check(name) for name in names)]


def _torch_check(found: TorchInfo | None, problem: str) -> Check:
    if found is None:
        return Check("torch", "broken", f"cannot be imported: {problem}", _pip(f"--force-reinstall '{TORCH}'"))
    return Check("torch", "ok", found.version)


def _package_check(name: str) -> Check:
    version = package_version(name)
    if version is None:
        return Check(name, "broken", "not installed", _pip(name))
    return Check(name, "ok", version)


def _gpu_check(machine: MachineInfo) -> Check:
    if not machine.gpus:
        return Check("GPU", "missing", "no NVIDIA GPU found (nvidia-smi lists none); images are made on the CPU")
    gpu = machine.gpus[0]
    more = f", and {len(machine.gpus) - 1} more" if len(machine.gpus) > 1 else ""
    parts = [f"{gpu.name}{more}", f"driver {gpu.driver}"]
    if gpu.memory_bytes is not None and gpu.memory_free_bytes is not None:
        parts.append(f"{bytes_text(gpu.memory_free_bytes)} free of {bytes_text(gpu.memory_bytes)}")
    return Check("GPU", "ok", ", ".join(parts))


def _cuda_check(found: TorchInfo | None, machine: MachineInfo) -> Check:
    if found is None:
        return Check("CUDA", "missing", "not asked: torch does not work")
    if found.cuda_usable:
        return Check("CUDA", "ok", f"{found.cuda}, usable on {found.device_name}")
    if not machine.gpus:
        return Check("CUDA", "missing", f"torch: {found.problem}; nothing to mend without a GPU")
    if found.cuda is None:
        # pip keeps an installed build of the same version unless it is told to replace it.
        return Check(
            "CUDA",
            "broken",
            f"there is a GPU, and torch {found.version} is {found.problem}",
            _pip(f"--force-reinstall '{TORCH}'"),
        )
    return Check(
        "CUDA",
        "broken",
        f"torch is built for CUDA {found.cuda} and cannot use it: {found.problem}",
        f"update the driver (now {machine.gpus[0].driver}): https://www.nvidia.com/drivers",
    )


def _library_check(machine: MachineInfo) -> list[Check]:
    """Which libraries of NVIDIA's lie where; nothing is said without a GPU."""
    if not machine.gpus:
        return []
    found = gpu_libraries()
    if not found:
        return [Check("CUDA libraries", "missing", "none beside torch's own: ONNX Runtime and TensorRT need them")]
    return [Check("CUDA libraries", "ok", ", ".join(f"{name} ({path.parent})" for name, path in found))]


def _adam8bit_check() -> Check:
    """8-bit Adam, without which the recipe sd15-24gb does not start."""
    version = package_version("bitsandbytes")
    if version is not None:
        return Check("bitsandbytes", "ok", version)
    needs = "not installed; only the recipe sd15-24gb (optimizer.name=adamw8bit) needs it"
    return Check("bitsandbytes", "missing", needs, _pip('"tiue[adam8bit]"'))


def _onnxruntime_check(machine: MachineInfo) -> Check:
    name = "onnxruntime-gpu" if platform.system() == "Linux" and platform.machine() == "x86_64" else "onnxruntime"
    if package_version("onnxruntime") is not None and package_version("onnxruntime-gpu") is not None:
        return Check(
            "ONNX Runtime",
            "broken",
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other",
            f"{sys.executable} -m pip uninstall -y onnxruntime onnxruntime-gpu && {_pip('onnxruntime-gpu')}",
        )
    found = onnxruntime_providers()
    if found is None:
        return Check("ONNX Runtime", "missing", "not installed; only exported models need it", _pip(name))
    version, providers = found
    short = ", ".join(provider.removesuffix("ExecutionProvider") for provider in providers)
    if not machine.gpus:
        return Check("ONNX Runtime", "ok", f"{version} (providers: {short})")
    problem = provider_problem("cuda")
    if problem is None:
        return Check("ONNX Runtime", "ok", f"{version}, usable on the GPU (providers: {short})")
    fix = f"{sys.executable} -m pip uninstall -y onnxruntime && {_pip(name)}"
    if "CUDAExecutionProvider" in providers:  # then CUDA or cuDNN is what it lacks
        fix = _pip("'onnxruntime-gpu[cuda,cudnn]'")
    return Check("ONNX Runtime", "missing", f"{version} runs on the CPU only: {problem}", fix)


def _openvino_check(machine: MachineInfo) -> Check:
    """What OpenVINO computes natively here; where it is not installed, what it would bring."""
    arithmetic = ", ".join(machine.cpu_arithmetic) or "unknown"
    version = package_version("openvino")
    if version is None:
        bf16 = "AVX-512 BF16" in machine.cpu_arithmetic or "AMX" in machine.cpu_arithmetic
        gain = "exports faster than ONNX Runtime, in bf16 in about half its time" if bf16 else "8-bit exports faster"
        return Check(
            "OpenVINO",
            "missing",
            f"not installed; on this CPU ({arithmetic}) it draws {gain}",
            _pip("'tiue[openvino]'"),
        )
    try:
        core = open_core(cache=None)
        devices = list(core.available_devices)
        native = native_precisions(core, "CPU")
    except (TiueError, RuntimeError) as error:
        text = " ".join(str(error).split())[-200:]
        return Check("OpenVINO", "broken", f"{version} does not start: {text}", _pip("--force-reinstall openvino"))
    slow = "" if "bf16" in native else "; no bf16 here"
    detail = f"{version} on {', '.join(devices)}; the CPU ({arithmetic}) computes {', '.join(native)}{slow}"
    return Check("OpenVINO", "ok", detail)


def _tensorrt_check(machine: MachineInfo) -> Check:
    if not machine.gpus:
        return Check("TensorRT", "missing", "it needs an NVIDIA GPU")
    try:
        return Check("TensorRT", "ok", require_tensorrt())
    except DeviceError as error:
        return Check("TensorRT", "missing", error.message)
    except MissingDependencyError as error:
        _, _, command = (error.hint or "").partition(": ")
        return Check("TensorRT", "missing", f"{error.message}; only engines need it", command)


def _memory_check(machine: MachineInfo) -> Check:
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''} ({machine.cpu})"
    if machine.memory_free_bytes is None or machine.memory_bytes is None:
        return Check("memory", "ok", f"unknown; {cores}")
    detail = f"{bytes_text(machine.memory_free_bytes)} free of {bytes_text(machine.memory_bytes)}; {cores}"
    if machine.memory_free_bytes < LOW_MEMORY_BYTES:
        return Check("memory", "missing", f"low: {detail}", "close other programs; use --batch 1 and --precision fp16")
    return Check("memory", "ok", detail)


def _disk_checks(machine: MachineInfo) -> Sequence[Check]:
    checks = []
    for name, disk in zip(("disk here", "disk for models"), machine.disks, strict=False):
        detail = f"{bytes_text(disk.free_bytes)} free of {bytes_text(disk.total_bytes)} ({disk.path})"
        if disk.free_bytes >= LOW_DISK_BYTES:
            checks.append(Check(name, "ok", detail))
        else:
            where = "write elsewhere: --out FOLDER" if name == "disk here" else "choose another disk: export HF_HOME=…"
            checks.append(Check(name, "missing", f"low: {detail}", f"free some space, or {where}"))
    return checks


def _model_check() -> Check:
    name = f"model {EMBEDDED}"
    try:
        info = check_model_folder(resolve_model(EMBEDDED))
    except TiueError as error:
        return Check(name, "broken", error.message, error.hint)
    return Check(name, "ok", f"{info.kind}, {info.image_size[0]}x{info.image_size[1]} pixels, {info.path}")


def _pip(arguments: str) -> str:
    return f"{sys.executable} -m pip install {arguments}"
