"""Work that is launched once and replayed: CUDA graphs over static memory, a few at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

_WARM_UP = 2
"""Plain runs before a capture: kernels are compiled, workspaces allocated and algorithms chosen in them."""

_Entry = TypeVar("_Entry")


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


class FewEntries(Generic[_Entry]):
    """The entries that were used last, at most ``capacity``; others are dropped, and made anew when asked for."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1, "one entry at least"
        self._capacity = capacity
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Entry]) -> _Entry:
        """The entry of ``key``, made where it is not there; the oldest one goes first, as it may hold memory."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        while len(self._entries) >= self._capacity:
            self._entries.popitem(last=False)
        self._entries[key] = entry = make()
        return entry

    def clear(self) -> None:
        """Drop all."""
        self._entries.clear()

    @property
    def keys(self) -> Sequence[Hashable]:
        """Of the entries, the oldest first."""
        return tuple(self._entries)
