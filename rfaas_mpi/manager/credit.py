"""Who has lent how much to others, and what that is worth to him. Pure.

    lease ACTIVE ──▶ Lent.changed ──▶ lines, kept with the lease's change ──▶ the next manager
                        └── Lent.credit: core-seconds, half forgotten each half-life, at most so many

Credit is for core-seconds that somebody else's lease held, by this manager's clock, on cores whose owner
is known: who runs the agent, or, where the site runs it, the user of the job to which a core belongs. What
agents say of how long workers held cores earns nobody anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from rfaas_mpi.leases import Lease, LeaseState
from rfaas_mpi.leases.held import HALF_LIFE_S, Held

__all__ = ["KEPT_EVERY_S", "Credit", "Lent", "LentLine", "owners_of"]

KEPT_EVERY_S = 300.0             # so much of a loan may be forgotten where manager and node are lost together
_HELD = (LeaseState.ACTIVE, LeaseState.REVOKING)


@dataclass(frozen=True)
class Credit:
    """What lending is worth.

    A core-second lent makes up for `weight` of use (0: nothing is counted for anybody). Half of what was lent is
    forgotten each `half_life_s`, and more than `core_s_max` nobody has. Who has credit may hold as many cores beyond
    his quota as he has lent on average, at most `extra_cores`.
    """

    weight: float = 1.0
    half_life_s: float = HALF_LIFE_S
    core_s_max: float = 1000 * 3600.0
    extra_cores: int = 0

    def of(self, lent_core_s: float) -> float:
        """The credit of who has lent so much, by what still counts of it."""
        return min(self.core_s_max, self.weight * max(0.0, lent_core_s))

    def cores(self, credit_core_s: float) -> int:
        """So many cores may be added to the quota of who has this credit."""
        # Who lends c cores all the time comes near c · half-life / ln 2.
        return min(self.extra_cores, int(credit_core_s * math.log(2) / self.half_life_s + 0.5))


class LentLine(msgspec.Struct, frozen=True):
    """What one lease has of one owner's: cores that it holds still, and core-seconds until `age_s` ago."""

    lease: int
    owner: int
    uid: int                         # who uses them
    node: str
    cores: tuple[int, ...]
    core_s: float
    age_s: float = 0.0


class _Loan:

    __slots__ = ("core_s", "cores", "lease", "node", "owner", "since", "uid")

    def __init__(self, line: LentLine, now: float) -> None:
        self.lease, self.owner, self.uid, self.node = line.lease, line.owner, line.uid, line.node
        self.cores, self.core_s, self.since = line.cores, line.core_s, now - line.age_s

    def until(self, now: float) -> float:
        return self.core_s + len(self.cores) * max(0.0, now - self.since)

    def line(self, now: float) -> LentLine:
        """As it stands; what comes later is counted from now."""
        self.core_s, self.since = self.until(now), max(self.since, now)
        return LentLine(self.lease, self.owner, self.uid, self.node, self.cores, self.core_s)


def owners_of(lease: Lease, agent_uid: int | None, site: frozenset[int], jobs: Mapping[int, int]) -> dict[int, int]:
    """Core → its owner, for cores of the lease that somebody lends to its user; less those whose owner isn't known.

    `agent_uid` runs the node's agent. One of `site` owns nothing himself: there `jobs` says whose job a core is of.
    """
    if agent_uid is None:
        return {}
    of = jobs if agent_uid in site else dict.fromkeys(lease.cores, agent_uid)
    return {core: of[core] for core in lease.cores if core in of and of[core] != lease.uid and of[core] not in site}


class Lent:
    """Core-seconds by lender: what leases hold of his now, and what they held.

    `kept`: the loans of leases that live; `core_s`: what else of lenders' still counts. Told of each lease that has
    changed, it returns what is to be kept of it.
    """

    def __init__(self, half_life_s: float, now: float, *, kept: Iterable[LentLine] = (),
                 core_s: Mapping[int, float] = {}) -> None:
        self._rate = math.log(2) / half_life_s
        self._sums = Held(half_life_s)
        self._sums.add(core_s, now)
        self._loans: dict[int, list[_Loan]] = {}
        self._known: set[int] = set()            # leases whose owners were asked for
        self._heard: dict[str, float] = {}
        self._kept_at = now
        for line in kept:
            loan = _Loan(line, now)
            self._loans.setdefault(line.lease, []).append(loan)
            self._known.add(line.lease)
            self._sums.change(line.owner, len(line.cores), now)
            self._sums.add({line.owner: loan.until(now)}, now)

    @property
    def leases(self) -> list[int]:
        """Those of which something is lent."""
        return list(self._loans)

    def heard(self, node: str, now: float) -> None:
        """Its agent has reported."""
        self._heard[node] = now

    def begun(self, lease: Lease) -> bool:
        """Whether it is to be asked whose cores this lease holds: it has begun, and they aren't known."""
        return lease.state in _HELD and lease.seen_ns > 0 and lease.id not in self._known

    def changed(self, lease: Lease, owners: Mapping[int, int], now: float) -> list[LentLine]:
        """The lease is like this now. `owners` (core → user) count where `begun`."""
        if self.begun(lease):
            self._known.add(lease.id)
            loans = []
            for owner in dict.fromkeys(owners.values()):
                cores = tuple(core for core in lease.cores if owners.get(core) == owner)
                loans.append(_Loan(LentLine(lease.id, owner, lease.uid, lease.node, cores, 0.0), now))
                self._sums.change(owner, len(cores), now)
            if loans:
                self._loans[lease.id] = loans
            return [loan.line(now) for loan in loans]
        if not lease.state.live:
            self._known.discard(lease.id)
        lines = []
        held = set(lease.cores) if lease.state.live else set()
        # Of a node that died nobody knows since when nothing was used there.
        until = now if lease.state is not LeaseState.LOST else min(now, self._heard.get(lease.node, -math.inf))
        for loan in self._loans.get(lease.id, ()):
            left = tuple(core for core in loan.cores if core in held)
            if left == loan.cores:
                continue
            self._sums.change(loan.owner, len(left) - len(loan.cores), now)
            if (beyond := now - max(until, loan.since)) > 0 and until < now:
                self._sums.add({loan.owner: -self._worth(len(loan.cores), beyond)}, now)
            loan.line(until)
            loan.cores = left
            lines.append(loan.line(until))
        if lease.id in self._loans and not any(loan.cores for loan in self._loans[lease.id]):
            del self._loans[lease.id]
        return lines

    def due(self, now: float) -> list[LentLine]:
        """All loans as they stand, each few minutes; a line takes the place of the one before."""
        if now < self._kept_at + KEPT_EVERY_S:
            return []
        lending = {loan.node for loans in self._loans.values() for loan in loans}
        self._heard = {node: at for node, at in self._heard.items() if node in lending or at > self._kept_at}
        self._kept_at = now
        self._sums.forget(now)
        return [loan.line(now) for loans in self._loans.values() for loan in loans]

    def unkept(self, now: float) -> dict[int, float]:
        """Lender → core-seconds that no line has said yet."""
        found: dict[int, float] = {}
        for loans in self._loans.values():
            for loan in loans:
                found[loan.owner] = found.get(loan.owner, 0.0) + loan.until(now) - loan.core_s
        return found

    def core_s(self, now: float) -> dict[int, float]:
        """Lender → core-seconds, less what was forgotten of them."""
        return {owner: max(0.0, amount) for owner, amount in self._sums.had(now).items()}

    def core_s_of(self, owner: int, now: float) -> float:
        """The same of one lender: who asks for one doesn't look at all."""
        return max(0.0, self._sums.had_by(owner, now))

    def _worth(self, cores: int, seconds: float) -> float:
        return cores * (1.0 - math.exp(-self._rate * seconds)) / self._rate
