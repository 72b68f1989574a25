"""A million invocations in all styles of the API from eight threads: none lost, nothing leaked."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import pytest

import rfaas_mpi as rf

INVOCATIONS = int(os.environ.get("RFAAS_SOAK_INVOCATIONS", "1000000"))
THREADS = 8
BATCH = 64
# Growth that would be seen as a leak: 32 bytes for each of a million invocations.
ALLOWED_BYTES = 32 << 20

SCALE = rf.Kernel.from_library(Path(rf.__file__).with_name("_native_kernels.so"), "rfm_scale2")


@rf.kernel
def plus_one(x, out):
    np.add(x, 1.0, out=out)


def square(n: int) -> int:
    return n * n


class Caller:
    """One thread's arrays and requests; each method runs BATCH invocations and checks every result."""

    def __init__(self, ex: rf.Executor, number: int) -> None:
        self.ex = ex
        self.random = np.random.default_rng(number)
        # A cache line each, in the executor's memory and outside of it.
        self.x, self.y = ex.empty((BATCH, 8)), ex.empty((BATCH, 8))
        self.plain_x, self.plain_y = np.empty((BATCH, 8)), np.empty((BATCH, 8))
        self.large_x, self.large_y = np.empty(40_000), np.empty(40_000)
        self.persistent = [ex.Invoke_init(SCALE, x, y) for x, y in zip(self.x, self.y)]

    def close(self) -> None:
        for request in self.persistent:
            request.Free()

    def fill(self, x: np.ndarray, y: np.ndarray) -> None:
        x[...] = self.random.random(x.shape)
        y.fill(np.nan)

    def persistent_all(self) -> None:
        self.fill(self.x, self.y)
        rf.Startall(self.persistent)
        rf.Waitall(self.persistent)
        assert np.array_equal(self.y, 2 * self.x)

    def persistent_one_by_one(self) -> None:
        self.fill(self.x, self.y)
        for request in self.persistent:
            request.Start()
            request.Wait()
        assert np.array_equal(self.y, 2 * self.x)

    def requests_any(self) -> None:
        self.fill(self.x, self.y)
        requests = [self.ex.Iinvoke(SCALE, x, y) for x, y in zip(self.x, self.y)]
        ended = {rf.Waitany(requests) for _ in requests}
        assert ended == set(range(BATCH))
        assert np.array_equal(self.y, 2 * self.x)

    def requests_some(self) -> None:
        self.fill(self.plain_x, self.plain_y)
        requests = [self.ex.Iinvoke(plus_one, x, y) for x, y in zip(self.plain_x, self.plain_y)]
        ended: list[int] = []
        while len(ended) < BATCH:
            ended += rf.Waitsome(requests) or []
        assert sorted(ended) == list(range(BATCH))
        assert np.array_equal(self.plain_y, self.plain_x + 1.0)

    def python_invoke(self) -> None:
        self.fill(self.plain_x, self.plain_y)
        for x, y in zip(self.plain_x, self.plain_y):
            self.ex.Invoke(plus_one, x, y)
        assert np.array_equal(self.plain_y, self.plain_x + 1.0)

    def larger_than_a_slot(self) -> None:
        for _ in range(BATCH):
            self.fill(self.large_x[:16], self.large_y)
            self.ex.Invoke(SCALE, self.large_x, self.large_y)
            assert np.array_equal(self.large_y[:16], 2 * self.large_x[:16])

    def futures(self) -> None:
        numbers = self.random.integers(0, 1 << 20, BATCH).tolist()
        futures = {self.ex.submit(square, n): n for n in numbers}
        assert all(future.result() == futures[future] ** 2 for future in as_completed(futures))

    def mapped(self) -> None:
        numbers = self.random.integers(0, 1 << 20, BATCH).tolist()
        assert list(self.ex.map(square, numbers)) == [n * n for n in numbers]

    # How many batches of each belong to one turn.
    TURN = ((persistent_all, 40), (persistent_one_by_one, 4), (requests_any, 2), (requests_some, 1),
            (python_invoke, 2), (larger_than_a_slot, 1), (futures, 1), (mapped, 1))

    def turn(self) -> Iterator[int]:
        for method, batches in self.TURN:
            for _ in range(batches):
                method(self)
                yield BATCH


def soak(ex: rf.Executor, invocations: int, wait_until: Callable[..., object]) -> int:
    """Runs at least so many invocations in THREADS threads; how many were checked."""
    counts, errors = [0] * THREADS, []

    def work(number: int) -> None:
        try:
            caller = Caller(ex, number)
            try:
                while counts[number] < invocations // THREADS and not errors:
                    for done in caller.turn():
                        counts[number] += done
            finally:
                caller.close()
        except BaseException as error:  # raised again below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # join() returns a moment before the kernel has let go of the thread.
    for thread in threads:
        wait_until(lambda task=Path(f"/proc/self/task/{thread.native_id}"): not task.exists(),
                   f"{thread.name} is gone")
    if errors:
        raise errors[0]
    return sum(counts)


def anonymous_bytes(pid: int) -> int:
    """Private memory of a process: what leaks."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no RssAnon of {pid}")


def descriptors(pid: int) -> int:
    """Open descriptors but arenas, of which there are as many as were once in use together."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += "rfaas-arena" not in os.readlink(link)
        except FileNotFoundError:
            continue  # the listing's own
    return count


def measure(ex: rf.Executor) -> dict[str, int]:
    gc.collect()
    rank, worker = os.getpid(), ex.submit(os.getpid).result()
    assert worker != rank
    stats = ex.stats()
    assert stats["queued"] == stats["in_flight"] == stats["orphans"] == 0
    return {"rank bytes": anonymous_bytes(rank), "worker bytes": anonymous_bytes(worker),
            "arena bytes": stats["arena_bytes"],
            "rank descriptors": descriptors(rank), "worker descriptors": descriptors(worker),
            "rank threads": len(os.listdir("/proc/self/task")),
            "worker threads": len(os.listdir(f"/proc/{worker}/task")),
            "bindings": stats["bindings"], "kernels": stats["kernels"]}


def start_notifier(ex: rf.Executor, fifo: Path) -> None:
    """Adds a callback to a call that isn't over: the first one starts the rank's thread for them.

    The soak may never need it: `as_completed` adds callbacks only to what is still running.
    """
    os.mkfifo(fifo)
    future, called = ex.submit(fifo.read_text), threading.Event()
    future.add_done_callback(lambda _: called.set())
    fifo.write_text("go on")
    assert future.result() == "go on"
    assert called.wait(60)


@pytest.mark.timeout(600)
def test_a_million_invocations_lose_no_result_and_leak_nothing(wait_until, tmp_path):
    with rf.Executor(workers=1) as ex:
        start_notifier(ex, tmp_path / "fifo")
        # What is made once (bindings, arenas, caches of allocators) is there after this.
        soak(ex, INVOCATIONS // 10, wait_until)
        before = measure(ex)
        assert soak(ex, INVOCATIONS, wait_until) >= INVOCATIONS
        after = measure(ex)
    grown = {what: after[what] - before[what] for what in before}
    assert {what: n for what, n in grown.items()
            if n > (ALLOWED_BYTES if what.endswith("bytes") else 0)} == {}
