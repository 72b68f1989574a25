"""`rfaas bench control --of first`: from a lease that is asked for to its first result, by a real manager and agent.

    ask         rank ─▶ manager ─▶ disk ─▶ rank     the lease, and its grant
    open        rank ─▶ agent                       dialled, grant shown, both sides proved, joined, its begin asked for
    use         rank ◀─ agent                       the lease has begun: its worker is being forked
    dial        rank ─▶ agent ─▶ worker             control and data connection, each proved
    attach      rank ◀─▶ worker                     what it may use; the worker has been forked, and answers
    first_call  rank ◀─▶ worker                     kernel and binding sent, and the first result there

One round is one lease of one worker, over tcp, of an agent that has had none for a moment. Rounds
alternate with the same by the embedded service of this node (shared memory, no manager elsewhere), with
themselves, and with leases that are asked for as soon as the one before has ended.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rfaas_mpi import api
from rfaas_mpi.bench import environment, kernels, measure
from rfaas_mpi.bench.cluster import Cluster
from rfaas_mpi.bench.cold import lease_of
from rfaas_mpi.bench.namespaces import Place, other_node
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.client import here
from rfaas_mpi.config import Settings
from rfaas_mpi.executor import Executor
from rfaas_mpi.session import Session

__all__ = ["Place", "measure_first"]

ROUNDS = 40                      # of each run
COLD_ROUNDS = 20
REST_S = 0.05                    # after this a zygote has forked the next worker ahead
# In the environment of a rank: each value is another environment, with a zygote of its own.
_NEW = "BENCH_ENVIRONMENT"


# ---- one round -------------------------------------------------------------------------------------

class _Rank:
    """Asks for leases as an executor does, and notes what each step took."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._name = f"bench-{secrets.token_hex(8)}"
        self._ids = itertools.count(1)

    def lease(self) -> dict[str, float]:
        """A lease from the demand to the first result, and back; ms of each step."""
        from rfaas_mpi.fabric import Invoker

        cluster, settings = self._cluster, self._cluster.settings
        steps = Steps()
        session: Session | None = None
        invoker = Invoker(slots=settings.slots, slot_bytes=settings.slot_bytes, spin_us=settings.spin_us)
        try:
            with steps.taking("ask"):
                (lent,) = cluster.client.call("ask", api.AskLease(
                    session=self._name, request_id=next(self._ids), workers_min=1, workers_max=1,
                    timeout_s=settings.lease_timeout_s, place=here())).leases
            with steps.taking("open"):
                session = Session.open_lease(lent, settings, begin=True)
            with steps.taking("use"):
                lease = session.use()
            number = lease.workers[0].number
            with steps.taking("dial"):
                control, data = session.reach(lease, number, "tcp")
            with steps.taking("attach"):
                invoker.attach(control, lease=lease.id, worker=number, transport="tcp", data_fd=data,
                               timeout_s=settings.start_timeout_s)
            with steps.taking("first_call"):
                first_call(invoker)
        finally:
            invoker.close()
            if session is not None:
                session.close()
        cluster.rest()
        return steps.ms


@dataclass
class Steps:
    """What each step took, in ms."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def taking(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.ms[name] = (time.perf_counter() - begin) * 1e3


def first_call(invoker: Any) -> None:
    """One invocation with what it needs at the worker before. BenchError for a result that is wrong."""
    from rfaas_mpi.fabric import OK

    kernel = kernels.native_copy()
    x, y = np.array([42.0]), np.zeros(1)
    request = invoker.request(invoker.kernel(kernel.kind, kernel.digest, kernel.blob), [x], [y], kernel.meta([x], [y]))
    request.start()
    request.wait()
    if request.outcome != OK or y[0] != 42.0:
        raise BenchError(f"the first invocation ended with outcome {request.outcome} and gave {y[0]}: "
                         f"{bytes(request.detail).decode(errors='replace')}")
    request.close()


def _executor(settings: Settings) -> float:
    """ms from Executor() to the first result of Invoke."""
    x, y = np.array([7.0]), np.zeros(1)
    begin = time.perf_counter()
    with Executor(workers=1, fallback=False, manager=settings.manager, manager_user=settings.manager_user) as executor:
        executor.Invoke(kernels.native_copy(), x, y)
        took = (time.perf_counter() - begin) * 1e3
    if y[0] != 7.0:
        raise BenchError(f"the first invocation gave {y[0]}")
    return took


# ---- figures ---------------------------------------------------------------------------------------

def measure_first(options: Options) -> dict:
    """Figures in ms: `first_…` through manager and agent, `first_embedded` by the embedded service; A/A beside."""
    check_quiet(options.progress)
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    try:
        with (other_node(wanted=options.namespaces) as place, environment.pinned(options.core) as cores,
              contextlib.ExitStack() as stack):
            lent = max(core for core in cores.allowed if core != cores.rank)
            cluster = Cluster(directory, place, rank_core=cores.rank, lent=lent, allowed=cores.allowed)
            stack.callback(cluster.close)
            embedded = Settings.load(runtime_dir=str(directory / "embedded"), transport="shm", cores=(lent,),
                                     lend="yes")
            keeper = stack.enter_context(Session.open(embedded, observer=True))
            keeper.stay()
            stack.callback(keeper.down)
            near = stack.enter_context(Session.open(embedded))
            far, again, at_once, executors, cold = [], [], [], [], []
            beside: list[float] = []
            rank = _Rank(cluster)
            rank.lease()                 # starts the zygotes, which then stay
            lease_of(near, embedded)
            count = options.cycles(ROUNDS)
            for number in range(1, options.runs + 1):
                options.progress(f"lease to first result: run {number} of {options.runs}")
                for _ in range(count):
                    time.sleep(REST_S)
                    far.append(rank.lease())
                    at_once.append(sum(rank.lease().values()))
                    beside.append(sum(lease_of(near, embedded).values()))
                    time.sleep(REST_S)
                    again.append(rank.lease())
                    time.sleep(REST_S)
                    executors.append(_executor(cluster.settings))
                    cluster.rest()
            options.progress("first leases of an environment")
            for number in range(options.cycles(COLD_ROUNDS)):
                with _environment(str(number)):
                    cold.append(sum(rank.lease().values()))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    total = _figure([sum(steps.values()) for steps in far])
    figures = {
        "first_ms": {**total, "aa": _figure([sum(steps.values()) for steps in again])},
        **{f"first_{name}_ms": _figure([steps[name] for steps in far]) for name in far[0]},
        "first_at_once_ms": _figure(at_once),
        "first_executor_ms": _figure(executors),
        "first_cold_zygote_ms": _figure(cold),
        "first_embedded_ms": _figure(beside),
    }
    return {**measure.flat(figures), "first_timeline_ms": _timeline(far),
            "first_pinning": {"rank_core": cores.rank, "lent_core": lent}, "first_over": "namespaces" if options.namespaces else place.host}


def _figure(values: Sequence[float]) -> dict:
    return measure.figure(values, unit="ms", digits=3)


def _timeline(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """When each step had ended, counted from the demand, in the median."""
    ends = [dict(zip(steps, itertools.accumulate(steps.values()), strict=True)) for steps in rounds]
    return {name: round(statistics.median(each[name] for each in ends), 3) for name in ends[0]}


@contextlib.contextmanager
def _environment(value: str) -> Iterator[None]:
    """This process' environment is one that no zygote knows."""
    os.environ[_NEW] = value
    try:
        yield
    finally:
        del os.environ[_NEW]
