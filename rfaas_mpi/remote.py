"""What both ends of a session over TCP agree on: addresses, the shared key, how soon a dead peer is noticed."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rfaas_mpi.errors import AuthError, ConfigError
from rfaas_mpi.types import TcpOptions

__all__ = ["KEY_BYTES", "Address", "connect", "listen", "local_address", "make_key", "read_key", "tune"]

KEY_BYTES = 32
_BACKLOG = 1024
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


# ---- addresses -----------------------------------------------------------------------------------

class Address(NamedTuple):
    """Where a service listens on TCP; as text `tcp://HOST:PORT`, `tcp://[::1]:PORT` for IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, port_0: bool = False) -> Address:
        """The address in `tcp://HOST:PORT` or `HOST:PORT`. ConfigError if it is none."""
        scheme, separator, rest = text.strip().rpartition("://")
        host, _, port = rest.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        wanted = "0 to 65535" if port_0 else "1 to 65535"
        if (separator and scheme != "tcp") or not host or (":" in host and not bracketed) or host == "[]":
            raise ConfigError(f"{text!r} is no address",
                              hint="it looks like tcp://HOST:PORT, or tcp://[::1]:PORT for IPv6")
        if not (port.isascii() and port.isdecimal()) or not (0 if port_0 else 1) <= int(port) <= 65535:
            raise ConfigError(f"{text!r} has no port", hint=f"a port is a number from {wanted}")
        return cls(host[1:-1] if bracketed else host, int(port))


def local_address(address: Address) -> Address:
    """Where to dial on the node itself what listens at `address`."""
    return address._replace(host=_ANY.get(address.host, address.host))


def _resolved(address: Address, flags: int = 0) -> Iterator[tuple[int, tuple]]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else "it is no host's name"
        raise ConfigError(f"the host of {address} is not known: {why}") from None
    for family, _, _, _, where in found:
        yield family, where


# ---- sockets -------------------------------------------------------------------------------------

def tune(connection: socket.socket, options: TcpOptions) -> None:
    """Has the kernel send at once, and give a silent peer up, on a TCP socket."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, options.idle_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, options.probe_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, options.probes)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.timeout_s * 1000))


def connect(address: Address, options: TcpOptions, deadline: float) -> socket.socket:
    """A connection made before `deadline` (time.monotonic), to the first of the host's addresses that answers.

    Raises ConfigError for a host that is not known, OSError with the last address' reason.
    """
    failure: OSError = ConnectionRefusedError("the host has no address")
    for family, where in _resolved(address):
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(where)
            tune(connection, options)
            if connection.getsockname() == connection.getpeername():
                # TCP may connect a port that nobody listens on to itself.
                raise ConnectionRefusedError("nobody listens there")
        except OSError as error:
            connection.close()
            failure = error
            continue
        except BaseException:
            connection.close()
            raise
        return connection
    raise failure


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket that doesn't block, and where it really listens. OSError, ConfigError."""
    failure: OSError | None = None
    for family, where in _resolved(address, socket.AI_PASSIVE):
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            failure = error
            continue
        return listener, Address(address.host, listener.getsockname()[1])
    raise failure or OSError(f"{address} has no address")


# ---- the shared key ------------------------------------------------------------------------------

def read_key(path: Path | str) -> bytes:
    """The key in a file that only we can read. AuthError, which names the file, for any other."""
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise AuthError(f"the key file {path} can't be read: {error.strerror}",
                        hint="copy the one that `rfaas up --listen` names on the service's node") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise AuthError(f"the key file {path} is no regular file")
        if found.st_uid != os.geteuid():
            raise AuthError(f"the key file {path} belongs to uid {found.st_uid}, not to {os.geteuid()}",
                            hint="copy it to a file of your own")
        if found.st_mode & 0o077:
            raise AuthError(f"others may read or change the key file {path} (mode "
                            f"{stat.S_IMODE(found.st_mode):04o})",
                            hint=f"chmod 600 {path}; if they could read it, remove it and make another")
        key = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(key) != KEY_BYTES:
        raise AuthError(f"the key file {path} holds no key: a key is {KEY_BYTES} bytes",
                        hint="remove it; `rfaas up --listen` makes another")
    return key


def make_key(path: Path | str) -> bytes:
    """The key in the file, which is made with a new one where there is none. AuthError as `read_key`."""
    path = Path(path)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(fd, secrets.token_bytes(KEY_BYTES))
            finally:
                os.close(fd)
            # Whole, or not there; whoever is first wins.
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError as error:
            raise AuthError(f"the key file {path} can't be made: {error.strerror}",
                            hint="name another one with --key-file") from None
        finally:
            draft.unlink(missing_ok=True)
    return read_key(path)
