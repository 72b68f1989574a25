"""What a worker's start costs with and without sandbox, control group and another user's identity.

    python tests/sandbox_cost.py [--rounds N]

Prints one JSON object. The ways alternate within each round. `spare`: a fork was waiting, as for a lease's first
worker; `fork`: the worker is forked when it is ordered. Each time is from the order to the moment at which ranks are
let in: it serves, and is in its group. Needs root and the memory controller; nothing else should run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import socket
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["RFAAS_CONFIG"] = os.devnull

from site_of_users import ALICE, UID_MIN, environment, interpreter  # noqa: E402

from rfaas_mpi import messages as msg  # noqa: E402
from rfaas_mpi.agent.memory import MemoryGuard  # noqa: E402
from rfaas_mpi.agent.pool import WorkerHandle, ZygoteHandle, ZygoteKind  # noqa: E402
from rfaas_mpi.agent.spawner import Spawner  # noqa: E402

CORE = max(os.sched_getaffinity(0))
SPARE_S = 0.06                       # a zygote has made its next fork by then
MEMORY = 256 << 20


class Way:
    """A zygote of its own, and whether its workers get a group."""

    def __init__(self, sandbox: str, guard: MemoryGuard | None, spawner: Spawner | None = None) -> None:
        import subprocess
        found = subprocess.run([interpreter(), "-c", "import sys; print('\\n'.join(sys.path[1:]))"], check=True,
                               env=environment(), capture_output=True, text=True, cwd="/").stdout.split("\n")
        path = [entry for entry in found if entry]
        variables = environment(RFAAS_SANDBOX=sandbox)
        kind = ZygoteKind.of(msg.Join(
            id=1, pid=os.getpid(), executable=os.fsencode(interpreter()), flags=(),
            path=tuple(map(os.fsencode, path)), directory=b"/", environment=tuple(
                (os.fsencode(name), os.fsencode(value)) for name, value in variables.items()), affinity=(0,)),
            uid=ALICE if spawner is not None else None)
        self.guard = guard
        self.fds: list[int] = []
        self.zygote = ZygoteHandle(kind, time.monotonic(), spawner, tell_spares=guard is not None and guard.moves)
        said = self._hear()
        assert isinstance(said, msg.ZygoteReady), said
        assert said.sandbox["policy"] == sandbox
        self.zygote.became_ready()
        self.next = 1
        self.times: dict[str, list[float]] = {"spare": [], "fork": []}

    def _hear(self) -> object:
        assert select.select([self.zygote.channel], [], [], 60)[0], "the zygote says nothing"
        data, self.fds, _, _ = socket.recv_fds(self.zygote.channel, 1 << 16, 1)
        assert data, self.zygote.read_errors().decode()
        said = msg.unpack_from_zygote(data)
        if isinstance(said, msg.SpareForked):
            assert self.guard is not None
            self.guard.prepare(self.zygote, self.fds[0])
            os.close(self.fds[0])
            return self._hear()
        return said

    def idle(self) -> None:
        """Until its next fork waits, in its group."""
        time.sleep(SPARE_S)
        while select.select([self.zygote.channel], [], [], 0)[0]:
            data, self.fds, _, _ = socket.recv_fds(self.zygote.channel, 1 << 16, 1)
            assert self.guard is not None and isinstance(msg.unpack_from_zygote(data), msg.SpareForked)
            self.guard.prepare(self.zygote, self.fds[0])
            os.close(self.fds[0])
            # A move right after another one is cheap, and this was one.
            time.sleep(SPARE_S)

    def start(self, kind: str) -> None:
        begin, number = time.perf_counter(), self.take()
        entrances = self.guard.expect(self.zygote, number, MEMORY) if self.guard is not None else []
        handle = WorkerHandle.fork(self.zygote, number, 1, (CORE,), MEMORY, time.monotonic(), entrances)
        for fd in entrances:
            os.close(fd)
        said = self._hear()
        assert isinstance(said, msg.WorkerForked) and said.worker == number, said
        handle.forked(self.fds[0], said.pid)
        if self.guard is not None:
            self.guard.begin(handle)
        assert select.select([handle.agent], [], [], 60)[0]
        if self.guard is not None:
            self.guard.check(handle)
        handle.admit()
        took = time.perf_counter() - begin
        [frame] = handle.frames.feed(handle.agent.recv(1 << 16))
        assert frame.type == msg.FRAME_READY
        self.times[kind].append(took)
        self.running.append(handle)

    def take(self) -> int:
        global numbers
        numbers += 1
        return numbers

    def round(self) -> None:
        self.running: list[WorkerHandle] = []
        self.idle()
        self.start("spare")
        self.start("fork")
        for handle in self.running:
            handle.kill()
        for handle in self.running:
            assert isinstance(self._hear(), msg.WorkerExited)
            if self.guard is not None:
                self.guard.end(handle.number)
            handle.close()


numbers = 0


def measure(rounds: int) -> dict:
    with contextlib.ExitStack() as stack:
        spawner = stack.enter_context(contextlib.closing(Spawner.start(UID_MIN)))
        guard = stack.enter_context(contextlib.closing(MemoryGuard("cgroup")))
        users = stack.enter_context(contextlib.closing(MemoryGuard("cgroup", spawner)))
        ways = {"bare": Way("off", None), "sandbox": Way("default", None), "sandbox and group": Way("default", guard),
                "strict and group": Way("strict", guard),
                "another user, sandbox and group": Way("default", users, spawner)}
        for way in ways.values():
            stack.callback(way.zygote.close)
        for number in range(rounds + 3):
            for way in ways.values():
                way.round()
                if number < 3:
                    way.times = {"spare": [], "fork": []}
    figures = {}
    for kind in ("spare", "fork"):
        base = ways["bare"].times[kind]
        for name, way in ways.items():
            took = sorted(way.times[kind])
            added = [mine - bare for mine, bare in zip(way.times[kind], base, strict=True)]
            figures[f"{kind}: {name}"] = {
                "ms": round(1e3 * statistics.median(took), 3), "p99_ms": round(1e3 * took[int(0.99 * len(took))], 3),
                "added_ms": round(1e3 * statistics.median(added), 3)}
    return {"bench": "sandbox", "command": ["python", *sys.argv], "kernel": platform.release(), "rounds": rounds,
            "stat": "median; of the differences to `bare` in the same round", "figures": figures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    print(json.dumps(measure(parser.parse_args().rounds), indent=2))
