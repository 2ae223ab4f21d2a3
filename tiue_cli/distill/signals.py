"""SIGINT and SIGTERM as a wish: the step is finished and saved. Another SIGINT later interrupts at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_S = 1.0
"""A worker gets one Ctrl-C twice, from the terminal and from its launcher, at once; a person is slower."""


class StopRequest:
    """True once a signal came; used with ``with``, which puts the old handlers back."""

    def __init__(self) -> None:
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
            self._requested_s = now_s
        elif number == signal.SIGINT and now_s - self._requested_s >= _AGAIN_S:
            raise KeyboardInterrupt
