"""Accelerate, set up from the config and from what ``accelerate launch`` said."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from tiue_cli.base.allocator import keep_freed_memory
from tiue_cli.distill.config import DistillConfig
from tiue_cli.errors import DeviceError, MissingDependencyError, UsageError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of frozen weights under Accelerate's names of mixed precision."""

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""One process may fill a cache for hours while the others wait."""


def make_accelerator(config: DistillConfig, *, logs: Path) -> Accelerator:
    """The Accelerator of a run; trackers that write files do so in ``logs``.

    Raises UsageError for what Accelerate refuses, DeviceError for fp16 on a CPU, MissingDependencyError for a tracker
    that is not installed.
    """
    trackers = chosen_trackers(config)
    _refuse_lost_processes()
    # Without a GPU Accelerate sees the other processes of torchrun only when it is told of the CPU.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    if several_on_cpu:
        # Of convolutions of one pixel, whose strides are equal but for a name.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        accelerator = Accelerator(
            cpu=several_on_cpu,
            mixed_precision=chosen_precision(config),
            log_with=list(trackers) or None,
            project_dir=logs,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"accelerate refuses these settings: {error}", hint="see precision and tracking.trackers"
        ) from error
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise DeviceError("training in fp16 needs a GPU", hint="set precision=fp32 or bf16")
        keep_freed_memory()
    # Accelerate silently drops a tracker whose package is missing.
    missing = [name for name in trackers if name not in {str(found) for found in accelerator.log_with}]
    if missing:
        raise MissingDependencyError(
            f"tracking.trackers: {missing[0]} is not installed", hint=f"python -m pip install {missing[0]}"
        )
    return accelerator


def _refuse_lost_processes() -> None:
    """``accelerate launch --cpu`` starts one process however many it was asked for, unless mpirun starts the others."""
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    asked_for_several = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()
    if asked_for_several and not any(name in os.environ for name in counts):
        raise UsageError(
            "accelerate launch was asked for several processes and has started one, as it does with --cpu",
            hint="let tiue start it: tiue distill ... --launch -- --cpu --num_processes N",
        )


def chosen_precision(config: DistillConfig) -> str | None:
    """Accelerate's name of the mixed precision; None leaves it to what ``accelerate launch`` was told."""
    if config.precision != "auto":
        return _PRECISIONS[config.precision]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def effective_precision(config: DistillConfig) -> str:
    """Accelerate's name of the mixed precision of a run in this process."""
    return chosen_precision(config) or os.environ["ACCELERATE_MIXED_PRECISION"]


def chosen_trackers(config: DistillConfig) -> tuple[str, ...]:
    """The trackers asked for; TensorBoard where none were and it is installed."""
    if config.tracking.trackers is not None:
        return config.tracking.trackers
    return ("tensorboard",) if importlib.util.find_spec("tensorboard") is not None else ()


def describe(accelerator: Accelerator, config: DistillConfig) -> str:
    """One sentence: processes, device, precision, trackers, and where the choices come from."""
    processes = accelerator.num_processes
    if config.precision != "auto":
        origin = "from precision"
    else:
        origin = "from accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "chosen for this device"
    words = [
        f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}",
        f"mixed precision {accelerator.mixed_precision} ({origin})",
    ]
    if trackers := chosen_trackers(config):
        words.append(f"tracked by {', '.join(trackers)}")
    return ", ".join(words)


def log_image(accelerator: Accelerator, name: str, pixels: np.ndarray, *, step: int) -> None:
    """Give pixels (H, W, 3) uint8 to every tracker that takes images. Accelerate passes on what each library wants."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            one = tracker.name in ("aim", "clearml")
            tracker.log_images({name: pixels if one else [pixels]}, step=step)


def memory_bytes() -> int:
    """The most that this process has had: on the GPU where it trains on one, else in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    result: int = psutil.Process().memory_info().rss
    return result


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


_AGAIN_S = 1.0
"""A worker gets one Ctrl-C twice, from the terminal and from its launcher, at once; a person is slower."""


class StopRequest:
    """True once a signal came; used with ``with``, which puts the old handlers back.

    ``acknowledge`` is called at once, inside the signal handler: it may do nothing but write to a descriptor.
    """

    def __init__(self, acknowledge: Callable[[], None] | None = None) -> None:
        self.signal: int | None = None
        """The first that came."""
        self._acknowledge = acknowledge
        self._requested_s: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self._requested_s is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._requested_s is None:
            self._requested_s, self.signal = now_s, number
            if self._acknowledge is not None:
                self._acknowledge()
        elif number == signal.SIGINT and now_s - self._requested_s >= _AGAIN_S:
            raise KeyboardInterrupt
