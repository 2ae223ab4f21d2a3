"""ONNX Runtime, with its silence turned into errors: the provider that was asked for runs, or the reason is said.

ONNX Runtime itself falls back to the CPU with a line on stderr where a provider cannot start.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from tiue_cli.backends.cuda import device_count
from tiue_cli.backends.onnx_attention import with_fused_attention
from tiue_cli.base.machine import usable_cores
from tiue_cli.errors import DeviceError, MissingDependencyError, OutOfMemoryError, UsageError
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


CUDA_SWITCHES: Final = "TIUE_ORT_CUDA"
"""The environment variable for what ``CudaOptions`` holds: ``nhwc,search,graphs,memory=8``."""


@dataclass(frozen=True)
class CudaOptions:
    """How ONNX Runtime's CUDA provider runs. The defaults are the careful ones: none of the others is measured yet.

    ``benchmarks/gpu_check.sh`` compares them. TF32 is never on: an export in fp32 computes in fp32.
    """

    nhwc: bool = False
    """Convolutions in the order that tensor cores read; what is between them is transposed."""
    search: bool = False
    """cuDNN tries every algorithm for each new shape, which takes seconds, instead of guessing."""
    graphs: bool = False
    """From the second run of a shape on each graph is one launch; inputs and outputs keep their memory for that."""
    memory_bytes: int | None = None
    """The most that a session, of which an export has four, may hold of the GPU's memory; None: all there is."""


def read_cuda_options(text: str) -> CudaOptions:
    """The options of ``nhwc,search,graphs,memory=GIB``, in any order; empty text is the defaults. Raises UsageError."""
    switches: dict[str, bool] = {}
    memory: int | None = None
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word in ("nhwc", "search", "graphs"):
            switches[word] = True
        elif match := re.fullmatch(r"memory=(\d{1,6}(?:\.\d+)?)", word):
            memory = int(float(match[1]) * 2**30)
        else:
            raise UsageError(
                f"{CUDA_SWITCHES}: {word} is not known", hint="give nhwc, search, graphs and memory=GIB, with commas"
            )
    return CudaOptions(**switches, memory_bytes=memory)


@dataclass(frozen=True)
class Provider:
    """The execution provider that sessions are made for; ``note`` says why ``auto`` left out a GPU that is there."""

    name: str
    note: str | None = None
    cuda: CudaOptions = CudaOptions()

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``: where the tensors lie."""
        return "cpu" if self.name == "cpu" else "cuda"


def choose_provider(asked: str, *, cuda: CudaOptions | None = None) -> Provider:
    """The provider for ``--provider``; ``auto`` takes CUDA where it starts, else the CPU.

    ``cuda`` None reads TIUE_ORT_CUDA. Raises DeviceError with the reason where the one that was asked for cannot start,
    MissingDependencyError without ONNX Runtime, UsageError for words in TIUE_ORT_CUDA that mean nothing.
    """
    if asked == "cpu":
        return Provider("cpu")
    cuda = read_cuda_options(os.environ.get(CUDA_SWITCHES, "")) if cuda is None else cuda
    if asked == "auto":
        if device_count() == 0:
            return Provider("cpu")
        problem = provider_problem("cuda")
        if problem is None:
            return Provider("cuda", cuda=cuda)
        return Provider("cpu", note=f"there is a GPU, and ONNX Runtime runs on the CPU: {problem}; {_DOCTOR}")
    problem = provider_problem(asked)
    if problem is not None:
        raise DeviceError(f"--provider {asked} cannot be used: {problem}", hint=f"use --provider cpu, or {_DOCTOR}")
    return Provider(asked, cuda=cuda)


def open_session(
    path: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    graphs: bool = False,
    fused_attention: bool = False,
) -> onnxruntime.InferenceSession:
    """A session for one graph on ``provider``; ``threads`` None takes every core. Raises DeviceError.

    ``graphs`` is for ``onnx_static``, the one caller that can run a session which records CUDA graphs.
    ``fused_attention`` is for graphs of large pictures in floats or int8, on the CPU.
    """
    ort = import_onnxruntime()
    options = session_options()
    # ONNX Runtime itself would count the machine's cores, which in a container are more.
    options.intra_op_num_threads = usable_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    # 8-bit graphs hold int8 throughout, as TensorRT wants it. Left to itself ONNX Runtime rewrites that to uint8 on
    # x86-64 and then refuses its own graph (1.31, opset 21).
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    wanted = PROVIDERS[provider.name]
    chain: list[Any] = [(wanted, _options(provider, graphs=graphs))]
    if provider.name == "tensorrt":
        chain.append((PROVIDERS["cuda"], _options(Provider("cuda", cuda=provider.cuda))))
    if provider.name != "cpu":
        chain.append(PROVIDERS["cpu"])  # shape arithmetic runs there by design
    with session_errors(path.name):
        source = session_source(path, options) if fused_attention else path
        session = ort.InferenceSession(source, options, providers=chain)
    if session.get_providers()[0] != wanted:
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} did not start {wanted} for {path.name}"
            f" (it took {', '.join(session.get_providers())})",
            hint=f"use --provider cpu, or {_DOCTOR}",
        )
    return session


def session_options() -> onnxruntime.SessionOptions:
    """What every session has: silence, threads that sleep after a run, and memory that is given back."""
    options: onnxruntime.SessionOptions = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    # Four sessions take turns: threads of one that spin after its run would take the cores from the next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The arena doubles what it takes and gives nothing back: two pictures of Stable Diffusion 1.5's shapes at 512
    # pixels left 15.2 GiB held. Without it the peak is 8.6, between pictures only weights are held, and it is as fast.
    options.enable_cpu_mem_arena = False
    return options


def session_source(path: Path, options: onnxruntime.SessionOptions) -> Path | bytes:
    """The graph in ``path`` as a session with ``options`` is given it: its self-attentions as one operator each."""
    fused = with_fused_attention(path)
    if fused is None:
        return path
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return fused


def run_session(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, np.ndarray | onnxruntime.OrtValue],
    provider: Provider,
    *,
    options: onnxruntime.RunOptions | None = None,
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
    session.run_with_iobinding(binding, options)
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


def _options(provider: Provider, *, graphs: bool = False) -> dict[str, Any]:
    """What each provider is told."""
    if provider.name == "cuda":
        # Without TF32 an export in fp32 computes in fp32, as engines do, which are compared with it.
        told = {
            "cudnn_conv_algo_search": "EXHAUSTIVE" if provider.cuda.search else "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        if provider.cuda.nhwc:
            told["prefer_nhwc"] = "1"
        if provider.cuda.memory_bytes is not None:
            told["gpu_mem_limit"] = str(provider.cuda.memory_bytes)
        if graphs:
            told["enable_cuda_graph"] = "1"
        return told
    if provider.name == "tensorrt":
        cache = user_cache() / "onnxruntime-tensorrt"
        cache.mkdir(parents=True, exist_ok=True)
        return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache), "trt_timing_cache_enable": True}
    return {}


def _placed(ort: Any, value: Any, device: str) -> Any:
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value, device, 0)
