"""When a manager looks for garbage: often among what is new, and through all that it has only when that has doubled.

Python's own collector looks through everything whenever a quarter more is there, which
stops a manager of a thousand agents for a tenth of a second. What has survived one look
is therefore put aside (`gc.freeze`); cycles that end after that are found by the next
full pass. What there is in all is known by its pieces of memory: to count what was put
aside goes through all of it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Growth", "collecting"]

EVERY_S = 0.2
LEAST = 200_000                  # pieces of memory more, before all of them are worth a look
SHARE = 1.0                      # likewise, of those that the last full pass left
_NEW = 1                         # the generations that hold what was not put aside


class Growth:
    """When a full pass is due, pure. `left` is how many pieces of memory the last one left."""

    def __init__(self, left: int) -> None:
        self._most = left + max(LEAST, SHARE * left)

    def due(self, now: int) -> bool:
        """So many are there: True if that is so much more that a full pass is worth it."""
        return now > self._most


@contextmanager
def collecting() -> Iterator[None]:
    """Within it, with a loop that runs, garbage is looked for by this schedule and not by Python's own."""
    enabled = gc.isenabled()
    gc.disable()
    task = asyncio.get_running_loop().create_task(_collect())
    try:
        yield
    finally:
        task.cancel()
        gc.unfreeze()
        if enabled:
            gc.enable()


async def _collect() -> None:
    growth = _full()
    while True:
        await asyncio.sleep(EVERY_S)
        gc.collect(_NEW)
        gc.freeze()
        if growth.due(sys.getallocatedblocks()):
            growth = _full()


def _full() -> Growth:
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return Growth(sys.getallocatedblocks())
