"""ONNX Runtime, with its silence turned into errors: the provider that was asked for runs, or the reason is said.

ONNX Runtime itself falls back to the CPU with a line on stderr where a provider cannot start.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tiue_cli.backends.cuda import device_count
from tiue_cli.base.machine import usable_cores
from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError
from tiue_cli.files.caches import user_cache

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

ProviderName = Literal["auto", "cuda", "tensorrt", "cpu"]
PROVIDERS: Final = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_DOCTOR = "see what is missing: tiue doctor"


@dataclass(frozen=True)
class Provider:
    """The execution provider that sessions are made for; ``note`` says why ``auto`` left out a GPU that is there."""

    name: str
    note: str | None = None

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``: where the tensors lie."""
        return "cpu" if self.name == "cpu" else "cuda"


def choose_provider(asked: str) -> Provider:
    """The provider for ``--provider``; ``auto`` takes CUDA where it starts, else the CPU.

    Raises DeviceError with the reason where the one that was asked for cannot start, MissingDependencyError without
    ONNX Runtime.
    """
    if asked == "cpu":
        return Provider("cpu")
    if asked == "auto":
        if device_count() == 0:
            return Provider("cpu")
        problem = provider_problem("cuda")
        if problem is None:
            return Provider("cuda")
        return Provider("cpu", note=f"there is a GPU, and ONNX Runtime runs on the CPU: {problem}; {_DOCTOR}")
    problem = provider_problem(asked)
    if problem is not None:
        raise DeviceError(f"--provider {asked} cannot be used: {problem}", hint=f"use --provider cpu, or {_DOCTOR}")
    return Provider(asked)


def open_session(path: Path, provider: Provider, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """A session for one graph on ``provider``; ``threads`` None takes every core. Raises DeviceError."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # ONNX Runtime itself would count the machine's cores, which in a container are more.
    options.intra_op_num_threads = usable_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    # Four sessions take turns: threads of one that spin after its run would take the cores from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = PROVIDERS[provider.name]
    chain: list[Any] = [(wanted, _options(provider))]
    if provider.name == "tensorrt":
        chain.append((PROVIDERS["cuda"], _options(Provider("cuda"))))
    if provider.name != "cpu":
        chain.append(PROVIDERS["cpu"])  # shape arithmetic runs there by design
    with session_errors(path.name):
        session = ort.InferenceSession(path, options, providers=chain)
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} did not start {wanted} for {path.name}"
            f" (it took {', '.join(session.get_providers())})",
            hint=f"use --provider cpu, or {_DOCTOR}",
        )
    return session


def run_session(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray | onnxruntime.OrtValue], provider: Provider
) -> dict[str, onnxruntime.OrtValue]:
    """Run a graph; outputs stay on the provider's device, and inputs that lie there already are not copied."""
    ort = import_onnxruntime()
    binding = session.io_binding()
    placed = {name: _placed(ort, value, provider.device) for name, value in inputs.items()}
    for name, value in placed.items():
        binding.bind_ortvalue_input(name, value)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, provider.device)
    session.run_with_iobinding(binding)
    return dict(zip(names, binding.get_outputs(), strict=True))


@contextlib.contextmanager
def session_errors(what: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises while it handles ``what`` into a DeviceError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    kinds = tuple(getattr(state, name) for name in (*names, "RuntimeException") if hasattr(state, name))
    try:
        yield
    except (*kinds, MemoryError, UnicodeDecodeError) as error:  # the last: of names in a damaged graph
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError) or any(word in text.lower() for word in ("alloc", "out of memory")):
            raise OutOfMemoryError(
                "the memory is full", hint="try --batch 1, a smaller --size, or another --provider"
            ) from error
        raise DeviceError(
            f"ONNX Runtime failed at {what}: {text[:300]}",
            hint="export the student again with this version: tiue export STUDENT",
        ) from error


def import_onnxruntime() -> Any:
    """The module. Raises MissingDependencyError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported: {error}",
            hint="install it: python -m pip install onnxruntime-gpu (or onnxruntime where there is no NVIDIA GPU)",
        ) from error
    return onnxruntime


def provider_problem(name: str) -> str | None:
    """Why a GPU provider cannot start, None where it can."""
    ort = import_onnxruntime()
    if PROVIDERS[name] not in ort.get_available_providers():
        return f"the installed ONNX Runtime {ort.__version__} is built without {PROVIDERS[name]}"
    if device_count() == 0:
        return "the NVIDIA driver offers no GPU"
    # CUDA and cuDNN from Python packages are found only once they are loaded; torch would do that by being imported.
    # What it prints would lie on the stream that --format json is read from.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    if library.exists():
        try:
            ctypes.CDLL(str(library.with_name("libonnxruntime_providers_shared.so")), mode=ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library))
        except OSError as error:
            needs = (
                "; it needs TensorRT 10 (python -m pip install tensorrt-cu12-libs==10.*)" if name == "tensorrt" else ""
            )
            return f"{library.name} cannot be loaded: {error}{needs}"
    return None


def _options(provider: Provider) -> dict[str, Any]:
    """What each provider is told."""
    if provider.name == "cuda":
        # Sizes change from call to call: an exhaustive search for each would cost more than it brings.
        # Without TF32 an export in fp32 computes in fp32, as engines do, which are compared with it.
        return {
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
    if provider.name == "tensorrt":
        cache = user_cache() / "onnxruntime-tensorrt"
        cache.mkdir(parents=True, exist_ok=True)
        return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache), "trt_timing_cache_enable": True}
    return {}


def _placed(ort: Any, value: Any, device: str) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value, device, 0)
