"""The service's ends of what it started: zygotes, workers, and the locks on lent cores."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rfaas_mpi import config
from rfaas_mpi import messages as msg
from rfaas_mpi.agent.core import KernelMeter, Page
from rfaas_mpi.agent.output import Line, Lines, Listening
from rfaas_mpi.agent.priority import NO_PRIORITY, LowPriority
from rfaas_mpi.agent.reclaim import Clearing
from rfaas_mpi.agent.kernel_files import pid_of, read_text
from rfaas_mpi.agent.spawner import CHANNEL_FD, SETUP_FD, Command, Spawner, SpawnerLost, pack_command
from rfaas_mpi.errors import ServiceError
from rfaas_mpi.session import FileLock

__all__ = ["CoreLocks", "StandIn", "Taking", "WorkerHandle", "ZygoteHandle", "ZygoteKind", "page_of"]

log = logging.getLogger("rfaas_mpi.agent")

PAGE_BYTES = 4096
_PAGE_LOOKS = 100                    # for an invocation that is the same before and after
_METERS_AT = 64                      # of the page, in bytes: what each kernel took (struct rfm_page_kernel)
_METERS = 15
_METER = struct.Struct("<QQ112s")
_CPU_CLOCK = 2                       # with a pid above it: the clock of all that the process used (CPUCLOCK_SCHED)
_PF_EXITING = 0x4                    # of the flags in /proc/PID/stat
_LAST_READS = 4                      # of 256 KiB: users' pipes hold no more than that
_STDERR_KEPT = 8192
_LOG_BURST_BYTES = 64 << 10          # of a zygote's stderr that may come to our log at once …
_LOG_BYTES_PER_S = 256               # … and on and on
_KILLED_S = 10.0


@dataclass(frozen=True)
class ZygoteKind:
    """What must be alike for two ranks to share a zygote."""

    executable: bytes
    flags: tuple[str, ...]
    path: tuple[bytes, ...]
    directory: bytes
    environment: tuple[tuple[bytes, bytes], ...]
    prefix: tuple[str, ...] = ()     # the command that it is started through, as a container
    uid: int | None = None           # of the user as whom a spawner starts it; None: ours
    version: int = 0                 # of the rank's package, which workers share with it to the byte; 0: not known

    @classmethod
    def of(cls, join: msg.Join, device: str | None = None, *, prefix: tuple[str, ...] = (),
           uid: int | None = None, spin_us_max: int | None = None, version: int = 0) -> ZygoteKind:
        """The rank's interpreter, without what belongs to that rank alone. ConfigError for settings that are none.

        `device` is this node's for verbs where the rank is another node's, and means its own.
        Workers spin for as long as the rank wants, and at most for `spin_us_max`.
        """
        return _kind(join.executable, join.flags, join.path, join.directory, join.environment, device, prefix, uid,
                     spin_us_max, version)

    @classmethod
    def _of(cls, executable: bytes, flags: tuple[str, ...], path: tuple[bytes, ...], directory: bytes,
            environment: tuple[tuple[bytes, bytes], ...], device: str | None, prefix: tuple[str, ...],
            uid: int | None, spin_us_max: int | None, version: int) -> ZygoteKind:
        given = {os.fsdecode(name): os.fsdecode(value) for name, value in environment}
        if spin_us_max is not None:
            wanted = config.Settings.load(given).spin_us
            if wanted > spin_us_max:
                log.debug("workers spin for %d us, not the %d us that their rank wants", spin_us_max, wanted)
            # Always said: a file of its user's could say something else.
            given[config.PREFIX + "SPIN_US"] = str(min(wanted, spin_us_max))
        if device is not None:
            given[config.DEVICE_VARIABLE] = device
        made = {**config.scrubbed(given), **dict.fromkeys(config.THREAD_VARIABLES, "1")}
        return cls(executable, flags, path, directory,
                   tuple(sorted((os.fsencode(name), os.fsencode(value)) for name, value in made.items())),
                   prefix, uid, version)

    @functools.cached_property
    def key(self) -> str:
        text = json.dumps([repr(self.executable), self.flags, repr(self.path), repr(self.directory),
                           repr(self.environment), self.prefix, self.uid, self.version])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# Ranks come again and again with the same environment.
_kind = functools.lru_cache(maxsize=32)(ZygoteKind._of)


class StandIn(NamedTuple):
    """Who stands for a zygote's user: what it is taken for (users.Pool), its uid, whether it is to be alone."""

    what: str
    uid: int
    alone: bool


class Program(Protocol):
    """A zygote's process, whoever is its parent."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> object: ...

    def kill(self) -> None: ...


class SpawnedProgram:
    """One that a spawner has started."""

    def __init__(self, spawner: Spawner, number: int, pid: int, pidfd: int) -> None:
        self.spawner = spawner
        self.number = number
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd

    def wait(self, timeout: float | None = None) -> None:
        """subprocess.TimeoutExpired if it has not ended by then."""
        if self._pidfd >= 0:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(None if timeout is None else max(0.0, timeout) * 1000):
                raise subprocess.TimeoutExpired("zygote", timeout or 0.0)
            os.close(self._pidfd)
            self._pidfd = -1

    def kill(self) -> None:
        """SIGKILL."""
        try:
            self.spawner.signal(self.number)
        except SpawnerLost as error:
            log.error("zygote pid=%d: %s", self.pid, error)      # and with it, by the kernel's hand, the zygote


class ZygoteHandle:
    """A zygote process and the channel to it. close() ends it with all of its workers.

    With a spawner it runs as the kind's user, or as the one that stands for him, and only the spawner may signal it.
    """

    def __init__(self, kind: ZygoteKind, now: float, spawner: Spawner | None = None,
                 low: LowPriority = NO_PRIORITY, *, tell_spares: bool = False, memory_bytes: int = 0,
                 deaf: Iterable[int] = (), stands_for: StandIn | None = None) -> None:
        self.kind = kind
        self.stands_for = stands_for
        self._deaf = deaf
        self._memory_bytes = memory_bytes
        self.low = low
        self.spawner = spawner
        self.number = 0                      # the spawner's number for it
        self.ready = False
        self.sandbox: dict[str, Any] = {}
        self.workers: set[int] = set()
        self.idle_since = now
        self.begun_at = now
        self.ready_at: float | None = None
        self.stderr = b""
        self._log_bytes = float(_LOG_BURST_BYTES)
        self._logged_at = now
        self._closed = False
        self.gone = False                    # with all that it started
        self._orders: list[tuple[int, bytes, list[int]]] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors_r, errors_w = os.pipe2(os.O_CLOEXEC)
        setup = os.memfd_create("rfaas-setup", os.MFD_CLOEXEC)
        try:
            with open(setup, "wb", closefd=False) as file:
                file.write(msg.pack_plain(msg.ZygoteSetup(kind.path, kind.environment, low.means or "", low.group,
                                                          tell_spares)))
            # Whatever the rank's interpreter found its packages with.
            environment = dict(kind.environment)
            environment[b"PYTHONPATH"] = b":".join(kind.path)
            self.process: Program = (self._run(environment, theirs.fileno(), errors_w, setup) if spawner is None else
                                     self._have_run(spawner, environment, theirs.fileno(), errors_w, setup))
        except BaseException:
            ours.close()
            os.close(errors_r)
            raise
        finally:
            theirs.close()
            os.close(errors_w)
            os.close(setup)
        if low.entrance >= 0:
            socket.send_fds(ours, [msg.pack_plain(msg.Entrance())], [low.entrance])
        ours.setblocking(False)
        os.set_blocking(errors_r, False)
        self.channel = ours
        self.errors = errors_r

    def _argv(self, channel: int, setup: int, parent: int) -> list[bytes]:
        # Behind a prefix its parent is whatever that starts it from, and has to end with us by itself.
        code = (f"from rfaas_mpi.agent.zygote import main; "
                f"main({channel}, {setup}, {0 if self.kind.prefix else parent})")
        return [*map(os.fsencode, self.kind.prefix), self.kind.executable, *map(os.fsencode, self.kind.flags), b"-P",
                b"-c", code.encode()]

    def _run(self, environment: dict[bytes, bytes], channel: int, output: int, setup: int) -> Program:
        directory = self.kind.directory if os.path.isdir(self.kind.directory) else b"/"
        # It begins with what this thread blocks now.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._deaf)
        try:
            return subprocess.Popen(
                self._argv(channel, setup, os.getpid()), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=directory, env=environment, pass_fds=(channel, setup))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _have_run(self, spawner: Spawner, environment: dict[bytes, bytes], channel: int, output: int, setup: int,
                  ) -> Program:
        assert self.kind.uid is not None
        command = os.memfd_create("rfaas-command", os.MFD_CLOEXEC)
        try:
            with open(command, "wb", closefd=False) as file:
                file.write(pack_command(Command(tuple(self._argv(CHANNEL_FD, SETUP_FD, spawner.pid)),
                                                self.kind.directory, tuple(environment.items()))))
            uid, alone = (self.kind.uid, False) if self.stands_for is None else self.stands_for[1:]
            self.number, pid, pidfd = spawner.zygote(uid, channel, output, setup, command, self._memory_bytes,
                                                     alone=alone)
        finally:
            os.close(command)
        return SpawnedProgram(spawner, self.number, pid, pidfd)

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, pidfd: int, number: int = signal.SIGKILL) -> None:
        """To a process of it, through the pidfd. ProcessLookupError if that is gone, other OSErrors if it is no
        process of its."""
        if self.spawner is None:
            signal.pidfd_send_signal(pidfd, number)
        else:
            self.spawner.signal(self.number, pidfd, number, wait=True)

    def fork(self, order: msg.ForkWorker, fds: list[int]) -> None:
        """Orders a worker; keeps the order, and copies of its descriptors, until the zygote is ready."""
        self.workers.add(order.worker)
        data = msg.pack_plain(order)
        if self.ready:
            socket.send_fds(self.channel, [data], fds)
        else:
            self._orders.append((order.worker, data, [os.dup(fd) for fd in fds]))

    def became_ready(self) -> None:
        """Sends the orders that waited. OSError if it doesn't take them."""
        self.ready = True
        if self.ready_at is None:     # it is its user's, and may say so again and again
            self.ready_at = time.monotonic()
        orders, self._orders = self._orders, []
        try:
            for _, data, fds in orders:
                socket.send_fds(self.channel, [data], fds)
        finally:
            for _, _, fds in orders:
                for fd in fds:
                    os.close(fd)

    def withdraw(self, worker: int) -> bool:
        """Takes an order back that it has not been sent yet; False if there is none."""
        kept = [order for order in self._orders if order[0] != worker]
        taken, self._orders = [order for order in self._orders if order[0] == worker], kept
        for _, _, fds in taken:
            for fd in fds:
                os.close(fd)
        return bool(taken)

    def read_errors(self) -> bytes:
        """What it wrote to stderr, 64 KiB of it at most; its end is remembered for messages, too."""
        said = b""
        try:
            said = os.read(self.errors, 1 << 16)
        except BlockingIOError:
            pass                      # nothing more for now
        except OSError as error:
            log.debug("zygote=%d stderr: %s", self.pid, error)
        self.stderr = (self.stderr + said)[-_STDERR_KEPT:]
        return said

    def loggable(self, said: bytes, now: float) -> bytes:
        """As much of it as one zygote may fill our log with."""
        self._log_bytes = min(_LOG_BURST_BYTES, self._log_bytes + (now - self._logged_at) * _LOG_BYTES_PER_S)
        self._logged_at = now
        kept = said[:int(self._log_bytes)]
        self._log_bytes -= len(kept)
        return kept

    def why(self) -> str:
        """One line about its end, from what it said last."""
        lines = [line for line in self.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"exit status {self.process.returncode}"
        return f"{said} (it runs as uid {self.stands_for.uid}, of this node's pool)" if self.stands_for else said

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        try:
            self.process.wait(0.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def leave(self) -> None:
        """Tells it to end, which it does in a moment if it is ours. close() it then."""
        self.channel.close()

    def close(self, wait_s: float = 2.0) -> None:
        """Safe to call twice; returns when it is gone, killed after `wait_s`."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        for _, _, fds in self._orders:
            for fd in fds:
                os.close(fd)
        self._orders.clear()
        try:
            self.process.wait(wait_s if self.ready else 0.0)
            self.gone = True
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(_KILLED_S)
                self.gone = True
            except subprocess.TimeoutExpired:
                log.error("zygote pid=%d was killed and does not end", self.pid)
        self.read_errors()
        os.close(self.errors)


def page_of(words: Sequence[int]) -> Page:
    """What a worker's page says, whose words may change at any time."""
    for _ in range(_PAGE_LOOKS):
        first = words[0]
        pair = words[1]
        page = Page(first, pair & 0xFFFFFFFF, pair >> 32, words[2], words[3], words[4], words[5], words[6])
        # The limit that was read must be that invocation's.
        if words[0] == first:
            return page
    # None of them lasts, or its user plays with us, who may write there whatever he likes for as long as he likes.
    return Page(0, 0, page.state, page.start_ns, 0, page.exec_ns, page.poll_ns, page.count)


@dataclass
class WorkerHandle:
    """What the service holds for one worker: its socket, page, output pipe and, once forked, pidfd."""

    number: int
    lease: int
    zygote: ZygoteHandle
    agent: socket.socket
    page: mmap.mmap
    output: int
    lines: Lines
    memory_bytes: int = 0
    pid: int = 0
    pidfd: int = -1
    foreign: bool = False            # what its zygote shows as this worker is none of its processes
    frames: msg.FrameReader = field(default_factory=msg.FrameReader)
    ordered_at: float = 0.0
    serves: bool = False             # it said so, or has been given up
    withdrawn: bool = False          # its zygote was never told of it
    closed: bool = False
    seen_cpu_s: float = 0.0
    held: list[tuple[bytes, list[int]]] | None = field(default_factory=list)     # for one that isn't admitted yet

    @classmethod
    def fork(cls, zygote: ZygoteHandle, number: int, lease: int, cores: tuple[int, ...], memory_bytes: int,
             now: float, entrances: Iterable[int] = ()) -> WorkerHandle:
        """Orders the worker from its zygote; it enters its control group by `entrances`, which stay the caller's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        output_r, output_w = os.pipe2(os.O_CLOEXEC)
        page_fd = os.memfd_create("rfaas-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        page = None
        try:
            os.ftruncate(page_fd, PAGE_BYTES)
            fcntl.fcntl(page_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            page = mmap.mmap(page_fd, PAGE_BYTES, mmap.MAP_SHARED)
            zygote.fork(msg.ForkWorker(number, cores, memory_bytes),
                        [theirs.fileno(), page_fd, output_w, *entrances])
        except BaseException:
            ours.close()
            os.close(output_r)
            if page is not None:
                page.close()
            raise
        finally:
            theirs.close()
            os.close(output_w)
            os.close(page_fd)
        ours.setblocking(False)
        os.set_blocking(output_r, False)
        return cls(number, lease, zygote, ours, page, output_r, Lines(now), memory_bytes, ordered_at=now)

    def serves_by(self, starts_s: float, forks_s: float) -> float:
        """When it has to, if its zygote has so long to be ready and then so long for a worker."""
        if self.zygote.ready_at is None:
            return self.zygote.begun_at + starts_s
        return max(self.ordered_at, self.zygote.ready_at) + forks_s

    def read_page(self) -> Page:
        """What it is doing, word by word (each one is read at once)."""
        with memoryview(self.page) as raw, raw.cast("Q") as words:
            return page_of(words)

    def read_kernels(self) -> tuple[KernelMeter, ...]:
        """What each kernel took in it, by the worker's own word."""
        found = []
        for number in range(_METERS):
            exec_ns, count, name = _METER.unpack_from(self.page, _METERS_AT + number * _METER.size)
            if exec_ns or count:
                text = name.partition(b"\0")[0].decode(errors="replace")
                found.append(KernelMeter("".join(each for each in text if each.isprintable()), exec_ns, count))
        return tuple(found)

    def own_cpu_s(self) -> float | None:
        """CPU time of its process alone, asked ten times a second; None: there is none (any more)."""
        if self.pidfd < 0 or self.foreign:
            return None
        try:
            return time.clock_gettime(~self.pid << 3 | _CPU_CLOCK)
        except OSError:
            return None

    def cpu_s(self) -> float:
        """CPU time of its process so far, by the kernel's clock, and of those that it started and that have ended."""
        if self.pidfd >= 0 and not self.foreign:
            children = read_text(Path(f"/proc/{self.pid}/stat")).rpartition(")")[2].split()[13:15]
            try:
                own = time.clock_gettime(~self.pid << 3 | _CPU_CLOCK)
            except OSError:
                return self.seen_cpu_s    # it has ended
            if not self.gone():           # or its number may have been another process's
                now = own + sum(map(int, children)) / os.sysconf("SC_CLK_TCK")
                self.seen_cpu_s = max(self.seen_cpu_s, now)
        return self.seen_cpu_s

    def send(self, frame: bytes, fds: Iterable[int] = ()) -> bool:
        """False if the worker is gone or does not read. Kept for later until it is admitted."""
        if self.held is not None:
            self.held.append((frame, [os.dup(fd) for fd in fds]))
            return True
        try:
            return socket.send_fds(self.agent, [frame], list(fds)) == len(frame)
        except OSError as error:
            log.debug("worker=%d agent socket: %s", self.number, error)
            return False

    def admit(self) -> None:
        """It is where it belongs, in a group that bounds it: ranks may have it."""
        held, self.held = self.held or [], None
        for frame, fds in held:
            self.send(frame, fds)
            for fd in fds:
                os.close(fd)

    def kill(self) -> None:
        """SIGKILL, never to another process that got its number. Where that is refused its zygote is killed."""
        self._signal(signal.SIGKILL)

    def halt(self) -> None:
        """SIGSTOP, the same way."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        if self.pidfd < 0 or self.foreign:
            return
        try:
            self.zygote.signal(self.pidfd, number)
        except ProcessLookupError:
            return                    # gone and reaped already
        except SpawnerLost as error:
            log.error("worker=%d pid=%d: %s", self.number, self.pid, error)
        except OSError as error:
            log.error("worker=%d pid=%d can't be signalled, its zygote pid=%d is killed: %s", self.number, self.pid,
                      self.zygote.pid, error)
            self.foreign = True
            self.zygote.process.kill()

    def clear(self, off: Iterable[int], to: Iterable[int], others: Iterable[int]) -> bool:
        """Once it was killed, takes all of it to other cores; True: nothing of it may run on `off` any more.

        `others` are the pids of its zygote's workers. OSError if it can't be moved.
        """
        if self.zygote.spawner is not None:
            return self.zygote.spawner.clear(self.zygote.number, self.pidfd, off, to)
        leaving = Clearing(self.pid, tuple(off), tuple(to), parent=self.zygote.pid, others=tuple(others))
        try:
            return leaving.cleared()
        finally:
            leaving.close()

    def forked(self, pidfd: int, told: int) -> int:
        """Its process exists: keeps the pidfd; the pid, by the kernel's word. ServiceError if it is no process.

        `told` is what the zygote calls it, which may have a namespace of its own.
        """
        try:
            self.pid = pid_of(pidfd)
        except ProcessLookupError:
            self.pid = told           # ended already
        except ValueError as error:
            os.close(pidfd)
            raise ServiceError(f"what its zygote shows as worker {self.number} is no process: {error}") from None
        self.pidfd = pidfd
        return self.pid

    def verify(self) -> None:
        """Has the spawner say whether that is a process of the zygote's. ServiceError if not."""
        if self.zygote.spawner is None:
            return                    # it is our own user's
        try:
            self.zygote.signal(self.pidfd, signal.SIGCONT)
        except ProcessLookupError:
            self.foreign = not self.gone()
        except OSError as error:
            self.foreign = True
            raise ServiceError(f"worker {self.number} is no process of its: {error}") from None

    def gone(self, wait_s: float = 0.0) -> bool:
        """True once its process has ended, for which it waits so long; true too if it was never forked.

        Of what another user's zygote has not shown the zygote's own end is all that counts.
        """
        if self.foreign or self.pidfd < 0:
            return self.withdrawn or self.zygote.gone or (not self.foreign and self.zygote.spawner is None)
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(max(0.0, wait_s) * 1000))

    def ending(self) -> bool:
        """True once its process has begun to end: the kernel closes its descriptors then."""
        if self.gone():
            return True
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()       # its name is its own to choose, as any bytes
        except (FileNotFoundError, ProcessLookupError):
            return True
        return bool(int(stat.rpartition(b")")[2].split()[6]) & _PF_EXITING)

    def read_output(self, most: int = 1 << 18) -> tuple[bytes, bool]:
        """What it printed, and whether that was all of it for ever."""
        said = b""
        try:
            while len(said) < most:
                piece = os.read(self.output, 1 << 16)
                if not piece:
                    return said, True
                said += piece
        except BlockingIOError:
            pass                      # nothing more for now
        return said, False

    def hear_last(self, now: float) -> list[Line]:
        """What was left when it ended, and no more: another process of its user's may have the pipe, and go on."""
        said: list[Line] = []
        for _ in range(_LAST_READS):
            lines, read, ended = self.hear(now)
            said += lines
            if ended or not read:
                break
        return said + self.lines.flush()

    def hear(self, now: float) -> tuple[list[Line], bool, bool]:
        """Lines that it has printed; whether there was anything to read; whether that was all for ever."""
        data, ended, owner = Listening(self.page).read(self.read_output)
        return self.lines.feed(data, now, owner), bool(data), ended

    def close(self) -> None:
        """Lets go of everything. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        for _, fds in self.held or ():
            for fd in fds:
                os.close(fd)
        self.held = None
        self.agent.close()
        self.page.close()
        os.close(self.output)
        if self.pidfd >= 0:
            os.close(self.pidfd)


class Taking(FileLock):
    """Held for the moment in which a service looks which cores it can have."""

    WAIT_S = 0.5

    def take(self, *, shared: bool = False) -> bool:
        """Waits a little, then goes on without: a stopped service must not stop the others."""
        if self.fd >= 0:
            return True
        try:
            deadline = time.monotonic() + self.WAIT_S
            while not super().take(shared=shared):
                if time.monotonic() > deadline:
                    log.warning("%s is held by another service for long", self.path)
                    return False
                time.sleep(0.001)
        except OSError as error:
            log.warning("%s: %s", self.path, error)
            return False
        return True


class CoreLocks:
    """The cores that this service has lent, locked against the user's other services on this node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held: dict[int, FileLock] = {}

    def take(self, cores: Iterable[int]) -> set[int]:
        """Locks those that can be; returns those that we hold now."""
        held = set()
        for core in cores:
            if core not in self._held:
                lock = FileLock(self.directory / str(core))
                if not lock.take():
                    continue
                self._held[core] = lock
            held.add(core)
        return held

    def keep_only(self, cores: Iterable[int]) -> None:
        """Gives up every lock but these."""
        keep = set(cores)
        for core in [core for core in self._held if core not in keep]:
            self._held.pop(core).close()

    def close(self) -> None:
        self.keep_only(())


def full_cpuset() -> tuple[int, ...]:
    """Every CPU that this process may use, whatever it was bound to; binds it to all of them."""
    possible = Path("/sys/devices/system/cpu/possible")
    last = max(config.core_list(possible.read_text().strip())) if possible.exists() else 1023
    try:
        os.sched_setaffinity(0, range(last + 1))
    except OSError as error:
        log.warning("could not widen the affinity mask: %s", error)
    return tuple(sorted(os.sched_getaffinity(0)))


def oom_kills() -> int:
    """How often the kernel has killed for lack of memory since boot."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)

