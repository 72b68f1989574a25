"""Who calls the manager: proved on every door, answered so that nobody else reads it, and written down.

A Unix socket's kernel says who calls. Over a network identity.py's proofs do. A
caller who has proved nothing gets 401 and what is missing; 403, who may, is for
those who have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from rfaas_mpi import api, identity, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.errors import AuthError, ConfigError, StoreError
from rfaas_mpi.identity import Caller, Unproved
from rfaas_mpi.manager.bodies import UNREADABLE
from rfaas_mpi.remote import make_key

__all__ = ["AgentChannel", "Audit", "Callers", "Muffler", "Strangers"]

log = logging.getLogger("rfaas_mpi.manager.callers")

SAYS_EVERY_S = 10.0              # a kind of refusal, in the log
STRANGER_S = 10.0                # for somebody to prove who he is, once connected
STRANGERS_MAX = 4096             # who have not yet; a thousand agents may come at once
LOOK_S = 1.0                     # how often that is looked at
THREADS = 4                      # for each means: a munged that hangs holds up no more than proofs by MUNGE
_caller_of: ContextVar[Caller | None] = ContextVar("caller", default=None)     # of the request that this task handles
# What agents say all the time is no change that somebody asked for.
QUIET = frozenset({"report"})
_AUDITED = {(route.method, route.path): route for route in api.ROUTES
            if route.method != "GET" and route.name not in QUIET}


class _Lent(msgspec.Struct, frozen=True):
    id: int
    node: str


class _Said(msgspec.Struct, frozen=True):
    """What of an answer is written down: which leases, or what was wrong."""

    leases: tuple[_Lent, ...] = ()
    incarnation: int = 0
    error: str = ""


class _AskedFor(msgspec.Struct, frozen=True):
    """What of a body is written down: names and numbers, nothing that proves anything."""

    node: str | None = None
    agent: str | None = None
    addresses: tuple[str, ...] | None = None
    session: str | None = None
    request_id: int | None = None
    workers_min: int | None = None
    workers_max: int | None = None
    cores_per_worker: int | None = None
    nodes: tuple[str, ...] | None = None
    grace_s: float | None = None


class Muffler:
    """Counts what happens often, pure; says it once in a while, and how often it was left unsaid."""

    def __init__(self, every_s: float = SAYS_EVERY_S) -> None:
        self.counts: Counter[str] = Counter()
        self._every_s = every_s
        self._said: dict[str, tuple[float, int]] = {}       # when last, and the count then

    def hear(self, what: str, now: float, times: int = 1) -> int | None:
        """How often it happened since it was last said, these times included; None: not to be said now."""
        self.counts[what] += times
        when, count = self._said.get(what, (-self._every_s, 0))
        if now < when + self._every_s:
            return None
        self._said[what] = (now, self.counts[what])
        return self.counts[what] - count


class Strangers:
    """Connections on which nobody has proved who he is, pure: which of them are to end."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}      # the oldest first
        self._known: set[Hashable] = set()

    def knows(self, connection: Hashable) -> None:
        """Somebody has proved who he is there."""
        self._known.add(connection)

    def to_end(self, connections: Sequence[Hashable], now: float) -> list[Hashable]:
        """Of all connections that there are now: those that had their time, and the oldest of too many."""
        there = set(connections)
        self._known &= there
        before = self._since
        self._since = {each: since for each, since in before.items() if each in there and each not in self._known}
        self._since |= {each: now for each in connections if each not in self._known and each not in before}
        late = [each for each, since in self._since.items() if now >= since + STRANGER_S]
        young = [each for each, since in self._since.items() if now < since + STRANGER_S]
        return late + young[:max(0, len(young) - STRANGERS_MAX)]


class Audit:
    """A file with a line of JSON for each change that somebody asked for: who, how he proved it, what, the answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"the audit log {path} can't be written: {error.strerror}",
                             hint="name another one, or none") from None

    def write(self, entry: Mapping[str, object]) -> None:
        """Adds a line, whole. OSError on a full disk."""
        line = msgspec.json.encode(entry) + b"\n"
        if (written := os.write(self._fd, line)) != len(line):
            # Half a line would spoil the next one.
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError("the disk is full")

    def close(self) -> None:
        """Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Callers:
    """What the manager's server asks about each request; close() ends its threads and closes the audit log.

    `keys` are the users whom a shared key stands for, with its file, which is made
    where there is none; `munge` is munged's socket, "" the usual one, None: no
    credential is believed. `names` (HOST:PORT) are those that callers may dial
    besides the host's name and the address at which they arrive. AuthError for a
    key file that others can read, StoreError for an audit log that can't be written.
    """

    def __init__(self, *, keys: Mapping[int, Path] = {}, munge: str | None = None, names: Collection[str] = (),
                 audit: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.when_refused: Callable[[], None] | None = None     # for whoever counts
        self._verifier = identity.Verifier(
            munge=None if munge is None else identity.Munge(munge),
            keys=identity.KeyRing((uid, make_key(path)) for uid, path in keys.items()),
            names=names, hostname=socket.gethostname())
        self._muffler = Muffler()
        self._threads = {means: ThreadPoolExecutor(THREADS, thread_name_prefix=f"rfaas-{means}")
                         for means in ("munge", "key")}
        self._audit = None if audit is None else Audit(audit)
        self._strangers = Strangers()

    async def watch(self, server: web.Server[Any]) -> None:
        """Ends connections on which nobody proves who he is, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            ended = self._strangers.to_end(server.connections, self._clock())
            for connection in ended:
                if connection.transport is not None:
                    connection.transport.abort()
            if ended and (times := self._muffler.hear("stranger", self._clock(), len(ended))) is not None:
                log.warning("%d connections ended on which nobody proved who he is", times)

    def close(self) -> None:
        """Safe to call twice."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        if self._audit is not None:
            self._audit.close()

    @property
    def means(self) -> tuple[str, ...]:
        """What can be proved by over a network; none: nobody can call over it."""
        return self._verifier.means

    @property
    def refused(self) -> Mapping[str, int]:
        """How often nobody was believed, by what was wrong."""
        return dict(self._muffler.counts)

    def check_network(self, where: object) -> None:
        """ConfigError where a network's callers could prove nothing."""
        if not self.means:
            raise ConfigError(f"the manager can't listen on {where}: nobody could prove there who he is",
                              hint="let it believe MUNGE or shared keys, or use the Unix socket")

    def often(self, what: str) -> int | None:
        """How often it happened since it was last said in the log; None: not to be said now."""
        return self._muffler.hear(what, self._clock())

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Where a challenge is to be had."""
        router.add_get(identity.CHALLENGE_PATH, self._challenge)

    async def _challenge(self, _request: web.Request) -> web.Response:
        challenge = api.Challenge(self._verifier.challenges.make(self._clock()), self.means)
        return web.Response(body=msgspec.json.encode(challenge), content_type="application/json")

    # ---- who ---------------------------------------------------------------------------------------

    async def identify(self, request: web.Request) -> int:
        """The uid that the caller has proved; Unproved, which the middleware answers, if he has proved none."""
        caller = await self._caller(request)
        _caller_of.set(caller)
        self._strangers.knows(request.protocol)
        return caller.uid

    async def _caller(self, request: web.Request) -> Caller:
        transport = request.transport
        peer = None if transport is None else transport.get_extra_info("socket")
        if peer is None:
            raise Unproved("the connection has ended")
        if peer.family == socket.AF_UNIX:
            uid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            return Caller(uid, "peer")
        here = peer.getsockname()
        # Nothing of the body is read for somebody who has no challenge of ours.
        claim = self._verifier.claim(request.headers.get("Authorization"), request.method, request.raw_path,
                                     (here[0], here[1]), tls=request.secure, now=self._clock())
        body = await request.read()
        caller = await self._in_thread(claim.shown.means, self._verifier.prove, claim, body)
        self._verifier.accept(claim, self._clock())
        return caller

    async def _in_thread(self, means: str, what: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads[means], what, *arguments)

    # ---- answers -----------------------------------------------------------------------------------

    @property
    def middleware(self) -> Callable[[web.Request, Callable[[web.Request], Awaitable[web.StreamResponse]]],
                                     Awaitable[web.StreamResponse]]:
        """Answers who has proved nothing, seals other answers, and writes down what was asked."""
        @web.middleware
        async def around(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
                         ) -> web.StreamResponse:
            try:
                response = await answered(request, handler)
            except web.HTTPException as answer:
                # No such route, say: one that only another version has.
                answer.headers[skew.HEADER] = __version__
                raise
            if not response.prepared:
                response.headers[skew.HEADER] = __version__
            return response

        async def answered(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
                           ) -> web.StreamResponse:
            _caller_of.set(None)             # that of the request before on this connection
            try:
                response = await handler(request)
            except Unproved as problem:
                return self._unproved(request, problem)
            except AuthError as error:
                return self._mute(error)
            caller = _caller_of.get()
            if caller is None or not isinstance(response, web.Response):
                return response
            if (entry := await self._change(request, caller, response.status, _bytes(response))) is not None:
                self._write_down(entry)
            return await self._sealed(caller, response) if caller.sealed else response
        return around

    def _unproved(self, request: web.Request, problem: Unproved) -> web.Response:
        why = str(problem)
        if self.when_refused is not None:
            self.when_refused()
        if (times := self._muffler.hear(problem.kind, self._clock())) is not None:
            log.warning("from %s: %s (%d times since this was last said)", request.remote or "?", why, times)
        answer = _problem(401, why, problem.hint)
        answer.headers["WWW-Authenticate"] = identity.SCHEME
        return answer

    async def _sealed(self, caller: Caller, response: web.Response) -> web.Response:
        try:
            proof, body = await self._in_thread(caller.means, caller.answer, response.status, _bytes(response))
        except AuthError as error:
            return self._mute(error)
        return web.Response(status=response.status, body=body, headers={identity.ANSWER_HEADER: proof},
                            content_type="application/octet-stream")

    def _mute(self, error: AuthError) -> web.Response:
        # What it granted is told with the same request again.
        if (times := self._muffler.hear("mute", self._clock())) is not None:
            log.error("the manager can't prove its answers: %s (%d times since this was last said)", error, times)
        return _problem(503, "the manager can't prove its answer at the moment", "try again with the same request")

    def channel(self, request: web.Request, *, heartbeat: float, max_msg_size: int) -> AgentChannel:
        """The web socket that an identified caller opens; to be opened."""
        caller = _caller_of.get()
        assert caller is not None
        socket = web.WebSocketResponse(heartbeat=heartbeat, max_msg_size=max_msg_size)
        return AgentChannel(self, request, caller, socket)

    # ---- who did what ------------------------------------------------------------------------------

    async def _change(self, request: web.Request, caller: Caller, status: int, answer: bytes) -> dict[str, Any] | None:
        resource = request.match_info.route.resource
        route = None if resource is None else _AUDITED.get((request.method, resource.canonical))
        if self._audit is None or route is None:
            return None
        body = b"{}" if route.body is None else await request.read()
        return entry(route.name, request.path, caller, request.remote or "unix", body, status, answer, time.time())

    def _write_down(self, entry: Mapping[str, Any]) -> None:
        assert self._audit is not None
        try:
            self._audit.write(entry)
        except OSError as error:
            if (times := self._muffler.hear("audit", self._clock())) is not None:
                log.error("%d lines of the audit log %s are lost: %s", times, self._audit.path, error)


def entry(what: str, path: str, caller: Caller, where: str, body: bytes, status: int, answer: bytes,
          at: float) -> dict[str, Any]:
    """A line of the audit log, pure."""
    try:
        said = msgspec.json.decode(answer, type=_Said)
    except UNREADABLE:
        said = _Said(error="an answer that can't be read")
    try:
        asked = msgspec.to_builtins(msgspec.json.decode(body, type=_AskedFor))
    except UNREADABLE:
        asked = {"unreadable": len(body)}
    line = {"at": at, "uid": caller.uid, "proved": caller.how, "from": where, "what": what, "path": path,
            "asked": {field: value for field, value in asked.items() if value is not None}, "status": status}
    if said.leases:
        line["leases"] = [[lease.id, lease.node] for lease in said.leases]
    if said.incarnation:
        line["incarnation"] = said.incarnation
    if said.error:
        line["error"] = said.error
    return line


class AgentChannel:
    """One agent's web socket: what it says and is told, sealed where it came over a network without TLS."""

    def __init__(self, callers: Callers, request: web.Request, caller: Caller, socket: web.WebSocketResponse) -> None:
        self._callers, self._request, self._caller, self.socket = callers, request, caller, socket
        self._seal: identity.Channel | None = None
        self._sending = asyncio.Lock()

    async def open(self) -> None:
        """Answers the opening. ConnectionError, AuthError where that can't be done."""
        hello = ""
        if self._caller.sealed:
            hello, self._seal = await self._callers._in_thread(self._caller.means, self._caller.channel)
        await self.socket.prepare(self._request)
        if self._seal is not None:
            await self.socket.send_str(hello)

    async def say(self, data: bytes) -> None:
        """Sends one message. ConnectionError."""
        # Sealed messages have to travel in the order of their numbers.
        async with self._sending:
            if self._seal is None:
                await self.socket.send_str(data.decode())
            else:
                await self.socket.send_bytes(self._seal.seal(data))

    async def messages(self) -> AsyncIterator[bytes]:
        """What the agent says, until it ends or what comes is not its."""
        async for message in self.socket:
            if self._seal is None and message.type is WSMsgType.TEXT:
                yield message.data.encode()
            elif self._seal is not None and message.type is WSMsgType.BINARY:
                try:
                    said = self._seal.open(message.data)
                except AuthError as error:
                    log.warning("from %s: an agent's channel is closed: %s", self._request.remote or "?", error)
                    await self.socket.close()
                    return
                yield said
            else:
                return

    async def close(self) -> None:
        """Safe to call twice."""
        await self.socket.close()


def _problem(status: int, error: str, hint: str) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(api.Problem(error, hint)),
                        content_type="application/json")


def _bytes(response: web.Response) -> bytes:
    body = response.body
    return body if isinstance(body, bytes) else b""
