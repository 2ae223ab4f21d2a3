"""The CUDA driver and runtime without torch: devices, memory, copies, streams and graphs, by ctypes and Polygraphy.

Python 3.9 reads this file too; see ``trt_runner``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiue_cli.backends.trt_messages import collect_messages, shortened
from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_CAPTURE_THIS_THREAD = 1  # cudaStreamCaptureModeThreadLocal


# --- the driver ----------------------------------------------------------------------------------------------------


def driver_library() -> Any:
    """The NVIDIA driver's own library, initialised; None where there is no driver or it does not start."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def driver_cuda() -> int | None:
    """The newest CUDA that the driver can run, such as 13; None without a driver."""
    library, version = driver_library(), ctypes.c_int(0)
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000


def device_count() -> int:
    """NVIDIA GPUs that the driver offers; 0 without a driver. Asks the driver itself, in a millisecond."""
    library, count = driver_library(), ctypes.c_int(0)
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


# --- the runtime library -------------------------------------------------------------------------------------------


def cuda_wrapper() -> Any:
    """Polygraphy's CUDA wrapper, over the CUDA runtime library that fits the driver. Raises MissingDependencyError."""
    collect_messages()
    from polygraphy import cuda
    from polygraphy.exception import PolygraphyException

    with _library_path(cudart_folders(driver_cuda())):
        try:
            return cuda.wrapper()
        except (OSError, PolygraphyException) as error:
            raise MissingDependencyError(
                f"the CUDA runtime library (libcudart) cannot be loaded: {' '.join(str(error).split())}",
                hint="install it: python -m pip install nvidia-cuda-runtime, or add its folder to LD_LIBRARY_PATH",
            ) from error


def cudart_folders(newest: int | None = None) -> list[str]:
    """Folders of Python packages that hold a libcudart, newest first; none that is newer than ``newest``."""
    found: list[tuple[int, str]] = []
    for entry in sys.path:
        # nvidia/cuda_runtime/lib holds CUDA 12's, nvidia/cu13/lib is where later ones lie.
        for file in Path(entry or ".").glob("nvidia/*/lib/libcudart.so.*"):
            match = re.match(r"libcudart\.so\.(\d+)", file.name)
            if match and (newest is None or int(match.group(1)) <= newest):
                found.append((-int(match.group(1)), str(file.parent)))
    return list(dict.fromkeys(folder for _, folder in sorted(found)))


@contextlib.contextmanager
def _library_path(folders: Sequence[str]) -> Iterator[None]:
    """Polygraphy looks into LD_LIBRARY_PATH first, and does not know where newer packages keep the library."""
    before = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*folders, *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = before


def runtime_version() -> str:
    """Of the CUDA runtime library that is used, such as ``12.8``. Raises DeviceError."""
    version = ctypes.c_int(0)
    with device_errors("asking for the version of CUDA"):
        cuda = cuda_wrapper()
        cuda.check(cuda.handle.cudaRuntimeGetVersion(ctypes.byref(version)))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def memory_bytes() -> tuple[int, int]:
    """(free, total) bytes of the current GPU. Raises DeviceError."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with device_errors("asking for the GPU's memory"):
        cuda = cuda_wrapper()
        cuda.check(cuda.handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return int(free.value), int(total.value)


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Turn what Polygraphy's CUDA wrapper raises into a DeviceError."""
    from polygraphy.exception import PolygraphyException

    try:
        yield
    except PolygraphyException as error:
        text = " ".join(str(error).split())
        match = re.search(r"CUDA Error: (\d+)", text)
        if match and int(match.group(1)) == _OUT_OF_MEMORY:
            raise OutOfMemoryError(
                f"the memory of the GPU is full ({what})", hint="close other programs, or use a smaller --batch"
            ) from error
        raise DeviceError(f"{what} failed: {shortened(text)}", hint="see what is missing: tiue doctor") from error


# --- memory and copies ---------------------------------------------------------------------------------------------


def allocate(nbytes: int) -> Any:
    """A block of the GPU's memory (Polygraphy's DeviceArray: ``ptr``, ``allocated_nbytes``, ``free()``)."""
    from polygraphy import cuda

    return cuda.DeviceArray.raw((nbytes,))


def free_block(block: Any) -> None:
    """Give a block back; a GPU that failed refuses this as well, and the failure itself is what must be seen."""
    from polygraphy.exception import PolygraphyException

    with contextlib.suppress(PolygraphyException):
        block.free()


def copy_to_device(block: Any, array: np.ndarray, stream: Any) -> None:
    """Put a copy on the stream; ``array`` must stay as it is until the stream has been waited for."""
    from polygraphy import cuda

    _copy(block.ptr, array.ctypes.data, array.nbytes, cuda.MemcpyKind.HostToDevice, stream)


def copy_to_host(array: np.ndarray, block: Any, stream: Any) -> None:
    """Put a copy on the stream; ``array`` is filled once the stream has been waited for."""
    from polygraphy import cuda

    _copy(array.ctypes.data, block.ptr, array.nbytes, cuda.MemcpyKind.DeviceToHost, stream)


def _copy(target: int, source: int, nbytes: int, kind: Any, stream: Any) -> None:
    cuda_wrapper().memcpy(dst=target, src=source, nbytes=nbytes, kind=kind, stream_ptr=stream.ptr)


class PinnedArrays:
    """Arrays in host memory that a GPU copies at full speed; the memory of a name is the same from call to call."""

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[ctypes.c_void_p, int]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """The array of ``name``; one of another shape and the same name lies in the same memory."""
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = max(1, count * int(np.dtype(dtype).itemsize))
        pointer, have = self._blocks.get(name, (None, 0))
        if pointer is None or have < nbytes:
            if pointer is not None:
                _free_host(self._blocks.pop(name)[0])
            pointer = ctypes.c_void_p()
            cuda = cuda_wrapper()
            cuda.check(cuda.handle.cudaMallocHost(ctypes.byref(pointer), ctypes.c_size_t(nbytes)))
            self._blocks[name] = (pointer, nbytes)
        block: Any = (ctypes.c_char * nbytes).from_address(pointer.value or 0)
        flat: np.ndarray = np.frombuffer(block, dtype=dtype, count=count)
        return flat.reshape(tuple(shape))

    def free(self) -> None:
        """Give everything back."""
        for pointer, _ in self._blocks.values():
            _free_host(pointer)
        self._blocks = {}


def _free_host(pointer: ctypes.c_void_p) -> None:
    cuda_wrapper().handle.cudaFreeHost(pointer)


# --- streams and graphs --------------------------------------------------------------------------------------------


def open_stream() -> Any:
    """A CUDA stream of our own (Polygraphy's); used with ``with``. Raises DeviceError."""
    with device_errors("opening a CUDA stream"):
        cuda_wrapper()
        from polygraphy import cuda

        return cuda.Stream()


class Graph:
    """Work that was captured from a stream, to be launched as one; it holds addresses and shapes as they were then."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    @classmethod
    def capture(cls, stream: int, enqueue: Callable[[], None]) -> Graph:
        """Capture what ``enqueue`` puts on the stream, without running it. Raises DeviceError."""
        lib = cuda_wrapper().handle
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check(lib, lib.cudaStreamBeginCapture(ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_THIS_THREAD)), "begin")
        problem: DeviceError | None = None
        try:
            enqueue()
        except DeviceError as error:
            problem = error
        # Whatever happened, the stream must leave the capture, or it is lost.
        status = lib.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        if problem is not None:
            lib.cudaGetLastError()
            raise problem
        _check(lib, status, "end")
        # The plain name has another signature before CUDA 12.
        instantiate = getattr(lib, "cudaGraphInstantiateWithFlags", None) or lib.cudaGraphInstantiate
        status = instantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        lib.cudaGraphDestroy(graph)
        _check(lib, status, "instantiate")
        return cls(executable)

    def launch(self, stream: int) -> None:
        """Put the captured work on the stream."""
        cuda = cuda_wrapper()
        cuda.check(cuda.handle.cudaGraphLaunch(self._executable, ctypes.c_void_p(stream)))

    def free(self) -> None:
        """Give the graph back."""
        cuda_wrapper().handle.cudaGraphExecDestroy(self._executable)


def _check(lib: Any, status: int, what: str) -> None:
    if status != 0:
        lib.cudaGetLastError()  # clears it, or the next call would report it
        raise DeviceError(f"no CUDA graph: CUDA error {status} at {what}", hint="see what is missing: tiue doctor")
