"""Where the time of a pass goes, told to whoever listens: the server's ``/metrics`` do.

As with tracing, the listener is ambient: backends name their stages, callers between them and the listener know
nothing of it, and where nobody listens nothing is measured. A pass that is captured on a GPU runs as one and has no
stages to tell apart from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Final

from tiue_cli.files.exports import GraphName

StageListener = Callable[[GraphName, float], None]
"""Called with a stage and the seconds that it took for a batch, in the thread that draws."""

_listener: ContextVar[StageListener | None] = ContextVar("stage_listener", default=None)


@contextmanager
def listening(listener: StageListener) -> Iterator[None]:
    """Tell ``listener`` of every stage that this thread runs inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class ToldStages:
    """Stages of a prepared pass, told to whoever listens by the names of their graphs."""

    _GRAPHS: Final[Mapping[str, GraphName]] = {
        "text": "text_encoder",
        "unet_encoder": "unet_encoder",
        "unet_decoder": "unet_decoder",
        "vae": "vae_decoder",
    }

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the block."""
        return timed_stage(self._GRAPHS[name])


@contextmanager
def timed_stage(name: GraphName) -> Iterator[None]:
    """A stage of a pass; one that fails is not told."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    started_s = time.perf_counter()
    yield
    listener(name, time.perf_counter() - started_s)
