"""``tiue serve`` as a process: it says where it listens, drains at SIGTERM, ends with 0, and fails in two lines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import wait_for

from tiue_cli.cli.app import main
from tiue_cli.errors import UsageError
from tiue_cli.serve.config import ServeConfig
from tiue_cli.serve.run import _listen

BODY_SENT = "send_request_body.complete"


@contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "tiue_cli", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_status_is_zero(tiny_export: Path, stop: signal.Signals) -> None:
    with command(str(tiny_export), "--port", "0", "--max-batch", "1", "--max-wait-ms", "0") as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/healthz").status_code == 200
        wait_for(lambda: is_ready(url), "ready")
        answers: list[int] = []
        sent: list[str] = []

        def ask() -> None:
            body = {"prompt": "a", "n": 10, "size": "64x64"}
            with httpx.Client(base_url=url, timeout=60) as http:
                # Its connection is the server's before the signal: one that comes later is refused, as it should be.
                http.get("/healthz")
                trace = {"trace": lambda event, _: sent.append(event) if event.endswith(BODY_SENT) else None}
                answers.append(http.post("/v1/images/generations", json=body, extensions=trace).status_code)

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        wait_for(lambda: len(sent) == 8, "all have asked")
        wait_for(lambda: "tiue_queue_requests 0.0" not in httpx.get(f"{url}/metrics").text or answers, "work waits")
        process.send_signal(stop)
        assert process.wait(60) == 0
        for client in clients:
            client.join(60)
        assert len(answers) == 8 and set(answers) <= {200, 503} and 200 in answers
        _, err = process.communicate()
        assert "stopping" in err and "Traceback" not in err


def test_a_taken_port_takes_two_lines(tiny_export: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with command(str(tiny_export), "--port", str(taken.getsockname()[1])) as process:
            _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "is in use" in err and "--port" in err


@pytest.mark.parametrize(
    ("words", "status", "said"), [(["nowhere/at/all"], 1, "error:"), (["--host", "0.0.0.0"], 2, "--api-key-file")]
)
def test_what_cannot_be_served_is_refused_at_once(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("error:") and said in shown and len(shown.splitlines()) == 2


def test_times_and_hosts_that_cannot_be_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--timeout-s nan"):
        ServeConfig(timeout_s=float("nan")).validate()
    with pytest.raises(UsageError, match="no address of this machine"):
        _listen(ServeConfig(host="a" * 70, port=0, no_auth=True))
