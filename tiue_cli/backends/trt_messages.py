"""What TensorRT and Polygraphy say, collected: the worst of it becomes the text of an error, none of it is printed.

Python 3.9 reads this file too; see ``trt_runner``.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import deque
from typing import Any

from tiue_cli.errors import DeviceError, MissingDependencyError


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
        return [shortened(text) for level, text in self._lines if level >= logging.ERROR]

    def worst(self) -> str | None:
        """The first error, which is the cause of those that follow; None where there was none."""
        return next(iter(self.errors()), None)


def shortened(text: str, limit: int = 400) -> str:
    """One message without its mark of severity, cut to ``limit`` characters."""
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
