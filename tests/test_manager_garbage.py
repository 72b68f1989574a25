"""A manager looks for garbage by a schedule of its own: all of it is found, what was looked at once isn't again."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from rfaas_mpi.manager import garbage
from rfaas_mpi.manager.garbage import LEAST, Growth, collecting

GUARD_S = 60.0


class Cycle:
    def __init__(self) -> None:
        self.me = self


async def gone(reference: weakref.ref[Cycle]) -> None:
    async with asyncio.timeout(GUARD_S):
        while reference() is not None:
            await asyncio.sleep(0.01)


def test_cycles_are_found_without_pythons_own_collector() -> None:
    async def main() -> None:
        with collecting():
            assert not gc.isenabled()
            await gone(weakref.ref(Cycle()))

    asyncio.run(main())


def test_a_cycle_that_was_put_aside_is_found_once_there_is_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "LEAST", 1000)
    monkeypatch.setattr(garbage, "SHARE", 0.0)

    async def main() -> None:
        with collecting():
            cycle = Cycle()
            reference = weakref.ref(cycle)
            async with asyncio.timeout(GUARD_S):
                # Looked at while it lives: it is among those put aside.
                while any(one is cycle for one in gc.get_objects()):
                    await asyncio.sleep(0.01)
            del cycle
            more = [[number] for number in range(5000)]
            await gone(reference)
            assert len(more) == 5000

    asyncio.run(main())


def test_the_collector_is_as_before_afterwards() -> None:
    async def main() -> None:
        with collecting():
            await asyncio.sleep(0)

    asyncio.run(main())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_full_pass_is_due_when_there_is_twice_as_much() -> None:
    growth = Growth(10 * LEAST)
    assert not growth.due(19 * LEAST)
    assert growth.due(20 * LEAST + 1)


def test_a_little_more_of_a_little_makes_no_full_pass_due() -> None:
    growth = Growth(0)
    assert not growth.due(LEAST)
    assert growth.due(LEAST + 1)
