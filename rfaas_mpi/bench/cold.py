"""`rfaas bench cold`: from nothing to the first result, in steps, and what a waiting worker costs.

    service_start   no service runs: Session.open until it has welcomed us
    zygote          the first lease of a service: its zygote has to start and import numpy
    lease           later ones: the zygote forks
      ├ step_grant       asked for until granted
      ├ step_dial        connection to the worker, both sides proven
      ├ step_attach      shared memory handed over; the worker has been forked and answers
      └ step_first_call  kernel and binding sent, and the first result there
    executor        the same by Executor() and Invoke, joining the service included

All of it in a runtime directory of its own, beside a service that may be running.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from rfaas_mpi.bench import environment, kernels, measure
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.config import Settings
from rfaas_mpi.executor import Executor
from rfaas_mpi.session import Session

__all__ = ["lease_of", "measure_cold"]

STARTS = 5
LEASES = 20
IDLE_S = 3.0


def measure_cold(options: Options) -> dict:
    """Figures in ms, and the share of its core that a worker uses while it waits."""
    check_quiet(options.progress)
    directory = tempfile.mkdtemp(prefix="rfaas-b-")
    settings = Settings.load(runtime_dir=directory, transport=options.transport)
    try:
        with environment.pinned(options.core) as cores:
            starts, zygotes = [], []
            for number in range(options.cycles(STARTS)):
                options.progress(f"service: start {number + 1} of {options.cycles(STARTS)}")
                started, first = _service_start(settings)
                starts.append(started)
                zygotes.append(first)
            with Session.open(settings, observer=True) as keeper:
                keeper.stay()
                try:
                    options.progress("leases from a warm service")
                    leases, executors, waiting = _leases(settings, options)
                finally:
                    keeper.down()
            figures = {
                "service_start_ms": measure.figure(starts, unit="ms", digits=2),
                "first_lease_to_first_result_ms": measure.figure(zygotes, unit="ms", digits=2),
                "lease_to_first_result_ms": measure.figure([sum(steps.values()) for steps in leases], unit="ms",
                                                           digits=3),
                **{f"step_{name}": measure.figure([steps[name] for steps in leases], unit="ms", digits=3)
                   for name in leases[0]},
                "executor_to_first_result_ms": measure.figure(executors, unit="ms", digits=3),
                "waiting_worker_percent": waiting,
            }
            return {**measure.flat(figures), "pinning": {"rank_core": cores.rank}}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3


def _service_start(settings: Settings) -> tuple[float, float]:
    """ms until a new service has welcomed us, and from its first lease to the first result; it is gone afterwards."""
    begin = time.perf_counter()
    with Session.open(settings) as session:
        started = _ms(begin)
        steps = lease_of(session, settings)
        session.down()
    return started, sum(steps.values())


def lease_of(session: Session, settings: Settings) -> dict[str, float]:
    """Takes a lease of a service, gets one result from its worker and gives the lease back; ms of each step."""
    from rfaas_mpi.fabric import OK, Invoker

    steps: dict[str, float] = {}
    kernel = kernels.native_copy()
    x, y = np.array([42.0]), np.zeros(1)
    invoker = Invoker(slots=settings.slots, slot_bytes=settings.slot_bytes, spin_us=settings.spin_us)
    try:
        begin = time.perf_counter()
        grant = session.request(1, 1)
        steps["grant_ms"] = _ms(begin)
        [lease] = grant.leases
        try:
            begin = time.perf_counter()
            number = lease.workers[0].number
            fd = session.dial(lease, number)
            steps["dial_ms"] = _ms(begin)
            begin = time.perf_counter()
            invoker.attach(fd, lease=lease.id, worker=number)
            steps["attach_ms"] = _ms(begin)
            begin = time.perf_counter()
            ref = invoker.kernel(kernel.kind, kernel.digest, kernel.blob)
            request = invoker.request(ref, [x], [y], kernel.meta([x], [y]))
            request.start()
            request.wait()
            steps["first_call_ms"] = _ms(begin)
            if request.outcome != OK or y[0] != 42.0:
                raise BenchError(f"the first invocation ended with outcome {request.outcome} and gave {y[0]}: "
                                 f"{bytes(request.detail).decode(errors='replace')}")
            request.close()
        finally:
            session.release(lease)
    finally:
        invoker.close()
    return steps


def _leases(settings: Settings, options: Options) -> tuple[list[dict[str, float]], list[float], dict]:
    with Session.open(settings) as session:
        lease_of(session, settings)  # starts the zygote, which then stays
        leases = [lease_of(session, settings) for _ in range(options.cycles(LEASES))]
    executors = []
    for _ in range(options.cycles(LEASES)):
        x, y = np.array([7.0]), np.zeros(1)
        begin = time.perf_counter()
        with Executor(workers=1, runtime_dir=settings.runtime_dir) as executor:
            executor.Invoke(kernels.native_copy(), x, y)
            executors.append(_ms(begin))
        if y[0] != 7.0:
            raise BenchError(f"the first invocation gave {y[0]}")
    return leases, executors, _waiting_worker(settings, options)


def _cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process, by the scheduler's own clock."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _waiting_worker(settings: Settings, options: Options) -> dict:
    """Share of its core that a worker uses between its last invocation and the next, long after it."""
    seconds = 0.5 if options.quick else IDLE_S
    with Executor(workers=1, runtime_dir=settings.runtime_dir) as executor:
        pid = executor.submit(os.getpid).result()
        time.sleep(2 * settings.spin_us * 1e-6 + 0.05)
        shares = []
        for _ in range(options.runs):
            options.progress(f"a worker that waits for {seconds:g} s")
            before, begin = _cpu_ns(pid), time.perf_counter_ns()
            time.sleep(seconds)
            shares.append(100 * (_cpu_ns(pid) - before) / (time.perf_counter_ns() - begin))
    return measure.figure(shares, unit="% of a core", digits=4)
