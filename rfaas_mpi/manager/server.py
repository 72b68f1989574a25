"""The manager's HTTP shell: proves who calls, decodes, asks the cluster, and answers once it is on disk.

Decisions are made in cluster.py and below; here are one loop, one writer that makes
groups durable in a thread, and one timer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

import msgspec
from aiohttp import web

from rfaas_mpi import api, skew
from rfaas_mpi.errors import (
    AuthError,
    ConfigError,
    NotLeading,
    RFaaSError,
    ServiceError,
    StoreError,
    VersionMismatch,
)
from rfaas_mpi.leases import Lease, LeaseBook, NodeReport, NodeTraits, Release
from rfaas_mpi.manager.bodies import UNREADABLE, Bodies, check_version
from rfaas_mpi.manager.callers import AgentChannel, Callers
from rfaas_mpi.leases.held import Held
from rfaas_mpi.manager.accounts import KernelUse, Usage
from rfaas_mpi.manager.cluster import Cluster, Policy, check_known_node, session_number
from rfaas_mpi.manager.credit import Lent
from rfaas_mpi.manager.core import Action, Admit, Granted, Refused, StopWorkers, Superseded
from rfaas_mpi.manager.days import moment, period
from rfaas_mpi.manager.directory import Directory, Registration
from rfaas_mpi.manager.keys import Keys, check_agent_key, name_of
from rfaas_mpi.manager.ledger import USAGE_BY, USAGE_SUMS, Ledger
from rfaas_mpi.manager.metrics import CONTENT_TYPE, Metrics
from rfaas_mpi.manager.registry import Group, Registry
from rfaas_mpi.messages import LeaseRequest, RankAt
from rfaas_mpi.placement import Placer
from rfaas_mpi.remote import Address, listen, tune
from rfaas_mpi.slurm.facts import LEAD_S, Seen
from rfaas_mpi.slurm.reader import Reader
from rfaas_mpi.types import TcpOptions

__all__ = ["ManagerServer"]

log = logging.getLogger("rfaas_mpi.manager.server")

BODY_BYTES_MAX = 4 << 20
BACKLOG = 8192                   # all agents come at once when the manager is back
LINGER_S = 0.01                  # a report waits so long for others to be written down with
WRITE_RETRY_S = 1.0              # the disk was full
WRITE_WAIT_S = 5.0               # who waits longer for it is told so
CUT_OFF_S = 30.0                 # a manager that leads, and doesn't reach its store for so long, ends
TICK_MAX_S = 5.0
TELLING_MAX = 10_000             # orders that are on their way to agents
AGENT_PING_S = 10.0
CLOSE_S = 2.0                    # how long an end waits for who doesn't listen
KEYS_EVERY_S = 2.0               # how soon other keys in its directory are seen


class _Refusal(Exception):
    """An answer that is none of the operation's."""

    def __init__(self, status: int, error: str, hint: str = "") -> None:
        super().__init__(error)
        self.status, self.hint = status, hint


class _Asked:
    """Requests that wait for one answer; `told` once one of them has it."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[Granted | Refused]] = []
        self.told = False


class _Flush:
    """A group on its way to the disk, and who waits for it, the first one first. One timer for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()      # until when
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Returns once it is on disk. _Refusal where that takes longer than WRITE_WAIT_S."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        until = self._loop.time() + WRITE_WAIT_S
        self._waiting.append((until, waiter))
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._late)
        await waiter

    def done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for _, waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    def _late(self) -> None:
        # A timer comes a little early at times.
        now = self._loop.time() + 0.001
        while self._waiting and self._waiting[0][0] <= now:
            _, waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(_cant_write())
        self._timer = self._loop.call_at(self._waiting[0][0], self._late) if self._waiting else None


class _Writer:
    """A thread that writes one group after the other; an executor's costs as much as the writing."""

    def __init__(self, write: Callable[[Group], list[Action]]) -> None:
        self._write = write
        self._groups: SimpleQueue[tuple[Group, asyncio.Future[list[Action]]] | None] = SimpleQueue()
        self._thread: Thread | None = None

    def write(self, group: Group) -> asyncio.Future[list[Action]]:
        """What may be done once it is on disk; StoreError where it can't be written."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="rfaas-ledger-writer", daemon=True)
            self._thread.start()
        future: asyncio.Future[list[Action]] = asyncio.get_running_loop().create_future()
        self._groups.put((group, future))
        return future

    def close(self) -> None:
        """Ends the thread, once it has written what it was given. Safe to call twice."""
        self._groups.put(None)

    def _run(self) -> None:
        while (one := self._groups.get()) is not None:
            group, future = one
            actions: list[Action] = []
            problem: BaseException | None = None
            try:
                actions = self._write(group)
            except BaseException as error:          # whoever waits for it raises it
                problem = error
            # Nobody waits any more where the loop was closed.
            with suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_settle, future, actions, problem)


def _settle(future: asyncio.Future[list[Action]], actions: list[Action], problem: BaseException | None) -> None:
    if future.done():
        return
    if problem is None:
        future.set_result(actions)
    else:
        future.set_exception(problem)


class ManagerServer:
    """Owns the ledger, the listening sockets and every connection; use it with `async with`.

    `status` problems are answers, never exceptions of the loop: what a caller sent
    is his error (4xx), a ledger that can't be written is 503 and is tried again.
    """

    def __init__(self, ledger: Ledger, *, keys: Keys | None = None, policy: Policy = Policy(),
                 callers: Callers | None = None, clock: Callable[[], float] = time.monotonic,
                 slurm: Reader[Seen] | None = None) -> None:
        """`slurm`: what is planned for nodes, and whose jobs there lend what they leave idle."""
        self._clock = clock
        self._slurm = slurm
        self._lending: dict[str, tuple[str, ...]] | None = None    # node → jobs; None: it isn't known
        self.callers = callers or Callers()
        self._ledger = ledger
        self._policy_is = policy
        placer = Placer(policy.placement, policy.settings)
        held = Held(policy.half_life_s)
        held.add(ledger.core_s(policy.half_life_s), clock())
        self._loans = self._lenders(policy, clock())
        self.registry = Registry(ledger, placer, clock(), quota=self._quota, held=held, lent=self._loans, clock=clock)
        self.cluster = Cluster(self.registry.book, clock(), policy=policy, placer=placer, lent=self._loans)
        self.registry.owners = self.cluster.owners
        self.directory = Directory(ledger.agents())
        # Users' own that aren't heard of are forgotten some day.
        self.cluster.expected(self.directory.nodes, clock())
        self.keys = keys or Keys.fresh()
        self.metrics = Metrics(self.cluster, slurm)
        self.callers.when_refused = self.metrics.unproved.inc
        self._closing = False
        self._asking: dict[tuple[int, int], _Asked] = {}
        self._flush: _Flush | None = None
        self._wake = asyncio.Event()
        self._sooner = asyncio.Event()
        self._sleeps_until = 0.0
        self._lingering: asyncio.TimerHandle | None = None
        self._channels: dict[str, tuple[int, AgentChannel]] = {}       # and whose it is: the incarnation
        self._writer = _Writer(self.registry.write)
        # Readers fill asyncio's own: who leads would show no life behind them.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="rfaas-ledger")
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._metrics_runner: web.AppRunner | None = None
        self._bodies = Bodies(route.body for route in api.ROUTES if route.body)
        self._page = json.dumps(api.openapi()).encode()

    def _lenders(self, policy: Policy, now: float) -> Lent | None:
        if not policy.credit.weight:
            return None
        kept, core_s = self._ledger.lent(policy.credit.half_life_s)
        return Lent(policy.credit.half_life_s, now, kept=kept, core_s=core_s)

    def _quota(self, uid: int) -> int | None:
        """Cores that the user may hold at a time: what the policy says, and what his credit adds."""
        policy = self._policy_is
        most = policy.quota(uid)
        if most is None or self._loans is None or not policy.credit.extra_cores:
            return most
        credit = policy.credit.of(self._loans.core_s_of(uid, self._clock()))
        return most + policy.credit.cores(credit)

    @property
    def book(self) -> LeaseBook:
        return self.registry.book

    # ---- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> ManagerServer:
        application = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=(self.callers.middleware,))
        for route in api.ROUTES:
            application.router.add_route(route.method, route.path, self._handler(route))
        application.router.add_get("/openapi.json", self._openapi)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/v1/agents/{node}/channel", self._channel)
        self.callers.add_routes(application.router)
        # A caller that is gone must not hold up others.
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False, handler_cancellation=True,
                                     shutdown_timeout=CLOSE_S)
        await self._runner.setup()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._keep_time()),
                       asyncio.create_task(self._keep_keys()),
                       asyncio.create_task(self.callers.watch(self._runner.server))]
        if self._ledger.keep_s is not None:
            self._tasks.append(asyncio.create_task(self._keep_leading(self._ledger.keep_s)))
        if self._slurm is not None:
            self._tasks.append(asyncio.create_task(self._keep_reading(self._slurm)))
        return self

    async def wait(self) -> None:
        """Serves until it is cancelled; raises what ended its writer or its timer, without which nothing is granted.

        NotLeading: another manager has taken its ledger over.
        """
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def listen_unix(self, path: Path, mode: int = 0o666) -> None:
        """Listens there; everybody may connect, since the kernel says who it is."""
        assert self._runner is not None
        await web.UnixSite(self._runner, str(path), backlog=BACKLOG).start()
        path.chmod(mode)

    async def listen_network(self, address: Address, tls: ssl.SSLContext | None = None) -> str:
        """Listens on TCP, behind TLS if there is a certificate; the address that callers name. ConfigError, OSError.

        Refused where nobody could prove there who he is.
        """
        assert self._runner is not None
        self.callers.check_network(address)
        bound = await self._listen(self._runner, address, tls)
        return f"{'http' if tls is None else 'https'}://{str(bound).removeprefix('tcp://')}"

    async def listen_metrics(self, address: Address) -> str:
        """Listens for Prometheus, which proves nothing and sees only `/metrics`; the URL. ConfigError, OSError."""
        application = web.Application()
        application.router.add_get("/metrics", self._public_metrics)
        self._metrics_runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await self._metrics_runner.setup()
        bound = await self._listen(self._metrics_runner, address, None)
        return f"http://{str(bound).removeprefix('tcp://')}/metrics"

    async def _listen(self, runner: web.AppRunner, address: Address, tls: ssl.SSLContext | None) -> Address:
        try:
            listener, bound = await asyncio.to_thread(listen, address)
        except OSError as error:
            raise ConfigError(f"the manager can't listen on {address}: {error.strerror or error}") from None
        # Each connection has it from its listener: a caller whose node is gone doesn't wait for ever.
        tune(listener, TcpOptions())
        await web.SockSite(runner, listener, ssl_context=tls, backlog=BACKLOG).start()
        return bound

    async def close(self) -> None:
        """Answers nobody any more and lets go of the ledger. Safe to call twice."""
        self._closing = True
        for asked in self._asking.values():
            for waiting in asked.waiting:
                if not waiting.done():
                    waiting.set_exception(_Refusal(503, "the manager is ending", "ask again when it is back"))
        closing = [asyncio.create_task(channel.close()) for _, channel in self._channels.values()]
        if closing:
            await asyncio.wait(closing, timeout=CLOSE_S)
        for runner in (self._runner, self._metrics_runner):
            if runner is not None:
                await runner.cleanup()
        self._runner = self._metrics_runner = None
        ending = [*self._tasks, *self._telling, *closing]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._tasks = []
        self._ledger.close()
        self._writer.close()
        self._disk.shutdown(wait=False, cancel_futures=True)
        self.callers.close()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    # ---- disk first, then everything else --------------------------------------------------------------

    def _do(self, actions: list[Action], usage: Iterable[Usage] = (), *, lingers: bool = False) -> _Flush:
        """Has these actions done; what is returned is done when they are on disk and done.

        `lingers`: nobody is in a hurry, so that others may share the flush, unless an action is for somebody else.
        """
        self.registry.add(actions)
        self.registry.used(usage)
        loop = asyncio.get_running_loop()
        if self._flush is None:
            self._flush = _Flush(loop)
        if not lingers or any(isinstance(action, (Granted, Refused, StopWorkers)) for action in actions):
            self._wake.set()
        elif self._lingering is None:
            self._lingering = loop.call_later(LINGER_S, self._wake.set)
        if self.cluster.next_deadline() < self._sleeps_until:
            self._sooner.set()
        return self._flush

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._lingering is not None:
                self._lingering.cancel()
                self._lingering = None
            group, flush, self._flush = self.registry.take(), self._flush, None
            while True:
                try:
                    if not self.registry.must_write(group):
                        # Agents had no news: a thread would cost more than all the rest.
                        actions = self.registry.write(group)
                        break
                    with self.metrics.write_s.time():
                        actions = await self._writer.write(group)
                    break
                except NotLeading:
                    raise
                except StoreError as error:
                    self.metrics.write_failures.inc()
                    log.error("nothing is granted: %s", error)
                    group = Group()          # the registry has kept the other
                    await asyncio.sleep(WRITE_RETRY_S)
            for action in actions:
                self._act(action)
            if flush is not None:
                flush.done()

    def _act(self, action: Action) -> None:
        match action:
            case Granted(session=session, request=request) | Refused(session=session, request=request):
                self._count(action)
                if (asked := self._asking.pop((session, request), None)) is not None:
                    for waiting in asked.waiting:
                        if not waiting.done():
                            waiting.set_result(action)
            case StopWorkers(node=node):
                if (found := self._channels.get(node)) is not None:
                    self._tell(found[1], api.Orders(stop=(_order(action),)))

    def _tell(self, channel: AgentChannel, orders: api.Orders) -> None:
        """Without waiting: an agent that doesn't read holds nobody up. What is left out comes with its next report."""
        if len(self._telling) < TELLING_MAX:
            task = asyncio.create_task(_say(channel, orders))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def _count(self, answer: Granted | Refused) -> None:
        if isinstance(answer, Granted):
            self.metrics.granted.inc(len(answer.leases))
        else:
            self.metrics.refused.inc()

    async def _answered(self, answer: asyncio.Future[Granted | Refused], within_s: float) -> Granted | Refused:
        """What becomes of a demand; it is said once it is on disk, and that has to be within this time."""
        late = asyncio.get_running_loop().call_later(within_s, _too_late, answer)
        try:
            return await answer
        finally:
            late.cancel()

    async def _keep_time(self) -> None:
        while True:
            now = self._clock()
            if now >= self.cluster.next_deadline():
                self._tick(now)
            self._forget(now)
            now = self._clock()
            self._sleeps_until = min(now + TICK_MAX_S, self.cluster.next_deadline())
            pause = max(0.0, self._sleeps_until - now)
            self._sooner.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._sooner.wait()
            except TimeoutError:
                continue

    def _tick(self, now: float) -> None:
        agents = self.cluster.agents
        silent, dead = agents.silent, agents.dead
        self._do(self.cluster.tick(now))
        for node in sorted(agents.silent - silent):
            log.warning("node=%s is silent: its leases go on, nothing more is lent there", node)
        for node in sorted(agents.dead - dead):
            log.error("node=%s is dead: its leases are lost", node)

    def _forget(self, now: float) -> None:
        for node in self.cluster.forget(now):
            log.info("node=%s is its user's and dead for long: it is forgotten", node)
            self.directory.forget(node)
            self.registry.agents(node, ())
            self._do([])

    async def _keep_reading(self, slurm: Reader[Seen]) -> None:
        """Reads again and again what is planned for nodes, and ends their windows from their next report on; whose jobs
        lend is said in answer to reports.
        """
        away = ""
        while True:
            # In a thread of its own: a slurmctld that is busy may take half a minute.
            seen = await asyncio.to_thread(slurm.look)
            if slurm.error and slurm.error != away:
                log.warning("what is planned for nodes can't be read, what is known stays: %s", slurm.error)
            elif away and not slurm.error:
                log.info("what is planned for nodes can be read again")
            away = slurm.error
            if seen is not None:
                before, self._lending = self._lending or {}, seen.lending
                for node, (_, channel) in self._channels.items():
                    if "/" not in node and (jobs := seen.lending.get(node, ())) != before.get(node, ()):
                        self._tell(channel, api.Orders(lending=jobs))
            later = self._clock() - time.time()
            starts = {} if seen is None else seen.starts
            self.cluster.windows_end({node: at - LEAD_S + later for node, at in starts.items()})
            await asyncio.sleep(slurm.next_in_s)

    async def _keep_leading(self, every_s: float) -> None:
        since: float | None = None       # it fails
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._disk, self._ledger.keep)
                since = None
            except NotLeading:
                raise
            except StoreError as error:
                log.error("nothing is granted: %s", error)
                now = self._clock()
                since = now if since is None else since
                if now - since >= CUT_OFF_S:
                    # Another manager may lead: ranks and agents look for it once nobody listens here.
                    raise
            await asyncio.sleep(every_s)

    async def _keep_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            try:
                if self.keys.again():
                    log.info("grants are signed with %s from now on", " or ".join(map(name_of, self.keys.public)))
            except RFaaSError as error:
                log.error("the keys stay as they were: %s", error)

    # ---- requests ------------------------------------------------------------------------------------

    def _handler(self, route: api.Route) -> Callable[[web.Request], Awaitable[web.Response]]:
        operation = getattr(self, f"_{route.name}")

        async def handle(request: web.Request) -> web.Response:
            try:
                uid = await self.callers.identify(request)
                data = b"" if route.body is None else await request.read()
                theirs = request.headers.get(skew.HEADER, "")
                check_version(theirs, request.match_info, data)
                if route.body is None:
                    answer = await operation(uid, request)
                else:
                    answer = await operation(uid, request, self._body(route.body, data, theirs))
                return _json(200, answer)
            except _Refusal as problem:
                return _json(problem.status, api.Problem(str(problem), problem.hint))
            except VersionMismatch as problem:
                return self._other_version(problem)
            except AuthError as problem:
                self.metrics.unproved.inc()
                return _json(403, _problem(problem))
            except RFaaSError as problem:
                return _json(409, _problem(problem))
            except ValueError as problem:
                return _json(400, api.Problem(str(problem)))

        return handle

    def _other_version(self, problem: VersionMismatch) -> web.Response:
        # Agents try again and again.
        if (times := self.callers.often("version")) is not None:
            log.error("refused: %s (%d times since this was last said)", problem, times)
        return _json(426, _problem(problem))

    def _body(self, kind: type[Any], data: bytes, theirs: str = "") -> Any:
        try:
            return self._bodies.read(kind, data, theirs)
        except UNREADABLE as problem:
            raise _Refusal(400, f"the body is no {kind.__name__}: {problem}", "see /openapi.json") from None

    async def _openapi(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._page, content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            await self.callers.identify(request)
        except AuthError as problem:
            self.metrics.unproved.inc()
            return _json(403, _problem(problem))
        return await self._public_metrics(request)

    async def _public_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _start_agent(self, uid: int, request: web.Request, body: api.StartAgent) -> api.Admitted:
        check_agent_key(body.key)
        name = self.cluster.node_name(uid, body.node)
        self.directory.check_room(name)
        actions: list[Action] = []
        incarnation = self.directory.known_as(name, body.agent)
        if incarnation is None:
            actions = self.cluster.agent_started(uid, body.node, body.agent, self._clock())
            (incarnation,) = [action.incarnation for action in actions if isinstance(action, Admit)]
        self.directory.add(Registration(name, body.agent, incarnation, body.boot_id, body.key, body.addresses,
                                        body.host, request.headers.get(skew.HEADER, "")))
        self.registry.agents(name, self.directory.of_node(name))
        self.cluster.expected((name,), self._clock())
        await self._do(actions).wait()
        log.info("node=%s agent=%s uid=%d is admitted as %d, at %s", name, body.agent, uid, incarnation,
                 " ".join(body.addresses))
        return api.Admitted(name, incarnation, self.keys.public)

    async def _report(self, uid: int, request: web.Request, body: api.Report) -> api.Orders:
        return await self._reported(uid, request.match_info["node"], body)

    async def _reported(self, uid: int, node: str, body: api.Report) -> api.Orders:
        name = self.cluster.node_name(uid, node)
        # What ended long ago may be told of late, and the book remembers only so many.
        owners = {line.lease: (lease.uid, lease.node) for line in body.used
                  if (lease := self.book.lease(line.lease)) is not None}
        if forgotten := {line.lease for line in body.used} - set(owners):
            owners |= await asyncio.to_thread(self._ledger.owners, forgotten)
        now = self._clock()
        agent = self.directory.get(name, body.incarnation)
        report = NodeReport(
            node=node, spare=body.spare, memory_bytes=body.memory_bytes, numa=body.numa, grace_s=body.grace_s,
            hard_end=None if body.ends_in_s is None else now + body.ends_in_s, incarnation=body.incarnation,
            clock_ns=body.clock_ns, live=body.live, over=body.over,
            traits=_traits(body.traits, now, "" if agent is None else agent.host))
        strange = not self.directory.of_node(name) and 1 <= body.incarnation <= self.book.epoch
        if strange and uid not in self.cluster.policy.lenders:
            # Only registering counts how many nodes a user has. No report is answered: it is to be said again.
            return api.Orders(register=True)
        known = agent is not None
        if not known:
            # Nothing can be granted for it; what it runs still holds its cores.
            report = msgspec.structs.replace(report, spare=())
        actions = self.cluster.report(uid, report, now, jobs=body.owners)
        if self.book.heard(name) == (body.incarnation, body.clock_ns):
            self.registry.reported(name, body.incarnation, body.clock_ns)
        superseded = any(isinstance(action, Superseded) for action in actions)
        if (known and self.book.heard(name) == (body.incarnation, body.clock_ns)
                and self.directory.reported(name, body.incarnation, body.clock_ns, now)):
            self.registry.agents(name, self.directory.of_node(name))
        used = [Usage(node=name, incarnation=line.incarnation or body.incarnation, number=line.number, lease=line.lease,
                      uid=owners[line.lease][0], seat=line.seat,
                      cores=line.cores, memory_bytes=line.memory_bytes, held_s=line.held_s, cpu_s=line.cpu_s,
                      exec_s=line.exec_s, poll_s=line.poll_s, invocations=line.invocations,
                      kernels=tuple(KernelUse(one.kernel, one.exec_s, one.invocations) for one in line.kernels))
                for line in body.used
                # An agent speaks for its own node's leases only.
                if owners.get(line.lease, (0, ""))[1] == name]
        await self._do(actions, used, lingers=True).wait()
        before = self._channels.get(name)
        if known and before is not None and before[0] < body.incarnation and not superseded:
            # It would lend and begin leases until its own next report is answered.
            del self._channels[name]
            self._tell(before[1], api.Orders(superseded=True))
        told = uid in self.cluster.policy.lenders and self._lending is not None
        return api.Orders(
            stop=tuple(_order(action) for action in actions if isinstance(action, StopWorkers) and action.node == name),
            superseded=superseded, register=not known and not superseded, clock_ns=body.clock_ns,
            keys=self.directory.say(name, body.incarnation, self.keys.public) if known and not superseded else (),
            lending=self._lending.get(name, ()) if told and self._lending is not None else None)

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        """One kept-alive connection of an agent: reports up, orders down, whenever there are some."""
        node = request.match_info["node"]
        try:
            uid = await self.callers.identify(request)
            name = self.cluster.node_name(uid, node)
            theirs = request.headers.get(skew.HEADER, "")
            check_version(theirs, request.match_info, b"")
        except ValueError as problem:
            return _json(400, api.Problem(str(problem)))
        except VersionMismatch as problem:
            return self._other_version(problem)
        except RFaaSError as problem:
            return _json(403 if isinstance(problem, AuthError) else 409, _problem(problem))
        channel = self.callers.channel(request, heartbeat=AGENT_PING_S, max_msg_size=BODY_BYTES_MAX)
        await channel.open()
        try:
            async for message in channel.messages():
                try:
                    report = self._body(api.Report, message, theirs)
                    orders = await self._reported(uid, node, report)
                except (RFaaSError, ValueError, _Refusal) as problem:
                    await _say(channel, api.Problem(f"the report was not taken: {problem}"))
                    continue
                if not orders.superseded:
                    # Who reports last is the node's agent; its orders travel here.
                    self._channels[name] = report.incarnation, channel
                await _say(channel, orders)
        finally:
            if (found := self._channels.get(name)) is not None and found[1] is channel:
                del self._channels[name]
        return channel.socket

    async def _ask(self, uid: int, _request: web.Request, body: api.AskLease) -> api.LeaseGrant:
        key = (session_number(uid, body.session), body.request_id)
        repeated = self.book.remembers(*key)
        actions = self.cluster.ask(uid, body.session, self._request_of(body), self._clock())
        answer: asyncio.Future[Granted | Refused] = asyncio.get_running_loop().create_future()
        asked = self._asking.setdefault(key, _Asked())
        asked.waiting.append(answer)
        self._do(actions)
        decided = any(isinstance(action, (Granted, Refused)) for action in actions)
        try:
            match await self._answered(answer, WRITE_WAIT_S + (0.0 if decided else body.timeout_s)):
                case Granted(leases=leases, reason=reason):
                    granted = api.LeaseGrant(self._lent(leases), reason)
                    if body.job and leases:
                        self.registry.job(key[0], body.job)
                        self._do([])
                    asked.told = True
                    return granted
                case Refused(reason=reason):
                    raise _Refusal(409, reason, "ask for fewer workers, or wait longer for them")
        except asyncio.CancelledError:
            alone = all(waiting is answer for waiting in asked.waiting)
            if alone and not asked.told and not repeated and not self._closing:
                self._do(self.cluster.give_up(uid, body.session, body.request_id, self._clock()))
            raise
        finally:
            asked.waiting.remove(answer)
            if not asked.waiting and self._asking.get(key) is asked:
                del self._asking[key]

    def _lent(self, leases: tuple[Lease, ...]) -> tuple[api.LentLease, ...]:
        """The leases with their grants; those that can't be granted any more, or not like this, end."""
        now = self._clock()
        live = [held.state.live for lease in leases if (held := self.book.lease(lease.id)) is not None]
        if leases and not any(live):
            raise _Refusal(409, "what was granted for this request has ended", "ask again, with a new request id")
        try:
            return tuple(self._lent_one(lease, now) for lease in leases)
        except RFaaSError:
            for lease in leases:
                self._do(self.cluster.manager.handle(Release(lease.session, lease.id), now))
            raise

    def _lent_one(self, lease: Lease, now: float) -> api.LentLease:
        to = self.directory.get(lease.node, lease.incarnation)
        if to is None:
            raise ServiceError(f"the agent of {lease.node} that was to begin lease {lease.id} is gone",
                               hint="ask again, with a new request id")
        hard_end_ns = None
        if lease.hard_end is not None:
            hard_end_ns = self.directory.clock_ns(lease.node, lease.incarnation, lease.hard_end)
            if hard_end_ns is None:
                raise _Refusal(503, f"the manager has started and not heard from {lease.node} yet",
                               "try again with the same request")
        return self.keys.lent(
            lease, to, seen_ns=max(1, lease.not_after_ns - int(self.registry.begin_within_s * 1e9)),
            hard_end_ns=hard_end_ns, believed=self.directory.believed(lease.node),
            hard_end_in_s=None if lease.hard_end is None else max(0.0, lease.hard_end - now))

    async def _explain(self, uid: int, _request: web.Request, body: api.AskLease) -> api.Explanation:
        found = self.cluster.explain(uid, body.session, self._request_of(body), self._clock())
        workers = sum(found.chosen.values())
        return api.Explanation(
            policy=self.cluster.policy.placement, granted=workers >= body.workers_min, workers=workers,
            reason=found.reason, nodes=tuple(api.ExplainedNode(
                verdict.node, found.chosen.get(verdict.node, 0), verdict.workers, verdict.refused,
                None if verdict.terms is None else api.Terms(
                    total_s=verdict.terms.total_s, queueing_s=verdict.terms.queueing_s,
                    transfer_s=verdict.terms.transfer_s, slowdown_s=verdict.terms.slowdown_s,
                    eviction_s=verdict.terms.eviction_s, fairness_s=verdict.terms.fairness_s))
                for verdict in found.nodes))

    def _request_of(self, body: api.AskLease) -> LeaseRequest:
        return LeaseRequest(
            body.request_id, body.workers_min, body.workers_max, body.cores_per_worker, body.memory_per_worker,
            body.timeout_s, body.duration_s, body.least_s, None if body.place is None else self._at(body.place),
            body.bytes_per_s, tuple(map(self._at, body.others)))

    def _at(self, place: api.Place) -> RankAt:
        # Ranks say what their host is called; people may name a node.
        agents = self.directory.of_node(place.node)
        return RankAt(agents[-1].host if agents else place.node, place.numa, place.switches, place.ranks)

    async def _leases(self, uid: int, _request: web.Request) -> api.Leases:
        return api.Leases(tuple(map(self._view, self.cluster.leases(uid))))

    async def _lease(self, uid: int, request: web.Request) -> api.LeaseView:
        try:
            return self._view(self.cluster.lease(uid, _lease_number(request.match_info["lease"])))
        except ServiceError as problem:
            raise _Refusal(404, Exception.__str__(problem), problem.hint) from None

    def _view(self, lease: Lease) -> api.LeaseView:
        now = self._clock()
        agent = self.directory.get(lease.node, lease.incarnation)
        return api.LeaseView(
            id=lease.id, epoch=lease.epoch, node=lease.node, host="" if agent is None else agent.host, uid=lease.uid,
            state=lease.state, workers=lease.workers, stopping=lease.stopping,
            memory_per_worker=lease.memory_per_worker, cause=lease.cause,
            hard_end_in_s=None if lease.hard_end is None else max(0.0, lease.hard_end - now),
            stop_in_s=None if lease.stop_by is None else max(0.0, lease.stop_by - now))

    async def _release(self, uid: int, request: web.Request) -> api.Done:
        try:
            actions = self.cluster.release(uid, _lease_number(request.match_info["lease"]), self._clock())
        except ServiceError as problem:
            raise _Refusal(404, Exception.__str__(problem), problem.hint) from None
        await self._do(actions).wait()
        return api.Done()

    async def _revoke(self, uid: int, request: web.Request, body: api.RevokeLease) -> api.Done:
        try:
            actions = self.cluster.revoke(uid, _lease_number(request.match_info["lease"]), body.grace_s, self._clock())
        except ServiceError as problem:
            raise _Refusal(404, Exception.__str__(problem), problem.hint) from None
        await self._do(actions).wait()
        return api.Done()

    async def _end_session(self, uid: int, request: web.Request) -> api.Done:
        session = request.match_info["session"]
        await self._do(self.cluster.end_session(uid, session, self._clock())).wait()
        for key in [key for key in self._asking if key[0] == session_number(uid, session)]:
            for waiting in self._asking.pop(key).waiting:
                if not waiting.done():
                    waiting.set_result(Refused(*key, reason="its session has ended"))
        return api.Done()

    async def _nodes(self, uid: int, _request: web.Request) -> api.Nodes:
        views = tuple(self.cluster.nodes(uid))
        versions = {view.node: known[-1].version for view in views if (known := self.directory.of_node(view.node))}
        return api.Nodes(views, {node: version for node, version in versions.items() if version})

    async def _drain(self, uid: int, _request: web.Request, body: api.DrainNodes) -> api.Done:
        await self._do(self.cluster.drain(uid, list(body.nodes), body.grace_s, self._clock())).wait()
        return api.Done()

    async def _undrain(self, uid: int, _request: web.Request, body: api.UndrainNodes) -> api.Done:
        await self._do(self.cluster.undrain(uid, list(body.nodes), self._clock())).wait()
        return api.Done()

    async def _usage(self, uid: int, request: web.Request) -> api.UsageSums:
        everybody = uid in self.cluster.policy.admins
        by = request.query.get("by", "uid")
        if by not in USAGE_BY:
            raise _Refusal(400, f"by is {by[:40]!r}", f"ask by {', '.join(USAGE_BY)}")
        days = period(request.query.get("since", ""), request.query.get("until", ""), time.time())
        if days and by == "lease":
            raise _Refusal(400, "by is 'lease', and the sums of days don't tell leases apart",
                           "leave since and until out: leases of the last 30 days are kept one by one")
        prices = self.cluster.policy.prices
        rows = await asyncio.to_thread(self._ledger.usage, by=by, uid=None if everybody else uid, period=days)
        if by == "uid" and not days:
            rows = await self._with_lent(rows, None if everybody else uid)
        return api.UsageSums(by, tuple({**row, "cost": prices.cost(row)} for row in rows),
                             msgspec.structs.asdict(prices), *days.dates())

    async def _with_lent(self, rows: list[dict[str, Any]], uid: int | None) -> list[dict[str, Any]]:
        """The rows of users with what they have lent; with rows of users who have only lent."""
        lent: dict[int, float] = {}
        if self._loans is not None:
            lent = await asyncio.to_thread(self._ledger.lent_core_s, uid)
            for owner, more in self._loans.unkept(self._clock()).items():
                if uid is None or owner == uid:
                    lent[owner] = lent.get(owner, 0.0) + more
        nothing = {name: 0 if name in ("workers", "invocations") else 0.0 for name in USAGE_SUMS}
        of = {row["uid"]: row for row in rows} | {owner: {"uid": owner, **nothing} for owner in
                                                  lent.keys() - {row["uid"] for row in rows}}
        now = self._clock()
        return [{**of[owner], "lent_core_s": lent.get(owner, 0.0), "credit_core_s": self.cluster.credit(owner, now)}
                for owner in sorted(of)]

    async def _policy(self, uid: int, _request: web.Request) -> api.PolicyView:
        policy = self.cluster.policy
        return api.PolicyView(
            tuple(sorted(policy.lenders)), tuple(sorted(policy.admins)), placement=policy.placement,
            cores_max=self._quota(uid), half_life_s=policy.half_life_s, weight=policy.weights.get(uid, 1.0))

    async def _events(self, uid: int, request: web.Request) -> api.Events:
        text = request.query.get("after", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _Refusal(400, f"after is {text[:40]!r}", "it is the number of the last event that you know, or 0")
        lease, node = request.query.get("lease"), request.query.get("node")
        since = moment("since", request.query.get("since", ""), time.time())
        everybody = uid in self.cluster.policy.admins
        number = None if lease is None else _lease_number(lease)
        if number is not None:
            # All leases whose events are kept are kept, too.
            owner = (await asyncio.to_thread(self._ledger.owners, (number,))).get(number)
            if owner is None or not (everybody or owner[0] == uid):
                raise _Refusal(404, f"uid {uid} has no lease {number}", "`rfaas logs` shows what became of all")
        return await asyncio.to_thread(
            self._ledger.events, after=int(text), since=since, uid=None if everybody else uid, lease=number,
            node=None if node is None else check_known_node("node", node))


def _traits(body: api.Traits, now: float, host: str) -> NodeTraits:
    return NodeTraits(
        host=host, since=None if body.window_age_s is None else now - body.window_age_s, classes=body.classes,
        physical=body.physical, busy=body.busy, cpu_type=body.cpu_type, partition=body.partition,
        switches=body.switches, nic_numa=body.nic_numa, network_load=body.network_load,
        memory_pressure=body.memory_pressure, speed=body.speed)


def _order(action: StopWorkers) -> api.StopOrder:
    return api.StopOrder(action.lease_id, action.workers, action.cause, action.grace_s)


def _lease_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 0 < int(text) < 1 << 63):
        raise _Refusal(400, f"lease is {text[:40]!r}, which is no number of a lease")
    return int(text)


def _too_late(answer: asyncio.Future[Granted | Refused]) -> None:
    if not answer.done():
        answer.set_exception(_cant_write())


def _cant_write() -> _Refusal:
    return _Refusal(503, "the manager can't write to its disk at the moment",
                    "try again with the same request; leases that run are not affected")


def _problem(error: RFaaSError) -> api.Problem:
    return api.Problem(Exception.__str__(error), error.hint)


def _json(status: int, body: msgspec.Struct) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")


async def _say(channel: AgentChannel, what: msgspec.Struct) -> None:
    try:
        await channel.say(msgspec.json.encode(what))
    except ConnectionError as error:
        # It comes again with the agent's next report.
        log.info("an agent's channel broke: %s", error)
