"""`rfaas agent`: lends a node's cores to whom a cluster's manager granted them.

    detector ──▶ spare cores ──▶ reports ──▶ manager          (link.py, a thread of its own)
    rank ── grant ──▶ door ──▶ admitted? ──▶ workers          (leases/grants.py, tenure.py)
    hard end · core wanted back · rank gone · order ──▶ stop

What is decided about leases is in tenure.py. Nothing here waits for the manager:
without it leases run on to their hard end, and cores go back at once when their
owner wants them.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from rfaas_mpi import api
from rfaas_mpi import messages as msg
from rfaas_mpi._version import __version__
from rfaas_mpi.agent import core as agent_core
from rfaas_mpi.agent import cores as node_cores
from rfaas_mpi.agent import tenure
from rfaas_mpi.agent.classes import CoreClass
from rfaas_mpi.agent.door import Guest
from rfaas_mpi.agent.hook import HookDoor, Starting, groups_text
from rfaas_mpi.agent.kernel_files import ranges
from rfaas_mpi.agent.link import LinkLost, ManagerLink, News, ReportDue
from rfaas_mpi.agent.pool import CoreLocks, Taking, full_cpuset
from rfaas_mpi.agent.priority import NO_PRIORITY, Lowering, Means, remove_stale_groups
from rfaas_mpi.agent.scrape import ScrapeDoor
from rfaas_mpi.agent.server import REASONS, AgentServer, Offer, SessionHandle
from rfaas_mpi.agent.spawner import NOBODY, Spawner, leave_root, service_identity
from rfaas_mpi.agent.tenure import Tenures
from rfaas_mpi.agent.traits import cpu_type, owners_of, traits_of
from rfaas_mpi.agent.users import Pool
from rfaas_mpi.agent.window import Window
from rfaas_mpi.config import Settings, uid_range
from rfaas_mpi.errors import ConfigError, LeaseDenied, NodeTaken, ServiceError
from rfaas_mpi.leases import Cause
from rfaas_mpi.leases.grants import Admission, AgentKey, GrantBody, GrantRefused
from rfaas_mpi.remote import Address
from rfaas_mpi.session import FileLock, runtime_directory

# What not every agent needs is imported where one does: a pilot's lends a tenth of a second sooner.
if TYPE_CHECKING:
    from rfaas_mpi.agent.detector import Detector
    from rfaas_mpi.agent.detector import Report as Found
    from rfaas_mpi.agent.metrics import Metrics, Standing
    from rfaas_mpi.agent.observer import NodeWatch

__all__ = ["Agent", "Options", "run"]

log = logging.getLogger("rfaas_mpi.agent.daemon")

OWNERS_CLASSES = frozenset((CoreClass.UNUSED, CoreClass.IDLE))
LEAVE_S = 5.0                        # what doesn't end with its grace is killed after this
EMPTY_S = 2.0                        # a group whose processes were killed is empty after this
EMPTY_AGAIN_S = 0.01
SAY_S = 2.0                          # and so long the manager is told that we leave, if it can be reached
OTHERS_S = 5.0                       # so often it is looked what the user's own services lend of this node
OTHERS_AGAIN_S = 0.05                # one of them was just looking
SOCKET_PATH_MAX = 107
COUNT_MAX = (1 << 60) - 1
SESSIONS_MAX = 1024                  # of one lease: each process of its user on a large node has one
CALLS_PART = 8                       # what calls take is looked at after this part of the time that a lease has left,
CALLS_S = 0.25                       # and no sooner than after this
_WILDCARDS = frozenset(("0.0.0.0", "::"))


@dataclass(frozen=True)
class Options:
    """What `rfaas agent` was told.

    `cores` None: what the detector finds, less `keep`, the CPUs of the agent itself
    (None: the first physical core that it may use). `unix` False: ranks aren't told of
    the socket. `grace_s` is left to workers whose cores are wanted back. With
    `low_priority` workers run when nobody else wants their core (None: unless cores
    are named, which says that they are nobody's). `metrics`: where its figures are read,
    `unix:/PATH` or `HOST:PORT`; "": nowhere. `hook`: the directory in which Slurm's Prolog and
    Epilog find it; None: they are not heard. Workers are `deaf` to these signals, of SIGTERM,
    SIGTSTP and SIGUSR1.
    """

    directory: Path
    node: str
    socket: Path | None = None
    unix: bool = True
    listen: tuple[Address, ...] = ()
    cores: tuple[int, ...] | None = None
    keep: tuple[int, ...] | None = None
    grace_s: float = 0.0
    low_priority: bool | None = None
    metrics: str = ""
    hook: Path | None = None
    deaf: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lendable:
    """What the node has to lend, as it was last looked at."""

    cores: tuple[int, ...] = ()      # best to lend first, lent ones included
    memory_bytes: int = 0
    numa: dict[int, int] = field(default_factory=dict)
    kept: dict[int, str] = field(default_factory=dict)       # the others, and why


@dataclass(frozen=True)
class _Visit:
    """What a session began with."""

    lease: int
    grant: bytes
    uid: int                         # of who dialled, -1 over TCP


class Agent(AgentServer):
    """Owns the line to the manager and the look at the node, besides what every agent does."""

    grants = True

    def __init__(self, options: Options, settings: Settings, window: Window | None = None) -> None:
        super().__init__(options.directory, zygote_idle_s=settings.zygote_idle_s)
        self.options = options
        self.settings = settings
        self.node = options.node
        self.socket = options.socket or options.directory / "socket"
        self.device = settings.device
        self.spin_us_max = settings.spin_us_max
        self.workers.deaf = options.deaf
        self.tenures = Tenures()
        self.metrics: Metrics | None = None                  # nobody reads them
        self.metrics_at = ""                                 # where they are read
        self._scrapes: ScrapeDoor | None = None
        if options.metrics:
            # Here, and not where it listens: that may be another user's process.
            from rfaas_mpi.agent.metrics import CONTENT_TYPE, Metrics
            self.metrics = Metrics(self._figures)
            self._scrapes = ScrapeDoor(self.selector, self.metrics.text, CONTENT_TYPE)
        self.lendable = Lendable()
        self._seen = Lendable()                              # the same, whoever else lends of it
        self._locks: CoreLocks | None = None                 # of what is lent
        self._taking: Taking | None = None
        self._elsewhere: frozenset[int] = frozenset()        # what another service of this user lends
        self._others_at = math.inf
        self._found: Found | None = None
        self.superseded = False
        self._agent_key = AgentKey()
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._site = api.Traits(cpu_type=cpu_type(Path("/proc/cpuinfo").read_text()), partition=settings.partition,
                                switches=settings.switches)
        self._admission: Admission | None = None
        self._visits: dict[int, _Visit] = {}                 # by session
        self._news: deque[News] = deque()                    # from the line's thread
        self._link: ManagerLink | None = None
        self._lost = ""                                      # why the manager can't be reached
        self._watch: NodeWatch | None = None
        self._lowering: Lowering | None = None
        self._spawner: Spawner | None = None                 # closed with the workers
        self._pool = range(0)                                # uids as which workers run; none: as their users
        self._terms: dict[int, tuple[int, int]] = {}         # lease → memory of each worker, our incarnation then
        self._listens = False
        self._changed = False                                # since the last report
        self._metered_at: float | None = None                # what workers used; None: there are none
        self._window = window or Window()
        self._open = True                                    # it has not ended
        self._calls_at = math.inf                            # when to look at what calls take
        self._heard_ends: float | None = None
        self._told_to_leave = False
        self._leave_at: float | None = None                  # whatever still runs
        self._starting = Starting()                          # jobs, whose Prolog runs
        self._hooks: HookDoor | None = None
        self._waiting: list[int] = []                        # hooks that hear when nothing is lent

    # ---- start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Looks at the node, listens, and has the line to the manager begin. ConfigError, ServiceError, OSError."""
        self.begin()
        allowed = full_cpuset()
        self._facts = node_cores.read_node_facts(affinity=allowed)
        remove_stale_groups()
        low = self.options.low_priority
        if low is None:
            low = self.options.cores is None
        if low:
            self._lowering = Lowering()
            self.workers.low = self._lowering.priority
        self.core.own_cores = keep = _kept(self.options, self._facts)
        if keep:
            # Zygotes start here too, and not on a core that is lent or an owner's.
            os.sched_setaffinity(0, keep)
        by_group = self.workers.low.means not in (None, Means.AUTOGROUP)
        if self.settings.worker_identity == "pool" and (not self.settings.service_user or os.geteuid() != 0):
            raise ConfigError("worker_identity=pool needs an agent that root starts, to become the service's user",
                              hint="start it as root, with RFAAS_SERVICE_USER")
        if self.settings.service_user:
            self._serve_users()
        else:
            self._hear_hooks(os.getpid())
            self._lock_cores()
        self.workers.guard_memory(self.settings.memory_limit, low=by_group, zygote_bytes=self.settings.zygote_memory)
        if self.options.cores is None:
            self._watch_jobs(keep, low_priority=by_group or self.workers.low.means is not None)
        self._look(time.monotonic())
        _check_place(self.socket)
        self.door.listen_unix(self.socket)
        self._listens = True
        if self.options.listen:
            # No key: over TCP there are sessions of leases only.
            self.door.listen_tcp(self.options.listen, b"", self.settings.tcp)
        if self._scrapes is not None:
            self.metrics_at = self._scrapes.listen(self.options.metrics)
        self.watch_signals()
        self._window.listen(self.wake)
        self._hear_window(time.monotonic())
        self._link = ManagerLink(self.settings, start=api.StartAgent(
            node=self.node, agent=f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:12]}", boot_id=self._boot_id,
            key=self._agent_key.public, addresses=self.addresses, host=socket.gethostname()), tell=self._tell)
        self._link.start()
        log.info("node=%s pid=%d version=%s lends %s, listens at %s", self.node, os.getpid(), __version__,
                 ranges(self.lendable.cores) or "nothing", " ".join(self.addresses))

    def _watch_jobs(self, keep: Iterable[int], *, low_priority: bool) -> None:
        """From now on what is lent is what jobs don't need."""
        from rfaas_mpi.agent.detector import Detector, Policy
        from rfaas_mpi.agent.observer import NodeWatch, Observer, own_step
        policy = Policy(never=frozenset(keep), memory_reserve=self.settings.memory_reserve, low_priority=low_priority,
                        by_default=OWNERS_CLASSES if self.settings.lend_jobs == "all" else frozenset())
        self._watch = NodeWatch(Detector(policy), Observer(usable=self._facts.cpuset, ours=own_step()))
        self.selector.register(self._watch, 1, lambda _m: self._look(time.monotonic()))

    def _serve_users(self) -> None:
        """From now on this is the service's user's process, and a spawner starts workers as theirs."""
        who = service_identity(self.settings.service_user)
        if os.geteuid() == who.uid:
            self._hear_hooks(os.getpid())
            return                    # started as that user: it serves that one alone
        if self._lowering is not None and self.workers.low.means is not Means.AUTOGROUP:
            # Its entrance would let a user in who could take others' processes along; the spawner makes groups.
            self._lowering.close()
            self._lowering, self.workers.low = None, NO_PRIORITY
        self._pool = pool = self._pool_beside(who.uid)
        self._spawner = Spawner.start(self.settings.uid_min, who.uid, pool)
        self._hear_hooks(self._spawner.pid)
        self.workers.serve_users(self._spawner, Pool(pool) if pool else None)
        leave_root(who, self.options.directory)
        log.info("node=%s runs as uid %d, and workers as %s", self.node, who.uid,
                 f"the users {self.settings.worker_pool}" if pool else f"any user from {self.settings.uid_min} on")

    def _pool_beside(self, own: int) -> range:
        """The uids as which workers run, none: those of their users. ConfigError where they can't be these."""
        if self.settings.worker_identity != "pool":
            return range(0)
        pool = uid_range(self.settings.worker_pool)
        if not pool or own in pool or NOBODY in pool:
            raise ConfigError("worker_identity=pool needs uids that are nobody's" if not pool else
                              f"worker_pool={self.settings.worker_pool} has uids that are somebody's",
                              hint="name a range of its own: RFAAS_WORKER_POOL=70000-70063")
        if not self.options.listen:
            raise ConfigError("ranks reach workers of a pool over tcp, and this agent listens nowhere",
                              hint="have it listen: --listen 0.0.0.0:4711")
        return pool

    def _hear_hooks(self, maker: int) -> None:
        """From now on; the process `maker` makes workers' groups. Where hooks find it no user may change."""
        if self.options.hook is not None:
            low = None if self._lowering is None else self._lowering.directory
            self._hooks = HookDoor(self.selector, self.options.hook, groups_text(maker, low))
            for job in self._hooks.missed():
                log.info("job=%s has begun before this agent: its group is waited for", job)
                self._starting.prolog(job, time.monotonic())

    def _lock_cores(self) -> None:
        """What is lent is locked from now on, against this user's embedded services and other agents on this node.

        One that serves every user locks nothing: it lends what is in nobody's job.
        """
        try:
            directory = runtime_directory(self.settings) / "cores"
            directory.mkdir(mode=0o700, exist_ok=True)
        except (OSError, ServiceError) as error:
            log.warning("node=%s what is lent isn't locked against services of this user: %s", self.node, error)
            return
        self._locks, self._taking = CoreLocks(directory), Taking(directory / "taking")
        self._others_at = 0.0

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where ranks dial it."""
        # Over shared memory a rank has to be able to kill its worker, who is somebody else with a pool.
        unix = (f"unix:{self.socket}",) if self.options.unix and not self._pool else ()
        return (*unix, *(str(address._replace(host=socket.gethostname()) if address.host in _WILDCARDS else address)
                         for address in self.door.addresses))

    def close(self) -> None:
        """Ends everything that was started. Safe to call twice."""
        if not self._listens:
            self.socket = self.directory / "socket"          # what lies elsewhere isn't ours
        if self._scrapes is not None:
            self._scrapes.close()
        super().close()
        if self._hooks is not None:
            # Last: until nothing is left to be taken back.
            self._hooks.close()
            self._hooks = None
        if self._link is not None:
            if self._told_to_leave and not self._lost and not self._link.flush(SAY_S):
                log.warning("node=%s left without the manager's word that it knows", self.node)
            self._link.close()
            self._link = None
        if self._locks is not None and self._taking is not None:
            self._locks.close()
            self._taking.close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._lowering is not None:
            lowering, self._lowering = self._lowering, None
            self._remove(lowering)

    def _remove(self, lowering: Lowering) -> None:
        deadline = time.monotonic() + EMPTY_S
        while True:
            try:
                lowering.close()
                return
            except OSError as error:
                # What a zygote had forked ahead ends with it, but not before it.
                if time.monotonic() >= deadline:
                    log.warning("node=%s the group of low priority stays: %s", self.node, error)
                    return
            time.sleep(EMPTY_AGAIN_S)

    # ---- the node --------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """What may be lent now; what may not be any more is taken back at once."""
        if self._watch is None:
            explicit = node_cores.spare_cores(self._facts, lend="yes", only=self.options.cores or ())
            if not explicit.cores:
                raise ConfigError(f"none of the cores {ranges(self.options.cores or ())} is among those that the agent "
                                  f"may use ({ranges(self._facts.cpuset)})", hint="correct --cores")
            seen = Lendable(explicit.cores, self._memory(), explicit.numa, explicit.kept)
        else:
            report = self._found = self._watch.step(
                now, self.workers.cpu_by_core() if self._watch.detector.wants_load else None)
            seen = Lendable(report.spare, min(report.memory_bytes, self._memory()),
                            {core.cpu: core.numa for core in report.cores if core.spare},
                            {core.cpu: core.why for core in report.cores if not core.spare})
            self._starting.there(self._watch.jobs)
        self._open = self._window.ends is None or now < self._window.ends
        if not self._open:
            seen = Lendable((), 0, {}, {**seen.kept, **dict.fromkeys(seen.cores, "its window has ended")})
        if jobs := self._starting.jobs:
            # Which cores it gets is known once its group is there.
            seen = Lendable((), 0, {}, {**seen.kept, **dict.fromkeys(seen.cores, f"job {jobs[0]} is about to start")})
        self._seen = seen
        if now >= self._others_at:
            self._see_others(now)
        if taken := self._elsewhere.intersection(seen.cores):
            seen = replace(seen, cores=tuple(core for core in seen.cores if core not in taken),
                           kept={**seen.kept, **dict.fromkeys(taken, "another service of this user lends it")})
        if seen != self.lendable:
            self.lendable = seen
            self._changed = True
            self._do(self.tenures.lend(frozenset(seen.cores), self.options.grace_s, now), now)

    def _hear_window(self, now: float) -> None:
        """Until when the node may be lent, as it was said last."""
        ends = self._window.ends
        if ends == self._heard_ends:
            return
        self._heard_ends = ends
        log.info("node=%s may be lent %s", self.node, "without an end that is known" if ends is None
                 else f"for {max(0.0, ends - now):.1f} s")
        self._changed = True
        self.tenures.window_ends(ends)
        self._expire(now)
        self._look(now)
        self._pace(now)

    def _expire(self, now: float) -> None:
        """Ends leases whose time has come, or in which no call would be done in time."""
        self._do(self.tenures.tick(now), now)

    def _pace(self, now: float) -> None:
        """Says when to look next at what the calls of leases with an end take."""
        end = self.tenures.next_end
        self._calls_at = math.inf if end is None else now + max(CALLS_S, (end - now) / CALLS_PART)

    def first(self, now: float) -> None:
        for news in self._hooks.hear() if self._hooks is not None else ():
            if news.starts:
                log.info("job=%s is about to start: everything that is lent is taken back", news.job)
                self._starting.prolog(news.job, now)
                self._waiting.append(news.caller)
                self._look(now)
                # Whatever grace it had.
                self._do(self.tenures.lend((), 0.0, now), now)
            elif self._starting.epilog(news.job):
                self._look(now)

    def _see_others(self, now: float) -> bool:
        """Looks which cores another service of this user lends; True if that is news."""
        if self._locks is None or self._taking is None:
            self._others_at = math.inf
            return False
        self._others_at = now + OTHERS_S
        try:
            if not FileLock.take(self._taking):
                # Nobody waits here for a service that may be stopped.
                self._others_at = now + OTHERS_AGAIN_S
                return False
            held = self._locks.take(self._seen.cores)
        except OSError as error:
            log.warning("node=%s what other services of this user lend can't be seen: %s", self.node, error)
            return False
        finally:
            self._locks.keep_only(self.tenures.in_use)
            self._taking.close()
        before, self._elsewhere = self._elsewhere, frozenset(self._seen.cores) - held
        return self._elsewhere != before

    def _lock(self, lease: int, cores: tuple[int, ...], now: float) -> None:
        """Locks what a lease lends. LeaseDenied if another service of this user was faster."""
        if self._locks is None or self._taking is None:
            return
        self._taking.take()
        try:
            missing = sorted(set(cores) - self._locks.take(cores))
        except OSError as error:
            log.warning("node=%s lease=%d what it lends isn't locked: %s", self.node, lease, error)
            return
        finally:
            self._taking.close()
        if missing:
            self._see_others(now)
            self._look(now)
            raise GrantRefused(f"another service of uid {os.geteuid()} on {self.node} lends core {missing[0]} of lease "
                               f"{lease}", hint="ask for another lease", reason="core")

    def _memory(self) -> int:
        return node_cores.lendable_memory(self._facts, reserve=self.settings.memory_reserve)

    # ---- the manager -----------------------------------------------------------------------------

    def _tell(self, news: News) -> None:
        """Called in the line's thread."""
        self._news.append(news)
        self.wake()

    def woken(self) -> None:
        while self._news:
            try:
                self._hear(self._news.popleft(), time.monotonic())
            except ConfigError as error:
                # Keys that are none. What runs here doesn't end for a manager that is out of order.
                log.error("node=%s what the manager says makes no sense: %s", self.node, error)
        self._hear_window(time.monotonic())

    def _hear(self, news: News, now: float) -> None:
        match news:
            case api.Admitted():
                self._admitted(news, now)
            case api.Orders():
                self._ordered(news, now)
            case ReportDue():
                self._changed = True
            case LinkLost(reason=reason):
                self._lost = reason
                log.warning("node=%s the manager can't be reached, leases run on: %s", self.node, reason)

    def _admitted(self, admitted: api.Admitted, now: float) -> None:
        self._lost = ""
        self._changed = True
        if self._admission is not None and self._admission.incarnation == admitted.incarnation:
            self._admission.rotate(admitted.keys)
            return
        if self.tenures:
            log.error("node=%s the manager doesn't know what runs here; it is stopped", self.node)
            self._do(self.tenures.leave(0.0, now), now)
        self._admission = Admission(admitted.node, self._boot_id, admitted.incarnation, admitted.keys)
        log.info("node=%s is admitted as %s, incarnation %d", self.node, admitted.node, admitted.incarnation)

    def _ordered(self, orders: api.Orders, now: float) -> None:
        if orders.superseded:
            log.error("node=%s another agent has taken this node over; this one ends", self.node)
            self.superseded = self.leaving = True
            return
        for order in orders.stop:
            self._do(self.tenures.order(order, now), now)
        if orders.keys and self._admission is not None:
            self._admission.rotate(orders.keys)
        if orders.lending is not None and self._watch is not None and self.settings.lend_jobs == "opt-in":
            self._opted_in(self._watch.detector, orders.lending, now)

    def _opted_in(self, detector: Detector, jobs: Iterable[str], now: float) -> None:
        """The owners of these jobs lend what they leave idle of their cores, and no others do."""
        opted_in = dict.fromkeys(jobs, OWNERS_CLASSES)
        if opted_in != detector.policy.opted_in:
            log.info("node=%s jobs that lend what they leave idle: %s", self.node, " ".join(opted_in) or "none")
            detector.configure(msgspec.structs.replace(detector.policy, opted_in=opted_in))
            self._look(now)

    def _report(self) -> None:
        if self._admission is None or self._link is None:
            return
        leaving, clock_ns = self._told_to_leave, time.monotonic_ns()
        memory_bytes = max(0, self.lendable.memory_bytes - self.workers.zygotes_bytes())
        ends = self._window.ends
        self._link.report(api.Report(
            incarnation=self._admission.incarnation, clock_ns=clock_ns,
            spare=() if leaving else self.lendable.cores, memory_bytes=0 if leaving else memory_bytes,
            ends_in_s=None if ends is None else max(0.0, ends - clock_ns / 1e9), live=self.tenures.live, over=self._admission.over(clock_ns, self.tenures),
            numa={} if leaving else self.lendable.numa, grace_s=self.options.grace_s,
            traits=traits_of(self._found, time.monotonic(), self._site), owners=owners_of(self._found)))

    # ---- what is to be done ----------------------------------------------------------------------

    def _do(self, actions: Iterable[tenure.Action], now: float) -> None:
        for action in actions:
            match action:
                case tenure.Ended(session=session, lease=lease, cause=cause):
                    self.tell_lease_ended(session, lease, cause)
                case tenure.Stop(lease=lease, seats=seats, cause=cause, grace_s=grace_s, owned=owned):
                    log.info("lease=%d seats=%s stop: %s, grace %g s", lease, seats, cause, grace_s)
                    if cause is Cause.RELEASED:
                        # Its rank took what it wanted; the end of the current
                        # kernel is waited for only so that its output is whole.
                        grace_s = max(grace_s, agent_core.QUIT_GRACE_S)
                    elif cause is not Cause.SESSION_ENDED:
                        for seat in seats if self.metrics is not None else ():
                            self.metrics.reclaim(lease, seat, "owner" if owned else REASONS[cause], grace_s, now)
                    self.workers.act(self.core.stop(lease, seats, REASONS[cause], grace_s, now, owned=owned))
                case tenure.Forbid(lease=lease):
                    if self._admission is not None:
                        self._admission.forbid(lease, time.monotonic_ns())
                        self._changed = True  # its cores are free

    # ---- time ------------------------------------------------------------------------------------

    def deadlines(self, now: float) -> list[float]:
        times = [self.tenures.next_deadline(), self._leave_at, self._others_at,
                 None if self._scrapes is None else self._scrapes.next_deadline(),
                 None if self._watch is None else self._watch.next_deadline(), self._starting.next_deadline(),
                 None if self._metered_at is None else self._metered_at + self.settings.meter_s, self._calls_at,
                 self._window.ends if self._open else None]
        return [time for time in times if time is not None]

    def on_time(self, now: float) -> None:
        if self._watch is not None and now >= self._watch.next_deadline():
            self._look(now)
        if now >= self._others_at and self._see_others(now):
            self._look(now)
        if self._starting.tick(now):
            log.warning("node=%s a job that was about to start has no group yet; it is waited for no longer", self.node)
            self._look(now)
        if self._scrapes is not None:
            self._scrapes.tick(now)
        if now >= self._calls_at:
            self.tenures.calls_take(self.workers.calls_take())
            self._pace(now)
        self._expire(now)
        if self._open and self._window.ends is not None and now >= self._window.ends:
            log.info("node=%s may be lent no longer", self.node)
            self._look(now)

    def settled(self, now: float) -> None:
        if self._told_to_leave and self._leave_at is None:
            log.info("node=%s leaves; %d leases are taken back", self.node, len(self.tenures))
            self._leave_at = now + self.options.grace_s + LEAVE_S
            self._changed = True
            self._do(self.tenures.leave(self.options.grace_s, now), now)
        if self._waiting and self._hooks is not None and not self.tenures and not self.core.workers:
            self._hooks.answer(self._waiting)
            self._waiting.clear()
        self._meter(now)
        if self._locks is not None:
            self._locks.keep_only(self.tenures.in_use)
        if self._changed:
            self._changed = False
            self._report()
        # Cores are free before workers have ended: of these ranks have yet to be told, and what they used is not known.
        if self._leave_at is not None and (not (self.tenures or self.core.workers) or now >= self._leave_at):
            self.leaving = True

    def told_to_leave(self) -> None:
        # A second signal waits for nobody, but where they are sent to all: Slurm repeats itself at once, and ranks would
        # not hear why they lose what they have.
        self.leaving = self._told_to_leave and not self.options.deaf
        self._told_to_leave = True

    # ---- sessions --------------------------------------------------------------------------------

    def secret_for(self, lease: int, grant: bytes) -> bytes | None:
        if not grant:
            return self.leases[lease].secret if lease in self.leases else None
        if self._admission is None:
            return None
        try:
            body = self._admission.peek(grant)
            # Bound to its lease: the secret in another one's grant doesn't open.
            return self._agent_key.open(body.sealed, lease, body.epoch)
        except GrantRefused as error:
            if self.metrics is not None:
                self.metrics.refused(error.reason)
            raise

    def lease_came(self, guest: Guest, lease: int, grant: bytes) -> None:
        if sum(visit.lease == lease for visit in self._visits.values()) >= SESSIONS_MAX:
            log.warning("lease=%d %s is sent away: it has %d sessions already", lease, guest, SESSIONS_MAX)
            guest.connection.close()
            return
        session = self.begin_session(guest, guest.secret, (msg.ROLE_LEASE_RANK, msg.ROLE_LEASE_AGENT))
        self._visits[session.number] = _Visit(lease, grant, guest.uid)

    def check(self, session: SessionHandle, request: msg.AnyRequest) -> None:
        """A lease's session is about that lease and nothing else; our own user's may look and end us."""
        visit = self._visits.get(session.number)
        match request:
            case msg.Join(observer=observer):
                if visit is None and not observer:
                    raise ServiceError("this agent lends to whom its manager grants something",
                                       hint="set RFAAS_MANAGER to the manager's address, and RFAAS_SERVICE not at all")
            case msg.KillRequest(lease=lease) | msg.ReleaseRequest(lease=lease) | msg.Hold(lease=lease):
                if visit is None or visit.lease != lease:
                    raise ServiceError(f"lease {lease} is not this session's")
            case _ if visit is not None and not isinstance(request, msg.Use):
                raise ServiceError("in a lease's session there is nothing but the lease")

    def request(self, session: SessionHandle, request: msg.AnyRequest, now: float) -> None:
        match request:
            case msg.Use():
                try:
                    self._use(session, request, now)
                except LeaseDenied as error:
                    log.info("session=%d use is denied: %s", session.number, error)
                    if self.metrics is not None:
                        self.metrics.refused(error.reason if isinstance(error, GrantRefused) else "ended")
                    self.send(session, msg.Denied(request.id, Exception.__str__(error), error.hint))
            case msg.DownRequest():
                self.send(session, msg.Done(request.id))
                log.info("session=%d sends the agent down", session.number)
                self.told_to_leave()
            case _:
                super().request(session, request, now)

    def offer(self, session: SessionHandle, now: float) -> Offer:
        visit = self._visits.get(session.number)
        if visit is None:
            in_use = self.tenures.in_use
            return Offer(self.lendable.cores, tuple(core for core in self.lendable.cores if core not in in_use),
                         self.lendable.memory_bytes)
        try:
            body = self._usable(visit)
        except LeaseDenied:
            return Offer((), (), 0)  # nothing is warmed for it; `use` says why
        return Offer(body.cores, body.cores, body.memory_per_worker * len(body.workers))

    def session_over(self, session: SessionHandle, now: float) -> None:
        visit = self._visits.pop(session.number, None)
        if (visit is not None and session.join is not None and visit.lease not in self.tenures
                and not any(other.lease == visit.lease for other in self._visits.values())):
            # Nobody is left who would use it: its cores needn't wait until it can't begin any more.
            # (Who didn't get as far as to join may try another address.)
            self._do([tenure.Forbid(visit.lease)], now)

    # ---- leases ----------------------------------------------------------------------------------

    def _use(self, session: SessionHandle, request: msg.Use, now: float) -> None:
        """Begins the session's lease. LeaseDenied where it can't begin."""
        visit = self._visits.get(session.number)
        if visit is None or session.kind is None:
            raise ServiceError("this session has no lease to use")
        if visit.lease in self.leases:
            self.send(session, msg.Granted(request.id, (self._standing(visit.lease),)))
            return
        self._lock(visit.lease, self._usable(visit).cores, now)
        body = self._usable(visit, admit=True)
        hard_end = None if body.hard_end_ns is None else body.hard_end_ns / 1e9
        if (ends := self._window.ends) is not None:
            # The manager may have heard of it later.
            hard_end = ends if hard_end is None else min(hard_end, ends)
        self._terms[body.lease] = body.memory_per_worker, body.seen.incarnation
        self.tenures.begin(body.lease, body.epoch, body.uid, session.number, body.workers, body.memory_per_worker,
                           hard_end)
        told, actions = self.start_lease(body.lease, body.epoch, session,
                                         self._agent_key.open(body.sealed, body.lease, body.epoch), body.workers,
                                         body.memory_per_worker, hard_end, now)
        self._pace(now)
        log.info("lease=%d session=%d uid=%d cores=%s begins", body.lease, session.number, body.uid, body.cores)
        self._changed = True
        # Forked first: the answer's way to the rank costs no time then.
        self.workers.act(actions)
        self.send(session, msg.Granted(request.id, (told,)))

    def _usable(self, visit: _Visit, *, admit: bool = False) -> GrantBody:
        """What a session's grant lets it begin now; with `admit` only this once. LeaseDenied with the reason."""
        if self._admission is None or self._told_to_leave:
            raise GrantRefused(f"the agent of {self.node} is leaving", hint="ask for another lease", reason="leaving")
        facts = time.monotonic_ns(), self.lendable.cores, self.tenures.in_use
        body = self._admission.check(visit.grant, *facts)
        self._check_user(body, visit)
        return self._admission.admit(visit.grant, *facts) if admit else body

    def _check_user(self, body: GrantBody, visit: _Visit) -> None:
        """LeaseDenied unless workers can be started as the lease's user, who is the one that came."""
        if visit.uid not in (-1, 0, body.uid):
            raise GrantRefused(f"lease {body.lease} is uid {body.uid}'s, and uid {visit.uid} came with it",
                               reason="user")
        if self._spawner is not None and (body.uid < self.settings.uid_min or body.uid == os.geteuid()):
            raise GrantRefused(f"the agent of {self.node} starts workers as users from uid {self.settings.uid_min} on, "
                               f"and lease {body.lease} is uid {body.uid}'s", reason="user",
                               hint="call as an ordinary user, or set RFAAS_UID_MIN at the agent")
        if body.uid in self._pool:
            raise GrantRefused(f"lease {body.lease} is uid {body.uid}'s, as whom the agent of {self.node} runs others' "
                               "workers", reason="user", hint="let nobody be a user of worker_pool")
        if self._spawner is None and body.uid != os.geteuid():
            raise GrantRefused(f"the agent of {self.node} runs as uid {os.geteuid()} and can't start workers as uid "
                               f"{body.uid}, whose lease this is", reason="user",
                               hint="an agent that serves several users is started by root, with RFAAS_SERVICE_USER")

    def user_of(self, session: SessionHandle) -> int | None:
        visit = self._visits.get(session.number)
        if self._spawner is None or visit is None:
            return None
        if not visit.grant:
            found = self.tenures.get(visit.lease)
            if found is None:
                raise ServiceError(f"lease {visit.lease} has ended")
            return found.uid
        if self._admission is None:
            raise ServiceError(f"the agent of {self.node} is leaving")
        return self._admission.peek(visit.grant).uid

    def prefix(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        # The site's container, or none: what a user wants to be in he starts from his kernel.
        return tuple(shlex.split(self.settings.worker_prefix))

    def _standing(self, lease: int) -> msg.GrantLease:
        """A lease that has begun, as it is now."""
        found = self.tenures.get(lease)
        if found is None:
            raise LeaseDenied(f"lease {lease} is ending")
        workers = tuple(msg.WorkerInfo(worker.number, worker.seat.cores)
                        for worker in self.core.workers.values() if worker.lease == lease)
        return msg.GrantLease(id=lease, epoch=found.epoch, secret=b"",
                              memory_bytes=found.memory_per_worker * len(workers), workers=workers,
                              hard_end=(end := self.tenures.end_of(lease)),
                              ends_in_s=None if end is None else max(0.0, end - time.monotonic()))

    # ---- what the agent's half asks --------------------------------------------------------------

    def let_go(self, lease: int, now: float) -> None:
        self._do(self.tenures.abandon(lease, now), now)

    def release(self, lease: int, now: float) -> None:
        self._do(self.tenures.release(lease, agent_core.QUIT_GRACE_S, now), now)

    def fail(self, lease: int, now: float) -> None:
        self._do(self.tenures.fail(lease, now), now)

    def give_up(self, seats: Mapping[int, Sequence[int]], grace_s: float, now: float, *, owned: bool) -> None:
        for lease, numbers in seats.items():
            self._do(self.tenures.reclaim(lease, numbers, grace_s, now, owned=owned), now)

    def freed(self, lease: int, seat: int, cores: tuple[int, ...], now: float) -> None:
        if self.metrics is not None:
            self.metrics.freed(lease, seat, now)
        self._changed |= self.tenures.freed(lease, seat)

    def stopped(self, lease: int, seat: int, now: float) -> None:
        self._changed |= self.tenures.freed(lease, seat)
        if lease not in self.leases:
            self._terms.pop(lease, None)

    def used(self, meter: agent_core.Meter, pid: int) -> None:
        if self._link is None:
            return
        self._link.used([self._line(meter)])
        self._changed = True

    def _line(self, meter: agent_core.Meter) -> api.UsedLine:
        # The page is the worker's to write: more than all of its time it can't have used.
        def seconds(ns: int, most: float) -> float:
            return min(ns / 1e9, most)
        cpu_s = max(0.0, meter.cpu_s)
        # All of a worker is told under one number, even if we have got another one since: else it counts twice.
        memory_bytes, incarnation = self._terms.get(meter.lease, (0, 0))
        return api.UsedLine(
            number=meter.worker, lease=meter.lease, seat=meter.seat, cores=meter.cores,
            memory_bytes=memory_bytes, incarnation=incarnation, held_s=meter.held_s, cpu_s=cpu_s,
            exec_s=seconds(meter.exec_ns, meter.held_s), poll_s=seconds(meter.poll_ns, cpu_s),
            invocations=min(meter.count, COUNT_MAX), kernels=tuple(
                api.KernelLine(one.name or api.OTHERS, seconds(one.exec_ns, meter.held_s), min(one.count, COUNT_MAX))
                for one in meter.kernels))

    def _meter(self, now: float) -> None:
        """Notes what workers have used so far, for the next report: what comes after it is lost if this is killed."""
        if self._link is None or not self.core.workers:
            self._metered_at = None
            return
        if self._metered_at is None:
            self._metered_at = now
        elif now >= self._metered_at + self.settings.meter_s:
            self._metered_at = now
            self._changed = True
            self._link.running([self._line(meter) for meter in self.workers.meters(now)])

    # ---- status ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Facts for people and programs, all of them JSON."""
        in_use = self.tenures.in_use
        return {
            **super().status(),
            "node": self.node, "serves_users_from": self.settings.uid_min if self._spawner is not None else None,
            "worker_pool": f"{self._pool[0]}-{self._pool[-1]}" if self._pool else None,
            "manager": self.settings.manager, "manager_lost": self._lost,
            "incarnation": self._admission.incarnation if self._admission is not None else 0,
            "cores": {"spare": list(self.lendable.cores), "lent": sorted(in_use),
                      "free": [core for core in self.lendable.cores if core not in in_use],
                      "kept": {str(core): why for core, why in sorted(self.lendable.kept.items())}},
            "memory": {"lendable_bytes": self.lendable.memory_bytes},
            "leases": [{"id": each.lease, "epoch": each.epoch, "uid": each.uid, "session": each.session,
                        "cores": list(each.cores), "state": "revoking" if each.stops else "active",
                        "hard_end": self.tenures.end_of(each.lease)}
                       for each in self.tenures.all],
            "unwritten": self._link.unwritten if self._link is not None else 0,
            "report_age_s": self._report_age_s(), "metrics": self.metrics_at,
        }

    def _report_age_s(self) -> float | None:
        """Since when the manager's picture of this node may be out of date; None: it has none."""
        taken_ns = self._link.taken_ns if self._link is not None else 0
        return (time.monotonic_ns() - taken_ns) / 1e9 if taken_ns else None

    def _figures(self) -> Standing:
        from rfaas_mpi.agent.metrics import Standing
        in_use = self.tenures.in_use
        owned = set() if self._found is None else {core.cpu for core in self._found.cores
                                                   if core.which is CoreClass.OWNED}
        cores = Counter("lent" if core in in_use else "free" for core in {*self.lendable.cores, *in_use})
        cores.update("owned" if core in owned else "kept" for core in self.lendable.kept if core not in in_use)
        doing = Counter("starting" if not zygote.ready else "busy" if zygote.workers else "idle"
                        for zygote in self.workers.zygotes.values())
        leases = Counter("revoking" if each.stops else "active" for each in self.tenures.all)
        states = Counter(worker.state for worker in self.core.workers.values())
        return Standing(
            cores={state: cores[state] for state in ("lent", "free", "owned", "kept")},
            leases={state: leases[state] for state in ("active", "revoking")},
            workers={str(state): states[state] for state in agent_core.State},
            zygotes={state: doing[state] for state in ("starting", "idle", "busy")},
            connected=self._admission is not None and not self._lost, report_age_s=self._report_age_s(),
            unwritten=self._link.unwritten if self._link is not None else 0, forks=self.workers.forks,
            turned_away={reason: self.door.counts[reason] for reason in ("refused", "broken", "late", "crowded_out")})


def _kept(options: Options, facts: node_cores.NodeFacts) -> tuple[int, ...]:
    """The CPUs where the agent and its zygotes run; none: wherever they may."""
    if options.cores is not None:
        return tuple(core for core in facts.cpuset if core not in options.cores)
    if options.keep is not None:
        return tuple(core for core in options.keep if core in facts.cpuset)
    first = facts.core_of.get(facts.cpuset[0], facts.cpuset[0])
    return tuple(core for core in facts.cpuset if facts.core_of.get(core, core) == first)


def _check_place(path: Path) -> None:
    """ConfigError where something lies that is no socket, ServiceError where somebody listens."""
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        raise ConfigError(f"{path} is there and no socket", hint="name another place with --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return                    # of an agent that was killed
    raise ServiceError(f"somebody listens on {path} already", hint="name another place with --socket")


def run(options: Options, settings: Settings, ready: Callable[[dict[str, Any]], None],
        window: Window | None = None) -> None:
    """Serves until SIGTERM or SIGINT; calls `ready` once it listens, with where. No lease outlives the `window`.

    Raises ConfigError, ServiceError or OSError, each naming the file or address,
    where it can't start, and NodeTaken if another agent took the node over.
    """
    if settings.manager is None:
        raise ConfigError("an agent needs a manager", hint="name it: --manager unix:/run/rfaas/manager.sock, or "
                                                           "RFAAS_MANAGER")
    socket_path = options.socket or options.directory / "socket"
    if len(os.fsencode(socket_path)) > SOCKET_PATH_MAX:
        raise ConfigError(f"{socket_path} is too long for a socket's path", hint="name a shorter one with --socket")
    if options.hook is not None and options.cores is not None:
        raise ConfigError("cores that are named are no job's, and a job's Prolog has nothing to take back there",
                          hint="leave out --cores, or --hook")
    agent = Agent(options, settings, window)
    try:
        agent.start()
        ready({"pid": os.getpid(), "node": agent.node, "directory": str(options.directory),
               "listening": list(agent.addresses), "manager": settings.manager, "metrics": agent.metrics_at or None,
               "cores": list(agent.lendable.cores)})
        agent.run()
    finally:
        agent.close()
        log.info("node=%s pid=%d is gone", agent.node, os.getpid())
    if agent.superseded:
        raise NodeTaken(f"another agent has taken node {agent.node} over",
                           hint="one agent for each node, or each user on it; name this one's with --node")
