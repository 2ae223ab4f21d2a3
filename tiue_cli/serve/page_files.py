"""The page's files, read from the package once."""

from __future__ import annotations

import functools
from importlib.resources import files

from starlette.responses import Response

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


@functools.cache
def _read(name: str) -> bytes:
    return (files("tiue_cli.serve") / "page" / name).read_bytes()


def page_response(path: str) -> Response:
    """The file of the page at ``path``, one of ``/``, ``/page.css``, ``/page.js`` and ``/icon.svg``."""
    name, media_type = _FILES[path]
    return Response(_read(name), media_type=media_type)
