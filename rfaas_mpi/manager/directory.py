"""What a manager knows of the agents themselves, pure: who they are, where they listen, what time it is there.

An agent says so when it registers. Registrations are kept on disk (ledger.py): a manager
that was restarted grants as soon as an agent has reported, and one that registers again
under its old name gets its old number, so that its leases live on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from rfaas_mpi.errors import ServiceError

__all__ = ["Directory", "Registration"]

UNPROVED_MAX = 4                 # registrations of a node that no report has followed yet
NODES_OF_A_USER_MAX = 4096       # that aren't the site's


class Registration(msgspec.Struct, frozen=True):
    """What an agent said when it began. `node` is the name that the lease book has for it."""

    node: str
    agent: str
    incarnation: int
    boot_id: str
    key: bytes
    addresses: tuple[str, ...]
    host: str
    version: str = ""                # of its package; "": it didn't say


class _Heard:
    """The last report of a node's agent, and which of the manager's keys it believes."""

    __slots__ = ("at", "believed", "clock_ns", "incarnation", "said")

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.at = 0.0
        self.clock_ns = 0
        self.said: tuple[bytes, ...] = ()
        self.believed: tuple[bytes, ...] = ()


class Directory:
    """Registrations by node, oldest first; `of_node` is what the ledger keeps."""

    def __init__(self, kept: Iterable[Registration] = ()) -> None:
        self._nodes: dict[str, list[Registration]] = {}
        self._heard: dict[str, _Heard] = {}
        for one in sorted(kept, key=lambda registration: registration.incarnation):
            self._nodes.setdefault(one.node, []).append(one)

    # ---- who ---------------------------------------------------------------------------------------

    def known_as(self, node: str, agent: str) -> int | None:
        """The number that this very agent got before, None for a new one."""
        return next((one.incarnation for one in self._nodes.get(node, ()) if one.agent == agent), None)

    def check_room(self, node: str) -> None:
        """ServiceError if a user's own agents have taken too many names."""
        _, private, uid = node.partition("/")
        if private and node not in self._nodes:
            own = sum(name.endswith(f"/{uid}") for name in self._nodes)
            if own >= NODES_OF_A_USER_MAX:
                raise ServiceError(f"uid {uid} has agents on {own} nodes, which is the limit",
                                   hint="use the names of nodes again")

    def add(self, registration: Registration) -> None:
        """An agent has registered. The node's oldest ones that never reported are forgotten."""
        heard = self._heard.get(registration.node)
        others = [one for one in self._nodes.get(registration.node, ())
                  if one.incarnation != registration.incarnation]
        proved = [one for one in others if heard is not None and one.incarnation == heard.incarnation]
        waiting = [one for one in others if one not in proved]
        self._nodes[registration.node] = sorted(
            [*proved, *waiting[-(UNPROVED_MAX - 1):], registration], key=lambda one: one.incarnation)

    @property
    def nodes(self) -> list[str]:
        """Every node of which an agent has registered."""
        return list(self._nodes)

    def forget(self, node: str) -> None:
        """It is as if no agent had ever registered there."""
        self._nodes.pop(node, None)
        self._heard.pop(node, None)

    def get(self, node: str, incarnation: int) -> Registration | None:
        return next((one for one in self._nodes.get(node, ()) if one.incarnation == incarnation), None)

    def of_node(self, node: str) -> tuple[Registration, ...]:
        return tuple(self._nodes.get(node, ()))

    # ---- what time it is there -----------------------------------------------------------------------

    def reported(self, node: str, incarnation: int, clock_ns: int, now: float) -> bool:
        """A report of that agent was news. True if earlier agents were forgotten with it."""
        heard = self._of(node, incarnation)
        heard.at, heard.clock_ns = now, clock_ns
        # What was said before it has arrived, or its connection would have broken.
        heard.believed = heard.said or heard.believed
        known = self._nodes.get(node, [])
        left = [one for one in known if one.incarnation >= incarnation]
        if len(left) == len(known):
            return False
        self._nodes[node] = left
        return True

    def clock_ns(self, node: str, incarnation: int, when: float) -> int | None:
        """What that agent's clock shows at least at our time `when`; None before its first report to this manager."""
        heard = self._heard.get(node)
        if heard is None or heard.incarnation != incarnation or not heard.clock_ns:
            return None
        return heard.clock_ns + int((when - heard.at) * 1e9)

    # ---- which keys it believes ------------------------------------------------------------------------

    def say(self, node: str, incarnation: int, keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """What the agent has to be told of the manager's keys now; () if it knows.

        While there are two it is told each time: an answer may be lost.
        """
        heard = self._of(node, incarnation)
        if heard.said == keys and len(keys) < 2:
            return ()
        heard.said = keys
        return keys

    def believed(self, node: str) -> Collection[bytes]:
        """The keys that the node's agent is known to believe."""
        heard = self._heard.get(node)
        return () if heard is None else heard.believed

    def _of(self, node: str, incarnation: int) -> _Heard:
        heard = self._heard.get(node)
        if heard is None or heard.incarnation < incarnation:
            heard = self._heard[node] = _Heard(incarnation)
        return heard
