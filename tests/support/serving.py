"""A server for the tests: the whole application on a free port, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from tiue_cli.generate.config import GenerateConfig
from tiue_cli.serve.app import create_app
from tiue_cli.serve.config import ServeConfig
from tiue_cli.serve.engine import Engine
from tiue_cli.serve.run import _listen
from tiue_cli.serve.service import Service


@dataclass
class Running:
    """A server that answers at ``url``; ``lines`` are what it has logged."""

    url: str
    service: Service
    lines: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_server(
    model: Path | str, *, keys: tuple[bytes, ...] = (), engine: Any = None, **options: Any
) -> Iterator[Running]:
    """Serve ``model`` until the block ends; ``options`` are ServeConfig's."""
    config = ServeConfig(draw=GenerateConfig(model=str(model)), port=0, **options)
    lines: list[str] = []
    listener = _listen(config)
    opened = Engine(config.draw, teacher=config.teacher, lora_dir=config.lora_dir) if engine is None else engine
    app, service = create_app(opened, config, keys=keys, log=lines.append)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: service.ready, "the server is ready", lines)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, lines)
    finally:
        server.should_exit = True
        thread.join(30)


def wait_for(condition: Any, what: str, lines: list[str] | None = None, *, seconds: float = 60.0) -> None:
    """Return once ``condition()`` is true; fail after ``seconds``."""
    until_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until_s, f"{what}: not within {seconds} s {lines or ''}"
        time.sleep(0.01)
