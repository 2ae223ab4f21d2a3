"""How much memory a call adds: the peak during it, less what was there before.

On Linux the kernel keeps the highest resident set of a process and can be told to forget it, so nothing is sampled and
no peak is missed. Elsewhere there is no such figure, and none is given.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import torch

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")
_FORGET_PEAK: Final = "5"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class MemoryRise:
    """What one call added at its peak, in bytes; None where the system does not say."""

    peak_bytes: int | None
    kind: Literal["rss", "torch"] | None
    driver_bytes: int | None


def watch_memory(device: str, call: Callable[[], _Result]) -> tuple[_Result, MemoryRise]:
    """Run ``call`` and say what it added to the memory of ``device``, ``cpu`` or ``cuda``."""
    gc.collect()
    return _watch_cuda(call) if device == "cuda" else _watch_rss(call)


def _watch_rss(call: Callable[[], _Result]) -> tuple[_Result, MemoryRise]:
    try:
        _status_bytes("VmHWM")
        _give_back_freed()
        _CLEAR.write_text(_FORGET_PEAK)
        before = _status_bytes("VmRSS")
    except (OSError, KeyError, ValueError):
        return call(), MemoryRise(None, None, None)
    result = call()
    return result, MemoryRise(max(0, _status_bytes("VmHWM") - before), "rss", None)


def _watch_cuda(call: Callable[[], _Result]) -> tuple[_Result, MemoryRise]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    # Freed blocks stay reserved, so the driver's figure after the call still holds its peak.
    free_after, _ = torch.cuda.mem_get_info()
    rise = MemoryRise(torch.cuda.max_memory_allocated() - before, "torch", max(0, free_before - free_after))
    return result, rise


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _give_back_freed() -> None:
    """Return freed heap memory to the system: what an earlier subject left there would hide what this one needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
