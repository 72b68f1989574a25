"""An agent's web socket: what a real server makes of it, and what it makes of a server that isn't one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import struct
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import WSMsgType, web

from rfaas_mpi.agent.websocket import Opcode, Said, Stream, frame
from rfaas_mpi.client import ManagerAddress, ManagerUnreachable
from rfaas_mpi.errors import ServiceLost

GUARD_S = 30.0
BYTES_MAX = 1 << 20
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(told: Awaitable[None]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(GUARD_S):
            await told
    asyncio.run(guarded())


async def head_of(reader: asyncio.StreamReader) -> dict[str, str]:
    """A request's header lines."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    return dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)


def switching(key: str) -> bytes:
    accept = base64.b64encode(hashlib.sha1(key.encode() + GUID).digest())
    return (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")


def told(path: str, serve: Script, told: Callable[[Stream], Awaitable[None]]) -> None:
    """Has a stream to a server that says whatever `serve` says."""
    async def both() -> None:
        failed: list[BaseException] = []

        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass                             # who is refused leaves
            except BaseException as error:
                failed.append(error)
            finally:
                writer.close()

        server = await asyncio.start_unix_server(served, path)
        stream = await Stream.open(ManagerAddress("unix", path), None, wait_s=GUARD_S, bytes_max=BYTES_MAX)
        try:
            await told(stream)
        finally:
            await stream.close()
            await stream.close()
            server.close()
        assert not failed, failed
    run(both())


def hears(path: str, said: bytes, told_back: list[bytes] | None = None) -> Said:
    """What a stream hears first from a server that says this once the web socket is open.

    It waits for what it is told back, if that is to be known, and else leaves.
    """
    heard: list[Said] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        writer.write(switching(head["Sec-WebSocket-Key"]) + said)
        await writer.drain()
        if told_back is not None:
            told_back.append(await reader.read(1 << 16))

    async def hear(stream: Stream) -> None:
        await stream.upgrade("/", {}, GUARD_S)
        heard.append(await stream.hear())

    told(path, serve, hear)
    return heard[0]


def part(kind: int, data: bytes, *, last: bool = True, bits: int = 0, masked: bool = False) -> bytes:
    """A frame as a server sends it, or shouldn't."""
    size = struct.pack("!B", len(data) | 0x80 * masked) if len(data) < 126 else struct.pack("!BQ", 127, len(data))
    return bytes((last << 7 | bits | kind,)) + size + data


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "s")


@pytest.mark.parametrize("size", [0, 1, 3, 125, 126, 127, 65535, 65536, BYTES_MAX - 1])
def test_a_real_server_hears_what_is_said_and_is_heard(path, size):
    data = os.urandom(size)

    async def echo(request: web.Request) -> web.WebSocketResponse:
        answer = web.WebSocketResponse(max_msg_size=BYTES_MAX)
        await answer.prepare(request)
        async for message in answer:
            if message.type is WSMsgType.BINARY:
                await answer.send_bytes(message.data)
            else:
                await answer.send_str(message.data)
        return answer

    async def both() -> None:
        application = web.Application()
        application.router.add_get("/here", echo)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.UnixSite(runner, path).start()
            stream = await Stream.open(ManagerAddress("unix", path), None, wait_s=GUARD_S, bytes_max=BYTES_MAX)
            try:
                assert (await stream.request("GET", "/nowhere", {}, b"", GUARD_S)).status == 404
                assert not stream.ended
                await stream.upgrade("/here", {}, GUARD_S)
                for said in (Said(Opcode.BINARY, data), Said(Opcode.TEXT, data.hex().encode()[:size])):
                    await stream.say(*said)
                    assert await stream.hear() == said
            finally:
                await stream.close()
        finally:
            await runner.cleanup()
    run(both())


def test_a_message_in_parts_is_one_and_a_sign_of_life_amid_them_is_answered(path):
    back: list[bytes] = []
    said = (part(Opcode.TEXT, b"on", last=False) + part(Opcode.PING, b"there?") + part(Opcode.MORE, b"", last=False)
            + part(Opcode.PONG, b"") + part(Opcode.MORE, b"e"))
    assert hears(path, said, back) == Said(Opcode.TEXT, b"one")
    [pong] = back
    assert pong == frame(Opcode.PONG, b"there?", pong[2:6])


@pytest.mark.parametrize("said, why", [
    (part(Opcode.TEXT, b"x", masked=True), "no web socket's"),
    (part(Opcode.TEXT, b"x", bits=0x40), "no web socket's"),
    (part(0x3, b"x"), "no web socket's"),
    (part(Opcode.MORE, b"x"), "breaks off"),
    (part(Opcode.TEXT, b"x", last=False) + part(Opcode.TEXT, b"y"), "breaks off"),
    (part(Opcode.PING, b"x", last=False), "at once"),
    (part(Opcode.PING, b"x" * 126), "at most 125"),
    (b"\x82\x7f" + struct.pack("!Q", BYTES_MAX + 1), "at most"),
    (b"\x82\x7f" + b"\xff" * 8, "at most"),
    (part(Opcode.BINARY, bytes(BYTES_MAX - 1), last=False) + part(Opcode.MORE, b"xx"), "at most 1 are"),
    (part(Opcode.CLOSE, b""), "closed"),
    (b"\x82", "closed"), (part(Opcode.TEXT, b"xx")[:-1], "closed"), (b"", "closed")])
def test_what_is_no_message_ends_it(path, said, why):
    with pytest.raises(ServiceLost, match=why):
        hears(path, said)


@pytest.mark.parametrize("answer, why", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "status 200"),
    (b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n\r\n", "status 101"),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "status 101"),
    (b"HTTP/1.1 200 OK\r\n\r\n", "who knows how many"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n", "at most"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", "at most"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "closed"),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "more than"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 17), "limit"),
    (b"", "closed")])
def test_who_opens_no_web_socket_is_left(path, answer, why):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(answer)
        await writer.drain()

    async def upgrade(stream: Stream) -> None:
        with pytest.raises(ServiceLost, match=why):
            await stream.upgrade("/", {}, GUARD_S)
    told(path, serve, upgrade)


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: Close\r\n"])
def test_a_server_that_closes_after_its_answer_is_known_to(path, answer):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(answer + b"Content-Length: 2\r\n\r\nhi")
        await writer.drain()

    async def ask(stream: Stream) -> None:
        found = await stream.request("POST", "/", {"A": "b"}, b"body", GUARD_S)
        assert (found.status, found.body, stream.ended) == (200, b"hi", True)
    told(path, serve, ask)


def test_a_server_that_says_nothing_is_given_up(path):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def ask(stream: Stream) -> None:
        with pytest.raises(ServiceLost, match="has not answered for 0.05 s"):
            await stream.request("GET", "/", {}, b"", 0.05)
    told(path, serve, ask)


def test_a_server_is_asked_for_a_sign_of_life_and_given_up_without_one(path):
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        writer.write(switching(head["Sec-WebSocket-Key"]))
        for _ in range(3):
            asked.append(await reader.readexactly(6))
            writer.write(part(Opcode.PONG, b""))
        await reader.read()

    async def beat(stream: Stream) -> None:
        await stream.upgrade("/", {}, GUARD_S)
        hearing = asyncio.create_task(stream.hear())
        with pytest.raises(ServiceLost, match="no sign of life"):
            await stream.beat(0.2)
        assert not hearing.done()
        hearing.cancel()
    told(path, serve, beat)
    assert [one[:2] for one in asked] == 3 * [frame(Opcode.PING, b"", bytes(4))[:2]]


def test_nobody_there_is_said_with_the_place(path):
    with pytest.raises(ManagerUnreachable, match=path):
        run(Stream.open(ManagerAddress("unix", path), None, wait_s=GUARD_S, bytes_max=BYTES_MAX))
