"""The agent's line to its manager: reports up, orders down, in a thread of its own that nothing else waits for.

    report(), used() ──▶ Outbox ──▶ web socket ──▶ manager
    tell(Admitted | Orders | ReportDue | LinkLost) ◀──┘

The line registers the agent, keeps the connection, makes a new one when it breaks
and registers again then. A manager that is away is no concern of the leases that
run.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote

import msgspec

from rfaas_mpi import api, identity, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.agent.websocket import Answer, Opcode, Stream
from rfaas_mpi.client import (
    NO_ANSWER,
    ManagerAddress,
    check_owner,
    check_version,
    connect_s,
    lost,
    prover_of,
    read_challenge,
    refusal,
    tls_of,
)
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError, RFaaSError, ServiceLost

__all__ = ["LinkLost", "ManagerLink", "News", "Outbox", "ReportDue", "heartbeat_s", "retry_s"]

log = logging.getLogger("rfaas_mpi.agent.link")

HEARTBEAT_S = 10.0
JITTER = 0.2                     # so that a thousand agents that started together don't report together
COALESCE_S = 0.02                # what changes meanwhile travels in one report
RETRY_MIN_S = 0.1
RETRY_MAX_S = 5.0
ANSWER_S = 30.0                  # a manager whose disk is full says so after 5
PING_S = 10.0
LINES_MAX = 500                  # of usage, in one report: each has up to 6 KiB of kernels' names
MESSAGE_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class ReportDue:
    """The manager expects to hear something: `report()` how things are now."""


@dataclass(frozen=True)
class LinkLost:
    """The manager can't be reached; the line goes on trying. Said once, until it was reached again."""

    reason: str


News: TypeAlias = api.Admitted | api.Orders | ReportDue | LinkLost


class _Answer(api.Orders, frozen=True):
    """What comes on the web socket: orders, or a Problem (then there is an `error`)."""

    error: str = ""
    hint: str = ""


_ANSWER = msgspec.json.Decoder(_Answer)
_LINE = msgspec.json.Decoder(api.UsedLine)


# ---- pure ----------------------------------------------------------------------------------------

def heartbeat_s(chance: float) -> float:
    """How long after a report the next one is due; `chance` lies in [0, 1)."""
    return HEARTBEAT_S * (1 - JITTER + 2 * JITTER * chance)


def retry_s(attempt: int, chance: float) -> float:
    """How long to wait after so many attempts in vain: twice as long each time, up to 5 s, half of it by chance."""
    return min(RETRY_MAX_S, RETRY_MIN_S * 2.0**min(attempt, 16)) * (0.5 + 0.5 * chance)


class Outbox:
    """What is still to be said, pure: the latest report, and used lines until a report that carried them was answered.

    One report is under way at a time. A line keeps the incarnation in which it was
    first to be sent: sent again after a new registration it is still the same line.
    What workers that run have used so far goes along with what is to be said anyway:
    the latest of each, until it was taken or the worker's end is to be told.
    """

    def __init__(self) -> None:
        self.incarnation = 0                         # 0: not admitted
        self._report: api.Report | None = None       # not sent yet
        self._lines: deque[api.UsedLine] = deque()
        self._running: dict[tuple[int, int], api.UsedLine] = {}      # by incarnation and worker
        self._under_way = 0                          # so many of the first lines
        self._running_sent: tuple[api.UsedLine, ...] = ()
        self._sent_ns = 0                            # the report that waits for its answer; 0: none does
        self._newest_ns = 0                          # the last report of all, until it was answered
        self.taken_ns = 0                            # the moment of the last report that was answered

    @property
    def said(self) -> bool:
        """The manager has taken all that was to be said."""
        return not self._newest_ns and not self._lines

    @property
    def lines(self) -> int:
        """Used lines that no answer has taken yet."""
        return len(self._lines)

    def admitted(self, incarnation: int) -> None:
        """Reports are sent under this number from now on, none that was made before."""
        self.incarnation = incarnation
        self._report = None
        self.lost()
        self._lines = deque(self._of(line) for line in self._lines)

    def put(self, report: api.Report) -> None:
        """A newer report takes the place of one that wasn't sent."""
        if report.incarnation == self.incarnation:
            self._report, self._newest_ns = report, report.clock_ns

    def use(self, lines: Iterable[api.UsedLine]) -> None:
        """Lines to be sent with the next reports. ValueError for one that the manager would refuse."""
        for line in [self._of(_checked(line)) for line in lines]:
            self._running.pop((line.incarnation, line.number), None)
            self._lines.append(line)

    def running(self, lines: Iterable[api.UsedLine]) -> None:
        """What workers have used so far. ValueError as `use`."""
        for line in [self._of(_checked(line)) for line in lines]:
            self._running[line.incarnation, line.number] = line

    def take(self) -> api.Report | None:
        """What to send now, None if there is nothing or an answer is awaited."""
        if self._report is None or self._sent_ns:
            return None
        report, self._report = self._report, None
        carried = tuple(line for line, _ in zip(self._lines, range(LINES_MAX), strict=False))
        self._under_way, self._sent_ns = len(carried), report.clock_ns
        self._running_sent = tuple(line for line, _ in zip(self._running.values(), range(LINES_MAX - len(carried)),
                                                           strict=False))
        return msgspec.structs.replace(report, used=carried + self._running_sent)

    def answered(self, clock_ns: int) -> bool:
        """The report of that moment was taken, and its lines with it. True if more lines wait."""
        if not clock_ns or clock_ns != self._sent_ns:
            return False
        for _ in range(self._under_way):
            self._lines.popleft()
        for line in self._running_sent:
            if self._running.get((line.incarnation, line.number)) is line:
                del self._running[line.incarnation, line.number]
        if self._newest_ns == clock_ns:
            self._newest_ns = 0
        self._under_way, self._sent_ns, self._running_sent = 0, 0, ()
        self.taken_ns = clock_ns
        return bool(self._lines or self._running)

    def refused(self) -> None:
        """The report under way was not taken: its lines go with the next one."""
        self._under_way, self._sent_ns, self._running_sent = 0, 0, ()

    lost = refused                                   # nor is it known whether it was

    @property
    def awaits_answer(self) -> bool:
        """A report is under way."""
        return self._sent_ns != 0

    @property
    def waits(self) -> bool:
        """There is a report to send now."""
        return self._report is not None and not self._sent_ns

    def _of(self, line: api.UsedLine) -> api.UsedLine:
        if line.incarnation or not self.incarnation:
            return line
        return msgspec.structs.replace(line, incarnation=self.incarnation)


def _checked(line: api.UsedLine) -> api.UsedLine:
    return _LINE.decode(msgspec.json.encode(line))


# ---- one connection ----------------------------------------------------------------------------------

class _Again(Exception):
    """The manager wants to have the agent registered again."""


class _Connection:
    """One life of the line: calls, and the web socket, both proved and sealed where they go over a network."""

    def __init__(self, settings: Settings, address: ManagerAddress, connect_s: float) -> None:
        self._settings = settings
        self._address = address
        self._connect_s = connect_s
        self._prover = prover_of(settings, address)
        self._tls = tls_of(settings, address)
        self._stream: Stream | None = None
        self._seal: identity.Channel | None = None

    async def close(self) -> None:
        """Waits for nobody. Safe to call twice."""
        if self._stream is not None:
            await self._stream.close()

    async def register(self, start: api.StartAgent) -> api.Admitted:
        """The number for reports. Errors as ManagerClient.call."""
        data, path = msgspec.json.encode(start), "/v1/agents"
        asked, headers = await self._proved("POST", path, data)
        answer = await self._asked("POST", path, {**headers, "Content-Type": "application/json"}, data)
        proof, said = answer.headers.get(identity.ANSWER_HEADER), answer.body
        check_version(self._address, answer.status, answer.headers.get(skew.HEADER, ""))
        if asked is not None and not (answer.status == 401 and proof is None):
            said = await asyncio.to_thread(asked.open, answer.status, proof, said)
        if answer.status != 200:
            raise refusal("start_agent", answer.status, said)
        return msgspec.json.decode(said, type=api.Admitted)

    async def open(self, node: str) -> None:
        """Opens the web socket on which reports go up and orders come down."""
        path = f"/v1/agents/{quote(node, safe='')}/channel"
        asked, headers = await self._proved("GET", path, b"")
        stream = await self._connected()
        await stream.upgrade(path, {skew.HEADER: __version__, **headers}, ANSWER_S)
        if asked is not None and self._address.scheme == "http":
            async with asyncio.timeout(ANSWER_S):
                hello = await stream.hear()
            self._seal = await asyncio.to_thread(asked.channel, hello.data.decode())

    async def say(self, data: bytes) -> None:
        assert self._stream is not None
        if self._seal is None:
            await self._stream.say(Opcode.TEXT, data)
        else:
            await self._stream.say(Opcode.BINARY, self._seal.seal(data))

    async def hear(self) -> bytes:
        """The next message. ServiceLost at the end, AuthError for one that isn't the manager's."""
        assert self._stream is not None
        kind, data = await self._stream.hear()
        if self._seal is not None:
            return self._seal.open(data)
        if kind is not Opcode.TEXT:
            raise lost(self._address, "sends what is no message")
        return data

    async def beat(self) -> None:
        """Goes on for as long as the manager gives signs of life, then ServiceLost."""
        assert self._stream is not None
        await self._stream.beat(PING_S)

    async def _connected(self) -> Stream:
        """Where the next request goes; AuthError for a Unix socket that others listen on."""
        if self._stream is not None and not self._stream.ended:
            return self._stream
        await self.close()
        self._stream = await Stream.open(self._address, self._tls, wait_s=self._connect_s, bytes_max=MESSAGE_BYTES_MAX)
        if self._address.scheme == "unix":
            check_owner(self._stream.socket, self._address, self._settings)
        return self._stream

    async def _asked(self, method: str, path: str, headers: Mapping[str, str], data: bytes) -> Answer:
        stream = await self._connected()
        return await stream.request(method, path, {skew.HEADER: __version__, **headers}, data, ANSWER_S)

    async def _proved(self, method: str, path: str, data: bytes) -> tuple[identity.Asked | None, dict[str, str]]:
        if self._prover is None:
            return None, {}
        answer = await self._asked("GET", identity.CHALLENGE_PATH, {}, b"")
        challenge = read_challenge(self._address, answer.status, answer.body)
        # munged may take its time.
        asked = await asyncio.to_thread(self._prover.ask, method, path, data, challenge)
        return asked, {"Authorization": asked.header}


# ---- the thread ------------------------------------------------------------------------------------

class ManagerLink:
    """Owns one thread and its connections; `tell` is called in that thread and must not wait.

    After each `Admitted`, which comes again whenever the line was broken, mostly
    with the same number, the agent reports; and after each `ReportDue`. An agent
    that doesn't is silent to the manager. The line ends by itself once another
    agent has taken the node over (`Orders.superseded`).
    """

    def __init__(self, settings: Settings, *, start: api.StartAgent, tell: Callable[[News], None]) -> None:
        """ConfigError where no manager is named, or not as it should be; AuthError for a key file of somebody else."""
        if settings.manager is None:
            raise ConfigError("no manager is named", hint="set RFAAS_MANAGER, like unix:/run/rfaas/manager.sock")
        self._settings = settings
        self._addresses = ManagerAddress.parse_all(settings.manager)
        self._turn = 0                               # whose it is: one of them leads
        for address in self._addresses:              # what is wrong with it is said now
            prover_of(settings, address)
            tls_of(settings, address)
        self._start = start
        self._tell = tell
        self._outbox = Outbox()
        self._lock = threading.Lock()                # over the outbox, and these:
        self._answered = threading.Condition(self._lock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._news = asyncio.Event()                 # of the loop
        self._lending: tuple[str, ...] | None = None         # as it was said last
        self._attempt = 0
        self._reached = True                         # or nobody was told yet that it isn't
        self._unexpected = ""                        # what was told last of its kind
        self._thread = threading.Thread(target=self._run, name="rfaas-manager-link", daemon=True)

    # ---- any thread ----

    def start(self) -> None:
        """Begins to register, and goes on until it is done."""
        self._thread.start()

    def report(self, report: api.Report) -> None:
        """How things are now; what was not sent yet is forgotten. `used` is the line's own."""
        with self._lock:
            self._outbox.put(report)
            self._wake()

    def used(self, lines: Iterable[api.UsedLine]) -> None:
        """What workers used: travels with reports until the manager has written it down. ValueError as `Outbox.use`."""
        with self._lock:
            self._outbox.use(lines)

    def running(self, lines: Iterable[api.UsedLine]) -> None:
        """What workers have used so far: the latest of each travels with the next report. ValueError as `used`."""
        with self._lock:
            self._outbox.running(lines)

    @property
    def unwritten(self) -> int:
        """Used lines that the manager has not written down yet, as far as is known here."""
        with self._lock:
            return self._outbox.lines

    @property
    def taken_ns(self) -> int:
        """The agent's clock in the last report that the manager has taken; 0: it has taken none."""
        with self._lock:
            return self._outbox.taken_ns

    def flush(self, timeout_s: float) -> bool:
        """Waits until the manager has taken the last report and all used lines; False if it hasn't by then."""
        with self._lock:
            return self._answered.wait_for(lambda: self._outbox.said, timeout_s)

    def close(self) -> None:
        """Ends thread and connection; what was not sent is lost. Safe to call twice, not in `tell`."""
        with self._lock:
            self._closed = True
            if self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)
        if self._thread.ident is not None:
            self._thread.join()

    def _wake(self) -> None:
        # The lock is held: the loop can't end meanwhile.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._news.set)

    # ---- its own ----

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except asyncio.CancelledError:
            log.debug("node=%s the line to the manager is closed", self._start.node)

    async def _live(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await self._keep()
        finally:
            with self._lock:
                self._loop = self._task = None

    async def _keep(self) -> None:
        while True:
            same = False
            try:
                await self._live_once()
                return
            except _Again:
                same = True
                log.info("node=%s the manager wants the agent to register again", self._start.node)
            except (RFaaSError, *NO_ANSWER, OSError) as error:
                self._lost(error)
            except Exception as error:
                # Without its line the agent would lend nothing any more, and nobody would hear why.
                self._lost(error, unexpected=True)
            if not same and self._next():
                continue
            await asyncio.sleep(retry_s(self._attempt, random.random()))
            self._attempt += 1

    def _next(self) -> bool:
        """It is another manager's turn; True if that is before one that was tried since the last pause."""
        self._turn += 1
        return self._turn % len(self._addresses) != 0

    @property
    def _address(self) -> ManagerAddress:
        return self._addresses[self._turn % len(self._addresses)]

    def _lost(self, error: Exception, *, unexpected: bool = False) -> None:
        # That it is away is said once; a fault of ours, each time that it is another one.
        news, self._reached = self._reached, False
        if not news and (not unexpected or repr(error) == self._unexpected):
            return
        self._unexpected = repr(error) if unexpected else ""
        log.log(logging.ERROR if unexpected else logging.WARNING, "node=%s the line to the manager is broken: %s",
                self._start.node, error, exc_info=error if unexpected else None)
        if news:
            self._tell(LinkLost(str(error) or type(error).__name__))

    async def _live_once(self) -> None:
        """Until another agent took the node over; raises what broke the line."""
        connection = None
        try:
            connection = _Connection(self._settings, self._address,
                                     connect_s(self._settings, len(self._addresses)))
            admitted = await connection.register(self._start)
            await connection.open(self._start.node)
            self._reached = True
            await self._serve(connection, admitted)
        finally:
            with self._lock:
                self._outbox.lost()
            if connection is not None:
                await connection.close()

    async def _serve(self, connection: _Connection, admitted: api.Admitted) -> None:
        """Until another agent took the node over; raises what broke the line."""
        with self._lock:
            self._outbox.admitted(admitted.incarnation)
        self._tell(admitted)
        tasks = [asyncio.create_task(each)
                 for each in (self._speak(connection), self._listen(connection), connection.beat())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _speak(self, connection: _Connection) -> None:
        due = time.monotonic() + heartbeat_s(random.random())
        sent = -COALESCE_S
        while True:
            self._news.clear()
            now = time.monotonic()
            report = None
            if now >= sent + COALESCE_S:
                with self._lock:
                    report = self._outbox.take()
            if report is not None:
                sent, due = now, now + heartbeat_s(random.random())
                await connection.say(msgspec.json.encode(report))
                continue
            with self._lock:
                awaits, waits = self._outbox.awaits_answer, self._outbox.waits
            if awaits and now >= sent + ANSWER_S:
                raise ServiceLost(f"the manager at {self._address} has not answered a report for {ANSWER_S:g} s")
            if now >= due:
                due = now + heartbeat_s(random.random())
                self._tell(ReportDue())
            until = min([due, *([sent + COALESCE_S] if waits else []), *([sent + ANSWER_S] if awaits else [])])
            try:
                # Not wait_for: up to Python 3.11 it loses a cancellation that comes with the news.
                async with asyncio.timeout(max(0.0, until - now)):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def _listen(self, connection: _Connection) -> None:
        while True:
            orders = _ANSWER.decode(await connection.hear())
            if orders.error:
                # Taken or not: it is said again, after a while, on a line that knows nothing of it.
                raise ServiceLost(f"the manager at {self._address} says: {orders.error}", hint=orders.hint)
            with self._lock:
                more = self._outbox.answered(orders.clock_ns)
                self._answered.notify_all()
            if orders.clock_ns:
                self._attempt = 0
            if orders.register:
                raise _Again
            if orders.stop or orders.keys or orders.superseded or orders.lending not in (None, self._lending):
                self._lending = orders.lending
                self._tell(api.Orders(orders.stop, orders.superseded, orders.keys, lending=orders.lending))
            if orders.superseded:
                return
            if more:
                self._tell(ReportDue())
            self._news.set()
