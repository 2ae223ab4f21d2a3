"""What else the machine did while it was measured: other processes, a hypervisor's theft, a clock that sinks."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import psutil
import torch
from torch.nn.functional import conv2d

from tiue_cli.base.machine import machine_info, package_version
from tiue_cli.bench.measure.clock import run_ms
from tiue_cli.bench.report.schema import MachineRecord, PeakKernel, PeakRecord
from tiue_cli.bench.stats import drift, summarize
from tiue_cli.bench.subjects.models import DTYPES

BUSY_SHARE: Final = 0.05
"""Of the machine's processor time that others may use before it is said."""
STOLEN_SHARE: Final = 0.01
DRIFT: Final = 0.05
"""Change of the control product's time from the first third of the rounds to the last."""
UNSTEADY: Final = 1.3
"""Its 90th percentile as a multiple of its median."""

_LEAST_CONTROLS: Final = 6


class Control:
    """One fixed matrix product, timed at the begin of each round: what changes in it is the machine.

    The fastest of REPEATS, as the first one finds caches full of a model and its threads asleep.
    """

    REPEATS: Final = 3

    def __init__(self, device: str) -> None:
        self._device = device
        self._product = _square({"cpu": 512, "cuda": 4096}[device], device, "fp16" if device == "cuda" else "fp32")
        self.run_ms()

    def run_ms(self) -> float:
        """Milliseconds of one product."""
        return min(run_ms(self._product, self._device) for _ in range(self.REPEATS))


@dataclass(frozen=True)
class MachineUse:
    """Shares, 0 to 1, of the machine's processor time during the rounds; None where the system does not say."""

    wall_s: float
    others: float | None
    stolen: float | None


@contextlib.contextmanager
def watch_machine() -> Iterator[Callable[[], MachineUse]]:
    """Watch the block; the function that is yielded says afterwards what else ran."""
    process = psutil.Process()
    system, own, started = psutil.cpu_times(), process.cpu_times(), time.perf_counter()
    result: list[MachineUse] = []
    yield lambda: result[0]
    wall_s = time.perf_counter() - started
    system_after, own_after = psutil.cpu_times(), process.cpu_times()
    spent = {name: getattr(system_after, name) - getattr(system, name) for name in system._fields}
    # Guests are counted within user time as well.
    total = sum(value for name, value in spent.items() if not name.startswith("guest"))
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    stolen = spent.get("steal")
    ours = (own_after.user + own_after.system) - (own.user + own.system)
    if total <= 0:
        result.append(MachineUse(wall_s, None, None))
        return
    others = (total - idle - (stolen or 0.0) - ours) / total
    result.append(MachineUse(wall_s, max(0.0, others), None if stolen is None else max(0.0, stolen / total)))


def machine_warnings(use: MachineUse, control_ms: Sequence[float], *, where: str) -> list[str]:
    """Sentences on what makes the figures of ``where`` less believable; empty on a quiet machine."""
    found = []
    if use.others is not None and use.others > BUSY_SHARE:
        found.append(f"{where}: the machine was busy: other processes used {use.others:.0%} of its processor time")
    if use.stolen is not None and use.stolen > STOLEN_SHARE:
        found.append(f"{where}: the hypervisor took {use.stolen:.0%} of the processor time for other guests")
    if len(control_ms) >= _LEAST_CONTROLS:
        changed = drift(control_ms)
        if abs(changed) > DRIFT:
            how = "slower: it throttled, or others ran" if changed > 0 else "faster"
            found.append(
                f"{where}: a fixed matrix product became {abs(changed):.0%} {how} from the first rounds to the last"
            )
        figures = summarize(control_ms)
        if figures.p90 > UNSTEADY * figures.median:
            found.append(
                f"{where}: the machine was unsteady: a fixed matrix product took {figures.median:.2f} ms in the"
                f" median and {figures.p90:.2f} ms in every tenth round"
            )
    return found


# --- what it is ----------------------------------------------------------------------------------------------------

PACKAGES: Final = ("onnxruntime-gpu", "onnxruntime", "tensorrt", "accelerate", "scipy")
"""Whose versions a bench shows beside those that can change a picture."""
_LONGEST_NAME: Final = 80
_GIT_TIMEOUT_S: Final = 15.0


def machine_record(device: str) -> MachineRecord:
    """This machine; it is named after the GPU where that is what ran."""
    info = machine_info()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    extra = {name: version for name in PACKAGES if (version := package_version(name)) is not None}
    return MachineRecord(
        name=slug(gpu) if gpu is not None else f"{slug(_short_cpu(info.cpu))}-{info.cores}-cores",
        system=info.system,
        cpu=info.cpu,
        cores=info.cores,
        threads=torch.get_num_threads(),
        memory_bytes=info.memory_bytes,
        gpu=gpu,
        driver=info.gpus[0].driver if gpu is not None and info.gpus else None,
        python=info.python,
        packages={**info.packages, **extra},
    )


def report_name(models: Sequence[str], machine: str, created: datetime.datetime, *, random_weights: bool) -> str:
    """``<model>_<machine>_<date>``, in letters that every file system takes."""
    names = "+".join(slug(model) for model in models)[:_LONGEST_NAME]
    return f"{names}{'-random' if random_weights else ''}_{machine}_{created:%Y-%m-%d}"


def source_commit() -> str | None:
    """The commit of the source tree that runs, with ``+`` where its code was changed since; None outside of one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "tiue_cli")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def slug(text: str) -> str:
    """Lower-case letters, digits and dots, hyphens between."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def _short_cpu(name: str) -> str:
    """``Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz`` → ``Intel Xeon Platinum 8481C``."""
    bare = re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*$|\b\d+-Core\b", " ", name, flags=re.IGNORECASE)
    return " ".join(bare.split()[:4])


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout.strip()


# --- its peak ------------------------------------------------------------------------------------------------------

SIDES: Final = {"cpu": (512, 1024, 1536, 2048), "cuda": (2048, 4096, 8192, 16384)}
"""Square products that are tried: the fastest counts, as caches and tiles favour different ones."""
CONVOLUTION: Final = (64, 64, 320)
"""Height, width and channels of a 3x3 convolution that is tried first on a CPU."""
SAMPLES: Final = 5
BUDGET_S: Final = 4.0

_Product = tuple[PeakKernel, tuple[int, int, int], Callable[[], torch.Tensor]]
"""One way to multiply matrices (M, L) and (L, N): its kernel, (M, L, N), and a function that does it."""


@torch.inference_mode()
def measure_peak(device: str, precision: Literal["fp32", "fp16", "bf16"], *, budget_s: float = BUDGET_S) -> PeakRecord:
    """The best rate of a large matrix product in ``precision``, over kernels, shapes and samples, in FLOP/s.

    In fp32 on a GPU as torch is set (``torch.backends.cuda.matmul.fp32_precision``), as the models run.
    """
    records: list[PeakRecord] = []
    started = time.perf_counter()
    for kernel, shape, product in _products(device, precision):
        product()
        samples = tuple(run_ms(product, device) for _ in range(SAMPLES))
        rate = 2.0 * math.prod(shape) / (min(samples) / 1000.0)
        records.append(
            PeakRecord(
                flops_per_s=rate, precision=precision, device=device, kernel=kernel, shape=shape, samples_ms=samples
            )
        )
        if time.perf_counter() - started > budget_s:
            break
    return max(records, key=lambda record: record.flops_per_s)


def _products(device: str, precision: str) -> Iterator[_Product]:
    """On a CPU convolutions too: another library computes them, and it may use instructions that torch.mm's does not.

    MKL, behind ``torch.mm``, leaves AMD's AVX-512 alone; oneDNN does not, and reaches twice the rate there. A ceiling
    that half of a model's layers break is none.
    """
    if device == "cpu":
        yield _convolution(*CONVOLUTION, side=3, precision=precision)
    for side in SIDES[device]:
        yield "matrix product", (side, side, side), _square(side, device, precision)
        if device == "cpu":
            yield _convolution(side // 32, 32, side, side=1, precision=precision)


def _square(side: int, device: str, precision: str) -> Callable[[], torch.Tensor]:
    """The product of two random matrices."""
    generator = torch.Generator(device).manual_seed(side)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(DTYPES[precision]) for _ in range(2))
    return partial(torch.mm, left, right)


def _convolution(height: int, width: int, channels: int, *, side: int, precision: str) -> _Product:
    weights = torch.randn(channels, channels, side, side, dtype=DTYPES[precision])
    image = torch.randn(1, channels, height, width, dtype=DTYPES[precision])
    run = partial(
        conv2d,
        image.to(memory_format=torch.channels_last),
        weights.to(memory_format=torch.channels_last),
        padding=side // 2,
    )
    kernel: PeakKernel = "1x1 convolution" if side == 1 else "3x3 convolution"
    return kernel, (height * width, channels * side * side, channels), run
