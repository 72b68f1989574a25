"""Pilot jobs on a real Slurm: idle nodes lend, give way to any other job, and lend again."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from site_of_users import interpreter
from slurm_cluster import GUARD_S, Slurm
from test_apps import needs_two_cores
from test_slurm_run import processes

from rfaas_mpi.slurm import facts

REPOSITORY = Path(__file__).resolve().parent.parent
RFAAS = Path(sys.executable).with_name("rfaas")

# Borrows both nodes' cores, says so, and computes until it is told that it's enough.
PROGRAM = r"""
import os, sys, time
import rfaas_mpi as rf
def square(number):
    return number * number
with rf.Executor(workers=(2, 2), lease_timeout_s=30) as executor:
    print("borrowed", len(executor.workers), flush=True)
    rounds = 0
    while not os.path.exists(sys.argv[1]):
        assert list(executor.map(square, range(64))) == [n * n for n in range(64)]
        rounds += 1
    assert list(executor.map(square, range(64))) == [n * n for n in range(64)]
    print("right", len(executor.workers), flush=True)
"""


# Has endless kernels run on both, and says why each one ended.
ENDLESS = r"""
import rfaas_mpi as rf
def endless(number):
    while True:
        pass
with rf.Executor(workers=(3, 3), fallback=False, lease_timeout_s=30) as executor:
    calls = [executor.submit(endless, number) for number in range(3)]
    print("borrowed", len(executor.workers), flush=True)
    print(*sorted(type(call.exception()).__name__ for call in calls), flush=True)
"""


# How pilots are preempted: Slurm's word, and for how long they may go on; a soak test tries all.
MODES = os.environ.get("RFAAS_SOAK_PREEMPTION", "CANCEL:0").split(",")
LONG = "RFAAS_SOAK_PREEMPTION" in os.environ


@pytest.fixture(scope="module", params=MODES)
def slurm(request) -> Iterator[Slurm]:
    mode, _, grace = request.param.partition(":")
    suspends = mode == "SUSPEND"
    shared = "OverSubscribe=FORCE:1 " if suspends else ""
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "SUSPEND,GANG" if suspends else mode}
    partitions = (f"low {shared}PriorityTier=1 PreemptMode={mode} GraceTime={grace} MaxTime=30 "
                  "TRESBillingWeights=CPU=0.25", f"high {shared}PriorityTier=10 PreemptMode=OFF")
    with slurm_cluster.cluster(3, 2, settings=settings, partitions=partitions) as found:
        (found.directory / "program.py").write_text(PROGRAM)
        (found.directory / "endless.py").write_text(ENDLESS)
        yield found


class Pilots:
    """`rfaas slurm pilots`, in the foreground of a process of its own."""

    def __init__(self, slurm: Slurm, *options: object, user: str | None = None) -> None:
        self.slurm, self.user = slurm, user
        self.directory = place_of(slurm, user) / "pilots"
        self._out, self._err = slurm.directory / "pilots.out", slurm.directory / "pilots.err"
        words = [*python(user), "-m", "rfaas_mpi.cli", "slurm", "pilots", "--json", "--partition", "low", "--directory",
                 self.directory, *options]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                slurm.at("", words), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=slurm.directory,
                env=environment_of(slurm, user))

    @property
    def said(self) -> str:
        logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in self.directory.glob("*.log"))
        return self._err.read_text() + self._out.read_text() + logs

    def until(self, condition: Callable[[], object], what: str) -> object:
        def still() -> object:
            assert self.process.poll() is None, self.said
            return condition()
        try:
            return self.slurm.wait_until(still, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said}") from None

    def environment(self) -> dict[str, str]:
        self.until(lambda: self._out.read_text().endswith("}\n"), "pilots are queued")
        answer = json.loads(self._out.read_text())
        assert "environment" in answer, self.said
        return answer["environment"]

    def lending(self) -> set[str]:
        """Which nodes lend, by what was said so far."""
        found: set[str] = set()
        for node, what in re.findall(r"^rfaas: (\S+) (lends|has left)$", self._err.read_text(), re.MULTILINE):
            (found.add if what == "lends" else found.discard)(node)
        return found

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(GUARD_S) == 0, self.said

    def __enter__(self) -> Pilots:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(GUARD_S)


def place_of(slurm: Slurm, user: str | None) -> Path:
    """A directory of that user's; None: of whoever runs this."""
    path = slurm.directory / (user or "own")
    path.mkdir(exist_ok=True)
    if user is not None:
        shutil.chown(path, user)
    return path


def temporary(slurm: Slurm, user: str | None = None) -> Path:
    """Where pilots and their manager have what is temporary: all nodes are this machine, and others use /tmp."""
    path = place_of(slurm, user) / "t"
    path.mkdir(exist_ok=True)
    if user is not None:
        shutil.chown(path, user)
    return path


def python(user: str | None) -> list[str]:
    """How that user has Python run something."""
    return [sys.executable] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups", "--", interpreter()]


def environment_of(slurm: Slurm, user: str | None) -> dict[str, str]:
    kept = {**slurm.environment, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(temporary(slurm, user))}
    return kept if user is None else {**kept, "PYTHONPATH": f"{REPOSITORY}:{sysconfig.get_path('purelib')}",
                                      "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(place_of(slurm, user))}


def running(slurm: Slurm) -> list[str]:
    return slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%N").split()


def borrow(slurm: Slurm, environment: dict[str, str], *words: object, user: str | None = None,
           ) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*python(user), *map(str, words)], cwd=slurm.directory, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, env={**environment_of(slurm, user), **environment})


@needs_two_cores
def test_the_first_signal_of_any_kind_ends_a_pilot_whatever_its_workers_run(slurm):
    # A user without rights, which every Debian has.
    user = "games" if os.geteuid() == 0 else None
    with Pilots(slurm, "--nodes-max", 3, "--lengths", "10,20", user=user) as pilots:
        environment = pilots.environment()
        pilots.until(lambda: pilots.lending() == {"n1", "n2", "n3"}, "all nodes lend")
        assert slurm.run("squeue", "-h", "-p", "low", "-o", "%u").split() == [user or getpass.getuser()] * 3
        borrower = borrow(slurm, environment, "endless.py", user=user)
        try:
            assert borrower.stdout is not None
            assert (began := borrower.stdout.readline()) == "borrowed 3\n", began + borrower.communicate()[0]
            jobs = slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%i").split()
            for job, name in zip(jobs, ("TERM", "TSTP", "USR1"), strict=True):
                slurm.run("scancel", f"--signal={name}", job)
            # Slurm sends them to the workers, too: that is no fault of what they run.
            said, _ = borrower.communicate(timeout=GUARD_S)
            assert said.split() == ["LeaseRevoked"] * 3, said
        finally:
            borrower.kill()
            borrower.wait()
        for job in jobs:
            assert slurm.ended(int(job)) == "COMPLETED", pilots.said
            assert not list(temporary(slurm, user).glob(f"rfaas-pilot-*-{job}")), pilots.said
        pilots.close()
    slurm.wait_until(lambda: not slurm.run("squeue", "-h"), "no job is left")
    assert not pilots.directory.exists() and not list(temporary(slurm, user).iterdir())


@needs_two_cores
def test_pilots_lend_idle_nodes_and_give_way_and_come_back_and_leave_nothing(slurm):
    with Pilots(slurm, "--nodes-max", 2, "--lengths", "10,20") as pilots:
        environment = pilots.environment()
        pilots.until(lambda: len(pilots.lending()) == 2, "two nodes lend")
        enough = slurm.directory / "enough"
        borrower = borrow(slurm, environment, "program.py", enough)
        try:
            assert borrower.stdout is not None
            began = borrower.stdout.readline()
            assert began == "borrowed 2\n", began + borrower.communicate(timeout=GUARD_S)[0]
            owner = slurm.submit("#!/bin/bash\nexec sleep 600\n", "--partition=high", "--nodes=3", "--exclusive")
            slurm.wait_until(lambda: slurm.state(owner) == "RUNNING", "the other job runs")
            assert running(slurm) == []
            pilots.until(lambda: not pilots.lending(), "no node lends")
            enough.touch()
            said, _ = borrower.communicate(timeout=GUARD_S)
            assert "right 0\n" in said and borrower.returncode == 0, said
        finally:
            borrower.kill()
            borrower.wait()
        slurm.run("scancel", owner)
        pilots.until(lambda: len(pilots.lending()) == 2, "two nodes lend again")
        key = Path(environment["RFAAS_MANAGER_KEY_FILE"])
        assert key.stat().st_mode & 0o077 == 0
        secret = key.read_bytes()
        assert secret not in b"".join(path.read_bytes() for path in pilots.directory.glob("pilot-*.log"))
        pilots.close()
    slurm.wait_until(lambda: not slurm.run("squeue", "-h", "-p", "low"), "no pilot is left")
    assert not pilots.directory.exists()
    slurm.wait_until(lambda: not list(temporary(slurm).iterdir()), "nodes have no files of pilots")
    slurm.wait_until(lambda: not processes(re.compile(re.escape(str(pilots.directory)).encode())), "no process is left")


@needs_two_cores
def test_nodes_that_are_to_be_left_alone_are_and_what_is_to_be_emptied_is_left():
    settings = {"PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL", "SuspendProgram": "/bin/true",
                "ResumeProgram": "/bin/true", "SuspendTime": 3600, "SuspendTimeout": 600}
    partitions = ("low PriorityTier=1 PreemptMode=CANCEL", "high PriorityTier=10 PreemptMode=OFF")
    with slurm_cluster.cluster(6, 2, settings=settings, partitions=partitions) as slurm:
        user = getpass.getuser()
        for number, flags in ((2, ["flags=maint,ignore_jobs"]), (3, [])):
            slurm.run("scontrol", "create", "reservation", "starttime=now", "duration=60", f"nodes=n{number}",
                      f"users={user}", *flags)
        slurm.run("scontrol", "update", "nodename=n4", "state=power_down")
        slurm.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
        slurm.wait_until(lambda: {state.rstrip("%") for state in states(slurm)} == {
            "drained", "maint", "reserved", "idle"}, "nodes are in all these states")
        with Pilots(slurm, "--nodes-max", 6, "--lengths", "10") as pilots:
            pilots.until(lambda: pilots.lending() == {"n5", "n6"}, "the two that are left lend")
            waiting = slurm.run("squeue", "-h", "-p", "low", "-t", "PENDING", "-o", "%x").split()
            assert waiting == ["n[1-4]"] * 4, pilots.said
            if LONG:
                # An administrator wants one of them, and of another one two jobs want to have the whole.
                slurm.run("scontrol", "update", "nodename=n5", "state=drain", "reason=test")
                others = [slurm.submit("#!/bin/bash\nexec sleep 600\n", "--partition=high", "--nodelist=n6",
                                       "--exclusive") for _ in range(2)]
                slurm.wait_until(lambda: [slurm.state(job) for job in others] == ["RUNNING", "PENDING"], "one runs")
                pilots.until(lambda: not pilots.lending(), "none lends")
                pilots.until(lambda: not slurm.run("squeue", "-h", "-p", "low"), "no pilot waits while others do")
                slurm.run("scancel", *others)
                pilots.until(lambda: pilots.lending() == {"n6"}, "one lends again")
            pilots.close()


# Fixed lengths are tried one after another, which takes 20 s for each.
@needs_two_cores
@pytest.mark.parametrize("options", [("--time-min", 1), *[()] * LONG], ids=str)
def test_pilots_fit_into_what_is_left_before_a_reservation(slurm, options):
    # Slurm keeps some time between a job's end and what comes after it.
    slurm.run("scontrol", "create", "reservation", "starttime=now+6minutes", "duration=60", "nodes=ALL",
              "reservationname=soon", f"users={getpass.getuser()}", "flags=maint,ignore_jobs")
    try:
        with Pilots(slurm, "--nodes-max", 1, "--lengths", "2,30", *options) as pilots:
            pilots.until(pilots.lending, "one lends")
            limit = slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%l").strip()
            assert 60 <= facts.seconds(limit) <= 360, limit
            pilots.close()
    finally:
        slurm.run("scontrol", "delete", "reservationname=soon")


def states(slurm: Slurm) -> list[str]:
    return slurm.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()


def test_what_no_other_job_preempts_is_refused_and_check_says_what_there_is_to_add(slurm):
    words = (RFAAS, "slurm", "pilots", "--partition")
    said = slurm.run(*words, "low", "--check", PYTHONPATH=str(REPOSITORY))
    assert "preempted   yes: jobs of high preempt those of low" in said and "CPU=0.25" in said, said
    said = slurm.run(*words, "high", "--check", PYTHONPATH=str(REPOSITORY), check=False)
    assert "preempted   no: the partition high has PreemptMode=OFF" in said and "PriorityTier=1 " in said, said
    done = subprocess.run([*map(str, words), "high"], text=True, capture_output=True, timeout=GUARD_S,
                          env={**slurm.environment, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 1 and "would keep others waiting" in done.stderr, done


def test_lengths_that_the_partition_does_not_allow_are_refused(slurm):
    with Pilots(slurm, "--lengths", "31,90") as pilots:
        assert pilots.process.wait(GUARD_S) == 1
        assert "no pilot is as short as the jobs of low have to be" in pilots.said
    assert not pilots.directory.exists()
    # A pilot of the test before says for two seconds at the most that it leaves, to a manager that may be gone.
    slurm.wait_until(lambda: not list(temporary(slurm).iterdir()), "nothing of it is left")
