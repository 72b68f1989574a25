"""What frees a core first: to kill the process on it, to move it and kill it, or the other way round.

    python tests/reclaim_order.py [--rounds N]

Prints one JSON object: µs until no thread of a bare process may run on its core any more, and until it has ended, in
each order, alternating. Needs root and two cores: the process has the last one, this script the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy  # noqa: E402, F401  (as a zygote has)

from rfaas_mpi.agent.priority import NO_PRIORITY, Lowering, LowPriority  # noqa: E402
from rfaas_mpi.agent.reclaim import Clearing  # noqa: E402

OWN, LENT = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
HELD = 1 << 30
ORDERS = ("killed", "killed, moved", "moved, killed")


def spins(begun: Callable[[], None]) -> None:
    begun()
    while True:
        pass


def stops(begun: Callable[[], None]) -> None:
    begun()
    os.kill(os.getpid(), signal.SIGSTOP)


def threads(begun: Callable[[], None]) -> None:
    together = threading.Barrier(64)

    def spin() -> None:
        together.wait()
        hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)

    for _ in range(63):
        threading.Thread(target=spin, daemon=True).start()
    begun()
    spin()


def holds(begun: Callable[[], None]) -> None:
    held = mmap.mmap(-1, HELD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    begun()
    while held:
        pass


def calls(begun: Callable[[], None]) -> None:
    """In a system call of some 100 ms, again and again."""
    begun()
    while True:
        mmap.mmap(-1, HELD // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def start(body: Callable[[Callable[[], None]], None], low: LowPriority) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            low.take()
            os.sched_setaffinity(0, {LENT})
            body(lambda: os.write(writing, b"x") and None)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    time.sleep(0.005)
    return pid


def once(body: Callable[[Callable[[], None]], None], order: str, low: LowPriority) -> tuple[float, float]:
    pid = start(body, low)
    pidfd = os.pidfd_open(pid)
    leaving = Clearing(pid, {LENT}, {OWN}, parent=os.getpid())
    begin = time.monotonic_ns()
    free = 0
    if order == "moved, killed":
        leaving.cleared()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if order != "killed":
        assert leaving.cleared()
        free = time.monotonic_ns()
    select.select([pidfd], [], [])
    gone = time.monotonic_ns()
    os.waitpid(pid, 0)
    os.close(pidfd)
    leaving.close()
    return ((free or gone) - begin) / 1e3, (gone - begin) / 1e3


def measure(rounds: int) -> dict:
    os.sched_setaffinity(0, {OWN})
    lowering = Lowering()
    means = str(lowering.priority.means)
    found = {}
    try:
        for name, body, share in (("spins", spins, 1), ("is stopped", stops, 1), ("64 threads spin", threads, 2),
                                  ("is in a system call", calls, 4), ("holds 1 GiB", holds, 6)):
            for priority, low in (("ordinary", NO_PRIORITY), ("low", lowering.priority)):
                taken: dict[str, list[tuple[float, float]]] = {order: [] for order in ORDERS}
                for _ in range(max(5, rounds // share)):
                    for order in ORDERS:
                        taken[order].append(once(body, order, low))
                found[f"{name}, {priority} priority"] = {
                    order: {"free_p50": round(statistics.median(free for free, _ in each)),
                            "free_max": round(max(free for free, _ in each)),
                            "gone_p50": round(statistics.median(gone for _, gone in each)), "count": len(each)}
                    for order, each in taken.items()}
    finally:
        lowering.close()
    return {"bench": "order of reclaim", "command": ["python", *sys.argv], "kernel": platform.release(),
            "low_priority": means, "unit": "us", "order": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))
