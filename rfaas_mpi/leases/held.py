"""Which user holds how many cores, and how much of them each has had; old usage counts less. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["HALF_LIFE_S", "Held"]

HALF_LIFE_S = 86_400.0


class Held:
    """Cores by user. What a user has had is in core-seconds, of which half is forgotten each half-life.

    So the core-seconds of a user who holds c cores all the time come near c · half-life / ln 2. ValueError for a
    half-life that isn't above 0.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        if not 0 < half_life_s < math.inf:
            raise ValueError(f"half_life_s is {half_life_s}; it must be above 0")
        self._rate = math.log(2) / half_life_s
        self._of: dict[int, _User] = {}

    def cores(self, uid: int) -> int:
        """How many the user holds now."""
        user = self._of.get(uid)
        return 0 if user is None else user.cores

    def change(self, uid: int, cores: int, now: float) -> None:
        """The user holds so many more, or fewer, from now on."""
        user = self._of.get(uid)
        if user is None:
            user = self._of[uid] = _User(now)
        user.core_s, user.at = self._core_s(user, now), now
        user.cores += cores

    def add(self, core_s: Mapping[int, float], now: float) -> None:
        """What users had before this began, as much of it as still counts."""
        for uid, amount in core_s.items():
            self.change(uid, 0, now)
            self._of[uid].core_s += amount

    def had(self, now: float) -> dict[int, float]:
        """User → core-seconds that still count."""
        return {uid: self._core_s(user, now) for uid, user in self._of.items()}

    def had_by(self, uid: int, now: float) -> float:
        """The same of one user: who asks for one doesn't look at all."""
        user = self._of.get(uid)
        return 0.0 if user is None else self._core_s(user, now)

    def forget(self, now: float) -> None:
        """Drops users who hold nothing and have had next to nothing."""
        for uid in [uid for uid, user in self._of.items() if user.cores == 0 and self._core_s(user, now) < 1.0]:
            del self._of[uid]

    def _core_s(self, user: _User, now: float) -> float:
        if now <= user.at:
            return user.core_s
        # An amount halves each half-life; so does each moment's share of what is held meanwhile.
        left = math.exp(-self._rate * (now - user.at))
        return user.core_s * left + user.cores * (1.0 - left) / self._rate


class _User:

    __slots__ = ("at", "core_s", "cores")

    def __init__(self, now: float) -> None:
        self.cores = 0
        self.core_s = 0.0
        self.at = now
