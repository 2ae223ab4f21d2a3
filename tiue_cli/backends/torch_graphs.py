"""Work that is launched once and replayed: CUDA graphs over static memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 2
"""Plain runs before a capture: kernels are compiled, workspaces allocated and algorithms chosen in them."""


class Captured:
    """A function's launches, recorded; each ``__call__`` repeats them on the same memory.

    The function takes nothing: it reads tensors that stay where they are, and what it keeps of its results stays too.
    ``__init__`` runs it plainly first, then records it. Raises RuntimeError where it cannot be recorded (a copy from
    the host or a wait inside), torch.OutOfMemoryError where memory ends; the device can be used after either.
    """

    def __init__(self, function: Callable[[], None], *, pool: Any = None) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on with the device meanwhile: what they do is none of this graph.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                function()
        except RuntimeError:
            torch.cuda.synchronize()
            raise

    def __call__(self) -> None:
        """Launch it all."""
        self._graph.replay()
