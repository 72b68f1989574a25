"""What becomes of a program with borrowed cores when Slurm, its nodes or their links fail: right, and nothing is left.

On nodes that are apart (root), so that a link can be cut and all that a node has left can be seen.
"""

from __future__ import annotations

import abc
import getpass
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import slurm_cluster
import slurm_nodes
from cluster import Daemon
from lending_node import HOOK
from slurm_cluster import Slurm
from test_apps import needs_two_cores
from test_slurm_pilots import Pilots, temporary

REPOSITORY = Path(__file__).resolve().parent.parent
RFAAS = Path(sys.executable).with_name("rfaas")
# How many faults a soak test does to each way of getting workers, and which ones.
FAULTS = int(os.environ.get("RFAAS_SOAK_SLURM_FAULTS", "0"))
SEED = int(os.environ.get("RFAAS_SOAK_SLURM_SEED", "1"))

pytestmark = [needs_two_cores,
              pytest.mark.skipif(bool(slurm_nodes.why_not()), reason=f"no virtual nodes: {slurm_nodes.why_not()}")]

# Calls kernels in rounds until it is told that it's enough; each call has to have its own result.
PROGRAM = r"""
import os, sys, time
import rfaas_mpi as rf
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())
def square(number):
    time.sleep(0.005)
    return number * number
with rf.Executor(workers=(0, 8), idle_s=60, lease_timeout_s=10) as executor:
    rounds = 0
    while not os.path.exists(sys.argv[1]):
        assert list(executor.map(square, range(rounds, rounds + 32))) == [n * n for n in range(rounds, rounds + 32)]
        rounds += 1
        say("round", rounds, "workers", len(executor.workers), "end")
    say("right")
"""
# A dead network is noticed soon, so that nobody waits for it here.
IMPATIENT = {"RFAAS_TCP_IDLE_S": "1", "RFAAS_TCP_PROBE_S": "1", "RFAAS_TCP_PROBES": "2", "RFAAS_TCP_TIMEOUT_S": "2"}


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    settings = {"SlurmdTimeout": 30, "Prolog": HOOK, "Epilog": HOOK, "PrologFlags": "Alloc,Contain",
                "PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"}
    partitions = ("low PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=30", "high PriorityTier=10 PreemptMode=OFF")
    with slurm_cluster.cluster(3, 2, apart=True, confined=True, settings=settings, partitions=partitions) as found:
        (found.directory / "program.py").write_text(PROGRAM)
        yield found


def nothing_left(slurm: Slurm, *, noted: bool = False) -> None:
    """No node has anything but Slurm's daemon, once what was told to end has. (Where hooks look for an agent stays.)

    With `noted` a job may still be, by a hook: Slurm runs no Epilog where slurmd was killed as it was about to.
    """
    assert slurm.network is not None
    for node in slurm.network.nodes.values():
        found: list[str] = []

        def clean(node: slurm_nodes.VirtualNode = node, found: list[str] = found) -> bool:
            found[:] = [each for each in node.left() if each != "/run/rfaas-hook"
                        and not (noted and each.startswith("/run/rfaas-hook/starting-"))]
            return not found
        try:
            slurm.wait_until(clean, f"{node.name} is clean")
        except AssertionError as error:
            raise AssertionError(f"left on {node.name}: {found}\n{error}") from None


class Program(abc.ABC):
    """One that calls kernels, and what it has said so far; it is to go on whatever becomes of its workers."""

    slurm: Slurm

    def __init__(self) -> None:
        self.enough = self.slurm.directory / f"enough-{random.getrandbits(32):x}"

    @abc.abstractmethod
    def said(self) -> str:
        """All of it."""

    def rounds(self) -> int:
        return self.said().count(" end\n")

    def goes_on(self, rounds: int = 5) -> None:
        """It gets that much further. (Slurm may be unable to say how it is.)"""
        had = self.rounds()

        def further() -> bool:
            said = self.said()
            assert "Traceback" not in said and "right" not in said.splitlines(), said
            return self.rounds() >= had + rounds
        self.slurm.wait_until(further, f"the program goes on:\n{self.said()[-2000:]}")

    def workers(self) -> int:
        """As it said last."""
        return int(self.said().rpartition(" end\n")[0].rpartition("workers ")[2] or -1)

    def has(self, workers: int) -> None:
        """It has so many, once it does."""
        self.slurm.wait_until(lambda: self.workers() == workers, f"it has {workers} workers:\n{self.said()[-2000:]}")


# --- in the user's own job ----------------------------------------------------------------------------

class Job(Program):
    """`rfaas slurm run` on all nodes: one rank, workers on all other cores."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm
        super().__init__()
        exports = "".join(f"export {name}={value}\n" for name, value in {"PYTHONPATH": REPOSITORY, **IMPATIENT}.items())
        self.number = slurm.submit(
            f"#!/bin/bash\n{exports}exec '{RFAAS}' slurm run --ranks 1 -- '{sys.executable}' program.py '{self.enough}'\n",
            f"--nodes={len(slurm.names)}", "--exclusive")
        self.goes_on(1)

    def said(self) -> str:
        return self.slurm.output(self.number)

    def end(self) -> None:
        """It has had enough, was right, and Slurm says so."""
        self.enough.touch()
        assert self.slurm.ended(self.number) == "COMPLETED", self.slurm.output(self.number)
        assert self.slurm.output(self.number).splitlines()[-1] == "right"


# --- faults, through which a program goes on ------------------------------------------------------------

def killed_slurmd(program: Program, node: str) -> None:
    program.slurm.kill(node)
    program.goes_on()
    program.slurm.restart(node)


def killed_slurmctld(program: Program, _node: str) -> None:
    slurm = program.slurm
    # A step that it has not saved is none to the next one, which gives its number, and control groups, to another.
    saved, now = slurm.directory / "state" / "job_state", time.time()
    for job in slurm.run("squeue", "-h", "-t", "RUNNING", "-o", "%i").split():
        slurm.run("scontrol", "update", f"JobId={job}", f"AdminComment={now}")
        slurm.wait_until(lambda: saved.exists() and saved.stat().st_mtime > now, "slurmctld has saved its state")
    slurm.kill("slurmctld")
    program.goes_on()
    slurm.restart("slurmctld")


def drained(program: Program, node: str) -> None:
    slurm = program.slurm
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=fault")
    program.goes_on()

    def resumed() -> bool:
        # Refused where slurmctld, just started, has not heard of the node.
        slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        return "drain" not in slurm.run("sinfo", "-h", "-n", node, "-o", "%T")
    slurm.wait_until(resumed, f"{node} is no longer drained")


def cut(program: Program, node: str) -> None:
    assert program.slurm.network is not None
    program.slurm.network.cut(node)
    program.goes_on()
    program.slurm.network.heal()


def lossy(program: Program, node: str) -> None:
    assert program.slurm.network is not None
    program.slurm.network.lose(node)
    program.goes_on()
    program.slurm.network.heal()


Fault = Callable[[Program, str], None]
ON_ANY_NODE: tuple[Fault, ...] = (killed_slurmd, killed_slurmctld, drained)
ON_OTHERS: tuple[Fault, ...] = (cut, lossy)             # and not on that of the program


# --- ends of a job, after each of which nothing is left -------------------------------------------------

def has_enough(job: Job) -> None:
    job.end()


def cancelled(job: Job) -> None:
    job.slurm.run("scancel", job.number)
    assert job.slurm.ended(job.number) == "CANCELLED"


def killed(job: Job) -> None:
    job.slurm.run("scancel", "--signal=KILL", job.number)
    assert job.slurm.ended(job.number) == "CANCELLED"


def ranks_cancelled(job: Job) -> None:
    job.slurm.run("scancel", f"{job.number}.1")
    assert job.slurm.ended(job.number) == "FAILED"


def out_of_time(job: Job) -> None:
    job.slurm.run("scontrol", "update", f"JobId={job.number}", "EndTime=now+2")
    assert job.slurm.ended(job.number) == "TIMEOUT"


def requeued(job: Job) -> None:
    """Runs again from its beginning, on nodes that have nothing of its first time."""
    slurm = job.slurm
    slurm.run("scontrol", "requeue", job.number)
    slurm.wait_until(lambda: slurm.state(job.number) == "PENDING", "it is queued")
    slurm.wait_until(lambda: not slurm.run("squeue", "-h", "-t", "RUNNING,COMPLETING"), "its first time is over")
    nothing_left(slurm)
    had = job.rounds()
    # slurmd knows times in seconds, and takes a credential made in that in which it revoked the first one for that one.
    slurm.run("scontrol", "update", f"JobId={job.number}", "StartTime=now+2")
    slurm.wait_until(lambda: job.rounds() != had and slurm.state(job.number) == "RUNNING", "it runs again")
    job.goes_on()


ENDS = (has_enough, cancelled, killed, ranks_cancelled, out_of_time)


def without_agents(job: Job, away: str = "") -> None:
    """Their step is cancelled; the program goes on alone, and what they had is removed at once, not at the job's end.

    On a node whose slurmd is `away` meanwhile, once that is back and Slurm has told it.
    """
    slurm = job.slurm
    assert slurm.network is not None
    if away:
        slurm.kill(away)
    slurm.run("scancel", f"{job.number}.0")
    if away:
        job.goes_on()
        slurm.restart(away)
    for name in slurm.names[1:]:
        node = slurm.network.nodes[name]
        slurm.wait_until(lambda node=node: not any("slurm agent" in words for words in node.processes().values()),
                         f"the agent of {name} has ended")
        slurm.wait_until(lambda node=node: not any("rfaas" in each for each in node.left()), f"{name} has nothing of theirs")
    job.goes_on()


def test_a_job_that_lends_to_itself_outlives_slurmd_links_and_its_agents_and_leaves_nothing(slurm):
    _, second, third = slurm.names
    assert slurm.network is not None
    # As one that was killed long ago would have left it.
    old = slurm.network.nodes[second].path(f"/tmp/rfaas-slurm-{os.geteuid()}-1000/{second}")
    old.mkdir(parents=True)
    for path in (old, old.parent):
        path.chmod(0o700)
        os.utime(path, (0, 0))
    job = Job(slurm)
    job.has(5)
    assert not old.exists()
    killed_slurmd(job, second)
    cut(job, third)
    job.has(5)
    without_agents(job)
    requeued(job)
    ranks_cancelled(job)
    nothing_left(slurm)


# --- with the site's service --------------------------------------------------------------------------------

class Inside(Daemon):
    """One on a virtual node, where it is told by another process than that which waits for it."""

    def signal(self, number: int) -> None:
        started = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        os.kill(int(started[0]), number)


class Service:
    """A manager where users are, and an agent on each node, which hooks tell of jobs; close() ends them."""

    def __init__(self, slurm: Slurm) -> None:
        assert slurm.network is not None
        self.slurm = slurm
        self.directory = slurm.directory / f"service-{random.getrandbits(32):x}"
        self.directory.mkdir(mode=0o700)
        address = f"unix:{self.directory}/socket"
        self.environment = {"RFAAS_MANAGER": address, "RFAAS_MANAGER_USER": str(os.geteuid()), **IMPATIENT}
        self.manager = Daemon(self.directory / "manager.log", [
            "manager", "--directory", self.directory / "manager", "--socket", self.directory / "socket"],
            slurm.network.head)
        self.agents = {name: Inside(self.directory / f"{name}.log", [
            "agent", "--manager", address, "--node", name, "--listen", f"{node.address}:0", "--socket", "none",
            "--hook", "/run/rfaas-hook", "--directory", self.directory / name], node,
            RFAAS_RUNTIME_DIR=str(self.directory / name), **self.environment)
            for name, node in slurm.network.nodes.items()}

    def said(self) -> str:
        return "\n".join(f"{each.log.name}\n{each.said()[-3000:]}" for each in (self.manager, *self.agents.values()))

    def killed_agent(self, program: Program, node: str) -> None:
        """A fault of its own."""
        agent = self.agents[node]
        admitted = agent.said().count("is admitted as")
        agent.kill()
        program.goes_on()
        agent.start()
        self.slurm.wait_until(lambda: agent.said().count("is admitted as") > admitted, f"the agent of {node} is there again")

    def close(self) -> None:
        """Safe to call twice."""
        for daemon in (*self.agents.values(), self.manager):
            daemon.close()
        # A service's own directory stays, with files to lock.
        sockets = [path for path in self.directory.rglob("*") if path.is_socket()]
        assert not sockets, f"{sockets}\n{self.said()}"

    def __enter__(self) -> Service:
        self.manager.start()
        self.slurm.wait_until((self.directory / "socket").is_socket, "the manager listens")
        for agent in self.agents.values():
            agent.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Borrower(Program):
    """Borrows from all nodes, from where users are; killed in the end if it has not ended."""

    def __init__(self, slurm: Slurm, environment: Mapping[str, str]) -> None:
        self.slurm = slurm
        super().__init__()
        self._log = slurm.directory / f"{self.enough.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                slurm.at("", [sys.executable, "program.py", self.enough]), cwd=slurm.directory, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
                env={**slurm.environment, **environment, "PYTHONPATH": str(REPOSITORY)})

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self) -> None:
        """It has had enough, and was right."""
        self.enough.touch()
        assert self._process.wait(slurm_cluster.GUARD_S) == 0, self.said()
        assert self.said().splitlines()[-1] == "right"

    def __enter__(self) -> Borrower:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def owner(slurm: Slurm, node: str) -> int:
    """A job on all of a node; its first task has begun."""
    job = slurm.submit("#!/bin/bash\necho began\nexec sleep 600\n", f"--nodelist={node}", "--exclusive")
    slurm.wait_until(lambda: slurm.output(job), "the owner's job has begun")
    return job


def test_a_sites_agents_lend_again_after_each_fault_and_leave_nothing(slurm):
    first, second, third = slurm.names
    with Service(slurm) as service, Borrower(slurm, service.environment) as program:
        program.has(3)
        slurm.kill(first)
        slurm.restart(first)
        cut(program, second)
        jobs = [owner(slurm, name) for name in (first, third)]
        program.goes_on()
        slurm.run("scontrol", "requeuehold", jobs[0])
        slurm.run("scancel", *jobs)
        service.killed_agent(program, third)
        drained(program, second)
        killed_slurmctld(program, first)
        program.has(3)
        program.end()
        service.close()
    nothing_left(slurm)


# --- with pilots ------------------------------------------------------------------------------------------

def pilots_of(slurm: Slurm) -> list[str]:
    return slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%i").split()


def test_pilots_lend_on_through_faults_and_leave_nothing(slurm):
    first, second, _ = slurm.names
    with Pilots(slurm, "--nodes-max", 3, "--lengths", "10,20") as pilots:
        environment = pilots.environment()
        pilots.until(lambda: pilots.lending() == set(slurm.names), "all nodes lend")
        with Borrower(slurm, {**environment, **IMPATIENT}) as program:
            program.has(3)
            killed_slurmd(program, first)
            cut(program, second)
            job, *_ = pilots_of(slurm)
            slurm.run("scontrol", "requeue", job, check=False)     # refused: it would begin with a manager's old address
            slurm.run("scancel", job)
            assert slurm.ended(int(job)) == "CANCELLED"
            program.goes_on()
            program.end()
        pilots.close()
    nothing_left(slurm)
    slurm.wait_until(lambda: not list(temporary(slurm).iterdir()), "nodes have no files of pilots")


if FAULTS:
    def at_random(dice: random.Random, program: Program, nodes: Sequence[str], kinds: Sequence[Fault]) -> None:
        """One of these faults, on one of these nodes."""
        fault, node = dice.choice(kinds), dice.choice(nodes)
        print(f"{fault.__name__} {node} after {program.rounds()} rounds", flush=True)
        fault(program, node)

    def test_faults_at_random_in_jobs_that_lend_to_themselves(slurm):
        dice, done = random.Random(SEED), 0
        while done < FAULTS:
            job = Job(slurm)
            for _ in range(dice.randrange(4)):
                # (Its own node is not cut off: the test would have to wait for Slurm to give it up.)
                if dice.random() < 0.6:
                    at_random(dice, job, slurm.names, ON_ANY_NODE)
                else:
                    at_random(dice, job, slurm.names[1:], ON_OTHERS)
                done += 1
            if dice.random() < 0.3:
                away = dice.choice(["", *slurm.names[1:]])
                print(f"job {job.number}: without_agents, slurmd away on {away or 'no node'}", flush=True)
                without_agents(job, away)
                done += 1
            if dice.random() < 0.3:
                print(f"job {job.number}: requeued", flush=True)
                requeued(job)
                done += 1
            end = dice.choice(ENDS)
            print(f"job {job.number}: {end.__name__}", flush=True)
            end(job)
            done += 1
            slurm.wait_until(lambda: not slurm.run("squeue", "-h"), "Slurm is done with it")
            nothing_left(slurm)

    def test_faults_at_random_while_a_sites_agents_lend(slurm):
        dice = random.Random(SEED)
        with Service(slurm) as service, Borrower(slurm, service.environment) as program:
            program.has(3)
            jobs: dict[str, int] = {}
            for number in range(FAULTS):
                at_random(dice, program, slurm.names, (*ON_ANY_NODE, *ON_OTHERS, service.killed_agent))
                if (node := dice.choice(slurm.names)) not in jobs:
                    jobs[node] = owner(slurm, node)
                else:
                    slurm.run("scancel", jobs.pop(node))
                if number % 10 == 9:
                    slurm.run("scancel", "--state=RUNNING", "--user", getpass.getuser())
                    jobs.clear()
                    program.has(3)
            slurm.run("scancel", "--state=RUNNING", "--user", getpass.getuser())
            program.end()
            service.close()
        slurm.wait_until(lambda: not slurm.run("squeue", "-h"), "Slurm is done with all jobs")
        nothing_left(slurm, noted=True)

    def test_faults_at_random_while_pilots_lend(slurm):
        dice = random.Random(SEED)
        with Pilots(slurm, "--nodes-max", 3, "--lengths", "10,20") as pilots:
            environment = pilots.environment()
            with Borrower(slurm, {**environment, **IMPATIENT}) as program:
                program.has(3)
                for number in range(FAULTS):
                    at_random(dice, program, slurm.names, (*ON_ANY_NODE, *ON_OTHERS))
                    if dice.random() < 0.2 and (jobs := pilots_of(slurm)):
                        slurm.run("scancel", dice.choice(jobs))
                    if number % 10 == 9:
                        program.has(3)
                program.end()
            pilots.close()
        nothing_left(slurm)
        slurm.wait_until(lambda: not list(temporary(slurm).iterdir()), "nodes have no files of pilots")
