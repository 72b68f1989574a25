"""When a manager looks for garbage: often among what is new, and through all that it has only when that has grown.

Python's own collector looks through everything whenever a quarter more is there, which
stops a manager of a thousand agents for a tenth of a second. What has survived one look
is therefore put aside (`gc.freeze`); cycles that end after that are found by the next
full pass.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Growth", "collecting"]

EVERY_S = 0.5
LEAST = 50_000                   # objects more, before all of them are worth a look
SHARE = 0.25                     # likewise, of those that the last full pass left


class Growth:
    """When a full pass is due, pure. `aside` is how many objects the last one left."""

    def __init__(self, aside: int) -> None:
        self._aside = aside
        self._added = 0

    def add(self, survived: int) -> bool:
        """So many more were put aside; True if it is time to count what is left of all of them."""
        self._added += survived
        return self._added > self._much

    def due(self, now_aside: int) -> bool:
        """So many are left: True if that is so much more that a full pass is worth it. Counts anew if not."""
        if now_aside > self._aside + self._much:
            return True
        self._added = 0
        return False

    @property
    def _much(self) -> float:
        return max(LEAST, SHARE * self._aside)


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
        gc.collect()
        survived = len(gc.get_objects())
        gc.freeze()
        if growth.add(survived) and growth.due(gc.get_freeze_count()):
            growth = _full()


def _full() -> Growth:
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return Growth(gc.get_freeze_count())
