"""What an owner loses to a worker that spins on the owner's own core, in another session and another cgroup.

    python tests/priority_cost.py [--rounds N] [--service]

Prints one JSON object: the owner's fixed work, as a multiple of the same work alone, in each way of having low
priority, alternating. With --service the worker is a real one: a service lends the core, and a native kernel spins
there. Needs root; the owner and the worker share the last CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from rfaas_mpi.agent.priority import lower_session, make_group  # noqa: E402

CPU = max(os.sched_getaffinity(0))
WORK = 1_500_000


def work() -> float:
    begin = time.perf_counter()
    value = 0
    for number in range(WORK):
        value ^= number * 3
    return time.perf_counter() - begin


def start(body) -> int:
    """A process in a session of its own, on the CPU; it has begun when this returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.sched_setaffinity(0, {CPU})
            body(lambda: os.write(writing, b"x"))
        finally:
            os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def spin(begun) -> None:
    begun()
    while True:
        pass


def owner_s(cgroup: Path | None) -> float:
    """The owner's work, in a session and, if named, a cgroup of its own."""
    reading, writing = os.pipe()

    def body(begun) -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")
        begun()
        os.write(writing, repr(work()).encode())

    pid = start(body)
    os.waitpid(pid, 0)
    took = float(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return took


def measure(rounds: int) -> dict:
    name = f"rfaas-priority-{os.getpid()}"
    low = make_group(f"{name}-low")
    assert low is not None, "no group can be made here; be root"
    top = low.directory.parent
    plain, nested_in, theirs = (top / f"{name}-{part}" for part in ("plain", "parent", "owner"))
    for directory in (plain, nested_in, theirs):
        directory.mkdir()
    if (top / "cgroup.subtree_control").exists():
        (nested_in / "cgroup.subtree_control").write_text("+cpu")
    nested = make_group("low", parent=nested_in)
    assert nested is not None

    def idle_thread(group: Path | None):
        def body(begun) -> None:
            if group is not None:
                (group / "cgroup.procs").write_text("0")
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            spin(begun)
        return body

    def entering(group):
        return lambda begun: (group.enter(), spin(begun))

    def session(begun) -> None:
        assert lower_session()
        spin(begun)

    # worker's way → (what the worker does, the owner's cgroup)
    ways = {
        "alone": (None, theirs),
        "SCHED_IDLE thread, another session": (idle_thread(None), None),
        "SCHED_IDLE thread, another cgroup": (idle_thread(plain), theirs),
        f"group with {low.means}": (entering(low), theirs),
        f"group with {low.means}, owner in no cgroup": (entering(low), None),
        f"group with {low.means} below an ordinary one": (entering(nested), theirs),
        "autogroup 19, owner in no cgroup": (session, None),
        "autogroup 19, owner in a cgroup": (session, theirs),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for _ in range(rounds):
            for way, (body, cgroup) in ways.items():
                pid = start(body) if body is not None else 0
                try:
                    times[way].append(owner_s(cgroup))
                finally:
                    if pid:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
    finally:
        nested.close()
        low.close()
        for directory in (plain, nested_in, theirs):
            directory.rmdir()
    alone = statistics.median(times["alone"])
    return {"bench": "priority", "command": ["python", *sys.argv], "kernel": platform.release(), "rounds": rounds,
            "alone_ms": round(1000 * alone, 2), "stat": "median over rounds; least over rounds",
            "slowdown": {way: round(statistics.median(took) / alone, 3) for way, took in times.items()},
            "slowdown_least": {way: round(min(took) / min(times["alone"]), 3) for way, took in times.items()}}


def measure_service(rounds: int) -> dict:
    """The same beside workers of a service, with and without low priority, beside a bare process, and alone twice."""
    from rfaas_mpi.config import Settings
    from rfaas_mpi.fabric import Invoker
    from rfaas_mpi.kernels import Kernel
    from rfaas_mpi.session import Session

    bare = make_group(f"rfaas-priority-{os.getpid()}-bare")
    assert bare is not None, "no group can be made here; be root"
    owner = bare.directory.parent / f"rfaas-priority-{os.getpid()}-owner"
    owner.mkdir()
    library = Path(sys.modules["rfaas_mpi"].__file__).parent / "_native_kernels.so"
    code = Kernel.from_library(str(library), "rfm_bad_loop")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    times: dict[str, list[float]] = {}

    def take(way: str, number: int) -> None:
        # Now this first, now that: a service that has just forked a worker forks the next one, too.
        for part, cgroup in sorted({"a cgroup": owner, "no cgroup": None}.items(), reverse=number % 2 == 1):
            times.setdefault(f"{way}, owner in {part}", []).append(owner_s(cgroup))

    def beside(body, way: str, number: int) -> None:
        pid = start(body)
        try:
            take(way, number)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def lowest(begun) -> None:
        assert lower_session()
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        spin(begun)

    def runs(session: Session) -> bool:
        return any(worker["running"] for worker in session.status()["workers"])

    def serve(low: str, number: int) -> str:
        chosen = Settings.load(runtime_dir=str(directory / low), cores=(CPU,), low_priority=low, linger_s=60.0)
        kind = "low" if low == "yes" else "ordinary"
        with Session.open(chosen) as session:
            means = session.status()["low_priority"]
            [lease] = session.request(1, 1).leases
            invoker = Invoker()
            worker = lease.workers[0].number
            invoker.attach(session.dial(lease, worker), lease=lease.id, worker=worker)
            x, y = np.zeros(1), np.zeros(1)
            request = invoker.request(invoker.kernel(code.kind, code.digest, code.blob), [x], [y],
                                      code.meta([x], [y]))
            take(f"a worker of {kind} priority without a call", number)
            request.start()
            while not runs(session):
                time.sleep(0.001)
            take(f"a worker of {kind} priority", number)
            session.reclaim()
            request.wait()
            request.close()
            invoker.close()
            if number == rounds - 1:
                session.down()
        return means

    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    means = ""
    try:
        for number in range(rounds):
            ways = {
                "alone": lambda: take("alone", number),
                "alone again": lambda: take("alone again", number),
                "low": lambda: beside(lambda begun: (bare.enter(), spin(begun)),
                                      f"a bare process in a group with {bare.means}", number),
                "autogroup": lambda: beside(lowest, "a bare process, autogroup 19 and SCHED_IDLE", number),
                "yes": lambda: serve("yes", number),
                "no": lambda: serve("no", number),
            }
            # None is always behind the same other one.
            for way in random.Random(number).sample(sorted(ways), len(ways)):
                means = ways[way]() or means
    finally:
        owner.rmdir()
        bare.close()
        shutil.rmtree(directory, ignore_errors=True)
    parts = ("a cgroup", "no cgroup")
    alone = {part: times[f"alone, owner in {part}"] for part in parts}

    def ratios(way: str) -> list[float]:
        return sorted(took / reference for took, reference in
                      zip(times[way], alone[way.rpartition("owner in ")[2]], strict=True))

    return {"bench": "owner beside a service's worker", "command": ["python", *sys.argv], "rounds": rounds,
            "kernel": platform.release(), "means": means, "stat": "of the rounds' ratios to alone: their median, "
            "and in slowdown_quartiles the middle half of them",
            "alone_ms": {part: round(1000 * statistics.median(alone[part]), 2) for part in parts},
            "slowdown": {way: round(statistics.median(ratios(way)), 3) for way in sorted(times)},
            "slowdown_quartiles": {way: [round(value, 3) for value in statistics.quantiles(ratios(way), n=4)[::2]]
                                   for way in sorted(times)},
            "ms": {way: [round(1000 * took, 2) for took in times[way]] for way in sorted(times)}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--service", action="store_true")
    given = parser.parse_args()
    print(json.dumps((measure_service if given.service else measure)(given.rounds), indent=2))
