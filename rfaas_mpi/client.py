"""How ranks, agents and people call a cluster's manager: one HTTP request a call, its answer as the interface's type.

Needs nothing beyond the standard library where the manager is called on its Unix
socket: the kernel says who calls there, and to the caller who answers. Over a
network both prove it (identity.py), which takes the extra `cluster`.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec

from rfaas_mpi import api, identity, remote, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.config import Settings, core_list, site_users, user_id
from rfaas_mpi.errors import (
    AuthError,
    ClosedError,
    ConfigError,
    LeaseDenied,
    RFaaSError,
    ServiceError,
    ServiceLost,
    VersionMismatch,
)

__all__ = ["NO_ANSWER", "Greeting", "ManagerAddress", "ManagerClient", "ManagerRefused", "ManagerUnreachable",
           "check_owner", "check_version", "connect_s", "here", "lost", "not_reached", "prover_of", "read_challenge",
           "refusal", "target", "tls_of", "unreachable"]

WAIT_S = 60.0                    # for an answer; a demand may wait longer at the manager, and says so
ANSWER_BYTES_MAX = 1 << 28       # all leases of a large cluster, for an administrator
NEXT_S = 3.0                     # where there are several managers: which one leads is found out by trying
OTHER_VERSION = 426              # HTTP's status for it: what the manager says then names the node
UNIX_HOST = "manager"            # HTTP wants a host's name; a socket has none
# What decoding raises for some bytes or other: not only errors of msgspec's own.
NO_ANSWER = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_ROUTES = {route.name: route for route in api.ROUTES}
_DECODERS = {route.name: msgspec.json.Decoder(route.answer) for route in api.ROUTES}
_CHALLENGE = msgspec.json.Decoder(api.Challenge)
_PROBLEM = msgspec.json.Decoder(api.Problem)


class ManagerRefused(ServiceError):
    """The manager said no; `status` is HTTP's (404: not there, 409: not now, 503: nothing can be written down)."""

    status: int = 0


class ManagerUnreachable(ServiceLost):
    """No manager is where it should be: nobody has heard the request."""


class ManagerAddress(NamedTuple):
    """Where a manager listens: `unix:/PATH`, or `http://HOST:PORT` and `https://HOST:PORT`."""

    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> ManagerAddress:
        """The address in `text`. ConfigError if it is none."""
        scheme, _, rest = text.strip().partition(":")
        if scheme == "unix" and rest.startswith("/"):
            return cls("unix", path=rest)
        found = re.fullmatch(r"//(?:\[([0-9A-Fa-f:.]+)\]|([^/:@\[\]?#\s]+)):([0-9]{1,5})/?", rest, re.ASCII)
        if scheme not in ("http", "https") or found is None or not 1 <= int(found[3]) <= 65535:
            raise ConfigError(f"{text!r} is no address of a manager",
                              hint="it looks like unix:/PATH, http://HOST:PORT or https://HOST:PORT")
        return cls(scheme, host=(found[1] or found[2]).lower(), port=int(found[3]))

    @classmethod
    def parse_all(cls, text: str) -> tuple[ManagerAddress, ...]:
        """The addresses in `text`, of which one manager leads at a time. ConfigError if one is none."""
        return tuple(map(cls.parse, text.split(",")))

    @property
    def authority(self) -> str:
        """What stands before the path in a URL: host and port; a name of ours for a socket."""
        if self.scheme == "unix":
            return UNIX_HOST
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.scheme == "unix" else f"{self.scheme}://{self.authority}"


class Greeting(NamedTuple):
    """What a manager says with any answer, before anybody has proved anything: to look at, not to go by."""

    address: ManagerAddress
    version: str                 # "" if it doesn't say
    date: str                    # by its clock, as HTTP has times
    asked_at: float              # by ours, in seconds since 1970
    took_s: float                # until the answer was there


class ManagerClient:
    """Calls the manager that `settings.manager` names; any thread may, each call has a connection of its own.

    Where several are named one leads, and the others don't listen: who answered last is called first.
    ConfigError where none is named, or its name makes no sense; AuthError for a
    key file that isn't ours alone.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.manager is None:
            raise ConfigError("no manager is named", hint="set RFAAS_MANAGER, like unix:/run/rfaas/manager.sock")
        self._doors = [_Door(address, prover_of(settings, address), tls_of(settings, address))
                       for address in ManagerAddress.parse_all(settings.manager)]
        self._first = 0                  # the door that is tried first
        self._settings = settings
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._closed = False

    def __enter__(self) -> ManagerClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def address(self) -> ManagerAddress:
        """The manager that answered last, before that the first one."""
        return self._doors[self._first].address

    @property
    def known_by(self) -> str:
        """How the manager knows who calls, in words."""
        prover = self._doors[self._first].prover
        if prover is None:
            return "from the kernel"
        return f"by {prover.means.name}" + ("" if prover.seals else ", within TLS")

    def close(self) -> None:
        """Ends the calls under way in other threads (ClosedError there) and takes no more. Safe to call twice."""
        with self._lock:
            self._closed = True
            for connection in self._live:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    # It has ended by itself.
                    continue

    def call(self, name: str, body: msgspec.Struct | None = None, *, wait_s: float | None = None,
             **parameters: object) -> Any:
        """The answer to the operation `name` of api.ROUTES, as its type; `parameters` are those of path and query.

        Waits up to `wait_s` for it (None: a minute, and as long as a demand may
        wait besides). Raises AuthError for who may not, LeaseDenied for a demand
        that can't be met, VersionMismatch where the versions of the two don't work
        together, ManagerRefused for any other refusal, ManagerUnreachable
        where no manager can be reached, ServiceLost where the answer doesn't come:
        the same request may be made again then.
        """
        route = _ROUTES[name]
        if wait_s is None:
            wait_s = WAIT_S + (body.timeout_s if isinstance(body, api.AskLease) else 0.0)
        data = b"" if body is None else msgspec.json.encode(body)
        status, answer = self._exchange(route.method, target(route, parameters), data, wait_s)
        if status != 200:
            raise refusal(name, status, answer)
        try:
            return _DECODERS[name].decode(answer)
        except NO_ANSWER as error:
            raise ServiceError(f"the manager at {self.address} answers what this version doesn't understand: {error}",
                               hint="run the same version everywhere") from None

    def greet(self, wait_s: float = WAIT_S) -> Greeting:
        """What the first manager that can be reached says of itself, whatever its version. Errors as `call`'s."""
        last: ManagerUnreachable | None = None
        for turn in range(len(self._doors)):
            door = self._doors[(self._first + turn) % len(self._doors)]
            try:
                with self._connected(door, wait_s) as connection:
                    asked_at, began = time.time(), time.monotonic()
                    connection.request("GET", identity.CHALLENGE_PATH, headers={skew.HEADER: __version__})
                    with connection.getresponse() as response:
                        return Greeting(door.address, response.headers.get(skew.HEADER, ""),
                                        response.headers.get("Date", ""), asked_at, time.monotonic() - began)
            except ManagerUnreachable as error:
                last = error
        assert last is not None
        raise last

    # ---- one request ---------------------------------------------------------------------------------

    def _exchange(self, method: str, where: str, data: bytes, wait_s: float) -> tuple[int, bytes]:
        first, last, busy = self._first, None, None
        for turn in range(len(self._doors)):
            number = (first + turn) % len(self._doors)
            try:
                answered = self._at(self._doors[number], method, where, data, wait_s)
            except ManagerUnreachable as error:
                last = error
                continue
            except ServiceLost:
                # The next call begins with whoever may have taken its place.
                self._first = (number + 1) % len(self._doors)
                raise
            except ServiceError:
                self._first = number
                raise
            if answered[0] == 503 and busy is None:
                # It may be cut off from its store, and another one leads.
                busy = number, answered
                continue
            self._first = number
            return answered
        if busy is not None:
            self._first = busy[0]
            return busy[1]
        assert last is not None
        raise last if len(self._doors) == 1 else ManagerUnreachable(
            f"none of the managers at {self._settings.manager} can be reached; the last one: "
            f"{Exception.__str__(last)}", hint=last.hint)

    def _at(self, door: _Door, method: str, where: str, data: bytes, wait_s: float) -> tuple[int, bytes]:
        with self._connected(door, wait_s) as connection:
            if door.prover is None:
                return self._request(door, connection, method, where, data)[:2]
            with self._soon(door, connection, wait_s):
                status, answer, _ = self._request(door, connection, "GET", identity.CHALLENGE_PATH, b"")
            challenge = read_challenge(door.address, status, answer)
            asked = door.prover.ask(method, where, data, challenge)
            status, answer, proof = self._request(door, connection, method, where, data,
                                                  {"Authorization": asked.header})
            if status == 401 and proof is None:
                # It hasn't believed us: what it says then is only a reason.
                return status, answer
            return status, asked.open(status, proof, answer)

    @contextmanager
    def _soon(self, door: _Door, connection: http.client.HTTPConnection, wait_s: float) -> Iterator[None]:
        """Where others may lead, one that doesn't even say good day is none that does."""
        if len(self._doors) == 1:
            yield
            return
        connection.sock.settimeout(min(NEXT_S, wait_s))
        try:
            yield
        except TimeoutError:
            raise unreachable(door.address, f"says nothing for {NEXT_S:g} s") from None
        if connection.sock is not None:      # a manager that is ending closes it with its answer
            connection.sock.settimeout(max(0.001, wait_s))

    def _request(self, door: _Door, connection: http.client.HTTPConnection, method: str, where: str, data: bytes,
                 headers: Mapping[str, str] = {}) -> tuple[int, bytes, str | None]:
        """Status, body, and what the manager shows as its proof."""
        connection.request(method, where, body=data or None, headers={
            "Content-Type": "application/json", skew.HEADER: __version__, **headers})
        with connection.getresponse() as response:
            check_version(door.address, response.status, response.headers.get(skew.HEADER, ""))
            # A read of so many bytes would take the connection's early end for the answer's.
            if response.length is None or response.length > ANSWER_BYTES_MAX:
                said = "says not how long its answer is" if response.length is None else (
                    f"answers {response.length} bytes, and at most {ANSWER_BYTES_MAX} are read")
                raise ServiceError(f"the manager at {door.address} {said}", hint="is it one?")
            return response.status, response.read(), response.headers.get(identity.ANSWER_HEADER)

    @contextmanager
    def _connected(self, door: _Door, wait_s: float) -> Iterator[http.client.HTTPConnection]:
        address = door.address
        connection = http.client.HTTPConnection(address.authority)
        connection.auto_open = 0         # what it would open is never a Unix socket
        try:
            connection.sock = dialled = self._dial(door)
        except RFaaSError:
            raise
        except OSError as error:
            raise not_reached(address, error) from None
        try:
            with self._lock:
                if self._closed:
                    raise ClosedError("this client of the manager is closed")
                self._live.add(dialled)
            dialled.settimeout(max(0.001, wait_s))
            yield connection
        except RFaaSError:
            raise
        except TimeoutError:
            raise lost(address, f"has not answered for {wait_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if self._closed:
                raise ClosedError("this client of the manager was closed during the call") from None
            raise lost(address, f"broke the connection: {error or type(error).__name__}") from None
        finally:
            with self._lock:
                self._live.discard(dialled)
            connection.close()

    def _dial(self, door: _Door) -> socket.socket:
        address = door.address
        wait_s = connect_s(self._settings, len(self._doors))
        if address.scheme != "unix":
            where = remote.Address(address.host, address.port)
            dialled = remote.connect(where, self._settings.tcp, time.monotonic() + wait_s)
        else:
            dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            dialled.settimeout(wait_s)
            if address.scheme == "unix":
                dialled.connect(address.path)
                check_owner(dialled, address, self._settings)
            elif door.tls is not None:
                dialled = door.tls.wrap_socket(dialled, server_hostname=address.host)
        except BaseException:
            dialled.close()
            raise
        return dialled


class _Door(NamedTuple):
    """One manager's address, and what is needed to go in there."""

    address: ManagerAddress
    prover: identity.Prover | None
    tls: ssl.SSLContext | None


_WAY_OUT = "leases that run are not affected; is `rfaas manager` running there?"


def lost(address: ManagerAddress, what: str) -> ServiceLost:
    """The error for a manager that was reached, and what it did."""
    return ServiceLost(f"the manager at {address} {what}", hint=_WAY_OUT)


def not_reached(address: ManagerAddress, error: OSError) -> RFaaSError:
    """The error for a connection that wasn't made: AuthError for a certificate, else ManagerUnreachable."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthError(f"the certificate of the manager at {address} is not believed: {error.verify_message}",
                         hint="RFAAS_CA_FILE names who certifies it")
    return unreachable(address, f"can't be reached: {error.strerror or error}")


def unreachable(address: ManagerAddress, what: str) -> ManagerUnreachable:
    """The error for a manager that was not reached."""
    return ManagerUnreachable(f"the manager at {address} {what}", hint=_WAY_OUT)


def connect_s(settings: Settings, managers: int) -> float:
    """How long to wait for one of so many managers to take a connection."""
    return settings.start_timeout_s if managers == 1 else min(settings.start_timeout_s, NEXT_S)


# ---- how to reach it ---------------------------------------------------------------------------------

def check_owner(dialled: socket.socket, address: ManagerAddress, settings: Settings) -> None:
    """AuthError unless who listens on that Unix socket is root, the caller, or the manager's user."""
    # What it grants is where our code and data will go.
    uid = struct.unpack("3i", dialled.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    if uid not in site_users(settings):
        raise AuthError(f"the manager at {address} runs as uid {uid}",
                        hint=f"if that is right, set RFAAS_MANAGER_USER={uid}")


def prover_of(settings: Settings, address: ManagerAddress) -> identity.Prover | None:
    """How to prove there who calls; None on a Unix socket. AuthError or ConfigError where that can't be done."""
    if address.scheme == "unix":
        return None
    means: identity.Means = identity.Munge(settings.munge_socket or "")
    if settings.auth == "key" and settings.manager_key_file is None:
        raise ConfigError("RFAAS_AUTH is key, and no key is named", hint="RFAAS_MANAGER_KEY_FILE names the file")
    if settings.auth != "munge" and settings.manager_key_file is not None:
        means = identity.Key(remote.read_key(settings.manager_key_file))
    return identity.Prover(means, address.authority, user_id(settings.manager_user), seals=address.scheme == "http")


def tls_of(settings: Settings, address: ManagerAddress) -> ssl.SSLContext | None:
    """How the manager's certificate is checked; None where there is none. ConfigError for a wrong `ca_file`."""
    if address.scheme != "https":
        return None
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise ConfigError(f"the certificates in {settings.ca_file} can't be read: {error.strerror or error}",
                          hint="RFAAS_CA_FILE names a file in PEM format") from None


def check_version(address: ManagerAddress, status: int, theirs: str) -> None:
    """VersionMismatch for a manager of a version that doesn't work with ours, unless its answer says so itself."""
    try:
        if status != OTHER_VERSION:
            skew.check(theirs, f"the manager at {address}", f"its caller on {socket.gethostname()}")
    except ValueError as error:
        raise ServiceError(f"what answers at {address} is no manager: {error}") from None


def read_challenge(address: ManagerAddress, status: int, answer: bytes) -> bytes:
    """What the manager answered to the request for a challenge. ServiceError if that is none."""
    try:
        if status == 200:
            return _CHALLENGE.decode(answer).challenge
    except NO_ANSWER:
        # Said below.
        status = 200
    raise ServiceError(f"what answers at {address} gives no challenge (HTTP status {status})",
                       hint="is it a manager, and of this version?")


# ---- pure ----------------------------------------------------------------------------------------

def target(route: api.Route, parameters: Mapping[str, object]) -> str:
    """Path and query of a request. TypeError for a parameter that is missing, or that the operation hasn't got."""
    in_path = set(re.findall(r"{(\w+)}", route.path))
    in_query = {name for name, _ in route.query}
    if in_path - set(parameters) or set(parameters) - in_path - in_query:
        raise TypeError(f"{route.name} takes {sorted(in_path | in_query)}, not {sorted(parameters)}")
    path = re.sub(r"{(\w+)}", lambda found: quote(str(parameters[found[1]]), safe=""), route.path)
    query = urlencode({name: str(parameters[name]) for name, _ in route.query if name in parameters})
    return f"{path}?{query}" if query else path


def refusal(name: str, status: int, answer: bytes) -> RFaaSError:
    """The error that an answer other than 200 stands for, with the manager's text and way out."""
    try:
        problem = _PROBLEM.decode(answer)
    except NO_ANSWER:
        problem = api.Problem(f"the manager answered {name} with HTTP status {status}")
    if status in (401, 403):
        return AuthError(problem.error, hint=problem.hint)
    if status == OTHER_VERSION:
        return VersionMismatch(problem.error, hint=problem.hint)
    if status == 409 and name == "ask":
        return LeaseDenied(problem.error, hint=problem.hint)
    refused = ManagerRefused(problem.error, hint=problem.hint)
    refused.status = status
    return refused


def here(root: Path = Path("/"), switches: tuple[str, ...] = ()) -> api.Place:
    """Where this process runs: its host's name, the NUMA node if it is bound to one, and the switches above it."""
    mine, nodes = os.sched_getaffinity(0), _numa_nodes(root)
    bound = [number for number, cores in nodes.items() if mine <= cores]
    return api.Place(node=socket.gethostname(), numa=bound[0] if len(nodes) > 1 and bound else None,
                     switches=switches)


@functools.cache
def _numa_nodes(root: Path) -> dict[int, set[int]]:
    nodes = {}
    for directory in root.glob("sys/devices/system/node/node[0-9]*"):
        try:
            nodes[int(directory.name.removeprefix("node"))] = set(core_list((directory / "cpulist").read_text()))
        except (OSError, ValueError):
            continue
    return nodes
