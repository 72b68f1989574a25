"""`rfaas manager`: the resource manager as a process of its own, with a state directory that it owns.

    DIRECTORY/lock         held as long as the manager lives: one manager, one directory
    DIRECTORY/ledger.db    leases, answers, usage (ledger.py), unless --store names a server for them
    DIRECTORY/*.key        what it signs with (keys.py)
    DIRECTORY/audit.log    who asked for which change, and what he was answered (callers.py)
    DIRECTORY/manager.sock or where --socket says: who calls there is who the kernel says he is
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rfaas_mpi.config import password_in_environment
from rfaas_mpi.errors import ConfigError, ServiceError, StoreError
from rfaas_mpi.manager.callers import Callers
from rfaas_mpi.manager.garbage import collecting
from rfaas_mpi.manager.keys import Keys
from rfaas_mpi.manager.ledger import USAGE_DAYS, Ledger
from rfaas_mpi.manager.policy import Policy, load_policy
from rfaas_mpi.manager.server import ManagerServer
from rfaas_mpi.remote import Address
from rfaas_mpi.slurm.reader import Reader
from rfaas_mpi.slurm.run import seen

__all__ = ["Facts", "Options", "run", "state_directory"]

SITE_DIRECTORY = Path("/var/lib/rfaas")
SITE_SOCKET = Path("/run/rfaas/manager.sock")
SOCKET_PATH_MAX = 107
SWITCH_S = 0.0005                # who waits for the interpreter, loop or writer, waits no longer than about this
STAND_BY_S = 1.0                 # how soon a manager that stands by sees that nobody leads

log = logging.getLogger("rfaas_mpi.manager.daemon")


@dataclass(frozen=True)
class Options:
    """What `rfaas manager` was told.

    `listen`: addresses on a network, behind TLS where there is a certificate. Callers prove
    there who they are by `keys` (uid → file) and `munge` (munged's socket, "" the usual
    one, None: not so), and may name the manager by `names`. `store`: the URL of a PostgreSQL
    database that managers share, instead of a file of its own. `slurm`: what Slurm plans for
    nodes is read, and ends their windows.
    """

    directory: Path
    socket: Path
    listen: tuple[Address, ...] = ()
    keys: Mapping[int, Path] = field(default_factory=dict)
    munge: str | None = None
    names: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    metrics: Address | None = None
    policy: Path | None = None
    store: str | None = None
    slurm: bool = False
    usage_days: int = USAGE_DAYS


@dataclass(frozen=True)
class Facts:
    """A manager that serves: where, and where its ledger is."""

    directory: Path
    listening: tuple[str, ...]
    metrics: str = ""
    store: str = ""


def state_directory(given: Path | None) -> Path:
    """Where a manager keeps its state if nothing else is said: the site's for root, else one in the user's home."""
    if given is not None:
        return given.absolute()
    return SITE_DIRECTORY if os.geteuid() == 0 else Path.home() / ".local" / "state" / "rfaas"


def socket_path(given: Path | None, directory: Path) -> Path:
    """Where a manager with that directory listens if nothing else is said."""
    if given is not None:
        return given.absolute()
    return SITE_SOCKET if directory == SITE_DIRECTORY else directory / "manager.sock"


def run(options: Options, ready: Callable[[Facts], None]) -> None:
    """Serves until SIGTERM or SIGINT; calls `ready` once it listens, which a manager that stands by does not yet.

    Raises ConfigError, ServiceError, StoreError or OSError, each naming the file
    or address, where it can't start, and what ended it if it could not go on.
    """
    tls = _tls(options)
    # A connection for each agent, and one for each rank that asks.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.setswitchinterval(SWITCH_S)
    with _owned(options.directory):
        keys = Keys.of(options.directory)
        asyncio.run(_serve(options, keys, tls, ready))


async def _serve(options: Options, keys: Keys, tls: ssl.SSLContext | None, ready: Callable[[Facts], None]) -> None:
    me = os.geteuid()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    policy = Policy() if options.policy is None else load_policy(options.policy)
    # Who runs it could change its ledger.
    policy = replace(policy, lenders=policy.lenders | {0, me}, admins=policy.admins | {0, me})
    callers = Callers(keys=options.keys, munge=options.munge, names=options.names,
                      audit=options.directory / "audit.log")
    for address in options.listen:
        callers.check_network(address)
    ledger = await _ledger(options, keys, ended)
    if ledger is None:
        return
    slurm = Reader(seen) if options.slurm else None
    server = ManagerServer(ledger, keys=keys, policy=policy, callers=callers, slurm=slurm)
    async with server:
        with collecting(), _socket_place(options.socket):
            await server.listen_unix(options.socket)
            listening = [f"unix:{options.socket}"]
            for address in options.listen:
                listening.append(await server.listen_network(address, tls))
            metrics = "" if options.metrics is None else await server.listen_metrics(options.metrics)
            ready(Facts(options.directory, tuple(listening), metrics, ledger.name))
            await _first(ended, server)
    log.info("ended")


async def _ledger(options: Options, keys: Keys, ended: asyncio.Event) -> Ledger | None:
    """The ledger, once it is this manager's; None if it was told to end while it stood by. ConfigError, StoreError."""
    if options.store is None:
        return Ledger(options.directory / "ledger.db", usage_days=options.usage_days)
    if password_in_environment():
        raise ConfigError("PGPASSWORD holds a password, which whatever is started from here inherits",
                          hint="put it into ~/.pgpass, or into the file that PGPASSFILE names")
    # Only who uses it has its library.
    from rfaas_mpi.manager.postgres import Postgres
    store = Postgres(options.store, keys=keys.mark)
    said = ""
    try:
        while True:
            try:
                if await asyncio.to_thread(store.try_lead):
                    break
                news = f"{await asyncio.to_thread(store.leader)} leads {store.name}"
            except StoreError as error:
                if not said:
                    raise
                news = str(error)
            if news != said:
                said = news
                log.info("stands by: %s", news)
            try:
                async with asyncio.timeout(STAND_BY_S):
                    await ended.wait()
            except TimeoutError:
                continue
            store.close()
            return None
        return await asyncio.to_thread(Ledger, store, usage_days=options.usage_days)
    except BaseException:
        store.close()
        raise


async def _first(ended: asyncio.Event, server: ManagerServer) -> None:
    """Returns when a signal has come; raises what ended the server."""
    serving, told = asyncio.create_task(server.wait()), asyncio.create_task(ended.wait())
    try:
        await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            raise ServiceError("the manager's writer has ended", hint="start it again; its state is on disk")
    finally:
        for task in (serving, told):
            task.cancel()
        await asyncio.gather(serving, told, return_exceptions=True)


# --- what it stands on ----------------------------------------------------------

@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """The state directory, made if need be, and ours alone meanwhile."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise ConfigError(f"the state directory {directory} can't be made: {error.strerror}",
                          hint="name another one with --directory") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(f"others could change the state directory {directory}",
                          hint=f"it has to belong to the manager's user alone: chown {os.geteuid()} {directory}; "
                               f"chmod 700 {directory}")
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            raise ServiceError(f"a manager works in {directory} already" + (f" (pid {owner})" if owner else ""),
                               hint="stop that one first, or name another directory") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def _socket_place(path: Path) -> Iterator[None]:
    """Room for a socket at `path`, which is removed in the end. ServiceError if somebody listens there."""
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise ConfigError(f"{path} is too long for a socket's path", hint="name a shorter one with --socket")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        if not path.is_socket():
            raise ConfigError(f"{path} is there and no socket", hint="name another place with --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()             # of a manager that was killed
            else:
                raise ServiceError(f"somebody listens on {path} already",
                                   hint="stop that manager first, or name another place with --socket")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _tls(options: Options) -> ssl.SSLContext | None:
    """The certificate of network listeners, None without one. ConfigError where it is none."""
    if options.tls_cert is None and options.tls_key is None:
        return None
    if options.tls_cert is None:
        raise ConfigError("--tls-key goes with --tls-cert", hint="name the certificate, too")
    if not options.listen:
        raise ConfigError("a certificate is for network listeners, and there is none", hint="add --listen HOST:PORT")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    key = options.tls_key or options.tls_cert
    try:
        if key.stat().st_mode & 0o077:
            raise ConfigError(f"others may read the private key {key}", hint=f"chmod 600 {key}")
        context.load_cert_chain(options.tls_cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the certificate {options.tls_cert} with key {key} can't be used: {error}",
                          hint="both are PEM files, the key without a passphrase") from None
    return context
