"""Until when a node may be lent, where that is known: said by whoever knows, in any thread, heard by the agent."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Window"]

# What is said again differs by what clocks and their reading make of it.
_SAME_S = 0.5


class Window:
    """The end of a node's window, by time.monotonic; None: none is known. It may change at any time."""

    def __init__(self, ends: float | None = None) -> None:
        self._ends = ends
        self._heard: Callable[[], None] | None = None

    @property
    def ends(self) -> float | None:
        return self._ends

    def tell(self, ends: float | None) -> None:
        """It ends then."""
        before, self._ends = self._ends, ends
        if before is ends or (before is not None and ends is not None and abs(before - ends) < _SAME_S):
            self._ends = before
        elif self._heard is not None:
            self._heard()

    def tell_wall(self, epoch_s: float | None, sent_s: float | None = None) -> None:
        """It ends at this moment of the wall clock; whoever says so read `sent_s` on his own.

        Where clocks differ the earlier of both counts.
        """
        if epoch_s is None:
            self.tell(None)
        else:
            left_s = epoch_s - time.time()
            self.tell(time.monotonic() + (left_s if sent_s is None else min(left_s, epoch_s - sent_s)))

    def listen(self, heard: Callable[[], None]) -> None:
        """Called when it changes, in the thread that says so."""
        self._heard = heard
