"""A cluster's manager, pure: who may do what, which agents are heard of, and what it all means for the leases.

    caller (uid, proved) ──▶ Cluster ──▶ Manager ──▶ LeaseBook
                               └── Agents: silent, dead

Everything returns actions, to be done in order once they are durable (registry.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from rfaas_mpi.errors import AuthError, ServiceError
from rfaas_mpi.leases import (
    AgentStarted,
    Lease,
    LeaseBook,
    LeaseState,
    NodeDrained,
    NodeLost,
    NodeReport,
    NodeUndrained,
    NodeView,
    Release,
    Revoke,
)
from rfaas_mpi.manager.agents import Agents
from rfaas_mpi.manager.core import Action, Manager
from rfaas_mpi.manager.credit import Lent, owners_of
from rfaas_mpi.manager.policy import Policy
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import Placer, Verdict
from rfaas_mpi.placement.fairness import debt_s

__all__ = ["Cluster", "Explained", "Policy", "check_known_node", "session_number"]

# A node's window is as old as its agent first said: clocks and networks make a little of each later report.
WINDOW_SLACK_S = 5.0

_NODE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?", re.ASCII)
NAME_CHARS_MAX = 128
FORGET_S = 3600.0                # a user's own node that is dead for so long is forgotten


def session_number(uid: int, session: str) -> int:
    """The number under which leases of this user's session are kept; the same in every manager."""
    return int.from_bytes(hashlib.blake2b(f"{uid}:{session}".encode(), digest_size=8).digest()) >> 1


def check_known_node(field: str, node: str) -> str:
    """The name, if one of the book's nodes could have it: NODE, or NODE/UID of a user's own. ValueError, else."""
    name, slash, uid = node.partition("/")
    if not _NODE.fullmatch(name) or (slash and not re.fullmatch("[0-9]{1,10}", uid)):
        raise ValueError(f"{field} is {node[:40]!r}, which is no name of a node: `rfaas status` shows them")
    return node


@dataclass(frozen=True)
class Explained:
    """What a demand would get: node → workers, each node's verdict, and why not all of `workers_max`."""

    chosen: dict[str, int]
    nodes: tuple[Verdict, ...]
    reason: str


class Cluster:
    """What the manager of a cluster decides; the shell proves who calls.

    A user sees and touches nothing of another one: what belongs to somebody else
    is not there (ServiceError), and what only administrators may do is an
    AuthError. A user's own agent is a node of its own, `NODE/UID`: whatever it
    says of itself, it can neither get another user's work nor speak for the
    site's agent on that node.
    """

    def __init__(self, book: LeaseBook, now: float, *, policy: Policy = Policy(), agents: Agents | None = None,
                 placer: Placer | None = None, lent: Lent | None = None) -> None:
        self.policy = policy
        self._lent = lent                     # None: lending earns nothing
        self._runs: dict[str, int] = {}       # node → who runs its agent
        self._jobs: dict[str, Mapping[int, int]] = {}       # node → core → whose job it is of
        self._placer = placer                 # who chooses the book's nodes, if that is one
        self._since: dict[str, float] = {}
        self._ends: dict[str, float] = {}     # node of the site → when its window ends
        self._now = now
        if placer is not None:
            placer.debt_s = self._debt_s
        self.manager = Manager(book)
        if lent is not None:
            self.manager.precedence = self._precedence
        self.agents = agents or Agents()
        self.agents.expected(book.unheard, now)

    @property
    def book(self) -> LeaseBook:
        return self.manager.book

    # ---- agents ----------------------------------------------------------------------------------

    def agent_started(self, uid: int, node: str, agent: str, now: float) -> list[Action]:
        """An agent begins: answered by Admit, with the number for its reports."""
        return self.manager.handle(AgentStarted(self.node_name(uid, node), _name("agent", agent)), now)

    def expected(self, nodes: Iterable[str], now: float) -> None:
        """Agents that registered, and should report: a user's own node that never does is dead some day."""
        self.agents.expected([node for node in nodes
                              if _is_private(node) and self.agents.age_s(node, now) is None], now)

    def report(self, uid: int, report: NodeReport, now: float, *, jobs: Mapping[int, int] = {}) -> list[Action]:
        """What an agent sees. ServiceError if it was never admitted, ValueError if it makes no sense.

        `jobs`: core → the user of the job that it is of, which a site's agent may know.
        """
        node = self.node_name(uid, report.node)
        if report.incarnation < 1 or report.live is None:
            raise ServiceError(f"the agent of {node} reports without its number", hint="register it first")
        trusted = uid in self.policy.lenders
        if report.incarnation > self.book.epoch and not trusted:
            raise ServiceError(f"the agent of {node} was never admitted as {report.incarnation}",
                               hint="register it again")
        before = self.book.heard(node)
        self._at(now)
        traits = msgspec.structs.replace(report.traits, host=report.traits.host or report.node,
                                         since=self._window(node, report.traits.since))
        ends = [end for end in (report.hard_end, self._ends.get(node)) if end is not None]
        actions = self.manager.report(msgspec.structs.replace(
            report, node=node, lends_to_uid=None if trusted else uid, traits=traits, hard_end=min(ends, default=None)), now)
        if self.book.heard(node) != before:
            self.agents.heard(node, now)
            self._runs[node], self._jobs[node] = uid, jobs
            if self._lent is not None:
                self._lent.heard(node, now)
            if trusted and self._placer is not None:
                # What a user's own agent says of windows would be counted against the site's nodes.
                if before[0] != report.incarnation:
                    # It knows of the node what it has seen itself: a window that is younger to it has not ended.
                    self._placer.lost(node)
                self._placer.observe(node, traits.since, report.spare, now)
        return actions

    def windows_end(self, at: Mapping[str, float]) -> None:
        """When the windows of the site's nodes are known to end: somebody plans with them. For leases from each node's
        next report on; what is left out has no end but the one that its agent knows."""
        self._ends = dict(at)

    # ---- lenders ---------------------------------------------------------------------------------

    def owners(self, lease: Lease) -> dict[int, int]:
        """Core of the lease → who lends it to the lease's user, where that is known."""
        return owners_of(lease, self._runs.get(lease.node), self.policy.site, self._jobs.get(lease.node, {}))

    def credit(self, uid: int, now: float | None = None) -> float:
        """Core-seconds that the user has lent to others, as far as they count."""
        if self._lent is None:
            return 0.0
        return self.policy.credit.of(self._lent.core_s_of(uid, self._now if now is None else now))

    def _precedence(self, uid: int) -> float:
        """What is left of the user's credit once he has used so much himself."""
        credit = self.credit(uid)
        return max(0.0, credit - self.book.held.had_by(uid, self._now)) if credit else 0.0

    def node_name(self, uid: int, node: str) -> str:
        """What the book calls the node of this caller's agent. ServiceError for what is no name."""
        if not _NODE.fullmatch(node):
            raise ServiceError(f"{node[:NAME_CHARS_MAX]!r} is no name of a node",
                               hint="it has letters, digits, '.', '_' and '-' only")
        return node if uid in self.policy.lenders else f"{node}/{uid}"

    # ---- ranks -----------------------------------------------------------------------------------

    def ask(self, uid: int, session: str, request: LeaseRequest, now: float) -> list[Action]:
        """A rank wants workers; the answer may come later. ValueError for a demand that makes no sense."""
        self._at(now)
        return self.manager.demand(session_number(uid, _name("session", session)), uid, request, now)

    def explain(self, uid: int, session: str, request: LeaseRequest, now: float) -> Explained:
        """What `ask` would do now, and why, node by node; nothing is granted. ValueError as there."""
        self._at(now)
        demand = self.manager.as_demand(session_number(uid, _name("session", session)), uid, request)
        chosen, reason = self.book.would_grant(demand, now)
        if self._placer is None:
            return Explained({name: len(workers) for name, workers in chosen.items()}, (), reason)
        visible = {view.node for view in self.nodes(uid)}
        return Explained(
            {name: len(workers) for name, workers in chosen.items()},
            tuple(verdict for verdict in self._placer.explain(demand, now) if verdict.node in visible), reason)

    def give_up(self, uid: int, session: str, request: int, now: float) -> list[Action]:
        """Whoever asked is gone and has no answer: nothing waits for him, and what he was granted is free again."""
        number = session_number(uid, session)
        if (served := self.manager.withdraw(number, request, now)) is not None:
            return served
        return [action for lease in self.book.session_leases(number)
                if lease.request_id == request and lease.state is LeaseState.GRANTED
                for action in self.manager.handle(Release(number, lease.id), now)]

    def release(self, uid: int, lease_id: int, now: float) -> list[Action]:
        """A user, or an administrator, gives a lease back; one that has ended already is no error."""
        lease = self.lease(uid, lease_id)
        return self.manager.handle(Release(lease.session, lease.id), now)

    def end_session(self, uid: int, session: str, now: float) -> list[Action]:
        """A rank ended: what it holds and what it waits for."""
        return self.manager.session_ended(session_number(uid, _name("session", session)), now)

    def leases(self, uid: int) -> list[Lease]:
        """The user's live leases; an administrator's are all."""
        return [lease for lease in self.book.leases if uid in (lease.uid, *self.policy.admins)]

    def lease(self, uid: int, lease_id: int) -> Lease:
        """One of the user's leases, also one that ended not long ago. ServiceError if there is none."""
        lease = self.book.lease(lease_id)
        if lease is None or (uid != lease.uid and uid not in self.policy.admins):
            raise ServiceError(f"uid {uid} has no lease {lease_id}", hint="`rfaas lease ls` shows those it has")
        return lease

    def _at(self, now: float) -> None:
        self._now = now
        if self._placer is not None:
            self._placer.waiting_cores = self.manager.waiting_cores

    def _debt_s(self, uid: int) -> float:
        # What users' own agents say of themselves is no part of what is shared: it would make any debt small.
        cores = sum(len(view.spare) for view in self.book.nodes if not _is_private(view.node))
        if not cores:
            return 0.0
        used = self.book.held.had(self._now)
        if self._lent is not None:
            for lender, lent in self._lent.core_s(self._now).items():
                used[lender] = used.get(lender, 0.0) - self.policy.credit.of(lent)
        return debt_s(uid, used, self.policy.weights, cores)

    def _window(self, node: str, since: float | None) -> float | None:
        """Since when the node's window is open: as it was said first, as long as it is the same window."""
        before = self._since.get(node)
        if since is None:
            self._since.pop(node, None)
        elif before is None or abs(since - before) > WINDOW_SLACK_S + 0.001 * abs(self._now - before):
            self._since[node] = since
        return self._since.get(node)

    # ---- administrators --------------------------------------------------------------------------

    def revoke(self, uid: int, lease_id: int, grace_s: float, now: float) -> list[Action]:
        """Takes a lease back. Its user may do that too."""
        return self.manager.handle(Revoke(self.lease(uid, lease_id).id, grace_s=_grace(grace_s)), now)

    def drain(self, uid: int, nodes: list[str], grace_s: float, now: float) -> list[Action]:
        """Takes back what is lent on these nodes (all that are known if the list is empty), and lends nothing there.

        ServiceError, and nothing is drained, if one of them isn't known.
        """
        self.administrator(uid, "drains nodes")
        known = [view.node for view in self.book.nodes]
        if unknown := sorted(set(nodes) - set(known)):
            raise ServiceError(f"no agent has reported from {', '.join(unknown)}",
                               hint="`rfaas status` shows the nodes")
        return [action for node in nodes or known
                for action in self.manager.handle(NodeDrained(node, _grace(grace_s)), now)]

    def undrain(self, uid: int, nodes: list[str], now: float) -> list[Action]:
        """Lets these nodes lend again (all if the list is empty); those who wait may be served at once."""
        self.administrator(uid, "undrains nodes")
        actions = [action for node in nodes or [view.node for view in self.book.nodes]
                   for action in self.manager.handle(NodeUndrained(node), now)]
        return actions + self.manager.retry(now)

    def nodes(self, uid: int) -> list[NodeView]:
        """The nodes that this user's demands can be filled from; an administrator's are all."""
        own = f"/{uid}"
        return [view for view in self.book.nodes
                if uid in self.policy.admins or not _is_private(view.node) or view.node.endswith(own)]

    def administrator(self, uid: int, what: str) -> None:
        """AuthError unless the caller is one."""
        if uid not in self.policy.admins:
            raise AuthError(f"only an administrator {what}, and uid {uid} is none")

    # ---- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Who fell silent or died, what came to its end, who waited long enough."""
        actions: list[Action] = []
        for event in self.agents.tick(now):
            if isinstance(event, NodeLost) and self._placer is not None:
                self._placer.lost(event.node)
            actions += self.manager.handle(event, now)
        return actions + self.manager.tick(now)

    def forget(self, now: float) -> list[str]:
        """Users' own nodes that were dead for long, and are not known any more from here on."""
        forgotten = [node for node in self.agents.dead_since(now - FORGET_S)
                     if _is_private(node) and self.book.forget(node)]
        for node in forgotten:
            self.agents.forget(node)
            for known in (self._since, self._runs, self._jobs):
                known.pop(node, None)
        return forgotten

    def next_deadline(self) -> float:
        """When to call tick() at the latest."""
        agents = self.agents.next_deadline()
        own = self.manager.next_deadline()
        return own if agents is None else min(agents, own)


def _is_private(node: str) -> bool:
    """Whether a node of the book is a user's own (`Cluster.node_name`)."""
    return "/" in node


def _name(what: str, name: str) -> str:
    if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
        raise ServiceError(f"{name[:NAME_CHARS_MAX]!r} is no name of a {what}",
                           hint=f"it has 1 to {NAME_CHARS_MAX} printable characters")
    return name


def _grace(grace_s: float) -> float:
    if not 0 <= grace_s <= 86400:
        raise ValueError(f"grace_s is {grace_s}; it lies between 0 and 86400")
    return grace_s
