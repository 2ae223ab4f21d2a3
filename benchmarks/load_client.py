"""A lean HTTP/1.1 client for load: kept connections, answers with a Content-Length, nothing else.

httpx takes milliseconds of processor time a request, which on a machine that server and clients share would be
measured as the server's.
"""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import Self

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Connection:
    """One kept connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """(status, body) of the answer to JSON. Raises OSError, EOFError, ValueError."""
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        return await self._exchange(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def get(self, path: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError, EOFError, ValueError."""
        return await self._exchange(f"GET {path} HTTP/1.1\r\nhost: {self._host}\r\n\r\n".encode())

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def _exchange(self, request: bytes) -> tuple[int, bytes]:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1.1 "):
            raise ValueError("not an answer with a length")
        return int(head[9:12]), await self._reader.readexactly(int(length[1]))


class Connections:
    """Connections to one server, opened as they are needed and used again."""

    def __init__(self, host: str, port: int) -> None:
        """Nothing is opened yet."""
        self._host, self._port = host, port
        self._idle: list[Connection] = []
        self._all: list[Connection] = []

    async def take(self) -> Connection:
        """One that nobody uses. Raises OSError."""
        if self._idle:
            return self._idle.pop()
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=2**22)
        connection = Connection(reader, writer, f"{self._host}:{self._port}")
        self._all.append(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """It may be taken again."""
        self._idle.append(connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._all:
            connection.close()
