"""A rank on one verbs device, the service and its workers on another: the public API, the main job, what goes wrong.

The nodes of the guest share one network namespace, so that sessions travel past the
bridge, and invocations across it: the one can be cut without the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from verbs import bridge, support
from verbs.bridge import TwoDevices

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(nodes) -> TwoDevices:
    return TwoDevices(nodes)


@pytest.fixture(scope="module")
def far(two) -> Iterator[object]:
    """One service for all tests that don't break it."""
    with serving(two) as far:
        yield far


@contextlib.contextmanager
def serving(two: TwoDevices) -> Iterator[object]:
    import far
    with far.serving(two, **bridge.PATIENT, RFAAS_DEVICE=two.agent.device) as service:
        service.environment["RFAAS_DEVICE"] = two.rank.device
        yield service


@contextlib.contextmanager
def executor(far, **settings: object) -> Iterator[object]:
    """This process as the rank."""
    from rfaas_mpi import Executor
    environment = far.environment
    chosen = {"service": environment["RFAAS_SERVICE"], "key_file": environment["RFAAS_KEY_FILE"],
              "device": far.nodes.rank.device, "start_timeout_s": 100, "workers": 1, "fallback": False, **settings}
    with Executor(**chosen) as ex:
        yield ex


@pytest.fixture
def ex(far) -> Iterator[object]:
    with executor(far) as ex:
        yield ex


def channel(ex) -> object:
    """The connection to its one worker."""
    found, = (channel for channel in ex._crew.invoker.channels if channel.alive)
    return found


# --- what works -----------------------------------------------------------------------------

def test_verbs_is_chosen_where_both_nodes_have_it_and_invocations_cross_the_bridge(far, two, ex):
    import faults
    assert repr(ex) == f"<Executor transport=verbs workers={ex.workers}>"
    before = two.rank.sent(), two.agent.sent()
    assert [ex.submit(faults.plus_one, n).result() for n in range(10)] == list(range(1, 11))
    after = two.rank.sent(), two.agent.sent()
    assert all(now - then >= 10 for then, now in zip(before, after, strict=True)), (before, after)


def test_python_and_native_kernels_take_arrays_small_and_large(ex):
    import faults
    import numpy as np
    echo = faults.native("rfm_echo")
    for size in (0, 1, 4, 1000, 100_000, 300_000):
        x = np.random.default_rng(size).random(size)
        near, out = ex.array(x), ex.zeros(size)
        for kernel, right in ((faults.adds_one, x + 1), (echo, x)):
            assert (ex.Invoke(kernel, x, np.empty(size)) == right).all()
            assert (ex.Invoke(kernel, near, out) == right).all()


def test_results_of_unknown_size_and_objects_of_all_sizes_come_back(ex):
    import faults
    import numpy as np
    for size in (0, 1, 1000, 5000, 300_000):
        assert (ex.submit(faults.make_array, size).result() == np.arange(float(size))).all()
    assert list(ex.map(faults.plus_one, range(200))) == list(range(1, 201))
    assert list(ex.map(faults.plus_one, range(200), chunksize=50)) == list(range(1, 201))


def test_persistent_requests_run_again_and_again(ex):
    import faults

    import rfaas_mpi
    x, out = ex.full((40, 30), 1.0), ex.zeros((40, 30))
    again = [ex.Invoke_init(faults.adds_one, x[n], out[n]) for n in range(40)]
    for _ in range(3):
        out.fill(0)
        rfaas_mpi.Startall(again)
        assert rfaas_mpi.Waitall(again)
        assert (out == 2).all()


def total(x) -> float:
    return float(x.sum())


def test_a_constant_travels_once_and_never_for_another_one(two, ex):
    import faults
    import numpy as np
    ex.submit(faults.plus_one, 1).result()
    size, seen = 200_000, set()

    def sent() -> int:
        return int(Path(f"/sys/class/net/{two.rank.interface}/statistics/tx_bytes").read_text())

    before = sent()
    for value in (1.0, 2.0):
        constant = ex.put(np.full(size, value))
        seen.add(constant.array.ctypes.data)
        out = ex.empty(10)
        for _ in range(5):
            assert ex.submit(total, constant).result() == value * size
            assert (ex.Invoke(faults.adds_one, constant.array[50:60], out) == value + 1).all()
        constant.close()
    assert len(seen) == 1, "the second constant took the first one's place"
    assert (sent() - before) // (8 * size) == 2


def test_a_kernel_s_errors_output_and_limits_come_back(ex):
    import faults
    import numpy as np

    import rfaas_mpi
    with pytest.raises(ValueError, match="no number"):
        ex.submit(faults.do, "raise").result()
    with pytest.raises(rfaas_mpi.KernelError) as crash:
        ex.submit(faults.do, "segfault").result()
    assert crash.value.signal == signal.SIGSEGV
    assert "now: segfault" in crash.value.last_lines
    with pytest.raises(rfaas_mpi.KernelTimeout):
        ex.Invoke(faults.sleeps, np.ones(1), np.zeros(1), timeout_s=0.5)
    assert ex.submit(faults.plus_one, 1).result() == 2


def test_the_main_job_gives_the_right_prices_and_survives_a_killed_worker(far, tmp_path):
    report = tmp_path / "report.json"
    launcher = Path(sys.executable).with_name("mpiexec")
    done = far.nodes.rank.run(launcher if launcher.exists() else "mpiexec", "-n", 1, sys.executable,
                              REPOSITORY / "apps" / "blackscholes.py", "--options", 40_000, "--rounds", 1, "--kill",
                              "--json", report, **far.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert data["config"]["worker_cores"] == [[1]], "it was shared with the worker on the other node"
    assert data["kill"]["begin_ns"] < data["kill"]["killed_ns"] < data["kill"]["end_ns"]


def opened(pid: int) -> set[str]:
    """The devices that a process has open."""
    links = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    return {link for link in links if link.startswith("/dev/infiniband/")}


def test_nothing_that_forks_opens_a_device(far, ex):
    import faults
    ex.submit(faults.plus_one, 1).result()
    status = far.status()
    worker, = (worker["pid"] for worker in status["workers"] if worker["state"] == "serving")
    assert opened(worker)
    assert opened(os.getpid())
    for parent in (far.pid, *(zygote["pid"] for zygote in status["zygotes"])):
        assert not opened(parent)


# --- what may happen to a worker, the service, the wire -------------------------------------------

class InFlight:
    """One invocation that is held, and others behind it."""

    def __init__(self, ex, tmp_path: Path) -> None:
        import faults
        self.ex = ex
        self.begun, self.flag = tmp_path / "begun", tmp_path / "flag"
        ex.submit(faults.plus_one, 1).result()
        self.held = ex.submit(faults.begin_then_wait, str(self.begun), str(self.flag), 7)
        self.futures = [ex.submit(faults.plus_one, n) for n in range(20)]
        xs, self.outs = ex.full((10, 1000), 1.0), ex.zeros((10, 1000))
        self.requests = [ex.Iinvoke(faults.adds_one, xs[n], self.outs[n]) for n in range(10)]
        faults.wait_for(self.begun)
        self.worker = int(self.begun.read_text())
        self.ids = self.current_ids()

    def current_ids(self) -> list[int]:
        return [item._raw.id for item in (self.held, *self.futures, *self.requests)]

    def let_go(self) -> None:
        self.flag.touch()

    def check(self) -> None:
        """All are right, under the ids that they had."""
        import rfaas_mpi
        assert self.held.result(200) == 7
        assert [future.result(200) for future in self.futures] == list(range(1, 21))
        assert rfaas_mpi.Waitall(self.requests)
        assert (self.outs == 2).all()
        assert self.current_ids() == self.ids


def test_a_killed_worker_costs_no_result(ex, tmp_path):
    running = InFlight(ex, tmp_path)
    first = ex.workers
    os.kill(running.worker, signal.SIGKILL)
    running.let_go()
    running.check()
    assert ex.workers
    assert ex.workers != first


def test_a_killed_service_costs_no_result(two, tmp_path):
    with serving(two) as far, executor(far, fallback=True) as ex:
        running = InFlight(ex, tmp_path)
        os.kill(far.pid, signal.SIGKILL)
        running.let_go()
        running.check()
        assert ex.workers == []


def test_packets_that_get_lost_cost_nothing_once_they_arrive_again(two, ex, tmp_path):
    running = InFlight(ex, tmp_path)
    with two.packets_lost():
        before = two.agent.sent()
        running.let_go()
        support.wait_until(lambda: two.agent.sent() > before, "the reply is on its way to nowhere")
    running.check()


@pytest.mark.parametrize("side", ["rank", "agent"])
def test_a_port_that_goes_down_and_comes_up_costs_no_result(two, ex, tmp_path, side, caplog):
    running = InFlight(ex, tmp_path)
    link = channel(ex)
    with two.unplugged(getattr(two, side)):
        if side == "agent":
            # Who runs a kernel looks at nothing else.
            running.let_go()
        support.wait_until(lambda: not link.alive, "the connection is given up", 100)
    running.let_go()
    running.check()
    said = [record.getMessage() for record in caplog.records if "is replaced" in record.getMessage()]
    assert len(said) == 1
    assert "the port of the RDMA device went down" in said[0]


def test_a_wire_that_stays_cut_is_named_to_who_waits(two, far, tmp_path):
    from rfaas_mpi import WorkerLost
    with executor(far) as ex:
        running = InFlight(ex, tmp_path)
        with two.packets_lost():
            running.let_go()
            with pytest.raises(WorkerLost, match="does not answer|port of the RDMA device went down"):
                running.held.result(200)
        support.wait_until(lambda: not far.status()["sessions"] or ex.workers, "another worker comes", 100)


@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_a_stopped_worker_that_is_continued_after_its_end_writes_no_byte(ex, tmp_path, end):
    """The kernel writes to its output all the time."""
    import faults
    import numpy as np

    from rfaas_mpi import CancelledError, KernelTimeout
    out, begun = ex.zeros(5000), tmp_path / "begun"
    request = ex.Iinvoke(faults.scribbles, (faults.text(begun), 0.0), out, 2 if end == "deadline" else None)
    faults.wait_for(begun)
    pid = int(begun.read_text())
    os.kill(pid, signal.SIGSTOP)
    if end == "cancel":
        assert request.Cancel(force=True)
    with pytest.raises(KernelTimeout if end == "deadline" else CancelledError):
        request.Wait()
    out[...] = 7
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert (ex.Invoke(faults.adds_one, np.full(50, 1.0), np.zeros(50)) == 2).all()
    assert not faults.alive(pid)
    assert (out == 7).all()


def test_a_reply_that_is_sent_after_the_rank_let_go_changes_no_byte(two, tmp_path):
    """Worker and service are stopped, so that nobody ends it; when it goes on, it writes to where it was told to."""
    import faults
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with serving(two) as far:
        with pytest.raises(KeyboardInterrupt), executor(far) as ex:
            ex.submit(faults.plus_one, 1).result()
            out = ex.zeros(50_000)
            request = ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out)
            faults.wait_for(begun)
            worker = int(begun.read_text())
            for pid in (far.pid, worker):
                os.kill(pid, signal.SIGSTOP)
            flag.touch()
            # Who leaves like this waits for no kernel.
            raise KeyboardInterrupt
        try:
            out[...] = 7
            before = two.agent.sent()
            os.kill(worker, signal.SIGCONT)
            support.wait_until(lambda: two.agent.sent() > before or not faults.alive(worker), "the worker goes on")
        finally:
            os.kill(far.pid, signal.SIGCONT)
        support.wait_until(lambda: not faults.alive(worker), "the worker ends")
        assert (out == 7).all()
        del request
