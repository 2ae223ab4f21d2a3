"""A TensorRT without a GPU: builds "plans" that hold their ONNX graph, and runs them with ONNX Runtime on FakeCudart.

It has the names of the real bindings, and only those of the version it plays (tests/tensorrt_api.json was read from the
official bindings): code that calls what TensorRT does not have fails here as it would there. And it is as strict about
order: no run without shapes, addresses and working memory, no capture before a plain run, no graph after a new shape.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnx
import onnxruntime
import polygraphy.cuda.cuda
import pytest
from google.protobuf.message import DecodeError
from polygraphy.cuda import Cuda

_API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text(encoding="utf-8"))
_MAGIC = b"FAKEPLAN"


@dataclass
class State:
    """What one test may set, and what happened."""

    version: str = "10.8.0.43"
    cudart: fake_cuda.FakeCudart = field(default_factory=fake_cuda.FakeCudart)
    driver: fake_cuda.FakeDriver = field(default_factory=fake_cuda.FakeDriver)
    builds: list[str] = field(default_factory=list)
    """Outcomes of the next builds; "ok" when empty.

    "oom" wants as much as the workspace, "oom-fixed" the same size whatever the workspace, "bad_alloc" is main
    memory's own error, "fail" has no tactic, "hang" goes on until it is cancelled.
    """
    refusal: str | None = None
    """What TensorRT logs where it cannot start: Builder and Runtime are then not made."""
    on_step: Callable[[str, int], None] | None = None
    spoil: Callable[[str, np.ndarray], np.ndarray] | None = None
    """Changes each output (name, value) of what is run: an engine that computes something else."""
    workspaces: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    cancelled: int = 0
    executed: list[str] = field(default_factory=list)
    refits: list[tuple[str, set[str]]] = field(default_factory=list)
    """The engines that were refitted, each with the names of the weights that were set."""
    fail_refit: int = 0
    """Of the next refits, how many are refused."""
    cache_hits: int = 0

    @property
    def api(self) -> dict[str, set[str]]:
        names = _API[".".join(self.version.split(".")[:2])]
        return {kind: set(text.split()) for kind, text in names.items()}


STATE = State()


class _Real:
    """Hides every public name that the class of the same name lacks in the version that is played."""

    def __getattribute__(self, name: str) -> Any:
        kind = type(self).__name__
        if not name.startswith("_") and name not in STATE.api.get(kind, ()):
            raise AttributeError(f"TensorRT {STATE.version}: {kind} has no {name}")
        return object.__getattribute__(self, name)


# --- enums ---------------------------------------------------------------------------------------------------------


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class ProfilingVerbosity(enum.IntEnum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class MemoryPoolType(enum.IntEnum):
    WORKSPACE, DLA_MANAGED_SRAM = range(2)


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class BuilderFlag(enum.IntEnum):
    DEBUG, TF32, REFIT, FP16, OBEY_PRECISION_CONSTRAINTS, REFIT_INDIVIDUAL = range(6)


class OnnxParserFlag(enum.IntEnum):
    NATIVE_INSTANCENORM = 0


class LayerType(enum.IntEnum):
    CONVOLUTION, CONSTANT = range(2)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class DeviceType(enum.IntEnum):
    GPU, DLA = range(2)


class TacticSource(enum.IntEnum):
    EDGE_MASK_CONVOLUTIONS = 0


class PreviewFeature(enum.IntEnum):
    ALIASED_PLUGIN_IO_10_03 = 0


class EngineCapability(enum.IntEnum):
    STANDARD = 0


_DTYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.INT64: DataType.INT64,
    onnx.TensorProto.UINT8: DataType.UINT8,
}
_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT64: np.int64,
    DataType.INT32: np.int32,
    DataType.UINT8: np.uint8,
}


# --- logging -------------------------------------------------------------------------------------------------------


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    pass


# --- plans and their execution -------------------------------------------------------------------------------------


def _ports(values: Any, initializers: set[str] = frozenset()) -> dict[str, tuple[DataType, tuple[Any, ...]]]:
    found = {}
    for value in values:
        if value.name in initializers:
            continue
        dims = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        kind = _DTYPES[value.type.tensor_type.elem_type]
        if STATE.version.startswith("8.") and kind is DataType.INT64:
            kind = DataType.INT32  # 64-bit integers came with TensorRT 9
        found[value.name] = (kind, dims)
    return found


def _refuse(logger: ILogger) -> None:
    """As the bindings of 10.8 and 11.4 do without a driver: the logger hears why, and a TypeError is raised."""
    if STATE.refusal is not None:
        logger.log(ILogger.ERROR, STATE.refusal)
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Runtime(_Real):
    def __init__(self, logger: ILogger) -> None:
        _refuse(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        data = bytes(data)
        if not data.startswith(_MAGIC):
            self._logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag)")
            return None
        plan = json.loads(data[len(_MAGIC) :])
        if plan["version"] != STATE.version:
            self._logger.log(ILogger.ERROR, "Error Code 6: The engine plan file is not compatible with this version")
            return None
        return ICudaEngine(plan, self._logger)


class ICudaEngine(_Real):
    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self._logger = logger
        self._profiles = plan["profiles"]
        model = onnx.load_from_string(base64.b64decode(plan["onnx"]))
        self._name = model.graph.name
        self._inputs = _ports(model.graph.input, {tensor.name for tensor in model.graph.initializer})
        self._outputs = _ports(model.graph.output)
        self._model = model
        self._refittable: list[str] | None = plan["refittable"]
        self._refits = 0
        self._open()

    def _open(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._onnx_types = {value.name: value.type for value in self._session.get_inputs()}

    refittable = property(lambda self: self._refittable is not None)
    num_io_tensors = property(lambda self: len(self._inputs) + len(self._outputs))
    num_optimization_profiles = property(lambda self: len(self._profiles))
    device_memory_size = property(lambda self: 4096)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return (self._inputs | self._outputs)[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in (self._inputs | self._outputs)[name][1])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1024 * (profile_index + 1)

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        return IExecutionContext(self, needs_memory=strategy is ExecutionContextAllocationStrategy.USER_MANAGED)

    def create_execution_context_without_device_memory(self) -> IExecutionContext:
        return IExecutionContext(self, needs_memory=True)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(float)": np.float32}
        casted = {name: value.astype(wanted[self._onnx_types[name]]) for name, value in feeds.items()}
        return dict(zip(self._outputs, self._session.run(list(self._outputs), casted), strict=True))


class IExecutionContext(_Real):
    def __init__(self, engine: ICudaEngine, *, needs_memory: bool) -> None:
        self._engine = engine
        self._needs_memory = needs_memory
        self._memory: tuple[int, int] | None = None
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm = False
        self._generation = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "device_memory":
            self._memory = (value, self._engine._real("device_memory_size"))
            return
        object.__setattr__(self, name, value)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._engine._profiles):
            return self._error(f"Profile index {profile_index} is out of range")
        self._profile = profile_index
        self._changed()
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._profiles[self._profile][name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._error(f"setInputShape: {name} {shape} does not satisfy profile {self._profile}")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._changed()
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._shapes[name]
        zeros = {
            tensor: np.zeros(self._shapes[tensor], _NUMPY[kind]) for tensor, (kind, _) in self._engine._inputs.items()
        }
        return self._engine._run(zeros)[name].shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in (self._engine._inputs | self._engine._outputs):
            return self._error(f"setTensorAddress: no tensor {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = STATE.cudart.streams[stream_handle]
        engine, capturing = self._engine, stream.graph is not None
        if missing := [name for name in (engine._inputs | engine._outputs) if name not in self._addresses]:
            return self._error(f"enqueueV3: Address is not set for {missing}")
        if missing := self._engine_missing():
            return self._error(f"enqueueV3: Input shapes are not set for {missing}")
        if self._needs_memory:
            need = 1024 * (self._profile + 1)
            if self._memory is None or self._memory[1] < need:
                return self._error("enqueueV3: device memory is not set or too small")
            STATE.cudart.check_region(self._memory[0], need)
        if capturing and not self._warm:
            stream.capture_is_valid = False
            return self._error("enqueueV3: shapes changed: run once before the capture")
        shapes, addresses, generation = dict(self._shapes), dict(self._addresses), self._generation
        refits = engine._refits

        def run() -> None:
            if generation != self._generation:
                raise fake_cuda.IllegalAddress("a graph that was captured for other shapes")
            if refits != engine._refits:
                raise fake_cuda.IllegalAddress("a graph that was captured before a refit")
            feeds = {}
            for name, (kind, _) in engine._inputs.items():
                count = int(np.prod(shapes[name])) * np.dtype(_NUMPY[kind]).itemsize
                STATE.cudart.check_region(addresses[name], count)
                flat = np.frombuffer(_bytes_at(addresses[name], count), _NUMPY[kind])
                feeds[name] = flat.reshape(shapes[name]).copy()
            for name, value in engine._run(feeds).items():
                if STATE.spoil is not None:
                    value = STATE.spoil(name, value)
                STATE.cudart.check_region(addresses[name], value.nbytes)
                _write(addresses[name], np.ascontiguousarray(value))
            STATE.executed.append(engine._name)

        stream.add(run)
        self._warm = self._warm or not capturing
        return True

    def _engine_missing(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def _changed(self) -> None:
        self._warm = False
        self._generation += 1

    def _error(self, message: str) -> bool:
        self._engine._logger.log(ILogger.ERROR, f"IExecutionContext::{message}")
        return False


class Refitter(_Real):
    """Weights by the names of the ONNX graph; matrices that the same input meets were joined, so it wants them all."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if engine._refittable is None:
            logger.log(ILogger.ERROR, "createInferRefitter: Error Code 4: API Usage Error (engine is not refittable)")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine = engine
        self._logger = logger
        self._tensors = {tensor.name: tensor for tensor in engine._model.graph.initializer}
        self._new: dict[str, np.ndarray] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine._refittable or ())

    def set_named_weights(self, name: str, weights: np.ndarray) -> bool:
        if name not in self.get_all_weights():
            return self._error(f"setNamedWeights: {name} is no refittable weight")
        own = onnx.numpy_helper.to_array(self._tensors[name])
        if weights.size != own.size or weights.dtype != own.dtype:
            return self._error(f"setNamedWeights: {name} has {own.size} values of {own.dtype}")
        assert weights.flags.c_contiguous, "TensorRT reads the memory as it lies"
        self._new[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        joined: dict[str, list[str]] = {}
        for node in self._engine._model.graph.node:
            if node.op_type == "MatMul" and node.input[1] in self.get_all_weights():
                joined.setdefault(node.input[0], []).append(node.input[1])
        groups = [group for group in joined.values() if any(name in self._new for name in group)]
        return sorted({name for group in groups for name in group} - self._new.keys())

    def refit_cuda_engine(self) -> bool:
        if missing := self.get_missing_weights():
            return self._error(f"refitCudaEngine: missing weights {missing}")
        if any(stream.pending for stream in STATE.cudart.streams.values()):
            raise fake_cuda.IllegalAddress("an engine that is refitted while it runs")
        if STATE.fail_refit:
            STATE.fail_refit -= 1
            return self._error("refitCudaEngine: Error Code 1: Internal Error")
        for name, value in self._new.items():
            shape = tuple(self._tensors[name].dims)
            self._tensors[name].CopyFrom(onnx.numpy_helper.from_array(value.reshape(shape), name))
        self._engine._open()
        self._engine._refits += 1
        STATE.refits.append((self._engine._name, set(self._new)))
        return True

    def _error(self, message: str) -> bool:
        self._logger.log(ILogger.ERROR, f"IRefitter::{message}")
        return False


def _real(self: ICudaEngine, name: str) -> Any:
    return type(self).__dict__[name].fget(self)


ICudaEngine._real = _real  # type: ignore[attr-defined]


def _bytes_at(address: int, count: int) -> bytes:
    import ctypes

    return ctypes.string_at(address, count)


def _write(address: int, value: np.ndarray) -> None:
    import ctypes

    ctypes.memmove(address, value.ctypes.data, value.nbytes)


# --- building ------------------------------------------------------------------------------------------------------


class Builder(_Real):
    def __init__(self, logger: ILogger) -> None:
        _refuse(logger)
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        STATE.flags.append(flags)
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        STATE.workspaces.append(config._pools.get(MemoryPoolType.WORKSPACE, 0))
        if problem := _profile_problem(network, config._profiles):
            self._logger.log(
                ILogger.ERROR, f"IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error ({problem})"
            )
            return None
        outcome = STATE.builds.pop(0) if STATE.builds else "ok"
        if not self._steps(config._monitor, hang=outcome == "hang"):
            STATE.cancelled += 1
            return self._error("buildSerializedNetwork: Error Code 7: BuildCanceled (Build canceled by user)")
        if outcome.startswith("oom"):
            size = 3 * 2**30 if outcome == "oom-fixed" else STATE.workspaces[-1]
            return self._error(
                f"[virtualMemoryBuffer.cpp::154] Error Code 2: OutOfMemory (Requested size was {size} bytes.)"
            )
        if outcome == "bad_alloc":
            return self._error("Error Code 1: Internal Error (std::bad_alloc)")
        if outcome == "fail":
            return self._error("Error Code 10: Internal Error (Could not find any implementation for node)")
        if config._cache is not None:
            STATE.cache_hits += config._cache._data.count(network._model.graph.name.encode())
            config._cache._data += network._model.graph.name.encode() + b"\n"
        plan = {
            "version": STATE.version,
            "profiles": [profile._shapes for profile in config._profiles],
            "refittable": sorted(network._marked) if BuilderFlag.REFIT_INDIVIDUAL in config._set else None,
            "onnx": base64.b64encode(network._model.SerializeToString()).decode(),
        }
        return _MAGIC + json.dumps(plan).encode()

    def _error(self, message: str) -> None:
        self._logger.log(ILogger.ERROR, f"IBuilder::{message}")

    def _steps(self, monitor: Any, *, hang: bool) -> bool:
        if monitor is None:
            return True
        monitor.phase_start("Building engine", None, 3)
        going, step = True, 0
        monitor.phase_start("Timing graph nodes", "Building engine", 2)
        while going and (step < 2 or hang):
            if STATE.on_step is not None:
                STATE.on_step("Timing graph nodes", step)
            going = monitor.step_complete("Timing graph nodes", min(step, 1))
            step += 1
            if hang:
                time.sleep(0.01)
        monitor.phase_finish("Timing graph nodes")
        for number in range(3):
            going = going and monitor.step_complete("Building engine", number)
        monitor.phase_finish("Building engine")
        return going


def _profile_problem(network: INetworkDefinition, profiles: list[IOptimizationProfile]) -> str | None:
    if not profiles:
        return "no optimization profile"
    for number, profile in enumerate(profiles):
        for name, (_, dims) in network._inputs.items():
            shapes = profile._shapes.get(name)
            if shapes is None:
                return f"profile {number} has no shapes for {name}"
            for shape in shapes:
                if len(shape) != len(dims):
                    return f"profile {number}: {name} has {len(dims)} dimensions, not {len(shape)}"
                if any(isinstance(dim, int) and dim != side for dim, side in zip(dims, shape, strict=True)):
                    return f"Dimension mismatch for tensor {name} and profile {number}"
            if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                return f"profile {number}: {name} is not ascending"
    return None


class INetworkDefinition(_Real):
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model = onnx.ModelProto()
        self._inputs: dict[str, tuple[DataType, tuple[Any, ...]]] = {}
        self._marked: set[str] = set()

    def mark_weights_refittable(self, name: str) -> bool:
        known = any(tensor.name == name for tensor in self._model.graph.initializer)
        self._marked |= {name} if known else set()
        return known

    num_layers = property(lambda self: len(self._model.graph.node))
    num_inputs = property(lambda self: len(self._inputs))

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self._flags & (1 << int(flag)))

    def get_input(self, index: int) -> types.SimpleNamespace:
        name, (kind, dims) = list(self._inputs.items())[index]
        shape = tuple(-1 if isinstance(dim, str) else dim for dim in dims)
        return types.SimpleNamespace(name=name, shape=shape, dtype=kind, is_shape_tensor=False)

    def get_layer(self, index: int) -> types.SimpleNamespace:
        output = types.SimpleNamespace(dtype=DataType.FLOAT)
        return types.SimpleNamespace(type=LayerType.CONVOLUTION, num_outputs=1, get_output=lambda number: output)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class OnnxParser(_Real):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[str] = []
        self.__dict__["flags"] = 0

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> str:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        try:
            model = onnx.load(path)
        except (DecodeError, OSError, ValueError) as error:
            self._errors.append(f"MODEL_DESERIALIZE_FAILED: {error}")
            return False
        self._network._model = model
        self._network._inputs = _ports(model.graph.input, {tensor.name for tensor in model.graph.initializer})
        return True


class IOptimizationProfile(_Real):
    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self._shapes[name] = [list(low), list(opt), list(high)]

    def __bool__(self) -> bool:
        return bool(self._shapes)


class ITimingCache(_Real):
    def __init__(self, data: bytes) -> None:
        self._data = data

    def combine(self, other: ITimingCache, ignore_mismatch: bool) -> bool:
        self._data += other._data
        return True

    @contextlib.contextmanager
    def serialize(self) -> Iterator[bytes]:
        yield self._data


class IBuilderConfig(_Real):
    def __init__(self) -> None:
        self._pools: dict[MemoryPoolType, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._monitor: Any = None
        self._cleared: set[BuilderFlag] = set()
        self._set: set[BuilderFlag] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "progress_monitor":
            if name not in STATE.api["IBuilderConfig"]:
                raise AttributeError(name)
            name = "_monitor"
        object.__setattr__(self, name, value)

    DLA_core = -1
    default_device_type = DeviceType.GPU
    engine_capability = EngineCapability.STANDARD
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag is BuilderFlag.TF32 and flag not in self._cleared

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._cleared.add(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        if flag.name in ("FP16", "OBEY_PRECISION_CONSTRAINTS") and STATE.version.startswith("11."):
            raise AttributeError(f"TensorRT {STATE.version} has no BuilderFlag.{flag.name}")
        self._set.add(flag)

    def set_tactic_sources(self, sources: int) -> bool:
        return True

    def get_tactic_sources(self) -> int:
        return 0

    def get_preview_feature(self, feature: PreviewFeature) -> bool:
        return False

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._pools[pool] = size

    def get_memory_pool_limit(self, pool: MemoryPoolType) -> int:
        return self._pools.get(pool, 0)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        return ITimingCache(bytes(data))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class IProgressMonitor:
    def __init__(self) -> None:
        pass


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


# --- putting it in place -------------------------------------------------------------------------------------------


def _module() -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__dict__.update({name: value for name, value in globals().items() if not name.startswith("_")})
    return module


MODULE = _module()


def install(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> State:
    """Make ``import tensorrt`` and Polygraphy's CUDA wrapper find the fakes, for one test; returns its State."""
    from tiue_cli.backends import cuda, trt_device
    from tiue_cli.backends.trt_messages import collect_messages

    if "tensorrt" in sys.modules and sys.modules["tensorrt"] is not MODULE:
        pytest.skip("the real TensorRT is loaded in this process")
    global STATE
    STATE = State(**settings)
    MODULE.__dict__["__version__"] = STATE.version
    monkeypatch.setitem(sys.modules, "tensorrt", MODULE)
    if STATE.version.startswith("8."):
        for name in ("ExecutionContextAllocationStrategy", "IProgressMonitor"):
            monkeypatch.delattr(MODULE, name)
    wrapper = Cuda.__new__(Cuda)
    wrapper.handle = STATE.cudart
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", wrapper)
    for module in (trt_device, cuda):
        monkeypatch.setattr(module, "driver_library", lambda: STATE.driver)
    monkeypatch.setattr(trt_device, "missing_packages", list)
    collect_messages().clear()
    return STATE
