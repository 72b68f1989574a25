"""`rfaas bench reclaim`: how soon a lent core and its worker's memory are free again, and the rank knows.

    decided ──▶ rank_told      its session heard that the worker's end is near
            ──▶ core_free      no thread of the worker has the core in its mask, or lives
            ──▶ memory_free    the worker's process has ended

A worker runs a kernel that never ends: one that spins in native code, one of 64 spinning threads, one that holds
1 GiB and spins. The service says when it decided; everything else is seen from outside it, by a thread that reads the
worker's masks in /proc, by its pidfd, and by the rank's own session. `bare_memory_free` is a process of ours that
holds 1 GiB and is killed: the least that freeing so much takes here. All of it in a runtime directory of its own.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfaas_mpi import messages as msg
from rfaas_mpi.bench import environment, measure
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.config import Settings
from rfaas_mpi.kernels import Kernel, kernel
from rfaas_mpi.session import Session

__all__ = ["KINDS", "measure_reclaim"]

RECLAIMS = 200
HELD_BYTES = 1 << 30
THREADS = 64
GRACE_S = 0.05
BEGIN_S = 60.0                       # a kernel that has not begun by then never will
POLL_S = 20e-6                       # the judge looks so often
LIBRARY = Path(__file__).parents[1] / "_native_kernels.so"


# --- kernels that never end ------------------------------------------------------

def _begun(name: np.ndarray) -> None:
    Path(name.tobytes().decode()).touch()


def _hold() -> mmap.mmap:
    """Memory of which each page is there."""
    return mmap.mmap(-1, HELD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


@kernel
def _holds(name: np.ndarray, out: np.ndarray) -> None:
    held = _hold()
    _begun(name)
    while held:
        pass


@kernel
def _threads(name: np.ndarray, out: np.ndarray) -> None:
    together = threading.Barrier(THREADS)

    def spin() -> None:
        together.wait()
        hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)     # hours, without the interpreter's lock

    for _ in range(THREADS - 1):
        threading.Thread(target=spin, daemon=True).start()
    _begun(name)
    spin()


def _spins() -> Kernel:
    return Kernel.from_library(str(LIBRARY), "rfm_bad_loop")


BARE = "bare"
KINDS: dict[str, tuple[Callable[[], Kernel], float]] = {
    f"{kind}{suffix}": (code, grace_s)
    for kind, code in (("spin", _spins), ("threads", lambda: _threads), ("memory", lambda: _holds))
    for suffix, grace_s in (("", 0.0), ("_grace", GRACE_S))} | {BARE: (_spins, 0.0)}


# --- one reclaim ------------------------------------------------------------------

@dataclass(frozen=True)
class Times:
    """µs after the decision."""

    told: float
    core: float
    memory: float


class _Heard:
    """When a session heard that a worker is revoked, ns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.revoking = 0

    def __call__(self, event: msg.AnyEvent) -> None:
        if isinstance(event, msg.Revoking):
            now = time.monotonic_ns()
            with self._changed:
                self.revoking = now
                self._changed.notify_all()

    def wait(self) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self.revoking, BEGIN_S):
                raise BenchError("the rank was not told that its worker is revoked")
            told, self.revoking = self.revoking, 0
            return told


class _Judge:
    """A thread that watches a process leave its cores and end, by what the kernel says about its threads."""

    def __init__(self, pid: int, cores: frozenset[int]) -> None:
        self.free_ns = 0
        self.gone_ns = 0
        self._pid, self._cores = pid, cores
        self._pidfd = os.pidfd_open(pid)
        self._watching = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rfaas-judge")
        self._thread.start()
        self._watching.wait()

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        while self._is_there():
            self._watching.set()
            if poller.poll(0):
                break
            time.sleep(POLL_S)
        self.free_ns = time.monotonic_ns()
        self._watching.set()
        poller.poll()
        self.gone_ns = time.monotonic_ns()

    def _is_there(self) -> bool:
        try:
            tasks = os.listdir(f"/proc/{self._pid}/task")
        except (FileNotFoundError, ProcessLookupError):
            return False
        for task in tasks:
            try:
                if not self._cores.isdisjoint(os.sched_getaffinity(int(task))):
                    return True
            except ProcessLookupError:
                continue              # this one has ended
        return False

    def close(self) -> None:
        self._thread.join()
        os.close(self._pidfd)


@contextmanager
def _lent(session: Session, settings: Settings, code: Kernel, directory: Path, memory: int | None) -> Iterator[int]:
    """The pid of a worker that runs this kernel now."""
    from rfaas_mpi.fabric import Invoker

    begun = directory / "begun"
    begun.unlink(missing_ok=True)
    x, y = np.frombuffer(os.fsencode(begun), np.uint8), np.zeros(1)
    invoker = Invoker(slots=settings.slots, slot_bytes=settings.slot_bytes, spin_us=settings.spin_us)
    try:
        [lease] = session.request(1, 1, 1, memory).leases
        number = lease.workers[0].number
        channel = invoker.attach(session.dial(lease, number), lease=lease.id, worker=number)
        request = invoker.request(invoker.kernel(code.kind, code.digest, code.blob), [x], [y], code.meta([x], [y]))
        request.start()
        _wait(lambda: begun.exists() or (code.kind != _holds.kind and _runs(session, number)), "the kernel runs")
        yield channel.pid
        request.wait()
        request.close()
    finally:
        invoker.close()


def _runs(session: Session, number: int) -> bool:
    return any(worker["number"] == number and worker["running"] for worker in session.status()["workers"])


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BEGIN_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{BEGIN_S:g} s have passed, and still it is not so that {what}")
        time.sleep(0.001)


def _reclaim(session: Session, heard: _Heard, pid: int, cores: frozenset[int], grace_s: float) -> Times:
    judge = _Judge(pid, cores)
    try:
        decided = session.reclaim(cores, grace_s).decided_ns
    finally:
        judge.close()
    told = heard.wait()
    return Times((told - decided) / 1e3, (judge.free_ns - decided) / 1e3, (judge.gone_ns - decided) / 1e3)


def _bare(core: int) -> float:
    """µs from the kill of a process that holds 1 GiB, on that core, until it has ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        held = _hold()
        os.write(writing, b"x")
        while held:
            pass
    pidfd = os.pidfd_open(pid)
    try:
        os.close(writing)
        os.read(reading, 1)
        begin = time.monotonic_ns()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        return (time.monotonic_ns() - begin) / 1e3
    finally:
        os.waitpid(pid, 0)
        os.close(pidfd)
        os.close(reading)


# --- all of them --------------------------------------------------------------------

def measure_reclaim(options: Options, *, reclaims: int = RECLAIMS) -> dict:
    """Figures in µs after the decision, for each kernel with and without a grace.

    BenchError where no core can be lent, or a rank was not told.
    """
    check_quiet(options.progress)
    count = options.cycles(reclaims)
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    wanted = [label for label in KINDS if not options.of or label in options.of]
    figures: dict[str, dict] = {}
    try:
        with environment.pinned(options.core) as cores:
            lent = frozenset([next(core for core in reversed(cores.allowed) if core != cores.rank)])
            settings = Settings.load(runtime_dir=str(directory), cores=tuple(lent), low_priority="yes", linger_s=60.0)
            heard = _Heard()
            with Session.open(settings, on_event=heard) as session:
                means = session.status()["low_priority"]
                for label in wanted:
                    if label == BARE:
                        options.progress("bare processes that hold as much")
                        bare = [_bare(next(iter(lent))) for _ in range(max(5, count // 4))]
                        figures["bare_memory_free_us"] = _figure(bare)
                        continue
                    code, grace_s = KINDS[label]
                    times = []
                    for number in range(count):
                        if number % 50 == 0:
                            options.progress(f"{label}: {number} of {count}")
                        with _lent(session, settings, code(), directory, 2 * HELD_BYTES) as pid:
                            times.append(_reclaim(session, heard, pid, lent, grace_s))
                        _wait(lambda: not session.status()["leases"], "the lease has ended")
                    figures |= _figures(label, times, grace_s)
                session.down()
            return {**measure.flat(figures), "low_priority": means, "held_bytes": HELD_BYTES, "threads": THREADS,
                    "grace_s": GRACE_S, "pinning": {"rank": cores.rank, "lent": sorted(lent)}}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _figure(values: list[float]) -> dict:
    return measure.figure(values, unit="us", digits=1, max=round(max(values), 1))


def _figures(label: str, times: list[Times], grace_s: float) -> dict[str, dict]:
    """With a grace, what is left of it is not the product's: core and memory count from its end."""
    end = grace_s * 1e6
    return {f"{label}_rank_told_us": _figure([each.told for each in times]),
            f"{label}_core_free_us": _figure([each.core - end for each in times]),
            f"{label}_memory_free_us": _figure([each.memory - end for each in times])}
