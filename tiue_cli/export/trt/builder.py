"""One ONNX graph becomes one TensorRT plan, through Polygraphy: strongly typed, so its precision is the graph's own.

TensorRT builds for minutes, reports nothing by itself, and cannot be interrupted while it computes. So it builds
in a thread of its own: this one keeps the clock, and tells it through its progress monitor when to give up.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tiue_cli.backends.trt_messages import Messages, cannot_start, collect_messages
from tiue_cli.base.text import bytes_text
from tiue_cli.errors import DeviceError
from tiue_cli.export.trt.profiles import Shapes
from tiue_cli.files.caches import user_cache
from tiue_cli.files.engines import EngineDevice

BuildProgressFn = Callable[[float, str], None]
"""Called about twice a second with the share of a build that is done, 0 to 1, and what it is at."""

MIN_WORKSPACE_BYTES: Final = 256 * 1024**2
WORKSPACE_SHARE: Final = 0.75
"""Of the free memory that the weights leave: the rest is for the tensors that tactics are timed on."""
RETRIES: Final = 3
BEAT_S: Final = 0.5

_REQUESTED = re.compile(r"requested size was ([\d.,]+ ?\w*)", re.IGNORECASE)
_MAIN_MEMORY = re.compile(r"bad_alloc|host memory|cannot allocate memory", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|could not be allocated|bad_alloc|memory ?allocation", re.IGNORECASE
)


@dataclass(frozen=True)
class BuiltPlan:
    """What a build found out; ``workspace_bytes`` is the limit that it succeeded under."""

    layers: int
    seconds: float
    workspace_bytes: int
    retries: int


def build_plan(
    onnx: Path,
    plan: Path,
    shapes: Sequence[Shapes],
    *,
    workspace_bytes: int,
    timing_cache: Path | None = None,
    refit: Sequence[str] = (),
    progress: BuildProgressFn | None = None,
) -> BuiltPlan:
    """Build ``onnx`` for the profiles ``shapes`` and write ``plan``; with less workspace when memory runs out.

    The weights named in ``refit`` can be changed in the plan, and only they: what is fixed, TensorRT can fold and fuse.
    Raises DeviceError with TensorRT's own reason; an interrupt ends the build and leaves no file.
    """
    started = time.perf_counter()
    limits = workspace_limits(workspace_bytes)
    requested = None
    for retries, limit in enumerate(limits):
        try:
            layers = _build_once(
                onnx, plan, shapes, workspace_bytes=limit, timing_cache=timing_cache, refit=refit, progress=progress
            )
        except _OutOfMemory as error:
            if error.in_main_memory or (error.requested is not None and error.requested == requested):
                raise _not_the_workspace(onnx, error) from error
            requested = error.requested
            if retries + 1 == len(limits):
                raise DeviceError(
                    f"not enough GPU memory to build {onnx.name}, even with {bytes_text(limit)} of workspace: {error}",
                    hint="close other programs that use the GPU (see nvidia-smi), or build for fewer images:"
                    " --batch 1:1:4",
                ) from error
            if progress is not None:
                progress(0.0, f"out of memory; trying again with {bytes_text(limits[retries + 1])} of workspace")
            continue
        return BuiltPlan(layers, time.perf_counter() - started, limit, retries)
    raise AssertionError("there is at least one limit")


def workspace_bytes(free_bytes: int, weights_bytes: int) -> int:
    """Workspace limit for a build: what is free beside the weights, which a builder holds twice, and some reserve."""
    return max(MIN_WORKSPACE_BYTES, int((free_bytes - 2 * weights_bytes) * WORKSPACE_SHARE))


def workspace_limits(first: int) -> list[int]:
    """The limits to try, each half of the one before, down to a smallest useful one."""
    halves = [max(MIN_WORKSPACE_BYTES, first >> step) for step in range(RETRIES + 1)]
    return list(dict.fromkeys(halves))


def timing_cache_file(device: EngineDevice) -> Path:
    """Where measured kernel times are kept for the next build: they hold for one GPU, CUDA and TensorRT only."""
    gpu = re.sub(r"[^a-z0-9]+", "-", device.gpu.lower()).strip("-")
    name = f"{gpu}-cc{device.compute_capability}-trt{device.tensorrt}-cuda{device.cuda}-driver{device.driver}.timing"
    return user_cache() / "tensorrt" / name.replace(" ", "-")


class _OutOfMemory(Exception):
    """A build failed for want of memory; ``requested`` is the size that was asked for, in TensorRT's words."""

    def __init__(self, text: str, *, in_main_memory: bool) -> None:
        super().__init__(text)
        found = _REQUESTED.search(text)
        self.requested = None if found is None else found.group(1)
        self.in_main_memory = in_main_memory


def _not_the_workspace(onnx: Path, error: _OutOfMemory) -> DeviceError:
    """For a shortage that less workspace, which is the GPU's, does not change."""
    if error.in_main_memory:
        said = f"the main memory is not enough to build {onnx.name}: {error}"
    else:
        said = (
            f"building {onnx.name} asks for {error.requested} however small its workspace is: the main memory is not"
            f" enough, or the GPU's for the weights: {error}"
        )
    return DeviceError(
        said, hint="close other programs, raise the container's memory limit, or build on a machine with more memory"
    )


# --- one attempt ---------------------------------------------------------------------------------------------------


def _build_once(
    onnx: Path,
    plan: Path,
    shapes: Sequence[Shapes],
    *,
    workspace_bytes: int,
    timing_cache: Path | None,
    refit: Sequence[str],
    progress: BuildProgressFn | None,
) -> int:
    """Number of layers of the network that was built into ``plan``."""
    messages = collect_messages()
    messages.clear()
    watch = BuildWatch()

    def work() -> int:
        from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

        trt = builder_module()
        parsed = NetworkFromOnnxPath(str(onnx), strongly_typed=True)()
        config = _config(trt, shapes, workspace_bytes, timing_cache, build_monitor(trt, watch))
        if refit:
            config = _refittable(trt, onnx, parsed[1], refit, config)
        layers = int(parsed[1].num_layers)
        if timing_cache is not None:
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
        cache = None if timing_cache is None else str(timing_cache)
        data = EngineBytesFromNetwork(parsed, config=config, save_timing_cache=cache)()
        with plan.open("wb") as file:
            file.write(data)
        return layers

    from polygraphy.exception import PolygraphyException

    try:
        return run_watched(work, watch, progress)
    except (PolygraphyException, RuntimeError, MemoryError, TypeError) as error:
        plan.unlink(missing_ok=True)
        if isinstance(error, TypeError):
            raise cannot_start(error, f"build {onnx.name}") from error
        raise _build_error(onnx, error, messages) from error
    except BaseException:
        plan.unlink(missing_ok=True)
        raise


def _build_error(onnx: Path, error: BaseException, messages: Messages) -> Exception:
    said = messages.errors()
    for text in (*said, str(error)):
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
            main = isinstance(error, MemoryError) or _MAIN_MEMORY.search(text) is not None
            return _OutOfMemory(text, in_main_memory=main)
    reason = said[0] if said else " ".join(str(error).split())[:400]
    return DeviceError(
        f"TensorRT cannot build {onnx.name}: {reason}",
        hint="export with another --opset (18 to 23) or --precision fp32, and please report it",
    )


def _config(
    trt: Any, shapes: Sequence[Shapes], workspace_bytes: int, timing_cache: Path | None, monitor: Any
) -> Callable[..., Any]:
    """Polygraphy's recipe for the builder config."""
    from polygraphy import config as polygraphy_config
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for inputs in shapes:
        profile = Profile()
        for name, (low, opt, high) in inputs.items():
            profile.add(name, min=low, opt=opt, max=high)
        profiles.append(profile)
    create = CreateConfigRTX if polygraphy_config.USE_TENSORRT_RTX else CreateConfig
    result: Callable[..., Any] = create(
        profiles=profiles,
        load_timing_cache=str(timing_cache) if timing_cache is not None and timing_cache.is_file() else None,
        # Polygraphy's default keeps every detail in the plan, which slows each launch.
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: workspace_bytes},
        progress_monitor=monitor,
    )
    return result


def _refittable(
    trt: Any, onnx: Path, network: Any, names: Sequence[str], config: Callable[..., Any]
) -> Callable[..., Any]:
    """``config`` for a plan whose weights ``names`` may change; marks them. Raises DeviceError for an unknown one."""
    unknown = [name for name in names if not network.mark_weights_refittable(name)]
    if unknown:
        raise DeviceError(
            f"{onnx.name}: TensorRT knows no weights called {unknown[0]} (in all {len(unknown)} of {len(names)} names)",
            hint="build the engine without --refit, and please report this",
        )

    def with_flag(builder: Any, network: Any) -> Any:
        made = config(builder, network)
        made.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        return made

    return with_flag


def builder_module() -> Any:
    """The module that Polygraphy builds with: tensorrt, or tensorrt_rtx where its setting says so."""
    from polygraphy import config as polygraphy_config

    return importlib.import_module("tensorrt_rtx" if polygraphy_config.USE_TENSORRT_RTX else "tensorrt")


# --- progress ------------------------------------------------------------------------------------------------------


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


@dataclass
class BuildWatch:
    """What a builder says about its progress, and whether it is to give up; used from several threads."""

    cancelled: bool = False
    _phases: list[_Phase] = field(default_factory=list)
    _share: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins inside ``parent``, or a new one of its own."""
        with self._lock:
            names = [phase.name for phase in self._phases]
            keep = names.index(parent) + 1 if parent in names else 0
            self._phases = [*self._phases[:keep], _Phase(name, max(1, steps))]

    def step_complete(self, name: str, step: int) -> bool:
        """A step of a phase is done; False asks the builder to stop."""
        with self._lock:
            for phase in self._phases:
                if phase.name == name:
                    phase.done = min(step + 1, phase.steps)
            self._share = max(self._share, self._nested_share())
            return not self.cancelled

    def phase_finish(self, name: str) -> None:
        """A phase is over, with those inside it."""
        with self._lock:
            names = [phase.name for phase in self._phases]
            if name in names:
                self._phases = self._phases[: names.index(name)]

    @property
    def share(self) -> float:
        """What is done, 0 to 1; it never falls."""
        return self._share

    @property
    def phase(self) -> str:
        """The innermost phase; "" before the first."""
        with self._lock:
            return self._phases[-1].name if self._phases else ""

    def _nested_share(self) -> float:
        """Each phase fills one step of the phase that it is part of."""
        share = 0.0
        for phase in reversed(self._phases):
            share = min(1.0, (phase.done + (share if phase.done < phase.steps else 0.0)) / phase.steps)
        return share


def build_monitor(trt: Any, watch: BuildWatch) -> Any:
    """TensorRT's IProgressMonitor that reports to ``watch``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT may be absent: its types are unknown
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.phase_finish(phase_name)

    return Monitor()


def run_watched(work: Callable[[], int], watch: BuildWatch, progress: BuildProgressFn | None) -> int:
    """Run ``work`` in a thread while this one reports and can be interrupted; raises what ``work`` raises."""
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt") as pool:
        future = pool.submit(work)
        try:
            while not wait([future], timeout=BEAT_S).done:
                if progress is not None:
                    seconds = time.perf_counter() - started
                    progress(watch.share, f"{watch.phase or 'starting'}, {seconds:.0f} s")
        except BaseException:
            # The builder asks after every step; until then there is nothing to do but wait.
            watch.cancelled = True
            raise
        return future.result()
