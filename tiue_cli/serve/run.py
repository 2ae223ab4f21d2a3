"""Listen, serve, and stop well: SIGTERM and Ctrl-C finish what has begun and end with status 0."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from tiue_cli.errors import OutputError, TiueError, UsageError
from tiue_cli.serve.app import create_app
from tiue_cli.serve.config import ServeConfig
from tiue_cli.serve.engine import Engine
from tiue_cli.serve.security import read_keys
from tiue_cli.serve.service import Service

BACKLOG = 2048
MOST_CONNECTIONS = 2048


class _Server(uvicorn.Server):
    """uvicorn, without its habit of dying of the signal that it has just handled well."""

    def __init__(self, config: uvicorn.Config, *, service: Service, log: Callable[[str], None]) -> None:
        super().__init__(config)
        self._service = service
        self._log = log

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second Ctrl-C: at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit:
            self._service.draining = True
            self._log(f"stopping: {self._service.batcher.busy} images are still to be drawn")
        self.should_exit = True


def serve(config: ServeConfig, *, log: Callable[[str], None], on_listen: Callable[[str], None]) -> None:
    """Serve until a signal. ``on_listen`` is called with the URL once the port is open, before the model is loaded.

    Raises UsageError for what ``config`` cannot be, OutputError for a port that is taken, and what opening the model
    raises.
    """
    config.validate()
    keys = () if config.api_key_file is None else read_keys(config.api_key_file)
    engine = Engine(config.draw, teacher=config.teacher, lora_dir=config.lora_dir)
    listener = _listen(config)
    app, service = create_app(engine, config, keys=keys, log=log)
    asyncio.run(_serve(app, service, config, listener, log=log, on_listen=on_listen))
    if service.failed is not None:
        raise TiueError(f"the model cannot be served: {service.failed}", hint="try it with tiue generate")


async def _serve(
    app: ASGIApp,
    service: Service,
    config: ServeConfig,
    listener: socket.socket,
    *,
    log: Callable[[str], None],
    on_listen: Callable[[str], None],
) -> None:
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(config.timeout_s)),
        lifespan="on",
        ws="none",
    )
    server = _Server(settings, service=service, log=log)
    host, port = listener.getsockname()[:2]
    on_listen(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    watcher = asyncio.create_task(_stop_where_loading_failed(server, service))
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()


async def _stop_where_loading_failed(server: uvicorn.Server, service: Service) -> None:
    while service.failed is None:
        await asyncio.sleep(0.2)
    server.should_exit = True


def _listen(config: ServeConfig) -> socket.socket:
    """The open port; 0 takes a free one. Raises UsageError or OutputError."""
    try:
        infos = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):  # the latter for labels that no name can have
        raise UsageError(
            f"--host {config.host} is no address of this machine", hint="give 127.0.0.1 or 0.0.0.0"
        ) from None
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OutputError(
                f"port {config.port} is in use", hint=f"give another: --port {min(65535, config.port + 1)}"
            ) from None
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot listen on {config.host}:{config.port}: {reason}", hint="give another --host or --port"
        ) from None
    listener.listen(BACKLOG)
    return listener
