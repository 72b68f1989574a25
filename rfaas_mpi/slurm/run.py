"""A user's own job: its ranks on some of its cores, workers on the others, a manager for this job alone.

    rfaas slurm run ──┬── rfaas manager                          this node, until the ranks have ended
                      ├── srun --overlap … rfaas slurm agent     one on each node; it says which cores are whose
                      └── srun --cpu-bind=… PROGRAM              the ranks

The only module of this package that starts processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import pwd
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from rfaas_mpi.config import Settings, environment
from rfaas_mpi.errors import ConfigError, RFaaSError, ServiceError
from rfaas_mpi.slurm import facts, layout
from rfaas_mpi.slurm.facts import Until
from rfaas_mpi.slurm.layout import NodeLayout
from rfaas_mpi.slurm.reader import EVERY_S, Reader

__all__ = ["NARROWING", "Manager", "NodePlan", "Plan", "Said", "Wanted", "ask", "asking", "clear", "clear_killed", "cpus_here",
           "held", "listen_at", "planned_starts", "private", "read", "rfaas", "run", "seen", "told_to_end"]

# When a job ends is looked at after a sixth of the time that it has left, and at least once a minute.
_LOOK_PART, _LOOK_MAX_S = 6, 60.0
_COMMAND_S = 30.0
_LEAVE_S = 10.0
_YOUNG_S = 60.0
_PR_SET_PDEATHSIG = 1
# What makes srun kill its tasks, where they should have the time to end that Slurm gives them.
_KILLS_STEPS = (signal.SIGTERM, signal.SIGHUP)
# With these srun takes fewer CPUs for a step than its job has.
NARROWING = frozenset(("SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_TASK", "SLURM_EXACT", "SLURM_THREADS_PER_CORE",
                        "SLURM_NTASKS_PER_CORE", "SLURM_NTASKS_PER_SOCKET", "SLURM_HINT"))
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Wanted(msgspec.Struct, frozen=True):
    """What the user wants: how many ranks (None: what the job was submitted with) and workers (None: all that is left).

    `mpi` is srun's; with a `launcher` it is that mpiexec which starts the ranks, and not srun.
    """

    command: tuple[str, ...]
    workers: int | None = None
    ranks: int | None = None
    mpi: str | None = None
    launcher: str | None = None


class NodePlan(msgspec.Struct, frozen=True):
    """What an agent has to know of its node: the job's CPUs there, by Slurm's numbers, and who is to have them."""

    ids: tuple[int, ...]
    address: str
    ranks: int
    threads: int
    workers: int | None


class Plan(msgspec.Struct, frozen=True):
    """What agents are told first, over their stdin; a line with an Until for each change of their job's end follows.

    `key` is what proves to the manager whose they are; empty for none.
    """

    manager: str
    directory: str
    key: bytes
    until: Until
    nodes: dict[str, NodePlan]


class Said(msgspec.Struct, frozen=True):
    """What an agent says, a line each: how its node is laid out, and then that it serves; or what is wrong."""

    layout: NodeLayout | None = None
    ready: str = ""
    error: str = ""
    hint: str = ""


def run(wanted: Wanted, environ: Mapping[str, str], progress: Callable[[str], None]) -> int:
    """Runs the command as the ranks of the job that this is in; their exit status.

    Raises ConfigError outside a job, or where its ranks need more cores than it has, and
    ServiceError where Slurm, the manager or an agent can't do its part.
    """
    if wanted.mpi is not None and wanted.launcher is not None:
        raise ConfigError("--mpi is srun's, and --launcher has another program start the ranks", hint="give one of them")
    if wanted.launcher is not None and shutil.which(wanted.launcher) is None:
        raise ConfigError(f"there is no launcher {wanted.launcher}",
                          hint="--launcher names MPICH's or Open MPI's mpiexec, with its path where PATH hasn't got it")
    job = facts.allocation(environ, wanted.ranks)
    threads = _threads(environ)
    if not any(job.tasks):
        raise ConfigError("no ranks are wanted", hint="--ranks 1, or more")
    with told_to_end() as undisturbed, _directory(job.job) as directory, contextlib.ExitStack() as stack, undisturbed:
        # Asked while the manager starts.
        addresses = _started(["scontrol", "show", "node", "-o", ",".join(job.nodes)])
        shown = _started(["scontrol", "show", "job", "-d", "-o", str(job.job)])
        settings = _started(["scontrol", "show", "config"])
        ends = Reader(lambda: _until(job.job), EVERY_S)
        where = facts.node_addresses(_answer(addresses))
        manager = stack.enter_context(Manager(directory, listen_at(job.nodes, where, environ)))
        ids = facts.core_ids(_answer(shown))
        if missing := [node for node in job.nodes if node not in ids or node not in where]:
            raise ServiceError(f"Slurm doesn't say which cores the job has on {', '.join(missing)}",
                               hint="what says `scontrol show job -d $SLURM_JOB_ID`?")
        spare = [max(0, len(ids[node]) - tasks * threads) for node, tasks in zip(job.nodes, job.tasks, strict=True)]
        until = ends.look()
        if until is None:
            raise ServiceError(f"Slurm doesn't say when job {job.job} ends: {ends.error}", hint="does slurmctld answer?")
        plan = Plan(manager.address, str(directory), manager.key, until, {
            node: NodePlan(ids[node], where[node], tasks, threads, workers) for node, tasks, workers in
            zip(job.nodes, job.tasks, layout.workers_of(wanted.workers, spare), strict=True)})
        # Without task/affinity Slurm binds nothing, and each such option is worth a warning to it.
        binds = "task/affinity" in facts.config_value(_answer(settings), "TaskPlugin")
        agents = stack.enter_context(_Agents(plan, directory, binds, environ))
        layouts = agents.wait()
        for each in layouts:
            progress(f"rfaas: {each.node}: ranks on {_cores(each.ranks) or 'none'}; lent: "
                     f"{','.join(map(str, each.lent)) or 'none'}")
        stack.enter_context(_following(ends, until, agents))
        return _ranks(wanted, layouts, binds, {**environ, **manager.environment}, job.job)


def _until(job: int) -> Until:
    """When the job ends. ServiceError where Slurm doesn't say so."""
    shown = read(["squeue", "-h", "-j", str(job), "-o", facts.ENDS])
    return Until(facts.end_of(shown, job), time.time())


@contextlib.contextmanager
def _following(ends: Reader[Until], told: Until, agents: _Agents) -> Iterator[None]:
    """Meanwhile agents are told when their job's end changes, which an administrator may do."""
    over = threading.Event()

    def follow(last: Until) -> None:
        while not over.wait(max(ends.next_in_s, _look_in_s(last, time.time()))):
            now = ends.look()
            if now is not None and now.ends != last.ends:
                agents.tell(now)
            last = now or last

    follower = threading.Thread(target=follow, args=(told,), name="rfaas-job-end", daemon=True)
    follower.start()
    try:
        yield
    finally:
        # Not waited for: it may just be asking Slurm.
        over.set()


def _look_in_s(until: Until, now: float) -> float:
    """When to look again whether a job's end is still the same."""
    left_s = _LOOK_MAX_S if until.ends is None else (until.ends - now) / _LOOK_PART
    return max(EVERY_S, min(_LOOK_MAX_S, left_s))


@contextlib.contextmanager
def told_to_end() -> Iterator[contextlib.AbstractContextManager[object]]:
    """Whoever is told to end before there are ranks to be told ends with all that it has started.

    Gives what is entered last, and so left first: from then on nothing disturbs the clean-up. (Slurm tells twice.)
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def ignore() -> None:
        for number in numbers:
            # Not SIG_IGN: what is started from now on would inherit it.
            signal.signal(number, lambda *_: None)

    def end(number: int, _frame: object) -> None:
        ignore()
        raise SystemExit(128 + number)

    undisturbed = contextlib.ExitStack()
    undisturbed.callback(ignore)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield undisturbed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen_at(nodes: Sequence[str], where: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Where the job's nodes reach this one; "" where this is the only one. ServiceError where nothing leads there."""
    here = environ.get("SLURMD_NODENAME", "")
    if here in nodes:
        return where.get(here, "") if len(nodes) > 1 else ""
    # A shell of salloc is mostly on a node for logins, which is none of the job's.
    first = where.get(nodes[0], nodes[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((first, 9))         # nothing is sent
            return str(way.getsockname()[0])
    except OSError as error:
        raise ServiceError(f"{nodes[0]} ({first}) can't be reached from here: {error}",
                           hint="run it in a script given to sbatch, on a node of the job") from None


def _threads(environ: Mapping[str, str]) -> int:
    text = environ.get("OMP_NUM_THREADS") or "1"
    # With nested parallelism it is a list, of which the first one counts.
    first = text.partition(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={text} is no number of threads", hint="unset it, or set it to 1 or more")
    return int(first)


def _is_young(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime <= _YOUNG_S
    except FileNotFoundError:
        return True


def _cores(ranks: Sequence[Sequence[int]]) -> str:
    return " ".join(",".join(map(str, cores)) for cores in ranks)


def private(path: Path, hint: str = "remove it, or set TMPDIR") -> Path:
    """The directory, made if it isn't there. ConfigError if it isn't this user's alone."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if path.is_symlink() or not path.is_dir() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path} isn't a directory of yours alone", hint=hint)
    return path


def cpus_here() -> list[tuple[int, int, int]]:
    """Of each CPU of this node: its package, its core there, its number."""
    found = []
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*"):
        with contextlib.suppress(OSError):      # it is offline
            package, core = ((path / "topology" / name).read_text() for name in ("physical_package_id", "core_id"))
            found.append((int(package), int(core), int(path.name.removeprefix("cpu"))))
    return found


def clear_killed() -> None:
    """Removes what jobs of this user have left on this node that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"rfaas-slurm-{os.geteuid()}-[0-9]*"):
        if _is_young(left):
            # Who has just made it could not hold it while it is held here.
            continue
        with contextlib.suppress(OSError, ConfigError), contextlib.ExitStack() as stack:
            # Whoever still uses it holds one of them; one that has just been made may not be held yet.
            for each in (private(left), *(path for path in left.iterdir() if path.is_dir())):
                stack.enter_context(held(each))
            if time.time() - left.stat().st_mtime > _YOUNG_S:
                shutil.rmtree(left, ignore_errors=True)


def clear(directory: Path, node: str) -> bool:
    """Removes what a job's agent left on this node that was killed, but for what somebody still uses.

    False where that agent lives: Slurm has not reached it yet.
    """
    # One that somebody else made there stays.
    if directory.is_symlink() or not directory.is_dir() or directory.lstat().st_uid != os.geteuid():
        return True
    try:
        with contextlib.suppress(FileNotFoundError), held(directory / node):
            shutil.rmtree(directory / node, ignore_errors=True)
    except BlockingIOError:
        return False
    with contextlib.suppress(OSError), held(directory):
        shutil.rmtree(directory, ignore_errors=True)
    return True


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A directory that nobody else holds meanwhile; BlockingIOError where somebody does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _directory(job: int) -> Iterator[Path]:
    """Where this job's daemons keep their files on each node; removed in the end. ConfigError where it is in use."""
    path = private(Path(tempfile.gettempdir(), f"rfaas-slurm-{os.geteuid()}-{job}"))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path))
        except BlockingIOError:
            raise ConfigError(f"job {job} has an `rfaas slurm run` already", hint="one after another, or one in each of "
                                                                                 "several jobs") from None
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _dies_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(words: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(words, preexec_fn=_dies_with_us, **options)  # type: ignore[call-overload, no-any-return]
    except FileNotFoundError:
        raise ConfigError(f"there is no {words[0]} here", hint="this has to run where Slurm's commands are") from None


def _started(words: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    return _start(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ask(words: Sequence[str]) -> str:
    """What one of Slurm's commands says. ServiceError where it fails, ConfigError where it isn't there."""
    return asking(words)()


def asking(words: Sequence[str]) -> Callable[[], str]:
    """Starts the command, and gives what waits for what it says. Errors as `ask`'s."""
    return functools.partial(_answer, _started(words))


def read(words: Sequence[str]) -> str:
    """`ask`, for facts: times are seconds since the epoch, and what users have set for their own eyes is no filter."""
    environ = {name: value for name, value in environment().items() if not name.startswith(("SQUEUE_", "SINFO_"))}
    return _answer(_started(words, env={**environ, "SLURM_TIME_FORMAT": "%s"}))


def planned_starts() -> dict[str, float]:
    """Node → when it is needed next, by Slurm's plan for jobs that wait, or by a reservation. ServiceError.

    Seconds since the epoch. Whoever is on a node already has no part in this.
    """
    starts = facts.planned(read(["squeue", "-h", "-a", "-t", "PENDING", "-o", facts.PLANNED]))
    for node, at in facts.reserved(read(["scontrol", "show", "reservation", "-o"])).items():
        starts[node] = min(at, starts.get(node, at))
    return starts


def seen() -> facts.Seen:
    """All that a manager asks of Slurm, once. ServiceError."""
    return facts.Seen(planned_starts(),
                      facts.lending(read(["squeue", "-h", "-a", "-t", facts.HAS_NODES, "-o", facts.COMMENTS])))


def _answer(process: subprocess.Popen[bytes]) -> str:
    try:
        out, err = process.communicate(timeout=_COMMAND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ServiceError(f"{shlex.join(process.args)} took longer than {_COMMAND_S:.0f} s", hint="does slurmctld answer?") from None
    if process.returncode != 0:
        raise ServiceError(f"{shlex.join(process.args)} failed: {err.decode(errors='replace').strip()}",
                           hint="does slurmctld answer?")
    return out.decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_COMMAND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rfaas(*words: str) -> list[str]:
    return [sys.executable, "-m", "rfaas_mpi.cli", *words]


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-2000:].strip()
    return ""


class Manager:
    """A manager for one job, or for one user's pilots: where it listens, and what a rank has to know of it.

    The key lies in its directory, or in the file that is named. ServiceError if it doesn't start.
    """

    def __init__(self, directory: Path, host: str, key: Path | None = None) -> None:
        self._log = directory / "manager.log"
        user = pwd.getpwuid(os.geteuid()).pw_name
        state, path = directory / "manager", directory / "manager.sock"
        key = directory / "key" if key is None else key
        words = rfaas("manager", "--json", "--directory", str(state), "--socket", str(path))
        if host:
            words += ["--listen", f"{host}:0", "--key", f"{user}={key}"]
        with self._log.open("wb") as log:
            # Not the terminal's: Ctrl-C is for the ranks, and this is needed until they have ended.
            self._process = _start(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                                   start_new_session=True)
        try:
            assert self._process.stdout is not None
            said = b""
            for line in _lines(self._process.stdout, Settings.load().start_timeout_s):
                said += line
                if line.startswith(b"}"):
                    break
            else:
                raise ServiceError(f"the manager didn't start: {_tail(self._log)}", hint="try: rfaas manager")
            listening = msgspec.json.decode(said)["listening"]
            self.address = next((each for each in listening if each.startswith("http")), f"unix:{path}")
            self.key = key.read_bytes() if host else b""
        except BaseException:
            self.close()
            raise
        self.environment = {"RFAAS_MANAGER": self.address, "RFAAS_MANAGER_USER": str(os.geteuid())}
        if host:
            self.environment |= {"RFAAS_AUTH": "key", "RFAAS_MANAGER_KEY_FILE": str(key)}

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        _stop(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Agents:
    """The step with an agent on each node."""

    def __init__(self, plan: Plan, directory: Path, binds: bool, environ: Mapping[str, str]) -> None:
        self._plan, self._directory, self._log = plan, directory, directory / "agents.log"
        self._binds = binds
        self._environment = {name: value for name, value in environ.items() if name not in NARROWING}
        with self._log.open("wb") as log:
            # All of the job's CPUs and memory, beside the ranks' step; bound to none.
            self._process = _start([*self._step(plan.nodes), *rfaas("slurm", "agent")], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=log, env=self._environment, start_new_session=True)
        # A thread: of many nodes it is more than a pipe holds, and the step may never begin.
        self._teller = threading.Thread(target=self._tell, name="rfaas-plan", daemon=True)
        self._teller.start()
        self._closing = threading.Event()
        self._unclean = set(plan.nodes)          # where killed agents may have left something
        self._watcher = threading.Thread(target=self._watch, name="rfaas-agents", daemon=True)

    def _step(self, nodes: Collection[str]) -> list[str]:
        """How a step with one task on each of these nodes begins."""
        count = str(len(nodes))
        bind = ["--cpu-bind=none"] if self._binds else []
        some = [] if len(nodes) == len(self._plan.nodes) else [f"--nodelist={','.join(nodes)}"]
        return ["srun", "--overlap", *bind, "--mem=0", "--mpi=none", f"--nodes={count}", *some, f"--ntasks={count}",
                "--ntasks-per-node=1", "--kill-on-bad-exit=0"]

    def _tell(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(self._plan) + b"\n")
            self._process.stdin.flush()

    def tell(self, until: Until) -> None:
        """The job ends at another time than they were told."""
        assert self._process.stdin is not None
        self._teller.join()
        # They may have ended, and a closed step is no news here.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(msgspec.json.encode(until) + b"\n")
            self._process.stdin.flush()

    def wait(self) -> list[NodeLayout]:
        """Of each node, once all agents serve."""
        layouts: dict[str, NodeLayout] = {}
        ready: set[str] = set()
        assert self._process.stdout is not None
        for line in _lines(self._process.stdout, Settings.load().start_timeout_s + _COMMAND_S):
            try:
                said = msgspec.json.decode(line, type=Said)
            except msgspec.DecodeError:
                continue        # a site's own greeting
            if said.error:
                raise ConfigError(said.error, hint=said.hint)
            if said.layout is not None:
                layouts[said.layout.node] = said.layout
            if said.ready:
                ready.add(said.ready)
            if len(ready) == len(self._plan.nodes):
                self._watcher.start()
                return [layouts[node] for node in self._plan.nodes]
        silent = ", ".join(node for node in self._plan.nodes if node not in ready)
        raise ServiceError(f"the agents of {silent} didn't start: {_tail(self._log)}",
                           hint="is the same rfaas_mpi installed under the same path on these nodes?")

    def close(self) -> None:
        """Ends them. Safe to call twice."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._closing.is_set():
            return
        self._closing.set()
        if self._process.returncode is None and self._teller.is_alive():
            _stop(self._process)
        self._teller.join()
        # They leave at the end of what they are told. A srun that is told to end kills them, and what they keep stays.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        _stop(self._process)
        if self._watcher.is_alive():
            self._watcher.join()
        self._process.stdout.close()
        if self._process.returncode != 0 and self._unclean:
            self._clear()

    def _watch(self) -> None:
        """Removes what agents left whose step was cancelled beside the ranks: Slurm kills those without a word before."""
        if self._process.wait() == 0 or self._closing.is_set():
            return
        # Where a node's daemon is just away, later: until it is back its agent may live on, too.
        pause_s = EVERY_S
        while self._clear() and not self._closing.wait(pause_s):
            pause_s = min(2 * pause_s, _LOOK_MAX_S)

    def _clear(self) -> bool:
        """Has nodes remove what killed agents left there; whether any has not yet said that it did."""
        words = [*self._step(sorted(self._unclean)), "--immediate", *rfaas("slurm", "clear", str(self._directory))]
        with self._log.open("ab") as log:
            process = _start(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                             env=self._environment, start_new_session=True)
        assert process.stdout is not None
        for line in _lines(process.stdout, _LEAVE_S):
            self._unclean.discard(line.decode(errors="replace").strip())
        _stop(process)
        process.stdout.close()
        return bool(self._unclean)

    def __enter__(self) -> _Agents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines(stream: IO[bytes], patience_s: float) -> Iterator[bytes]:
    """Whole lines until the stream's end, or until so many seconds have passed."""
    deadline, left = time.monotonic() + patience_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (wait_s := deadline - time.monotonic()) > 0:
            if not selector.select(wait_s):
                continue
            if not (data := os.read(stream.fileno(), 65536)):
                return
            *whole, left = (left + data).split(b"\n")
            yield from whole


def _ranks(wanted: Wanted, layouts: Sequence[NodeLayout], binds: bool, environ: Mapping[str, str], job: int) -> int:
    """Runs the ranks to their end."""
    used = [each for each in layouts if each.ranks]
    # Slurm ignores lists of CPUs where a job has a part of a node, or nodes differ: the shell binds in any case.
    words = [*(_srun(wanted, used, binds) if wanted.launcher is None else _mpiexec(wanted.launcher, used)),
             *layout.wrapper(used), *wanted.command]
    process = _start(words, env=dict(environ))

    def forward(number: int, _frame: object) -> None:
        if number == signal.SIGINT and sys.stdin.isatty():
            return      # the terminal has told srun, too
        if number not in _KILLS_STEPS or wanted.launcher is not None or not _signal_step(job, process.pid, number):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop(process)
    return status if status >= 0 else 128 - status


def _signal_step(job: int, srun: int, number: int) -> bool:
    """Has Slurm send the signal to the ranks that this srun started. False where it can't."""
    try:
        step = facts.step_of(ask(["scontrol", "show", "step", "-o", str(job)]), srun)
        if step:
            ask(["scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", step])
        return bool(step)
    except RFaaSError:
        return False


def _srun(wanted: Wanted, used: Sequence[NodeLayout], binds: bool) -> list[str]:
    count = sum(len(each.ranks) for each in used)
    words = ["srun", f"--nodes={len(used)}", f"--ntasks={count}", f"--nodelist={','.join(each.node for each in used)}",
             f"--ntasks-per-node={max(len(each.ranks) for each in used)}", "--distribution=block"]
    if wanted.mpi is not None:
        words.append(f"--mpi={wanted.mpi}")
    if binds:
        words.append(layout.bind_option(used) or "--cpu-bind=none")
    return words


def _mpiexec(launcher: str, used: Sequence[NodeLayout]) -> list[str]:
    """How an MPI library's own launcher starts so many ranks on each node, bound by nobody but the shell."""
    said = _answer(_started([launcher, "--version"]))
    count = str(sum(len(each.ranks) for each in used))
    hosts = ",".join(f"{each.node}:{len(each.ranks)}" for each in used)
    if "HYDRA" in said:
        return [launcher, "-n", count, "-hosts", hosts, "-bind-to", "none"]
    if "Open MPI" in said or "PRRTE" in said:
        return [launcher, "-n", count, "--host", hosts, "--bind-to", "none"]
    raise ConfigError(f"{launcher} is the launcher of neither MPICH nor Open MPI: {said.strip()[:80]!r}",
                      hint="leave --launcher out, so that srun starts the ranks")
