"""Where the end of a node's window is known nothing is lent beyond it, and nothing is begun that would not be done by it."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
from cluster import GUARD_S, SLOW, Cluster, wait_until

from rfaas_mpi import Executor, api
from rfaas_mpi.agent import daemon
from rfaas_mpi.agent.window import Window
from rfaas_mpi.cli import main
from rfaas_mpi.slurm.facts import LEAD_S, Until
from rfaas_mpi.slurm.run import NodePlan, Plan, Said

_asked = itertools.count(1)


def end_of_a_lease(cluster: Cluster) -> float | None:
    """How long one lasts that is granted now; it is given back."""
    (lent,) = cluster.call("ask", api.AskLease(session="test", request_id=next(_asked), workers_min=1, workers_max=1,
                                               timeout_s=GUARD_S)).leases
    cluster.call("release", lease=lent.id)
    wait_until(lambda: cluster.free(), "it is free again")
    return lent.hard_end_in_s


class JobAgent:
    """The agent of a job on node n1, which `rfaas slurm run` starts and tells when the job ends; it lends one core."""

    def __init__(self, cluster: Cluster) -> None:
        self.directory = cluster.directory / "job"
        self.directory.mkdir(mode=0o700)
        self._log = cluster.directory / "agent.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rfaas_mpi.cli", "slurm", "agent"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **cluster.environment, "SLURMD_NODENAME": "n1"})
        cpus = tuple(sorted(os.sched_getaffinity(0)))
        self._tell(Plan(f"unix:{cluster.socket}", str(self.directory), b"", self._until(None),
                        {"n1": NodePlan(cpus, "127.0.0.1", 0, 1, 1)}))
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and msgspec.json.decode(line, type=Said).ready != "n1":
            continue
        assert line, self.said()

    def ends_in(self, left_s: float | None) -> None:
        """From now on: leases end then."""
        self._tell(self._until(left_s))

    @staticmethod
    def _until(left_s: float | None) -> Until:
        return Until(None if left_s is None else time.time() + left_s + LEAD_S, time.time())

    def _tell(self, what: Plan | Until) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(what) + b"\n")
        self.process.stdin.flush()

    def said(self) -> str:
        return self._log.read_text()

    def leave(self) -> None:
        """As it does when its job's ranks have ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(GUARD_S) == 0, self.said()

    def __enter__(self) -> JobAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def test_a_job_s_agent_lends_until_its_end_and_again_where_that_comes_later():
    with Cluster([]) as cluster, JobAgent(cluster) as agent:
        def lends(condition: Callable[[float | None], bool]) -> None:
            """Once a lease there would have such an end; None: none."""
            wait_until(lambda: cluster.free() and condition(end_of_a_lease(cluster)), "it lends")

        lends(lambda end: end is None)
        agent.ends_in(1000.0)
        lends(lambda end: end is not None and end <= 1000.0)
        agent.ends_in(-1.0)
        wait_until(lambda: cluster.nodes() and not cluster.free(), "its job is about to end")
        agent.ends_in(500.0)
        lends(lambda end: end is not None and end <= 500.0)
        agent.leave()
        assert not agent.directory.exists()


def test_no_call_is_begun_that_would_not_be_done_by_the_end_and_others_run_elsewhere(tmp_path):
    begun = tmp_path / "begun"
    begun.touch()
    call_s = 1.0 * SLOW

    def call(number: int, takes_s: float) -> int:
        with begun.open("a") as out:         # one write each
            out.write(f"{number} {os.getpid()}\n")
        time.sleep(takes_s)
        return number

    with Cluster(["0"]) as cluster, JobAgent(cluster) as agent:
        wait_until(lambda: cluster.free() == 2, "both nodes lend")
        with Executor(workers=(2, 2), manager=cluster.environment["RFAAS_MANAGER"],
                      manager_user=cluster.environment["RFAAS_MANAGER_USER"], lease_timeout_s=GUARD_S) as executor:
            calls = list(executor.map(call, range(2), [call_s] * 2))
            assert len({line.split()[1] for line in begun.read_text().splitlines()}) == 2, "both show what one takes"
            # One more would just be done, and one behind it would not.
            agent.ends_in(2 * call_s)
            wait_until(lambda: len(executor.workers) == 1, "the job's worker takes no calls any more")
            (grace,) = re.findall(r"stop: expired, grace (\S+) s", agent.said())
            assert float(grace) > 0.25 * call_s, "before its end"
            calls += executor.map(call, range(2, 6), [0.0] * 4)
        assert calls == sorted(int(line.split()[0]) for line in begun.read_text().splitlines()) == list(range(6))
        agent.leave()


def test_a_moment_that_is_named_to_an_agent_is_the_end_of_its_window(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "run", lambda options, settings, ready, window: windows.append(window))
    windows: list[Window | None] = []
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 1000.0))
    for words in ([], ["--until", soon]):
        assert main(["agent", "--manager", "unix:/nowhere", "--node", "n1", "--directory", str(tmp_path), *words]) == 0
    without, until = windows
    assert without is None
    assert until is not None and until.ends is not None and 990.0 < until.ends - time.monotonic() <= 1000.0


def test_who_says_when_a_window_ends_is_heard_once_for_each_change():
    window, heard = Window(), []
    window.listen(lambda: heard.append(window.ends))
    for ends in (100.0, 100.3, None, None, 50.0):
        window.tell(ends)
    assert heard == [100.0, None, 50.0]


def test_where_clocks_differ_a_window_ends_by_the_earlier_one():
    now, window = time.time(), Window()
    for sent, least in ((now, 99.0), (now + 40.0, 59.0), (now - 40.0, 99.0)):
        window.tell_wall(now + 100.0, sent)
        assert window.ends is not None and least < window.ends - time.monotonic() <= least + 1.0
