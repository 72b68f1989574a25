"""Leases over a network that loses, doubles and reorders: book, agents and ranks in one process."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rfaas_mpi.leases import (
    Action,
    Admit,
    AgentStarted,
    Answered,
    Changes,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Kept,
    Lease,
    LeaseBook,
    LeaseState,
    LiveLease,
    NodeDrained,
    NodeLost,
    NodeReport,
    NodeSilent,
    NodeUndrained,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Superseded,
    Tick,
    WorkersStopped,
)
from rfaas_mpi.placement import Placer

GIB = 2**30
NODES = ("n0", "n1", "n2")
CORES = 6
WITHIN_S = 10.0
ENDS = (LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.LOST)


@dataclass
class Agent:
    """A node agent that keeps to the rules of a grant, and to nothing else.

    It never looks whether a core is in use before it begins a lease: that no core
    is lent twice must follow from what the book grants.
    """

    node: str
    offset_ns: int
    name: str = ""
    incarnation: int = 0
    begun: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    spare: tuple[int, ...] = tuple(range(CORES))

    def clock_ns(self, now: float) -> int:
        return self.offset_ns + int(now * 1e9)

    def begin(self, lease: Lease, now: float) -> bool:
        """A rank shows its grant."""
        if lease.id in self.begun:
            return True
        if (lease.incarnation != self.incarnation or lease.id in self.refused
                or self.clock_ns(now) > lease.not_after_ns):
            return False
        if not set(lease.cores) <= set(self.spare):
            self.refused.add(lease.id)       # its owner was faster
            return False
        for other in self.begun.values():
            for cores in other.values():
                assert not set(cores) & set(lease.cores), f"a core of {self.node} is lent twice"
        self.begun[lease.id] = {worker.number: worker.cores for worker in lease.workers}
        return True

    def stop(self, lease_id: int, workers: tuple[int, ...]) -> None:
        """Workers are gone; a lease of which none is left never begins again."""
        there = self.begun.get(lease_id)
        if there is not None:
            for number in workers or tuple(there):
                there.pop(number, None)
        if not there and (there is not None or not workers):
            self.begun.pop(lease_id, None)
            self.refused.add(lease_id)

    def report(self, now: float) -> NodeReport:
        return NodeReport(
            node=self.node, spare=self.spare, memory_bytes=8 * GIB, incarnation=self.incarnation,
            clock_ns=self.clock_ns(now), grace_s=1.0,
            live=tuple(LiveLease(lease_id, lease_id, tuple(
                GrantedWorker(number, cores) for number, cores in workers.items()))
                for lease_id, workers in self.begun.items()),
            over=tuple(self.refused))


class Ledger:
    """The durable part: what has been written down, as another book would find it."""

    def __init__(self) -> None:
        self.epoch = 0
        self.leases: dict[int, Lease] = {}
        self.answers: dict[tuple[int, int], Answered] = {}
        self.closed: set[int] = set()
        self.drained: dict[str, bool] = {}

    def write(self, changes: Changes) -> None:
        assert changes.epoch >= self.epoch
        self.epoch = changes.epoch
        for lease in changes.leases:
            before = self.leases.get(lease.id)
            assert before is None or before.state not in ENDS, "a lease ended twice, or lives again"
            assert before is not None or lease.id <= changes.epoch
            self.leases[lease.id] = lease
        for answered in changes.answers:
            key = (answered.demand.session, answered.demand.request_id)
            assert key not in self.answers
            self.answers[key] = answered
        self.closed.update(changes.closed)
        self.drained.update(changes.drained)

    def kept(self) -> Kept:
        kept = Kept(leases=tuple(self.leases.values()), answers=tuple(self.answers.values()),
                    closed=tuple(self.closed),
                    drained=[node for node, drained in self.drained.items() if drained])
        # As from a disk.
        return msgspec.json.decode(msgspec.json.encode(kept), type=Kept)


class World:
    """A manager, three agents and some ranks; `wire` holds what is on its way, in no order."""

    def __init__(self) -> None:
        self.now = 100.0
        self.names = 0
        self.ledger = Ledger()
        self.wire: list[Event | Action] = []
        self.agents = {name: Agent(name, offset_ns=10**12 * (1 + number))
                       for number, name in enumerate(NODES)}
        self.sessions = [1, 2, 3]
        self.next_session = 4
        self.demands: dict[tuple[int, int], Demand] = {}
        self.got: dict[tuple[int, int], Grant] = {}       # what a rank was told
        self.highest = 0
        self.grants = 0
        self.restart_manager()
        for agent in self.agents.values():
            self.start_agent(agent)

    # --- the manager ---

    def restart_manager(self) -> None:
        """Whatever was not written down is forgotten; a book before this one sends nothing more."""
        self.book = LeaseBook(Placer(), epoch=self.ledger.epoch, activate_within_s=WITHIN_S,
                              remember_s=1e9, durable=True)
        self.book.restore(self.ledger.kept(), self.now)

    def handle(self, events: list[Event], *, crash: str = "") -> None:
        """A group of events, written down together before any of their actions is done."""
        actions = [action for event in events for action in self.book.handle(event, self.now)]
        if crash == "before it is written":
            self.restart_manager()
            return
        self.ledger.write(self.book.changes())
        for action in actions:
            match action:
                case Store(epoch):
                    assert epoch <= self.ledger.epoch
                case Grant(leases=leases):
                    self.check_grant(action)
                    self.wire.append(action)
                    self.grants += len(leases)
                case _:
                    self.wire.append(action)
        if crash == "after it is written":
            # Any of the answers may have left before.
            self.wire[-len(actions):] = []
            self.restart_manager()

    def check_grant(self, grant: Grant) -> None:
        key = (grant.session, grant.request_id)
        asked = self.demands[key]
        assert asked.workers_min <= grant.workers <= asked.workers_max
        written = self.ledger.answers.get(key)
        assert not grant.leases or (written is not None and written.grant == grant), "two answers"
        for lease in grant.leases:
            assert lease.id in self.ledger.leases, "granted before it was written down"

    # --- agents and ranks ---

    def start_agent(self, agent: Agent) -> None:
        """A new process: what the one before ran is gone with it."""
        self.names += 1
        agent.name, agent.incarnation = f"a{self.names}", 0
        agent.begun.clear()
        agent.refused.clear()
        agent.spare = tuple(range(CORES))
        self.wire.append(AgentStarted(agent.node, agent.name))

    def deliver(self, message: Event | Action) -> None:
        match message:
            case Admit(node, name, incarnation):
                agent = self.agents[node]
                if agent.name == name and agent.incarnation == 0:
                    agent.incarnation = incarnation
            case Grant():
                key = (message.session, message.request_id)
                first = self.got.setdefault(key, message)
                # Only what gave nothing may be forgotten by a manager that was killed.
                assert first == message or not (first.leases and message.leases), "two answers to one demand"
                for lease in first.leases:
                    self.agents[lease.node].begin(lease, self.now)
            case StopWorkers(node, lease_id, workers):
                self.agents[node].stop(lease_id, workers)
            case Superseded(node, incarnation):
                assert self.agents[node].incarnation != incarnation, "a living agent is told to go"
            case _ if isinstance(message, Event):
                self.handle([message])

    # --- what must hold at any time ---

    def check(self) -> None:
        free = {view.node: set(view.free) for view in self.book.nodes}
        for agent in self.agents.values():
            for lease_id, workers in agent.begun.items():
                for cores in workers.values():
                    assert not free.get(agent.node, set()) & set(cores), (
                        f"the book has forgotten lease {lease_id}")
        held: dict[tuple[str, int], int] = {}
        for lease in self.book.leases:
            for core in lease.cores:
                assert held.setdefault((lease.node, core), lease.id) == lease.id
        for view in self.book.nodes:
            assert set(view.lent) == {core for node, core in held if node == view.node}
            assert not set(view.free) & set(view.lent)

    def end(self) -> None:
        """The network heals and everybody leaves: each lease has its end, all cores are free."""
        self.wire.clear()
        for name in NODES:
            self.handle([NodeUndrained(name)])
            if self.agents[name].incarnation == 0:
                self.start_agent(self.agents[name])
        self.settle()
        for session in {lease.session for lease in self.book.leases} | set(self.sessions):
            self.handle([SessionEnded(session)])
        for _ in range(3):
            self.settle()
            self.now += WITHIN_S + 1
        assert self.book.leases == [] and self.book.next_deadline() is None
        for agent in self.agents.values():
            assert agent.begun == {}
            agent.spare = tuple(range(CORES))
        self.settle()
        assert {view.node: set(view.free) for view in self.book.nodes} == {
            name: set(range(CORES)) for name in NODES}
        assert {lease.state for lease in self.ledger.leases.values()} <= set(ENDS)

    def settle(self) -> None:
        """Everything arrives, and every agent reports what came of it."""
        for _ in range(2):
            while self.wire:
                self.deliver(self.wire.pop(0))
            self.now += 0.1
            for agent in self.agents.values():
                self.wire.append(agent.report(self.now))
        while self.wire:
            self.deliver(self.wire.pop(0))
        self.check()

    # --- what may happen ---

    def a_message_arrives(self, choose: random.Random) -> None:
        if self.wire:
            position = choose.randrange(len(self.wire))
            message = self.wire[position]
            if choose.random() < 0.75:
                del self.wire[position]      # else it comes again
            self.deliver(message)

    def a_message_is_lost(self, choose: random.Random) -> None:
        if self.wire:
            del self.wire[choose.randrange(len(self.wire))]

    def rank_asks(self, choose: random.Random) -> None:
        session, low = choose.choice(self.sessions), choose.choice((0, 1, 1, 2, 8))
        key = (session, choose.randrange(30))
        asked = self.demands.get(key)
        if asked is None:
            asked = self.demands[key] = Demand(
                session=key[0], request_id=key[1], uid=1000, workers_min=low,
                workers_max=low + choose.randrange(3), cores_per_worker=choose.choice((1, 1, 2)),
                memory_per_worker=choose.choice((None, GIB)),
                duration_s=choose.choice((None, 40.0)), waits=choose.random() < 0.3)
        self.wire.append(asked)

    def rank_releases(self, choose: random.Random) -> None:
        grants = [grant for grant in self.got.values() if grant.leases]
        if grants:
            lease = choose.choice(choose.choice(grants).leases)
            self.wire.append(Release(lease.session, lease.id))

    def rank_ends(self, choose: random.Random) -> None:
        """Its connections end: each agent sees that at once, the manager is told."""
        gone = choose.choice(self.sessions)
        for key, grant in self.got.items():
            for lease in grant.leases if key[0] == gone else ():
                self.agents[lease.node].stop(lease.id, ())
        self.wire.append(SessionEnded(gone))
        self.sessions[self.sessions.index(gone)] = self.next_session
        self.next_session += 1

    def agent_reports(self, choose: random.Random) -> None:
        self.now += 0.01
        agent = self.agents[choose.choice(NODES)]
        if agent.incarnation:
            self.wire.append(agent.report(self.now))
        else:
            self.wire.append(AgentStarted(agent.node, agent.name))

    def agent_s_workers_end(self, choose: random.Random) -> None:
        """By themselves, or because an owner came: the agent needs nobody's leave."""
        agent = self.agents[choose.choice(NODES)]
        if agent.begun:
            lease_id = choose.choice(list(agent.begun))
            number = choose.choice(list(agent.begun[lease_id]))
            agent.stop(lease_id, (number,))
            self.wire.append(WorkersStopped(lease_id, (number,)))

    def owner_comes_or_goes(self, choose: random.Random) -> None:
        agent = self.agents[choose.choice(NODES)]
        agent.spare = tuple(core for core in range(CORES) if choose.random() < 0.8)
        for lease_id, workers in list(agent.begun.items()):
            if gone := tuple(number for number, cores in workers.items() if not set(cores) <= set(agent.spare)):
                agent.stop(lease_id, gone)

    def agent_restarts(self, choose: random.Random) -> None:
        self.start_agent(self.agents[choose.choice(NODES)])

    def manager_loses_patience(self, choose: random.Random) -> None:
        name = choose.choice(NODES)
        self.handle([choose.choice((NodeSilent, NodeLost))(name)])
        assert not any(view.free for view in self.book.nodes if view.node == name and not view.silent)

    def somebody_revokes(self, choose: random.Random) -> None:
        if leases := self.book.leases:
            self.handle([Revoke(choose.choice(leases).id, grace_s=1.0)])

    def somebody_drains(self, choose: random.Random) -> None:
        self.handle([choose.choice((NodeDrained, NodeUndrained, NodeUndrained))(choose.choice(NODES))])

    def time_passes(self, choose: random.Random) -> None:
        self.now += choose.choice((0.1, 1.0, WITHIN_S))
        self.handle([Tick()])

    def manager_is_killed(self, choose: random.Random) -> None:
        """In the middle of a group of messages, before or after the group is on disk."""
        events = [message for message in choose.sample(self.wire, min(3, len(self.wire)))
                  if isinstance(message, Event)]
        self.handle(events, crash=choose.choice(("before it is written", "after it is written")))


OPERATIONS = {
    World.a_message_arrives: 60, World.a_message_is_lost: 8, World.rank_asks: 14, World.rank_releases: 5,
    World.rank_ends: 1.5, World.agent_reports: 14, World.agent_s_workers_end: 3, World.owner_comes_or_goes: 2,
    World.agent_restarts: 0.5, World.manager_loses_patience: 1, World.somebody_revokes: 1,
    World.somebody_drains: 0.5, World.time_passes: 4, World.manager_is_killed: 0.7,
}


def live_for(world: World, choose: random.Random, steps: int) -> None:
    for operation in choose.choices(list(OPERATIONS), list(OPERATIONS.values()), k=steps):
        operation(world, choose)
        world.check()
    world.end()


def test_no_lost_doubled_or_late_message_lends_a_core_twice():
    """RFAAS_SOAK_LEASES sets how many operations; many short lives, since a restart reads a whole life back."""
    count = int(os.environ.get("RFAAS_SOAK_LEASES", "60000"))
    grants = 0
    for seed in range(max(1, count // 1000)):
        world = World()
        try:
            live_for(world, random.Random(seed), 1000)
        except AssertionError as problem:
            problem.add_note(f"seed {seed}")
            raise
        grants += world.grants
    assert grants > count // 100, "the test exercises too little"


class NetworkMachine(RuleBasedStateMachine):
    """The same world, driven by hypothesis, which finds the shortest failing life."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(choose=st.randoms(use_true_random=False), operation=st.sampled_from(list(OPERATIONS)))
    def happens(self, choose: random.Random, operation) -> None:
        operation(self.world, choose)

    @invariant()
    def nothing_that_runs_is_free(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.end()


TestNetworkMachine = NetworkMachine.TestCase
TestNetworkMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
