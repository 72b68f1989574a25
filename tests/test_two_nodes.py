"""A rank on one node, the service and its workers on another: the main job over tcp, and what a network does to it.

The nodes are network namespaces of this machine, so that the service's workers can be seen and killed from here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import netns
import pytest
from far import Far, finished, serving, tell
from netns import TwoNodes

APPS = faults.TESTS.parent / "apps"
two_nodes = netns.two_nodes

# A dead network is noticed soon, so that nobody waits for it here.
IMPATIENT = {"RFAAS_TCP_IDLE_S": "1", "RFAAS_TCP_PROBE_S": "1", "RFAAS_TCP_PROBES": "2", "RFAAS_TCP_TIMEOUT_S": "2"}


@pytest.fixture(scope="module")
def far(two_nodes) -> Iterator[Far]:
    """One service for all tests that don't break it."""
    with serving(two_nodes) as far:
        yield far


@pytest.fixture
def impatient(two_nodes) -> Iterator[Far]:
    with serving(two_nodes, **IMPATIENT) as far:
        yield far


@pytest.fixture
def link(two_nodes) -> Iterator[TwoNodes]:
    """The link, whole again in the end."""
    yield two_nodes
    two_nodes.link("up")
    for node in (two_nodes.agent, two_nodes.rank):
        node.run("ip", "neighbour", "flush", "dev", "rfaas0", "nud", "permanent")


# --- what works over the network ------------------------------------------------------------

def test_the_nodes_see_each_other_and_nobody_else(two_nodes):
    code = ("import socket, sys; "
            "print([name for _, name in socket.if_nameindex()])")
    for node in (two_nodes.agent, two_nodes.rank):
        assert set(json.loads(node.run(sys.executable, "-c", code).stdout.replace("'", '"'))) == {"lo", "rfaas0"}


def test_the_main_job_gives_the_right_prices_and_survives_a_killed_worker(far, tmp_path):
    launcher = Path(sys.executable).with_name("mpiexec")
    report = tmp_path / "report.json"
    done = far.nodes.rank.run(launcher if launcher.exists() else "mpiexec", "-n", 1, sys.executable,
                              APPS / "blackscholes.py", "--options", 500_000, "--rounds", 2, "--kill", "--json", report,
                              **far.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert data["config"]["worker_cores"] == [[1]], "it was shared with the worker on the other node"
    assert data["kill"]["begin_ns"] < data["kill"]["killed_ns"] < data["kill"]["end_ns"]


def test_objects_and_buffers_travel_in_all_styles(far):
    assert far.run("""
        with Executor(workers=1, fallback=False) as ex:
            assert repr(ex) == f"<Executor transport=tcp workers={ex.workers}>", repr(ex)
            assert list(ex.map(faults.plus_one, range(500))) == list(range(1, 501))
            assert list(ex.map(faults.plus_one, range(500), chunksize=50)) == list(range(1, 501))
            for size in (0, 1, 4, 1000, 100_000, 3_000_000):
                x = np.random.default_rng(size).random(size)
                assert (ex.Invoke(faults.adds_one, x, np.empty(size)) == x + 1).all()
                near, out = ex.array(x), ex.zeros(size)
                assert (ex.Invoke(faults.adds_one, near, out) == x + 1).all()
                assert (ex.submit(faults.make_array, size).result() == np.arange(float(size))).all()
            x, out = ex.full((40, 30), 1.0), ex.zeros((40, 30))
            again = [ex.Invoke_init(faults.adds_one, x[n], out[n]) for n in range(40)]
            for _ in range(3):
                out.fill(0)
                rfaas_mpi.Startall(again)
                assert rfaas_mpi.Waitall(again)
                assert (out == 2).all()
        say("right")
        """) == "right\n"


def test_a_constant_travels_once_and_never_for_another_one(far):
    """Counted where it leaves the rank's node; a new constant in an old one's place is a new one."""
    said = far.run("""
        def sent():
            with open("/proc/net/dev") as table:
                return next(int(line.split()[9]) for line in table if "rfaas0" in line)

        def total(x):
            return float(x.sum())

        with Executor(workers=1, fallback=False) as ex:
            ex.submit(abs, 1).result()
            size, seen = 1_000_000, set()
            before = sent()
            for value in (1.0, 2.0):
                constant = ex.put(np.full(size, value))
                seen.add(constant.array.ctypes.data)
                out = ex.empty(10)
                for _ in range(20):
                    assert ex.submit(total, constant).result() == value * size
                    assert (ex.Invoke(faults.adds_one, constant.array[50:60], out) == value + 1).all()
                constant.close()
            say(len(seen), (sent() - before) // (8 * size))
        """).split()
    assert said == ["1", "2"], "places that the two constants had, and how often one was sent"


def test_a_kernel_s_errors_output_and_limits_come_back(far):
    said = far.run("""
        with Executor(workers=1, fallback=False) as ex:
            try:
                ex.submit(faults.do, "raise").result()
            except ValueError as error:
                say("raised", "no number" in str(error))
            try:
                ex.submit(faults.do, "segfault").result()
            except rfaas_mpi.KernelError as error:
                say("crashed", error.signal == signal.SIGSEGV, "now: segfault" in error.last_lines)
            try:
                ex.Invoke(faults.sleeps, np.ones(1), np.zeros(1), timeout_s=0.1)
            except rfaas_mpi.KernelTimeout:
                say("timed out")
            assert ex.submit(faults.plus_one, 1).result() == 2
        """)
    assert said == "raised True\ncrashed True True\ntimed out\n"


def test_a_forced_cancel_stops_a_kernel_on_the_other_node(far, tmp_path):
    assert far.run("""
        with Executor(workers=1, fallback=False) as ex:
            begun = Path(sys.argv[1])
            request = ex.Iinvoke(faults.scribbles, (faults.text(begun), 1.0), np.zeros(5))
            faults.wait_for(begun)
            request.Cancel(force=True)
            try:
                request.Wait()
            except BaseException as error:
                say(type(error).__name__)
            assert ex.submit(faults.plus_one, 1).result() == 2
        """, tmp_path / "begun") == "CancelledError\n"


# --- what may happen to a worker, the service, the network -------------------------------------

IN_FLIGHT = """
    with Executor(workers=1) as ex:
        ex.submit(faults.plus_one, 1).result()
        first, = ex.workers
        held = ex.submit(faults.begin_then_wait, sys.argv[1], sys.argv[2], 7)
        futures = [ex.submit(faults.plus_one, n) for n in range(50)]
        xs, outs = ex.full((20, 1000), 1.0), ex.zeros((20, 1000))
        requests = [ex.Iinvoke(faults.adds_one, xs[n], outs[n]) for n in range(20)]
        say("in flight")
        sys.stdin.readline()
        assert held.result(90) == 7
        assert [future.result(90) for future in futures] == list(range(1, 51))
        assert rfaas_mpi.Waitall(requests)
        assert (outs == 2).all()
        say("the same worker" if ex.workers == [first] else "another worker" if ex.workers else "the rank")
    """


def test_a_killed_worker_costs_no_result(far, tmp_path):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with far.running(IN_FLIGHT, begun, flag) as rank:
        assert faults.line(rank) == "in flight"
        faults.wait_for(begun)
        os.kill(int(begun.read_text()), signal.SIGKILL)
        flag.touch()
        tell(rank, "go on")
        assert finished(rank) == "another worker\n"


def test_a_killed_service_costs_no_result(two_nodes, tmp_path, wait_until):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with serving(two_nodes) as far, far.running(IN_FLIGHT, begun, flag) as rank:
        assert faults.line(rank) == "in flight"
        faults.wait_for(begun)
        os.kill(far.pid, signal.SIGKILL)
        # Its worker ends with it, and not before it has noticed: what it's told to go on with it could still end.
        worker = Path("/proc", begun.read_text())
        wait_until(lambda: not worker.exists(), "the service's worker has ended")
        flag.touch()
        tell(rank, "go on")
        assert finished(rank) == "the rank\n"


@pytest.mark.parametrize("how", ["down", "packets lost"])
def test_a_link_that_comes_back_costs_nothing(far, link, tmp_path, wait_until, how):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with far.running(IN_FLIGHT, begun, flag) as rank:
        assert faults.line(rank) == "in flight"
        faults.wait_for(begun)
        cut(link, how)
        # The kernel ends, and its worker has a reply that can't be sent.
        flag.touch()
        tell(rank, "go on")
        wait_until(lambda: unsent(link.agent), "the reply is on its way to nowhere")
        mend(link, how)
        assert finished(rank) == "the same worker\n"


def cut(link: TwoNodes, how: str) -> None:
    if how == "down":
        link.link("down")
    else:
        link.lose(True)


def mend(link: TwoNodes, how: str) -> None:
    if how == "down":
        link.link("up")
    else:
        link.lose(False)


def unsent(node: netns.Node) -> bool:
    """True if something that a process of this node sent over TCP was not acknowledged."""
    lines = Path(f"/proc/{node.pid}/net/tcp").read_text().splitlines()[1:]
    return any(int(line.split()[4].partition(":")[0], 16) for line in lines if line.split()[3] == "01")


@pytest.mark.parametrize("how", ["down", "packets lost"])
@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "no fallback"])
def test_a_partition_ends_what_is_in_flight_in_time_on_both_nodes(impatient, link, tmp_path, wait_until, how, fallback):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    body = """
        with Executor(workers=1, fallback=sys.argv[3] == "yes") as ex:
            ex.submit(faults.plus_one, 1).result()
            held = ex.submit(faults.begin_then_wait, sys.argv[1], sys.argv[2], 7)
            futures = [ex.submit(faults.plus_one, n) for n in range(50)]
            x, out = ex.full(1000, 1.0), ex.zeros(1000)
            request = ex.Iinvoke(faults.adds_one, x, out)
            say("in flight")
            sys.stdin.readline()
            if sys.argv[3] == "yes":
                assert held.result(90) == 7
                assert [future.result(90) for future in futures] == list(range(1, 51))
                assert request.Wait() and (out == 2).all()
            else:
                for wait in (held.result, *(future.result for future in futures), request.Wait):
                    try:
                        wait()
                    except (rfaas_mpi.ServiceLost, rfaas_mpi.WorkerLost) as error:
                        assert "make a new Executor" in str(error), error
                    else:
                        raise AssertionError("there was nobody to run it")
            assert ex.workers == []
            say("over")
        """
    with impatient.running(body, begun, flag, "yes" if fallback else "no") as rank:
        assert faults.line(rank) == "in flight"
        faults.wait_for(begun)
        worker = int(begun.read_text())
        cut(link, how)
        tell(rank, "go on")
        # Only now may it end where it is run again: on the rank.
        wait_until(lambda: not impatient.status()["sessions"], "the service gives the rank up", 60)
        wait_until(lambda: not faults.alive(worker), "its worker is ended")
        flag.touch()
        assert finished(rank) == "over\n"
    mend(link, how)
    assert impatient.run("""
        with Executor(workers=1, fallback=False) as ex:
            say(ex.submit(faults.plus_one, 1).result())
        """) == "2\n"


def test_a_rank_that_can_not_reach_the_service_is_told_in_time(far, link):
    link.link("down")
    said = far.run("""
        try:
            Executor(start_timeout_s=1)
        except rfaas_mpi.ServiceError as error:
            say(error)
        """)
    assert far.environment["RFAAS_SERVICE"] in said and "can't be reached" in said


def test_a_rank_whose_node_vanishes_leaves_nothing(impatient, link, tmp_path, wait_until):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with impatient.running(IN_FLIGHT, begun, flag) as rank:
        assert faults.line(rank) == "in flight"
        faults.wait_for(begun)
        link.lose(True)
        rank.kill()
        wait_until(lambda: not impatient.status()["leases"] and not impatient.status()["workers"],
                   "the service gives the rank's cores to others", 60)
        assert not faults.alive(int(begun.read_text()))


def test_nothing_is_left_of_two_nodes(wait_until):
    if reason := netns.why_not():
        pytest.skip(reason)
    nodes = TwoNodes()
    forgotten = subprocess.Popen(nodes.rank.command(["sleep", "600"]))
    owners = [nodes.agent.pid, nodes.rank.pid]
    wait_until(lambda: forgotten.pid in nodes.rank.processes(), "it runs on the rank's node")
    nodes.close()
    nodes.close()
    assert forgotten.wait(30) == -signal.SIGKILL
    assert not any(faults.alive(pid) for pid in owners)
    assert "rfaas0" not in Path("/proc/net/dev").read_text()
