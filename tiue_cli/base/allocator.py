"""How the C library hands out memory, where it can be told."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation instead of giving it back; False where there is no glibc.

    What runs on a CPU again and again frees and allocates the same tensors, and by default each large one may be mapped
    anew and its pages be faulted in one by one: measured on papercut, 1,600 faults an image, 14 % of the time of a
    training step alone on its core, and far more where two processes do it at once. Whether it happens depends on what
    the process did before: an image decoder took 26 ms in one run and 45 ms in the next.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
