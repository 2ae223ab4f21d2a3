"""A few entries that are costly to make and to hold, by what they were made for: the least recently used makes way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

_Entry = TypeVar("_Entry")


class FewEntries(Generic[_Entry]):
    """The entries that were used last, at most ``capacity``; others are dropped, and made anew when asked for."""

    def __init__(self, capacity: int, *, drop: Callable[[_Entry], None] | None = None) -> None:
        """``drop`` is called with each entry that goes."""
        assert capacity >= 1, "one entry at least"
        self._capacity = capacity
        self._drop = drop
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Entry]) -> _Entry:
        """The entry of ``key``, made where it is not there; the oldest one goes first, as it may hold memory."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        while len(self._entries) >= self._capacity:
            self._forget_oldest()
        self._entries[key] = entry = make()
        return entry

    def clear(self) -> None:
        """Drop all."""
        while self._entries:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        if self._drop is not None:
            self._drop(entry)

    @property
    def keys(self) -> Sequence[Hashable]:
        """Of the entries, the oldest first."""
        return tuple(self._entries)
