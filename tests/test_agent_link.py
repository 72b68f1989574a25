"""An agent's line to its manager: what is said once, what is said again, and what nobody waits for."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from manager_process import ManagerProcess

from rfaas_mpi import api
from rfaas_mpi.agent import link as link_module
from rfaas_mpi.agent.link import LinkLost, ManagerLink, News, Outbox, ReportDue, heartbeat_s, retry_s
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.leases import LiveLease

GUARD_S = 60.0
GIB = 1 << 30
KEY = X25519PrivateKey.generate().public_key().public_bytes_raw()


def starting(node: str = "nid1") -> api.StartAgent:
    return api.StartAgent(node, f"agent {os.urandom(4).hex()}", "boot", KEY, ("tcp://127.0.0.1:9",), node)


def report(incarnation: int, *live: LiveLease, cores: int = 4) -> api.Report:
    return api.Report(incarnation, time.monotonic_ns(), tuple(range(cores)), 8 * GIB, live)


def line(number: int, lease: int, **more: object) -> api.UsedLine:
    return api.UsedLine(number, lease, 1, GIB, 2.0, 1.0, **more)


class Agent:
    """As little of an agent as a line needs: it says how things are whenever it is asked, and keeps what it was told."""

    def __init__(self, address: str, start: api.StartAgent | None = None, **settings: object) -> None:
        self.told: queue.Queue[News] = queue.Queue()
        self.heard: list[News] = []              # all of it
        self.live: tuple[LiveLease, ...] = ()
        self.incarnation = 0
        self.cores = 4
        self.answers = True
        self.start = start or starting()
        self.link = ManagerLink(Settings(manager=address, **settings), start=self.start, tell=self._hear)

    def _hear(self, news: News) -> None:
        if isinstance(news, api.Admitted):
            self.incarnation = news.incarnation
        self.heard.append(news)
        self.told.put(news)
        if self.answers and isinstance(news, (api.Admitted, ReportDue)):
            self.say()

    def say(self) -> None:
        self.link.report(report(self.incarnation, *self.live, cores=self.cores))

    def hears(self, kind: type) -> News:
        """The next news of this kind; others are passed over."""
        deadline = time.monotonic() + GUARD_S
        while True:
            news = self.told.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(news, kind):
                return news


@pytest.fixture
def line_of() -> Iterator[Callable[..., Agent]]:
    made: list[Agent] = []

    def start(address: str, *arguments: object, **options: object) -> Agent:
        made.append(Agent(address, *arguments, **options))
        made[-1].link.start()
        return made[-1]

    yield start
    for agent in made:
        agent.link.close()


@pytest.fixture
def manager(tmp_path) -> Iterator[ManagerProcess]:
    with ManagerProcess(tmp_path) as process:
        yield process


@pytest.fixture
def call(manager) -> Iterator[ManagerClient]:
    with ManagerClient(Settings(manager=manager.unix)) as client:
        yield client


def granted(call: ManagerClient, workers: int = 1, request: int = 1) -> LiveLease:
    [lease] = call.call("ask", api.AskLease("s", request, workers, workers, timeout_s=GUARD_S)).leases
    return LiveLease(lease.id, lease.epoch, lease.workers)


def state(call: ManagerClient, lease: LiveLease) -> str:
    return next((one.state for one in call.call("leases").leases if one.id == lease.lease_id), "ended")


# --- over a real socket -----------------------------------------------------------

def test_an_agent_registers_reports_and_hears_orders(line_of, manager, call, wait_until):
    agent = line_of(manager.unix)
    admitted = agent.hears(api.Admitted)
    assert admitted.incarnation >= 1 and admitted.node == "nid1"
    lease = granted(call)
    agent.live = (lease,)
    agent.say()
    wait_until(lambda: state(call, lease) == "active", "the manager knows that it runs")
    call.call("revoke", api.RevokeLease(grace_s=1.5), lease=lease.lease_id)
    orders = agent.hears(api.Orders)
    while not orders.stop:                   # keys may come first
        orders = agent.hears(api.Orders)
    assert [(stop.lease_id, stop.cause, stop.grace_s) for stop in orders.stop] == [(lease.lease_id, "revoked", 1.5)]
    agent.live = ()
    agent.say()
    wait_until(lambda: state(call, lease) == "ended", "the manager knows that it has ended")


def test_a_manager_that_was_killed_is_found_again_and_nothing_used_is_lost_or_doubled(line_of, tmp_path, wait_until):
    first = ManagerProcess(tmp_path)
    agent = line_of(first.unix)
    with ManagerClient(Settings(manager=first.unix)) as call:
        agent.hears(api.Admitted)
        number = agent.incarnation
        lease = granted(call)
        agent.live = (lease,)
        agent.say()
        wait_until(lambda: state(call, lease) == "active", "it runs")
        agent.link.used([line(1, lease.lease_id)])
        agent.say()
        wait_until(lambda: agent.link.unwritten == 0, "the first line is written down")
        first.kill()
        agent.hears(LinkLost)
        agent.link.used([line(2, lease.lease_id), line(3, lease.lease_id)])
        agent.say()
        with ManagerProcess(tmp_path):
            agent.hears(api.Admitted)
            assert agent.incarnation == number, "the same agent became another one"
            wait_until(lambda: agent.link.unwritten == 0, "the other lines are written down")
            assert state(call, lease) == "active"
            [row] = call.call("usage", by="lease").rows
            assert (row["lease"], row["workers"], row["core_s"]) == (lease.lease_id, 3, 6.0)
    first.kill()


def test_a_line_whose_answer_was_lost_counts_once(line_of, manager, call, wait_until):
    agent = line_of(manager.unix)
    agent.hears(api.Admitted)
    lease = granted(call)
    agent.link.used([line(1, lease.lease_id)])
    agent.say()
    wait_until(lambda: agent.link.unwritten == 0, "it is written down")
    # The same agent says it again, as one does who has heard no answer.
    again = line_of(manager.unix, agent.start)
    again.hears(api.Admitted)
    again.link.used([line(1, lease.lease_id), line(2, lease.lease_id)])
    again.say()
    wait_until(lambda: again.link.unwritten == 0, "both are written down")
    [row] = call.call("usage", by="lease").rows
    assert row["workers"] == 2


def test_an_agent_whose_node_was_taken_over_is_told_and_its_line_ends(line_of, manager, wait_until):
    old = line_of(manager.unix)
    old.hears(api.Admitted)
    new = line_of(manager.unix, starting())
    new.hears(api.Admitted)
    wait_until(lambda: old.say() or any(getattr(news, "superseded", False) for news in old.heard), "it is told")
    old.link._thread.join(GUARD_S)
    assert not old.link._thread.is_alive()


def test_without_a_manager_the_line_goes_on_trying_and_says_so_once(line_of, tmp_path, wait_until):
    agent = line_of(f"unix:{tmp_path}/manager.sock")
    wait_until(lambda: agent.link._attempt >= 3, "it tries again")
    with ManagerProcess(tmp_path):
        agent.hears(api.Admitted)
        [lost] = [news for news in agent.heard if isinstance(news, LinkLost)]
        assert "manager.sock" in lost.reason


@pytest.mark.parametrize("answer", [b'{"node":"\xff"}', b'{"x":' + b"[" * 9000])
def test_an_answer_that_can_t_be_read_breaks_the_line_and_no_more(line_of, tmp_path, answer):
    path = tmp_path / "manager.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        agent = line_of(f"unix:{path}")
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            agent.hears(LinkLost)
    path.unlink()
    with ManagerProcess(tmp_path):
        agent.hears(api.Admitted)
        agent.link.close()


def test_what_nobody_expected_is_logged_with_its_place_and_the_line_goes_on(line_of, manager, monkeypatch, caplog):
    calls = iter([KeyError("a fault of ours")])
    open_again = link_module._Connection.open

    async def faulty(self: link_module._Connection, node: str) -> None:
        for error in calls:
            raise error
        await open_again(self, node)

    monkeypatch.setattr(link_module._Connection, "open", faulty)
    agent = line_of(manager.unix)
    assert "a fault of ours" in agent.hears(LinkLost).reason
    agent.hears(api.Admitted)
    assert "in faulty" in caplog.text


def test_a_fault_of_the_agent_s_own_is_told_while_the_manager_is_away_too(line_of, manager, monkeypatch, caplog):
    faults = iter([ConnectionRefusedError("nobody there"), RuntimeError("a fault of ours")])
    open_again = link_module._Connection.open

    async def faulty(self: link_module._Connection, node: str) -> None:
        for error in faults:
            raise error
        await open_again(self, node)

    monkeypatch.setattr(link_module._Connection, "open", faulty)
    agent = line_of(manager.unix)
    assert "nobody there" in agent.hears(LinkLost).reason
    agent.hears(api.Admitted)
    assert "RuntimeError: a fault of ours" in caplog.text


def test_a_heartbeat_is_asked_for_when_nothing_changes(line_of, manager, monkeypatch):
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.05)
    agent = line_of(manager.unix)
    for _ in range(3):
        agent.hears(ReportDue)


def test_many_changes_at_once_travel_in_few_reports(line_of, manager, monkeypatch, wait_until, call):
    monkeypatch.setattr(link_module, "COALESCE_S", 0.2)
    sent: list[int] = []
    say = link_module._Connection.say

    async def counted(self: link_module._Connection, data: bytes) -> None:
        sent.append(len(data))
        await say(self, data)

    monkeypatch.setattr(link_module._Connection, "say", counted)
    agent = line_of(manager.unix)
    agent.hears(api.Admitted)
    for cores in range(1, 401):
        agent.cores = cores
        agent.say()
    wait_until(lambda: [len(node.spare) for node in call.call("nodes").nodes] == [400], "the last one arrives")
    assert len(sent) <= 20


def test_what_was_said_last_is_with_the_manager_when_flush_returns(line_of, manager, call):
    agent = line_of(manager.unix)
    agent.hears(api.Admitted)
    for cores in range(8, 2, -1):
        agent.cores = cores
        agent.say()
    assert agent.link.flush(GUARD_S)
    (view,) = call.call("nodes").nodes
    assert view.spare == (0, 1, 2)


def test_flush_says_that_nobody_hears(line_of, tmp_path):
    agent = line_of(f"unix:{tmp_path}/nobody.sock")
    agent.link.used([line(1, 1)])
    assert not agent.link.flush(0.0)


def test_close_leaves_no_thread_and_no_socket(manager):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        agent = Agent(manager.unix)
        agent.link.start()
        agent.hears(api.Admitted)
        agent.link.close()
        agent.link.close()
    never = Agent(manager.unix)
    never.link.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_close_does_not_wait_for_a_manager_that_says_nothing(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        agent = Agent(f"unix:{tmp_path}/s")
        agent.link.start()
        connection, _ = listener.accept()
        with connection:
            agent.link.close()
        assert agent.told.empty()


def test_close_does_not_wait_for_a_manager_that_hangs(manager):
    agent = Agent(manager.unix)
    agent.link.start()
    agent.hears(api.Orders)
    manager.stop()
    agent.link.close()
    assert not agent.link._thread.is_alive()


def test_a_wrong_address_is_said_when_the_line_is_made():
    with pytest.raises(ConfigError, match="RFAAS_MANAGER"):
        Agent(None)


# --- pure -------------------------------------------------------------------------

@given(chance=st.floats(0, 1, exclude_max=True))
def test_heartbeats_come_within_a_fifth_of_ten_seconds(chance):
    assert 8.0 <= heartbeat_s(chance) <= 12.0


def test_heartbeats_differ():
    assert len({heartbeat_s(chance / 100) for chance in range(100)}) == 100


@given(attempt=st.integers(0, 10**9), chance=st.floats(0, 1, exclude_max=True))
def test_attempts_are_further_apart_each_time_and_never_far(attempt, chance):
    assert 0.05 <= retry_s(attempt, chance) <= 5.0
    assert retry_s(attempt + 1, chance) >= retry_s(attempt, chance)


def box(incarnation: int = 7) -> Outbox:
    made = Outbox()
    made.admitted(incarnation)
    return made


def test_the_latest_report_wins_and_one_is_under_way_at_a_time():
    outbox = box()
    one, two, three = (report(7) for _ in range(3))
    outbox.put(one)
    outbox.put(two)
    assert outbox.take() == two and outbox.take() is None
    outbox.put(three)
    assert outbox.take() is None
    outbox.answered(two.clock_ns)
    assert outbox.take() == three


def test_a_line_stays_until_the_report_that_carried_it_is_answered():
    outbox = box()
    outbox.use([line(1, 5)])
    first, second = report(7), report(7)
    outbox.put(first)
    assert [one.number for one in outbox.take().used] == [1]
    outbox.use([line(2, 5)])
    assert not outbox.answered(first.clock_ns - 1), "an answer to another report"
    outbox.lost()
    outbox.put(second)
    assert [one.number for one in outbox.take().used] == [1, 2]
    assert not outbox.answered(second.clock_ns) and outbox.lines == 0


def test_of_a_worker_that_runs_the_latest_is_told_until_it_was_taken_or_has_ended():
    outbox = box()
    outbox.running([line(1, 5), line(2, 5)])
    outbox.running([line(1, 5, invocations=9)])
    first, second, third = (report(7) for _ in range(3))
    outbox.put(first)
    assert [(one.number, one.invocations) for one in outbox.take().used] == [(1, 9), (2, 0)]
    outbox.running([line(2, 5, invocations=3)])          # while the other is under way
    assert outbox.answered(first.clock_ns), "there is more to say"
    outbox.use([line(1, 5, invocations=10)])
    outbox.put(second)
    assert [(one.number, one.invocations) for one in outbox.take().used] == [(1, 10), (2, 3)]
    outbox.lost()
    outbox.use([line(2, 5, invocations=4)])
    outbox.put(third)
    assert [(one.number, one.invocations) for one in outbox.take().used] == [(1, 10), (2, 4)]
    assert not outbox.answered(third.clock_ns) and outbox.said


def test_workers_that_run_leave_room_for_those_that_ended():
    outbox = box()
    most = link_module.LINES_MAX
    outbox.use(line(number, 5) for number in range(1, most - 1))
    outbox.running(line(number, 5) for number in range(2000, 2010))
    one, two = report(7), report(7)
    outbox.put(one)
    assert [each.number for each in outbox.take().used][-3:] == [most - 2, 2000, 2001]
    assert outbox.answered(one.clock_ns)
    outbox.put(two)
    assert [each.number for each in outbox.take().used] == list(range(2002, 2010))


def test_a_line_keeps_its_incarnation_over_a_new_registration():
    outbox = Outbox()
    outbox.use([line(1, 5)])
    outbox.admitted(7)
    outbox.use([line(2, 5)])
    outbox.admitted(9)
    outbox.use([line(1, 6)])
    outbox.put(report(9))
    assert [(one.number, one.incarnation) for one in outbox.take().used] == [(1, 7), (2, 7), (1, 9)]


def test_a_report_of_before_the_registration_is_not_sent_after_it():
    outbox = box(7)
    outbox.put(report(7))
    outbox.admitted(9)
    assert outbox.take() is None
    outbox.put(report(7))
    assert outbox.take() is None


def test_more_lines_than_a_report_carries_go_with_the_next(monkeypatch):
    monkeypatch.setattr(link_module, "LINES_MAX", 2)
    outbox = box()
    outbox.use([line(number, 5) for number in range(1, 6)])
    carried = []
    more = True
    while more:
        one = report(7)
        outbox.put(one)
        carried.append([line.number for line in outbox.take().used])
        more = outbox.answered(one.clock_ns)
    assert carried == [[1, 2], [3, 4], [5]]


def test_no_user_makes_a_report_too_long_for_the_manager_by_what_he_calls_his_kernels():
    outbox = box()
    kernels = tuple(api.KernelLine("\N{REPLACEMENT CHARACTER}" * 111, 1e9 / 7, (1 << 60) - 1 - each)
                    for each in range(15))
    outbox.use([line(number, 5, kernels=kernels) for number in range(1, 2 * link_module.LINES_MAX)])
    outbox.put(report(7))
    said = outbox.take()
    assert len(said.used) == link_module.LINES_MAX
    assert len(msgspec.json.encode(said)) < 0.8 * link_module.MESSAGE_BYTES_MAX


@pytest.mark.parametrize("wrong", [line(0, 5), line(1, -5), line(1, 5, kernels=(api.KernelLine("x" * 300, 1.0, 1),)), line(1, 5, exec_s=-1.0)])
def test_a_line_that_the_manager_would_refuse_is_refused_here(wrong):
    with pytest.raises(ValueError):
        box().use([wrong])
