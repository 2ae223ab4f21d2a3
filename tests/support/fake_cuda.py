"""A CUDA runtime without a GPU: device memory is host memory, and streams do their work only when they are waited for.

It stands below Polygraphy's own CUDA wrapper, which runs unchanged. It is strict where the real one is: memory that was
not allocated faults, a copy inside a capture breaks it, and what a stream holds happens at synchronisation, not before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2
ILLEGAL_ADDRESS, CAPTURE_INVALIDATED = 700, 901

Operation = Callable[[], None]


class IllegalAddress(Exception):
    """A read or write outside every allocation."""


class FakeStream:
    """Work that waits; ``graph`` collects it instead while the stream is captured."""

    def __init__(self) -> None:
        self.pending: list[Operation] = []
        self.graph: list[Operation] | None = None
        self.capture_is_valid = True

    def add(self, operation: Operation) -> None:
        (self.pending if self.graph is None else self.graph).append(operation)


class FakeCudart:
    """The functions of libcudart that Polygraphy and the runner call, with their C signatures."""

    def __init__(self, *, memory_bytes: int = 8 * 1024**3, runtime_version: int = 12080) -> None:
        self.memory_bytes = memory_bytes
        self.runtime_version = runtime_version
        self.streams: dict[int, FakeStream] = {}
        self.allocations: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pageable_copies = 0
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self.mallocs = 0
        self.launches = 0
        self.fail_capture = False
        self._next = 1

    # --- memory ---

    def cudaMalloc(self, pointer: Any, nbytes: ctypes.c_size_t) -> int:
        if nbytes.value > self.memory_bytes - self.used_bytes:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(max(1, nbytes.value))
        ctypes.memset(block, 0xAB, nbytes.value)  # nobody may count on zeros
        address = ctypes.addressof(block)
        self.allocations[address] = block
        self.mallocs += 1
        pointer._obj.value = address
        return SUCCESS

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        if pointer.value is None:
            return SUCCESS
        return SUCCESS if self.allocations.pop(pointer.value, None) is not None else INVALID_VALUE

    def cudaMallocHost(self, pointer: Any, nbytes: ctypes.c_size_t) -> int:
        block = ctypes.create_string_buffer(nbytes.value)
        self.pinned[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)
        return SUCCESS

    def cudaFreeHost(self, pointer: ctypes.c_void_p) -> int:
        return SUCCESS if self.pinned.pop(pointer.value or 0, None) is not None else INVALID_VALUE

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        return any(base <= address and address + nbytes <= base + len(block) for base, block in self.pinned.items())

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = self.memory_bytes - self.used_bytes, self.memory_bytes
        return SUCCESS

    @property
    def used_bytes(self) -> int:
        return sum(len(block) for block in self.allocations.values())

    def check_region(self, address: int, nbytes: int) -> None:
        """Raises IllegalAddress unless one allocation holds the whole region."""
        for base, block in self.allocations.items():
            if base <= address and address + nbytes <= base + len(block):
                return
        raise IllegalAddress(f"{nbytes} bytes at {address:#x}")

    def cudaMemcpyAsync(self, dst: Any, src: Any, nbytes: Any, kind: ctypes.c_int, stream: Any) -> int:
        line = self.streams[stream.value]
        if line.graph is not None:
            # Pageable host memory cannot be part of a capture.
            line.capture_is_valid = False
            return CAPTURE_INVALIDATED
        to, start, count = dst.value, src.value, nbytes.value
        self.pageable_copies += not self._is_pinned(start if kind.value == 1 else to, count)
        if kind.value == 1:
            # Pageable memory is staged at once; pinned memory is read when the copy's turn has come.
            staged = None if self._is_pinned(start, count) else ctypes.string_at(start, count)

            def copy_in() -> None:
                self.check_region(to, count)
                ctypes.memmove(to, start if staged is None else staged, count)

            line.add(copy_in)
        elif kind.value == 2:

            def copy_out() -> None:
                self.check_region(start, count)
                ctypes.memmove(to, start, count)

            line.add(copy_out)
        else:
            return INVALID_VALUE
        return SUCCESS

    # --- streams ---

    def cudaStreamCreate(self, pointer: Any) -> int:
        pointer._obj.value = self._number()
        self.streams[pointer._obj.value] = FakeStream()
        return SUCCESS

    def cudaStreamDestroy(self, stream: Any) -> int:
        return SUCCESS if self.streams.pop(stream.value, None) is not None else INVALID_VALUE

    def cudaStreamSynchronize(self, stream: Any) -> int:
        line = self.streams[stream.value]
        if line.graph is not None:
            line.capture_is_valid = False
            return CAPTURE_INVALIDATED
        pending, line.pending = line.pending, []
        for operation in pending:
            try:
                operation()
            except IllegalAddress:
                return ILLEGAL_ADDRESS
        return SUCCESS

    # --- graphs ---

    def cudaStreamBeginCapture(self, stream: Any, mode: ctypes.c_int) -> int:
        line = self.streams[stream.value]
        if line.graph is not None:
            return INVALID_VALUE
        line.graph, line.capture_is_valid = [], not self.fail_capture
        return SUCCESS

    def cudaStreamEndCapture(self, stream: Any, graph: Any) -> int:
        line = self.streams[stream.value]
        if line.graph is None:
            return INVALID_VALUE
        collected, line.graph = line.graph, None
        if not line.capture_is_valid:
            return CAPTURE_INVALIDATED
        graph._obj.value = self._number()
        self.graphs[graph._obj.value] = collected
        return SUCCESS

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = self._number()
        self.executables[executable._obj.value] = self.graphs[graph.value]
        return SUCCESS

    def cudaGraphDestroy(self, graph: Any) -> int:
        return SUCCESS if self.graphs.pop(graph.value, None) is not None else INVALID_VALUE

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> int:
        if executable.value not in self.executables:
            return INVALID_VALUE
        for operation in self.executables[executable.value]:
            self.streams[stream.value].add(operation)
        self.launches += 1
        return SUCCESS

    def cudaGraphExecDestroy(self, executable: Any) -> int:
        return SUCCESS if self.executables.pop(executable.value, None) is not None else INVALID_VALUE

    def cudaRuntimeGetVersion(self, version: Any) -> int:
        version._obj.value = self.runtime_version
        return SUCCESS

    def cudaGetLastError(self) -> int:
        return SUCCESS

    def _number(self) -> int:
        self._next += 1
        return self._next


class FakeDriver:
    """The functions of libcuda that are asked about the GPU."""

    def __init__(self, *, name: str = "NVIDIA Fake 4090", capability: tuple[int, int] = (8, 9), cuda: int = 12080):
        self.name, self.capability, self.cuda = name, capability, cuda

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.cuda
        return SUCCESS

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return SUCCESS

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return SUCCESS

    def cuDeviceGetName(self, text: Any, length: int, device: Any) -> int:
        text.value = self.name.encode()
        return SUCCESS

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: self.capability[0], 76: self.capability[1]}[attribute]
        return SUCCESS
