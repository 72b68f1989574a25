"""The manager's HTTP shell: proves who calls, decodes, asks the cluster, and answers once it is on disk.

Decisions are made in cluster.py and below; here are one loop, one writer that makes
groups durable in a thread, and one timer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from rfaas_mpi import api
from rfaas_mpi.errors import AuthError, RFaaSError, ServiceError, StoreError
from rfaas_mpi.leases import Lease, LeaseBook, NodeReport
from rfaas_mpi.manager.cluster import Cluster, Policy, session_number
from rfaas_mpi.manager.core import Action, Admit, Granted, Notify, Refused, StopWorkers, Superseded
from rfaas_mpi.manager.ledger import Ledger, Usage
from rfaas_mpi.manager.registry import Group, Registry
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import pick_cores

__all__ = ["Identify", "ManagerServer", "peer_uid"]

log = logging.getLogger("rfaas_mpi.manager.server")

BODY_BYTES_MAX = 4 << 20
WRITE_RETRY_S = 1.0              # the disk was full
WRITE_WAIT_S = 5.0               # who waits longer for it is told so
TICK_MAX_S = 5.0
EVENTS_KEPT = 10_000
AGENT_PING_S = 10.0

Identify = Callable[[web.Request], Awaitable[int]]
"""Who calls: the uid that he has proved. AuthError if he has proved none."""


async def peer_uid(request: web.Request) -> int:
    """The uid of the process at the other end of a Unix socket, by the kernel's word."""
    transport = request.transport
    peer = None if transport is None else transport.get_extra_info("socket")
    if peer is None or peer.family != socket.AF_UNIX:
        raise AuthError("who calls over a network has to prove who he is, and this manager can't check it",
                        hint="call it on its Unix socket")
    return struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]


class _Refusal(Exception):
    """An answer that is none of the operation's."""

    def __init__(self, status: int, error: str, hint: str = "") -> None:
        super().__init__(error)
        self.status, self.hint = status, hint


class ManagerServer:
    """Owns the ledger, the listening sockets and every connection; use it with `async with`.

    `status` problems are answers, never exceptions of the loop: what a caller sent
    is his error (4xx), a ledger that can't be written is 503 and is tried again.
    """

    def __init__(self, ledger: Ledger, *, policy: Policy = Policy(), identify: Identify = peer_uid,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._identify = identify
        self._ledger = ledger
        self.registry = Registry(ledger, pick_cores, clock())
        self.cluster = Cluster(self.registry.book, clock(), policy=policy)
        self._asking: dict[tuple[int, int], list[asyncio.Future[Granted | Refused]]] = {}
        self._written: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()
        self._sooner = asyncio.Event()
        self._channels: dict[str, web.WebSocketResponse] = {}
        self._told: deque[tuple[int, api.Event]] = deque(maxlen=EVENTS_KEPT)       # (uid, event)
        self._next_event = 1
        self._tasks: list[asyncio.Task[None]] = []
        self._runner: web.AppRunner | None = None
        self._decoders = {route.body: msgspec.json.Decoder(route.body) for route in api.ROUTES if route.body}
        self._page = json.dumps(api.openapi()).encode()

    @property
    def book(self) -> LeaseBook:
        return self.registry.book

    # ---- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> ManagerServer:
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        for route in api.ROUTES:
            application.router.add_route(route.method, route.path, self._handler(route))
        application.router.add_get("/openapi.json", self._openapi)
        application.router.add_get("/v1/agents/{node}/channel", self._channel)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await self._runner.setup()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._keep_time())]
        return self

    async def wait(self) -> None:
        """Serves until it is cancelled; raises what ended its writer or its timer, without which nothing is granted."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def listen_unix(self, path: Path, mode: int = 0o666) -> None:
        """Listens there; everybody may connect, since the kernel says who it is."""
        assert self._runner is not None
        await web.UnixSite(self._runner, str(path)).start()
        path.chmod(mode)

    async def close(self) -> None:
        """Answers nobody any more and lets go of the ledger. Safe to call twice."""
        for channel in list(self._channels.values()):
            await channel.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._ledger.close()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    # ---- disk first, then everything else --------------------------------------------------------------

    def _do(self, actions: list[Action], usage: Iterable[Usage] = ()) -> asyncio.Future[None]:
        """Has these actions done; the future ends when they are on disk and done."""
        self.registry.add(actions)
        self.registry.used(usage)
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        self._wake.set()
        self._sooner.set()
        return self._written

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            group, written, self._written = self.registry.take(), self._written, None
            while True:
                try:
                    actions = await asyncio.to_thread(self.registry.write, group)
                    break
                except StoreError as error:
                    log.error("nothing is granted: %s", error)
                    group = Group()          # the registry has kept the other
                    await asyncio.sleep(WRITE_RETRY_S)
            for action in actions:
                await self._act(action)
            if written is not None and not written.done():
                written.set_result(None)

    async def _act(self, action: Action) -> None:
        match action:
            case Granted(session=session, request=request) | Refused(session=session, request=request):
                for waiting in self._asking.pop((session, request), []):
                    if not waiting.done():
                        waiting.set_result(action)
            case StopWorkers(node=node):
                if (channel := self._channels.get(node)) is not None:
                    await _say(channel, api.Orders(stop=(_order(action),)))
            case Notify():
                lease = self.book.lease(action.lease_id)
                if lease is not None:
                    self._told.append((lease.uid, api.Event(self._next_event, action.lease_id, action.workers,
                                                              action.cause, action.grace_s)))
                    self._next_event += 1

    async def _durable(self, written: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(written), WRITE_WAIT_S)
        except TimeoutError:
            raise _Refusal(503, "the manager can't write to its disk at the moment",
                           "try again with the same request; leases that run are not affected") from None

    async def _keep_time(self) -> None:
        while True:
            now = self._clock()
            if now >= self.cluster.next_deadline():
                self._do(self.cluster.tick(now))
            pause = max(0.0, min(TICK_MAX_S, self.cluster.next_deadline() - self._clock()))
            self._sooner.clear()
            try:
                await asyncio.wait_for(self._sooner.wait(), pause)
            except TimeoutError:
                continue

    # ---- requests ------------------------------------------------------------------------------------

    def _handler(self, route: api.Route) -> Callable[[web.Request], Awaitable[web.Response]]:
        operation = getattr(self, f"_{route.name}")

        async def handle(request: web.Request) -> web.Response:
            try:
                uid = await self._identify(request)
                if route.body is None:
                    answer = await operation(uid, request)
                else:
                    answer = await operation(uid, request, self._decoders[route.body].decode(await request.read()))
                return _json(200, answer)
            except _Refusal as problem:
                return _json(problem.status, api.Problem(str(problem), problem.hint))
            except msgspec.MsgspecError as problem:
                return _json(400, api.Problem(f"the body is no {route.body.__name__ if route.body else 'body'}: "
                                              f"{problem}", "see /openapi.json"))
            except AuthError as problem:
                return _json(403, _problem(problem))
            except RFaaSError as problem:
                return _json(409, _problem(problem))
            except ValueError as problem:
                return _json(400, api.Problem(str(problem)))

        return handle

    async def _openapi(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._page, content_type="application/json")

    async def _start_agent(self, uid: int, _request: web.Request, body: api.StartAgent) -> api.Admitted:
        actions = self.cluster.agent_started(uid, body.node, body.agent, self._clock())
        await self._durable(self._do(actions))
        (admit,) = [action for action in actions if isinstance(action, Admit)]
        return api.Admitted(body.node, admit.incarnation)

    async def _report(self, uid: int, request: web.Request, body: api.Report) -> api.Orders:
        return await self._reported(uid, request.match_info["node"], body)

    async def _reported(self, uid: int, node: str, body: api.Report) -> api.Orders:
        now = self._clock()
        report = NodeReport(
            node=node, spare=body.spare, memory_bytes=body.memory_bytes, numa=body.numa, grace_s=body.grace_s,
            hard_end=None if body.ends_in_s is None else now + body.ends_in_s, incarnation=body.incarnation,
            clock_ns=body.clock_ns, live=body.live)
        actions = self.cluster.report(uid, report, now)
        name = self.cluster.node_name(uid, node)
        used = [Usage(node=name, incarnation=body.incarnation, number=line.number, lease=line.lease, uid=lease.uid,
                      cores=line.cores, memory_bytes=line.memory_bytes, held_s=line.held_s, cpu_s=line.cpu_s,
                      exec_s=line.exec_s, poll_s=line.poll_s, invocations=line.invocations, kernel=line.kernel)
                for line in body.used
                # An agent speaks for its own node's leases only.
                if (lease := self.book.lease(line.lease)) is not None and lease.node == name]
        await self._durable(self._do(actions, used))
        return api.Orders(
            stop=tuple(_order(action) for action in actions if isinstance(action, StopWorkers) and action.node == name),
            superseded=any(isinstance(action, Superseded) for action in actions))

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        """One kept-alive connection of an agent: reports up, orders down, whenever there are some."""
        node = request.match_info["node"]
        try:
            uid = await self._identify(request)
            name = self.cluster.node_name(uid, node)
        except RFaaSError as problem:
            return _json(403 if isinstance(problem, AuthError) else 409, _problem(problem))
        channel = web.WebSocketResponse(heartbeat=AGENT_PING_S, max_msg_size=BODY_BYTES_MAX)
        await channel.prepare(request)
        decode = self._decoders[api.Report].decode
        try:
            async for message in channel:
                if message.type is not WSMsgType.TEXT:
                    break
                try:
                    report = decode(message.data)
                    orders = await self._reported(uid, node, report)
                except (msgspec.MsgspecError, RFaaSError, ValueError, _Refusal) as problem:
                    await _say(channel, api.Problem(f"the report was not taken: {problem}"))
                    continue
                if not orders.superseded:
                    # Who reports last is the node's agent; its orders travel here.
                    self._channels[name] = channel
                await _say(channel, orders)
        finally:
            if self._channels.get(name) is channel:
                del self._channels[name]
        return channel

    async def _ask(self, uid: int, _request: web.Request, body: api.AskLease) -> api.LeaseGrant:
        key = (session_number(uid, body.session), body.request_id)
        actions = self.cluster.ask(uid, body.session, LeaseRequest(
            body.request_id, body.workers_min, body.workers_max, body.cores_per_worker, body.memory_per_worker,
            body.timeout_s), self._clock())
        answer: asyncio.Future[Granted | Refused] = asyncio.get_running_loop().create_future()
        self._asking.setdefault(key, []).append(answer)
        written = self._do(actions)
        try:
            if any(isinstance(action, (Granted, Refused)) for action in actions):
                await self._durable(written)
            match await answer:
                case Granted(leases=leases, reason=reason):
                    return api.LeaseGrant(tuple(self._lent(lease) for lease in leases), reason)
                case Refused(reason=reason):
                    raise _Refusal(409, reason, "ask for fewer workers, or wait longer for them")
        finally:
            waiting = self._asking.get(key, [])
            if answer in waiting:
                waiting.remove(answer)
                if not waiting:
                    del self._asking[key]

    def _lent(self, lease: Lease) -> api.LentLease:
        now = self._clock()
        return api.LentLease(
            id=lease.id, epoch=lease.epoch, node=lease.node, host=lease.node, workers=lease.workers,
            memory_per_worker=lease.memory_per_worker,
            hard_end_in_s=None if lease.hard_end is None else max(0.0, lease.hard_end - now),
            grant=b"", secret=b"", addresses=())

    async def _leases(self, uid: int, _request: web.Request) -> api.Leases:
        return api.Leases(tuple(self.cluster.leases(uid)))

    async def _release(self, uid: int, request: web.Request) -> api.Done:
        try:
            actions = self.cluster.release(uid, _lease_number(request), self._clock())
        except ServiceError as problem:
            raise _Refusal(404, Exception.__str__(problem), problem.hint) from None
        await self._durable(self._do(actions))
        return api.Done()

    async def _revoke(self, uid: int, request: web.Request, body: api.RevokeLease) -> api.Done:
        try:
            actions = self.cluster.revoke(uid, _lease_number(request), body.grace_s, self._clock())
        except ServiceError as problem:
            raise _Refusal(404, Exception.__str__(problem), problem.hint) from None
        await self._durable(self._do(actions))
        return api.Done()

    async def _end_session(self, uid: int, request: web.Request) -> api.Done:
        session = request.match_info["session"]
        await self._durable(self._do(self.cluster.end_session(uid, session, self._clock())))
        for key in [key for key in self._asking if key[0] == session_number(uid, session)]:
            for waiting in self._asking.pop(key):
                if not waiting.done():
                    waiting.set_result(Refused(*key, reason="its session has ended"))
        return api.Done()

    async def _nodes(self, uid: int, _request: web.Request) -> api.Nodes:
        return api.Nodes(tuple(self.cluster.nodes(uid)))

    async def _drain(self, uid: int, _request: web.Request, body: api.DrainNodes) -> api.Done:
        await self._durable(self._do(self.cluster.drain(uid, list(body.nodes), body.grace_s, self._clock())))
        return api.Done()

    async def _undrain(self, uid: int, _request: web.Request, body: api.UndrainNodes) -> api.Done:
        await self._durable(self._do(self.cluster.undrain(uid, list(body.nodes), self._clock())))
        return api.Done()

    async def _usage(self, uid: int, request: web.Request) -> api.UsageSums:
        self.cluster.administrator(uid, "sees everybody's usage")
        by = request.query.get("by", "uid")
        if by not in ("uid", "node", "kernel", "lease"):
            raise _Refusal(400, f"by is {by!r}", "ask by uid, node, kernel or lease")
        return api.UsageSums(by, tuple(await asyncio.to_thread(self._ledger.usage, by=by)))

    async def _policy(self, _uid: int, _request: web.Request) -> api.PolicyView:
        policy = self.cluster.policy
        return api.PolicyView(tuple(sorted(policy.lenders)), tuple(sorted(policy.admins)))

    async def _events(self, uid: int, request: web.Request) -> api.Events:
        text = request.query.get("after", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _Refusal(400, f"after is {text[:40]!r}", "it is the number of the last event that you know, or 0")
        after = int(text)
        own = tuple(event for owner, event in self._told
                    if event.number > after and (owner == uid or uid in self.cluster.policy.admins))
        return api.Events(self._next_event - len(self._told), own)


def _order(action: StopWorkers) -> api.StopOrder:
    return api.StopOrder(action.lease_id, action.workers, action.cause, action.grace_s)


def _lease_number(request: web.Request) -> int:
    text = request.match_info["lease"]
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 20):
        raise _Refusal(400, f"{text[:40]!r} is no number of a lease")
    return int(text)


def _problem(error: RFaaSError) -> api.Problem:
    return api.Problem(Exception.__str__(error), error.hint)


def _json(status: int, body: msgspec.Struct) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


async def _say(channel: web.WebSocketResponse, what: msgspec.Struct) -> None:
    try:
        await channel.send_str(msgspec.json.encode(what).decode())
    except ConnectionError as error:
        # It comes again with the agent's next report.
        log.info("an agent's channel broke: %s", error)
