"""What the windows of this cluster's nodes have lasted, partition by partition, from what agents report. Pure.

    report ──▶ seen ──▶ pieces of windows ──▶ fold ──▶ one Learned for each partition

A piece is what was seen of a window from one report to the next. A report in which cores are missing that were lent or
spare before ends a window for their share of the node: that is what a worker there risks. It does so, too, where those
were the ones that had been idle the longest: what is left is a younger window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rfaas_mpi.placement.survival import Learned, Survival, Window

__all__ = ["ByPartition", "Windows"]

PARTITIONS_MAX = 64
"""Of so many it learns; nodes of any further one have the prior."""

FOLD_S = 5.0
"""How long what was seen may wait until it counts."""

PIECES_MAX = 512
"""… or until so many pieces wait."""

PIECE_S = 60.0
"""A window that goes on counts when it has done so for so long."""


@dataclass(frozen=True)
class ByPartition:
    """A model for each partition of which something was seen, and one for all others."""

    other: Survival
    models: Mapping[str, Survival] = field(default_factory=dict)

    def of(self, partition: str) -> Survival:
        """See Survival."""
        return self.models.get(partition, self.other)

    def ends_within(self, age_s: float, for_s: float, cohort_size: int = 1) -> float:
        """See Survival; of a node of which no partition is known."""
        return self.of("").ends_within(age_s, for_s, cohort_size)


class _Open:
    """A window that is looked at."""

    __slots__ = ("cohort_size", "looked_at", "partition", "seen_s", "since", "spare")

    def __init__(self, partition: str, since: float, now: float, spare: frozenset[int], cohort_size: int) -> None:
        self.partition = partition
        self.since = since
        self.looked_at = now
        self.seen_s = max(0.0, now - since)    # up to which age it has counted
        self.spare = spare
        self.cohort_size = cohort_size


class Windows:
    """Learns from reports how long windows last; what was seen counts half after each `half_life_s`.

    It lasts as long as the object does: a manager that was started anew has the prior again. A partition takes some
    hundred numbers, a node one entry, however long it runs.
    """

    def __init__(self, prior: Survival, half_life_s: float) -> None:
        self._prior = prior
        self._half_life_s = half_life_s
        self._open: dict[str, _Open] = {}
        self._learned: dict[str, Learned] = {}
        self._partitions: set[str] = set()     # of which anything was seen
        self._pieces: dict[str, list[Window]] = {}
        self._waiting = 0
        self._folded_at: float | None = None

    def seen(self, node: str, partition: str, since: float | None, spare: Iterable[int], now: float,
             cohort_size: int = 1) -> None:
        """A report: the node's window began then (None: there is none), and these cores are lent or may be.

        No core of a window that goes on: its agent lends none for reasons of its own (it leaves, say).
        """
        cores = frozenset(spare)
        if since is not None and not cores:
            self.lost(node)
            return
        known = self._open.get(node)
        if (known is not None and since is not None and known.partition == partition
                and (since == known.since or known.since < since <= known.looked_at)):
            self._piece(known, now, len(known.spare - cores) / len(known.spare))
            cohort_size = max(known.cohort_size, cohort_size)
            if since != known.since:
                # Those left are younger, and were there when it was looked at last.
                self._open[node] = _Open(partition, since, now, cores, cohort_size)
            else:
                known.spare, known.cohort_size, known.looked_at = cores, cohort_size, now
            return
        if known is not None:
            # It ended at some time since the last report: at its end, as far as anybody knows.
            self._piece(known, now if since is None else min(now, max(since, known.since)), 1.0)
            del self._open[node]
        if since is not None and (partition in self._partitions or len(self._partitions) < PARTITIONS_MAX):
            self._partitions.add(partition)
            self._open[node] = _Open(partition, since, now, cores, cohort_size)

    def lost(self, node: str) -> None:
        """Nobody sees it any more; that says nothing about its window."""
        self._open.pop(node, None)

    def due(self, now: float) -> bool:
        """True if what was seen should count now (`fold`)."""
        if not self._waiting:
            return False
        return self._folded_at is None or now - self._folded_at >= FOLD_S or self.full

    @property
    def full(self) -> bool:
        """So much waits that it should count now, whether anybody asks or not."""
        return self._waiting >= PIECES_MAX

    def fold(self, now: float) -> ByPartition:
        """The models that know all that was seen until now."""
        before, self._folded_at = self._folded_at, now
        keep = 1.0 if before is None or self._half_life_s <= 0 else 0.5 ** (max(0.0, now - before) / self._half_life_s)
        for partition in {*self._learned, *self._pieces}:
            model = self._learned.get(partition) or Learned(prior=self._prior)
            self._learned[partition] = model.observe(self._pieces.get(partition, ()), keep)
        self._pieces.clear()
        self._waiting = 0
        return ByPartition(self._prior, dict(self._learned))

    # ---- inside ----------------------------------------------------------------------------------

    def _piece(self, window: _Open, until: float, share: float) -> None:
        age_s = max(window.seen_s, until - window.since)
        if share > 0 or age_s - window.seen_s >= PIECE_S:
            self._pieces.setdefault(window.partition, []).append(
                Window(age_s, ended=share > 0, seen_from_s=window.seen_s, cohort_size=window.cohort_size,
                       share=share or 1.0))
            self._waiting += 1
            window.seen_s = age_s
