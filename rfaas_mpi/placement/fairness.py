"""How far a user is ahead of his share, from what he has used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["HALF_LIFE_S", "debt_s", "decayed", "dominant_share"]

HALF_LIFE_S = 86_400.0


def decayed(usage: Iterable[tuple[float, float]], now: float, half_life_s: float = HALF_LIFE_S) -> float:
    """What is left of (when, amount) pairs if an amount halves each half-life; those from the future count in full."""
    return sum(amount * 0.5 ** (max(0.0, now - when) / half_life_s) for when, amount in usage)


def dominant_share(used: Mapping[str, float], capacity: Mapping[str, float]) -> float:
    """The largest share that is used of any resource (Ghodsi et al., Dominant Resource Fairness, NSDI 2011).

    Resources that the cluster hasn't got, or that it isn't told of, count nothing.
    """
    return max((amount / capacity[name] for name, amount in used.items() if capacity.get(name, 0.0) > 0), default=0.0)


def debt_s(uid: int, used: Mapping[int, float], weights: Mapping[int, float] | None = None,
           cores: float = 1.0) -> float:
    """For how many seconds the user has had the whole cluster beyond his share; never below 0.

    `used`: user → decayed core-seconds (a lender's credit may be taken off before); `weights`: user → weight, 1 where
    it isn't said; `cores`: of the cluster. A user's share of all that was used goes by weight among those who used
    anything. ValueError for a cluster without cores, and for a weight that isn't above 0.
    """
    if cores <= 0:
        raise ValueError(f"cores is {cores}; it must be above 0")
    known = weights or {}
    if any(weight <= 0 for weight in known.values()):
        raise ValueError(f"weights are {dict(known)}; each must be above 0")
    users = {user for user, amount in used.items() if amount > 0} | {uid}
    share = known.get(uid, 1.0) / sum(known.get(user, 1.0) for user in users)
    total = sum(max(0.0, amount) for amount in used.values())
    return max(0.0, used.get(uid, 0.0) - share * total) / cores
