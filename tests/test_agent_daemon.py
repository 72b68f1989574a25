"""`rfaas agent`: a real manager, a real agent, leases that are used, and every way in which one ends.

Grants that aren't believed are in test_cluster_trust.py, executors in test_cluster.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import msgspec
import pytest
from cluster import GUARD_S, Cluster, Daemon, descendants, wait_until
from owners import CPUS, Groups

from rfaas_mpi import Executor, api
from rfaas_mpi import messages as msg
from rfaas_mpi.agent.daemon import Agent, Options
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import LeaseDenied, ServiceError
from rfaas_mpi.leases import LeaseState
from rfaas_mpi.leases.grants import GrantBody, GrantSigner
from rfaas_mpi.session import Session

HEAD_BYTES = 1 + 8 + 64
_asked = itertools.count(1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One agent with two cores, on a Unix socket and on loopback."""
    with Cluster(["0-1"], sockets=[0]) as cluster:
        yield cluster


def lend(cluster: Cluster, workers: int = 1) -> api.LentLease:
    """A lease that nobody has used."""
    (lent,) = cluster.call("ask", api.AskLease(session=f"test-{os.getpid()}", request_id=next(_asked),
                                               workers_min=workers, workers_max=workers, timeout_s=GUARD_S)).leases
    return lent


def signed_again(cluster: Cluster, lent: api.LentLease, **changes: object) -> api.LentLease:
    """The lease with another grant, as this manager might have made it."""
    body = msgspec.msgpack.decode(lent.grant[HEAD_BYTES:], type=GrantBody)
    signer = GrantSigner((cluster.directory / "manager" / "grant.key").read_bytes())
    return msgspec.structs.replace(lent, grant=signer.sign(msgspec.structs.replace(body, **changes)))


def over_tcp(lent: api.LentLease) -> api.LentLease:
    return msgspec.structs.replace(lent, addresses=tuple(each for each in lent.addresses if each.startswith("tcp")))


class Rank:
    """Uses a lease, and keeps what its agent says."""

    def __init__(self, cluster: Cluster, lent: api.LentLease) -> None:
        self.lent = lent
        self._events: queue.Queue[msg.AnyEvent] = queue.Queue()
        self.session = Session.open_lease(lent, cluster.settings, on_event=self._events.put)

    def use(self) -> msg.GrantLease:
        return self.session.use()

    def hears(self, kind: type[msg.Event]) -> msg.AnyEvent:
        """The next event of this kind; others are passed over."""
        deadline = time.monotonic() + GUARD_S
        while not isinstance(event := self._events.get(timeout=max(0.001, deadline - time.monotonic())), kind):
            continue
        return event

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


def worker_pids(cluster: Cluster) -> list[int]:
    """The workers' processes, by the agent's word."""
    with looked_at(cluster) as own:
        return [each["pid"] for each in own(msg.StatusRequest(1), msg.StatusAnswer).data["workers"] if each["pid"]]


def all_free(cluster: Cluster, cores: int = 2) -> None:
    wait_until(lambda: cluster.free() == cores and not cluster.leases(), "every core came back")


def state_of(cluster: Cluster, lent: api.LentLease) -> LeaseState:
    return cluster.call("lease", lease=lent.id).state


# --- a lease ------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", [pytest.param(lambda lent: lent, id="unix"), pytest.param(over_tcp, id="tcp")])
def test_a_lease_is_used_works_and_comes_back_with_what_it_used(cluster, way):
    lent = lend(cluster)
    with Rank(cluster, way(lent)) as rank:
        lease = rank.use()
        assert (lease.id, lease.epoch) == (lent.id, lent.epoch)
        assert [worker.cores for worker in lease.workers] == [worker.cores for worker in lent.workers]
        with socket.socket(fileno=rank.session.dial(lease, lease.workers[0].number)):
            wait_until(lambda: state_of(cluster, lent) is LeaseState.ACTIVE, "the manager knows that it has begun")
        assert rank.use() == lease, "said again, it is the same"
    all_free(cluster)
    assert state_of(cluster, lent) in (LeaseState.RELEASED, LeaseState.EXPIRED)

    def used() -> list[dict]:
        return [row for row in cluster.call("usage", by="lease").rows if str(row["lease"]) == str(lent.id)]

    (row,) = wait_until(used, "what its worker used is written down")
    assert row["workers"] == 1 and row["core_s"] > 0.0


def test_a_lease_that_its_rank_releases_is_gone_before_that_is_answered(cluster):
    lent = lend(cluster, 2)
    with Rank(cluster, lent) as rank:
        rank.use()
        wait_until(lambda: len(worker_pids(cluster)) == 2, "its workers run")
        rank.session.release(lent.id)
        wait_until(lambda: not worker_pids(cluster), "they are gone")
        with pytest.raises(LeaseDenied):
            rank.use()
    all_free(cluster)


def test_a_second_process_of_its_user_joins_a_lease_and_its_end_is_not_the_lease_s(cluster):
    lent = lend(cluster)
    with Rank(cluster, lent) as rank:
        lease = rank.use()
        with Rank(cluster, msgspec.structs.replace(lent, grant=b"")) as other:
            assert other.use() == lease
            with socket.socket(fileno=other.session.dial(lease, lease.workers[0].number)):
                pass
        with socket.socket(fileno=rank.session.dial(lease, lease.workers[0].number)):
            assert state_of(cluster, lent) in (LeaseState.GRANTED, LeaseState.ACTIVE)


# --- its ends -----------------------------------------------------------------------------------

def test_a_hard_end_is_kept_by_the_agent_s_clock_alone(cluster):
    lent = lend(cluster)
    cluster.manager.signal(signal.SIGSTOP)           # nobody else looks at a clock
    try:
        soon = signed_again(cluster, lent, hard_end_ns=time.monotonic_ns() + 10**9)
        with Rank(cluster, soon) as rank:
            lease = rank.use()
            assert lease.hard_end is not None
            ended = rank.hears(msg.LeaseEnded)
            assert (ended.lease, ended.cause) == (lent.id, "expired")
            assert time.monotonic() >= lease.hard_end
            gone = rank.hears(msg.WorkerEnded)
            assert (gone.cause, gone.reason) == ("infrastructure", "expired")
            with pytest.raises(LeaseDenied):
                rank.use()
    finally:
        cluster.manager.signal(signal.SIGCONT)
    all_free(cluster)


def test_a_revoked_lease_ends_and_its_rank_is_told(cluster):
    lent = lend(cluster)
    with Rank(cluster, lent) as rank:
        rank.use()
        wait_until(lambda: state_of(cluster, lent) is LeaseState.ACTIVE, "the manager knows that it has begun")
        cluster.call("revoke", api.RevokeLease(), lease=lent.id)
        assert rank.hears(msg.LeaseEnded).cause == "revoked"
        gone = rank.hears(msg.WorkerEnded)
        assert (gone.cause, gone.reason) == ("infrastructure", "revoked")
        wait_until(lambda: not worker_pids(cluster), "its worker is gone")
        all_free(cluster)


def test_a_drained_node_gives_all_its_leases_up_and_lends_again_once_it_may(cluster):
    first, second = lend(cluster), lend(cluster)
    with Rank(cluster, first) as one, Rank(cluster, second) as two:
        one.use(), two.use()
        cluster.call("drain", api.DrainNodes(nodes=("node0",)))
        assert {rank.hears(msg.LeaseEnded).cause for rank in (one, two)} == {"revoked"}
        wait_until(lambda: not cluster.leases(), "nothing is lent")
        cluster.call("undrain", api.UndrainNodes())
    all_free(cluster)


def test_a_lease_that_was_revoked_before_it_began_doesn_t_begin(cluster):
    lent = lend(cluster)
    cluster.call("revoke", api.RevokeLease(), lease=lent.id)
    wait_until(lambda: "forbid" in cluster.agents[0].said() or denied(cluster, lent), "the agent knows")
    assert denied(cluster, lent)
    assert not worker_pids(cluster)


def denied(cluster: Cluster, lent: api.LentLease) -> bool:
    with Rank(cluster, lent) as rank:
        try:
            rank.use()
        except LeaseDenied as error:
            return "taken back" in str(error)
    return False


def test_a_lease_that_nobody_is_left_to_use_is_free_at_once(cluster):
    lent = lend(cluster, 2)
    with Rank(cluster, lent), Rank(cluster, lent):
        pass
    all_free(cluster)
    assert denied(cluster, lent)
    with Rank(cluster, lend(cluster, 2)) as rank:
        rank.use()


def test_a_rank_that_is_killed_gives_its_lease_back(cluster):
    with cluster.running("""
        with Executor(2, fallback=False) as ex:
            print(ex.submit(os.getpid).result(), flush=True)
            sys.stdin.read()
        """) as rank:
        assert rank.stdout is not None and int(rank.stdout.readline())
        wait_until(lambda: cluster.free() == 0, "both cores are lent")
        rank.kill()
        all_free(cluster)


# --- the agent's own end ------------------------------------------------------------------------

def test_sigterm_tells_ranks_and_the_manager_and_leaves_nothing(cluster):
    agent = cluster.agents[0]
    lent = lend(cluster)
    with Rank(cluster, lent) as rank:
        rank.use()
        wait_until(lambda: worker_pids(cluster), "its worker runs")
        pids = descendants(agent.pid)
        assert agent.stop() == 0
        assert rank.hears(msg.LeaseEnded).cause == "revoked"
        rank.hears(msg.ServiceEnded)
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "nothing of it is left")
    assert not (cluster.directory / "node0" / "socket").exists()
    (view,) = cluster.nodes()
    assert view.spare == () and not cluster.leases()
    assert [row for row in cluster.call("usage", by="lease").rows if str(row["lease"]) == str(lent.id)]


def test_an_agent_that_is_killed_leaves_no_process_and_the_next_one_lends_again(cluster):
    agent = cluster.agents[0]
    lent = lend(cluster, 2)
    with Rank(cluster, lent) as rank:
        rank.use()
        wait_until(lambda: len(worker_pids(cluster)) == 2, "its workers run")
        pids = descendants(agent.pid)
        agent.kill()
        rank.hears(msg.ServiceEnded)
    wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "nothing of it is left")
    agent.start()
    all_free(cluster)
    with Rank(cluster, lend(cluster, 2)) as rank:
        rank.use()


def test_an_agent_that_takes_a_node_over_ends_the_one_before(cluster, tmp_path):
    first = cluster.agents[0]
    second = Daemon(tmp_path / "second.log", ["agent", "--manager", f"unix:{cluster.socket}", "--node", "node0",
                                              "--cores", "1", "--directory", tmp_path / "a", "--socket", "none",
                                              "--listen", "127.0.0.1:0"], None, **cluster.environment)
    second.start()
    try:
        unit = (Path(__file__).parent.parent / "systemd" / "rfaas-agent.service").read_text()
        kept_down = re.search(r"^RestartPreventExitStatus=(\d+)$", unit, re.MULTILINE)
        assert kept_down is not None and first.wait() == int(kept_down[1]) == 4, "systemd starts it no more"
        assert "another agent has taken node node0 over" in first.said()
        wait_until(lambda: [view.spare for view in cluster.nodes()] == [(1,)], "only the new one's core is lent")
        with Rank(cluster, lend(cluster)) as rank:
            rank.use()
    finally:
        second.close()


# --- without a manager --------------------------------------------------------------------------

def test_a_lease_runs_on_while_the_manager_is_killed_and_restarted(cluster):
    lent = lend(cluster)
    with Rank(cluster, lent) as rank:
        lease = rank.use()
        (pid,) = wait_until(lambda: worker_pids(cluster), "its worker runs")
        wait_until(lambda: state_of(cluster, lent) is LeaseState.ACTIVE, "the manager knows that it has begun")
        cluster.manager.kill()
        with socket.socket(fileno=rank.session.dial(lease, lease.workers[0].number)):
            pass
        cluster.manager.start()
        wait_until(lambda: cluster.nodes() and cluster.free() == 1, "the manager lends what is left")
        assert state_of(cluster, lent) is LeaseState.ACTIVE
        with socket.socket(fileno=rank.session.dial(lease, lease.workers[0].number)):
            assert worker_pids(cluster) == [pid]
    all_free(cluster)


def test_a_lease_can_begin_and_end_while_there_is_no_manager_and_is_accounted_once_it_is_back(cluster):
    lent = lend(cluster)
    cluster.manager.kill()
    with Rank(cluster, lent) as rank:
        rank.use()
        wait_until(lambda: worker_pids(cluster), "its worker runs")
    wait_until(lambda: not worker_pids(cluster), "and ends with its rank")
    cluster.manager.start()
    all_free(cluster)
    wait_until(lambda: [row for row in cluster.call("usage", by="lease").rows if str(row["lease"]) == str(lent.id)],
               "what it used is written down")


def test_an_agent_that_starts_before_its_manager_lends_once_it_is_there(tmp_path):
    cluster = Cluster(["1"])
    try:
        cluster.agents[0].start()
        wait_until(lambda: "can't be reached" in cluster.agents[0].said(), "it says that nobody is there")
        cluster.manager.start()
        wait_until(lambda: cluster.free() == 1, "its core can be had")
    finally:
        cluster.close()


@pytest.mark.parametrize("keys", [(), (b"short",), (bytes(32),) * 3], ids=["none", "short", "three"])
def test_a_manager_s_keys_that_are_none_end_nothing(tmp_path, caplog, keys):
    agent = Agent(Options(tmp_path, "node0", cores=(0,)), Settings(manager=f"unix:{tmp_path}/m"))
    try:
        agent._news.append(api.Admitted("node0", 1, keys))
        agent.woken()
        assert not agent.leaving and "makes no sense" in caplog.text
    finally:
        agent.close()


# --- cores that are wanted back -----------------------------------------------------------------

def test_exactly_the_workers_on_cores_that_somebody_wants_back_stop(cluster):
    lent = lend(cluster, 2)
    with Rank(cluster, lent) as rank, looked_at(cluster) as own:
        lease = rank.use()
        wait_until(lambda: len(worker_pids(cluster)) == 2, "its workers run")
        unwanted, wanted = lease.workers
        own(msg.ReclaimRequest(1, cores=wanted.cores, grace_s=0.0), msg.Reclaimed)
        gone = rank.hears(msg.WorkerEnded)
        assert (gone.worker, gone.reason) == (wanted.number, "revoked")
        with socket.socket(fileno=rank.session.dial(lease, unwanted.number)):
            wait_until(lambda: cluster.free() == 1, "the manager knows that its core is free")
        assert state_of(cluster, lent) is LeaseState.ACTIVE


@pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups: needs root")
def test_a_job_s_core_is_given_back_at_once_and_lent_again_after_it():
    """Found by the detector: nobody names the cores, and a batch job comes and goes on one of them."""
    lost = max(CPUS)
    groups = Groups(f"t{os.getpid()}")
    cluster = Cluster(["0-1"], sockets=[0])
    words = ["agent", "--manager", f"unix:{cluster.socket}", "--node", "node0", "--keep", "", "--priority", "normal",
             "--directory", cluster.directory / "node0"]
    cluster.agents = [Daemon(cluster.directory / "node0.log", words, None, **cluster.environment)]
    try:
        with cluster:
            all_free(cluster, len(CPUS))
            lent = lend(cluster, len(CPUS))
            with Rank(cluster, lent) as rank:
                workers = {worker.cores[0]: worker.number for worker in rank.use().workers}
                assert sorted(workers) == CPUS
                groups.begin(1, [lost])
                gone = rank.hears(msg.WorkerEnded)
                assert (gone.worker, gone.cause, gone.reason) == (workers[lost], "infrastructure", "revoked")
                wait_until(lambda: lost not in cluster.nodes()[0].spare, "it is lent no more")
                assert state_of(cluster, lent) is LeaseState.ACTIVE, "the other workers go on"
                groups.end(1)
                wait_until(lambda: cluster.free() == 1, "it is lent again")
    finally:
        cluster.close()
        groups.close()


@contextlib.contextmanager
def looked_at(cluster: Cluster) -> Iterator[Callable[[msg.RankRequest, type], msg.Answer]]:
    """A session of the agent's own user on its Unix socket, which may look and command."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(GUARD_S)
        connection.connect(str(cluster.directory / "node0" / "socket"))
        connection.sendall(msg.Hello.make(msg.KIND_SESSION, os.urandom(16)).pack())
        assert msg.Hello.unpack(connection.recv(msg.HELLO.size, socket.MSG_WAITALL)).status == msg.HELLO_OK
        frames = msg.FrameReader()

        def ask(request: msg.RankRequest, kind: type) -> msg.Answer:
            connection.sendall(msg.pack_message(request))
            while True:
                for frame in frames.feed(connection.recv(1 << 16)):
                    answer = msg.unpack_to_rank(frame.body)
                    if isinstance(answer, (kind, msg.Failed)):
                        return answer

        join = msg.Join(0, os.getpid(), b"", (), (), b"", (), (), observer=True)
        assert isinstance(ask(join, msg.Welcome), msg.Welcome)
        yield ask


def test_its_own_user_sees_how_things_stand_and_sends_it_down(cluster):
    with Rank(cluster, lend(cluster)) as rank:
        lease = rank.use()
        with looked_at(cluster) as own:
            status = own(msg.StatusRequest(2), msg.StatusAnswer).data
            assert (status["node"], [each["id"] for each in status["leases"]]) == ("node0", [lease.id])
            assert status["cores"]["lent"] == list(lease.workers[0].cores) and not status["manager_lost"]
            kill = msg.KillRequest(3, lease.id, lease.workers[0].number, "cancel")
            assert isinstance(own(kill, msg.Done), msg.Failed)
            own(msg.DownRequest(4), msg.Done)
        assert cluster.agents[0].wait() == 0


@pytest.mark.parametrize("request_", [
    msg.StatusRequest(9), msg.DownRequest(9), msg.StayRequest(9), msg.ListenRequest(9, ("127.0.0.1:0",)),
    msg.LeaseRequest(9, 1, 1, 1), msg.ReclaimRequest(9), msg.ReleaseRequest(9, 1), msg.KillRequest(9, 1, 1, "cancel")],
    ids=lambda request: type(request).__name__)
def test_a_lease_s_session_can_ask_nothing_but_what_is_its_own(shared, request_):
    with Rank(shared, lend(shared)) as rank:
        rank.use()
        with pytest.raises(ServiceError, match="nothing but the lease|not this session's"):
            rank.session._ask(request_, msg.Done)
        assert rank.use().id == rank.lent.id
        rank.session.release(rank.lent.id)


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """For tests that break nothing."""
    with Cluster(["0-1"], sockets=[0]) as cluster:
        yield cluster


# --- what it is told ----------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    (["--cores", "9999"], "none of the cores 9999"),
    (["--cores", "two"], "--cores"),
    (["--socket", "/" + "x" * 200], "too long for a socket"),
    (["--listen", "nowhere.invalid:0"], "nowhere.invalid"),
    (["--manager", "ftp://x"], "ftp://x")])
def test_what_can_t_be_is_said_at_the_start(tmp_path, words, said):
    process = subprocess.run(
        [*faults.command("from rfaas_mpi.cli import main\nsys.exit(main(sys.argv[1:]))"), "agent", "--directory",
         str(tmp_path / "agent"), *(["--manager", f"unix:{tmp_path}/m"] if "--manager" not in words else []), *words],
        env=faults.environment(), capture_output=True, text=True, timeout=GUARD_S)
    assert process.returncode in (1, 2) and said in process.stderr, process.stderr


def test_one_directory_has_one_agent(shared):
    words = ["agent", "--manager", f"unix:{shared.socket}", "--node", "other", "--cores", "0", "--directory",
             str(shared.directory / "node0")]
    process = subprocess.run([*faults.command("from rfaas_mpi.cli import main\nsys.exit(main(sys.argv[1:]))"), *words],
                             env=faults.environment(), capture_output=True, text=True, timeout=GUARD_S)
    assert process.returncode == 1 and "lives in" in process.stderr
    assert (shared.directory / "node0" / "socket").exists()


def test_what_lies_where_it_should_listen_is_left_alone(shared, tmp_path):
    text = tmp_path / "notes"
    text.write_text("mine")
    taken = shared.directory / "node0" / "socket"
    for place, said in ((text, "no socket"), (taken, "somebody listens")):
        process = subprocess.run(
            [*faults.command("from rfaas_mpi.cli import main\nsys.exit(main(sys.argv[1:]))"), "agent", "--manager",
             f"unix:{shared.socket}", "--node", "other", "--cores", "0", "--directory", str(tmp_path / "agent"),
             "--socket", str(place)], env=faults.environment(), capture_output=True, text=True, timeout=GUARD_S)
        assert process.returncode == 1 and said in process.stderr, process.stderr
    assert text.read_text() == "mine"
    with Rank(shared, lend(shared)) as rank:
        rank.use()
        rank.session.release(rank.lent.id)


def test_a_lost_lease_s_calls_run_on_the_rank(cluster):
    with Executor(1, manager=cluster.environment["RFAAS_MANAGER"],
                  manager_user=cluster.environment["RFAAS_MANAGER_USER"]) as ex:
        assert ex.submit(os.getpid).result() != os.getpid()
        cluster.call("drain", api.DrainNodes())
        wait_until(lambda: not cluster.leases(), "nothing is lent")
        assert ex.submit(os.getpid).result() == os.getpid()
