"""The manager's figures: a real `rfaas manager` on one core, and on the other a cluster that is only played.

    core a   `rfaas manager`, its ledger, its Unix socket
    core b   this process: agents on web sockets of their own that report as agents do,
             and ranks that ask for leases, so many in a second, whether or not the last
             answer has come

An agent that is played reports when it must (a heartbeat, 20 ms after something has
changed), begins each lease that was granted on its node, and ends it a while later.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from rfaas_mpi import api, config
from rfaas_mpi.agent.link import COALESCE_S, heartbeat_s
from rfaas_mpi.bench import control
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.leases import LiveLease
from rfaas_mpi.leases.grants import AgentKey
from rfaas_mpi.manager.ledger import Ledger

__all__ = ["AGENTS", "RATES", "end", "measure_http", "measure_restart"]

AGENTS = 1000
CORES = 64
RATES = (20, 50, 100, 200, 300, 400, 600, 800)      # leases asked for in a second
JOIN_AT_ONCE = 50
LEVEL_S = 8.0
REST_S = 12.0                    # all heartbeats once
HOLD_S = 0.2                     # a lease lives so long
P99_MS = 20.0                    # beyond this the manager is full
LAG_MS = 5.0                     # and if who asks is this late itself, it is he who is measured
LEASE_EVERY_S = 60.0             # of one node, for the number of nodes that a rate of leases means
RECORDS = 100_000
START_S = 60.0
GIB = 1 << 30
FILES = 8192
# Of all that are played: nobody opens what is sealed to it.
_KEY = AgentKey()


# ---- the manager -----------------------------------------------------------------------------------

@dataclass
class _Manager:
    """A `rfaas manager` of our own, and what it uses."""

    process: subprocess.Popen[bytes]
    socket: Path

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _managing(directory: Path, core: int) -> Iterator[_Manager]:
    """Starts a manager on that core; BenchError if it doesn't listen in time. Ends it."""
    path = directory / "bench.sock"
    environment = {name: value for name, value in config.environment().items()
                   if not name.startswith(config.PREFIX)}
    # A benchmark that is killed closes nothing: it ends with it.
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "--", "taskset", "-c", str(core), sys.executable, "-m", "rfaas_mpi.cli",
         "manager", "--directory", str(directory / "manager"), "--socket", str(path)],
        env={**environment, "RFAAS_CONFIG": os.devnull, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _answers(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"`rfaas manager` does not start (exit status {process.poll()})")
            time.sleep(0.002)
        yield _Manager(process, path)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks a daemon to end, and kills it if it doesn't."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(path: Path) -> bool:
    """True once it has answered a request there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(START_S)
        try:
            connection.connect(str(path))
            connection.sendall(b"GET /v1/policy HTTP/1.1\r\nHost: manager\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False


# ---- agents that are played ------------------------------------------------------------------------

class _Agent:
    """One of them: its web socket, and the leases that run there."""

    def __init__(self, number: int, session: aiohttp.ClientSession, chance: random.Random) -> None:
        self.node = f"nid{number:05}"
        self.live: dict[int, LiveLease] = {}
        self.reports = 0
        self._session = session
        self._chance = chance
        self._changed = asyncio.Event()
        self._answered = asyncio.Event()
        self._answered.set()

    async def join(self) -> None:
        """Registers and says for the first time what it lends."""
        start = api.StartAgent(node=self.node, agent=f"{self.node}-bench", boot_id="bench", key=_KEY.public,
                               addresses=(f"unix:/nowhere/{self.node}",), host=self.node)
        async with self._session.post("http://manager/v1/agents", data=msgspec.json.encode(start)) as response:
            if response.status != 200:
                raise BenchError(f"{self.node} is not admitted: {(await response.text())[:200]}")
            self._incarnation = msgspec.json.decode(await response.read(), type=api.Admitted).incarnation
        self._socket = await self._session.ws_connect(f"http://manager/v1/agents/{self.node}/channel")
        await self._report()
        await self._hear(await self._socket.receive())

    def begin(self, lease: api.LentLease) -> None:
        self.live[lease.id] = LiveLease(lease.id, lease.epoch, lease.workers)
        self._changed.set()

    def end(self, lease: int) -> None:
        if self.live.pop(lease, None) is not None:
            self._changed.set()

    async def speak(self) -> None:
        """Reports for ever: when something has changed, and when it is time."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(heartbeat_s(self._chance.random())):
                    await self._changed.wait()
            await asyncio.sleep(COALESCE_S)
            await self._answered.wait()
            await self._report()

    async def listen(self) -> None:
        """Does what it is told, for ever."""
        while True:
            await self._hear(await self._socket.receive())

    async def _report(self) -> None:
        self._changed.clear()
        self._answered.clear()
        self.reports += 1
        await self._socket.send_str(msgspec.json.encode(api.Report(
            incarnation=self._incarnation, clock_ns=time.monotonic_ns(), spare=tuple(range(CORES)),
            memory_bytes=256 * GIB, live=tuple(self.live.values()))).decode())

    async def _hear(self, message: aiohttp.WSMessage) -> None:
        if message.type is not aiohttp.WSMsgType.TEXT or '"error"' in message.data:
            raise BenchError(f"the manager and {self.node} don't understand each other: {message.data!r:.200}")
        orders = msgspec.json.decode(message.data, type=api.Orders)
        if orders.clock_ns:
            self._answered.set()
        for order in orders.stop:
            self.end(order.lease_id)


@dataclass
class _Level:
    """What came of so many requests in a second."""

    offered: float
    times_ms: list[float] = field(default_factory=list)
    lags_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0                 # of the manager's core

    def facts(self) -> dict[str, Any]:
        self.times_ms.sort()
        return {"offered_per_s": self.offered, "leases_per_s": round(len(self.times_ms) / self.seconds, 1),
                "p50_ms": round(statistics.median(self.times_ms), 2), "p99_ms": round(self.p99_ms, 2),
                "max_ms": round(self.times_ms[-1], 2), "count": len(self.times_ms),
                "asker_late_p99_ms": round(_p99(self.lags_ms), 2), "manager_cpu": round(self.cpu, 3)}

    @property
    def p99_ms(self) -> float:
        return _p99(self.times_ms)


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


class _Played:
    """The cluster, and the ranks that ask."""

    def __init__(self, manager: _Manager, session: aiohttp.ClientSession, agents: int) -> None:
        chance = random.Random(1)
        self.manager = manager
        self.agents = {agent.node: agent for agent in (_Agent(n, session, chance) for n in range(agents))}
        self._session = session
        self._names = itertools.count(1)

    async def ask(self, level: _Level, due: float) -> None:
        """One lease: granted, begun, ended a while later. Its time runs from when it was due."""
        level.lags_ms.append((time.perf_counter() - due) * 1e3)
        body = api.AskLease(session=f"bench-{next(self._names)}", request_id=1, workers_min=1, workers_max=1,
                            timeout_s=30.0)
        async with self._session.post("http://manager/v1/leases", data=msgspec.json.encode(body)) as response:
            data = await response.read()
            if response.status != 200:
                raise BenchError(f"a lease was refused: {data[:300]!r}")
        level.times_ms.append((time.perf_counter() - due) * 1e3)
        for lease in msgspec.json.decode(data, type=api.LeaseGrant).leases:
            self.agents[lease.node].begin(lease)
            asyncio.get_running_loop().call_later(HOLD_S, self.agents[lease.node].end, lease.id)

    async def level(self, rate: float, seconds: float) -> _Level:
        """So many requests in a second, for so long."""
        level = _Level(rate)
        cpu, begin = self.manager.cpu_s, time.perf_counter()
        async with asyncio.TaskGroup() as asking:
            for number in range(max(20, round(rate * seconds))):
                due = begin + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asking.create_task(self.ask(level, due))
        level.seconds = time.perf_counter() - begin
        level.cpu = (self.manager.cpu_s - cpu) / level.seconds
        await asyncio.sleep(2 * HOLD_S + 0.5)
        return level

    async def rest(self, seconds: float) -> float:
        """Share of its core that the manager needs for heartbeats alone."""
        cpu, begin = self.manager.cpu_s, time.perf_counter()
        await asyncio.sleep(seconds)
        return (self.manager.cpu_s - cpu) / (time.perf_counter() - begin)

    async def left(self) -> int:
        """Leases that the manager still has."""
        async with self._session.get("http://manager/v1/leases") as response:
            return len(msgspec.json.decode(await response.read(), type=api.Leases).leases)


@contextlib.asynccontextmanager
async def _playing(manager: _Manager, agents: int) -> AsyncIterator[_Played]:
    """Everybody is admitted and reports. A failure of one of them is raised at the end."""
    connector = aiohttp.UnixConnector(str(manager.socket), limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        played = _Played(manager, session, agents)
        waiting = list(played.agents.values())
        while waiting:
            # So many share a flush: one after the other would take longer than all the rest.
            await asyncio.gather(*(agent.join() for agent in waiting[:JOIN_AT_ONCE]))
            del waiting[:JOIN_AT_ONCE]
        tasks = [asyncio.create_task(each) for agent in played.agents.values()
                 for each in (agent.speak(), agent.listen())]
        try:
            yield played
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


# ---- figures ---------------------------------------------------------------------------------------

def measure_http(options: Options, *, agents: int = AGENTS, rates: tuple[float, ...] = RATES) -> dict:
    """Leases through HTTP while so many agents report: for rising rates the times, until they are too long.

    `http_leases_per_s` is the highest rate with a p99 of at most 20 ms. `nodes` is the
    number N at which heartbeats and one lease a minute on each node need the share of a
    core that the manager had at that rate: N (h + l/60) = that share, with h the CPU time
    that an agent's heartbeats need in a second and l that of one lease.
    """
    check_quiet(options.progress)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    affinity = os.sched_getaffinity(0)
    mine, its = _cores(affinity, options.core)
    directory = Path(tempfile.mkdtemp(prefix="rfaas-bench-"))
    try:
        os.sched_setaffinity(0, {mine})
        with _managing(directory, its) as manager:
            return asyncio.run(_measure_http(options, manager, agents, rates))
    finally:
        os.sched_setaffinity(0, affinity)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        shutil.rmtree(directory, ignore_errors=True)


async def _measure_http(options: Options, manager: _Manager, agents: int, rates: tuple[float, ...]) -> dict:
    share = 0.1 if options.quick else 1.0
    async with _playing(manager, agents) as played:
        options.progress(f"{agents} agents report")
        idle = await played.rest(REST_S * share)
        rss = manager.rss_bytes
        levels: list[dict[str, Any]] = []
        for rate in rates:
            options.progress(f"{rate} leases a second")
            level = (await played.level(rate, LEVEL_S * share)).facts()
            levels.append(level)
            if level["p99_ms"] > P99_MS and len(levels) > 1:
                break
        left, deadline = await played.left(), time.monotonic() + START_S
        while left and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            left = await played.left()
        if left:
            raise BenchError(f"{left} leases never ended")
        count = sum(level["count"] for level in levels)
        grown = manager.rss_bytes - rss
    good = [level for level in levels if level["p99_ms"] <= P99_MS]
    found: dict[str, Any] = {
        "http_agents": agents, "http_levels": levels, "http_idle_cpu": round(idle, 4),
        "http_asker_is_the_limit": bool(levels) and levels[-1]["asker_late_p99_ms"] > LAG_MS,
        "manager_bytes_per_lease": round(grown / count), "manager_rss_bytes": rss}
    if good:
        best = max(good, key=lambda level: level["offered_per_s"])
        lease_s = max(1e-9, best["manager_cpu"] - idle) / best["leases_per_s"]
        found |= {"http_leases_per_s": best["leases_per_s"], "http_lease_p50_ms": best["p50_ms"],
                  "http_lease_p99_ms": best["p99_ms"], "http_lease_cpu_ms": round(lease_s * 1e3, 3),
                  "nodes": int(best["manager_cpu"] / (idle / agents + lease_s / LEASE_EVERY_S))}
    return found


def measure_restart(options: Options, *, records: int = RECORDS) -> dict:
    """Seconds from the start of `rfaas manager` to its first answer: with that many records of leases, and with none."""
    check_quiet(options.progress)
    mine, its = _cores(os.sched_getaffinity(0), options.core)
    times: dict[str, list[float]] = {"restart_s": [], "start_s": []}
    if options.quick:
        records //= 10
    directory = Path(tempfile.mkdtemp(prefix="rfaas-bench-"))
    try:
        options.progress(f"writing {records} leases")
        (directory / "full" / "manager").mkdir(parents=True, mode=0o700)
        live = _fill(directory / "full" / "manager" / "ledger.db", records)
        for number in range(options.runs):
            options.progress(f"restart: run {number + 1} of {options.runs}")
            for name, figure in (("full", "restart_s"), ("empty", "start_s")):
                (directory / name).mkdir(exist_ok=True)
                begin = time.perf_counter()
                with _managing(directory / name, its):
                    times[figure].append(round(time.perf_counter() - begin, 3))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {"restart_records": records, "restart_live": live,
            **{name: statistics.median(values) for name, values in times.items()},
            **{f"{name}_runs": values for name, values in times.items()}}


def _fill(path: Path, records: int) -> int:
    """A ledger of a large cluster's last minutes: half of its cores lent, the other leases ended. How many live."""
    cluster = control.Cluster(now=time.monotonic())
    ledger = Ledger(path)
    try:
        written = cluster.keep(ledger)
        while written < records:
            cluster.lives(500, tidy=False)
            written += cluster.keep(ledger)
        return len(cluster.book.leases)
    finally:
        ledger.close()


def _cores(usable: set[int], core: int | None) -> tuple[int, int]:
    """Ours and the manager's. BenchError where there is one only."""
    mine = min(usable) if core is None else core
    others = sorted(usable - {mine})
    if mine not in usable or not others:
        raise BenchError("the manager needs a core, and who asks it another one")
    return mine, others[0]
