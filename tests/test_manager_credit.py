"""Credit for lenders: who earns it and how much, that nobody earns it by claims, and that no manager forgets it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import faults
import msgspec
import pytest
from cluster import GUARD_S, Daemon, wait_until
from hypothesis import given
from hypothesis import strategies as st
from postgres_server import ledger_at

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.leases import GrantedWorker, Lease, LeaseBook, LeaseState, LiveLease, NodeReport
from rfaas_mpi.leases.held import Held
from rfaas_mpi.manager.cluster import Cluster, Policy
from rfaas_mpi.manager.core import Admit, Granted
from rfaas_mpi.manager.credit import KEPT_EVERY_S, Credit, Lent, owners_of
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.policy import load_policy
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import Placer

ROOT, ANNA, BERT, CARL = 0, 1000, 1001, 1002
GIB = 1 << 30
HALF_LIFE_S = 1000.0
_ids = itertools.count(1)


def lease(number: int = 1, cores: int = 4, *, uid: int = BERT, state: LeaseState = LeaseState.ACTIVE,
          left: int | None = None, node: str = "n") -> Lease:
    """A lease with a worker on each core, of which so many are left."""
    workers = tuple(GrantedWorker(core, (core,)) for core in range(cores if left is None else left))
    return Lease(number, number, node, 1, uid, number, workers, GIB, state=state,
                 seen_ns=0 if state is LeaseState.GRANTED else 1)


def lent_by(owner: int, one: Lease) -> dict[int, int]:
    return dict.fromkeys(one.cores, owner)


# --- how much ----------------------------------------------------------------------------------------

def test_a_core_second_that_another_user_held_is_a_core_second_lent():
    lent = Lent(HALF_LIFE_S, 0.0)
    one = lease()
    assert lent.changed(lease(state=LeaseState.GRANTED), {}, 0.0) == []
    [begun] = lent.changed(one, lent_by(ANNA, one), 10.0)
    assert (begun.owner, begun.uid, begun.cores, begun.core_s) == (ANNA, BERT, (0, 1, 2, 3), 0.0)
    assert lent.unkept(15.0) == {ANNA: 20.0}
    [fewer] = lent.changed(lease(left=1), {}, 20.0)
    assert (fewer.cores, fewer.core_s) == ((0,), 40.0)
    [over] = lent.changed(lease(state=LeaseState.RELEASED), {}, 50.0)
    assert (over.cores, over.core_s) == ((), 70.0)
    assert lent.leases == [] and lent.unkept(60.0) == {}


@given(begins=st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 64)), max_size=12),
       asked=st.floats(0, 3e4))
def test_what_is_lent_is_the_sum_of_what_leases_held_and_decays_by_the_half_life(begins, asked):
    """Against sums over each lease, whatever the order of begins and ends."""
    lent = Lent(HALF_LIFE_S, 0.0)
    rate = math.log(2) / HALF_LIFE_S
    events = []
    for number, (since, took, cores) in enumerate(begins, 1):
        one = lease(number, cores)
        events += [(since, 0, number, one), (since + took, 1, number, lease(number, cores, state=LeaseState.RELEASED))]
    kept: dict[int, float] = {}
    for when, _, number, one in sorted(events, key=lambda event: event[:3]):
        if when <= asked:
            for line in lent.changed(one, lent_by(ANNA, one), when):
                kept[number] = line.core_s
    expected = plain = 0.0
    for since, took, cores in begins:
        until = min(asked, since + took)
        if until >= since:
            plain += cores * (until - since)
            expected += cores * (math.exp(-rate * (asked - until)) - math.exp(-rate * (asked - since))) / rate
    assert lent.core_s(asked).get(ANNA, 0.0) == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert sum(kept.values()) + lent.unkept(asked).get(ANNA, 0.0) == pytest.approx(plain, rel=1e-9, abs=1e-3)
    assert lent.core_s(asked + 10 * HALF_LIFE_S).get(ANNA, 0.0) <= expected + plain + max(
        [cores for _, _, cores in begins], default=0) * len(begins) * HALF_LIFE_S / math.log(2)


@given(st.floats(0, 1e12), st.floats(0, 100), st.floats(1, 1e9), st.floats(0, 1e9), st.integers(0, 1000))
def test_credit_is_bounded_and_never_negative(lent, weight, half_life_s, most, extra):
    credit = Credit(weight, half_life_s, most, extra)
    assert 0.0 <= credit.of(lent) <= min(most, weight * lent) + 1e-9
    assert credit.of(-lent) == 0.0
    assert 0 <= credit.cores(credit.of(lent)) <= extra
    assert credit.of(lent) <= credit.of(lent * 2 + 1)


def test_who_lends_so_many_cores_all_the_time_may_hold_as_many_more():
    credit = Credit(half_life_s=HALF_LIFE_S, extra_cores=6)
    lent = Lent(HALF_LIFE_S, 0.0)
    lent.changed(lease(cores=4), lent_by(ANNA, lease(cores=4)), 0.0)
    assert credit.cores(credit.of(lent.core_s(20 * HALF_LIFE_S)[ANNA])) == 4
    assert credit.cores(1e9) == 6
    assert Credit().cores(1e9) == 0, "unless the site says so, no quota grows"


def test_nothing_is_earned_on_a_node_that_was_not_heard_of_any_more():
    lent = Lent(HALF_LIFE_S, 0.0)
    one = lease()
    lent.changed(one, lent_by(ANNA, one), 0.0)
    lent.heard("n", 10.0)
    [line] = lent.changed(lease(state=LeaseState.LOST), {}, 310.0)
    assert line.core_s == 40.0 and line.cores == ()
    rate = math.log(2) / HALF_LIFE_S
    assert lent.core_s(310.0)[ANNA] == pytest.approx(4 * (math.exp(-rate * 300) - math.exp(-rate * 310)) / rate)


def test_when_agents_were_last_heard_of_is_known_of_those_that_lend_or_still_report():
    lent = Lent(HALF_LIFE_S, 0.0)
    one = lease()
    lent.changed(one, lent_by(ANNA, one), 10.0)
    for node in (one.node, *(f"gone-{number}" for number in range(1000))):
        lent.heard(node, 10.0)
    assert lent.due(KEPT_EVERY_S) and len(lent._heard) == 1001
    lent.heard("other", 2 * KEPT_EVERY_S - 1)
    assert lent.due(2 * KEPT_EVERY_S) and set(lent._heard) == {one.node, "other"}


# --- who ---------------------------------------------------------------------------------------------

def test_nobody_earns_by_lending_to_himself_nor_the_site_nor_who_is_not_known():
    one = lease(uid=BERT, cores=3)
    site = frozenset((ROOT, 500))
    assert owners_of(one, ANNA, site, {}) == {0: ANNA, 1: ANNA, 2: ANNA}
    assert owners_of(one, BERT, site, {}) == {}
    assert owners_of(one, ROOT, site, {}) == owners_of(one, None, site, {0: ANNA}) == {}
    # A site's agent knows whose jobs' cores they are; only it is believed.
    assert owners_of(one, ROOT, site, {0: ANNA, 1: BERT, 2: 500, 7: CARL}) == {0: ANNA}
    assert owners_of(one, CARL, site, {0: ANNA}) == {0: CARL, 1: CARL, 2: CARL}


class Site:
    """A cluster in which ANNA's agents lend to all, as the site's do, and what its registry would keep."""

    def __init__(self, **credit: object) -> None:
        self.policy = Policy(lenders=frozenset((ROOT, ANNA)), admins=frozenset((ROOT,)), site=frozenset((ROOT,)),
                             credit=Credit(half_life_s=HALF_LIFE_S, **credit))
        self.lent = Lent(HALF_LIFE_S, 0.0)
        placer = Placer("default", self.policy.settings)
        self.cluster = Cluster(LeaseBook(placer, epoch=10, durable=True, held=Held(HALF_LIFE_S)), 0.0, placer=placer,
                               policy=self.policy, lent=self.lent)
        self.numbers: dict[tuple[int, str], int] = {}

    def start(self, uid: int, node: str, cores: int = 4, now: float = 0.0) -> None:
        [admit] = [action for action in self.cluster.agent_started(uid, node, f"agent {next(_ids)}", now)
                   if isinstance(action, Admit)]
        self.numbers[uid, node] = admit.incarnation
        self.report(uid, node, now, cores=cores)

    def report(self, uid: int, node: str, now: float, *live: Lease, cores: int = 4,
               jobs: dict[int, int] | None = None) -> list:
        actions = self.cluster.report(uid, NodeReport(
            node=node, spare=tuple(range(cores)), memory_bytes=8 * GIB, incarnation=self.numbers[uid, node],
            clock_ns=10**12 + int(now * 1e9),
            live=tuple(LiveLease(one.id, one.epoch, one.workers) for one in live)), now, jobs=jobs or {})
        self.account(now)
        return actions

    def account(self, now: float) -> None:
        """As a registry does, for all that has changed."""
        for one in self.cluster.book.changes().leases:
            self.lent.changed(one, self.cluster.owners(one) if self.lent.begun(one) else {}, now)

    def ask(self, uid: int, workers: int, now: float, timeout_s: float = 0.0) -> list:
        return self.cluster.ask(uid, f"of {uid}", LeaseRequest(next(_ids), workers, workers, 1, timeout_s=timeout_s),
                                now)

    def lend(self, uid: int, node: str, to: int, cores: int, since: float, until: float) -> None:
        """`to` has so many cores of the node for so long."""
        [one] = leases_in(self.ask(to, cores, since))
        assert one.node.partition("/")[0] == node
        self.report(uid, node, since + 0.5, one)
        self.cluster.release(to, one.id, until)
        self.report(uid, node, until, cores=4)


def leases_in(actions: list) -> list[Lease]:
    return [one for action in actions if isinstance(action, Granted) for one in action.leases]


def test_a_user_whose_node_was_lent_comes_before_who_came_first_until_he_has_used_as_much():
    site = Site()
    site.start(ANNA, "hers")
    site.lend(ANNA, "hers", BERT, 4, 0.0, 100.0)
    assert site.cluster.credit(ANNA, 100.0) == pytest.approx(4 * 99.5, rel=0.05)
    assert site.cluster.credit(BERT, 100.0) == 0.0
    [held] = leases_in(site.ask(CARL, 4, 101.0))
    site.report(ANNA, "hers", 101.5, held)
    assert site.ask(BERT, 4, 102.0, timeout_s=500.0) == site.ask(ANNA, 4, 103.0, timeout_s=500.0) == []
    site.cluster.release(CARL, held.id, 104.0)
    [first] = leases_in(site.report(ANNA, "hers", 104.5))
    assert first.uid == ANNA
    # Her own use uses it up: next time Bert, who came first, is first.
    site.report(ANNA, "hers", 105.0, first)
    site.cluster.release(ANNA, first.id, 320.0)
    [second] = leases_in(site.report(ANNA, "hers", 320.5))
    assert second.uid == BERT


def test_who_waits_is_put_in_order_by_asking_once_for_each_user_and_for_no_other(monkeypatch):
    """A manager does it with each report, however many wait and have ever lent."""
    site = Site()
    site.start(ROOT, "site")
    [held] = leases_in(site.ask(CARL, 4, 0.0))
    site.report(ROOT, "site", 0.5, held)
    for number in range(40):
        site.ask(ANNA if number % 2 else BERT, 4, 1.0 + number, timeout_s=500.0)
    asked: list[int] = []
    precedence = site.cluster.manager.precedence
    assert precedence is not None

    def counted(uid: int) -> float:
        asked.append(uid)
        return precedence(uid)

    site.lent._sums.add({ANNA: 100.0}, 50.0)
    with monkeypatch.context() as patch:
        patch.setattr(Held, "had", None)                 # of all users: who is asked for one doesn't need it
        patch.setattr(site.cluster.manager, "precedence", counted)
        site.report(ROOT, "site", 50.0, held)
    assert sorted(asked) == [ANNA, BERT]
    site.cluster.release(CARL, held.id, 51.0)
    [first] = leases_in(site.report(ROOT, "site", 51.5))
    assert first.uid == ANNA


def test_where_nobody_has_credit_who_came_first_is_first():
    for credit in (Site(), Site(weight=0.0)):
        credit.start(ROOT, "site")
        credit.lend(ROOT, "site", BERT, 4, 0.0, 100.0)
        assert credit.lent.core_s(100.0) == {}
        [held] = leases_in(credit.ask(CARL, 4, 101.0))
        credit.report(ROOT, "site", 101.5, held)
        credit.ask(BERT, 4, 102.0, timeout_s=500.0)
        credit.ask(ANNA, 4, 103.0, timeout_s=500.0)
        credit.cluster.release(CARL, held.id, 104.0)
        [first] = leases_in(credit.report(ROOT, "site", 104.5))
        assert first.uid == BERT


def test_what_was_lent_makes_a_debt_smaller_and_no_more_than_that():
    site = Site()
    site.start(ANNA, "hers")
    site.start(ROOT, "site", cores=64)
    book = site.cluster.book
    book.held.add({ANNA: 10_000.0, BERT: 10_000.0, CARL: 1000.0}, 0.0)
    debt_s = site.cluster._placer.debt_s
    before = debt_s(ANNA)
    assert before == debt_s(BERT) > 0
    site.lent.changed(lease(99), lent_by(ANNA, lease(99)), 0.0)
    site.report(ROOT, "site", 500.0, cores=64)
    assert debt_s(ANNA) < debt_s(BERT)
    site.lent._sums.add({ANNA: 1e12}, 500.0)
    assert debt_s(ANNA) == 0.0 and debt_s(BERT) > 0.0
    assert site.cluster.credit(ANNA, 500.0) == site.policy.credit.core_s_max


def test_an_agent_whom_the_site_does_not_trust_earns_nothing_whatever_it_claims():
    """It lends to its own user only; and it speaks for no other node, nor for whose jobs run there."""
    site = Site()
    site.start(BERT, "fake", cores=128)
    [own] = leases_in(site.ask(BERT, 100, 0.0))
    assert own.node == f"fake/{BERT}"
    site.report(BERT, "fake", 1.0, own, cores=128, jobs=dict.fromkeys(range(128), CARL))
    claimed = msgspec.structs.replace(own, id=own.id + 7, uid=CARL, workers=(GrantedWorker(0, (120, 121)),))
    site.report(BERT, "fake", 500.0, own, claimed, cores=128, jobs=dict.fromkeys(range(128), CARL))
    assert site.lent.core_s(1000.0) == {} and site.lent.leases == []
    assert leases_in(site.ask(CARL, 1, 1001.0)) == []


def test_a_job_s_user_earns_where_the_site_s_agent_lends_his_cores():
    site = Site()
    site.start(ROOT, "site")
    [one] = leases_in(site.ask(BERT, 4, 0.0))
    site.report(ROOT, "site", 1.0, one, jobs={0: CARL, 1: CARL, 2: BERT})
    assert site.lent.unkept(11.0) == {CARL: 20.0}


# --- kept --------------------------------------------------------------------------------------------

class Clock:

    def __init__(self) -> None:
        self.monotonic, self.wall = 1000.0, 1.8e9

    def on(self, seconds: float) -> float:
        self.monotonic += seconds
        self.wall += seconds
        return self.monotonic


@pytest.fixture(params=["file", "postgres"])
def place(request, tmp_path) -> object:
    """Where a ledger lies: what opens it again."""
    if request.param == "file":
        return lambda clock: Ledger(tmp_path / "ledger.db", monotonic=lambda: clock.monotonic, wall=lambda: clock.wall)
    server = request.getfixturevalue("postgres")
    url = server.database()
    return lambda clock: ledger_at(url, monotonic=lambda: clock.monotonic, wall=lambda: clock.wall)


def test_what_was_lent_is_kept_with_the_leases_and_goes_on_in_the_next_manager(place):
    clock = Clock()
    numbers = {}

    @contextlib.contextmanager
    def manager() -> Iterator[tuple[Cluster, Registry, Lent]]:
        ledger = place(clock)
        try:
            kept, core_s = ledger.lent(HALF_LIFE_S)
            lent = Lent(HALF_LIFE_S, clock.monotonic, kept=kept, core_s=core_s)
            placer = Placer("default", Policy().settings)
            registry = Registry(ledger, placer, clock.monotonic, lent=lent, clock=lambda: clock.monotonic)
            cluster = Cluster(registry.book, clock.monotonic, placer=placer, lent=lent,
                              policy=Policy(lenders=frozenset((ANNA,)), site=frozenset((ROOT,))))
            registry.owners = cluster.owners
            yield cluster, registry, lent
        finally:
            ledger.close()

    def report(cluster: Cluster, registry: Registry, *live: Lease) -> None:
        registry.add(cluster.report(ANNA, NodeReport(
            node="hers", spare=(0, 1), memory_bytes=8 * GIB, incarnation=numbers["hers"],
            clock_ns=int(clock.monotonic * 1e9),
            live=tuple(LiveLease(one.id, one.epoch, one.workers) for one in live)), clock.monotonic))
        registry.flush()

    with manager() as (cluster, registry, lent):
        actions = cluster.agent_started(ANNA, "hers", "agent", clock.monotonic)
        [numbers["hers"]] = [action.incarnation for action in actions if isinstance(action, Admit)]
        registry.add(actions)
        report(cluster, registry)
        [one] = leases_in(found := cluster.ask(BERT, "s", LeaseRequest(1, 2, 2, 1), clock.monotonic))
        registry.add(found)
        clock.on(1.0)
        report(cluster, registry, one)
        clock.on(KEPT_EVERY_S + 1)
        report(cluster, registry, one)           # killed some time after it
        clock.on(50.0)
    clock.on(20.0)
    with manager() as (cluster, registry, lent):
        assert lent.leases == [one.id]
        seconds = KEPT_EVERY_S + 71
        assert lent.core_s(clock.monotonic)[ANNA] == pytest.approx(2 * seconds, rel=0.15)
        report(cluster, registry, one)
        clock.on(10.0)
        registry.add(cluster.release(BERT, one.id, clock.monotonic))
        report(cluster, registry)
    with manager() as (cluster, registry, lent):
        assert lent.leases == []
        ledger = registry._ledger
        assert ledger.lent_core_s() == {ANNA: pytest.approx(2 * (seconds + 10), rel=1e-6)}
        assert ledger.lent_core_s(ANNA) and not ledger.lent_core_s(BERT)
        before = lent.core_s(clock.monotonic)[ANNA]
        assert before == pytest.approx(2 * (seconds + 10), rel=0.15)
        clock.on(HALF_LIFE_S)
        assert lent.core_s(clock.monotonic)[ANNA] == pytest.approx(before / 2)
    with manager() as (cluster, registry, lent):
        assert lent.core_s(clock.monotonic)[ANNA] == pytest.approx(before / 2, rel=1e-6)


# --- settings ----------------------------------------------------------------------------------------

def test_the_policy_file_says_what_lending_is_worth(tmp_path):
    file = tmp_path / "manager.toml"
    file.write_text("[credit]\nweight = 0.5\nhalf_life_s = 60\ncore_h_max = 2\nextra_cores = 8\nsite = [0, 990]\n")
    policy = load_policy(file)
    assert policy.credit == Credit(0.5, 60.0, 7200.0, 8) and policy.site == frozenset((0, 990))
    file.write_text("")
    assert load_policy(file).credit == Credit() and load_policy(file).site == {0, os.geteuid()}


@pytest.mark.parametrize(("text", "key"), [
    ("weight = -1", "credit.weight"), ("half_life_s = 0", "credit.half_life_s"), ("core_h_max = 'x'", "credit.core_h_max"),
    ("extra_cores = 1.5", "credit.extra_cores"), ("site = 'root'", "credit.site"), ("colour = 1", "colour")])
def test_what_lending_can_t_be_worth_is_refused_by_name(tmp_path, text, key):
    file = tmp_path / "manager.toml"
    file.write_text(f"[credit]\n{text}\n")
    with pytest.raises(ConfigError, match=key):
        load_policy(file)


# --- a real manager ----------------------------------------------------------------------------------

CALL = """
import os, sys
import msgspec
from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
# Only now: this user may not see where all that is from.
uid = int(sys.argv[1])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
bodies = {route.name: route.body for route in api.ROUTES}
with ManagerClient(Settings(manager=sys.argv[2], manager_user="0")) as client:
    for line in sys.stdin:
        name, parameters, body = msgspec.json.decode(line)
        kind = bodies[name]
        try:
            answer = client.call(name, None if kind is None else msgspec.convert(body, kind, str_keys=True), **parameters)
        except Exception as error:
            answer = {"failed": str(error)}
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\\n")
        sys.stdout.flush()
"""


class User:
    """A user of this machine, who calls the manager from a process of his own."""

    def __init__(self, uid: int, manager: str) -> None:
        self.uid = uid
        self._process = subprocess.Popen([sys.executable, "-c", CALL, str(uid), manager], env=faults.environment(),
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, name: str, body: msgspec.Struct | None = None, **parameters: object) -> None:
        self._process.stdin.write(msgspec.json.encode([name, parameters, body]) + b"\n")
        self._process.stdin.flush()

    def answer(self) -> dict:
        line = self._process.stdout.readline()
        assert line, "its process ended"
        found = msgspec.json.decode(line)
        assert "failed" not in found, found
        return found

    def call(self, name: str, body: msgspec.Struct | None = None, **parameters: object) -> dict:
        self.ask(name, body, **parameters)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Node:
    """An agent of a user's, as far as the manager can tell."""

    def __init__(self, user: User, node: str) -> None:
        self.user, self.node, self.ns = user, node, 0
        self.number = user.call("start_agent", api.StartAgent(
            node=node, agent=f"agent {next(_ids)}", boot_id="boot", key=bytes(range(32)),
            addresses=("tcp://127.0.0.1:1",), host=node))["incarnation"]

    def report(self, *live: dict, **more: object) -> dict:
        self.ns += 10**9
        return self.user.call("report", msgspec.convert({
            "incarnation": self.number, "clock_ns": self.ns, "spare": [0, 1], "memory_bytes": 8 * GIB,
            "live": [{"lease_id": one["id"], "epoch": one["epoch"], "workers": one["workers"]} for one in live],
            **more}, api.Report, str_keys=True), node=self.node)


def wants(workers: int, timeout_s: float = 0.0) -> api.AskLease:
    return api.AskLease(session="s", request_id=next(_ids), workers_min=workers, workers_max=workers,
                        timeout_s=timeout_s)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can call as several users")
def test_of_two_users_who_compete_the_one_who_lent_more_is_served_first_also_by_the_next_manager():
    directory = Path(tempfile.mkdtemp(prefix="rfaas-t-"))
    directory.chmod(0o755)                   # every user may look for the socket
    socket = directory / "s"
    policy = directory / "manager.toml"
    policy.write_text(f"lenders = [0, {ANNA}]\n[placement]\nmin_age_s = 0\n[credit]\nsite = [0]\n")
    daemon = Daemon(directory / "log", ["manager", "--directory", directory / "state", "--socket", socket,
                                        "--policy", policy])

    def users_of(by: User) -> dict[int, dict]:
        return {row["uid"]: row for row in by.call("usage", by="uid")["rows"]}

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(daemon.close)
        daemon.start()
        wait_until(lambda: answers(socket), "the manager listens")
        root, anna, bert, carl = (User(uid, f"unix:{socket}") for uid in (ROOT, ANNA, BERT, CARL))
        for user in (root, anna, bert, carl):
            stack.callback(user.close)
        hers, forged = Node(anna, "hers"), Node(carl, "forged")
        hers.report()
        # Carl's agent claims what it likes: cores, leases, time, whose cores they are.
        forged.report(spare=list(range(1000)), owners={"0": CARL})
        [lent] = bert.call("ask", wants(2))["leases"]
        assert lent["node"] == "hers"
        hers.report(lent)
        forged.report(lent, owners={"0": CARL}, used=[{
            "number": 1, "lease": lent["id"], "cores": 1000, "memory_bytes": 1, "held_s": 1e8, "cpu_s": 1e8}])
        wait_until(lambda: users_of(root).get(ANNA, {}).get("lent_core_s", 0.0) > 0.2, "she has lent something")
        daemon.kill()
        daemon.start()
        wait_until(lambda: answers(socket), "the next manager listens")
        hers.report(lent)
        rows = users_of(root)
        assert rows[ANNA]["lent_core_s"] > 0.2 and rows[ANNA]["credit_core_s"] > 0.2
        assert all(row["lent_core_s"] == row["credit_core_s"] == 0.0 for uid, row in rows.items() if uid != ANNA)
        assert set(users_of(anna)) == {ANNA}, "a user sees his own"
        # Bert has asked first; Anna has lent.
        bert.ask("ask", wants(2, GUARD_S))
        wait_until(lambda: waiting(socket) == 1, "Bert waits")
        anna.ask("ask", wants(2, GUARD_S))
        wait_until(lambda: waiting(socket) == 2, "Anna waits")
        root.call("release", lease=lent["id"])
        # Her agent reports through somebody who doesn't wait.
        agent = User(ANNA, f"unix:{socket}")
        stack.callback(agent.close)
        hers.user = agent
        hers.report()
        [first] = anna.answer()["leases"]
        assert first["node"] == "hers" and waiting(socket) == 1
        root.call("release", lease=first["id"])
        hers.report(over=[first["id"]])
        [second] = bert.answer()["leases"]
        assert second["node"] == "hers"


def answers(socket: Path) -> bool:
    with contextlib.suppress(Exception), ManagerClient(Settings(manager=f"unix:{socket}", manager_user="0")) as client:
        client.call("nodes")
        # Root gets in before all others may.
        return socket.stat().st_mode & 0o666 == 0o666
    return False


def waiting(path: Path) -> int:
    """Demands that wait, by the manager's figures."""
    import http.client
    import socket
    with socket.socket(socket.AF_UNIX) as connection, contextlib.closing(http.client.HTTPConnection("m")) as asked:
        connection.connect(str(path))
        asked.sock = connection
        asked.request("GET", "/metrics")
        lines = asked.getresponse().read().decode().splitlines()
    return int(float(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
                     ["rfaas_manager_demands_waiting"]))
