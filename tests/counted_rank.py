"""A rank whose every invocation is counted, and workers that write down what they run: cluster_faults.py judges.

    NAME.journal   a rank's: `sub KEY`, then once `end KEY result|error|cancelled …`; `none …` where it got no workers
    ran-PID        a worker's: `b KEY AGENT CORES NS` as a call begins, `e KEY NS` as it ends

Each line is one write to a file that only grows, so that it is there whoever is killed next.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
import time
import warnings
from concurrent.futures import CancelledError
from pathlib import Path

import faults
import numpy as np

from rfaas_mpi import Executor, config, kernel
from rfaas_mpi.errors import RFaaSError

BATCH = 12
GUARD_S = 240.0
WORK_NS = 2_000_000                  # of one call: long enough for others to come in between
UNTOUCHED = -1.0


def append(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)


# --- what workers run -----------------------------------------------------------------------------

def counted(directory: str, key: str, value: int) -> int:
    """The value's right answer; writes down where and when it was found."""
    path = Path(directory, f"ran-{os.getpid()}")
    # A worker's parent is its zygote, and that one's is the agent.
    agent = faults.parent_of(os.getppid()) if config.inside_worker() else 0
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    begun = time.monotonic_ns()
    append(path, f"b {key} {agent} {cores} {begun}")
    while time.monotonic_ns() < begun + WORK_NS:
        pass
    append(path, f"e {key} {time.monotonic_ns()}")
    return answer(value)


def answer(value: int) -> int:
    return 3 * value + 1


@kernel
def counted_array(words, x, out):
    """The same for buffers."""
    directory, key, value = words.tobytes().decode().split("\n")
    counted(directory, key, int(value))
    np.multiply(x, 3, out=out)
    out += 1


# --- the rank ------------------------------------------------------------------------------------------

class Counted:
    """A rank that takes workers, calls them, gives them back, and again, until a line comes on its stdin."""

    def __init__(self, directory: Path, name: str, seed: int) -> None:
        self.directory, self.name = directory, name
        self.chance = random.Random(seed)
        self.journal = directory / f"{name}.journal"
        self.calls = 0
        self.told = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        sys.stdin.readline()
        self.told.set()

    def say(self, text: str) -> None:
        append(self.journal, text.replace("\n", " "))

    def run(self) -> None:
        while not self.told.is_set():
            # Some leases come to their end while they are used.
            duration = self.chance.choice((None, None, None, 0.3, 1.0))
            try:
                ex = Executor((1, self.chance.randint(1, 4)), lease_timeout_s=1.0, lease_duration_s=duration,
                              transport=self.chance.choice(("auto", "tcp")))
            except RFaaSError as error:
                self.say(f"none {type(error).__name__} {error}")
                self.told.wait(0.05)
                continue
            with ex:
                for _ in range(self.chance.randint(1, 6)):
                    self.chance.choice((self.objects, self.objects, self.buffers, self.taken_back))(ex)
                    if self.chance.random() < 0.05:
                        # PyDLL keeps the GIL: no other thread of this rank runs meanwhile.
                        ctypes.PyDLL(None).usleep(300_000)
                    if self.told.is_set():
                        break
        self.say("over")

    def _key(self) -> tuple[str, int]:
        self.calls += 1
        key = f"{self.name}.{self.calls}"
        self.say(f"sub {key}")
        return key, self.calls

    def objects(self, ex: Executor) -> None:
        """Futures: each is done once, with its answer."""
        told: list[str] = []
        futures = {}
        for _ in range(BATCH):
            key, value = self._key()
            futures[key] = ex.submit(counted, str(self.directory), key, value), value
            futures[key][0].add_done_callback(lambda _, key=key: told.append(key))
        for key, (future, value) in futures.items():
            error = future.exception(timeout=GUARD_S)
            if error is None:
                assert future.result() == answer(value), f"{key}: {future.result()}"
            self.ended(key, error)
        deadline = time.monotonic() + GUARD_S
        while len(told) < len(futures):
            assert time.monotonic() < deadline, "a callback is missing"
            time.sleep(0.001)
        assert sorted(told) == sorted(futures), "each callback is called once"

    def buffers(self, ex: Executor) -> None:
        """Requests: once one has ended nothing is written to its memory any more."""
        x, y = ex.empty((BATCH, 8)), ex.empty((BATCH, 8))
        requests = []
        for row in range(BATCH):
            key, value = self._key()
            x[row] = value
            words = faults.text(f"{self.directory}\n{key}\n{value}")
            requests.append((key, value, ex.Iinvoke(counted_array, (words, x[row]), y[row])))
        for row, (key, value, request) in enumerate(requests):
            error = None
            try:
                assert request.Wait(GUARD_S), f"{key} does not end"
            except RFaaSError as failed:
                error = failed
            assert error is not None or (y[row] == answer(value)).all(), f"{key}: {y[row]}"
            self.ended(key, error)
            y[row] = UNTOUCHED
        self.objects(ex)
        assert (y == UNTOUCHED).all(), "an output was written to after its invocation had ended"

    def taken_back(self, ex: Executor) -> None:
        """Some are cancelled, by force if need be."""
        futures = {}
        for _ in range(BATCH // 2):
            key, value = self._key()
            futures[key] = ex.submit(counted, str(self.directory), key, value), value
        for key, (future, value) in futures.items():
            if self.chance.random() < 0.3:
                future.cancel(force=self.chance.random() < 0.5)
        for key, (future, value) in futures.items():
            try:
                error = future.exception(timeout=GUARD_S)
            except CancelledError:
                self.say(f"end {key} cancelled")
                continue
            assert error is not None or future.result() == answer(value), key
            self.ended(key, error)

    def ended(self, key: str, error: BaseException | None) -> None:
        if error is None:
            self.say(f"end {key} result")
        elif isinstance(error, RFaaSError):
            self.say(f"end {key} error {type(error).__name__} {error}")
        else:
            raise error


def main(directory: str, name: str, seed: str) -> None:
    # Where all workers are lost, the rank does their work, and says so once.
    warnings.filterwarnings("ignore", "kernels run on the rank", RuntimeWarning)
    Counted(Path(directory), name, int(seed)).run()
