"""Where an agent's figures are read: a listener of the agent's own loop that answers `GET /metrics` and nothing else.

It reads what fits a request's head, answers once and closes; who is slow, or one too
many, is sent away. Nobody proves who he is, and nothing that is said here reaches the
rest of the agent.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rfaas_mpi import remote
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.remote import Address

__all__ = ["ScrapeDoor"]

log = logging.getLogger("rfaas_mpi.agent.scrape")

READER_S = 5.0                       # for a whole request and its answer
READERS_MAX = 32
HEAD_BYTES_MAX = 8192
BACKLOG = 64
PAUSE_S = 1.0                        # without a descriptor left, who comes next waits so long
NONE_LEFT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


@dataclass
class _Reader:
    connection: socket.socket
    deadline: float
    head: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None             # what is still to be sent


class ScrapeDoor:
    """Owns the listener and its connections. close() closes all of them."""

    def __init__(self, selector: selectors.BaseSelector, text: Callable[[], bytes], content_type: str) -> None:
        self._selector = selector
        self._text = text
        self._content_type = content_type
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._paused_until: float | None = None      # the listener isn't looked at
        self._readers: dict[int, _Reader] = {}       # by descriptor, oldest first

    def listen(self, where: str) -> str:
        """Listens at `unix:/PATH` or `HOST:PORT`; the address or URL to read from. ConfigError, which names it."""
        try:
            if where.startswith("unix:"):
                url = self._listen_unix(Path(where.removeprefix("unix:")))
            else:
                self._listener, bound = remote.listen(Address.parse(where, port_0=True))
                url = f"http://{str(bound).removeprefix('tcp://')}/metrics"
        except OSError as error:
            raise ConfigError(f"figures can't be told at {where}: {error.strerror or error}",
                              hint="name another place with --metrics") from None
        self._look()
        return url

    def _look(self) -> None:
        assert self._listener is not None
        self._selector.register(self._listener, _READ, lambda _m: self._accept())

    def _listen_unix(self, path: Path) -> str:
        if not path.is_absolute():
            raise ConfigError(f"unix:{path} is no address", hint="it looks like unix:/PATH or HOST:PORT")
        if path.is_socket():
            path.unlink()             # of an agent that was killed: a directory serves one agent
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(path))
            os.chmod(path, 0o666)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._listener, self._path = listener, path
        return f"unix:{path}"

    def close(self) -> None:
        """Safe to call twice."""
        for fd in list(self._readers):
            self._drop(fd)
        if self._listener is not None:
            if self._paused_until is None:
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = self._paused_until = None
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    # ---- time ------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When to call tick() next; None: nobody reads."""
        paused = () if self._paused_until is None else (self._paused_until,)
        return min((*paused, *(reader.deadline for reader in self._readers.values())), default=None)

    def tick(self, now: float) -> None:
        """Sends away who took too long; looks again who comes, after a pause."""
        for fd in [fd for fd, reader in self._readers.items() if now >= reader.deadline]:
            self._drop(fd)
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            self._look()

    # ---- readers ---------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("accept: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._readers:
                self._drop(next(iter(self._readers)))
            elif error.errno in NONE_LEFT:
                # Who dials stays in the queue: asked again at once, he would keep the agent busy.
                self._selector.unregister(self._listener)
                self._paused_until = time.monotonic() + PAUSE_S
            return
        connection.setblocking(False)
        if len(self._readers) >= READERS_MAX:
            self._drop(next(iter(self._readers)))
        fd = connection.fileno()
        self._readers[fd] = _Reader(connection, time.monotonic() + READER_S)
        self._selector.register(connection, _READ, lambda mask: self._on_reader(fd, mask))

    def _drop(self, fd: int) -> None:
        reader = self._readers.pop(fd)
        self._selector.unregister(reader.connection)
        reader.connection.close()

    def _on_reader(self, fd: int, _mask: int) -> None:
        reader = self._readers[fd]
        try:
            if reader.answer is None and not self._heard(reader):
                return
            assert reader.answer is not None
            reader.answer = reader.answer[reader.connection.send(reader.answer):]
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("who reads figures is gone: %s", error)
            self._drop(fd)
            return
        if reader.answer:
            self._selector.modify(reader.connection, _WRITE, lambda mask: self._on_reader(fd, mask))
        else:
            self._drop(fd)

    def _heard(self, reader: _Reader) -> bool:
        """True once there is an answer."""
        piece = reader.connection.recv(HEAD_BYTES_MAX + 1 - len(reader.head))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "it asked for nothing")
        reader.head += piece
        if not (b"\r\n\r\n" in reader.head or b"\n\n" in reader.head) and len(reader.head) <= HEAD_BYTES_MAX:
            return False
        reader.answer = memoryview(self._answer(bytes(reader.head)))
        return True

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\n", 1)[0].split()
        if len(head) > HEAD_BYTES_MAX or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is no request\n")
        if words[0] != b"GET":
            return _response("405 Method Not Allowed", b"only GET\n", "Allow: GET\r\n")
        if words[1].split(b"?", 1)[0] != b"/metrics":
            return _response("404 Not Found", b"there is /metrics and nothing else\n")
        return _response("200 OK", self._text(), content_type=self._content_type)


def _response(status: str, body: bytes, headers: str = "", content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}"
            "Connection: close\r\n\r\n")
    return head.encode() + body
