"""TensorRT plans, run one after the other on one CUDA stream: NumPy and Polygraphy's CUDA wrapper, no torch.

    PlanChain.run(inputs):  copy in ─▶ plan ─▶ plan ─▶ … ─▶ copy out

A tensor has one buffer, whichever plans name it: what one plan writes is where the next one reads, and nothing is
copied between them. From the second run of a shape on, all plans are one launch of a CUDA graph.

Written for TensorRT 10.8 to 11; it runs with TensorRT 8.6 under Python 3.9 as well, so it keeps to what both have.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError, ProfileError

_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_CAPTURE_THIS_THREAD = 1  # cudaStreamCaptureModeThreadLocal
_RANGES = "build an engine for such shapes: tiue export FOLDER --trt --batch MIN:OPT:MAX"


# --- plans ---------------------------------------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """An input or output of a plan; -1 in ``shape`` is a free dimension."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    is_input: bool


class Plan(NamedTuple):
    """A deserialised plan: ``engine`` is TensorRT's, ``runtime`` what it must not outlive."""

    name: str
    engine: Any
    runtime: Any
    tensors: tuple[TensorInfo, ...]

    def names(self, *, inputs: bool) -> list[str]:
        """Names of the inputs, or of the outputs, in the plan's order."""
        return [tensor.name for tensor in self.tensors if tensor.is_input == inputs]


def open_plan(name: str, data: bytes) -> Plan:
    """Deserialise a plan. It is code for the GPU: check where it comes from before. Raises DeviceError."""
    trt = import_tensorrt()
    messages = collect_messages()
    messages.clear()
    with device_errors(f"opening {name}"):
        from polygraphy.backend.trt import get_trt_logger

        try:
            runtime = trt.Runtime(get_trt_logger())
        except TypeError as error:
            raise cannot_start(error, f"open {name}") from error
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise DeviceError(
            f"TensorRT {trt.__version__} cannot open {name}: {messages.worst() or 'it gives no reason'}",
            hint="build it again: tiue export FOLDER --trt",
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return Plan(name, engine, runtime, tuple(_tensor_info(trt, engine, tensor) for tensor in names))


def _tensor_info(trt: Any, engine: Any, name: str) -> TensorInfo:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES or engine.is_shape_inference_io(name):
        raise DeviceError(
            f"tensor {name} of a plan has the type {kind}, which this runner does not handle",
            hint="build it again: tiue export FOLDER --trt",
        )
    shape = tuple(int(side) for side in engine.get_tensor_shape(name))
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    return TensorInfo(name, np.dtype(_DTYPES[kind]), shape, is_input)


# --- memory --------------------------------------------------------------------------------------------------------


class PlanMemory:
    """What plans under one profile run in: a buffer a tensor at its largest, working memory, pinned host memory.

    Chains of one stream may share it, as they never run at the same time.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Any] = {}
        self.working: Any = None
        self._host: dict[str, tuple[ctypes.c_void_p, int]] = {}

    def host(self, name: str, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A pinned array, which a GPU copies at full speed; the memory of a name is the same from call to call."""
        nbytes = max(1, _nbytes(shape, dtype))
        pointer, have = self._host.get(name, (None, 0))
        if pointer is None or have < nbytes:
            if pointer is not None:
                _free_host(self._host.pop(name)[0])
            pointer = ctypes.c_void_p()
            cuda = cuda_wrapper()
            cuda.check(cuda.handle.cudaMallocHost(ctypes.byref(pointer), ctypes.c_size_t(nbytes)))
            self._host[name] = (pointer, nbytes)
        block: Any = (ctypes.c_char * nbytes).from_address(pointer.value or 0)
        flat: np.ndarray = np.frombuffer(block, dtype=dtype, count=int(np.prod(shape, dtype=np.int64)))
        return flat.reshape(tuple(shape))

    def free(self) -> None:
        """Give everything back."""
        from polygraphy.exception import PolygraphyException

        for buffer in (*self.buffers.values(), self.working):
            # A GPU that failed refuses this as well, and the failure itself is what the caller must see.
            with contextlib.suppress(PolygraphyException):
                if buffer is not None:
                    buffer.free()
        for pointer, _ in self._host.values():
            _free_host(pointer)
        self.buffers, self.working, self._host = {}, None, {}


def _free_host(pointer: ctypes.c_void_p) -> None:
    cuda_wrapper().handle.cudaFreeHost(pointer)


# --- a chain of plans ----------------------------------------------------------------------------------------------


class PlanChain:
    """Plans that follow each other, each under one of its profiles; used with ``with``.

    ``plain_runs``, ``captures`` and ``graph_runs`` count what happened. ``graph_problem`` says why runs stay plain
    where a CUDA graph could not be made.
    """

    def __init__(
        self,
        plans: Sequence[tuple[Plan, int]],
        stream: Any,
        *,
        graphs: bool = True,
        memory: PlanMemory | None = None,
    ) -> None:
        """``plans`` with the number of the profile to use in each; ``stream`` is one of ``open_stream``.

        ``memory`` is that of another chain of the same plans, profiles and stream, which must outlive this one; None
        makes its own. Chains that share it keep a shape and its graph each.
        """
        self.plain_runs = self.captures = self.graph_runs = 0
        self.graph_problem: str | None = None if graphs else "CUDA graphs are switched off"
        self._plans = list(plans)
        self._stream = stream
        self._contexts: list[Any] = []
        self._owns_memory = memory is None
        self.memory = PlanMemory() if memory is None else memory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: _Graph | None = None
        self._ran_plain = False
        self._dtypes = _common_dtypes([plan for plan, _ in plans])
        self.inputs = _outer_inputs([plan for plan, _ in plans])
        """Names of the inputs that no plan of the chain makes: what ``run`` must be given."""

    def __enter__(self) -> PlanChain:
        try:
            with device_errors("preparing the engine"):
                self._prepare()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back but the stream, and memory that another chain lent."""
        self._forget_graph()
        self._contexts.clear()
        if self._owns_memory:
            self.memory.free()
        self._shapes = {}

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run all plans; returns the named tensors (of any plan) as arrays of their own.

        ``inputs`` are cast to the plans' types. Raises ProfileError for shapes outside the profile, DeviceError.
        """
        arrays = {name: np.ascontiguousarray(inputs[name], dtype=self._dtypes[name]) for name in self.inputs}
        with device_errors("running the engine"):
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            if any(self._shapes.get(name) != shape for name, shape in shapes.items()):
                self._set_shapes(shapes)
            for name, array in arrays.items():
                self._copy_in(name, array)
            self._launch()
            pinned = {name: self._copy_out(name) for name in outputs}
            self._stream.synchronize()
        return {name: array.copy() for name, array in pinned.items()}

    # --- once ---

    def _prepare(self) -> None:
        """Contexts, one buffer a tensor at its largest shape, and one block of working memory for all plans."""
        sizes: dict[str, int] = {}
        memory = 1
        for plan, profile in self._plans:
            context = _new_context(plan.engine)
            if not context.set_optimization_profile_async(profile, self._stream.ptr):
                raise DeviceError(f"{plan.name} has no profile {profile}", hint=_RANGES)
            self._contexts.append(context)
            memory = max(memory, _memory_size(plan.engine, profile))
            for name, shape in _largest_shapes(plan, context, profile).items():
                sizes[name] = max(sizes.get(name, 1), _nbytes(shape, self._dtypes[name]))
        self._stream.synchronize()
        if self._owns_memory:
            self._allocate(memory, sizes)
        for (plan, _), context in _pairs(self._plans, self._contexts):
            _give_memory(context, self.memory.working)
            for tensor in plan.tensors:
                if not context.set_tensor_address(tensor.name, self.memory.buffers[tensor.name].ptr):
                    raise DeviceError(f"{plan.name}: tensor {tensor.name} takes no address", hint=_RANGES)

    def _allocate(self, working: int, sizes: Mapping[str, int]) -> None:
        from polygraphy import cuda

        self.memory.working = cuda.DeviceArray.raw((working,))
        # Sorted by size: large blocks first fragment less.
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            self.memory.buffers[name] = cuda.DeviceArray.raw((sizes[name],))

    # --- once a shape ---

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell every plan its shapes, from the inputs on; what was captured for other shapes is void."""
        self._forget_graph()
        self._shapes = {}
        known = dict(shapes)
        for (plan, profile), context in _pairs(self._plans, self._contexts):
            for name in plan.names(inputs=True):
                if not _accepts(plan, profile, name, known[name]) or not context.set_input_shape(name, known[name]):
                    raise ProfileError(
                        f"{plan.name}: {name} of shape {_times(known[name])} is outside the engine's range"
                        f" {_range_text(plan, profile, name)}",
                        hint=_RANGES,
                    )
            missing = context.infer_shapes()
            if missing:
                raise DeviceError(f"{plan.name}: no shape for {', '.join(missing)}", hint=_RANGES)
            for name in plan.names(inputs=False):
                known[name] = tuple(int(side) for side in context.get_tensor_shape(name))
                if _nbytes(known[name], self._dtypes[name]) > self.memory.buffers[name].allocated_nbytes:
                    raise ProfileError(f"{plan.name}: {name} of shape {_times(known[name])} has no room", hint=_RANGES)
        self._shapes = known

    # --- once a run ---

    def _launch(self) -> None:
        if self._graph is None and self._ran_plain and self.graph_problem is None:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream.ptr)
            self.graph_runs += 1
            return
        self._enqueue()
        # TensorRT sets itself up in the first run of a shape, and that must not be part of a graph.
        self._ran_plain = True
        self.plain_runs += 1

    def _enqueue(self) -> None:
        for (plan, _), context in _pairs(self._plans, self._contexts):
            if not context.execute_async_v3(self._stream.ptr):
                reason = collect_messages().worst() or "TensorRT gives no reason"
                raise DeviceError(f"{plan.name} failed: {reason}", hint="see what is missing: tiue doctor")

    def _capture(self) -> None:
        try:
            self._graph = _Graph.capture(self._stream.ptr, self._enqueue)
            self.captures += 1
        except DeviceError as error:
            self.graph_problem = error.message

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
        self._graph = None
        self._ran_plain = False

    def _copy_in(self, name: str, array: np.ndarray) -> None:
        from polygraphy import cuda

        # The last run was waited for, so nothing reads the pinned memory any more.
        pinned = self.memory.host(name, array.shape, array.dtype)
        pinned[...] = array
        cuda.wrapper().memcpy(
            dst=self.memory.buffers[name].ptr,
            src=pinned.ctypes.data,
            nbytes=array.nbytes,
            kind=cuda.MemcpyKind.HostToDevice,
            stream_ptr=self._stream.ptr,
        )

    def _copy_out(self, name: str) -> np.ndarray:
        from polygraphy import cuda

        array = self.memory.host(f"{name}, out", self._shapes[name], self._dtypes[name])
        cuda.wrapper().memcpy(
            dst=array.ctypes.data,
            src=self.memory.buffers[name].ptr,
            nbytes=array.nbytes,
            kind=cuda.MemcpyKind.DeviceToHost,
            stream_ptr=self._stream.ptr,
        )
        return array


def _pairs(plans: Sequence[tuple[Plan, int]], contexts: Sequence[Any]) -> Iterator[tuple[tuple[Plan, int], Any]]:
    assert len(plans) == len(contexts), "the chain is used inside its with block"
    return zip(plans, contexts)  # noqa: B905 (strict= came with Python 3.10)


def _common_dtypes(plans: Sequence[Plan]) -> dict[str, Any]:
    """The type of each tensor; plans that share one must agree. Raises DeviceError."""
    dtypes: dict[str, Any] = {}
    for plan in plans:
        for tensor in plan.tensors:
            if dtypes.setdefault(tensor.name, tensor.dtype) != tensor.dtype:
                raise DeviceError(
                    f"{plan.name}: {tensor.name} is {tensor.dtype}, and {dtypes[tensor.name]} in the plan before",
                    hint="build the engine again, whole: tiue export FOLDER --trt",
                )
    return dtypes


def _outer_inputs(plans: Sequence[Plan]) -> tuple[str, ...]:
    made: set[str] = set()
    outer: list[str] = []
    for plan in plans:
        outer += [name for name in plan.names(inputs=True) if name not in made and name not in outer]
        made.update(plan.names(inputs=False))
    return tuple(outer)


def _nbytes(shape: Sequence[int], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * int(np.dtype(dtype).itemsize)


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)


# --- what differs between TensorRT's versions ----------------------------------------------------------------------


def _new_context(engine: Any) -> Any:
    """An execution context whose working memory is ours to give. Raises DeviceError."""
    trt = import_tensorrt()
    strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
    if strategies is None:  # 8.6
        context = engine.create_execution_context_without_device_memory()
    else:
        context = engine.create_execution_context(strategies.USER_MANAGED)
    if context is None:
        raise DeviceError(
            f"TensorRT makes no execution context: {collect_messages().worst() or 'it gives no reason'}",
            hint="close other programs that use the GPU",
        )
    return context


def working_memory(plan: Plan) -> int:
    """Bytes of GPU memory that a plan works in, beside its weights, inputs and outputs; for its largest profile."""
    return max(_memory_size(plan.engine, profile) for profile in range(plan.engine.num_optimization_profiles))


def _memory_size(engine: Any, profile: int) -> int:
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            return int(getattr(engine, name)(profile))
    return int(engine.device_memory_size)  # 8.6


def _give_memory(context: Any, memory: Any) -> None:
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(memory.ptr, memory.allocated_nbytes)
    else:  # 8.6
        context.device_memory = memory.ptr


def _largest_shapes(plan: Plan, context: Any, profile: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of ``plan`` at the maximum of ``profile``."""
    shapes = {name: _limits(plan, profile, name)[1] for name in plan.names(inputs=True)}
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise DeviceError(f"{plan.name}: {name} does not take its own maximum {_times(shape)}", hint=_RANGES)
    context.infer_shapes()
    for name in plan.names(inputs=False):
        shapes[name] = tuple(int(side) for side in context.get_tensor_shape(name))
    return shapes


def _limits(plan: Plan, profile: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(minimum, maximum) shape of an input."""
    shape = next(tensor.shape for tensor in plan.tensors if tensor.name == name)
    if -1 not in shape:
        return shape, shape
    low, _, high = plan.engine.get_tensor_profile_shape(name, profile)
    return tuple(int(side) for side in low), tuple(int(side) for side in high)


def _accepts(plan: Plan, profile: int, name: str, shape: Sequence[int]) -> bool:
    low, high = _limits(plan, profile, name)
    return len(shape) == len(low) and all(low[axis] <= side <= high[axis] for axis, side in enumerate(shape))


def _range_text(plan: Plan, profile: int, name: str) -> str:
    low, high = _limits(plan, profile, name)
    return _times(low) if low == high else f"{_times(low)} to {_times(high)}"


# --- CUDA ----------------------------------------------------------------------------------------------------------


class _Graph:
    """Work that was captured from a stream, to be launched as one; it holds addresses and shapes as they were then."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    @classmethod
    def capture(cls, stream: int, enqueue: Callable[[], None]) -> _Graph:
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


def open_stream() -> Any:
    """A CUDA stream of our own (Polygraphy's); used with ``with``. Raises DeviceError."""
    with device_errors("opening a CUDA stream"):
        cuda_wrapper()
        from polygraphy import cuda

        return cuda.Stream()


def memory_bytes() -> tuple[int, int]:
    """(free, total) bytes of the current GPU. Raises DeviceError."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with device_errors("asking for the GPU's memory"):
        cuda = cuda_wrapper()
        cuda.check(cuda.handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return int(free.value), int(total.value)


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


# --- messages and errors -------------------------------------------------------------------------------------------


class Messages(logging.Handler):
    """What TensorRT and Polygraphy say, kept instead of printed: stdout is for data."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[tuple[int, str]] = deque(maxlen=500)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self._lines.append((record.levelno, " ".join(record.getMessage().split())))

    def clear(self) -> None:
        """Forget everything so far."""
        self._lines.clear()

    def errors(self) -> list[str]:
        """The errors, oldest first."""
        return [_shortened(text) for level, text in self._lines if level >= logging.ERROR]

    def worst(self) -> str | None:
        """The first error, which is the cause of those that follow; None where there was none."""
        return next(iter(self.errors()), None)


def _shortened(text: str, limit: int = 400) -> str:
    text = re.sub(r"^\[[A-Z!]\]\s*", "", text)
    return text if len(text) <= limit else f"{text[:limit]} …"


_MESSAGES = Messages()


def collect_messages() -> Messages:
    """Make Polygraphy, and TensorRT through it, talk to ``Messages``; returns the one there is."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    G_LOGGER.module_severity = G_LOGGER.WARNING
    G_LOGGER.colors = False
    logger = logging.getLogger("Polygraphy")
    if _MESSAGES not in logger.handlers:
        logger.addHandler(_MESSAGES)
        logger.propagate = False
    return _MESSAGES


def cannot_start(error: TypeError, what: str) -> Exception:
    """The error for a Builder or Runtime that TensorRT does not make; any other TypeError is given back as it is.

    The bindings say of it "pybind11::init(): factory function returned nullptr", and the logger why: the driver is too
    old, or the memory is full.
    """
    if "nullptr" not in str(error):
        return error
    return DeviceError(
        f"TensorRT cannot start to {what}: {collect_messages().worst() or 'it gives no reason'}",
        hint="see whether the driver is new enough and the GPU has free memory: nvidia-smi, tiue doctor",
    )


def import_tensorrt() -> Any:
    """The module. Raises MissingDependencyError."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        # FileNotFoundError, an OSError, is what the package raises where its libraries are missing.
        raise MissingDependencyError(
            f"TensorRT cannot be imported: {' '.join(str(error).split())}",
            hint=f"install it again: {sys.executable} -m pip install --force-reinstall tensorrt",
        ) from error
    return tensorrt


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
        raise DeviceError(f"{what} failed: {_shortened(text)}", hint="see what is missing: tiue doctor") from error
