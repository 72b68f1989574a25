"""All styles of the API from eight threads while workers are killed at random: none lost, nothing leaked."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from pathlib import Path

import faults
import pytest
from test_soak import Caller, anonymous_bytes

from rfaas_mpi import Executor

INVOCATIONS = int(os.environ.get("RFAAS_SOAK_FAULTS", "20000"))
THREADS = 8
OVER = 1 << 60                       # more batches than any thread makes: it has ended
# What an allocator keeps, and the records of workers that ended, may grow; a
# megabyte for each of a few dozen lost workers or a slot's payload for each
# invocation may not.
ALLOWED_BYTES = 32 << 20


class Soak:
    """Eight threads that call, and one that kills."""

    def __init__(self, executor: Executor, invocations: int, seed: int) -> None:
        self._executor = executor
        self._each = invocations // THREADS
        self._batches = [0] * THREADS
        self._chance = random.Random(seed)
        self._changed = threading.Condition()
        self._working = THREADS
        self._errors: list[BaseException] = []
        self.done = 0
        self.kills = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._call, args=(number,)) for number in range(THREADS)]
        threads.append(threading.Thread(target=self._kill))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _call(self, number: int) -> None:
        done = 0
        try:
            caller = Caller(self._executor, number)
            try:
                while done < self._each:
                    for count in caller.turn():
                        done += count
                        with self._changed:
                            self._batches[number] += 1
                            self._changed.notify_all()
                        if self._errors:
                            return
            finally:
                caller.close()
        except BaseException as error:
            self._errors.append(error)
        finally:
            with self._changed:
                self.done += done
                self._working -= 1
                self._batches[number] = OVER
                self._changed.notify_all()

    def _kill(self) -> None:
        """Never twice within one batch: two such kills of one invocation would rightly be the kernel's own."""
        while True:
            with self._changed:
                begun = list(self._batches)
                total = sum(batch for batch in begun if batch < OVER) + self._chance.randrange(THREADS)
                self._changed.wait_for(lambda begun=begun, total=total: (
                    all(now > then or now == OVER for now, then in zip(self._batches, begun, strict=True))
                    and (sum(self._batches) >= total)))
                if not self._working:
                    return
            pids = list(faults.worker_pids(self._executor).values())
            if pids:
                try:
                    os.kill(self._chance.choice(pids), signal.SIGKILL)
                    self.kills += 1
                except ProcessLookupError:
                    continue


def measure(executor: Executor, wait_until) -> dict[str, int]:
    """What may leak in the rank and in the service, once both have come to rest."""
    service = faults.service_pid(executor)
    wait_until(lambda: len(executor.workers) == 2, "both workers are there")

    def counts() -> dict[str, int]:
        return {f"{who} {what}": len(os.listdir(f"/proc/{pid}/{where}"))
                for who, pid in (("rank", os.getpid()), ("service", service))
                for what, where in (("descriptors", "fd"), ("threads", "task"))}
    list(executor.map(faults.plus_one, range(100)))
    gc.collect()
    # Whoever took the last replies may not yet have said so.
    wait_until(lambda: not executor.stats()["in_flight"], "nothing is in flight")
    stats = executor.stats()
    assert stats["queued"] == stats["orphans"] == 0, stats
    maps = Path("/proc/self/maps").read_text().count("/memfd:rfaas-")
    return {**counts(), "rank maps": maps, "rank bytes": anonymous_bytes(os.getpid()),
            "service bytes": anonymous_bytes(service), "arena bytes": stats["arena_bytes"],
            "bindings": stats["bindings"], "kernels": stats["kernels"]}


@pytest.mark.timeout(3600 if INVOCATIONS > 100_000 else 300)
def test_killed_workers_cost_no_result_and_leave_nothing(wait_until):
    with Executor(workers=2, cores=(0, 1)) as executor:
        # One turn of each thread makes what is made once.
        Soak(executor, THREADS, 1).run()
        before = measure(executor, wait_until)
        soak = Soak(executor, INVOCATIONS, 2)
        soak.run()
        after = measure(executor, wait_until)
    assert soak.done >= INVOCATIONS
    assert soak.kills >= INVOCATIONS // 10_000
    print(f"{soak.done} invocations, {soak.kills} workers killed")
    grown = {what: after[what] - before[what] for what in before}
    assert {what: n for what, n in grown.items() if n > (ALLOWED_BYTES if what.endswith("bytes") else 0)} == {}
