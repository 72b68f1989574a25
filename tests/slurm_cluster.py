"""A real Slurm to test on: slurmctld and slurmd of virtual nodes on this machine, everything ended by close().

    slurmctld ── munged (a key and a socket of its own)
      ├── slurmd n1   127.0.0.1, a port of its own
      └── slurmd n2 …

Nodes claim CPUs that they may not have, share the host's processes, and are known to Slurm by name: what is
tested here is who is started where and what becomes of it, not how fast it is. With `bound`
Slurm's own binding works, and with `confined` its control groups do, too; nodes then have no
more CPUs than the host. As root nodes may be virtual ones (`apart`, slurm_nodes.py): each has processes,
files and a network of its own, and slurmctld and the tests' commands a place of theirs in that network.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import slurm_nodes

SLOW = float(os.environ.get("RFAAS_TEST_SLOW", "1"))
GUARD_S = 60.0 * SLOW
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "squeue", "scancel")
CGROUPS = Path("/sys/fs/cgroup")
SEARCH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    return f"there is no {missing[0]}: apt-get install slurmctld slurmd slurm-client munge" if missing else ""


def ports(count: int) -> list[int]:
    """So many ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            # Not closed before all are found, so that they differ.
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def version_2() -> bool:
    """There are control groups of version 2 only."""
    return (CGROUPS / "cgroup.controllers").exists()


class Slurm:
    """A cluster of `nodes` nodes `n1`, `n2`, …, each with `cpus` CPUs, in the partition `batch`.

    `settings` are added to slurm.conf, and lines for other `partitions` (`low PriorityTier=1`), each of all nodes.
    Nodes that are `apart` are called otherwise (`names`), since control groups are named by them. `each` has more words
    about one node after the other (`CpuSpecList=1`).
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, *, bound: bool = False, confined: bool = False,
                 apart: bool = False, settings: Mapping[str, object] | None = None, partitions: Sequence[str] = (),
                 each: Sequence[str] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rfaas-slurm-"))
        self.names = slurm_nodes.names(nodes) if apart else [f"n{number}" for number in range(1, nodes + 1)]
        self.network: slurm_nodes.Network | None = None
        self._apart, self._words = apart, dict[str, tuple[str, ...]]()
        self.environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(self.directory / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "RFAAS_")) and name != "SLURM_CONF"]:
            del self.environment[name]
        self._confined = confined
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for part in ("munge", "state", "log", "spool", "tmp"):
            (self.directory / part).mkdir()
        self.directory.chmod(0o755)
        (self.directory / "munge").chmod(0o755)
        key = self.directory / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name in self.names:
            (self.directory / "spool" / name).mkdir()
            (self.directory / "tmp" / name).mkdir(mode=0o777)
        self._write(cpus, bound, confined, settings or {}, partitions, each)

    def _write(self, cpus: int, bound: bool, confined: bool, settings: Mapping[str, object],
               partitions: Sequence[str], each: Sequence[str]) -> None:
        here, user = socket.gethostname().partition(".")[0], getpass.getuser()
        head = f"{slurm_nodes.NETWORK}.254" if self._apart else "127.0.0.1"
        controller, *daemons = ports(1 + len(self.names))
        lines: dict[str, object] = {
            "ClusterName": "tests", "SlurmctldHost": f"{here}({head})", "SlurmctldPort": controller,
            "SlurmUser": user, "SlurmdUser": user, "AuthType": "auth/munge", "CredType": "cred/munge",
            "AuthInfo": f"socket={self.directory}/munge/socket", "StateSaveLocation": self.directory / "state",
            "SlurmdSpoolDir": self.directory / "spool" / "%n", "TmpFS": self.directory / "tmp" / "%n",
            "SlurmctldPidFile": self.directory / "slurmctld.pid", "SlurmdPidFile": self.directory / "slurmd-%n.pid",
            "SlurmctldLogFile": self.directory / "log" / "slurmctld", "SlurmdLogFile": self.directory / "log" / "%n",
            "ProctrackType": "proctrack/cgroup" if confined else "proctrack/linuxproc",
            "TaskPlugin": "task/cgroup,task/affinity" if confined else "task/affinity" if bound else "task/none",
            "SlurmdParameters": "config_overrides", "MpiDefault": "none", "ReturnToService": 2,
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=1,sched_min_interval=50000,batch_sched_delay=0", "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none", "SlurmdTimeout": 60, "KillWait": 3, "InactiveLimit": 0, "MailProg": "/bin/true",
            **settings,
        }
        text = [f"{name}={value}" for name, value in lines.items()]
        for number, (name, port, more) in enumerate(zip(self.names, daemons, each or [""] * len(self.names),
                                                         strict=True), 1):
            where = (f"NodeHostname={name} NodeAddr={slurm_nodes.NETWORK}.{number}" if self._apart else
                     f"NodeHostname={here} NodeAddr=127.0.0.1")
            text.append(f"NodeName={name} {where} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
                        f"CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=2000 {more}".rstrip())
        text.append("PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        text += [f"PartitionName={partition} Nodes=ALL" for partition in partitions]
        (self.directory / "slurm.conf").write_text("\n".join(text) + "\n")
        # (Version 2: without systemd, Slurm makes its groups itself where systemd would have had it.)
        plugin = "v2\nIgnoreSystemd=yes" if version_2() else "v1"
        (self.directory / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/{plugin}\nCgroupMountpoint={CGROUPS}\nConstrainRAMSpace=no\n"
            f"ConstrainCores={'yes' if confined else 'no'}\n")

    def start(self) -> Slurm:
        """Returns when every node is idle."""
        munge = self.directory / "munge"
        try:
            if self._confined and version_2():
                (CGROUPS / "system.slice").mkdir(exist_ok=True)
                for top in (CGROUPS, CGROUPS / "system.slice"):
                    controllers = (top / "cgroup.controllers").read_text().split()
                    (top / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
            if self._apart:
                self.network = slurm_nodes.Network(self.names, self.directory)
            self._daemon("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                         f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed")
            self.wait_until((munge / "socket").is_socket, "munged listens")
            self._daemon("slurmctld", "-D")
            self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")
            for name in self.names:
                self._daemon("slurmd", "-D", "-N", name, name=name)
            look = ("sinfo", "-h", "-N", "-p", "batch", "-o", "%T")
            self.wait_until(lambda: self.run(*look).split() == ["idle"] * len(self.names), "all nodes are idle")
        except BaseException:
            self.close()
            raise
        return self

    def _daemon(self, *words: str, name: str = "") -> None:
        name = name or words[0]
        self._words[name] = words
        with (self.directory / "log" / f"{name}.out").open("ab") as out:
            ends_with_us = ["setpriv", "--pdeathsig", "TERM", "--"]
            self._daemons[name] = subprocess.Popen(
                [*ends_with_us, *self.at(name, [*ends_with_us, *words])], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", start_new_session=True)

    def at(self, name: str, words: Sequence[object]) -> list[str]:
        """The same command where this node is; of any other name, where users' commands run."""
        if self.network is None:
            return [*map(str, words)]
        return self.network.nodes.get(name, self.network.head).command(words)

    def kill(self, name: str) -> None:
        """SIGKILL to a node's slurmd, or to slurmctld; gone when it returns."""
        daemon = self._daemons.pop(name)
        deadline, pid = time.monotonic() + GUARD_S, daemon.pid
        while not Path(f"/proc/{pid}/comm").read_text().startswith("slurm"):
            # What leads to its node is there first, and then starts it.
            assert time.monotonic() < deadline and daemon.poll() is None, f"{name} can't be found\n{self.said()}"
            started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pid = int(started[0]) if started else pid
        os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def restart(self, name: str) -> None:
        """Starts what was killed; it serves when this returns."""
        log = self.directory / "log" / f"{name}.out"
        begun = log.read_text(errors="replace").count("slurmd started on")
        self._daemon(*self._words[name], name=name)
        if name in self.names:
            self.wait_until(lambda: log.read_text(errors="replace").count("slurmd started on") > begun, f"{name} serves")
        if name == "slurmctld":
            self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")

    def wait_until(self, condition: Callable[[], object], what: str) -> object:
        """The condition's first true value."""
        deadline = time.monotonic() + GUARD_S
        while not (value := condition()):
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} ended, waiting until {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"still not so after {GUARD_S:g} s: {what}\n{self.said()}"
            time.sleep(0.02)
        return value

    def said(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
                         for log in sorted((self.directory / "log").iterdir()))

    def run(self, *words: object, check: bool = True, **changes: str) -> str:
        """What a command says."""
        done = subprocess.run(self.at("", words), env={**self.environment, **changes}, text=True, capture_output=True,
                              timeout=GUARD_S, stdin=subprocess.DEVNULL, cwd=self.directory)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.said()}"
        return done.stdout

    def submit(self, script: str, *options: object, **changes: str) -> int:
        """Has Slurm run a batch script; the job's number. What it prints comes to `output`."""
        file = self.directory / f"job-{secrets.token_hex(4)}.sh"
        file.write_text(script)
        words = ["sbatch", "--parsable", f"--output={self.directory}/job-%j.out", *options, file]
        return int(self.run(*words, **changes).strip())

    def output(self, job: int) -> str:
        """What a job has printed so far."""
        file = self.directory / f"job-{job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def state(self, job: int) -> str:
        """As `scontrol show job` has it, like COMPLETED."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith("JobState="))

    def ended(self, job: int) -> str:
        """How a job ended, once it has."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        return str(self.wait_until(lambda: (state := self.state(job)) in ends and state, f"job {job} has ended"))

    def finish(self, script: str, *options: object, **changes: str) -> str:
        """Runs a batch script that must end well; what it printed."""
        job = self.submit(script, *options, **changes)
        state = self.ended(job)
        assert state == "COMPLETED", f"{state}\n{self.output(job)}\n{self.said()}"
        return self.output(job)

    def close(self) -> None:
        """Ends jobs, then daemons. Safe to call twice."""
        if (controller := self._daemons.get("slurmctld")) is not None and controller.poll() is None:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user", getpass.getuser(), check=False)
                self.wait_until(lambda: not self.run("squeue", "-h").strip(), "no job is left")
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        if self.network is not None:
            self.network.close()
        # Slurm leaves those of its nodes. Another cluster's nodes have the same names.
        mine = self.names if self._confined else ()
        for top in [top for name in mine for kind in (f"slurm_{name}", f"{name}_slurmstepd.scope")
                    for top in CGROUPS.glob(f"*/{kind}")]:
            for group in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                group.rmdir()
            top.rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Slurm:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def cluster(nodes: int = 2, cpus: int = 2, **options: object) -> Iterator[Slurm]:
    """One that is there, or an error that says what is missing."""
    assert not (reason := why_not()), reason
    with Slurm(nodes, cpus, **options) as slurm:  # type: ignore[arg-type]
        yield slurm
