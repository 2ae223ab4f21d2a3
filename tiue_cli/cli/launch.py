"""``tiue distill --launch``: the same request in the processes that ``accelerate launch`` starts.

tiue --launch ─ launch() ─▶ python -m tiue_cli.cli.launch ─ accelerate ─▶ workers: python -m tiue_cli distill …

The launcher has a session of its own, so that Ctrl-C does not reach it: it would kill the workers while they save. The
first process passes SIGINT, SIGTERM and SIGHUP on to the workers instead, which agree among each other and end well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from tiue_cli.cli.console import show_error
from tiue_cli.errors import TiueError, UsageError

ACCELERATE_ARGS = "TIUE_ACCELERATE_ARGS"
"""Environment variable of the workers: what stood after ``--launch --``, for the command that resumes the run."""

_PASSED_ON = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_WORKER = ["-m", "tiue_cli", "distill"]
_POLL_S = 0.2


class WorkerError(TiueError):
    """A worker process died without a message."""


def launcher_arguments(accelerate_args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The options for accelerate, and what is added to its environment.

    Accelerate starts one process where it is told ``--cpu``, however many were asked for, and leaves the others to
    mpirun. Without mpirun several are started as for several GPUs, and kept on the CPU by the environment.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    parser.add_argument("--mpirun_hostfile", "--mpirun-hostfile")
    try:
        known, _ = parser.parse_known_args(list(accelerate_args))
    except argparse.ArgumentError as error:
        raise UsageError(
            f"--launch -- {shlex.join(accelerate_args)}: {error}", hint="accelerate launch --help"
        ) from None
    if not known.cpu or known.num_processes < 2 or known.mpirun_hostfile is not None:
        return list(accelerate_args), {}
    words = ["--multi_gpu" if word == "--cpu" else word for word in accelerate_args]
    return words, {"ACCELERATE_USE_CPU": "true"}


def command_line(words: Sequence[str], environment: dict[str, str], request: Sequence[str]) -> str:
    """What a person would type for the same."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return shlex.join([*settings, "accelerate", "launch", *words, *_WORKER, *request])


def launch(words: Sequence[str], environment: dict[str, str], request: Sequence[str]) -> int:
    """Run the workers to their end and return the exit status; signals are passed on to them."""
    command = [sys.executable, "-m", "tiue_cli.cli.launch", *words, *_WORKER, *request]
    pending: list[int] = []
    with (
        _collected(pending),
        subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True) as process,
    ):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
            if pending and _send(process.pid, pending[0]):
                pending.pop(0)


@contextlib.contextmanager
def _collected(pending: list[int]) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        # A terminal that was closed asks to stop like any other signal.
        pending.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(launcher: int, number: int) -> bool:
    """Send a signal to the workers below the launcher; False where there are none yet."""
    import psutil

    found = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _is_worker(process.cmdline()):
                    process.send_signal(number)
                    found = True
    return found


def _is_worker(command: Sequence[str]) -> bool:
    if "tiue_cli.cli.launch" in command or _WORKER[0] not in command:
        return False
    start = command.index(_WORKER[0])
    return list(command[start : start + len(_WORKER)]) == _WORKER


def main() -> int:
    """``accelerate launch``, without its traceback where a worker has said itself what is wrong."""
    import logging

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except subprocess.CalledProcessError as error:
        return _status(0, error.returncode)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        return _status(first.local_rank, first.exitcode)
    return 0


def _status(worker: int, status: int) -> int:
    if status > 0:
        return status
    raise WorkerError(
        f"worker {worker} was killed by signal {-status}",
        hint="SIGKILL (9) is often the system running out of memory; continue with --resume",
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TiueError as error:
        show_error(error)
        sys.exit(error.exit_code)
