"""Who is let in: the service's listening sockets, and every connection until it has proved what it is.

          accept ──▶ HELLO ──▶ PROOF ──▶ a session, or a worker's connection
                       │         └──▶ PAIR ──▶ a worker's connection with its data connection
                       ├──▶ GRANT ──▶ the session of a lease
                       └──▶ a session on the Unix socket: the kernel says who dials

Each stage reads exactly what it needs and nothing more, and all stages
together have 10 s. Nothing that comes in here reaches the rest of the service
before its proof was checked; only a grant is looked at before, because the
secret to be proved lies in it: its signature first.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import selectors
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rfaas_mpi import messages as msg
from rfaas_mpi import remote, skew
from rfaas_mpi.errors import AuthError
from rfaas_mpi.remote import Address
from rfaas_mpi.types import TcpOptions

__all__ = ["Door", "Guest", "Host"]

log = logging.getLogger("rfaas_mpi.agent.door")

HELLO_S = 10.0                       # what is not proved after this is closed
LOCAL_MAX = 1024                     # guests on the Unix socket; more are refused
REMOTE_MAX = 256                     # strangers on TCP; the oldest goes when another one comes
OTHERS_MAX = 256                     # of each other user on the Unix socket; likewise
BACKLOG = 1024
ACCEPTS = 64                         # at a time, so that the rest of the service gets its turn
PAUSE_S = 0.2                        # without a descriptor left, who dials next waits so long
NONE_LEFT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
COMPLAINTS = 10                      # lines in the log …
COMPLAINTS_S = 10.0                  # … in this time; then a count

READ = selectors.EVENT_READ


class Stage(enum.Enum):
    HELLO = "hello"
    PROOF = "proof"
    GRANT = "grant"
    PAIR = "data connection"


@dataclass
class Guest:
    """A connection that is not anything yet; handed to the host with what is known of who dials."""

    connection: socket.socket
    deadline: float
    pid: int = 0                     # 0: of another node, or not known
    uid: int = -1                    # of who dials on the Unix socket; -1: not known
    where: str = ""                  # its address; "": this node's Unix socket
    stage: Stage = Stage.HELLO
    data: bytearray = field(default_factory=bytearray)
    hello: msg.Hello | None = None
    nonce: bytes = b""               # ours
    secret: bytes = field(default=b"", repr=False)   # kind 4: the lease's, which both sides have proved

    @property
    def remote(self) -> bool:
        return self.where != ""

    @property
    def nonces(self) -> tuple[bytes, bytes]:
        """The rank's and ours."""
        return (self.hello.nonce if self.hello is not None else b""), self.nonce

    def __str__(self) -> str:
        return self.where or f"pid {self.pid} of uid {self.uid}"


class Host(Protocol):
    """What the door asks of the service, and whom it lets in."""

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        """The lease's secret; None if there is no such lease with such a worker."""

    def session_came(self, guest: Guest) -> None:
        """Takes over the connection, which does not block."""

    def worker_came(self, guest: Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        """A rank's connections to a worker, control first; the door closes its copies afterwards."""

    def secret_for(self, lease: int, grant: bytes) -> bytes | None:
        """The secret of the lease that the manager granted with these bytes, or, for none, of one that has begun.

        None or AuthError (which is logged) where it didn't, or there is none: who shows it has proved nothing yet.
        """

    def lease_came(self, guest: Guest, lease: int, grant: bytes) -> None:
        """Takes over the connection, which does not block: the session of a lease, whose secret is the guest's."""


class Door:
    """Owns the listening sockets and the guests. close() closes all of them.

    With `grants` it is an agent's: ranks of all users may come with a grant, and to workers.
    Without, there are no sessions of leases, and the Unix socket is for our own user.
    """

    def __init__(self, selector: selectors.BaseSelector, host: Host, *, grants: bool = False) -> None:
        self._selector = selector
        self._host = host
        self._grants = grants
        self._guests: dict[int, Guest] = {}          # by descriptor, oldest first
        self._unpaired: dict[bytes, Guest] = {}
        self._listeners: dict[socket.socket, Address | None] = {}
        self._paused_until: float | None = None      # the listeners aren't looked at
        self._key = b""
        self._tcp = TcpOptions()
        self._complained: list[float] = []
        self._unsaid = 0
        self.counts = dict.fromkeys(("accepted", "let_in", "refused", "broken", "late", "crowded_out"), 0)

    # ---- listening -------------------------------------------------------------------------------

    def listen_unix(self, path: Path) -> None:
        """Listens there; whatever lay there was a dead service's."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        listener.bind(str(path))
        os.chmod(path, 0o666 if self._grants else 0o600)
        listener.listen(BACKLOG)
        self._add(listener, None)

    def listen_tcp(self, addresses: Iterable[Address], key: bytes, options: TcpOptions) -> None:
        """Listens there too, to whoever knows the key; an address that we listen at already is kept.

        Raises OSError, with nothing changed, where one of them can't be had.
        """
        made: list[tuple[socket.socket, Address]] = []
        try:
            for wanted in addresses:
                have = [*self.addresses, *(address for _, address in made)]
                if any(wanted.host == a.host and wanted.port in (0, a.port) for a in have):
                    continue
                # One port for all addresses, where it is free.
                port = wanted.port or next((address.port for address in have), 0)
                try:
                    made.append(remote.listen(wanted._replace(port=port)))
                except OSError as error:
                    if wanted.port or not port:
                        raise OSError(error.errno, f"can't listen at {wanted}: {error.strerror}") from None
                    made.append(remote.listen(wanted))
        except BaseException:
            for listener, _ in made:
                listener.close()
            raise
        self._key, self._tcp = key, options
        for listener, address in made:
            self._add(listener, address)

    def _add(self, listener: socket.socket, address: Address | None) -> None:
        self._listeners[listener] = address
        if self._paused_until is None:
            self._look_at(listener)

    def _look_at(self, listener: socket.socket) -> None:
        is_remote = self._listeners[listener] is not None
        self._selector.register(listener, READ, lambda _m: self._accept(listener, is_remote))

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens on TCP."""
        return tuple(address for address in self._listeners.values() if address is not None)

    def stop_listening(self) -> None:
        """Nobody else comes in. Safe to call twice."""
        for listener in self._listeners:
            if self._paused_until is None:
                self._selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        self._paused_until = None

    def close(self) -> None:
        """Sends everybody away. Safe to call twice."""
        self.stop_listening()
        for fd in list(self._guests):
            self._drop(fd)

    # ---- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call tick() next; None: nobody is at the door."""
        paused = () if self._paused_until is None else (self._paused_until,)
        return min((*paused, *(guest.deadline for guest in self._guests.values())), default=None)

    def tick(self, now: float) -> None:
        """Sends away whoever took too long; looks again who dials, after a pause."""
        for fd, guest in list(self._guests.items()):
            if now >= guest.deadline:
                self.counts["late"] += 1
                self._complain("%s did not finish its %s within %g s", guest, guest.stage.value, HELLO_S)
                self._drop(fd)
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            for listener in self._listeners:
                self._look_at(listener)

    def _pause(self) -> None:
        """Who dials stays in the listeners' queues: asked again at once, each would keep the service busy."""
        for listener in self._listeners:
            self._selector.unregister(listener)
        self._paused_until = time.monotonic() + PAUSE_S

    # ---- guests ----------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, remote_guest: bool) -> None:
        if self._paused_until is not None:
            return                    # another listener has just found that there are none left
        for _ in range(ACCEPTS):
            try:
                connection, where = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._complain("accept: %s", error)
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._guests:
                    self._drop(next(iter(self._guests)))
                elif error.errno in NONE_LEFT:
                    self._pause()
                return
            self.counts["accepted"] += 1
            try:
                guest = self._guest(connection, where, remote_guest)
            except OSError as error:
                self.counts["broken"] += 1
                self._complain("a connection broke at once: %s", error)
                connection.close()
                continue
            if guest is None:
                self.counts["refused"] += 1
                connection.close()
                continue
            fd = connection.fileno()
            self._guests[fd] = guest
            self._selector.register(connection, READ, lambda _m, fd=fd: self._hear(fd))

    def _guest(self, connection: socket.socket, where: tuple, is_remote: bool) -> Guest | None:
        connection.setblocking(False)
        deadline = time.monotonic() + HELLO_S
        if is_remote:
            strangers = [fd for fd, guest in self._guests.items() if guest.remote and guest.stage is not Stage.PAIR]
            if len(strangers) >= REMOTE_MAX:
                # A rank needs a moment; who fills the door with connections that say
                # nothing must keep coming faster than that.
                self.counts["crowded_out"] += 1
                self._complain("%s had to go: too many connections that prove nothing", self._guests[strangers[0]])
                self._drop(strangers[0])
            remote.tune(connection, self._tcp)
            host, port = where[:2]
            return Guest(connection, deadline, where=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        pid, uid = _peer(connection)
        same = [fd for fd, guest in self._guests.items() if guest.uid == uid]
        if uid != os.geteuid() and self._grants:
            if len(same) >= OTHERS_MAX:
                # Nobody else's connections have to go for those of this user.
                self.counts["crowded_out"] += 1
                self._complain("%s had to go: too many connections of this user", self._guests[same[0]])
                self._drop(same[0])
        elif uid != os.geteuid() or len(same) >= LOCAL_MAX:
            self._complain("refused a connection of pid %d, uid %d", pid, uid)
            return None
        return Guest(connection, deadline, pid=pid, uid=uid)

    def _take(self, fd: int) -> Guest:
        """The guest's connection is no longer looked at here."""
        guest = self._guests.pop(fd)
        self._selector.unregister(guest.connection)
        if guest.stage is Stage.PAIR:
            self._unpaired.pop(guest.nonce, None)
        return guest

    def _drop(self, fd: int) -> None:
        self._take(fd).connection.close()

    def _hear(self, fd: int) -> None:
        """Reads exactly what the stage needs: what follows is for somebody else."""
        guest = self._guests[fd]
        if guest.stage is Stage.PAIR:
            # It has to wait for its other half, so that this is its end, or nonsense.
            self.counts["broken"] += 1
            self._drop(fd)
            return
        want = _wanted(guest)
        try:
            piece = guest.connection.recv(want - len(guest.data))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.counts["broken"] += 1
            self._drop(fd)
            return
        guest.data += piece
        if len(guest.data) < _wanted(guest):
            return
        data = bytes(guest.data)
        guest.data.clear()
        try:
            if guest.stage is Stage.HELLO:
                self._answer_hello(fd, guest, msg.Hello.unpack(data))
            else:
                assert guest.hello is not None
                check = self._check_grant if guest.stage is Stage.GRANT else self._check_proof
                check(fd, guest, guest.hello, data)
        except OSError as error:
            self.counts["broken"] += 1
            self._complain("the connection of %s broke: %s", guest, error)
            if fd in self._guests:
                self._drop(fd)

    def _answer_hello(self, fd: int, guest: Guest, hello: msg.Hello) -> None:
        status = hello.problem() or self._fits(guest, hello)
        guest.nonce = os.urandom(16)
        guest.connection.send(msg.Hello.make(hello.kind, guest.nonce, lease=hello.lease, worker=hello.worker,
                                             status=status).pack())
        guest.hello = hello
        if status != msg.HELLO_OK:
            self.counts["refused"] += 1
            if guest.remote:
                self._complain("refused %s: %s (it has %s)", guest, msg.HELLO_TEXT[status], skew.text(hello.version))
            self._drop(fd)
        elif hello.kind == msg.KIND_SESSION and not guest.remote:
            self._let_in(fd)
        else:
            guest.stage = Stage.GRANT if hello.kind == msg.KIND_LEASE else Stage.PROOF

    def _fits(self, guest: Guest, hello: msg.Hello) -> int:
        """Whether there is what it asks for, on this kind of socket."""
        if hello.kind == msg.KIND_LEASE:
            # Which leases there are is nobody's business before he has proved one.
            return msg.HELLO_OK if self._grants else msg.HELLO_REFUSED
        if hello.kind == msg.KIND_SESSION:
            may = bool(self._key) if guest.remote else guest.uid == os.geteuid()
            return msg.HELLO_OK if may else msg.HELLO_REFUSED
        if not guest.remote and (hello.kind == msg.KIND_DATA or hello.data):
            return msg.HELLO_REFUSED
        if hello.kind == msg.KIND_DATA and not self._partner(hello):
            return msg.HELLO_UNKNOWN
        known = self._host.secret_of(hello.lease, hello.worker) is not None
        return msg.HELLO_OK if known else msg.HELLO_UNKNOWN

    def _partner(self, hello: msg.Hello) -> Guest | None:
        """The control connection that a data connection belongs to."""
        guest = self._unpaired.get(hello.pairing)
        if guest is None or guest.hello is None:
            return None
        return guest if (guest.hello.lease, guest.hello.worker) == (hello.lease, hello.worker) else None

    def _check_proof(self, fd: int, guest: Guest, hello: msg.Hello, given: bytes) -> None:
        if hello.kind == msg.KIND_SESSION:
            secret: bytes | None = self._key
            roles = msg.ROLE_SESSION_RANK, msg.ROLE_SESSION_SERVICE
        else:
            secret = self._host.secret_of(hello.lease, hello.worker)
            roles = msg.ROLE_RANK, msg.ROLE_WORKER
            if hello.kind == msg.KIND_DATA:
                roles = msg.ROLE_DATA_RANK + hello.pairing, msg.ROLE_DATA_WORKER + hello.pairing
                if self._partner(hello) is None:
                    secret = None
        answer = bytes(msg.PROOF_BYTES)
        if not secret:
            status = msg.HELLO_UNKNOWN
        elif not msg.same_proof(given, msg.proof(secret, roles[0], *guest.nonces, hello.lease, hello.worker)):
            status = msg.HELLO_REFUSED
        else:
            status = msg.HELLO_OK
            answer = msg.proof(secret, roles[1], *guest.nonces, hello.lease, hello.worker)
        guest.connection.send(msg.PROOF_ANSWER.pack(status, answer))
        if status != msg.HELLO_OK:
            self.counts["refused"] += 1
            what = "key" if hello.kind == msg.KIND_SESSION else f"secret of lease {hello.lease}"
            self._complain("refused %s: it did not know the %s", guest, what)
            self._drop(fd)
        elif hello.kind == msg.KIND_WORKER and hello.data:
            guest.stage = Stage.PAIR
            self._unpaired[guest.nonce] = guest
        else:
            self._let_in(fd)

    def _check_grant(self, fd: int, guest: Guest, hello: msg.Hello, given: bytes) -> None:
        """A grant and the proof of the secret that lies in it: either is good, or nobody is told which is not."""
        (length,) = msg.GRANT_LENGTH.unpack_from(given)
        end = msg.GRANT_LENGTH.size + length
        grant = given[msg.GRANT_LENGTH.size:end]
        why = f"it showed no grant of lease {hello.lease}"
        try:
            known = self._host.secret_for(hello.lease, grant) if length <= msg.GRANT_BYTES_MAX else None
        except AuthError as error:
            known, why = None, str(error)
        secret = known or os.urandom(msg.PROOF_BYTES)
        ranks, agents = msg.lease_roles(grant)
        right = msg.same_proof(given[end:], msg.proof(secret, ranks, *guest.nonces, hello.lease, hello.worker))
        if not known or not right:
            guest.connection.send(msg.PROOF_ANSWER.pack(msg.HELLO_REFUSED, bytes(msg.PROOF_BYTES)))
            self.counts["refused"] += 1
            self._complain("refused %s: %s", guest,
                           f"it did not know the secret of lease {hello.lease}" if known else why)
            self._drop(fd)
            return
        guest.connection.send(msg.PROOF_ANSWER.pack(
            msg.HELLO_OK, msg.proof(secret, agents, *guest.nonces, hello.lease, hello.worker)))
        guest.secret = secret
        self._take(fd)
        self.counts["let_in"] += 1
        self._host.lease_came(guest, hello.lease, grant)

    def _let_in(self, fd: int) -> None:
        guest = self._take(fd)
        hello = guest.hello
        assert hello is not None
        self.counts["let_in"] += 1
        if hello.kind == msg.KIND_SESSION:
            self._host.session_came(guest)
            return
        first = guest
        connections = [guest.connection]
        if hello.kind == msg.KIND_DATA:
            partner = self._partner(hello)
            assert partner is not None and partner.hello is not None
            first, hello = self._take(partner.connection.fileno()), partner.hello
            connections.insert(0, first.connection)
        for connection in connections:
            connection.setblocking(True)
        try:
            self._host.worker_came(first, hello, connections)
        finally:
            for connection in connections:
                connection.close()

    # ---- the log ---------------------------------------------------------------------------------

    def _complain(self, text: str, *facts: object) -> None:
        """Says it in the log, unless strangers have filled enough of that already."""
        now = time.monotonic()
        self._complained = [when for when in self._complained if now - when < COMPLAINTS_S]
        if len(self._complained) >= COMPLAINTS:
            self._unsaid += 1
            return
        if self._unsaid:
            log.warning("%d more lines like the ones before were left out", self._unsaid)
            self._unsaid = 0
        self._complained.append(now)
        log.warning(text, *facts)


def _wanted(guest: Guest) -> int:
    """How many bytes its stage reads in all, as far as can be told from those that are there."""
    match guest.stage:
        case Stage.HELLO:
            return msg.HELLO.size
        case Stage.GRANT if len(guest.data) < msg.GRANT_LENGTH.size:
            return msg.GRANT_LENGTH.size
        case Stage.GRANT:
            (length,) = msg.GRANT_LENGTH.unpack_from(guest.data)
            # Of one that is too long nothing else is read, and it is refused.
            rest = length + msg.PROOF_BYTES if length <= msg.GRANT_BYTES_MAX else 0
            return msg.GRANT_LENGTH.size + rest
        case _:
            return msg.PROOF_BYTES


def _peer(connection: socket.socket) -> tuple[int, int]:
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(data[0:4], sys.byteorder), int.from_bytes(data[4:8], sys.byteorder)
