"""The agent's decisions: which workers to fork and to kill, and who caused a worker's end. Pure: facts and `now` in,
actions out.

           fork order          READY            its end, whoever caused it
    STARTING ───────▶ STARTING ─────▶ SERVING ─────▶ (gone; seat gets a new worker while its lease lives)
                          │  QUIT, later SIGKILL  │
                          └─────────▶ ENDING ◀────┘

How a worker's cores are taken back, each rung for all workers before the next:

    no more ranks are let in · SIGSTOP, if its owner is there and it has no low priority · ranks are told ·
    QUIT and the grace · SIGKILL · all its threads go to the agent's own cores, to end there: Freed ·
    it has ended: Stopped
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from rfaas_mpi.messages import Revoking, WorkerEnded, WorkerReady

__all__ = ["AgentCore", "Close", "Exit", "Fork", "Freed", "Halt", "KernelMeter", "Kill", "Meter", "Move", "Page",
           "Quit", "Stopped", "Tell", "Withdraw", "Worker", "classify"]

LAST_LINES = 20
CLOSED_KEPT = 64                     # connections of a worker, of which it is known whose they were
DEATHS = 5                           # so many deaths of one seat …
DEATHS_WITHIN_S = 1.0                # … within this time
BACK_OFF_S = 1.0                     # make its next worker wait so long
QUIT_GRACE_S = 0.3                   # QUIT ends after the current kernel; the rank that released does not wait for it
POLL_S = 0.015                       # how often pages are read while time limits are in use
POLL_IDLE_S = 0.1                    # and when none was seen for LIMITS_SEEN_S
LIMITS_SEEN_S = 5.0

# Why seats are given up whose ranks know it, and whose cores nobody waits for.
_KNOWN = frozenset(("released",))

# Sent from outside by people, launchers and the kernel's memory killer; a
# kernel does not die of them by its own mistake.
_FROM_OUTSIDE = frozenset((signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT))


@dataclass(frozen=True)
class KernelMeter:
    """What a kernel took in a worker: a part of its page's exec_ns and count; "" are all that have no line."""

    name: str
    exec_ns: int
    count: int


@dataclass(frozen=True)
class Page:
    """What a worker's page says."""

    invocation: int = 0
    connection: int = 0
    state: int = 0
    start_ns: int = 0
    limit_ns: int = 0
    exec_ns: int = 0
    poll_ns: int = 0
    count: int = 0
    kernels: tuple[KernelMeter, ...] = ()


@dataclass(frozen=True)
class Exit:
    """How a worker's process ended."""

    signal: int = 0
    exit_code: int = 0
    cpu_s: float = 0.0
    max_rss_bytes: int = 0
    oom: bool = False                # the kernel killed something for lack of memory meanwhile
    lost: bool = False               # with its zygote: nobody saw how


# ---- actions -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fork:
    """Have the lease's zygote fork this worker."""

    worker: int
    lease: int
    cores: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Quit:
    """Tell the worker to end after its current kernel."""

    worker: int


@dataclass(frozen=True)
class Halt:
    """SIGSTOP: nothing else keeps it from running beside an owner."""

    worker: int


@dataclass(frozen=True)
class Kill:
    """SIGKILL through its pidfd."""

    worker: int


@dataclass(frozen=True)
class Withdraw:
    """It is to end, and has no process yet: take its order back, and say so to ended(), if nobody has begun with it."""

    worker: int


@dataclass(frozen=True)
class Move:
    """It was killed: take every thread of it, and of what it started, off its cores. Then say so to cleared()."""

    worker: int


@dataclass(frozen=True)
class Tell:
    """Send the event to these sessions."""

    sessions: tuple[int, ...]
    event: Revoking | WorkerEnded | WorkerReady


@dataclass(frozen=True)
class Freed:
    """Nothing of this seat may run on these cores any more. What it held of memory may still be there."""

    lease: int
    seat: int
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Stopped:
    """Nothing of this seat is left and nothing will be: its memory is free, too."""

    lease: int
    seat: int


@dataclass(frozen=True)
class Meter:
    """What a worker has used, so far or in the end."""

    lease: int
    worker: int
    session: int
    cores: int
    held_s: float
    cpu_s: float
    exec_ns: int
    poll_ns: int
    count: int
    seat: int = 0
    kernels: tuple[KernelMeter, ...] = ()


@dataclass(frozen=True)
class Close:
    """The worker is forgotten: close what the shell holds for it."""

    worker: int


Action = Fork | Quit | Halt | Kill | Withdraw | Move | Tell | Freed | Stopped | Meter | Close


# ---- state ---------------------------------------------------------------------------------------

class State(StrEnum):
    WAITING = "waiting"              # for its turn to be forked (back-off)
    STARTING = "starting"
    SERVING = "serving"
    ENDING = "ending"


@dataclass
class Seat:
    """A worker's place in a lease: its cores, whoever sits there."""

    lease: int
    number: int
    cores: tuple[int, ...]
    memory_bytes: int
    worker: int = 0
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=DEATHS))
    stopping: str = ""               # the reason, once it is to be given up
    wanted: bool = False             # somebody waits for its cores
    freed: bool = False


@dataclass
class Worker:
    number: int
    seat: Seat
    session: int                     # owner of the lease
    state: State
    since: float
    replaces: int = 0
    pid: int = 0
    fork_at: float | None = None
    kill_at: float | None = None
    killed: str = ""                 # the reason of our own kill
    kill_invocation: int = 0
    connections: dict[int, int] = field(default_factory=dict)     # connection → session
    closed: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=CLOSED_KEPT))   # of late
    heirs: tuple[int, ...] = ()      # sessions that used the worker it replaces
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    watched: bool = False            # it has run an invocation with a time limit
    low: bool = False                # its scheduling group has low priority
    moved: bool = False

    @property
    def lease(self) -> int:
        return self.seat.lease


def classify(ended: Exit, page: Page, *, killed: str, kill_invocation: int) -> tuple[str, str]:
    """(cause, reason) of a worker's end: see docs/architecture.md.

    `killed` is the reason of a kill or a stop of our own ("" if there was none), `kill_invocation` the invocation
    that it was for.
    """
    ran = page.invocation != 0
    if killed == "closed" and ran and ended.signal == signal.SIGKILL:
        # What runs there now need not be what did it.
        return "unknown", killed
    if killed == "memory" and ran and ended.signal == signal.SIGKILL:
        # What earlier ones left behind counts, too: it is the kernels' all the same.
        return "kernel", killed
    if killed and (ended.signal == signal.SIGKILL or ended.lost or killed not in ("deadline", "cancel", "closed")):
        if killed == "deadline" and ran and page.invocation == kill_invocation:
            return "kernel", "deadline"
        # Also a deadline's or a cancel's kill that met the next invocation.
        return "infrastructure", killed
    if ended.lost:
        return "infrastructure", "service"
    if not ran:
        return "infrastructure", "signal" if ended.signal else "exit"
    if ended.signal == signal.SIGKILL and ended.oom:
        return "kernel", "memory"
    if ended.signal in _FROM_OUTSIDE:
        return "unknown", "signal"
    return "kernel", "signal" if ended.signal else "exit"


def _meter(worker: Worker, cpu_s: float, page: Page, now: float) -> Meter:
    return Meter(worker.lease, worker.number, worker.session, len(worker.seat.cores), max(0.0, now - worker.since),
                 cpu_s, page.exec_ns, page.poll_ns, page.count, worker.seat.number, page.kernels)


def _too_much(seat: Seat, worker: int) -> str:
    granted = f" than the {seat.memory_bytes} bytes that it was granted" if seat.memory_bytes else ""
    return (f"worker {worker} was killed for lack of memory: with what its kernel started it held more{granted}; "
            "ask for more with Executor(memory_per_worker=...), or take less at once")


class AgentCore:
    """The table of workers and what to do about it.

    The shell calls one method for each thing that happened, and does the
    returned actions in order. Unknown workers and leases are ignored: events
    about them race with their end.
    """

    def __init__(self, *, first_worker: int = 1) -> None:
        # Where killed workers end whose cores are wanted; none: on those.
        self.own_cores: tuple[int, ...] = ()
        self._next_worker = first_worker
        self._next_connection = 1
        self.workers: dict[int, Worker] = {}
        self.seats: dict[tuple[int, int], Seat] = {}
        self._owner: dict[int, int] = {}             # lease → session
        self._limits_seen = float("-inf")

    # ---- leases ----------------------------------------------------------------------------------

    def start(self, lease: int, session: int, seats: Mapping[int, tuple[int, ...]], memory_bytes: int,
              now: float) -> tuple[dict[int, int], list[Action]]:
        """A new lease: seat → worker number, and what to do. `memory_bytes` is what each worker gets."""
        self._owner[lease] = session
        numbers: dict[int, int] = {}
        actions: list[Action] = []
        for number, cores in seats.items():
            seat = Seat(lease, number, tuple(cores), memory_bytes)
            self.seats[lease, number] = seat
            worker = self._seat_worker(seat, session, now)
            numbers[number] = worker.number
            actions.append(self._fork(worker))
        return numbers, actions

    def stop(self, lease: int, seats: Iterable[int], reason: str, grace_s: float, now: float, *,
             owned: bool = False) -> list[Action]:
        """Gives seats up; Freed follows for each once nothing may run on its cores, Stopped once its worker is gone.

        `grace_s` is what running kernels get, 0: none. `owned`: an owner is on these cores, so that only workers of
        low priority have a grace.
        """
        gone: list[Action] = []
        halts: list[Action] = []
        quits: list[Action] = []
        ending: list[Worker] = []
        told: dict[tuple[int, ...], list[int]] = {}
        for number in list(seats):
            seat = self.seats.get((lease, number))
            if seat is None:
                continue
            first, seat.stopping = not seat.stopping, seat.stopping or reason
            seat.wanted |= reason not in _KNOWN
            worker = self.workers.get(seat.worker)
            if worker is None:
                self._give_up(seat, gone)
                continue
            if worker.state is State.WAITING:
                self._forget(worker, gone)
                self._give_up(seat, gone)
                continue
            if first and reason not in _KNOWN:
                told.setdefault(self._audience(worker), []).append(worker.number)
            hard = owned and not worker.low
            if hard and worker.pid and not worker.killed:
                halts.append(Halt(worker.number))
            if hard or worker.killed or grace_s <= 0:
                ending.append(worker)
            else:
                if worker.state is not State.ENDING:
                    worker.state = State.ENDING
                    quits.append(Quit(worker.number))
                worker.kill_at = min(worker.kill_at or now + grace_s, now + grace_s)
        tells = [Tell(sessions, Revoking(lease, tuple(workers), reason, max(0.0, grace_s)))
                 for sessions, workers in told.items() if sessions]
        return [*gone, *halts, *tells, *quits, *self._end(ending, reason)]

    def low(self, number: int) -> None:
        """The worker's scheduling group was seen to have low priority."""
        worker = self.workers.get(number)
        if worker is not None:
            worker.low = True

    def cleared(self, number: int) -> list[Action]:
        """The answer to Move: nothing of the worker may run on its cores."""
        worker = self.workers.get(number)
        if worker is None or not worker.seat.stopping:
            return []
        return self._freed(worker.seat)

    def seats_of(self, lease: int) -> list[int]:
        """Numbers of the seats that a lease still has here."""
        return [number for (owner, number) in self.seats if owner == lease]

    # ---- news from the shell ---------------------------------------------------------------------

    def forked(self, number: int, pid: int) -> list[Action]:
        """Its process exists."""
        worker = self.workers.get(number)
        if worker is None:
            return []
        worker.pid = pid
        # It was killed before it had a pid to kill.
        if not worker.killed:
            return []
        return [Kill(number), *self._end([worker], worker.killed)]

    def ready(self, number: int) -> list[Action]:
        """It can adopt connections."""
        worker = self.workers.get(number)
        if worker is None or worker.state is not State.STARTING:
            return []
        worker.state = State.SERVING
        if not worker.replaces:
            return []
        return [Tell(self._audience(worker), WorkerReady(worker.lease, number, worker.seat.cores, worker.replaces))]

    def attach(self, number: int, lease: int, session: int) -> int:
        """A rank's connection is on its way to the worker: its number; 0 if there is no such worker."""
        worker = self.workers.get(number)
        if worker is None or worker.lease != lease or worker.state is State.ENDING or worker.killed:
            return 0
        connection, self._next_connection = self._next_connection, self._next_connection + 1
        worker.connections[connection] = session
        return connection

    def gone(self, number: int, connection: int) -> None:
        """A rank closed that connection."""
        worker = self.workers.get(number)
        if worker is not None:
            if (session := worker.connections.pop(connection, None)) is not None:
                # What it has printed for that rank may be read later.
                worker.closed.append((connection, session))

    def output(self, number: int, lines: Sequence[tuple[str, int]]) -> dict[int, tuple[int, ...]]:
        """Keeps a worker's last lines; which of these (text, connection) go to which session.

        What a connection's invocation has printed goes to its session; what nobody's has, or nobody knows whose, to
        all that use the worker.
        """
        worker = self.workers.get(number)
        if worker is None:
            return {}
        worker.lines.extend(text for text, _ in lines)
        sessions = {**dict(worker.closed), **worker.connections}
        audience = self._audience(worker)
        owners = [sessions.get(connection, 0) for _, connection in lines]
        shown = {session: tuple(at for at, owner in enumerate(owners) if owner in (0, session)) for session in audience}
        return {session: mine for session, mine in shown.items() if mine}

    def kill(self, number: int, lease: int, reason: str, invocation: int, page: Page) -> tuple[bool, list[Action]]:
        """A rank wants it dead; with `invocation` only if that one is still running there."""
        worker = self.workers.get(number)
        if worker is None or worker.lease != lease or worker.killed:
            return False, []
        if invocation and page.invocation != invocation:
            return False, []
        return True, self._kill(worker, reason, invocation or page.invocation)

    def cut_off(self, number: int) -> list[Action]:
        """It lives, and its end of the agent socket is closed: a kernel took what is not its own. It is killed.

        One that was told to end is just doing so, and has until the end of its grace for it.
        """
        worker = self.workers.get(number)
        return self._kill(worker, "closed", 0) if worker is not None and worker.state is not State.ENDING else []

    def over_memory(self, number: int, page: Page) -> list[Action]:
        """It holds more than it was granted, and no control group bounds it. It is killed."""
        worker = self.workers.get(number)
        return self._kill(worker, "memory", page.invocation) if worker is not None else []

    def meters(self, seen: Mapping[int, tuple[float, Page]], now: float) -> list[Meter]:
        """What workers have used so far, of those whose CPU time and page were seen."""
        return [_meter(self.workers[number], cpu_s, page, now) for number, (cpu_s, page) in seen.items()
                if number in self.workers]

    # ---- time limits -----------------------------------------------------------------------------

    def limits(self, number: int, now: float) -> None:
        """The worker is about to run invocations with time limits: look at its page from now on."""
        worker = self.workers.get(number)
        if worker is not None:
            worker.watched = True
            self._limits_seen = now

    @property
    def watched(self) -> tuple[int, ...]:
        """Workers whose pages must be read again and again."""
        return tuple(number for number, worker in self.workers.items() if worker.watched and not worker.killed)

    def check_limits(self, pages: Mapping[int, Page], now: float, now_ns: int) -> list[Action]:
        """Kills every worker whose invocation is past its limit."""
        actions: list[Action] = []
        for number, page in pages.items():
            worker = self.workers.get(number)
            if worker is None or worker.killed:
                continue
            if page.invocation and page.limit_ns:
                self._limits_seen = now
                if now_ns > page.limit_ns:
                    actions += self._kill(worker, "deadline", page.invocation)
        return actions

    # ---- ends ------------------------------------------------------------------------------------

    def ended(self, number: int, how: Exit, page: Page, now: float) -> list[Action]:
        """Its process is gone. Tells who is concerned, meters it, and starts its successor while its lease lives."""
        worker = self.workers.get(number)
        if worker is None:
            return []
        seat = worker.seat
        own = worker.killed or seat.stopping
        cause, reason = classify(how, page, killed=own, kill_invocation=worker.kill_invocation)
        actions: list[Action] = []
        victim = worker.connections.get(page.connection, 0) if page.invocation else 0
        audience = self._audience(worker)
        for session in audience:
            mine = page.invocation if session == victim else 0
            actions.append(Tell((session,), WorkerEnded(
                lease=worker.lease, worker=number, cause=cause, reason=reason, signal=how.signal,
                exit_code=None if how.signal or how.lost else how.exit_code, invocation=mine,
                last_lines=tuple(worker.lines), message=_too_much(seat, number) if reason == "memory" else "")))
        actions.append(_meter(worker, how.cpu_s, page, now))
        self._forget(worker, actions)
        if seat.stopping:
            self._give_up(seat, actions)
            return actions
        successor = self._seat_worker(seat, worker.session, now)
        successor.replaces = number
        successor.heirs = audience
        if not worker.killed:
            seat.deaths.append(now)
        if len(seat.deaths) == DEATHS and now - seat.deaths[0] <= DEATHS_WITHIN_S:
            successor.state = State.WAITING
            successor.fork_at = now + BACK_OFF_S
        else:
            actions.append(self._fork(successor))
        return actions

    # ---- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """What is due: forks that waited, kills after their grace."""
        actions: list[Action] = []
        due: dict[str, list[Worker]] = {}
        for worker in list(self.workers.values()):
            if worker.fork_at is not None and now >= worker.fork_at:
                worker.fork_at = None
                worker.state = State.STARTING
                actions.append(self._fork(worker))
            if worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                due.setdefault(worker.seat.stopping or "released", []).append(worker)
        for reason, workers in due.items():
            actions += self._end(workers, reason)
        return actions

    def next_deadline(self, now: float) -> float | None:
        """When to call tick() and check_limits() next; None: nothing to wait for."""
        times = [time for worker in self.workers.values() for time in (worker.fork_at, worker.kill_at)
                 if time is not None]
        if self.watched:
            times.append(now + (POLL_S if now - self._limits_seen < LIMITS_SEEN_S else POLL_IDLE_S))
        return min(times, default=None)

    # ---- inside ----------------------------------------------------------------------------------

    def _seat_worker(self, seat: Seat, session: int, now: float) -> Worker:
        number, self._next_worker = self._next_worker, self._next_worker + 1
        worker = Worker(number, seat, session, State.STARTING, now)
        seat.worker = number
        self.workers[number] = worker
        return worker

    def _fork(self, worker: Worker) -> Fork:
        return Fork(worker.number, worker.lease, worker.seat.cores, worker.seat.memory_bytes)

    def _kill(self, worker: Worker, reason: str, invocation: int) -> list[Action]:
        if worker.killed:
            return []
        worker.killed = reason
        worker.kill_invocation = invocation
        worker.kill_at = None
        return [Kill(worker.number)] if worker.pid else []

    def _end(self, workers: Iterable[Worker], reason: str) -> list[Action]:
        """Kills workers whose seats are given up, all of them at once; those whose cores are wanted end elsewhere.

        Not the other way round: what still runs would compete with the agent on the agent's own core.
        """
        kills: list[Action] = []
        moved: list[int] = []
        withdrawn: list[int] = []
        for worker in workers:
            kills += self._kill(worker, reason, 0)
            if not worker.pid:
                withdrawn.append(worker.number)
            if worker.pid and not worker.moved and self._moves(worker.seat):
                worker.moved = True
                moved.append(worker.number)
        return [*kills, *map(Move, moved), *map(Withdraw, withdrawn)]

    def _moves(self, seat: Seat) -> bool:
        return seat.wanted and bool(self.own_cores) and not set(self.own_cores) & set(seat.cores)

    def _freed(self, seat: Seat) -> list[Action]:
        if seat.freed:
            return []
        seat.freed = True
        return [Freed(seat.lease, seat.number, seat.cores)]

    def _audience(self, worker: Worker) -> tuple[int, ...]:
        return tuple(sorted({worker.session, *worker.heirs, *worker.connections.values()} - {0}))

    def _forget(self, worker: Worker, actions: list[Action]) -> None:
        del self.workers[worker.number]
        worker.seat.worker = 0
        actions.append(Close(worker.number))

    def _give_up(self, seat: Seat, actions: list[Action]) -> None:
        del self.seats[seat.lease, seat.number]
        actions += self._freed(seat)
        actions.append(Stopped(seat.lease, seat.number))
        if not self.seats_of(seat.lease):
            self._owner.pop(seat.lease, None)
