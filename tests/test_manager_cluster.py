"""A cluster's manager: who may do what, and agents that fall silent, die and come back."""

from __future__ import annotations

import itertools

import pytest

from rfaas_mpi.errors import AuthError, ServiceError
from rfaas_mpi.leases import Cause, LeaseBook, LeaseState, LiveLease, NodeReport
from rfaas_mpi.leases.held import Held
from rfaas_mpi.manager.agents import DEAD_AFTER_S, SILENT_AFTER_S
from rfaas_mpi.manager.cluster import FORGET_S, Cluster, Policy, session_number
from rfaas_mpi.manager.core import Admit, Granted, Notify, Refused, StopWorkers
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import Placer, pick_cores

GIB = 1 << 30
ROOT, ANNA, BERT = 0, 1000, 1001
_ids = itertools.count(1)


class Site:
    """A cluster and the reports of its agents."""

    def __init__(self, book: LeaseBook | None = None, placer: Placer | None = None) -> None:
        self.cluster = Cluster(book or LeaseBook(pick_cores, activate_within_s=20.0, epoch=10), 0.0, placer=placer,
                               policy=Policy(lenders=frozenset((ROOT, 500)), admins=frozenset((ROOT,))))
        self.numbers: dict[tuple[int, str], int] = {}

    def start(self, uid: int, node: str, now: float = 0.0) -> None:
        *_, admit = self.cluster.agent_started(uid, node, f"agent {next(_ids)}", now)
        assert isinstance(admit, Admit)
        self.numbers[uid, node] = admit.incarnation

    def report(self, uid: int, node: str, now: float, *live, cores: int = 4, **more) -> list:
        return self.cluster.report(uid, NodeReport(**{
            "node": node, "spare": tuple(range(cores)), "memory_bytes": 8 * GIB,
            "incarnation": self.numbers.get((uid, node), 0), "clock_ns": 10**12 + int(now * 1e9),
            "live": tuple(LiveLease(lease.id, lease.epoch, lease.workers) for lease in live), **more}), now)

    def ask(self, uid: int, workers: int = 1, *, session: str = "s", now: float = 0.0, timeout_s: float = 0.0) -> list:
        return self.cluster.ask(uid, session, LeaseRequest(next(_ids), workers, workers, 1, timeout_s=timeout_s), now)


@pytest.fixture
def site() -> Site:
    """One node whose agent is the site's."""
    site = Site()
    site.start(ROOT, "nid1")
    site.report(ROOT, "nid1", 0.0)
    return site


def lease_in(actions: list):
    [grant] = [action for action in actions if isinstance(action, Granted)]
    [lease] = grant.leases
    return lease


# --- windows whose end is known ----------------------------------------------

def test_a_lease_ends_before_the_job_that_is_planned_for_its_node_and_sooner_where_its_agent_says_so(site):
    site.cluster.windows_end({"nid1": 100.0})
    assert lease_in(site.ask(ANNA)).hard_end is None, "what the node's last report says"
    for number, (said, ends) in enumerate(((None, 100.0), (200.0, 100.0), (50.0, 50.0)), 1):
        site.report(ROOT, "nid1", float(number), hard_end=said)
        assert lease_in(site.ask(ANNA, now=float(number))).hard_end == ends
    site.cluster.windows_end({})
    site.report(ROOT, "nid1", 10.0, cores=8)
    assert lease_in(site.ask(ANNA, now=10.0)).hard_end is None, "that job was cancelled"


def test_nothing_is_lent_on_a_node_whose_job_should_have_begun(site):
    site.cluster.windows_end({"nid1": 5.0})
    site.report(ROOT, "nid1", 6.0)
    assert isinstance(site.ask(ANNA, now=6.0)[0], Refused)


def test_what_is_planned_for_the_site_s_nodes_is_nothing_to_a_user_s_own_agent(site):
    site.cluster.windows_end({"nid2": 5.0})
    site.start(BERT, "nid2")
    site.report(BERT, "nid2", 6.0)
    assert lease_in(site.ask(BERT, 4, now=6.0)).hard_end is None


# --- who lends to whom ------------------------------------------------------

def test_a_user_s_own_agent_never_gets_another_user_s_work(site):
    site.start(BERT, "fake")
    site.report(BERT, "fake", 0.0, cores=128, lends_to_uid=None)
    assert lease_in(site.ask(ANNA)).node == "nid1"
    [refused] = site.ask(ANNA, 10)
    assert isinstance(refused, Refused)
    assert lease_in(site.ask(BERT, 100)).node == f"fake/{BERT}"


def test_a_user_s_agent_cannot_speak_for_the_site_s_agent_on_a_node(site):
    lease = lease_in(site.ask(ANNA))
    site.start(BERT, "nid1", 1.0)
    assert site.report(BERT, "nid1", 2.0, cores=0) == []
    assert site.cluster.book.lease(lease.id).state is LeaseState.GRANTED
    assert {view.node for view in site.cluster.nodes(ROOT)} == {"nid1", f"nid1/{BERT}"}


def test_a_second_configured_service_user_lends_to_all(site):
    site.start(500, "nid2")
    site.report(500, "nid2", 0.0, cores=9)
    assert lease_in(site.ask(ANNA, 9)).node == "nid2"


def test_a_user_s_own_nodes_make_his_debt_no_smaller():
    held = Held(86400.0)
    held.add({ANNA: 1000.0, BERT: 100_000.0}, 0.0)
    placer = Placer(Policy().placement, Policy().settings)
    site = Site(LeaseBook(placer, epoch=10, held=held), placer)
    site.start(ROOT, "nid1")
    site.report(ROOT, "nid1", 1.0, cores=64)
    before = placer.debt_s(BERT)
    site.start(BERT, "mine")
    site.report(BERT, "mine", 1.0, cores=4096)
    assert placer.debt_s(BERT) == before > 700.0


def test_a_user_s_agent_cannot_invent_its_number(site):
    site.numbers[BERT, "fake"] = 10**9
    with pytest.raises(ServiceError, match="never admitted"):
        site.report(BERT, "fake", 0.0)


@pytest.mark.parametrize("node", ["", "a/0", "../x", "nid1\n", "ä", "-x", "x" * 300])
def test_a_name_that_is_no_node_s_is_refused(site, node):
    with pytest.raises(ServiceError, match="no name of a node"):
        site.cluster.agent_started(ROOT, node, "a", 0.0)


@pytest.mark.parametrize("report", [{"incarnation": 0}, {"live": None}])
def test_a_report_needs_a_number_and_its_leases(site, report):
    with pytest.raises(ServiceError, match="register it first"):
        site.cluster.report(ROOT, NodeReport(**{"node": "nid1", "spare": (), "memory_bytes": 0, "incarnation": 1,
                                                "clock_ns": 1, "live": (), **report}), 0.0)


# --- one user's leases are closed to another ---------------------------------

def test_a_lease_of_another_user_is_not_there(site):
    lease = lease_in(site.ask(ANNA))
    for forbidden in (lambda: site.cluster.release(BERT, lease.id, 1.0),
                      lambda: site.cluster.revoke(BERT, lease.id, 0.0, 1.0),
                      lambda: site.cluster.release(BERT, 999, 1.0)):
        with pytest.raises(ServiceError, match=f"uid {BERT} has no lease"):
            forbidden()
    assert site.cluster.leases(BERT) == [] and site.cluster.leases(ANNA) == site.cluster.leases(ROOT) == [lease]


def test_two_users_sessions_of_one_name_are_two(site):
    lease = lease_in(site.ask(ANNA, session="job 7"))
    assert site.cluster.end_session(BERT, "job 7", 1.0) == []
    assert site.cluster.book.lease(lease.id).state is LeaseState.GRANTED
    [stop] = site.cluster.end_session(ANNA, "job 7", 1.0)
    assert isinstance(stop, StopWorkers) and stop.cause is Cause.SESSION_ENDED
    assert session_number(ANNA, "job 7") != session_number(BERT, "job 7") and session_number(ANNA, "x") < 2**63


def test_a_user_sees_no_other_user_s_nodes(site):
    site.start(BERT, "own")
    site.report(BERT, "own", 0.0)
    assert [view.node for view in site.cluster.nodes(ANNA)] == ["nid1"]
    assert [view.node for view in site.cluster.nodes(BERT)] == ["nid1", f"own/{BERT}"]


@pytest.mark.parametrize("session", ["", "x" * 200, "a\nb"])
def test_a_name_that_is_no_session_s_is_refused(site, session):
    with pytest.raises(ServiceError, match="no name of a session"):
        site.ask(ANNA, session=session)


# --- administrators -----------------------------------------------------------

def test_only_an_administrator_drains(site):
    lease_in(site.ask(ANNA))
    for forbidden in (lambda: site.cluster.drain(ANNA, [], 0.0, 1.0), lambda: site.cluster.undrain(ANNA, [], 1.0)):
        with pytest.raises(AuthError, match="only an administrator"):
            forbidden()
    notify, stop = site.cluster.drain(ROOT, [], 2.0, 1.0)
    assert isinstance(notify, Notify) and stop.grace_s == 2.0
    assert isinstance(site.ask(ANNA, now=1.0)[0], Refused)


def test_whoever_waits_is_served_when_a_node_lends_again(site):
    site.cluster.drain(ROOT, ["nid1"], 0.0, 1.0)
    assert site.ask(ANNA, now=2.0, timeout_s=60.0) == []
    assert lease_in(site.cluster.undrain(ROOT, ["nid1"], 3.0)).uid == ANNA


def test_a_node_that_is_not_known_is_named_and_nothing_is_drained(site):
    with pytest.raises(ServiceError, match="no agent has reported from nid9"):
        site.cluster.drain(ROOT, ["nid1", "nid9"], 0.0, 1.0)
    assert not site.cluster.nodes(ROOT)[0].drained


@pytest.mark.parametrize("grace_s", [-1.0, float("nan"), float("inf"), 1e9])
def test_a_senseless_grace_is_refused(site, grace_s):
    with pytest.raises(ValueError, match="grace_s is"):
        site.cluster.drain(ROOT, [], grace_s, 1.0)


# --- silence, death, return ---------------------------------------------------

def test_a_silent_node_keeps_its_leases_and_a_dead_one_loses_them(site):
    lease = lease_in(site.ask(ANNA))
    site.report(ROOT, "nid1", 1.0, lease)
    assert site.cluster.tick(1.0 + SILENT_AFTER_S) == []
    assert site.cluster.book.lease(lease.id).state is LeaseState.ACTIVE
    assert isinstance(site.ask(ANNA, now=40.0)[0], Refused)
    [notify] = site.cluster.tick(1.0 + DEAD_AFTER_S)
    assert isinstance(notify, Notify) and notify.cause is Cause.NODE_LOST
    [stop] = site.report(ROOT, "nid1", 400.0, lease)
    assert isinstance(stop, StopWorkers) and stop.lease_id == lease.id


def test_only_news_keep_an_agent_alive(site):
    for _ in range(5):
        site.cluster.report(ROOT, NodeReport(node="nid1", spare=(0,), memory_bytes=0, live=(), clock_ns=10**12,
                                             incarnation=site.numbers[ROOT, "nid1"]), 30.0)
    site.cluster.tick(SILENT_AFTER_S)
    assert site.cluster.nodes(ROOT)[0].silent


def test_a_heartbeat_in_time_keeps_a_node_lending(site):
    for beat in range(1, 40):
        site.report(ROOT, "nid1", beat * 10.0)
        assert site.cluster.tick(beat * 10.0) == []
    assert lease_in(site.ask(ANNA, now=391.0))


def test_the_next_deadline_is_never_later_than_what_is_due(site):
    assert site.cluster.next_deadline() <= SILENT_AFTER_S
    site.ask(ANNA, 9, now=0.0, timeout_s=7.0)
    assert site.cluster.next_deadline() <= 7.0
    assert isinstance(site.cluster.tick(7.0)[0], Refused)


# --- users' own nodes that are gone --------------------------------------------------

def _dead_since(site: Site) -> float:
    """Until all that said nothing after 0 are dead."""
    site.cluster.tick(SILENT_AFTER_S)
    site.cluster.tick(DEAD_AFTER_S)
    return DEAD_AFTER_S


def test_a_user_s_own_node_that_is_dead_for_long_is_forgotten_and_the_site_s_is_not():
    site = Site(placer=(placer := Placer()), book=LeaseBook(placer, epoch=10))
    for uid, node in ((ROOT, "nid1"), (ANNA, "mine")):
        site.start(uid, node)
        site.report(uid, node, 0.0)
    then = _dead_since(site)
    assert site.cluster.forget(then + FORGET_S - 1.0) == []
    assert site.cluster.forget(then + FORGET_S) == [f"mine/{ANNA}"]
    assert site.cluster.forget(then + FORGET_S) == []
    assert site.cluster.agents.dead == {"nid1"}
    assert set(placer.view().nodes) == {"nid1"}
    # Who comes back is a new one, and lends.
    site.start(ANNA, "mine", then + FORGET_S)
    site.report(ANNA, "mine", then + FORGET_S)
    assert lease_in(site.ask(ANNA, now=then + FORGET_S)).node == f"mine/{ANNA}"


def test_a_user_s_own_node_that_an_administrator_has_drained_or_that_lives_is_not_forgotten(site):
    for node in ("drained", "alive"):
        site.start(ANNA, node)
        site.report(ANNA, node, 0.0)
    site.cluster.drain(ROOT, [f"drained/{ANNA}"], 0.0, 0.0)
    _dead_since(site)
    site.report(ANNA, "alive", DEAD_AFTER_S)
    assert site.cluster.forget(DEAD_AFTER_S + FORGET_S) == []
    assert site.cluster.book.nodes and "alive/1000" in {view.node for view in site.cluster.nodes(ANNA)}


def test_a_user_s_own_node_that_registers_and_never_reports_is_forgotten_too(site):
    site.start(ANNA, "mine")
    site.cluster.expected([f"mine/{ANNA}", "nid2"], 0.0)
    then = _dead_since(site)
    assert site.cluster.forget(then + FORGET_S) == [f"mine/{ANNA}"]
