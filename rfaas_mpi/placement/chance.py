"""Numbers by chance, from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["Chance"]

_64 = (1 << 64) - 1
_FACTOR = 6364136223846793005
_STEP = 1442695040888963407


class Chance:
    """Numbers by chance, from a seed: a generator that is made in less time than one decision takes.

    PCG's: a congruential generator modulo 2^64, its upper half mixed (O'Neill, PCG: A Family of Simple Fast
    Space-Efficient Statistically Good Algorithms for Random Number Generation, 2014).
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        state = (seed * 0x9E3779B97F4A7C15 + 0xDA3E39CB94B95BDB) & _64
        self._state = (state * _FACTOR + _STEP) & _64

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        state = self._state
        self._state = (state * _FACTOR + _STEP) & _64
        mixed = ((state >> 18) ^ state) >> 27 & 0xFFFFFFFF
        turn = state >> 59
        return ((mixed >> turn | mixed << (32 - turn)) & 0xFFFFFFFF) * limit >> 32

    def shuffled(self, names: Sequence[str]) -> Iterator[str]:
        """All of them in an order of chance, each drawn when it is asked for."""
        moved: dict[int, str] = {}
        last = len(names)
        for position in range(last):
            # `below`, without the call.
            state = self._state
            self._state = (state * _FACTOR + _STEP) & _64
            mixed = ((state >> 18) ^ state) >> 27 & 0xFFFFFFFF
            turn = state >> 59
            other = position + (((mixed >> turn | mixed << (32 - turn)) & 0xFFFFFFFF) * (last - position) >> 32)
            name = moved[other] if other in moved else names[other]
            if other != position:
                moved[other] = moved.get(position, names[position])
            yield name
