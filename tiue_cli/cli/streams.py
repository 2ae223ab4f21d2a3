"""Standard input, output and error as they come: closed, full, in an encoding without our characters, or hostile.

``prepare_streams`` is called once by the process; ``terminal`` makes the rich consoles that everything is shown with,
and is the one filter for what came from outside (a PNG, a manifest, a file name).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from tiue_cli.base.text import visible
from tiue_cli.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


def prepare_streams() -> None:
    """Open what is closed on the null device, escape what an encoding lacks, and turn a full disk into an error.

    A closed descriptor would otherwise go to the first file that is opened, and text meant for people into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for the rest of the process
    sys.stdout = _guarded(sys.stdout, 1, _Output)
    sys.stderr = _guarded(sys.stderr, 2, _Diagnostics)


def _guarded(stream: Any, number: int, class_: type[io.TextIOWrapper]) -> Any:
    if stream is None:
        return class_(open(number, "wb", closefd=False), encoding="utf-8", errors="backslashreplace")
    if type(stream) is not io.TextIOWrapper:  # somebody's stand-in
        return stream
    return class_(
        stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
    )


class _Output(io.TextIOWrapper):
    """Standard output. What cannot be written ends the command; a reader that went away is Python's own error."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            _give_up(self, error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            _give_up(self, error)


class _Diagnostics(io.TextIOWrapper):
    """Standard error. Where it cannot be written, the work continues all the same."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _give_up(stream: io.TextIOWrapper, error: OSError) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        raise error
    # What is still buffered must not fail once more when Python ends.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    raise OutputError(
        f"cannot write to standard output: {reason}", hint="send it to another place; files that were written stay"
    ) from error


def terminal(file: Any) -> RichConsole:
    """A rich console on ``file`` that shows no control character of what it is given, only its own."""
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment

    class _Terminal(RichConsole):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                safe = segment.text if segment.control else visible(segment.text)
                yield segment if safe == segment.text else Segment(safe, segment.style)

    return _Terminal(file=file, highlight=False, emoji=False, markup=False)
