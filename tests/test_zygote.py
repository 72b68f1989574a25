"""The fork server alone: what it forks, what it refuses, and that it takes everything with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiny

from rfaas_mpi import config
from rfaas_mpi import messages as msg
from rfaas_mpi.agent import zygote
from rfaas_mpi.agent.groups import Group, Roots, maker
from rfaas_mpi.agent.pool import WorkerHandle, ZygoteHandle, ZygoteKind
from rfaas_mpi.errors import ServiceError


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Path:
    return tiny.make_view(tmp_path_factory.mktemp("view"))


def kind(view: Path, *before: Path, **environment: str) -> ZygoteKind:
    """What a rank with this path and environment would have."""
    variables = {**os.environ, **environment}
    return ZygoteKind.of(msg.Join(
        id=1, pid=os.getpid(), executable=os.fsencode(sys.executable), flags=(),
        path=tuple(os.fsencode(entry) for entry in (*before, view, *sys.path)), directory=os.fsencode(os.getcwd()),
        environment=tuple((os.fsencode(name), os.fsencode(value)) for name, value in variables.items()), affinity=(0,)))


class Fork:
    """A zygote and what it said."""

    def __init__(self, of: ZygoteKind, **more: bool) -> None:
        self.zygote = ZygoteHandle(of, time.monotonic(), **more)
        self.workers: dict[int, WorkerHandle] = {}

    def hear(self) -> tuple[object, list[int]]:
        """The next message; fails if none comes."""
        assert select.select([self.zygote.channel], [], [], 30)[0], "the zygote says nothing"
        data, fds, _, _ = socket.recv_fds(self.zygote.channel, 1 << 16, 1)
        if not data:
            raise ConnectionResetError("the zygote is gone")
        return msg.unpack_from_zygote(data), fds

    def start(self) -> None:
        said, _ = self.hear()
        assert isinstance(said, msg.ZygoteReady), said
        self.zygote.became_ready()

    def fork(self, number: int, cores: tuple[int, ...] = (0,), entrances: Iterable[int] = ()) -> WorkerHandle:
        handle = WorkerHandle.fork(self.zygote, number, 1, cores, 0, time.monotonic(), entrances)
        self.workers[number] = handle
        said, fds = self.hear()
        assert isinstance(said, msg.WorkerForked) and said.worker == number, said
        assert handle.forked(fds[0], said.pid) == said.pid
        handle.admit()
        assert select.select([handle.agent], [], [], 30)[0]
        [frame] = handle.frames.feed(handle.agent.recv(1 << 16))
        assert frame.type == msg.FRAME_READY
        return handle

    def close(self) -> None:
        self.zygote.close()
        for handle in self.workers.values():
            handle.close()


@pytest.fixture
def forker(view):
    with contextlib.closing(Fork(kind(view))) as forker:
        forker.start()
        yield forker


def ended(handle: WorkerHandle) -> bool:
    return bool(select.select([handle.pidfd], [], [], 30)[0])


def test_a_worker_that_is_told_to_quit_ends_with_status_0(forker):
    handle = forker.fork(1)
    handle.send(msg.pack_frame(msg.FRAME_QUIT))
    said, _ = forker.hear()
    assert (said.worker, said.pid, said.signal, said.exit_code) == (1, handle.pid, 0, 0)
    assert said.cpu_s > 0 and said.max_rss_bytes > 1 << 20


def test_a_worker_that_its_group_does_not_let_in_serves_nevertheless(forker):
    roots = Roots.find()
    if roots.why_not or roots.unified or os.geteuid() != 0:
        pytest.skip(roots.why_not or "needs root and control groups of version 1")
    group = Group.make(f"{maker()}-w1", roots)
    entrances = group.entrances(61_003)       # as for who has another uid in his container
    try:
        with pytest.raises(PermissionError):
            os.write(entrances[0], b"0")
        assert not group.holds(forker.fork(1, entrances=entrances).pid), "who ordered it moves it"
    finally:
        for fd in entrances:
            os.close(fd)
        group.close()


def test_what_a_worker_is_sent_before_it_is_admitted_arrives_then(forker):
    handle = forker.fork(1)
    handle.held = []
    given, other = socket.socketpair()
    with given, other:
        assert handle.send(msg.pack_frame(msg.FRAME_QUIT), [given.fileno()])
        assert not select.select([forker.zygote.channel], [], [], 0)[0]
        handle.admit()
    said, _ = forker.hear()
    assert (said.worker, said.exit_code) == (1, 0)


def test_a_fork_that_waits_is_told_if_that_is_wanted_and_becomes_the_next_worker(view):
    with contextlib.closing(Fork(kind(view), tell_spares=True)) as forker:
        said, fds = forker.hear()
        assert isinstance(said, msg.SpareForked)
        os.close(fds[0])
        forker.start()
        assert forker.fork(1).pid == said.pid


def test_what_is_no_process_is_not_taken_for_a_worker(forker):
    handle = forker.fork(1)
    kept, handle.pidfd = handle.pidfd, -1
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ServiceError, match="no process"):
        handle.forked(null, 1)
    handle.pidfd = kept


def test_how_a_worker_ended_is_reported(forker):
    handle = forker.fork(1)
    handle.kill()
    said, _ = forker.hear()
    assert (said.worker, said.signal) == (1, signal.SIGKILL)
    assert handle.gone()


def test_a_worker_ends_when_its_agent_socket_does(forker):
    handle = forker.fork(1)
    handle.agent.close()
    said, _ = forker.hear()
    assert isinstance(said, msg.WorkerExited) and said.worker == 1


def test_the_end_of_its_channel_ends_a_zygote_and_its_workers(forker):
    handles = [forker.fork(1), forker.fork(2)]
    forker.zygote.close()
    assert all(ended(handle) for handle in handles)
    assert forker.zygote.process.returncode == 0


def test_a_killed_zygote_leaves_no_worker(forker):
    handle = forker.fork(1)
    forker.zygote.process.kill()
    assert ended(handle)


def test_a_zygote_that_is_not_single_threaded_refuses_to_fork(view, tmp_path):
    # As an application's sitecustomize might.
    (tmp_path / "cloudpickle.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n")
    with contextlib.closing(Fork(kind(view, tmp_path))) as forker:
        said, _ = forker.hear()
        assert isinstance(said, msg.ZygoteProblem) and "threads" in said.message


def test_a_zygote_that_can_not_import_says_why(view, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('not this one')")
    with contextlib.closing(Fork(kind(view, tmp_path))) as forker:
        said, _ = forker.hear()
        assert isinstance(said, msg.ZygoteProblem) and said.worker == 0 and "not this one" in said.message
        with pytest.raises(ConnectionResetError):
            forker.hear()


def test_workers_ordered_before_the_zygote_is_ready_are_forked_when_it_is(view):
    with contextlib.closing(Fork(kind(view))) as forker:
        handle = WorkerHandle.fork(forker.zygote, 5, 1, (0,), 0, time.monotonic())
        forker.workers[5] = handle
        forker.start()
        said, fds = forker.hear()
        assert isinstance(said, msg.WorkerForked) and said.worker == 5
        handle.forked(fds[0], said.pid)


def test_an_order_that_is_withdrawn_before_the_zygote_is_ready_makes_no_worker(view):
    with contextlib.closing(Fork(kind(view))) as forker:
        forker.workers[5] = WorkerHandle.fork(forker.zygote, 5, 1, (0,), 0, time.monotonic())
        assert forker.zygote.withdraw(5) and not forker.zygote.withdraw(5)
        forker.start()
        assert forker.fork(6).pid


def test_signals_that_are_the_agent_s_alone_end_neither_worker_nor_zygote(view):
    numbers = (signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1)
    with contextlib.closing(Fork(kind(view), deaf=numbers)) as forker:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint(numbers)
        for number in numbers:
            os.kill(forker.zygote.pid, number)       # while it loads what it needs, too
        forker.start()
        handle = forker.fork(1)
        for pid in (forker.zygote.pid, handle.pid):
            for number in numbers:
                os.kill(pid, number)
        handle.send(msg.pack_frame(msg.FRAME_QUIT))
        said, _ = forker.hear()
        assert (said.worker, said.signal, said.exit_code) == (1, 0, 0)


def test_ranks_of_one_launch_share_a_zygote(view):
    first = kind(view, PMI_RANK="0", OMPI_COMM_WORLD_RANK="0", SLURM_PROCID="0", PMIX_SERVER_URI41="a;b")
    second = kind(view, PMI_RANK="1", OMPI_COMM_WORLD_RANK="1", SLURM_PROCID="1", PMIX_SERVER_URI41="c;d")
    assert first.key == second.key
    assert kind(view, MY_SETTING="1").key != first.key


def test_what_a_launcher_gave_one_rank_is_scrubbed_and_the_rest_is_kept():
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "4",
            "MPICH_HOME": "/opt/mpich", "OMP_STACKSIZE": "1M"}
    gone = {"PMI_FD": "9", "PMIX_RANK": "1", "OMPI_MCA_x": "y", "HYDI_CONTROL_FD": "8", "SLURM_PROCID": "3",
            "SLURM_STEP_ID": "0", "MPI_LOCALRANKID": "1"}
    assert config.scrubbed({**kept, **gone}) == kept


# --- ends, in a process that has no other children ---------------------------

REAPS = """
import os, socket, types
from rfaas_mpi import messages
from rfaas_mpi.agent import zygote
from rfaas_mpi.agent.priority import NO_PRIORITY
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
parent = zygote._Zygote(there, types.SimpleNamespace(landlock=None), NO_PRIORITY, False)
if not (pid := os.fork()):
    os._exit(3)
parent.workers[pid] = 1
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
reap = os.waitpid
def late(*words):
    said = messages.unpack_from_zygote(here.recv(1 << 16, socket.MSG_DONTWAIT))
    print(said.worker, said.pid == pid, said.signal, said.exit_code)
    return reap(*words)
os.waitpid = late
assert parent.reap() and not zygote._children()
"""


def test_a_worker_s_end_is_told_before_it_is_reaped():
    done = subprocess.run([sys.executable, "-c", REAPS], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1 True 0 3\n", "")


@pytest.mark.parametrize("number", [zygote._WAITID, None], ids=["waitid", "wait4"])
def test_what_a_child_used_is_what_the_kernel_says_when_it_is_reaped(monkeypatch, number):
    monkeypatch.setattr(zygote, "_WAITID", number)
    process = subprocess.Popen([sys.executable, "-c", "sum(range(10**6)); b'x' * (64 << 20)"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wait4, reaped = os.wait4, []
    monkeypatch.setattr(os, "wait4", lambda *words: reaped.append(wait4(*words)) or reaped[-1])
    cpu_s, most = zygote._usage(process.pid)
    if number is not None:
        assert not reaped, "it stays"
        os.wait4(process.pid, 0)
    process.returncode = 0
    usage = reaped[0][2]
    assert most == usage.ru_maxrss << 10 > 64 << 20
    assert cpu_s == pytest.approx(usage.ru_utime + usage.ru_stime, abs=2e-6) and cpu_s > 0
