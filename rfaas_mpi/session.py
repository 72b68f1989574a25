"""The rank's side of the service: join it or start it, ask it for leases, dial its workers.

A rank never has to run in time: the end of its connection, whatever the reason,
gives everything back.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from rfaas_mpi import config, remote, skew
from rfaas_mpi import messages as msg
from rfaas_mpi._version import __version__
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import (
    AuthError,
    ClosedError,
    ConfigError,
    ForkedError,
    LeaseDenied,
    NestedError,
    NoService,
    RFaaSError,
    ServiceError,
    ServiceLost,
    TransportError,
    VersionMismatch,
)
from rfaas_mpi.messages import Grant, GrantLease, WorkerEnded, WorkerInfo
from rfaas_mpi.remote import Address
from rfaas_mpi.sealing import Opener, Sealer

__all__ = ["Grant", "GrantLease", "Lent", "Session", "WorkerEnded", "WorkerInfo", "runtime_directory",
           "service_directory"]

log = logging.getLogger("rfaas_mpi.session")

_A = TypeVar("_A", bound=msg.Answer)

# sizeof(sun_path) less the zero byte.
_SOCKET_PATH_MAX = 107
_REMOTE = frozenset(("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "smbfs", "afs", "ceph", "9p", "pvfs2",
                     "orangefs", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "autofs", "dvs", "panfs"))
_REPLY_S = 2.0
_UNIX = "unix:"
_SECRET_MIN = 16                     # bytes that could be guessed prove nothing
_VERDICTS_KEPT = 4096


# ---- runtime files -------------------------------------------------------------------------------

def _filesystem(path: Path) -> str:
    """Type of the filesystem that holds `path`, or "" where it can't be known."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted:
                return right.split()[0]
    except OSError:
        return ""
    return ""


def _ours(path: Path, *, given: bool) -> Path:
    """Creates the directory if missing; ServiceError unless it is a real directory that only we can change."""
    try:
        if given:
            os.makedirs(path.parent, exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ServiceError(f"can't make the runtime directory {path}: {error.strerror}",
                           hint="name another one with RFAAS_RUNTIME_DIR") from None
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ServiceError(f"{path} is not a directory (a link is not followed)",
                           hint="remove it, or name another one with RFAAS_RUNTIME_DIR")
    if found.st_uid != os.geteuid():
        raise ServiceError(f"{path} belongs to uid {found.st_uid}, not to {os.geteuid()}",
                           hint="name another directory with RFAAS_RUNTIME_DIR")
    if given:
        if found.st_mode & 0o022:
            raise ServiceError(f"others may write to {path}", hint=f"chmod go-w {path}")
    elif found.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def runtime_directory(settings: Settings) -> Path:
    """The directory of all services of this user on this node, made if missing.

    `runtime_dir`, else `$XDG_RUNTIME_DIR/rfaas` if that exists, is ours, local and not in the home directory, else
    `/tmp/rfaas-<uid>`; the last one also where the path is too long for a socket. Raises ServiceError if it is
    someone else's, a link, or open to others.
    """
    own = Path(f"/tmp/rfaas-{os.geteuid()}")
    places = config.places(settings)
    if places.given:
        path = Path(os.path.abspath(places.given))
        return _ours(path, given=True) if _fits(path) else _ours(own, given=False)
    if places.xdg:
        xdg = Path(places.xdg)
        try:
            found = os.lstat(xdg)
            home = Path(os.path.expanduser("~")).resolve()
            real = xdg.resolve()
            in_home = home != Path("/") and (real == home or home in real.parents)
            if (stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
                    and not in_home and _filesystem(xdg) not in _REMOTE and _fits(xdg / "rfaas")
                    and os.access(xdg, os.W_OK)):
                return _ours(xdg / "rfaas", given=False)
        except OSError as error:
            log.debug("XDG_RUNTIME_DIR=%s not usable: %s", xdg, error)
    return _ours(own, given=False)


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) + len("/0123456789abcdef/socket") <= _SOCKET_PATH_MAX


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def service_key(settings: Settings) -> str:
    """What makes two ranks share a service: user, node, job or login session, interpreter prefix, version."""
    job = config.slurm_job()
    login = _first_line("/proc/self/sessionid")
    around = f"job {job}" if job else f"login {login}" if login not in ("", "4294967295") else "none"
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    given = config.places(settings).given
    facts = (str(os.geteuid()), socket.gethostname(), _first_line("/proc/sys/kernel/random/boot_id"), namespace,
             around, sys.prefix, __version__, os.path.abspath(given) if given else "")
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def service_directory(settings: Settings) -> Path:
    """The directory of the one service that ranks like this one share, made if missing."""
    return _ours(runtime_directory(settings) / service_key(settings), given=False)


class FileLock:
    """A flock on a file that is never unlinked while locked; close() (or death) gives it up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1

    def take(self, *, shared: bool = False) -> bool:
        """True if it is ours now; never waits."""
        self.close()
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            mine, there = os.fstat(fd), os.stat(self.path, follow_symlinks=False)
            if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        return True

    def wait(self, deadline: float, *, shared: bool = False) -> None:
        """ServiceError if somebody else still holds it at `deadline` (time.monotonic)."""
        pause = 0.001
        while not self.take(shared=shared):
            if time.monotonic() > deadline:
                raise ServiceError(f"another process holds {self.path} and does not let go",
                                   hint=f"`fuser {self.path}` names it")
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- connections ---------------------------------------------------------------------------------

def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes, however slowly they come, before `deadline` (time.monotonic)."""
    data = b""
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the service closed the connection")
        data += piece
    return data


def _connect(path: Path, timeout_s: float, site: Settings | None = None) -> socket.socket:
    """A connection to who listens there: our own user, or one whose daemons these settings let us have to do with.

    An agent proves who it is besides; but a proof could be fetched from it by whoever listens in its place.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(peer[4:8], sys.byteorder)
        if site is not None and uid not in config.site_users(site):
            raise AuthError(f"the agent at {path} runs as uid {uid}",
                            hint=f"if that is right, set RFAAS_MANAGER_USER={uid}")
        if site is None and uid != os.geteuid():
            raise AuthError(f"the service at {path} runs as uid {uid}, not as {os.geteuid()}",
                            hint="name another directory with RFAAS_RUNTIME_DIR")
    except BaseException:
        connection.close()
        raise
    return connection


def _greet(connection: socket.socket, hello: msg.Hello, deadline: float, who: str = "the service") -> msg.Hello:
    """The service's answer; raises what its status means."""
    connection.sendall(hello.pack())
    answer = msg.Hello.unpack(_receive(connection, msg.HELLO.size, deadline))
    if answer.magic != msg.MAGIC:
        raise ServiceError("whoever listens on the service's socket does not speak this protocol")
    match answer.status:
        case msg.HELLO_OK:
            return answer
        case msg.HELLO_VERSION | msg.HELLO_PROTOCOL:
            raise VersionMismatch(f"{who} runs version {skew.text(answer.version)}, this rank {__version__}",
                                  hint=skew.HINT if hello.kind == msg.KIND_LEASE else
                                  "`rfaas down` ends the other one; both nodes need the same version")
        case msg.HELLO_CLOSING:
            raise ConnectionResetError("the service is shutting down")
        case _:
            raise TransportError(f"the service refused: {msg.HELLO_TEXT.get(answer.status, answer.status)}")


def _prove(connection: socket.socket, secret: bytes, roles: tuple[bytes, bytes], nonce: bytes, answer: msg.Hello,
           deadline: float, lease: int = 0, worker: int = 0, before: bytes = b"") -> int:
    """Proves that we know the secret and checks that the service does: HELLO_OK, or the status that it said.

    `before` is sent ahead of the proof. AuthError, without a text, where it says OK and does not know the secret.
    """
    nonces = nonce, answer.nonce
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    connection.sendall(before + msg.proof(secret, roles[0], *nonces, lease, worker))
    status, theirs = msg.PROOF_ANSWER.unpack(_receive(connection, msg.PROOF_ANSWER.size, deadline))
    if status == msg.HELLO_OK and not msg.same_proof(theirs, msg.proof(secret, roles[1], *nonces, lease, worker)):
        raise AuthError
    return status


def _start(directory: Path, settings: Settings, deadline: float) -> None:
    """Starts a service and waits until it listens; the caller holds join.lock."""
    if not sys.executable:
        raise ServiceError("sys.executable is empty: this interpreter can't start the service",
                           hint="start it with `rfaas up`")
    environment = config.scrubbed(config.environment())
    environment["PYTHONPATH"] = os.pathsep.join(_absolute(entry) for entry in sys.path)
    ready, tell = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            with open(directory / "log", "ab") as service_log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "rfaas_mpi.service", "--directory", str(directory),
                     "--ready-fd", str(tell), "--linger-s", str(settings.linger_s),
                     "--zygote-idle-s", str(settings.zygote_idle_s),
                     "--memory-reserve", str(settings.memory_reserve),
                     *(["--low-priority"] if settings.low_priority == "yes" else [])],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=service_log, cwd="/",
                    env=environment, pass_fds=(tell,), start_new_session=True)
        except OSError as error:
            raise ServiceError(f"could not start the service with {sys.executable}: {error}") from error
    finally:
        os.close(tell)
    said = b""
    try:
        os.set_blocking(ready, False)
        while b"\n" not in said:
            try:
                piece = os.read(ready, 4096)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceError(f"the service did not start within {settings.start_timeout_s:g} s",
                                       hint=f"see {directory / 'log'}") from None
                _wait_readable(ready, deadline)
                continue
            if not piece:
                break
            said += piece
    finally:
        os.close(ready)
        # It forks once and its first process ends at once: nothing to reap later.
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if not said.startswith(b"ready"):
        lines = _first_line(str(directory / "log")).splitlines()[-3:]
        why = said.decode(errors="replace").strip() or " / ".join(lines) or f"exit status {process.returncode}"
        raise ServiceError(f"the service did not start: {why}", hint=f"see {directory / 'log'}")


def _wait_readable(fd: int, deadline: float) -> None:
    import select
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll(max(1, min(200, int((deadline - time.monotonic()) * 1000))))


def _interpreter_flags() -> tuple[str, ...]:
    """How this interpreter was started, as far as a kernel can tell the difference."""
    flags = []
    if sys.flags.optimize:
        flags.append("-" + "O" * sys.flags.optimize)
    if sys.flags.isolated:
        flags.append("-I")
    elif sys.flags.no_user_site:
        flags.append("-s")
    if sys.flags.utf8_mode:
        flags += ["-X", "utf8"]
    if sys.flags.dont_write_bytecode:
        flags.append("-B")
    return tuple(flags)


def _absolute(entry: str) -> str:
    # No relative entry outlives a change of directory, and "" means the directory.
    return entry if os.path.isabs(entry) else os.path.join(_directory(), entry)


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def check_workers(workers_min: int, workers_max: int, cores_per_worker: int) -> None:
    """ConfigError for numbers that make no demand."""
    if workers_min < 0 or workers_max < max(1, workers_min) or cores_per_worker < 1:
        raise ConfigError(f"workers=({workers_min}, {workers_max}) with {cores_per_worker} cores each is no demand",
                          hint="0 <= min <= max, max >= 1, cores_per_worker >= 1")


class _Pending:
    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.answer: msg.Answer | None = None


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Lent(Protocol):
    """What a manager says of a lease that it granted (or who holds it, to another process of the user)."""

    @property
    def id(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def grant(self) -> bytes: ...    # b"": it has begun already
    @property
    def secret(self) -> bytes: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...


class Session:
    """One rank's connection to a service of this node or of another one, or to the agent of one lease.

    All methods may be called from any thread, `on_event` is called from the
    session's own reader thread with `Log`, `WorkerReady`, `WorkerEnded`,
    `LeaseEnded` and, last, `ServiceEnded` (see messages.py); it must not call
    methods that wait for an answer.

    Methods raise ServiceLost once the connection is gone, ClosedError after
    close(), ForkedError in a forked child.
    """

    def __init__(self, connection: socket.socket, home: Path | Address, settings: Settings,
                 on_event: Callable[[msg.AnyEvent], None] | None) -> None:
        self.settings = settings
        self.home = home
        self.on_event = on_event
        self.service_pid = 0
        self.number = 0
        self.cores: tuple[int, ...] = ()
        self.spare: tuple[int, ...] = ()
        self.memory_bytes = 0
        self.why_none = ""
        self.host = ""
        self.listen: tuple[Address, ...] = ()
        self.transports: tuple[str, ...] = ()
        self.lost = False
        self.closed = False
        self._connection = connection
        self._socket = home / "socket" if isinstance(home, Path) else None
        self._lent: Lent | None = None
        self._begun: tuple[msg.Use, _Pending] | None = None      # asked for ahead
        self._key = b""
        self._nonces = b"", b""
        self._sealer: Sealer | None = None
        self._opener: Opener | None = None
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._changed = threading.Condition(self._lock)
        self._ended: OrderedDict[tuple[int, int], WorkerEnded] = OrderedDict()
        self._reader: threading.Thread | None = None
        _sessions.add(self)

    # ---- joining ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, settings: Settings | None = None, *, on_event: Callable[[msg.AnyEvent], None] | None = None,
             start: bool = True, observer: bool = False) -> Session:
        """Joins the service that the settings name, else this node's, which is started where none runs.

        `start=False` never starts one. `observer` sessions (the CLI's) get no workers and don't keep the service
        alive. Raises NoService, ServiceError (could not start), AuthError (not ours, or another key),
        VersionMismatch, ConfigError (no such address), NestedError inside a kernel.
        """
        if config.inside_worker():
            raise NestedError("an Executor can't be used inside a kernel",
                              hint="offload from the rank; a kernel computes and returns")
        settings = settings or Settings.load()
        deadline = time.monotonic() + settings.start_timeout_s
        if settings.service:
            return cls._open_remote(settings, Address.parse(settings.service), deadline, on_event, observer)
        for attempt in itertools.count():
            directory = service_directory(settings)
            try:
                return cls._open_once(settings, directory, deadline, on_event, start, observer)
            except (ConnectionError, FileNotFoundError, TimeoutError) as error:
                # It left, or was killed, between our look and our hello.
                if attempt >= 5 or time.monotonic() > deadline or isinstance(error, TimeoutError):
                    raise ServiceError(f"no answer from the service in {directory}: {error}",
                                       hint=f"see {directory / 'log'}; `rfaas down` ends it") from error
        raise AssertionError("unreachable")

    @classmethod
    def _open_once(cls, settings: Settings, directory: Path, deadline: float,
                   on_event: Callable[[msg.AnyEvent], None] | None, start: bool, observer: bool) -> Session:
        path = directory / "socket"
        # Shared: ranks join a living service side by side, and it can't decide
        # to leave while one of them is at it. Exclusive: who starts one.
        with FileLock(directory / "join.lock") as join:
            join.wait(deadline, shared=True)
            connection = cls._try_connect(path, deadline)
            if connection is None:
                if not start:
                    raise NoService("no service runs here", hint="`rfaas up` or an Executor starts it")
                join.wait(deadline)
                connection = cls._try_connect(path, deadline)
                if connection is None:
                    _start(directory, settings, deadline)
                    connection = _connect(path, max(0.1, deadline - time.monotonic()))
            session = cls(connection, directory, settings, on_event)
            try:
                session._join(deadline, observer)
            except BaseException:
                session.close()
                raise
            return session

    @staticmethod
    def _try_connect(path: Path, deadline: float) -> socket.socket | None:
        """None where nobody listens: no socket, or one left by a service that was killed."""
        try:
            return _connect(path, max(0.1, deadline - time.monotonic()))
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    @classmethod
    def _open_remote(cls, settings: Settings, address: Address, deadline: float,
                     on_event: Callable[[msg.AnyEvent], None] | None, observer: bool) -> Session:
        if not settings.key_file:
            raise ConfigError(f"the service at {address} wants to see a key, and no file with one is named",
                              hint="copy the file that `rfaas up --listen` names there, and name the copy with "
                                   "RFAAS_KEY_FILE")
        key = remote.read_key(settings.key_file)
        try:
            connection = remote.connect(address, settings.tcp, deadline)
        except ConnectionRefusedError:
            raise NoService(f"no service listens at {address}",
                            hint="`rfaas up --listen` on that node starts one") from None
        except OSError as error:
            raise ServiceError(f"{address} can't be reached: {error.strerror or error}",
                               hint="is this its address, and does a firewall let it through?") from error
        session = cls(connection, address, settings, on_event)
        session._key = key
        try:
            session._join(deadline, observer)
        except (ConnectionError, TimeoutError) as error:
            session.close()
            if isinstance(error, RFaaSError):
                raise
            raise ServiceError(f"no answer from the service at {address}: {error}",
                               hint="its log says why; `rfaas up --listen` names the directory") from error
        except BaseException:
            session.close()
            raise
        return session

    @classmethod
    def open_lease(cls, lent: Lent, settings: Settings | None = None, *,
                   on_event: Callable[[msg.AnyEvent], None] | None = None, begin: bool = False) -> Session:
        """The session of a lease with its agent; `use()` begins the lease. Its end is the lease's.

        With `begin` the agent is asked to begin it together with the join, so that its workers are being started
        while that is answered; `use()` has the answer then. Dials the addresses in turn until one answers and proves
        that it is the lease's agent, those on this node first. Raises AuthError (it doesn't believe the grant, or
        isn't the agent), ServiceError with each address' reason where nobody is reached, or where the agent can't
        start workers for us; VersionMismatch, NestedError.
        """
        if config.inside_worker():
            raise NestedError("an Executor can't be used inside a kernel",
                              hint="offload from the rank; a kernel computes and returns")
        settings = settings or Settings.load()
        if len(lent.secret) < _SECRET_MIN or len(lent.grant) > msg.GRANT_BYTES_MAX:
            raise AuthError(f"lease {lent.id} came with a secret of {len(lent.secret)} bytes and a grant of "
                            f"{len(lent.grant)}", hint="rank and manager have to run the same version")
        deadline = time.monotonic() + settings.start_timeout_s
        places = _places(lent)
        failures: list[RFaaSError] = []
        for number, place in enumerate(places):
            # One that swallows what it is sent leaves time for the next one.
            until = time.monotonic() + max(0.1, deadline - time.monotonic()) / (len(places) - number)
            try:
                session = cls._open_at(lent, place, settings, until, on_event)
            except RFaaSError as error:
                log.info("lease=%d %s", lent.id, error)
                failures.append(error)
                continue
            try:
                session._enter(deadline, observer=False, begin=begin)
            except (ConnectionError, TimeoutError) as error:
                session.close()
                raise ServiceError(f"{session.name} let us in and said no more: {error}") from error
            except BaseException:
                session.close()
                raise
            return session
        for failure in failures:
            if isinstance(failure, (AuthError, VersionMismatch)):
                raise failure
        raise ServiceError(f"the agent of lease {lent.id} can't be reached: "
                           + ("; ".join(map(Exception.__str__, failures)) or "it told no address"),
                           hint="is the agent's address right, and does a firewall let it through?")

    @classmethod
    def _open_at(cls, lent: Lent, place: Path | Address, settings: Settings, deadline: float,
                 on_event: Callable[[msg.AnyEvent], None] | None) -> Session:
        """A session on which both sides have proved the lease's secret, not joined yet; no failure but RFaaSError."""
        try:
            if isinstance(place, Path):
                connection = _connect(place, max(0.1, deadline - time.monotonic()), settings)
            else:
                connection = remote.connect(place, settings.tcp, deadline)
        except OSError as error:
            if isinstance(error, RFaaSError):
                raise
            raise ServiceError(f"{place}: {error.strerror or error}") from error
        session = cls(connection, place, settings, on_event)
        session._lent, session._key, session._socket = lent, lent.secret, place if isinstance(place, Path) else None
        try:
            session._show_grant(lent, deadline)
        except BaseException as error:
            session.close()
            if isinstance(error, OSError) and not isinstance(error, RFaaSError):
                raise ServiceError(f"{place}: no answer from the agent: {error}") from error
            raise
        return session

    def _show_grant(self, lent: Lent, deadline: float) -> None:
        nonce = os.urandom(16)
        answer = _greet(self._connection, msg.Hello.make(msg.KIND_LEASE, nonce, lease=lent.id), deadline,
                        f"the agent on {lent.host or self.home}, of lease {lent.id},")
        try:
            status = _prove(self._connection, lent.secret, msg.lease_roles(lent.grant), nonce, answer, deadline,
                            lent.id, before=msg.GRANT_LENGTH.pack(len(lent.grant)) + lent.grant)
        except AuthError:
            raise AuthError(f"whoever listens at {self.home} does not know the secret of lease {lent.id}: it is "
                            "not the lease's agent", hint="ask for another lease; tell who runs the cluster") from None
        if status != msg.HELLO_OK:
            raise AuthError(f"the agent at {self.home} does not believe the grant of lease {lent.id}",
                            hint="ask for another lease; the agent's log says why")
        if self.remote:
            self._nonces = nonce, answer.nonce
            self._sealer = Sealer(lent.secret, msg.ROLE_LEASE_RANK, self._nonces)
            self._opener = Opener(lent.secret, msg.ROLE_LEASE_AGENT, self._nonces)

    @property
    def remote(self) -> bool:
        """True if the service is reached over TCP: then it may be another node's."""
        return isinstance(self.home, Address)

    @property
    def directory(self) -> Path:
        """The directory of this node's service."""
        assert isinstance(self.home, Path)
        return self.home

    @property
    def name(self) -> str:
        """The service, for messages."""
        if self._lent is not None:
            return f"the agent of lease {self._lent.id} at {self.home}"
        return f"the service at {self.home}" if self.remote else f"the service (pid {self.service_pid})"

    def at(self, lease: GrantLease) -> Session:
        """The session with the service that a lease is of: this one."""
        return self

    @property
    def way_out(self) -> str:
        """What to do when the service is gone."""
        if self._lent is not None:
            return "ask for another lease"
        if self.remote:
            return "make a new Executor once a service runs there again"
        return "make a new Executor: it starts another one"

    def _join(self, deadline: float, observer: bool) -> None:
        nonce = os.urandom(16)
        answer = _greet(self._connection, msg.Hello.make(msg.KIND_SESSION, nonce), deadline)
        if self.remote:
            self._nonces = nonce, answer.nonce
            self._show_key(nonce, answer, deadline)
            self._sealer = Sealer(self._key, msg.ROLE_SESSION_RANK, self._nonces)
            self._opener = Opener(self._key, msg.ROLE_SESSION_SERVICE, self._nonces)
        self._enter(deadline, observer)

    def _enter(self, deadline: float, observer: bool, *, begin: bool = False) -> None:
        """Joins, once it is known who is who; with `begin` it asks for the lease's begin in the same breath."""
        self._connection.settimeout(None)
        self._reader = threading.Thread(target=self._read, name="rfaas-session", daemon=True)
        self._reader.start()
        join = msg.Join(
            id=next(self._ids), pid=os.getpid(),
            executable=os.fsencode(sys.executable or ""), flags=_interpreter_flags(),
            path=tuple(os.fsencode(_absolute(entry)) for entry in sys.path if isinstance(entry, str)),
            directory=os.fsencode(_directory()),
            environment=config.packed_environment(self.settings.sandbox),
            affinity=tuple(sorted(os.sched_getaffinity(os.getpid()))), lend=self.settings.lend,
            cores=self.settings.cores, observer=observer, package=os.fsencode(Path(__file__).parent))
        if begin:
            use = msg.Use(next(self._ids))
            joined, begun = self._post(join, use)
            self._begun = use, begun
        else:
            (joined,) = self._post(join)
        welcome = self._answer(join, joined, msg.Welcome, max(0.1, deadline - time.monotonic()))
        self.number = welcome.session
        self.service_pid = welcome.service_pid
        self.cores = welcome.cores
        self.spare = welcome.spare
        self.memory_bytes = welcome.memory_bytes
        self.why_none = welcome.why_none
        self.host = welcome.host
        self.listen = tuple(Address.parse(text) for text in welcome.listen)
        self.transports = welcome.transports

    def _show_key(self, nonce: bytes, answer: msg.Hello, deadline: float) -> None:
        file = self.settings.key_file
        hint = "copy the file that `rfaas up --listen` names on that node once more"
        try:
            status = _prove(self._connection, self._key, (msg.ROLE_SESSION_RANK, msg.ROLE_SESSION_SERVICE), nonce,
                            answer, deadline)
        except AuthError:
            raise AuthError(f"whoever listens at {self.home} does not know the key in {file}", hint=hint) from None
        if status == msg.HELLO_REFUSED:
            raise AuthError(f"the service at {self.home} has another key than the one in {file}", hint=hint)
        if status != msg.HELLO_OK:
            raise ServiceError(f"{self.name} refused: {msg.HELLO_TEXT.get(status, status)}")

    # ---- asking ----------------------------------------------------------------------------------

    def request(self, workers_min: int, workers_max: int, cores_per_worker: int = 1,
                memory_per_worker: int | None = None, timeout_s: float | None = None) -> Grant:
        """Leases with workers_min … workers_max workers in all; waits up to `timeout_s` for cores.

        The workers may still be starting: dial them at once, connections wait for them. Raises LeaseDenied with
        what runs out, where not even workers_min can be met in time.
        """
        if timeout_s is None:
            timeout_s = self.settings.lease_timeout_s
        check_workers(workers_min, workers_max, cores_per_worker)
        if memory_per_worker is None:
            memory_per_worker = self.settings.memory_per_worker
        granted = self._ask(msg.LeaseRequest(next(self._ids), workers_min, workers_max, cores_per_worker,
                                             memory_per_worker, timeout_s, self.settings.lease_duration_s),
                            msg.Granted, timeout_s=timeout_s + self.settings.start_timeout_s)
        if not self.remote:
            return Grant(granted.leases, granted.reason)
        return Grant(tuple(msgspec.structs.replace(
            lease, secret=msg.lease_secret(self._key, lease.id, lease.epoch, *self._nonces), endpoint=str(self.home))
            for lease in granted.leases), granted.reason)

    def use(self) -> GrantLease:
        """Begins this session's lease; its workers may be dialled at once. In one that has begun: how it stands.

        Raises LeaseDenied with the agent's reason: too late, its cores are in use or wanted back.
        """
        lent = self._lent
        if lent is None:
            raise ConfigError(f"{self.name} has no lease that waits to be used", hint="request one")
        with self._lock:
            begun, self._begun = self._begun, None
        if begun is None:
            granted = self._ask(msg.Use(next(self._ids)), msg.Granted)
        else:
            granted = self._answer(*begun, msg.Granted)
        if [lease.id for lease in granted.leases] != [lent.id]:
            raise ServiceError(f"{self.name} answered with leases {[lease.id for lease in granted.leases]}")
        return msgspec.structs.replace(granted.leases[0], secret=lent.secret, endpoint=self.endpoint)

    @property
    def endpoint(self) -> str:
        """Where it is reached, as leases name it."""
        return str(self.home) if self.remote else f"{_UNIX}{self.home}"

    def hold(self, lease: GrantLease) -> None:
        """This session keeps the lease from now on, besides those that do: it ends when the last one lets go of it.

        ServiceError where it has ended already.
        """
        self._ask(msg.Hold(next(self._ids), lease.id, msg.hold_proof(lease.secret, lease.id, self.number)), msg.Done)

    def kill(self, lease: GrantLease | int, worker: int, reason: str = "cancel", invocation: int = 0) -> bool:
        """Has the worker killed; with `invocation` only if that one still runs. True if it was killed."""
        return self._ask(msg.KillRequest(next(self._ids), _lease_id(lease), worker, reason, invocation), msg.Done).ok

    def release(self, lease: GrantLease | int) -> None:
        """Gives a lease back; returns when its workers ended and their last lines were delivered, or after 2 s.

        Where other sessions keep it, too, it is theirs from then on.

        Safe for a lease that is gone already, and when the service is.
        """
        if self.closed or self.lost:
            return
        try:
            self._ask(msg.ReleaseRequest(next(self._ids), _lease_id(lease)), msg.Done, timeout_s=_REPLY_S)
        except (TimeoutError, ServiceLost, ClosedError):
            log.debug("lease=%d released without an answer", _lease_id(lease))

    def verdict(self, lease: GrantLease | int, worker: int, timeout_s: float = 5.0) -> WorkerEnded:
        """How a worker ended; waits for the news. ServiceLost if it will never come, TimeoutError if it did not yet."""
        key = (_lease_id(lease), worker)
        with self._changed:
            self._changed.wait_for(lambda: key in self._ended or self.lost or self.closed, timeout_s)
            if key in self._ended:
                return self._ended[key]
        self._alive()
        raise TimeoutError(f"worker {worker} of lease {key[0]} has not ended within {timeout_s:g} s")

    def status(self) -> dict[str, Any]:
        """The service's facts: pid, version, uptime_s, directory, cores, memory, leases, workers, sessions."""
        return self._ask(msg.StatusRequest(next(self._ids)), msg.StatusAnswer).data

    def stay(self) -> None:
        """The service stays without ranks until it is told to go down."""
        self._ask(msg.StayRequest(next(self._ids)), msg.Done)

    def reclaim(self, cores: Iterable[int] = (), grace_s: float = 0.0, *, owned: bool = False) -> msg.Reclaimed:
        """Takes lent cores back, all if none is named; returns once nothing of the service's workers may run there.

        `grace_s` is what running kernels get. With `owned`, because somebody uses those cores already, only workers
        of low priority get it. ServiceError from another node; ValueError for a grace that is not from 0 to a day.
        """
        if not 0 <= grace_s <= msg.GRACE_MAX_S:
            raise ValueError(f"grace_s is {grace_s}; it lies between 0 and {msg.GRACE_MAX_S:g}")
        return self._ask(msg.ReclaimRequest(next(self._ids), tuple(cores), grace_s, owned), msg.Reclaimed,
                         self.settings.start_timeout_s + grace_s)

    def open_door(self, addresses: Iterable[str], key_file: Path | None = None) -> msg.Listening:
        """Has this node's service listen on TCP too, and lend to ranks of other nodes what the settings say.

        `key_file` is made where it is missing; by default it is a file in the service's directory. Raises
        ServiceError for an address that can't be had, AuthError for a key file that others can read.
        """
        request = msg.ListenRequest(
            next(self._ids), tuple(addresses), os.fsencode(os.path.abspath(key_file)) if key_file else b"",
            self.settings.tcp, self.settings.lend, self.settings.cores, self.settings.device)
        return self._ask(request, msg.Listening)

    def down(self, timeout_s: float = 10.0) -> None:
        """Ends the service with everything it started; returns when its process is gone, or has let us go."""
        if self.remote:
            self._down_remote(timeout_s)
            return
        pidfd = _open_pidfd(self.service_pid)
        try:
            try:
                self._ask(msg.DownRequest(next(self._ids)), msg.Done)
            except ServiceLost:
                log.debug("the service went before it answered")
            if pidfd >= 0:
                deadline = time.monotonic() + timeout_s
                if not _wait_exit(pidfd, deadline):
                    raise ServiceError(f"the service (pid {self.service_pid}) did not end within {timeout_s:g} s",
                                       hint=f"kill {self.service_pid}")
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _down_remote(self, timeout_s: float) -> None:
        try:
            self._ask(msg.DownRequest(next(self._ids)), msg.Done)
        except ServiceLost:
            log.debug("the service went before it answered")
        with self._changed:
            # The last thing that it does before it goes.
            if not self._changed.wait_for(lambda: self.lost, timeout_s):
                raise ServiceError(f"{self.name} did not end within {timeout_s:g} s",
                                   hint=f"kill {self.service_pid} on {self.host}")

    def dial(self, lease: GrantLease, worker: int, timeout_s: float | None = None) -> int:
        """An authenticated connection to a worker, as a descriptor that the caller owns (for Invoker.attach).

        Raises TransportError if the worker or lease is gone or does not answer, AuthError if one side does not know
        the lease's secret.
        """
        return self.reach(lease, worker, "shm" if not self.remote else "verbs", timeout_s)[0]

    def reach(self, lease: GrantLease, worker: int, transport: str, timeout_s: float | None = None) -> tuple[int, int]:
        """The connections that a transport needs to a worker, as descriptors that the caller owns.

        The control connection, and, for tcp, the data connection (-1 otherwise). Raises as `dial`.
        """
        self._alive()
        deadline = time.monotonic() + (self.settings.start_timeout_s if timeout_s is None else timeout_s)
        place = self._place(lease, transport)
        if transport != "tcp":
            return self._dial(place, lease, worker, deadline)[0].detach(), -1
        control, pairing = self._dial(place, lease, worker, deadline, data=1)
        try:
            data, _ = self._dial(place, lease, worker, deadline, pairing=pairing)
        except BaseException:
            control.close()
            raise
        return control.detach(), data.detach()

    def _place(self, lease: GrantLease, transport: str) -> Path | Address:
        """Where the workers of a lease are dialled."""
        if lease.endpoint.startswith(_UNIX):
            if transport != "tcp":
                return Path(lease.endpoint.removeprefix(_UNIX))
        elif lease.endpoint:
            if transport == "shm":
                raise ConfigError(f"lease {lease.id} is another node's, at {lease.endpoint}: its workers share no "
                                  "memory with this process", hint=f"use that service: RFAAS_SERVICE={lease.endpoint}")
            return Address.parse(lease.endpoint)
        if isinstance(self.home, Path) and transport == "tcp":
            if not self.listen:
                raise ConfigError("transport tcp needs a service that listens on TCP, and this node's does not",
                                  hint="`rfaas up --listen 127.0.0.1:0` has it do so")
            return remote.local_address(self.listen[0])
        return self._socket or self.home

    def _dial(self, place: Path | Address, lease: GrantLease, worker: int, deadline: float, *, data: int = 0,
              pairing: bytes = b"") -> tuple[socket.socket, bytes]:
        """A connection on which both sides have proved the lease's secret, and the service's nonce on it."""
        try:
            if isinstance(place, Path):
                connection = _connect(place, max(0.1, deadline - time.monotonic()),
                                      self.settings if lease.endpoint else None)
            else:
                connection = remote.connect(place, self.settings.tcp, deadline)
        except OSError as error:
            if isinstance(error, RFaaSError):
                raise
            if isinstance(place, Address):
                raise TransportError(f"worker {worker} of lease {lease.id} can't be reached at {place}: "
                                     f"{error.strerror or error}") from error
            raise ServiceLost(f"the service no longer answers: {error}", hint=self.way_out) from error
        nonce = os.urandom(16)
        if pairing:
            hello = msg.Hello.make_data(nonce, pairing, lease=lease.id, worker=worker)
            roles = msg.ROLE_DATA_RANK + pairing, msg.ROLE_DATA_WORKER + pairing
        else:
            hello = msg.Hello.make(msg.KIND_WORKER, nonce, lease=lease.id, worker=worker, session=self.number,
                                   data=data)
            roles = msg.ROLE_RANK, msg.ROLE_WORKER
        try:
            answer = _greet(connection, hello, deadline)
            status = _prove(connection, lease.secret, roles, nonce, answer, deadline, lease.id, worker)
            if status == msg.HELLO_REFUSED:
                raise AuthError(f"the service says that this is not the secret of lease {lease.id}")
            if status != msg.HELLO_OK:
                raise TransportError(f"worker {worker} of lease {lease.id}: {msg.HELLO_TEXT.get(status, status)}")
            connection.settimeout(None)
            return connection, answer.nonce
        except RFaaSError as error:
            connection.close()
            if type(error) is TransportError:
                raise TransportError(f"worker {worker} of lease {lease.id} can't be reached: {error}") from None
            if isinstance(error, AuthError) and not error.args[0]:
                raise AuthError(f"the service does not know the secret of lease {lease.id}") from None
            raise
        except OSError as error:
            connection.close()
            raise TransportError(f"worker {worker} of lease {lease.id} can't be reached: {error}") from error
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Ends the session; what it still holds is released. Safe to call twice."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("session %d: the connection was down already", self.number)
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(_REPLY_S)
        self._connection.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ----------------------------------------------------------------------------------

    def _alive(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError("this session belongs to the process that opened it",
                              hint="make a new Executor in the child")
        if self.closed:
            raise ClosedError("the session is closed", hint="make a new Executor")
        if self.lost:
            raise ServiceLost(f"{self.name} ended", hint=self.way_out)

    def _ask(self, request: msg.RankRequest, kind: type[_A], timeout_s: float | None = None) -> _A:
        (pending,) = self._post(request)
        return self._answer(request, pending, kind, timeout_s)

    def _post(self, *requests: msg.RankRequest) -> tuple[_Pending, ...]:
        """Sends them, all at once; each is to be followed by `_answer`."""
        self._alive()
        packed = [msg.pack_message(request) for request in requests]
        pending = tuple(_Pending() for _ in requests)
        with self._lock:
            self._pending.update(zip((request.id for request in requests), pending, strict=True))
        try:
            with self._send_lock:
                self._connection.sendall(b"".join(map(self._sealer.seal, packed) if self._sealer else packed))
        except OSError as error:
            if self._reader is None:
                self._lose(str(error))
            else:
                # What it said before it went is still to be read, with the reason; then comes its end.
                try:
                    self._connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    log.debug("session %d: the connection was down already", self.number)
        return pending

    def _answer(self, request: msg.RankRequest, pending: _Pending, kind: type[_A],
                timeout_s: float | None = None) -> _A:
        try:
            if not pending.done.wait(self.settings.start_timeout_s if timeout_s is None else timeout_s):
                raise TimeoutError(f"{self.name} has not answered; is it stopped?")
        finally:
            with self._lock:
                self._pending.pop(request.id, None)
        match pending.answer:
            case None:
                self._alive()
                raise ServiceLost(f"{self.name} ended", hint=self.way_out)
            case msg.Denied(message=message, hint=hint):
                raise LeaseDenied(message, hint=hint)
            case msg.Failed(message=message, hint=hint):
                raise ServiceError(message, hint=hint)
            case answer if isinstance(answer, kind):
                return answer
            case answer:
                raise ServiceError(f"the service answered {type(request).__name__} with {type(answer).__name__}")

    def _read(self) -> None:
        frames = msg.FrameReader()
        why = "it closed the connection"
        try:
            while True:
                data = self._connection.recv(1 << 16)
                if not data:
                    break
                for frame in frames.feed(self._opener.feed(data) if self._opener else data):
                    if frame.type == msg.FRAME_JSON:
                        message = msg.unpack_to_rank(frame.body)
                        if not isinstance(message, msg.Unknown):
                            self._take(message)
                            continue
                        log.debug("session=%d hears %r, of a newer version", self.number, message.kind)
                        if message.id:
                            self._take(msg.Failed(message.id, f"{self.name} answers {message.kind!r}, which "
                                                              f"{__version__} doesn't know"))
        except (OSError, ServiceError) as error:
            why = str(error)
        self._lose(why)

    def _take(self, message: msg.AnyToRank) -> None:
        if isinstance(message, msg.Answer):
            with self._lock:
                pending = self._pending.get(message.id)
            if pending is not None:
                pending.answer = message
                pending.done.set()
            return
        if isinstance(message, WorkerEnded):
            with self._changed:
                self._ended[message.lease, message.worker] = message
                while len(self._ended) > _VERDICTS_KEPT:
                    self._ended.popitem(last=False)
                self._changed.notify_all()
        self._tell(message)

    def _tell(self, event: msg.AnyEvent) -> None:
        if self.on_event is None:
            return
        try:
            self.on_event(event)
        except Exception:
            # The reader must live on: answers come through it.
            log.exception("session=%d: on_event failed for %s", self.number, type(event).__name__)

    def _lose(self, why: str) -> None:
        with self._changed:
            first = not self.lost
            self.lost = True
            waiting = list(self._pending.values())
            self._changed.notify_all()
        for pending in waiting:
            pending.done.set()
        if first and not self.closed:
            self._tell(msg.ServiceEnded(f"{self.name} is gone: {why}"))

    def _forget(self) -> None:
        """In a forked child: the parent's death must end the session although the child lives on."""
        os.close(self._connection.detach())


def _places(lent: Lent) -> list[Path | Address]:
    """Where to dial a lease's agent, in turn: on this node first. ConfigError for an address that is none."""
    here = lent.host in ("", socket.gethostname())
    unix = [Path(text.removeprefix(_UNIX)) for text in lent.addresses if text.startswith(_UNIX)]
    return [*(path for path in unix if here and os.path.exists(path)),
            *(Address.parse(text) for text in lent.addresses if not text.startswith(_UNIX))]


def _lease_id(lease: GrantLease | int) -> int:
    return lease if isinstance(lease, int) else lease.id


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _wait_exit(pidfd: int, deadline: float) -> bool:
    import select
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0, int((deadline - time.monotonic()) * 1000))))


def _after_fork() -> None:
    for session in list(_sessions):
        if not session.closed:
            session._forget()


os.register_at_fork(after_in_child=_after_fork)
