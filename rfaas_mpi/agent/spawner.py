"""The small root process beside an agent that serves several users: it starts zygotes as those users, and ends them.

    agent (service user) ── one datagram of fixed size, and descriptors ──▶ spawner (root)
                         ◀── one answer of fixed size, and a pidfd ──────

What is not among its operations can't be asked of it, and what it is asked is checked: it starts
programs only as users from a lowest uid on, signals and moves only what it started, and limits what
it started. It opens no file that a user names: the child that does has become that user before.

The end of the agent, by whatever, is the end of that socket: everything that was started is killed
then. The end of the spawner is that of every zygote, and the agent leaves when it hears of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import logging
import os
import platform
import pwd
import select
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from rfaas_mpi.agent import child
from rfaas_mpi.agent.groups import Group, Roots, maker, remove_stale
from rfaas_mpi.agent.kernel_files import pid_of
from rfaas_mpi.agent.reclaim import Clearing
from rfaas_mpi.errors import ConfigError, ServiceError

__all__ = ["NOBODY", "Answer", "Command", "Ended", "Identity", "Op", "Request", "Spawner", "SpawnerLost", "become_user",
           "identity", "leave_root", "main", "pack_command", "service_identity", "unsafe_places"]

log = logging.getLogger("rfaas_mpi.spawner")

UID_MIN = 1000                       # users begin here
NOBODY = 65534                       # whom files belong to whose owner can't be told here; not served
CPUS_MAX = 1024
FDS_MAX = 8                          # more than any request has: the rest is seen and refused
ANCESTORS_MAX = 1000                 # of a process, up to its zygote: none of ours needs more than a few
ANSWER_S = 10.0                      # a spawner that is silent for so long is given up
START_S = 60.0                       # and one that has not begun
BIND_ROUNDS = 8                      # looks for threads of a process that began during the one before
REMOVE_RETRY_S = 0.002
REMOVE_WAIT_S = 0.02
MAGIC = 0x5053_4652                  # "RFSP"

REQUEST = struct.Struct("<IHHIIIIQ128s128s")
ANSWER = struct.Struct("<IHHIiIQ128s")

# Where the child finds what it was given.
OUTPUT_FD, CHANNEL_FD, SETUP_FD, START_FD = 2, 3, 4, 5

_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1
_LINKS_MAX = 40
_GUEST_OOM_SCORE = "900"             # below the workers' own 1000, far above the owners' jobs


class Op(IntEnum):
    """All that a spawner can be asked."""

    ZYGOTE = 1                       # uid; channel, output, setup, command → pid, pidfd; size_bytes: its limit
                                     # argument 1: of a pool, all else that runs as it ends before
    SIGNAL = 2                       # argument: the signal; a process' pidfd, none: the zygote
    GROUP = 3                        # a worker's control group; size_bytes: its limit; argument 1: low priority
                                     # → descriptors by which processes of its user may enter it
    LIMIT = 4                        # another limit for it
    ENTER = 5                        # a process' pidfd: it moves there
    REMOVE = 6                       # ends what is in it → how often its limit killed
    AFFINITY = 7                     # a process' pidfd, cpus: all of its threads run there only
    CLEAR = 8                        # a killed process' pidfd, cpus, others: it leaves the ones for the others → done
    ENDED = 9                        # told unasked: a zygote is gone; number: its wait status; text: why, if known


# How many descriptors come with each.
_FDS = {Op.ZYGOTE: (4,), Op.SIGNAL: (0, 1), Op.GROUP: (0,), Op.LIMIT: (0,), Op.ENTER: (1,), Op.REMOVE: (0,),
        Op.AFFINITY: (1,), Op.CLEAR: (1,)}
_SIGNALS = frozenset((signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM))


class Request(NamedTuple):
    """One request; a serial of 0 wants no answer."""

    op: int
    serial: int
    zygote: int = 0
    group: int = 0
    uid: int = 0
    argument: int = 0
    size_bytes: int = 0
    cpus: bytes = bytes(CPUS_MAX // 8)
    others: bytes = bytes(CPUS_MAX // 8)

    def pack(self) -> bytes:
        return REQUEST.pack(MAGIC, self.op, self.argument, self.serial, self.zygote, self.group, self.uid,
                            self.size_bytes, self.cpus, self.others)

    @classmethod
    def unpack(cls, data: bytes, fds: int) -> Request:
        """ValueError for what is no request, or not with so many descriptors."""
        if len(data) != REQUEST.size:
            raise ValueError(f"a request of {len(data)} bytes")
        magic, op, argument, serial, zygote, group, uid, size, cpus, others = REQUEST.unpack(data)
        if magic != MAGIC or op not in _FDS:
            raise ValueError(f"a request of kind {op}")
        if fds not in _FDS[Op(op)]:
            raise ValueError(f"{Op(op).name} with {fds} descriptors")
        return cls(op, serial, zygote, group, uid, argument, size, cpus, others)


class Answer(NamedTuple):
    """What became of a request; `error` is an errno, 0 if it was done."""

    op: int
    serial: int
    zygote: int = 0
    error: int = 0
    pid: int = 0
    number: int = 0
    text: str = ""

    def pack(self) -> bytes:
        text = self.text.encode(errors="replace")[:127]
        return ANSWER.pack(MAGIC, self.op, 0, self.serial, self.error, self.zygote, self.number << 32 | self.pid, text)

    @classmethod
    def unpack(cls, data: bytes) -> Answer:
        """ValueError for what is none."""
        if len(data) != ANSWER.size:
            raise ValueError(f"an answer of {len(data)} bytes")
        _, op, _, serial, error, zygote, both, text = ANSWER.unpack(data)
        return cls(op, serial, zygote, error, both & 0xFFFFFFFF, both >> 32,
                   text.rstrip(b"\0").decode(errors="replace"))


class Command(msgspec.Struct, frozen=True):
    """What a zygote is exec'ed from; read by the child that has become the user."""

    argv: tuple[bytes, ...]
    directory: bytes
    environment: tuple[tuple[bytes, bytes], ...]


_decode_command: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def pack_command(command: Command) -> bytes:
    return msgspec.msgpack.encode(command)


@dataclass(frozen=True)
class Ended:
    """A zygote that is gone, with its exit code, negative for a signal."""

    zygote: int
    code: int
    why: str = ""


class SpawnerLost(ServiceError):
    """The spawner ended; without it nothing can be started or ended for other users."""


# --- who a user is --------------------------------------------------------------------------

class Identity(NamedTuple):
    """What a process of that user has."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def identity(uid: int, uid_min: int = UID_MIN) -> Identity:
    """The user's groups as this node's database has them; PermissionError if nothing is started as that user.

    A uid that the database doesn't have gets the group with its own number, if that is nobody else's.
    """
    _check_served(uid, uid_min)
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        try:
            owner = grp.getgrgid(uid).gr_name
        except KeyError:
            return Identity(uid, uid, (uid,))
        raise PermissionError(errno.EPERM, f"this node knows no user with uid {uid}, and the group of that number is "
                                           f"{owner!r}") from None
    if entry.pw_gid == 0:
        raise PermissionError(errno.EPERM, f"uid {uid} has group 0, whose rights kernels must not have")
    groups = {entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)} - {0}
    return Identity(uid, entry.pw_gid, tuple(sorted(groups)))


def _check_served(uid: int, uid_min: int) -> None:
    if uid < max(1, uid_min) or uid >= 0xFFFF_FFFE:
        raise PermissionError(errno.EPERM, f"uid {uid} is not served: users begin at {max(1, uid_min)}")
    if uid == NOBODY:
        raise PermissionError(errno.EPERM, f"uid {uid} is not served: it is nobody's")


def become_user(who: Identity) -> None:
    """This process, and all that it will start, is that user's for ever. OSError if anything of before is left."""
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)
    if (os.getresuid() != (who.uid,) * 3 or os.getresgid() != (who.gid,) * 3
            or set(os.getgroups()) != set(who.groups)):
        raise OSError(errno.EPERM, f"could not become uid {who.uid}")
    status = Path("/proc/self/status").read_text()
    left = [line for line in status.splitlines() if line.startswith(("CapEff", "CapPrm", "CapAmb"))
            and int(line.split()[1], 16) != 0]
    if left:
        raise OSError(errno.EPERM, f"capabilities are left after becoming uid {who.uid}: {', '.join(left)}")


def service_identity(user: str) -> Identity:
    """The service's user, by name or uid. ConfigError if there is none, or it is root."""
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"this node has no user {user!r}, whom service_user names",
                          hint=f"make it: useradd --system --no-create-home {user}") from None
    try:
        return identity(uid, 1)
    except PermissionError as error:
        raise ConfigError(f"service_user={user!r} is not possible: {error.strerror}",
                          hint="name a user of its own, that is neither root nor anybody's") from None


def leave_root(who: Identity, *paths: Path) -> None:
    """Root becomes the service's user for ever, who owns these directories and the files in them from now on.

    ConfigError if that user can't go on, since it may not read what is running here.
    """
    for top in paths:
        try:
            directory = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except NotADirectoryError:
            raise ConfigError(f"{top} is not a directory (a link is not followed)",
                              hint="name the directory itself") from None
        try:
            for name in os.listdir(directory):
                _give(name, directory, who)
            os.chown(directory, who.uid, who.gid)
        finally:
            os.close(directory)
    become_user(who)
    for place in (os.__file__, __file__):
        if not os.access(place, os.R_OK):
            raise ConfigError(f"the service's user (uid {who.uid}) may not read {place}, which it runs",
                              hint="install Python and rfaas_mpi where every user can read them")


def _give(name: str, directory: int, who: Identity) -> None:
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        facts = os.fstat(fd)
        # Whoever was that user before could have left a second name of somebody else's file there.
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1:
            os.chown(f"/proc/self/fd/{fd}", who.uid, who.gid)
    finally:
        os.close(fd)


def unsafe_places(paths: Iterable[str], uid_min: int = UID_MIN) -> list[str]:
    """Of these and what is above them, what a user that is served could change; one line each."""
    found: dict[str, None] = {}
    shared: set[Path] = set()
    for text in paths:
        *above, last = _way_to(Path(text).absolute()) or [Path("/")]
        for place in (*above, last):
            try:
                facts = place.lstat()
            except OSError:
                # What isn't there is not read, but where all may they can make it.
                if place.parent in shared:
                    found[f"{place} can be made by everybody"] = None
                break
            if facts.st_mode & stat.S_ISVTX and facts.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
                shared.add(place)
            if facts.st_uid >= uid_min and facts.st_uid != NOBODY:
                found[f"{place} belongs to uid {facts.st_uid}"] = None
            elif stat.S_ISLNK(facts.st_mode) or facts.st_mode & stat.S_ISVTX and place != last:
                continue              # it is as safe as what it lies in; in there only owners replace what is theirs
            elif facts.st_mode & stat.S_IWOTH:
                found[f"{place} can be written to by everybody"] = None
            elif facts.st_mode & stat.S_IWGRP and facts.st_gid != 0:
                found[f"{place} can be written to by group {facts.st_gid}"] = None
    return list(found)


def _way_to(path: Path) -> list[Path]:
    """Every directory and link that leads there, in the order in which the kernel meets them, and what is there."""
    way, here, left = [Path("/")], Path("/"), list(reversed(path.parts[1:]))
    links = 0
    while left:
        part = left.pop()
        here = here.parent if part == ".." else here / part
        way.append(here)
        try:
            target = Path(os.readlink(here))
        except OSError:
            continue                  # no link
        links += 1
        if links > _LINKS_MAX:
            break                     # the kernel doesn't follow more
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        here = Path("/") if target.is_absolute() else here.parent
    return way


# --- the root process ---------------------------------------------------------------------

@dataclass
class _Zygote:
    number: int
    uid: int
    pid: int
    groups: set[int] = field(default_factory=set)


class _Server:
    """Does what the agent asks, one request after another; knows nothing but what it started."""

    def __init__(self, channel: socket.socket, uid_min: int, never: int, pool: range = range(0)) -> None:
        self.channel = channel
        self.uid_min = uid_min
        self.pool = pool
        self.never = never
        self.pid = os.getpid()
        # The agent is in the same group, and may not stay there either.
        self.roots = Roots.find().settle(self.pid, os.getppid())
        self.maker = maker()
        self.zygotes: dict[int, _Zygote] = {}
        self.groups: dict[int, Group] = {}
        self.removing: list[Group] = []

    def serve(self) -> None:
        """Until the agent is gone; then nothing of what was started is left."""
        wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        selector = selectors.DefaultSelector()
        selector.register(self.channel, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        try:
            while True:
                ready = selector.select(REMOVE_RETRY_S if self.removing else None)
                for key, _ in ready:
                    if key.fileobj is self.channel:
                        if not self._hear():
                            return
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_r, 4096)
                        self._reap()
                self.removing = [group for group in self.removing if not group.remove()]
        finally:
            self._end_all()

    def _hear(self) -> bool:
        try:
            data, fds, flags, _ = socket.recv_fds(self.channel, REQUEST.size + 1, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        if not data:
            return False
        passed: list[int] = []
        request = Request(0, 0)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("a request that is too long")
            request = Request.unpack(data, len(fds))
            answer = self._do(request, fds, passed)
        except (OSError, ValueError) as error:
            number = error.errno or errno.EIO if isinstance(error, OSError) else errno.EINVAL
            text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            log.warning("refused op=%d zygote=%d group=%d uid=%d: %s", request.op, request.zygote, request.group,
                        request.uid, text)
            answer = Answer(request.op, request.serial, request.zygote, number, text=text)
        finally:
            for fd in fds:
                os.close(fd)
        try:
            if request.serial or answer.error == errno.EINVAL:
                self._tell(answer, passed)
        finally:
            for fd in passed:
                os.close(fd)
        return True

    def _tell(self, answer: Answer, fds: list[int]) -> None:
        with contextlib.suppress(ConnectionError):       # it is gone: the next read says so
            socket.send_fds(self.channel, [answer.pack()], fds)

    # ---- operations ------------------------------------------------------------------------

    def _do(self, request: Request, fds: list[int], passed: list[int]) -> Answer:
        done = Answer(request.op, request.serial, request.zygote)
        match request.op:
            case Op.ZYGOTE:
                pid = self._start(request, fds)
                passed.append(os.pidfd_open(pid))
                return done._replace(pid=pid)
            case Op.SIGNAL:
                self._signal(request, fds)
            case Op.GROUP:
                passed += self._make_group(request)
            case Op.LIMIT:
                self._group(request).limit(request.size_bytes)
            case Op.ENTER:
                self._group(request).enter(self._own(self._zygote(request), fds[0]))
            case Op.REMOVE:
                return done._replace(number=self._remove(request))
            case Op.AFFINITY:
                self._bind(self._own(self._zygote(request), fds[0]), _cpus(request.cpus))
            case Op.CLEAR:
                return done._replace(number=self._clear(request, fds[0]))
        return done

    def _zygote(self, request: Request) -> _Zygote:
        found = self.zygotes.get(request.zygote)
        if found is None:
            raise ProcessLookupError(errno.ESRCH, f"there is no zygote {request.zygote}")
        return found

    def _group(self, request: Request) -> Group:
        found = self.groups.get(request.group)
        if found is None or request.group not in self._zygote(request).groups:
            raise FileNotFoundError(errno.ENOENT, f"zygote {request.zygote} has no group {request.group}")
        return found

    def _own(self, zygote: _Zygote, pidfd: int) -> int:
        """The pid of a process that descends from us and is that zygote's user's. PermissionError for any other."""
        pid = pid_of(pidfd)
        why_not = self._why_foreign(zygote, pid)
        # Once it is gone its number may be another one's, which was what we looked at.
        if pid_of(pidfd) != pid:
            raise ProcessLookupError(errno.ESRCH, "the process is gone")
        if why_not:
            raise PermissionError(errno.EPERM, why_not)
        return pid

    def _why_foreign(self, zygote: _Zygote, pid: int) -> str:
        """Why the process is none that the zygote could have started, or ""."""
        try:
            uids, parent = _uids_and_parent(pid)
            if uids != {zygote.uid}:
                return f"pid {pid} is not a process of uid {zygote.uid}"
            for _ in range(ANCESTORS_MAX):
                if parent == self.pid:
                    return ""
                if parent <= 1:
                    return f"pid {pid} was not started here"
                _, parent = _uids_and_parent(parent)
        except ProcessLookupError:
            return f"who started pid {pid} ended meanwhile"
        return f"pid {pid} has more than {ANCESTORS_MAX} ancestors"

    def _start(self, request: Request, fds: list[int]) -> int:
        if request.zygote in self.zygotes or not request.zygote:
            raise FileExistsError(errno.EEXIST, f"zygote {request.zygote} exists already")
        if self.pool and request.uid not in self.pool:
            raise PermissionError(errno.EPERM, f"uid {request.uid} is not served: workers run as the users "
                                               f"{self.pool[0]}-{self.pool[-1]}")
        lowest = self.pool[0] if self.pool else self.uid_min
        _check_served(request.uid, lowest)
        if request.uid == self.never:
            raise PermissionError(errno.EPERM, f"uid {request.uid} is not served: it is the agent's own")
        group = None
        if self.roots.memory is not None:
            group = Group.make(f"{self.maker}-z{request.zygote}", self.roots, request.size_bytes)
        pid = os.fork()
        if pid == 0:
            _become_zygote(request.uid, lowest, fds, self.pid, group, alone=bool(self.pool) and request.argument == 1)
        self.zygotes[request.zygote] = _Zygote(request.zygote, request.uid, pid)
        if group is not None:
            self.groups[-request.zygote] = group
        log.info("zygote=%d uid=%d pid=%d started", request.zygote, request.uid, pid)
        return pid

    def _signal(self, request: Request, fds: list[int]) -> None:
        if request.argument not in _SIGNALS:
            raise PermissionError(errno.EPERM, f"signal {request.argument} is not sent")
        zygote = self._zygote(request)
        if not fds:
            # Our own child: its number is its own until we reap it.
            os.kill(zygote.pid, request.argument)
            return
        try:
            self._own(zygote, fds[0])
        except ProcessLookupError:
            raise
        except (OSError, ValueError):
            if request.argument == signal.SIGKILL:
                # It passed off as its own what isn't. What it did start ends with it, whatever that is.
                log.error("zygote=%d uid=%d is ended: what is to be killed is not its own", zygote.number, zygote.uid)
                os.kill(zygote.pid, signal.SIGKILL)
            raise
        signal.pidfd_send_signal(fds[0], request.argument)

    def _make_group(self, request: Request) -> list[int]:
        zygote = self._zygote(request)
        if request.group in self.groups or not 0 < request.group < 1 << 31:
            raise FileExistsError(errno.EEXIST, f"group {request.group} exists already")
        group = Group.make(f"{self.maker}-w{request.group}", self.roots, request.size_bytes,
                           low=request.argument == 1)
        self.groups[request.group] = group
        zygote.groups.add(request.group)
        try:
            return group.entrances(zygote.uid)
        except BaseException:
            self._remove(request)     # who asked is told that there is none
            raise

    def _remove(self, request: Request) -> int:
        group = self._group(request)
        kills = group.oom_kills()
        self._zygote(request).groups.discard(request.group)
        del self.groups[request.group]
        # Who asked lends its cores to others next. What was killed needs a moment to end.
        until = time.monotonic() + REMOVE_WAIT_S
        while not group.remove():
            if time.monotonic() > until:
                self.removing.append(group)
                break
            time.sleep(REMOVE_RETRY_S / 4)
        return min(kills, 0xFFFF)

    def _clear(self, request: Request, pidfd: int) -> bool:
        zygote, off, to = self._zygote(request), _cpus(request.cpus), _cpus(request.others)
        cleared = True
        try:
            pid = self._own(zygote, pidfd)
            with contextlib.closing(Clearing(pid, off, to, parent=zygote.pid)) as clearing:
                cleared = clearing.cleared()
            for group in [self.groups[number] for number in zygote.groups]:
                if pid in group.members():
                    # It runs nothing more of its user's, and the memory that it holds is wanted.
                    group.hurry()
        except ProcessLookupError:
            log.debug("zygote=%d it is gone", zygote.number)
        # What it left behind may have come to us while we looked.
        strays = self._end_strays()
        for stray in strays:
            with contextlib.suppress(OSError):
                self._bind(stray, to)
        return cleared and not strays

    def _bind(self, pid: int, cpus: list[int]) -> None:
        # A thread that another one starts meanwhile has inherited either mask. Who starts them without end is not
        # waited for.
        done: set[int] = set()
        for _ in range(BIND_ROUNDS):
            threads = {int(name) for name in os.listdir(f"/proc/{pid}/task")} - done
            if not threads:
                return
            for thread in threads:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, cpus)
            done |= threads

    # ---- ends ------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Tells of zygotes that ended; ends what they left, which has come to us, the subreaper."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                break
            zygote = next((each for each in self.zygotes.values() if each.pid == pid), None)
            if zygote is None:
                continue
            del self.zygotes[zygote.number]
            own = self.groups.get(-zygote.number)
            why = "it held more memory than a zygote may" if own is not None and own.oom_kills() else ""
            for number in (*zygote.groups, -zygote.number):
                group = self.groups.pop(number, None)
                if group is not None and not group.remove():
                    self.removing.append(group)
            code = os.waitstatus_to_exitcode(status)
            log.info("zygote=%d uid=%d pid=%d ended: %d", zygote.number, zygote.uid, pid, code)
            self._tell(Answer(Op.ENDED, 0, zygote.number, number=code & 0xFFFF, text=why), [])
        self._end_strays()

    def _end_strays(self) -> list[int]:
        """Kills what has come to us and is no zygote; a zygote that takes in its own has none of them come."""
        known = {zygote.pid for zygote in self.zygotes.values()}
        strays = [pid for pid in _children(self.pid) if pid not in known]
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return strays

    def _end_all(self) -> None:
        """Kills everything that we started, until nothing is left of it."""
        for group in self.groups.values():
            with contextlib.suppress(OSError):
                group.kill()
        while True:
            # What a killed process leaves behind comes to us, and is next.
            for pid in _children(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                break
        for group in (*self.groups.values(), *self.removing):
            try:
                group.close()
            except OSError as error:
                log.error("%s", error)
        self.groups.clear()
        self.zygotes.clear()


def _cpus(mask: bytes) -> list[int]:
    return [cpu for cpu in range(CPUS_MAX) if mask[cpu // 8] >> cpu % 8 & 1]


def _mask(cpus: Iterable[int]) -> bytes:
    mask = bytearray(CPUS_MAX // 8)
    for cpu in cpus:
        mask[cpu // 8] |= 1 << cpu % 8
    return bytes(mask)


def _uids_and_parent(pid: int) -> tuple[set[int], int]:
    try:
        # Bytes, since a process may give itself any name; the kernel escapes only the ends of lines in it.
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f"pid {pid} is gone") from None
    facts = dict(line.split(b":", 1) for line in status.split(b"\n") if b":" in line)
    return {int(word) for word in facts[b"Uid"].split()}, int(facts[b"PPid"])


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _leave_keyring() -> None:
    """A session keyring of its own, so that none of root's keys is at hand. Kernels without keys have none to give."""
    number = _KEYCTL.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None, use_errno=True).syscall(
            ctypes.c_long(number), ctypes.c_ulong(_JOIN_SESSION_KEYRING), ctypes.c_void_p(None))


def _become_zygote(uid: int, uid_min: int, fds: list[int], parent: int, group: Group | None, *, alone: bool) -> None:
    """In the fork: becomes the user, then the program. Never returns; what goes wrong is said on the output.

    `alone`: nothing else of that user's runs on, who stood for somebody else before.
    """
    status = 127
    try:
        os.setsid()
        # Out of the way of the numbers that they get.
        channel, output, setup, start = (os.dup(fd) if fd > 16 else _above(fd) for fd in fds)
        null = _above(os.open("/dev/null", os.O_RDWR))
        for fd, to in ((null, 0), (output, 1), (output, OUTPUT_FD), (channel, CHANNEL_FD), (setup, SETUP_FD),
                       (start, START_FD)):
            os.dup2(fd, to, inheritable=to != START_FD)
        child.close_all_but((CHANNEL_FD, SETUP_FD, START_FD))
        if group is not None:
            group.enter()
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_GUEST_OOM_SCORE)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o077)
        _leave_keyring()
        # The node's database may ask other nodes: only this child waits for them.
        become_user(identity(uid, uid_min))
        child.gain_no_privileges()
        if alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)      # all that we may signal: of a user of the pool, and not this process
        # Becoming another user has undone it, if it was set.
        child.die_with_parent(parent)
        with open(START_FD, "rb") as file:
            file.seek(0)
            command = _decode_command.decode(file.read())
        status = 126
        try:
            os.chdir(command.directory)
        except OSError:
            os.chdir("/")
        os.execve(command.argv[0], command.argv, dict(command.environment))
    except BaseException as error:
        os.write(OUTPUT_FD, f"{socket.gethostname()}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(status)


def _above(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def main(fd: int, uid_min: int, never: int, pool: range = range(0)) -> None:
    """Entry of the exec'ed root process: never returns. `fd` is the socket to the agent, which is to run as `never`."""
    os.set_inheritable(fd, False)
    channel = socket.socket(fileno=fd)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    status = 1
    try:
        os.chdir("/")
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # The agent decides when we end.
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("-900")
        child.name_process("rfaas-spawner")
        child.adopt_orphans()
        server = _Server(channel, uid_min, never, pool)
        for name in remove_stale(server.roots):
            log.warning("ended what was left in %s, by one before", name)
        server._tell(Answer(0, 0, text=server.roots.why_not), [])
        server.serve()
        status = 0
    except BaseException:
        log.exception("the spawner ends")
    finally:
        os._exit(status)


# --- the agent's end ------------------------------------------------------------------------

class Spawner:
    """The agent's end of it: each call asks and waits for the answer. close() ends everything that was started.

    Calls raise OSError with the reason where the spawner refuses, SpawnerLost where it is gone.
    """

    def __init__(self, channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.channel = channel
        self.pid = process.pid
        self._process = process
        self.why_no_groups = ""
        self._serial = 0
        self._ended: list[Ended] = []
        self._next_zygote = 1

    @classmethod
    def start(cls, uid_min: int = UID_MIN, never: int = 0, pool: range = range(0)) -> Spawner:
        """Started by root, before it becomes the service's user `never`. ServiceError where that can't be done safely.

        No program is started as a user below `uid_min`, or as `never`, who could end the agent; with a pool, as none
        but its users.
        """
        if os.geteuid() != 0:
            raise ServiceError("only root can start programs as other users",
                               hint="start the agent as root, with RFAAS_SERVICE_USER naming the user that it becomes")
        package = str(Path(__file__).parents[2])
        path = [package, *(entry for entry in sys.path if entry and os.path.isabs(entry) and entry != package)]
        ours = (str(Path(__file__).parent), str(Path(msgspec.__file__).parent))
        if unsafe := unsafe_places((sys.executable, *path, *ours), min((uid_min, *pool[:1]))):
            raise ServiceError(f"an agent for several users would run as root what one of them can change: {unsafe[0]}",
                               hint="install rfaas_mpi and its Python where only root writes, or raise RFAAS_UID_MIN")
        here, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (f"import sys; sys.path[:] = {path!r}; from rfaas_mpi.agent.spawner import main; "
                f"main({theirs.fileno()}, {uid_min}, {never}, {pool!r})")
        try:
            with theirs:
                process = subprocess.Popen([sys.executable, "-I", "-S", "-B", "-c", code], stdin=subprocess.DEVNULL,
                                           cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
                                           pass_fds=(theirs.fileno(),))
        except BaseException:
            here.close()
            raise
        spawner = cls(here, process)
        try:
            spawner.why_no_groups = spawner._hear(START_S)[0].text
        except SpawnerLost:
            spawner.close()
            raise
        return spawner

    @property
    def has_news(self) -> bool:
        """Whether ended() would tell something that was heard meanwhile, which nobody can wait for."""
        return bool(self._ended)

    def fileno(self) -> int:
        """To wait on: readable when a zygote ended, or the spawner did."""
        return self.channel.fileno()

    def ended(self) -> list[Ended]:
        """Zygotes that are gone, each told once. SpawnerLost if the spawner is."""
        while select.select([self.channel], [], [], 0)[0]:
            self._hear()
        ended, self._ended = self._ended, []
        return ended

    def zygote(self, uid: int, channel: int, output: int, setup: int, command: int,
               memory_bytes: int = 0, *, alone: bool = False) -> tuple[int, int, int]:
        """Starts one as that user: its number, pid and pidfd. `command` is a file with a Command.

        It may hold so much memory, less what its workers do; 0: any amount. `alone`: all else that runs as that user,
        who is one of a pool, is killed before.
        """
        number, self._next_zygote = self._next_zygote, self._next_zygote + 1
        answer, fds = self._ask(Request(Op.ZYGOTE, 0, number, uid=uid, argument=int(alone), size_bytes=memory_bytes),
                                [channel, output, setup, command])
        return number, answer.pid, fds[0]

    def signal(self, zygote: int, pidfd: int = -1, number: int = signal.SIGKILL, *, wait: bool = False) -> None:
        """To a process that it started, else to the zygote itself. Without `wait` a refusal is only logged."""
        fds = [pidfd] if pidfd >= 0 else []
        self._ask(Request(Op.SIGNAL, 0, zygote, argument=number), fds, wait=wait)

    def make_group(self, zygote: int, group: int, memory_bytes: int, *, low: bool = False) -> list[int]:
        """A control group for one worker, of low priority if that is wanted: Group.entrances, for the zygote's user."""
        return self._ask(Request(Op.GROUP, 0, zygote, group, argument=int(low), size_bytes=memory_bytes))[1]

    def limit(self, zygote: int, group: int, memory_bytes: int) -> None:
        """Another limit on a group's memory."""
        self._ask(Request(Op.LIMIT, 0, zygote, group, size_bytes=memory_bytes))

    def enter(self, zygote: int, group: int, pidfd: int, *, wait: bool = True) -> None:
        """Moves the process there."""
        self._ask(Request(Op.ENTER, 0, zygote, group), [pidfd], wait=wait)

    def remove_group(self, zygote: int, group: int) -> int:
        """Ends what is in it; how often the kernel had killed there for lack of memory."""
        return self._ask(Request(Op.REMOVE, 0, zygote, group))[0].number

    def bind(self, zygote: int, pidfd: int, cpus: Iterable[int]) -> None:
        """Has every thread of the process run on these CPUs only."""
        self._ask(Request(Op.AFFINITY, 0, zygote, cpus=_mask(cpus)), [pidfd])

    def clear(self, zygote: int, pidfd: int, off: Iterable[int], to: Iterable[int]) -> bool:
        """Once it was killed: has it, and what it started, end elsewhere; False while it may still run there."""
        return bool(self._ask(Request(Op.CLEAR, 0, zygote, cpus=_mask(off), others=_mask(to)), [pidfd])[0].number)

    def close(self) -> None:
        """Returns when everything that it started, and it itself, is gone. Safe to call twice."""
        if self.channel.fileno() < 0:
            return
        self.channel.close()
        self._process.wait()

    def _ask(self, request: Request, fds: Iterable[int] = (), *, wait: bool = True) -> tuple[Answer, list[int]]:
        serial = 0
        if wait:
            self._serial = serial = self._serial % 0xFFFF_FFFF + 1
        try:
            socket.send_fds(self.channel, [request._replace(serial=serial).pack()], list(fds))
        except OSError as error:
            raise self._lost(str(error)) from None
        if not wait:
            return Answer(request.op, 0), []
        while True:
            answer, passed = self._hear()
            if answer.serial != serial:
                for fd in passed:
                    os.close(fd)
                continue
            if answer.error:
                raise OSError(answer.error, answer.text)
            return answer, passed

    def _hear(self, within_s: float = ANSWER_S) -> tuple[Answer, list[int]]:
        if not select.select([self.channel], [], [], within_s)[0]:
            raise self._lost(f"it was silent for {within_s:g} s")
        try:
            data, fds, _, _ = socket.recv_fds(self.channel, ANSWER.size + 1, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise self._lost(str(error)) from None
        if not data:
            raise self._lost("it ended")
        answer = Answer.unpack(data)
        if answer.op == Op.ENDED:
            code = answer.number - 0x10000 if answer.number >= 0x8000 else answer.number
            self._ended.append(Ended(answer.zygote, code, answer.text))
        return answer, fds

    def _lost(self, why: str) -> SpawnerLost:
        return SpawnerLost(f"the agent's spawner (pid {self.pid}) is lost: {why}",
                           hint="see the agent's log, then start it again")
