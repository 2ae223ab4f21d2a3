"""Failures in OpenAI's form, ``{"error": {"message", "type", "param", "code"}}``, and nothing of the inside.

| status | when |
|---|---|
| 400 | a field that cannot be |
| 401 | no key, or a wrong one |
| 404 | an unknown model or path |
| 413 | a body beyond the limit |
| 429 | the queue is full; ``Retry-After`` says when to come again |
| 503 | not ready yet, or shutting down |
| 504 | it took longer than ``--timeout-s`` |
| 507 | the device's memory did not suffice |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

from tiue_cli.errors import OutOfMemoryError, ProfileError, PromptError, TiueError, UsageError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestFailure(Exception):
    """An answer that is an error. ``param`` is the field that caused it, ``code`` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


def failure_response(failure: RequestFailure) -> Response:
    """The failure as a response."""
    kind = _TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "server_error")
    error = {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}
    return json_response({"error": error}, status=failure.status, headers=failure.headers)


def json_response(data: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Compact ASCII JSON: plain ``json`` is faster here than going through a response model."""
    body = json.dumps(data, separators=(",", ":"))
    return Response(body, status_code=status, headers=dict(headers or {}), media_type="application/json")


def from_tiue_error(error: TiueError, *, param: str | None = None) -> RequestFailure:
    """An error of drawing as a failure: the client's own is said in full, ours in one sentence without paths."""
    if isinstance(error, (UsageError, PromptError, ProfileError)):
        return RequestFailure(400, error.message, code="invalid_value", param=param)
    if isinstance(error, OutOfMemoryError):
        return RequestFailure(
            507,
            "the memory of the device did not suffice for this batch; ask for fewer or smaller images",
            code="out_of_memory",
        )
    return RequestFailure(500, "the model failed to draw this", code="model_failed")


def queue_full(retry_after_s: float) -> RequestFailure:
    """429: come again in about ``retry_after_s``."""
    seconds = max(1, math.ceil(retry_after_s))
    return RequestFailure(
        429, f"the queue is full; try again in {seconds} s", code="queue_full", headers={"Retry-After": str(seconds)}
    )


def not_ready(reason: str) -> RequestFailure:
    """503, for a server that is starting or stopping."""
    return RequestFailure(503, f"the server is {reason}", code="not_ready", headers={"Retry-After": "2"})
