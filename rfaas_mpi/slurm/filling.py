"""Keeps pilots in the queue: asks Slurm, and does what pilots.py says, in the foreground until it is told to end.

    rfaas slurm pilots ──┬── rfaas manager                                      unless there is one
                         └── sbatch … srun … rfaas slurm pilot                  an agent on each node, while it is idle
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import secrets
import shlex
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from rfaas_mpi.errors import ConfigError, RFaaSError, ServiceError
from rfaas_mpi.slurm import facts, pilots, run
from rfaas_mpi.slurm.pilots import Cancel, Filling, Preemption, Submit, Wanted
from rfaas_mpi.slurm.reader import Reader

__all__ = ["Line", "fill", "look_up", "own_directory", "own_manager", "pilot_directory", "shorten_logs"]

# So often the manager is asked which agents are there.
_AGENTS_S = 0.5
_LEAVE_S = 5.0
_LOG_BYTES = 1 << 20                 # a longer log is begun anew
_YOUNG_S = 60.0


class Line(msgspec.Struct, frozen=True):
    """How ranks and pilots reach the manager: variables for ranks, options for `rfaas slurm pilot`.

    `agents` says on which nodes this user's agents lend something now, None while the manager can't be reached.
    """

    environment: dict[str, str]
    options: tuple[str, ...]
    agents: Callable[[], frozenset[str] | None]


def look_up(partition: str, qos: str | None) -> Preemption:
    """Whether pilots in this partition would be preempted. ServiceError where Slurm doesn't answer."""
    config = run.ask(["scontrol", "show", "config"])
    partitions = run.ask(["scontrol", "show", "partition", "--oneliner"])
    known, fields = "", "format=Name,Preempt,PreemptMode,UsageFactor"
    # Without accounts (slurmdbd) there are no QOSes, and where there are, they may not be everybody's to see.
    with contextlib.suppress(RFaaSError):
        known = run.ask(["sacctmgr", "--noheader", "--parsable2", "show", "qos", fields])
    return pilots.preemption(partition, config, partitions, known, qos)


@contextlib.contextmanager
def own_directory(named: Path | None, partition: str) -> Iterator[Path]:
    """Where the key and the pilots' logs are, on a file system that all nodes see; removed in the end.

    ConfigError where it isn't this user's alone, or another `rfaas slurm pilots` has it.
    """
    path = (named or Path.home() / ".rfaas" / f"pilots-{partition}").absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.private(path, hint="remove it, or name another --directory")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run.held(path))
        except BlockingIOError:
            raise ConfigError(f"another `rfaas slurm pilots` runs with {path}",
                              hint="end that one, or name another --directory") from None
        _clear(path)
        try:
            yield path
        finally:
            _clear(path)
            # It may be one that was there, with other files in it.
            with contextlib.suppress(OSError):
                path.rmdir()


def _clear(directory: Path) -> None:
    for path in (directory / "key", *directory.glob("pilot-*.log")):
        path.unlink(missing_ok=True)


def shorten_logs(directory: Path) -> None:
    """Pilots add to their node's log, where the one before may have said why it ended."""
    for path in directory.glob("pilot-*.log"):
        with contextlib.suppress(OSError):
            if path.lstat().st_size > _LOG_BYTES:
                os.truncate(path, 0)


@contextlib.contextmanager
def own_manager(directory: Path, partition: str) -> Iterator[run.Manager]:
    """A manager on this node for this user's pilots; its key is in that directory. ServiceError if it doesn't start."""
    known = facts.nodes(run.read(["sinfo", "-h", "-p", partition, "-o", facts.NODES]))
    first = next((node for each in known for node in each.nodes), None)
    if first is None:
        raise ConfigError(f"the partition {partition} has no nodes", hint="what says `sinfo`?")
    where = facts.node_addresses(run.read(["scontrol", "show", "node", "-o", first]))
    # Its ledger may not lie on a file system of several nodes. Nobody else uses it, and one that was killed left it.
    state = Path(tempfile.gettempdir(), f"rfaas-pilots-{os.geteuid()}-{_name_of(directory)}")
    shutil.rmtree(run.private(state))
    try:
        with run.Manager(run.private(state), run.listen_at([first], where, {}), directory / "key") as manager:
            yield manager
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _name_of(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]


@contextlib.contextmanager
def pilot_directory(job: str) -> Iterator[Path]:
    """A pilot's files on its node; removed in the end, and what a killed one left with the next one's beginning."""
    prefix = f"rfaas-pilot-{os.geteuid()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError, ConfigError):
            # One that has just been made isn't held yet, and who made it could not hold it meanwhile.
            if time.time() - left.stat().st_mtime > _YOUNG_S:
                with run.held(run.private(left)):
                    shutil.rmtree(left, ignore_errors=True)
    path = run.private(Path(tempfile.gettempdir(), prefix + job))
    with run.held(path):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def fill(wanted: Wanted, directory: Path, line: Line, ready: Callable[[], None], say: Callable[[str], None]) -> None:
    """Keeps pilots queued until SIGTERM, SIGHUP or Ctrl-C, then cancels them all.

    ServiceError where Slurm doesn't take the first ones; later it is only said, and tried again.
    """
    _Filler(wanted, directory, line, say).run(ready)


class _Filler:
    """Owns the pilots of one directory: those in the queue, and those that run."""

    def __init__(self, wanted: Wanted, directory: Path, line: Line, say: Callable[[str], None]) -> None:
        self._wanted, self._directory, self._line, self._tell = wanted, directory, line, say
        self._user = pwd.getpwuid(os.geteuid()).pw_name
        self._name = f"rfaas-pilot-{_name_of(directory)}"
        self._filling = Filling(wanted, self._user, self._name)
        self._slurm = Reader(self._read)
        self._end = threading.Event()
        self._agents: frozenset[str] = frozenset()
        self._said = ""
        self._was_busy = False
        binds = "task/affinity" in facts.config_value(run.ask(["scontrol", "show", "config"]), "TaskPlugin")
        # All of the job's CPUs and memory, bound to none.
        self._step = ["srun", "--overlap", *(["--cpu-bind=none"] if binds else []), "--mem=0", "--mpi=none",
                      "--nodes=1", "--ntasks=1"]

    def run(self, ready: Callable[[], None]) -> None:
        before = {number: signal.signal(number, lambda *_: self._end.set())
                  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            # Of a command that was killed: they know another manager.
            self._cancel_all()
            self._look()
            if not self._filling.lengths:
                raise ConfigError(f"no pilot is as short as the jobs of {self._wanted.partition} have to be",
                                  hint="name shorter --lengths; what says `sinfo`?")
            ready()
            self._go_on()
        finally:
            try:
                self._cancel_all()
                self._see_them_leave()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _go_on(self) -> None:
        while not self._end.wait(_AGENTS_S):
            try:
                for node in self._changes():
                    self._act(self._filling.left(node, time.monotonic()))
                if not self._slurm.next_in_s:
                    self._look()
                    self._said = ""
            except ServiceError as error:
                # Ctrl-C ends a command of Slurm's, too.
                if not self._end.is_set():
                    self._say(f"{Exception.__str__(error)}; it is tried again")

    def _read(self) -> tuple[tuple[facts.Job, ...], tuple[facts.Nodes, ...]]:
        nodes = facts.nodes(run.read(["sinfo", "-h", "-a", "-o", facts.NODES]))
        mine = {node for each in nodes if each.partition == self._wanted.partition for node in each.nodes}
        beside = sorted({each.partition for each in nodes if not mine.isdisjoint(each.nodes)})
        mark = f"{secrets.token_hex(8)}|"
        jobs = facts.jobs(run.read(["squeue", "-h", "-a", "-p", ",".join(beside or [self._wanted.partition]), "-t",
                                    "PENDING,RUNNING,CONFIGURING,SUSPENDED", "-o", mark + facts.JOBS]), mark)
        return jobs, nodes

    def _look(self) -> None:
        found = self._slurm.look()
        if found is None or self._slurm.error:
            # By what was so a while ago nothing is begun and nothing is ended.
            age_s = self._slurm.age_s
            raise ServiceError(self._slurm.error + ("" if age_s is None else f" (last read {age_s:.0f} s ago)"),
                               hint="does slurmctld answer?")
        jobs, nodes = found
        actions = self._filling.look(jobs, nodes, time.monotonic())
        if self._filling.busy != self._was_busy:
            self._was_busy = self._filling.busy
            self._tell("rfaas: others wait for resources: no pilot waits until they have them" if self._was_busy
                       else "rfaas: nobody waits for resources any more: pilots are queued again")
        self._act(actions)

    def _act(self, actions: Sequence[pilots.Action]) -> None:
        if out := [action.job for action in actions if isinstance(action, Cancel)]:
            # Quietly: one may have ended meanwhile.
            run.ask(["scancel", "--quiet", *out])
        shorten_logs(self._directory)
        for action in actions:
            if isinstance(action, Submit):
                log = f"{self._directory}/pilot-%N.log"
                run.ask(["sbatch", "--parsable", f"--chdir={self._directory}", f"--wrap={self._script(action)}",
                         *pilots.batch_options(action, self._wanted, self._name, log)])

    def _script(self, submit: Submit) -> str:
        words = [*self._step, *run.rfaas("slurm", "pilot"), *self._line.options]
        if self._wanted.time_min is None:
            words.append(f"--minutes={submit.minutes}")
        # A srun that is stopped would not see its step end; tasks hear the signal all the same.
        return f"unset {' '.join(sorted(run.NARROWING))}; trap '' TSTP; exec {shlex.join(words)}"

    def _changes(self) -> list[str]:
        """On which nodes the agent has left; both are said."""
        now = self._line.agents()
        if now is None:
            return []
        for node in sorted(now - self._agents):
            self._tell(f"rfaas: {node} lends")
        gone = sorted(self._agents - now)
        for node in gone:
            self._tell(f"rfaas: {node} has left")
        self._agents = now
        return gone

    def _cancel_all(self) -> None:
        try:
            run.ask(["scancel", "--user", self._user, "--name", self._name])
        except RFaaSError as error:
            self._say(f"pilots may be left (scancel --name {self._name}): {Exception.__str__(error)}")

    def _see_them_leave(self) -> None:
        """They tell the manager what was used."""
        deadline = time.monotonic() + _LEAVE_S
        while self._line.agents() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _say(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self._tell(f"rfaas: {what}")
