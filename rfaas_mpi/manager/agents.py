"""Which agents are heard of, pure: three missed heartbeats make one silent, a longer silence makes it dead."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from rfaas_mpi.leases import NodeLost, NodeSilent

__all__ = ["Agents"]

HEARTBEAT_S = 10.0
SILENT_AFTER_S = 3 * HEARTBEAT_S + 2.0      # they come with jitter
DEAD_AFTER_S = 300.0


class Agents:
    """When each node was last heard of.

    A silent agent's leases live on: a dead manager's network or a paused machine
    looks the same from here. Only a dead one's are given up, for good.
    """

    def __init__(self, *, silent_after_s: float = SILENT_AFTER_S, dead_after_s: float = DEAD_AFTER_S) -> None:
        if not 0 < silent_after_s <= dead_after_s:
            raise ValueError(f"an agent is silent after {silent_after_s} s and dead after {dead_after_s} s; "
                             "0 < silent <= dead must hold")
        self._silent_after_s = silent_after_s
        self._dead_after_s = dead_after_s
        self._heard: dict[str, float] = {}
        self._silent: dict[str, float] = {}          # → when it is dead
        self._dead: dict[str, float] = {}            # → since when
        self._due: list[tuple[float, str]] = []      # soonest first; some are no longer true

    def __len__(self) -> int:
        return len(self._heard)

    def age_s(self, node: str, now: float) -> float | None:
        """How long ago it was heard of; None for a node that isn't known, or dead."""
        heard = self._heard.get(node)
        return None if heard is None else now - heard

    def conditions(self) -> dict[str, int]:
        """How many are `heard` of, `silent`, and `dead` since they were."""
        return {"heard": len(self._heard) - len(self._silent), "silent": len(self._silent), "dead": len(self._dead)}

    @property
    def silent(self) -> frozenset[str]:
        return frozenset(self._silent)

    @property
    def dead(self) -> frozenset[str]:
        return frozenset(self._dead)

    def heard(self, node: str, now: float) -> None:
        """It said something new."""
        self._dead.pop(node, None)
        self._heard[node] = now
        self._silent.pop(node, None)
        heappush(self._due, (now + self._silent_after_s, node))
        if len(self._due) > 4 * len(self._heard) + 64:
            self._due = [(self._deadline(each), each) for each in self._heard]
            heapify(self._due)

    def dead_since(self, when: float) -> list[str]:
        """Those that are dead at least since then, the longest first."""
        return [node for node, since in self._dead.items() if since <= when]

    def forget(self, node: str) -> None:
        """A dead one that isn't waited for any more."""
        self._dead.pop(node, None)

    def expected(self, nodes: Iterable[str], now: float) -> None:
        """A manager that starts gives the nodes with leases as long as any other to be heard of."""
        for node in nodes:
            self.heard(node, now)

    def next_deadline(self) -> float | None:
        """When to call `tick` at the latest; None while nobody is known."""
        while self._due:
            when, node = self._due[0]
            if node in self._heard and self._deadline(node) == when:
                return when
            heappop(self._due)
        return None

    def tick(self, now: float) -> list[NodeSilent | NodeLost]:
        """Who has become silent or dead."""
        events: list[NodeSilent | NodeLost] = []
        while (due := self.next_deadline()) is not None and due <= now:
            _, node = heappop(self._due)
            if node in self._silent:
                del self._heard[node], self._silent[node]
                self._dead[node] = now
                events.append(NodeLost(node))
            else:
                # After a pause of our own, what they said may wait in our sockets.
                self._silent[node] = max(self._heard[node] + self._dead_after_s, now + self._silent_after_s)
                heappush(self._due, (self._deadline(node), node))
                events.append(NodeSilent(node))
        return events

    def _deadline(self, node: str) -> float:
        return self._silent.get(node, self._heard[node] + self._silent_after_s)
