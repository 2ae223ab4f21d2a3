"""Where tiue keeps what can be made again: text states, timing caches of compilers."""

from __future__ import annotations

import os
from pathlib import Path

from tiue_cli.errors import AccessError


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/tiue``, or ``~/.cache/tiue``; a relative XDG_CACHE_HOME counts as none, as its standard says.

    Raises AccessError.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path("~/.cache")
    try:
        return base.expanduser() / "tiue"
    except RuntimeError:
        raise AccessError("there is no home folder to keep caches in", hint="set XDG_CACHE_HOME") from None
