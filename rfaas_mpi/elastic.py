"""When an executor asks for more workers, and when it gives some back. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LOOK_S", "Elastic", "Facts"]

LOOK_S = 0.05                # so often somebody has to look
LONG_S = 0.1                 # calls that wait for so long are no burst that ends by itself
AGAIN_S = 0.5                # who was given nothing asks again after so long
AGAIN_MOST_S = 8.0           # and each time later, up to this


@dataclass(frozen=True)
class Facts:
    """What an executor has and what it has to do: `queued` calls have no slot at any worker yet.

    Of its workers `shared` are a communicator's, which no rank gives back by itself; `lost` of those that were
    are gone for good, and their places now this rank's to fill.
    """

    workers: int
    queued: int
    in_flight: int
    shared: int = 0
    lost: int = 0


class Elastic:
    """Between `least` and `most` workers (None: as many as there are); those not needed for `idle_s` go back.

    Both count a rank's own workers, besides those that it shares. With `most` above 0 it never stays without any:
    its calls would run on the rank, and no queue say that there should be one.
    """

    def __init__(self, least: int, most: int | None, idle_s: float) -> None:
        self.least = least
        self.most = most
        self.idle_s = idle_s
        self._long_since: float | None = None
        self._idle_since: float | None = None
        self._not_before = 0.0
        self._again_s = AGAIN_S

    def decide(self, facts: Facts, now: float) -> int:
        """How many more workers to ask for now; below 0: how many are too many; 0: leave it at that.

        Each time as many as there are already, so that a short queue doesn't take a cluster.
        """
        kept = facts.shared + facts.lost
        most = None if self.most is None else self.most + kept
        least = max(1, self.least + kept)
        if most is not None:
            least = min(least, most)
        if facts.queued == 0:
            self._long_since = None
        elif self._long_since is None:
            self._long_since = now
        if facts.queued or facts.in_flight:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if facts.workers < least or (self._long_since is not None and now - self._long_since >= LONG_S):
            if now < self._not_before:
                return 0
            missing = max(1, facts.workers, least - facts.workers)
            if most is not None:
                missing = min(missing, most - facts.workers)
            return max(0, missing)
        if self._idle_since is not None and now - self._idle_since >= self.idle_s:
            return min(0, least - facts.workers)
        return 0

    def answered(self, given: int, now: float) -> None:
        """What came of the last demand. Where nothing is to be had one asks less and less often."""
        self._long_since = None
        if given:
            self._not_before, self._again_s = 0.0, AGAIN_S
        else:
            self._not_before = now + self._again_s
            self._again_s = min(AGAIN_MOST_S, 2 * self._again_s)
