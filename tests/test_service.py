"""The service and its workers: leases, ends of every kind, output, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import tiny
from tiny import Events, Rank, other_rank

from rfaas_mpi import messages as msg
from rfaas_mpi.errors import LeaseDenied, ServiceLost, TransportError
from rfaas_mpi.session import Session, service_directory


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Path:
    return tiny.make_view(tmp_path_factory.mktemp("view"))


@pytest.fixture(autouse=True)
def tiny_workers(view, monkeypatch):
    """Workers are started with this process' sys.path, and so serve lines instead of kernels."""
    monkeypatch.syspath_prepend(str(view))


@pytest.fixture(scope="module")
def shared():
    """One service for all tests that don't break it."""
    return tiny.settings()


@pytest.fixture
def rank(shared):
    with Rank(shared) as rank:
        yield rank


@pytest.fixture
def nobody_else(shared, wait_until):
    """The shared service with both of its cores free: a lease of the test before may still be ending."""
    with Session.open(shared) as session:
        wait_until(lambda: session.status()["cores"]["free"] == [0, 1], "both cores are free")
        yield session


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def status(chosen) -> dict:
    with Session.open(chosen, start=False, observer=True) as session:
        return session.status()


# --- what a worker is -------------------------------------------------------------

def test_a_worker_runs_on_its_own_core_and_no_other(rank):
    line = rank.dial()
    assert set(line.ask("os.sched_getaffinity(0)")) == set(rank.lease.workers[0].cores)


def test_a_worker_has_only_its_own_descriptors_and_no_terminal(rank):
    line = rank.dial()
    # 0-2, agent socket, page twice (mapping it keeps one), the rank's connection, and the listing itself.
    assert line.ask("sorted(int(fd) for fd in os.listdir('/proc/self/fd'))")[:5] == [0, 1, 2, 3, 4]
    assert len(line.ask("os.listdir('/proc/self/fd')")) <= 8
    assert line.ask("os.readlink('/proc/self/fd/0')") == "/dev/null"
    assert line.ask("os.getsid(0) == os.getpid()")


def test_a_worker_is_confined_and_first_to_be_killed_for_memory(rank):
    line = rank.dial()
    text = line.ask("open('/proc/self/status').read()")
    assert "NoNewPrivs:\t1" in text
    assert line.ask("int(open('/proc/self/oom_score_adj').read())") == 1000
    assert line.ask("__import__('resource').getrlimit(4)") == (0, 0)
    assert line.ask("signal.getsignal(signal.SIGINT) is signal.SIG_IGN")


def test_workers_do_not_share_random_numbers(shared):
    with Rank(shared, workers=2) as rank:
        lines = [rank.dial(worker.number) for worker in rank.lease.workers]
        for draw in ("__import__('random').random()", "__import__('numpy').random.random()",
                     "float(__import__('numpy').random.standard_normal())"):
            first, second = (line.ask(draw) for line in lines)
            assert first != second


def test_blas_gets_as_many_threads_as_the_worker_has_cores(shared):
    with Rank(shared, cores_per_worker=2) as rank:
        line = rank.dial()
        assert line.ask("os.environ['OMP_NUM_THREADS']") == "2"
        assert set(line.ask("[pool['num_threads'] for pool in __import__('threadpoolctl').threadpool_info()]")) <= {2}
    with Rank(shared) as rank:
        line = rank.dial()
        assert line.ask("os.environ['OPENBLAS_NUM_THREADS']") == "1"


def test_a_worker_has_the_ranks_path_directory_and_environment(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_APPLICATION", "x y")
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Rank(shared) as rank:
        line = rank.dial()
        assert line.ask("os.environ['MY_APPLICATION']") == "x y"
        assert line.ask("os.environ.get('PMI_RANK')") is None
        assert line.ask("os.environ.get('PYTHONPATH')") == os.environ.get("PYTHONPATH")
        assert line.ask("os.getcwd()") == str(tmp_path)
        assert str(tmp_path) in line.ask("sys.path")


def test_memory_beyond_the_grant_is_a_memory_error_in_the_kernel(shared):
    with Rank(shared, memory_per_worker=64 << 20) as rank:
        assert rank.lease.memory_per_worker == 64 << 20
        line = rank.dial()
        assert line.ask("len(bytearray(32 << 20))") == 32 << 20
        with pytest.raises(ConnectionResetError):
            line.ask("len(bytearray(128 << 20))")
        ended = rank.session.verdict(rank.lease, rank.worker)
        assert any("MemoryError" in text for text in ended.last_lines)


def test_mpi_inside_a_kernel_is_a_clear_error_and_importing_it_is_not(rank):
    line = rank.dial()
    assert "not available" in line.ask("repr(__import__('mpi4py.MPI', fromlist=['x']).COMM_WORLD)")
    with pytest.raises(ConnectionResetError):
        line.ask("__import__('mpi4py.MPI', fromlist=['x']).COMM_WORLD.Get_rank()")
    assert any("NestedError" in text for text in rank.session.verdict(rank.lease, rank.worker).last_lines)


def test_an_executor_inside_a_kernel_is_a_clear_error(rank):
    line = rank.dial()
    with pytest.raises(ConnectionResetError):
        line.ask("__import__('rfaas_mpi.session', fromlist=['x']).Session.open()")
    assert any("NestedError" in text for text in rank.session.verdict(rank.lease, rank.worker).last_lines)


# --- ends ---------------------------------------------------------------------------

def test_a_crash_in_an_invocation_is_told_with_signal_and_last_lines(rank):
    line = rank.dial()
    line.do("print('about to go'); tiny.run(41); os.kill(os.getpid(), signal.SIGSEGV)")
    ended = rank.session.verdict(rank.lease, rank.worker)
    assert (ended.cause, ended.reason, ended.signal, ended.invocation) == ("kernel", "signal", signal.SIGSEGV, 41)
    assert ended.exit_code is None
    assert ended.last_lines == ("about to go",)


def test_an_exit_in_an_invocation_is_told_with_its_status(rank):
    line = rank.dial()
    line.do("tiny.run(42); os._exit(3)")
    ended = rank.session.verdict(rank.lease, rank.worker)
    assert (ended.cause, ended.reason, ended.exit_code, ended.signal) == ("kernel", "exit", 3, 0)


def test_a_kill_from_outside_is_unknown_in_an_invocation_and_infrastructure_between(rank):
    line = rank.dial()
    pid = line.ask("(tiny.run(43), os.getpid())[1]")
    os.kill(pid, signal.SIGKILL)
    assert rank.session.verdict(rank.lease, rank.worker).cause == "unknown"
    ready = rank.events.wait(msg.WorkerReady, replaces=rank.worker)
    pid = rank.dial(ready.worker).ask("os.getpid()")
    os.kill(pid, signal.SIGKILL)
    assert rank.session.verdict(rank.lease, ready.worker).cause == "infrastructure"


def test_a_dead_workers_replacement_serves_on_the_same_cores(rank):
    line = rank.dial()
    line.do("os._exit(1)")
    ready = rank.events.wait(msg.WorkerReady)
    assert ready.lease == rank.lease.id and ready.cores == rank.lease.workers[0].cores
    assert rank.dial(ready.worker).ask("1 + 1") == 2
    with pytest.raises(TransportError, match="can't be reached"):
        rank.dial()


def test_an_invocation_past_its_limit_is_killed_in_time_and_it_is_the_kernels_fault(rank):
    line = rank.dial()
    line.do("tiny.run(44, limit_s=0.05); time.sleep(600)")
    ended = rank.session.verdict(rank.lease, rank.worker, 30.0)
    assert (ended.cause, ended.reason, ended.invocation) == ("kernel", "deadline", 44)


def test_a_stopped_worker_is_killed_at_its_limit_too(rank):
    line = rank.dial()
    line.do("tiny.run(45, limit_s=0.05); os.kill(os.getpid(), signal.SIGSTOP)")
    assert rank.session.verdict(rank.lease, rank.worker, 30.0).reason == "deadline"


def test_a_forced_cancel_kills_the_invocation_and_spares_its_successor(rank):
    line = rank.dial()
    assert line.ask("tiny.run(46)") is None
    assert not rank.session.kill(rank.lease, rank.worker, "cancel", 45)
    assert line.ask("1") == 1
    assert rank.session.kill(rank.lease, rank.worker, "cancel", 46)
    ended = rank.session.verdict(rank.lease, rank.worker)
    assert (ended.cause, ended.reason, ended.invocation) == ("infrastructure", "cancel", 46)


def test_what_a_kernel_started_ends_with_its_worker(rank, wait_until):
    line = rank.dial()
    plain = line.ask("__import__('subprocess').Popen(['sleep', '600']).pid")
    hidden = line.ask("__import__('subprocess').Popen(['setsid', 'sleep', '600']).pid")
    assert alive(plain) and alive(hidden)
    line.do("os._exit(0)")
    wait_until(lambda: not alive(plain) and not alive(hidden), "the kernel's processes are gone")


# --- leases -------------------------------------------------------------------------

def test_a_demand_beyond_what_is_spare_is_denied_with_both_numbers(nobody_else):
    with pytest.raises(LeaseDenied, match=r"3 workers.*2 available"):
        nobody_else.request(3, 3, timeout_s=0)


def test_a_demand_takes_what_there_is_above_its_minimum(nobody_else):
    grant = nobody_else.request(1, 5, timeout_s=0)
    assert len(grant.workers) == 2 and "2 available" in grant.reason


def test_a_demand_waits_for_cores_that_another_rank_gives_back(shared):
    with Rank(shared, workers=2) as first, Session.open(shared) as second:
        with pytest.raises(LeaseDenied):
            second.request(1, 1, timeout_s=0.05)
        first.session.release(first.lease)
        assert len(second.request(2, 2, timeout_s=20).workers) == 2


def test_a_release_delivers_the_last_lines_first(rank):
    line = rank.dial()
    assert line.ask("print('the last line', end='', flush=True)") is None
    rank.session.release(rank.lease)
    assert rank.events.lines() == ["the last line"]
    rank.session.release(rank.lease)


def test_epochs_rise_over_services(wait_until):
    chosen = tiny.settings()
    with Rank(chosen) as rank:
        first, pid = rank.lease.epoch, rank.session.service_pid
    wait_until(lambda: not alive(pid), "the service lingered and left")
    with Rank(chosen) as rank:
        assert rank.lease.epoch > first
        assert rank.session.service_pid != pid


def test_what_a_lease_used_is_kept(shared, wait_until):
    with Rank(shared) as rank:
        line = rank.dial()
        line.ask("tiny.idle()")
        lease = rank.lease.id
        rank.session.release(rank.lease)
    with contextlib.closing(sqlite3.connect(service_directory(shared) / "store.db")) as store:
        [(held_s, cpu_s, count)] = store.execute("SELECT held_s, cpu_s, invocations FROM usage WHERE lease = ?",
                                                 (lease,))
    assert held_s > 0 and cpu_s > 0 and count == 1


def test_the_grants_secret_stays_out_of_text(rank):
    assert len(rank.lease.secret) == 16
    for text in (repr(rank.lease), repr(rank.grant), str(rank.session.status())):
        assert repr(rank.lease.secret)[2:-1] not in text and rank.lease.secret.hex() not in text


def test_a_second_rank_that_knows_the_secret_shares_the_worker(rank, shared):
    line = rank.dial()
    line.ask("1")
    line.connection.close()
    events = Events()
    with Session.open(shared, on_event=events) as other:
        fd = other.dial(rank.lease, rank.worker)
        with tiny.socket.socket(fileno=fd) as connection:
            connection.settimeout(30)
            theirs = tiny.Line(connection)
            pid = theirs.ask("os.getpid()")
            theirs.do("print('to both'); tiny.run(7); os._exit(5)")
            ended = other.verdict(rank.lease, rank.worker)
            assert ended.invocation == 7 and ended.last_lines == ("to both",)
            assert rank.session.verdict(rank.lease, rank.worker).invocation == 0
    assert not alive(pid)
    # The lease is its owner's still.
    assert rank.dial(rank.events.wait(msg.WorkerReady).worker).ask("2") == 2


# --- output -------------------------------------------------------------------------

def test_lines_of_a_worker_reach_its_rank(rank):
    line = rank.dial()
    line.ask("(print('one'), print('two', file=sys.stderr), os.system('echo three'))[0]")
    rank.session.release(rank.lease)
    assert rank.events.lines() == ["one", "two", "three"]
    log = next(event for event in rank.events.seen if isinstance(event, msg.Log))
    assert msg.log_text(log).startswith(f"[rfaas worker {rank.worker}] one\n")


def test_an_unfinished_line_is_shown_too(rank, wait_until):
    line = rank.dial()
    line.do("print('no newline', end='', flush=True)")
    wait_until(lambda: rank.events.lines() == ["no newline"], "the unfinished line")


def test_a_flood_of_output_does_not_grow_the_service(rank, wait_until):
    line = rank.dial()
    line.ask("1")
    service = rank.session.service_pid

    def resident() -> int:
        return int(Path(f"/proc/{service}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    line.ask("[os.write(1, (b'y' * 99 + b'\\n') * 600) and None for _ in range(1700)] and 1")
    line.do("print('the end'); os._exit(4)")
    ended = rank.session.verdict(rank.lease, rank.worker, 30)
    assert ended.last_lines[-1] == "the end" and len(ended.last_lines) <= 20
    assert resident() - before < 64 << 20
    assert any("left out" in text for text in rank.events.lines())


def test_output_that_is_no_text_does_no_harm(rank, wait_until):
    line = rank.dial()
    line.ask("os.write(1, b'\\xff\\xfe\\x00ok\\n')")
    wait_until(lambda: rank.events.lines() == ["\\xff\\xfe\x00ok"], "the line, escaped")


# --- ends of ranks and services -------------------------------------------------------

def test_a_killed_rank_leaves_no_worker_and_no_core_taken(view, wait_until):
    chosen = tiny.settings()
    body = "r = tiny.Rank(settings, workers=2)\n" \
           "for w in r.lease.workers: say(r.dial(w.number).ask('os.getpid()'))\n" \
           "time.sleep(600)"
    with Session.open(chosen) as watcher, other_rank(view, chosen, body) as other:
        workers = [int(other.stdout.readline()) for _ in range(2)]
        assert watcher.status()["cores"]["free"] == []
        other.kill()
        wait_until(lambda: not any(alive(pid) for pid in workers), "the workers are gone")
        wait_until(lambda: watcher.status()["cores"]["free"] == [0, 1], "the cores are free")
        assert watcher.status()["leases"] == []


def test_a_killed_rank_whose_child_lives_on_is_noticed(view, wait_until):
    chosen = tiny.settings()
    # The child is made behind Python's back, as an MPI library would.
    body = "r = tiny.Rank(settings); say(r.dial().ask('os.getpid()'))\n" \
           "import ctypes; pid = ctypes.CDLL(None).fork()\n" \
           "if pid == 0: time.sleep(600)\n" \
           "say(pid); time.sleep(600)"
    with other_rank(view, chosen, body) as other:
        worker, child = int(other.stdout.readline()), int(other.stdout.readline())
        try:
            other.kill()
            wait_until(lambda: not alive(worker), "the worker is gone")
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_killed_service_takes_its_workers_along_and_a_new_one_serves(view, wait_until):
    chosen = tiny.settings()
    with Rank(chosen, workers=2) as rank:
        pids = [rank.dial(worker.number).ask("os.getpid()") for worker in rank.lease.workers]
        pids += [zygote["pid"] for zygote in rank.session.status()["zygotes"]]
        os.kill(rank.session.service_pid, signal.SIGKILL)
        rank.events.wait(msg.ServiceEnded)
        with pytest.raises(ServiceLost, match="make a new Executor"):
            rank.session.request(1, 1)
        with pytest.raises(ServiceLost):
            rank.session.verdict(rank.lease, rank.worker)
        with pytest.raises(ServiceLost):
            rank.session.dial(rank.lease, rank.worker)
        wait_until(lambda: not any(alive(pid) for pid in pids), "workers and zygotes are gone")
        with Rank(chosen) as second:
            assert second.dial().ask("3") == 3
            assert second.session.service_pid != rank.session.service_pid


def test_a_killed_zygote_costs_its_workers_and_not_the_lease(rank):
    pid = rank.dial().ask("os.getppid()")
    os.kill(pid, signal.SIGKILL)
    ended = rank.session.verdict(rank.lease, rank.worker)
    assert (ended.cause, ended.reason) == ("infrastructure", "service")
    assert rank.dial(rank.events.wait(msg.WorkerReady).worker).ask("os.getppid()") != pid


def test_a_worker_environment_that_does_not_start_ends_the_lease_with_the_reason(monkeypatch, tmp_path):
    broken = tmp_path / "numpy.py"
    broken.write_text("raise RuntimeError('this numpy is broken')")
    monkeypatch.syspath_prepend(str(tmp_path))
    events = Events()
    with Session.open(tiny.settings(), on_event=events) as session:
        session.request(1, 1)
        ended = events.wait(msg.LeaseEnded)
        assert ended.cause == "failed" and "this numpy is broken" in ended.message


def test_an_idle_service_leaves_no_process_socket_or_lock(wait_until):
    chosen = tiny.settings()
    with Rank(chosen) as rank:
        facts = rank.session.status()
        pids = [facts["pid"], *(zygote["pid"] for zygote in facts["zygotes"]), rank.dial().ask("os.getpid()")]
        directory = Path(facts["directory"])
    wait_until(lambda: not any(alive(pid) for pid in pids), "service, zygote and worker are gone")
    assert not (directory / "socket").exists()


def test_a_service_that_is_told_to_stay_stays_until_it_is_told_to_go(wait_until):
    chosen = tiny.settings().with_(linger_s=0.0)
    with Session.open(chosen, observer=True) as session:
        session.stay()
        pid = session.service_pid
    assert status(chosen)["stay"] and alive(pid)
    with Session.open(chosen, start=False, observer=True) as session:
        session.down()
    assert not alive(pid)


def test_a_service_that_is_terminated_cleans_up(wait_until):
    chosen = tiny.settings()
    with Rank(chosen) as rank:
        worker = rank.dial().ask("os.getpid()")
        os.kill(rank.session.service_pid, signal.SIGTERM)
        rank.events.wait(msg.ServiceEnded)
        wait_until(lambda: not alive(worker) and not alive(rank.session.service_pid), "both are gone")
        assert not (service_directory(chosen) / "socket").exists()


def test_two_services_of_one_user_never_lend_the_same_core(wait_until):
    base = Path(os.environ["RFAAS_RUNTIME_DIR"]) / f"two{time.monotonic_ns()}"
    one = tiny.settings().with_(runtime_dir=str(base))
    with Rank(one) as first:
        # Another Slurm job of the same user on the same node: another service.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_JOB_ID", "4711")
            second = Session.open(one)
        with second:
            assert second.service_pid != first.session.service_pid
            grant = second.request(1, 2, timeout_s=0)
            [worker] = grant.workers
            assert set(worker.cores).isdisjoint(first.lease.workers[0].cores)
            first.session.release(first.lease)
            assert second.request(1, 1, timeout_s=20).workers


def test_an_idle_zygote_ends_and_comes_back_when_it_is_needed(wait_until):
    chosen = tiny.settings(zygote_idle_s=0.05)
    with Session.open(chosen) as session:
        wait_until(lambda: session.status()["zygotes"] == [], "the zygote ended")
        assert session.request(1, 1).workers
        wait_until(lambda: session.status()["workers"][0]["state"] == "serving", "a new zygote forked the worker")


def test_status_says_what_runs(rank):
    rank.dial().ask("tiny.idle()")
    facts = rank.session.status()
    [worker] = facts["workers"]
    assert facts["pid"] == rank.session.service_pid and facts["cores"]["lent"] == list(rank.lease.workers[0].cores)
    assert worker["number"] == rank.worker and worker["invocations"] == 1 and alive(worker["pid"])
    assert [lease["id"] for lease in facts["leases"]] == [rank.lease.id]
    assert facts["sessions"][0]["pid"] == os.getpid()
