"""Who may ask, from where, and how much: one ASGI layer around the whole server, so that no route can forget it.

It also is the last resort: whatever fails inside is answered in OpenAI's form and logged by its kind and place alone,
for an exception's message may hold a prompt.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import traceback
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiue_cli.errors import UsageError
from tiue_cli.files.access import read_bytes
from tiue_cli.serve.config import BODY_TIMEOUT_S, MAX_BODY_BYTES, ServeConfig, is_loopback
from tiue_cli.serve.failures import RequestFailure, failure_response

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/page.css", "/page.js", "/icon.svg", "/openapi.json"})
"""Answered without a key: they tell nothing and cost nothing. An image's own URL is a secret by itself."""
OPEN_PREFIX = "/images/"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_SHORTEST_KEY = 16
_KEYS_BYTES = 2**20


def read_keys(path: Path) -> tuple[bytes, ...]:
    """SHA-256 of each key in ``path``, one a line; lines that begin with # are comments. Raises UsageError."""
    try:
        lines = read_bytes(path, error=UsageError, limit_bytes=_KEYS_BYTES).decode("utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        reason = "it does not exist" if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{path} cannot be read: {reason}", hint="give a text file with one key a line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise UsageError(f"{path} holds no key", hint=f"make one: openssl rand -hex 24 > {path}")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST_KEY:
            raise UsageError(
                f"key {number} in {path} is shorter than {_SHORTEST_KEY} characters",
                hint=f"make one that cannot be guessed: openssl rand -hex 24 > {path}",
            )
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Guard:
    """The outermost ASGI layer: keys, hosts, body limits, security headers, and the last resort for failures."""

    def __init__(
        self, app: ASGIApp, *, config: ServeConfig, keys: tuple[bytes, ...], log: Callable[[str], None]
    ) -> None:
        """``keys`` as ``read_keys`` gives them; none lets everybody in. ``log`` takes one line."""
        self._app = app
        self._keys = keys
        self._log = log
        self._own_hosts = not keys and config.loopback
        self._hosts = frozenset(host.lower() for host in config.allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not scope["path"].startswith(OPEN_PREFIX):
                    headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, await _whole_body(scope, receive), send_guarded)
        except RequestFailure as failure:
            await failure_response(failure)(scope, receive, send_guarded)
        except Exception as error:  # noqa: BLE001  (the last resort: a fault of ours must not show its inside)
            self._log(f"internal error: {_place(error)}")
            if not started:
                fault = RequestFailure(500, "something went wrong inside the server", code="internal_error")
                await failure_response(fault)(scope, receive, send_guarded)

    def _admit(self, scope: Scope) -> None:
        """Raise RequestFailure for whoever may not come in."""
        headers = Headers(scope=scope)
        if self._own_hosts:
            self._check_host(headers.get("host", ""))
        if scope["method"] == "POST":
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                # Also what makes a browser ask before a page elsewhere may send one.
                raise RequestFailure(415, "send JSON: Content-Type: application/json", code="unsupported_media_type")
        path: str = scope["path"]
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not self._keys or path in OPEN_PATHS or path.startswith(OPEN_PREFIX) or preflight:
            return
        given = _given_key(headers.get("authorization", ""))
        if given is None or not _is_one_of(given, self._keys):
            message = "a key is needed: Authorization: Bearer KEY" if given is None else "this key is not known"
            raise RequestFailure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_host(self, host: str) -> None:
        """A page elsewhere must not reach an open server on this machine through a name that it points here."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        if not (is_loopback(name) or name in self._hosts):
            raise RequestFailure(
                403,
                "this server answers to localhost only (tiue serve --allow-host NAME adds a name)",
                code="unknown_host",
            )


async def _whole_body(scope: Scope, receive: Receive) -> Receive:
    """Read the body within its limits and hand it on in one piece. Raises RequestFailure 408, 411 or 413."""
    if scope["method"] not in ("POST", "PUT", "PATCH"):
        return receive
    too_large = RequestFailure(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    length = Headers(scope=scope).get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    gone: Message | None = None
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    gone = message
                    break
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestFailure(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", code="body_timeout") from None
    handed = False

    async def replay() -> Message:
        nonlocal handed
        if gone is not None:
            return gone
        if not handed:
            handed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}
        return await receive()

    return replay


def _given_key(authorization: str) -> str | None:
    """The key of ``Bearer KEY``, or the password of ``Basic`` as A1111's front ends send it; None without one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
        except ValueError:
            return None
    return None


def _is_one_of(given: str, keys: tuple[bytes, ...]) -> bool:
    """Whether ``given`` is a key, in a time that depends on neither: hashes of one length, all of them compared."""
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(digest, key)
    return found


def _place(error: BaseException) -> str:
    """Kind of the error and the innermost line of ours, without its message."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tiue_cli" in frame.filename]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
