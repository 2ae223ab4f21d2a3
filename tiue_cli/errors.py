"""What can go wrong, as a tree.

    TiueError                     exit 1
    ├── UsageError                exit 2: the command line or a call asks for something impossible
    ├── ModelFolderError          a model folder or hub id that cannot be used
    ├── AdapterError              a LoRA that cannot be used, or not with this model
    ├── ManifestError             a manifest (tiue.json, manifest.json, engine.json) that cannot be read
    ├── SchedulerError            a scheduler config that the one-pass formula does not cover
    ├── PromptError               a prompt or a prompt file that cannot be used
    ├── AccessError               a file or folder that is there and cannot be read
    ├── OutputError               something cannot be written
    │   └── TakenError            because something else bears its name
    ├── DeviceError               a device or precision that this machine does not have
    │   └── OutOfMemoryError      its memory does not suffice
    ├── MissingDependencyError    an optional package is not installed
    ├── ProfileError              a request outside an engine's range
    ├── ParityError               an exported graph that does not equal its source
    └── QualityError              images or features that quality cannot be measured on

Every error says what is wrong and where (``message``) and what to do next (``hint``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar


class TiueError(Exception):
    """A failure that the user can understand and act on; everything else is a bug of ours."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = _bounded(message)
        self.hint = None if hint is None else _bounded(hint, limit=MAX_HINT)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} ({self.hint})"

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds from args alone, which a keyword-only hint does not survive (worker processes).
        return (_rebuild, (type(self), self.message, self.hint))


MAX_MESSAGE = 1200
"""Characters of a message; the readers already shorten what they quote."""
MAX_HINT = 1600
"""Characters of a hint: the names of all settings fit."""


def _bounded(text: str, *, limit: int = MAX_MESSAGE) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 3 :]}"


def _rebuild(type_: type[TiueError], message: str, hint: str | None) -> TiueError:
    return type_(message, hint=hint)


class UsageError(TiueError):
    """The command line or a call asks for something impossible; nothing was tried."""

    exit_code: ClassVar[int] = 2


class ModelFolderError(TiueError):
    """A model folder or hub id cannot be used."""


class AdapterError(TiueError):
    """A LoRA cannot be used, or not with this model."""


class ManifestError(TiueError):
    """A manifest is missing, malformed, or of another format version."""


class SchedulerError(TiueError):
    """A scheduler config that the one-pass formula does not cover."""


class PromptError(TiueError):
    """A prompt or a prompt file cannot be used."""


class AccessError(TiueError):
    """A file or folder cannot be looked at or read."""


class OutputError(TiueError):
    """A file or folder cannot be written."""


class TakenError(OutputError):
    """Something else bears the name that was to be written, and may not be replaced."""


class DeviceError(TiueError):
    """A device or precision that this machine does not have."""


class OutOfMemoryError(DeviceError):
    """The memory of a device does not suffice for what was asked; less at once may fit."""


class MissingDependencyError(TiueError):
    """An optional package is not installed."""


class ProfileError(TiueError):
    """A request lies outside the range an engine was built for."""


class ParityError(TiueError):
    """An exported graph does not compute what its source computes."""


class QualityError(TiueError):
    """Images, references or features that quality cannot be measured on."""


# --- a runtime installation ----------------------------------------------------------------------------------------

FULL_INSTALLATION = frozenset(
    {
        "accelerate",
        "diffusers",
        "matplotlib",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "peft",
        "torch",
        "torchmetrics",
        "transformers",
    }
)
"""Libraries that running an export does not need; a server may be without them (``requirements/runtime.txt``)."""


@contextlib.contextmanager
def full_installation(what: str) -> Iterator[None]:
    """Turn the absence of such a library inside the block into MissingDependencyError: ``what`` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in FULL_INSTALLATION:
            raise
        raise MissingDependencyError(
            f"{what} needs {library}, and this is a runtime installation: it draws from exports",
            hint="install the rest: python -m pip install tiue",
        ) from error
