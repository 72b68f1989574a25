"""Ranks over a cluster: a real manager, real agents, leases from several nodes, and what becomes of them.

Here everything is on this node's loopback and Unix sockets, and needs no root;
test_cluster_nodes.py has agents in network namespaces.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import signal
import threading
from collections.abc import Iterator

import faults
import numpy as np
import pytest
from cluster import IMPATIENT, Cluster, finished, wait_until

from rfaas_mpi import Executor, api
from rfaas_mpi import cluster as cluster_module
from rfaas_mpi import lending as lending_module
from rfaas_mpi import messages as msg
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.cluster import ClusterSession
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ClosedError, ConfigError, LeaseDenied, LeaseRevoked, ServiceError, ServiceLost
from rfaas_mpi.leases import Cause
from rfaas_mpi.lending import Lending
from rfaas_mpi.session import Session


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two agents of two cores each for all tests that don't break them: one is reached on a Unix socket, too."""
    with Cluster(["0-1", "0-1"], sockets=[0]) as cluster:
        yield cluster


@pytest.fixture
def broken() -> Iterator[Cluster]:
    """The same to break, over the network alone."""
    with Cluster(["0-1", "0-1"]) as cluster:
        yield cluster


def executor(cluster: Cluster, workers: object = 4, **settings: object) -> Executor:
    return Executor(workers, manager=cluster.environment["RFAAS_MANAGER"],
                    manager_user=cluster.environment["RFAAS_MANAGER_USER"], **settings)


def all_free(cluster: Cluster, cores: int = 4) -> None:
    """Returns once nothing is lent any more."""
    wait_until(lambda: cluster.free() == cores and not cluster.leases(), "every core came back")


def pids_of(ex: Executor, calls: int = 64) -> set[int]:
    """Where so many calls have run."""
    return {future.result() for future in [ex.submit(os.getpid) for _ in range(calls)]}


def ended_before_it_is_looked_at(cluster: Cluster, monkeypatch) -> None:
    """Has every lease be revoked, and its end be heard, between the grant and the first look at it."""
    heard = threading.Event()
    handle, accept = Lending._handle, Lending._accept

    def hear(self, event):
        handle(self, event)
        if isinstance(event, msg.LeaseEnded):
            heard.set()

    def accept_late(self, grant):
        for lease in grant.leases:
            cluster.call("revoke", api.RevokeLease(grace_s=0.0), lease=lease.id)
        assert heard.wait(60)
        accept(self, grant)

    monkeypatch.setattr(Lending, "_handle", hear)
    monkeypatch.setattr(Lending, "_accept", accept_late)


# --- what works --------------------------------------------------------------------------------

def test_a_lease_of_one_agent_runs_kernels_in_all_styles(pair):
    with executor(pair, 1, fallback=False) as ex:
        assert ex.submit(faults.plus_one, 41).result() == 42
        assert list(ex.map(faults.plus_one, range(100), chunksize=7)) == list(range(1, 101))
        x = np.random.default_rng(1).random(300_000)
        assert (ex.Invoke(faults.adds_one, x, np.empty_like(x)) == x + 1).all()
        near, out = ex.array(x), ex.zeros(len(x))
        assert (ex.Invoke(faults.adds_one, near, out) == x + 1).all()
        copies = faults.native("rfm_echo")
        assert (ex.Invoke(copies, x, np.empty_like(x)) == x).all()
        [lease] = pair.leases()
        assert (lease.uid, lease.state, len(lease.workers)) == (os.geteuid(), "active", 1)
    all_free(pair)


def test_workers_of_several_agents_have_numbers_of_their_own(pair):
    with executor(pair, fallback=False) as ex:
        assert len(pair.leases()) == 2
        assert len(ex.workers) == len(set(ex.workers)) == 4
        assert set(faults.worker_pids(ex)) == set(ex.workers)
        wait_until(lambda: len(pids_of(ex)) == 4, "all four work")
    all_free(pair)


def test_invocations_travel_in_shared_memory_where_they_can_and_over_tcp_where_not(pair):
    with executor(pair, fallback=False) as ex:
        assert ex._crew.transport == "shm+tcp"
        x = ex.full(200_000, 3.0)
        outs = [ex.zeros(200_000) for _ in range(16)]
        requests = [ex.Iinvoke(faults.adds_one, x, out) for out in outs]
        for request in requests:
            request.Wait()
        assert all((out == 4.0).all() for out in outs)
        assert len({request.worker for request in requests} | set(ex.workers)) == 4
    with executor(pair, fallback=False, transport="tcp") as ex:
        assert ex._crew.transport == "tcp"
        assert list(ex.map(faults.plus_one, range(50))) == list(range(1, 51))
    all_free(pair)


def test_one_request_asks_for_all_that_is_spare(pair):
    with executor(pair, None) as ex:
        assert len(ex.workers) == 4
        with pytest.raises(LeaseDenied, match="4|spare|free"):
            executor(pair, 1, lease_timeout_s=0)
    all_free(pair)


def test_another_process_of_the_user_joins_leases_of_several_nodes(pair, tmp_path):
    held = tmp_path / "grant"
    with executor(pair, fallback=False) as ex:
        held.write_bytes(pickle.dumps(ex._grant))
        assert pair.run("""
            with Executor._join(pickle.loads(Path(sys.argv[1]).read_bytes()), fallback=False) as ex:
                say(len(ex.workers), sum(ex.map(faults.plus_one, range(10))))
            """, held) == "4 55\n"
        assert sum(ex.map(faults.plus_one, range(10))) == 55
        assert len(ex.workers) == 4, "the other one's end gave nothing back"
    all_free(pair)


def test_what_a_kernel_prints_comes_with_the_worker_s_number_here(pair, capfd):
    with executor(pair, fallback=False) as ex:
        futures = [ex.submit(print, "here") for _ in range(16)]
        numbers = {future._raw.worker for future in futures if future.result() is None}
    said = capfd.readouterr().err
    assert numbers
    assert all(re.search(rf"\[rfaas worker {number}, invocation \d+\] here\n", said) for number in numbers)
    all_free(pair)


def test_a_kernel_that_ends_its_worker_fails_with_that_worker_s_number_and_another_takes_its_place(pair):
    with executor(pair, fallback=False) as ex:
        for _ in range(2):
            future = ex.submit(faults.do, "segfault")
            error = future.exception()
            assert error.signal == signal.SIGSEGV, error
            wait_until(lambda: len(ex.workers) == 4, "another one has come")
        assert sum(ex.map(faults.plus_one, range(50))) == 1275
    all_free(pair)


def test_a_kernel_is_stopped_by_force_on_any_node(pair):
    with executor(pair, fallback=False) as ex:
        begun = [pair.directory / f"forced-{n}" for n in range(4)]
        futures = [ex.submit(faults.begin_then_wait, name, "/nowhere", 1) for name in begun]
        wait_until(lambda: all(name.exists() for name in begun), "all have begun")
        for future in futures:
            assert future.cancel(force=True)
        wait_until(lambda: all(future.cancelled() for future in futures), "all were cancelled")
        assert sum(ex.map(faults.plus_one, range(50))) == 1275
    all_free(pair)


def test_a_worker_that_is_taken_back_may_finish_what_it_has_over_a_network(pair, tmp_path, monkeypatch):
    """That it takes nothing more is no sign of a broken connection, for which it would be replaced."""
    monkeypatch.setattr(lending_module, "_FENCED_S", 0.0)
    monkeypatch.setattr(lending_module, "_BROKEN_S", 0.0)
    looked = threading.Semaphore(0)
    real = Lending._mend
    monkeypatch.setattr(Lending, "_mend", lambda self: (real(self), looked.release()))
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with executor(pair, 1, fallback=False, transport="tcp") as ex:
        future = ex.submit(faults.begin_then_wait, begun, flag, 5)
        faults.wait_for(begun)
        lending = ex._crew.lending
        [lease] = lending.grant.leases
        lending._events.put(msg.Revoking(lease.id, tuple(worker.number for worker in lease.workers), "revoked"))
        wait_until(lambda: not ex.workers, "it takes nothing more")
        while looked.acquire(blocking=False):
            pass
        for _ in range(3):
            assert looked.acquire(timeout=60)
        flag.touch()
        assert future.result() == 5
        assert future._raw.attempts == 1
    all_free(pair)


def test_more_workers_than_an_executor_can_have_are_refused_and_so_many_at_most_are_asked_for(pair):
    with pytest.raises(LeaseDenied, match="256"):
        executor(pair, (257, 300))
    with executor(pair, (1, 100_000), fallback=False) as ex:
        assert len(ex.workers) == 4
    all_free(pair)


def test_what_is_known_of_ended_leases_does_not_grow_for_good(pair, monkeypatch):
    """Whether they were given back, or revoked: neither facts nor connections of theirs stay."""
    monkeypatch.setattr(lending_module, "_LEASES_KEPT", 2)
    monkeypatch.setattr(lending_module, "_WORKERS_KEPT", 2)
    monkeypatch.setattr(cluster_module, "_OVER_KEPT", 2)
    with executor(pair, 1, fallback=False) as ex:
        lending = ex._crew.lending
        threads = threading.active_count()
        for n in range(12):
            assert lending.more(1, 1, None) == 1
            lease = lending.grant.leases[-1].id
            if n % 2:
                pair.call("revoke", api.RevokeLease(grace_s=0.0), lease=lease)
                wait_until(lambda: lending.session._line(lease).session.closed, "its session has ended")
            else:
                assert lending.give_back(1) == 1
            wait_until(lambda: pair.free() == 3, "its core is free")
            assert ex.submit(faults.plus_one, n).result() == n + 1
        sizes = {name: len(known) for name, known in vars(lending).items() if isinstance(known, (dict, set))}
        assert max(sizes.values()) < 7, sizes
        assert len(lending.session._lines) < 5
        wait_until(lambda: threading.active_count() <= threads, "no thread stays")
    all_free(pair)


def test_a_worker_that_is_dialled_again_is_not_the_one_that_is_awaited(pair):
    with executor(pair, 4, fallback=False, transport="tcp") as ex:
        lending = ex._crew.lending
        lease = lending.grant.leases[0]
        lost, other = lease.workers
        lending._bury(msg.WorkerEnded(lease.id, lost.number, "infrastructure", "link"))
        assert len(ex.workers) == 3 and lending.seats == 4, "another one will take its place"
        lending._dial_again(lease.id, other.number)
        assert len(ex.workers) == 3 and lending.seats == 4, "it still will"
        assert ex.submit(faults.plus_one, 1).result() == 2
    all_free(pair)


def test_what_is_granted_to_who_has_closed_meanwhile_is_given_back_without_a_warning(pair, monkeypatch, caplog):
    granted: list[int] = []
    ask = ClusterSession._ask

    def ask_late(self, body):
        answer = ask(self, body)
        granted.extend(lease.id for lease in answer.leases)
        self.close()
        return answer

    monkeypatch.setattr(ClusterSession, "_ask", ask_late)
    with pytest.raises(ClosedError):
        executor(pair, 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [pair.call("lease", lease=lease).cause for lease in granted] == [Cause.RELEASED]
    all_free(pair)


def test_what_is_granted_while_who_asks_closes_is_given_back(pair, monkeypatch):
    """The answer is on its way, and is never read."""
    granted: list[int] = []
    call = ManagerClient.call

    def close_first(self, name, *arguments, **parameters):
        answer = call(self, name, *arguments, **parameters)
        if name == "ask" and self is session._client:
            granted.extend(lease.id for lease in answer.leases)
            session.close()
            raise ClosedError("this client of the manager was closed during the call")
        return answer

    monkeypatch.setattr(ManagerClient, "call", close_first)
    session = ClusterSession.open(Settings.load(pair.environment))
    with pytest.raises(ClosedError):
        session.request(1, 1)
    assert [pair.call("lease", lease=lease).cause for lease in granted] == [Cause.RELEASED]
    all_free(pair)


# --- what is refused ----------------------------------------------------------------------------

def test_a_manager_and_a_service_are_not_both_used(pair):
    with pytest.raises(ConfigError, match="RFAAS_SERVICE"):
        executor(pair, 1, service="tcp://127.0.0.1:1")


def test_without_a_manager_it_is_said_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "_RESTART_S", 0.0)
    with pytest.raises(ServiceLost, match="nobody.sock"):
        Executor(1, manager=f"unix:{tmp_path}/nobody.sock")


def test_shared_memory_alone_is_refused_by_agents_behind_a_network(pair):
    with pytest.raises(ConfigError, match="shm"):
        executor(pair, transport="shm")
    all_free(pair)


def test_a_demand_that_no_node_can_meet_is_denied_with_the_reason(pair):
    with pytest.raises(LeaseDenied, match="3"):
        executor(pair, 1, cores_per_worker=3, lease_timeout_s=0)


# --- agents that end -----------------------------------------------------------------------------

def test_an_agent_that_cant_be_reached_costs_its_workers_and_no_more(broken, caplog):
    broken.agents[1].kill()
    with executor(broken, fallback=False) as ex:
        assert len(ex.workers) == 2
        assert sum(ex.map(faults.plus_one, range(50))) == 1275
        assert "node1" in caplog.text and "2 worker(s) are missing" in caplog.text
        # Its agent may have begun it, so that its cores wait for the agent's word.
        assert {lease.node: lease.state for lease in broken.leases()} == {
            broken.names[0]: "active", broken.names[1]: "revoking"}


def test_instead_of_an_agent_that_cant_be_reached_another_node_lends(broken):
    """The manager takes half a minute to notice, and grants there until then."""
    broken.agents[0].kill()
    for _ in range(2):
        with executor(broken, 1, fallback=False) as ex:
            assert sum(ex.map(faults.plus_one, range(50))) == 1275
    broken.agents[0].start()
    all_free(broken)
    broken.agents[1].kill()
    for _ in range(2):
        with executor(broken, 1, fallback=False) as ex:
            assert sum(ex.map(faults.plus_one, range(50))) == 1275


def test_where_no_agent_can_be_reached_the_first_error_is_raised_and_nothing_stays_lent(broken):
    for agent in broken.agents:
        agent.kill()
    with pytest.raises(ServiceError, match="can't be reached"):
        executor(broken)
    assert {lease.state for lease in broken.leases()} == {"revoking"}


@contextlib.contextmanager
def in_flight(cluster: Cluster, ex: Executor) -> Iterator[list]:
    """A kernel on each of its workers, all begun; they end when the block does."""
    flag = cluster.directory / "flag"
    begun = [cluster.directory / f"in-flight-{n}" for n in range(len(ex.workers))]
    futures = [ex.submit(faults.begin_then_wait, name, flag, n) for n, name in enumerate(begun)]
    wait_until(lambda: all(name.exists() for name in begun), "all have begun")
    assert len({name.read_text() for name in begun}) == len(begun), "each is on a worker of its own"
    try:
        yield futures
    finally:
        flag.touch()


def test_what_an_agent_had_in_flight_when_it_was_killed_runs_elsewhere(broken):
    with executor(broken, fallback=False) as ex:
        workers = broken.workers_of(1)
        with in_flight(broken, ex) as futures:
            broken.agents[1].kill()
            wait_until(lambda: len(ex.workers) == 2, "its workers are gone")
        assert [future.result() for future in futures] == [0, 1, 2, 3]
        wait_until(lambda: not [pid for pid in workers if faults.alive(pid)], "its processes ended with it")
        assert sum(ex.map(faults.plus_one, range(50))) == 1275


def test_when_every_agent_is_gone_the_rank_runs_what_is_left(broken):
    with executor(broken) as ex:
        with in_flight(broken, ex) as futures:
            for agent in broken.agents:
                agent.kill()
            wait_until(lambda: not ex.workers, "no worker is left")
        assert [future.result() for future in futures] == [0, 1, 2, 3]
        assert ex.submit(os.getpid).result() == os.getpid()


def test_a_stopped_agent_is_started_again_and_lends_again(broken):
    broken.agents[0].stop()
    broken.agents[0].start()
    with executor(broken, fallback=False) as ex:
        assert len(ex.workers) == 4
    all_free(broken)


def test_a_drained_node_s_workers_go_and_the_others_do_its_work(broken):
    with executor(broken, fallback=False) as ex:
        with in_flight(broken, ex) as futures:
            broken.call("drain", api.DrainNodes((broken.nodes()[0].node,)))
            wait_until(lambda: len(ex.workers) == 2, "its workers are gone")
            wait_until(lambda: len(broken.leases()) == 1, "its lease has ended")
        assert [future.result() for future in futures] == [0, 1, 2, 3]
        broken.call("undrain", api.UndrainNodes())
    all_free(broken)


def test_a_lease_that_ends_before_it_is_looked_at_has_ended(pair, monkeypatch):
    ended_before_it_is_looked_at(pair, monkeypatch)
    with pytest.raises(LeaseRevoked, match="revoked"):
        executor(pair, 1, fallback=False)
    all_free(pair)


def test_a_revoked_lease_ends_with_the_reason_where_nothing_may_run_on_the_rank(broken):
    with executor(broken, 2, fallback=False) as ex:
        with in_flight(broken, ex) as futures:
            for lease in broken.leases():
                broken.call("revoke", api.RevokeLease(), lease=lease.id)
            # They are told before their workers are killed: what these run must not end by itself meanwhile.
            for future in futures:
                assert "revoked" in str(future.exception(60))
    all_free(broken)


# --- managers that end -----------------------------------------------------------------------------

def test_leases_are_used_while_the_manager_is_gone_and_known_when_it_is_back(broken):
    with executor(broken, 2, fallback=False) as ex:
        before = broken.leases()
        broken.manager.kill()
        assert sum(ex.map(faults.plus_one, range(50))) == 1275
        killed = min(pids_of(ex))
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(pids := pids_of(ex)) == 2 and killed not in pids, "a killed worker is replaced")
        assert sum(ex.map(faults.plus_one, range(50))) == 1275
        broken.manager.start()
        wait_until(lambda: broken.free() == 2, "it has heard of both nodes again")
        assert [lease.id for lease in broken.leases()] == [lease.id for lease in before]
        with executor(broken, 2, fallback=False) as other:
            assert sum(other.map(faults.plus_one, range(50))) == 1275
    all_free(broken)


def test_a_lease_that_ended_while_the_manager_was_gone_is_free_when_it_is_back(broken):
    with executor(broken, fallback=False):
        broken.manager.kill()
    broken.manager.start()
    all_free(broken)


def test_a_rank_that_asks_while_the_manager_is_restarted_gets_its_workers(broken):
    broken.manager.kill()
    with broken.running("""
            say("asking")
            with Executor(workers=4, fallback=False) as ex:
                say(sum(ex.map(faults.plus_one, range(10))))
            """) as rank:
        assert faults.line(rank) == "asking"
        broken.manager.start()
        assert finished(rank) == "55\n"
    all_free(broken)


# --- ranks that end ----------------------------------------------------------------------------------

def test_a_killed_rank_s_cores_come_back(pair):
    with pair.running("""
            ex = Executor(workers=4, fallback=False)
            say(sum(ex.map(faults.plus_one, range(10))))
            ex.submit(time.sleep, 600)
            sys.stdin.readline()
            """) as rank:
        assert faults.line(rank) == "55"
        assert not pair.free()
        rank.kill()
    all_free(pair)


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_a_rank_that_ends_without_shutdown_is_quiet_and_gives_back_what_it_had(pair, end):
    with pair.running(f"""
            ex = Executor(workers=4, fallback=False)
            say(sum(ex.map(faults.plus_one, range(10))))
            future = ex.submit(time.sleep, 600)
            {end}
            """) as rank:
        out, err = rank.communicate(timeout=60)
    assert out == "55\n"
    assert (rank.returncode, err) == (0, "") or "KeyboardInterrupt" in err and "SIGINT" in end
    all_free(pair)


def test_ctrl_c_takes_back_a_demand_that_waits(pair):
    with executor(pair, fallback=False) as ex:
        with pair.running("""
                say("asking")
                try:
                    Executor(workers=1, lease_timeout_s=600)
                except KeyboardInterrupt:
                    say("interrupted")
                sys.stdin.readline()
                """) as rank:
            assert faults.line(rank) == "asking"
            wait_until(lambda: pair.waiting() == 1, "it waits for the manager's answer")
            rank.send_signal(signal.SIGINT)
            assert faults.line(rank) == "interrupted"
            wait_until(lambda: pair.waiting() == 0, "its demand is not there any more")
            ex.shutdown()
            all_free(pair)


def test_a_rank_that_waits_for_cores_and_is_killed_gets_none(pair):
    with executor(pair, fallback=False) as ex:
        with pair.running("""
                say("asking")
                Executor(workers=1, lease_timeout_s=600)
                """) as rank:
            assert faults.line(rank) == "asking"
            wait_until(lambda: pair.waiting() == 1, "it waits for the manager's answer")
            rank.kill()
            wait_until(lambda: pair.waiting() == 0, "its demand is not there any more")
        assert sum(ex.map(faults.plus_one, range(10))) == 55
    all_free(pair)


GIL_S = int(os.environ.get("RFAAS_SOAK_GIL_SECONDS", "3"))


def test_a_rank_that_holds_the_gil_for_long_keeps_its_leases(pair):
    assert pair.run("""
        import ctypes
        with Executor(workers=4, fallback=False) as ex:
            before = ex.workers
            # PyDLL keeps the GIL: no other thread of this process runs meanwhile.
            ctypes.PyDLL(None).sleep(int(sys.argv[1]))
            assert ex.workers == before
            say(sum(ex.map(faults.plus_one, range(10))))
        """, GIL_S, **IMPATIENT) == "55\n"
    all_free(pair)


# --- what the agents' sessions do --------------------------------------------------------------------

def test_leases_are_begun_at_the_same_time(pair, monkeypatch):
    """So that ten nodes cost one round trip: nobody's begin waits for another one's."""
    together = threading.Barrier(2)
    use = Session.use

    def both(session: Session) -> object:
        together.wait(60)            # breaks unless both are here
        return use(session)

    monkeypatch.setattr(Session, "use", both)
    with executor(pair, fallback=False) as ex:
        assert len(ex.workers) == 4
    all_free(pair)
