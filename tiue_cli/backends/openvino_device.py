"""OpenVINO's devices and precisions, its silence turned into errors: what was asked for runs, or the reason is said.

OpenVINO itself computes in fp32, without a word, where bf16 is asked of a CPU that has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError, TiueError
from tiue_cli.files.caches import user_cache

if TYPE_CHECKING:
    import openvino

    from tiue_cli.files.exports import ExportManifest

DEVICES: Final = {"auto": "CPU", "cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
"""``--device`` and OpenVINO's name for it; Intel's GPUs and NPUs are used where they are asked for, never unasked."""
CACHE_BYTES: Final = 8 * 2**30
"""What the folder of compiled models may hold; the oldest go first. A UNet of 3 GB takes as much a shape."""

_HINTS: Final = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CAPABILITIES: Final = {"fp16": "FP16", "bf16": "BF16"}


@dataclass(frozen=True)
class Arithmetic:
    """What the floats of a graph are computed in, and a sentence about the choice where there is something to say."""

    floats: str
    """``fp32``, ``fp16`` or ``bf16``."""
    note: str | None = None

    @property
    def hint(self) -> str:
        """OpenVINO's name of it."""
        return _HINTS[self.floats]


def import_openvino() -> Any:
    """The module. Raises MissingDependencyError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO cannot be imported: {error}", hint="install it: python -m pip install 'tiue[openvino]'"
        ) from error
    return openvino


def open_core(*, cache: Path | None) -> openvino.Core:
    """OpenVINO with its cache of compiled models in the folder ``cache``; None keeps none."""
    core: openvino.Core = import_openvino().Core()
    if cache is not None:
        core.set_property({"CACHE_DIR": str(cache)})
    return core


def model_cache() -> Path | None:
    """Where compiled models are kept, no larger than CACHE_BYTES; None where no folder can be written."""
    try:
        folder = user_cache() / "openvino"
        folder.mkdir(parents=True, exist_ok=True)
        _keep_newest(folder, CACHE_BYTES)
    except (TiueError, OSError):
        return None
    return folder


def _keep_newest(folder: Path, limit_bytes: int) -> None:
    """Remove the oldest files of ``folder`` until the rest is within ``limit_bytes``. Raises OSError."""
    found = [(path.stat(), path) for path in folder.glob("*.blob")]
    total = sum(stat.st_size for stat, _ in found)
    for stat, path in sorted(found, key=lambda entry: entry[0].st_mtime):
        if total <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def find_device(core: openvino.Core, asked: str) -> str:
    """OpenVINO's name of the device ``asked`` (``auto``, ``cpu``, ``gpu``, ``npu``). Raises DeviceError."""
    wanted = DEVICES[asked]
    # Several GPUs are GPU.0, GPU.1, …; the plain name is the first of them.
    there = sorted({name.partition(".")[0] for name in core.available_devices})
    if wanted not in there:
        raise DeviceError(
            f"--device {asked} cannot be used: OpenVINO finds {', '.join(there) or 'no device'} here",
            hint="use --device cpu, or install Intel's driver of the device",
        )
    return wanted


def native_precisions(core: openvino.Core, device: str) -> tuple[str, ...]:
    """Of ``fp32``, ``fp16``, ``bf16`` and ``int8`` those that ``device`` computes in, by OpenVINO's own word."""
    found = set(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    return tuple(name for name in ("fp32", "fp16", "bf16", "int8") if name.upper() in found)


def choose_arithmetic(core: openvino.Core, device: str, manifest: ExportManifest, asked: str) -> Arithmetic:
    """What ``--precision`` means on ``device``; ``auto`` takes bf16 where it is native and this export's images held.

    An 8-bit export computes its floats, the layers that were left out, in fp32 unless bf16 is asked for. Raises
    DeviceError for a precision that the device would replace by another one.
    """
    native = native_precisions(core, device)
    wanted = "auto" if asked == manifest.precision == "int8" else asked
    if wanted in _CAPABILITIES and wanted not in native:
        where = "this CPU" if device == "CPU" else f"this {device}"
        what = {"bf16": "bf16 arithmetic (AVX-512 BF16, AMX)", "fp16": "fp16 arithmetic"}[wanted]
        raise DeviceError(
            f"--precision {asked} cannot be used: {where} has no {what}, and OpenVINO would compute in fp32",
            hint="leave --precision out; faster without it: tiue export STUDENT --precision int8",
        )
    if wanted != "auto":
        return Arithmetic(wanted)
    if device == "NPU":  # NPUs know no other
        return Arithmetic("fp16")
    if "bf16" not in native or device != "CPU":
        return Arithmetic("fp32")
    checked = None if manifest.parity is None else manifest.parity.openvino_bf16
    if checked is None:
        return Arithmetic(
            "fp32",
            "this CPU computes bf16 by itself: --precision bf16 takes about half the time; the export was not checked"
            " in it",
        )
    if not checked.holds:
        return Arithmetic("fp32")
    return Arithmetic(
        "bf16",
        f"computed in bf16, which this CPU has (images {checked.image_psnr_db:.0f} dB from fp32's); --precision fp32"
        " is exact",
    )


@contextlib.contextmanager
def openvino_errors(what: str) -> Iterator[None]:
    """Turn what OpenVINO raises while it handles ``what`` into a DeviceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # plain RuntimeError is what the library raises, whatever the cause
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(word in text.lower() for word in ("bad_alloc", "allocat")):
            raise OutOfMemoryError("the memory is full", hint="try --batch 1 or a smaller --size") from error
        raise DeviceError(
            f"OpenVINO failed at {what}: {text[-300:]}",
            hint="try --backend onnx; or export the student again with this version: tiue export STUDENT",
        ) from error
