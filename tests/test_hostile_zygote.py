"""What a user makes of his zygote and his workers, which are his processes: neither the agent nor others suffer."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from site_of_users import ALICE, UID_MIN, interpreter

from rfaas_mpi import messages as msg
from rfaas_mpi.agent.core import AgentCore, Meter
from rfaas_mpi.agent.pool import WorkerHandle, ZygoteKind, page_of
from rfaas_mpi.agent.spawner import Spawner
from rfaas_mpi.agent.workers import FORKS_S, STARTS_S, STRAYS_MAX, Workers

NAMED = r"import ctypes; ctypes.CDLL(None).prctl(15, ctypes.c_char_p(b'gr\xc3) 1'), 0, 0, 0, 0); print(); input()"

# A program in the zygote's place, which gives its end of the channel to the test and lives on.
PUPPET = """
import re, signal, socket, sys
channel = socket.socket(fileno=int(re.search(r"main\\((\\d+)", sys.argv[-1])[1]))
socket.send_fds(channel, [b"mine"], [channel.fileno()])
channel.close()
signal.pause()
"""

CHATTERBOX = PUPPET.replace("signal.pause()", "while True: sys.stderr.write('x' * 65536)")


class Owner:
    """For whom the workers are."""

    def __init__(self, kind: ZygoteKind) -> None:
        self.kind = kind
        self.metered: list[Meter] = []
        self.stopped: list[int] = []
        self.failed: list[str] = []
        self.refuse: Exception | None = None

    def kind_for(self, lease: int) -> ZygoteKind:
        return self.kind

    def tell(self, session: int, event: object) -> None:
        msgspec.json.encode(event)

    def show(self, session: int, event: object) -> None:
        msgspec.json.encode(event)

    def used(self, meter: Meter, pid: int) -> None:
        self.metered.append(meter)
        if self.refuse is not None:
            raise self.refuse

    def cores_freed(self, lease: int, seat: int, cores: tuple[int, ...]) -> None:
        msgspec.json.encode((lease, seat, cores))

    def seat_stopped(self, lease: int, seat: int, last: bool) -> None:
        self.stopped.append(lease)

    def lease_failed(self, lease: int, why: str) -> None:
        assert why
        self.failed.append(why)

    def spawner_lost(self, why: str) -> None:
        raise AssertionError(why)


class Node:
    """An agent's workers, one of which is ordered, and the channel's other end in place of its zygote's."""

    def __init__(self, uid: int | None = None, program: str = PUPPET) -> None:
        self.owner = Owner(ZygoteKind(os.fsencode(sys.executable if uid is None else interpreter()),
                                      ("-I", "-S", "-c", program), (), b"/", (), (), uid))
        self.selector = selectors.DefaultSelector()
        self.core = AgentCore()
        self.workers = Workers(self.selector, self.core, self.owner, zygote_idle_s=3600.0)
        if uid is not None:
            self.workers.serve_users(Spawner.start(UID_MIN))
        self.workers.act(self.core.start(1, 1, {0: (0,)}, 0, time.monotonic())[1])
        [self.zygote] = self.workers.zygotes.values()
        select.select([self.zygote.channel], [], [], 30)
        _, fds, _, _ = socket.recv_fds(self.zygote.channel, 16, 1)
        self.channel = socket.socket(fileno=fds[0])

    def say(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """As the zygote; what was said when the agent had hung up already is lost."""
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self.channel, [data], fds)
        self.turn()

    def turn(self, wait_s: float = 0.0) -> None:
        """One turn of the agent's loop."""
        for key, _ in self.selector.select(wait_s):
            if self.selector.get_map().get(key.fd) == key:
                key.data(0)
        self.workers.check(time.monotonic())

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not what():
            assert time.monotonic() < deadline
            self.turn(0.01)

    def zygote_runs(self) -> bool:
        try:
            with open(f"/proc/{self.zygote.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self.channel.close()
        self.zygote.process.kill()
        self.workers.close()
        self.selector.close()


@pytest.fixture
def node() -> Iterator[Node]:
    with contextlib.closing(Node()) as node:
        yield node


@pytest.fixture
def users_node(monkeypatch) -> Iterator[Node]:
    """With a zygote of another user's."""
    if os.geteuid() != 0:
        pytest.skip("starts programs as other users: needs root")
    monkeypatch.setattr("rfaas_mpi.agent.spawner.unsafe_places", lambda *_: [])
    with contextlib.closing(Node(ALICE)) as node:
        yield node


@pytest.mark.parametrize("fate", ["said", "stopped", "silent"])
def test_who_shows_another_process_as_his_worker_loses_his_zygote_and_the_lease_ends(users_node, fate):
    node, pidfd = users_node, os.pidfd_open(os.getpid())
    try:
        if fate == "stopped":
            node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
        node.say(msg.pack_plain(msg.WorkerForked(1, 1)), (pidfd,))
        if fate == "said":
            node.say(msg.pack_plain(msg.WorkerExited(1, 1, 0, 0, 0.0, 0)))
    finally:
        os.close(pidfd)
    node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
    node.until(lambda: node.owner.stopped == [1])
    assert not node.zygote_runs()


def test_no_core_is_free_while_a_zygote_lives_that_has_not_shown_its_worker(users_node):
    node = users_node
    node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
    runs: list[bool] = []
    node.owner.seat_stopped = lambda *_: runs.append(node.zygote_runs())
    node.say(msg.pack_plain(msg.WorkerExited(1, 1, 0, 0, 0.0, 0)))
    node.until(lambda: runs != [])
    assert runs == [False]


def test_a_worker_without_its_pidfd_is_none(users_node):
    users_node.say(msg.pack_plain(msg.WorkerForked(1, 1)))
    users_node.until(lambda: not users_node.zygote_runs())


def test_a_worker_may_have_any_name():
    with subprocess.Popen([sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        handle = WorkerHandle.__new__(WorkerHandle)
        handle.pid, handle.pidfd = process.pid, os.pidfd_open(process.pid)
        try:
            assert not handle.ending()
            process.communicate(b"\n")
            assert handle.ending()
        finally:
            os.close(handle.pidfd)


LEVEL = {"policy": "basic", "seccomp": True, "landlock": 1, "keeps": [], "lacks": []}


@pytest.mark.parametrize("said", [
    {"t": "exited", "worker": 1, "pid": 5, "signal": 0, "exit_code": 0, "cpu_s": -1.0, "max_rss_bytes": 0},
    {"t": "exited", "worker": 1, "pid": 5, "signal": 0, "exit_code": 0, "cpu_s": 1e300, "max_rss_bytes": 0},
    {"t": "exited", "worker": 1, "pid": 5, "signal": -9, "exit_code": 0, "cpu_s": 0.0, "max_rss_bytes": 0},
    {"t": "zygote_ready", "pid": 5, "sandbox": {}},
    {"t": "zygote_ready", "pid": 5, "sandbox": {**LEVEL, "lacks": 7}},
], ids=str)
def test_what_makes_no_sense_ends_the_zygote_alone(node, said):
    node.say(msgspec.json.encode(said))
    node.until(lambda: not node.zygote_runs())
    assert node.owner.metered == []


def test_a_problem_without_a_word_is_one(node):
    node.say(msg.pack_plain(msg.ZygoteProblem(1, "")))
    assert node.owner.failed


def test_a_zygote_that_is_ready_and_gone_ends_its_workers(node):
    socket.send_fds(node.channel, [msg.pack_plain(msg.ZygoteReady(5, LEVEL))], [])
    node.channel.close()
    node.until(lambda: bool(node.owner.metered))


def test_a_lease_ends_though_what_it_used_can_t_be_noted(node):
    node.owner.refuse = ValueError("no such line")
    node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
    node.zygote.process.kill()
    node.channel.close()
    node.until(lambda: node.owner.stopped == [1])
    assert node.owner.metered


def test_a_zygote_that_writes_without_end_holds_neither_the_loop_nor_the_log(caplog):
    with contextlib.closing(Node(program=CHATTERBOX)) as node:
        read = 0
        take = node.zygote.read_errors

        def counted() -> bytes:
            nonlocal read
            said = take()
            read += len(said)
            assert len(said) <= 1 << 16
            return said

        node.zygote.read_errors = counted
        node.until(lambda: read > 4 << 20)
        assert sum(len(record.getMessage()) for record in caplog.records) < 1 << 18


@pytest.fixture
def cores() -> tuple[int, int]:
    """The agent's own, and one of somebody else."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs a core for the agent and one for others")
    return cpus[0], cpus[-1]


def test_what_a_user_runs_beside_his_workers_is_taken_back_to_the_agent_s_core_and_killed_in_the_end(
        users_node, cores):
    node, (own, other) = users_node, cores
    node.core.own_cores = (own,)
    node.core.workers[1].seat.cores = (own,)
    for _ in range(STRAYS_MAX - 1):
        os.sched_setaffinity(node.zygote.pid, cores)
        node.workers.check(node.workers._masks_at)
        assert os.sched_getaffinity(node.zygote.pid) == {own} and node.zygote_runs()
    os.sched_setaffinity(node.zygote.pid, {other})
    node.workers.check(node.workers._masks_at)
    node.channel.close()
    node.until(lambda: not node.zygote_runs())


def test_who_is_moved_and_stays_there_is_not_killed_and_may_use_what_he_was_lent(users_node, cores):
    node, (own, other) = users_node, cores
    node.core.own_cores = (own,)
    node.core.workers[1].seat.cores = (other,)
    for _ in range(2 * STRAYS_MAX):
        os.sched_setaffinity(node.zygote.pid, {other})      # where his worker may be just now
        node.workers.check(node.workers._masks_at)
        assert os.sched_getaffinity(node.zygote.pid) == {other}
    assert node.zygote_runs()


def test_a_kernel_that_leaves_its_core_is_taken_back_to_it(users_node, cores):
    node, (own, other) = users_node, cores
    node.core.own_cores = (own,)
    node.core.workers[1].seat.cores = (other,)
    [handle] = node.workers._handles.values()
    # (Its zygote is as good a process of its user's as any.)
    handle.pid, handle.serves = node.zygote.pid, True
    os.sched_setaffinity(node.zygote.pid, cores)
    node.workers.check(node.workers._masks_at)
    assert os.sched_getaffinity(node.zygote.pid) == {other}
    handle.pid = 0


def test_a_worker_whose_page_never_holds_still_holds_nobody_up():
    class Restless(list):
        changes = itertools.count(1)

        def __getitem__(self, _at):
            return next(self.changes)
    page = page_of(Restless())
    assert (page.invocation, page.limit_ns) == (0, 0), "it runs nothing for long enough to be past a limit"
    assert page_of([7, 3 << 32 | 2, 11, 12, 13, 14, 15]).limit_ns == 12


@pytest.mark.parametrize("says_ready", [False, True])
def test_a_zygote_that_starts_no_worker_keeps_no_lease(node, says_ready):
    if says_ready:
        node.say(msg.pack_plain(msg.ZygoteReady(5, LEVEL)))
    assert min(node.workers.deadlines(time.monotonic())) <= time.monotonic() + max(STARTS_S, FORKS_S)
    node.workers.check(time.monotonic() + (FORKS_S if says_ready else STARTS_S) / 2)
    assert node.owner.failed == [] and node.zygote_runs()
    node.workers.check(time.monotonic() + (FORKS_S if says_ready else STARTS_S))
    assert len(node.owner.failed) == 1 and "worker 1" in node.owner.failed[0]
    node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
    node.channel.close()
    node.until(lambda: node.owner.stopped == [1] and not node.zygote_runs())


def test_a_zygote_that_ignores_its_end_is_waited_for_by_nobody_and_killed_in_time(users_node):
    node = users_node
    node.zygote.workers.clear()
    node.zygote.idle_since -= 3600.0
    node.workers.tidy(time.monotonic())
    assert node.workers.zygotes == {} and node.zygote_runs()
    node.workers.tidy(time.monotonic() + 3600.0)
    assert not node.zygote_runs()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
NUMBER = st.sampled_from((0, 1, 2)) | st.integers()
FIELDS = {"worker": NUMBER, "pid": NUMBER, "signal": NUMBER, "exit_code": NUMBER, "max_rss_bytes": NUMBER,
          "cpu_s": st.floats(allow_nan=False, allow_infinity=False), "message": st.text(max_size=8),
          "sandbox": st.just(LEVEL) | JSON}
MESSAGE = st.fixed_dictionaries(
    {"t": st.sampled_from(("zygote_ready", "spare", "forked", "exited", "problem")), **FIELDS}).map(msgspec.json.encode)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(MESSAGE | st.binary(min_size=1, max_size=64) | JSON.map(msgspec.json.encode),
                          st.sampled_from(("", "null", "zygote"))), min_size=1, max_size=6))
def test_whatever_it_says_whenever_it_says_it_the_agent_goes_on(said):
    with contextlib.closing(Node()) as node, open("/dev/null", "rb") as null:
        pidfd = os.pidfd_open(node.zygote.pid)
        try:
            for data, what in said:
                node.say(data, {"": (), "null": (null.fileno(),), "zygote": (pidfd,)}[what])
            node.workers.act(node.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
            node.channel.close()
            node.zygote.process.kill()
            node.until(lambda: node.owner.stopped != [])
        finally:
            os.close(pidfd)
