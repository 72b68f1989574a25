"""One connection to a manager: HTTP requests, then a web socket on it; of RFC 9112 and 6455 what an agent's line needs.

       open ──▶ request … request ──▶ upgrade ──▶ say, hear, beat ──▶ close

A library for all of both takes an agent a tenth of a second to import, nearly as long as all the rest until it lends.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import http.client
import io
import os
import re
import socket
import ssl
import struct
from collections.abc import Iterator, Mapping
from email.message import Message
from enum import IntEnum
from typing import NamedTuple

from rfaas_mpi.client import ManagerAddress, lost, not_reached, unreachable
from rfaas_mpi.errors import ServiceLost

__all__ = ["Answer", "Opcode", "Said", "Stream", "frame"]

_HEAD_BYTES_MAX = 1 << 16
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})( [^\r\n]*)?\r\n")
_SWITCHED = 101
_FIN, _MASKED = 0x80, 0x80
_CONTROL = 0x8
_CONTROL_BYTES_MAX = 125


class Opcode(IntEnum):
    """What a frame is."""

    MORE = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class Answer(NamedTuple):
    """What a request was answered with."""

    status: int
    headers: Message
    body: bytes


class Said(NamedTuple):
    """A message of the web socket, TEXT or BINARY."""

    kind: Opcode
    data: bytes


def frame(kind: Opcode, data: bytes, mask: bytes) -> bytes:
    """A whole message as a caller sends it; `mask` is four bytes by chance, so that no proxy takes it for HTTP."""
    size = len(data)
    if size <= _CONTROL_BYTES_MAX:
        head = struct.pack("!BB", _FIN | kind, _MASKED | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", _FIN | kind, _MASKED | 126, size)
    else:
        head = struct.pack("!BBQ", _FIN | kind, _MASKED | 127, size)
    masks = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(data) ^ int.from_bytes(masks)).to_bytes(size)


class Stream:
    """Owns the connection; close() ends it at once. One task at a time asks or hears; any may say.

    ServiceLost for what breaks it, whether nobody is there, nothing comes, or what comes is not what was asked for.
    """

    def __init__(self, address: ManagerAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                 bytes_max: int) -> None:
        self._address = address
        self._reader, self._writer = reader, writer
        self._bytes_max = bytes_max                  # of an answer's body and of a message
        self._heard = False                          # since `beat` looked last
        self._ended = False                          # the manager closes it after its last answer

    @classmethod
    async def open(cls, address: ManagerAddress, tls: ssl.SSLContext | None, *, wait_s: float,
                   bytes_max: int) -> Stream:
        """Connects. ManagerUnreachable where nobody takes it within that time, AuthError for a wrong certificate."""
        try:
            async with asyncio.timeout(wait_s):
                if address.scheme == "unix":
                    streams = await asyncio.open_unix_connection(address.path, limit=_HEAD_BYTES_MAX)
                else:
                    streams = await asyncio.open_connection(address.host, address.port, ssl=tls, limit=_HEAD_BYTES_MAX)
        except TimeoutError:
            raise unreachable(address, f"takes no connection for {wait_s:g} s") from None
        except OSError as error:
            raise not_reached(address, error) from None
        return cls(address, *streams, bytes_max)

    @property
    def socket(self) -> socket.socket:
        return self._writer.get_extra_info("socket")

    @property
    def ended(self) -> bool:
        """It takes no further request: another one is to be opened."""
        return self._ended

    async def close(self) -> None:
        """Waits for nobody: what was not sent is lost. Safe to call twice."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # ---- HTTP --------------------------------------------------------------------------------------

    async def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes, wait_s: float) -> Answer:
        """The answer, if it is there within that time."""
        with self._breaking():
            try:
                async with asyncio.timeout(wait_s):
                    return await self._asked(method, path, {**headers, "Content-Length": str(len(body))}, body)
            except TimeoutError:
                raise lost(self._address, f"has not answered for {wait_s:g} s") from None

    async def upgrade(self, path: str, headers: Mapping[str, str], wait_s: float) -> None:
        """Makes it a web socket."""
        key = base64.b64encode(os.urandom(16))
        answer = await self.request("GET", path, {
            **headers, "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": key.decode()}, b"", wait_s)
        proof = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
        if answer.status != _SWITCHED or answer.headers.get("Sec-WebSocket-Accept", "") != proof:
            raise lost(self._address, f"opens no web socket (HTTP status {answer.status})")

    async def _asked(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._address.authority}",
                 *(f"{name}: {value}" for name, value in headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self._writer.drain()
        head = await self._reader.readuntil(b"\r\n\r\n")
        if (status := _STATUS.match(head)) is None:
            raise lost(self._address, "doesn't speak HTTP")
        found = http.client.parse_headers(io.BytesIO(head[status.end():]))
        self._ended = status[1] == b"0" or "close" in found.get("Connection", "").lower()
        if int(status[2]) == _SWITCHED:
            return Answer(_SWITCHED, found, b"")
        said = found.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", said, re.ASCII) or int(said) > self._bytes_max:
            raise lost(self._address, f"answers {said or 'who knows how many'} bytes, and at most {self._bytes_max} "
                                      "are read")
        return Answer(int(status[2]), found, await self._reader.readexactly(int(said)))

    # ---- the web socket ------------------------------------------------------------------------------

    async def say(self, kind: Opcode, data: bytes) -> None:
        """Sends one message; waits while the manager doesn't read."""
        with self._breaking():
            self._writer.write(frame(kind, data, os.urandom(4)))
            await self._writer.drain()

    async def hear(self) -> Said:
        """The next message. What only keeps the connection alive is answered meanwhile."""
        with self._breaking():
            kind: Opcode | None = None               # of the message whose first part is there
            data = bytearray()
            while True:
                last, part, more = await self._frame(self._bytes_max - len(data))
                match part:
                    case Opcode.PING:
                        await self.say(Opcode.PONG, more)
                        continue
                    case Opcode.PONG:
                        continue
                    case Opcode.CLOSE:
                        raise lost(self._address, "closed the connection")
                if (part is Opcode.MORE) is (kind is None):
                    raise lost(self._address, "breaks off a message")
                kind = kind or part
                data += more
                if last:
                    return Said(kind, bytes(data))

    async def _frame(self, bytes_max: int) -> tuple[bool, Opcode, bytes]:
        first, size = await self._reader.readexactly(2)
        self._heard = True
        # Bits for what was not agreed on, or a mask, which only callers use: no manager sends these.
        if first & 0x70 or size & _MASKED or first & 0xF not in Opcode._value2member_map_:
            raise lost(self._address, "sends what is no web socket's")
        kind = Opcode(first & 0xF)
        if kind & _CONTROL:
            bytes_max = _CONTROL_BYTES_MAX
        if size == 126:
            size = int.from_bytes(await self._reader.readexactly(2))
        elif size == 127:
            size = int.from_bytes(await self._reader.readexactly(8))
        if size > bytes_max or (kind & _CONTROL and not first & _FIN):
            raise lost(self._address, f"sends {size} bytes at once, and at most {bytes_max} are read")
        data = await self._reader.readexactly(size)
        self._heard = True
        return bool(first & _FIN), kind, data

    async def beat(self, every_s: float) -> None:
        """Asks for a sign of life when there was none for so long; ServiceLost without one for half as long again."""
        while True:
            self._heard = False
            await asyncio.sleep(every_s)
            if not self._heard:
                await self.say(Opcode.PING, b"")
                await asyncio.sleep(every_s / 2)
                if not self._heard:
                    raise lost(self._address, f"has given no sign of life for {1.5 * every_s:g} s")

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Whatever breaks it is ServiceLost."""
        try:
            yield
        except ServiceLost:
            raise
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, http.client.HTTPException, OSError) as error:
            closed = isinstance(error, asyncio.IncompleteReadError)
            raise lost(self._address, f"broke the connection: "
                       f"{'it is closed' if closed else error or type(error).__name__}") from None
