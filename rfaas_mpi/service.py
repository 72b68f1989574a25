"""The embedded service: manager and agent of one node in one process, for one user. `python -m rfaas_mpi.service`

Decisions about leases are made in manager/core.py; what any agent does is in
agent/server.py. Here the two meet, and a service knows when nobody needs it.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rfaas_mpi import messages as msg
from rfaas_mpi import remote
from rfaas_mpi._version import __version__
from rfaas_mpi.agent import core as agent_core
from rfaas_mpi.agent import cores as node_cores
from rfaas_mpi.agent.pool import CoreLocks, Taking, full_cpuset
from rfaas_mpi.agent.priority import Lowering, remove_stale_groups
from rfaas_mpi.agent.server import REASONS, AgentServer, Offer, SessionHandle
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import RFaaSError, ServiceError
from rfaas_mpi.leases import Cause, Lease, LeaseBook, NodeReport, Revoke
from rfaas_mpi.manager import core as manager_core
from rfaas_mpi.manager.core import Manager
from rfaas_mpi.manager.store import Store
from rfaas_mpi.placement import pick_cores
from rfaas_mpi.session import FileLock

__all__ = ["Service", "main"]

log = logging.getLogger("rfaas_mpi.service")

LEAVE_RETRY_S = 0.05
CORE_RETRY_S = 0.1                   # another service of ours may give up a core
REPORT_S = 5.0                       # the node is looked at again while leases live
FORGET_S = 7 * 86400.0               # files of a service that last started so long ago are removed
NODE = "local"


class Service(AgentServer):
    """Owns the manager, its store, and the locks of the cores that it lends, besides what every agent does."""

    def __init__(self, directory: Path, *, linger_s: float, zygote_idle_s: float, memory_reserve: int,
                 low_priority: bool = False) -> None:
        super().__init__(directory, zygote_idle_s=zygote_idle_s)
        self.linger_s = linger_s
        self.memory_reserve = memory_reserve
        self._lowering: Lowering | None = None
        self._low_priority = low_priority
        self.stay = False
        self._idle_since: float | None = self.started
        self._next_report = 0.0
        self._report_due = False
        self._leave_again_at = 0.0
        self._key_file = directory / "key"
        self._for_others = msg.ListenRequest(0, ())
        self._around = node_cores.SlurmFacts()       # whoever opened the door
        self._ranks: dict[int, tuple[node_cores.Rank, node_cores.SlurmFacts]] = {}   # of this node, by session
        self._outlived: set[int] = set()     # sessions that ended and whose leases others keep
        self._kept: dict[int, str] = {}
        self._why_none = ""

    def start(self) -> None:
        """Takes the life lock and listens. ServiceError if another service lives."""
        self.begin()
        settings = Settings.load()
        self.spin_us_max = settings.spin_us_max
        if settings.memory_limit == "cgroup":
            # Not without being told to: what a killed service leaves behind there stays until the next one starts.
            self.workers.guard_memory("cgroup")
        self._store = Store(self.directory / "store.db")
        self.manager = Manager(LeaseBook(pick_cores, epoch=self._store.epoch, remember_s=60.0))
        # The rank that started us may have been bound to one core.
        self._facts = node_cores.read_node_facts(affinity=full_cpuset())
        _forget_old(self.directory.parent, self.directory)
        cores_directory = self.directory.parent / "cores"
        cores_directory.mkdir(mode=0o700, exist_ok=True)
        self._locks = CoreLocks(cores_directory)
        # Held while cores are looked at, so that no other service of this user
        # takes our look for a loan.
        self._taking = Taking(cores_directory / "taking")
        if self._low_priority:
            remove_stale_groups()
            self._lowering = Lowering()
            self.workers.low = self._lowering.priority
        self.door.listen_unix(self.socket)
        self.watch_signals()
        log.info("pid=%d version=%s listens in %s", os.getpid(), __version__, self.directory)

    # ---- time ------------------------------------------------------------------------------------

    def deadlines(self, now: float) -> list[float]:
        times = [self.manager.next_deadline()]
        if self._idle_since is not None and not self.stay:
            times.append(max(self._idle_since + self.linger_s, self._leave_again_at))
        if self.manager.waiting:
            times.append(now + CORE_RETRY_S)
        if self.leases:
            times.append(self._next_report)
        return times

    def on_time(self, now: float) -> None:
        if self.manager.waiting or self._report_due or (self.leases and now >= self._next_report):
            self._report(now)
        if now >= self.manager.next_deadline():
            self._manage(self.manager.tick(now))

    def settled(self, now: float) -> None:
        # Keeps the locks of what is lent, and only those.
        self._locks.keep_only(self._lent())
        self._taking.close()
        self._maybe_leave(now)

    def _maybe_leave(self, now: float) -> None:
        busy = self.stay or self.leases or any(session.holds for session in self.sessions.values())
        if busy:
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since = now
        if now < max(self._idle_since + self.linger_s, self._leave_again_at):
            return
        # A rank that joins holds this lock until it is welcome.
        join = FileLock(self.directory / "join.lock")
        if not join.take():
            self._leave_again_at = now + LEAVE_RETRY_S
            return
        log.info("pid=%d leaves: nobody was here for %g s", os.getpid(), self.linger_s)
        self._join_lock = join        # held until the process is gone
        self.leaving = True

    def close(self) -> None:
        """Ends everything that was started, and leaves no process, socket or segment."""
        super().close()
        self._locks.close()
        self._store.close()
        if self._lowering is not None:
            try:
                self._lowering.close()
            except OSError as error:
                log.warning("the group of low priority is left behind: %s", error)

    # ---- sessions --------------------------------------------------------------------------------

    def offer(self, session: SessionHandle, now: float) -> Offer:
        self._report(now)
        view = self._node()
        return Offer(view.spare, view.free, view.memory_bytes, self._why_none)

    def joined(self, session: SessionHandle, join: msg.Join, environment: Mapping[str, str]) -> None:
        if session.where:
            return                    # where it runs, and beside whom, says nothing about this node
        rank = node_cores.Rank(
            pid=join.pid, mask=join.affinity, local_ranks=node_cores.local_ranks(environment),
            launch=node_cores.launch_key(environment, join.pid, node_cores.launcher_pid(environment, join.pid)))
        self._ranks[session.number] = rank, node_cores.slurm_facts(environment)

    def session_over(self, session: SessionHandle, now: float) -> None:
        self._ranks.pop(session.number, None)
        leases = [lease.id for lease in self.manager.book.session_leases(session.number)]
        if any(map(self._is_held, leases)):
            # Others keep some of what it was granted: the book takes that for its own until they have ended.
            self._outlived.add(session.number)
            self.manager.forget_demands(session.number)
            for lease in leases:
                if not self._is_held(lease):
                    self._manage(self.manager.release(session.number, lease, now))
        else:
            self._manage(self.manager.session_ended(session.number, now))
        if session.holds:
            # Its own cores may be spare now, too.
            self._report_due = True

    def request(self, session: SessionHandle, request: msg.AnyRequest, now: float) -> None:
        match request:
            case msg.LeaseRequest():
                # Its cores must be locked before the book gives them out.
                self._report(now)
                self._manage(self.manager.demand(session.number, os.geteuid(), request, now))
            case msg.StayRequest():
                self.stay = True
                self.send(session, msg.Done(request.id))
            case msg.ListenRequest():
                self.send(session, self._listen(session, request))
            case msg.DownRequest():
                self.send(session, msg.Done(request.id))
                log.info("session=%d sends the service down", session.number)
                self.leaving = True
            case _:
                super().request(session, request, now)

    def _listen(self, session: SessionHandle, request: msg.ListenRequest) -> msg.Listening:
        """Opens the door to ranks of other nodes."""
        if session.where:
            raise ServiceError("only from its own node is a service told where to listen",
                               hint="run `rfaas up --listen` there")
        path = Path(os.fsdecode(request.key_file)) if request.key_file else self._key_file
        if self.key and path != self._key_file:
            raise ServiceError(f"the service has its key in {self._key_file} already",
                               hint="use that one, or `rfaas down` first")
        key = self.key or remote.make_key(path)
        addresses = [remote.Address.parse(text, port_0=True) for text in request.addresses]
        try:
            self.door.listen_tcp(addresses, key, request.tcp)
        except OSError as error:
            raise ServiceError(str(error.strerror), hint="choose another port, or 0 for any that is free") from None
        self.key, self._key_file = key, path
        self._for_others, self.device = request, request.device
        if session.join is not None:
            self._around = node_cores.slurm_facts(
                {os.fsdecode(name): os.fsdecode(value) for name, value in session.join.environment})
        listening = tuple(map(str, self.door.addresses))
        log.info("listens at %s, with the key in %s", ", ".join(listening), path)
        return msg.Listening(request.id, listening, os.fsencode(path))

    # ---- the node --------------------------------------------------------------------------------

    def _node(self) -> Any:
        return next(view for view in self.manager.book.nodes if view.node == NODE)

    def _report(self, now: float) -> None:
        """Looks at the node and tells the manager what may be lent."""
        self._next_report = now + REPORT_S
        self._report_due = False
        joins: list[Any] = [self.sessions[number].join for number in self._ranks]
        expected = 1
        if any(session.where and session.holds for session in self.sessions.values()):
            # Ranks of other nodes get what whoever opened the door lends to them.
            joins.append(self._for_others)
            expected = 0
        told = [join.lend for join in joins]
        lend = "no" if "no" in told else "yes" if "yes" in told else "auto"
        ranks = list(self._ranks.values())
        slurm = ranks[0][1] if ranks else self._around
        spare = node_cores.spare_cores(
            self._facts, [rank for rank, _ in ranks], slurm, lend=lend,
            only=tuple(dict.fromkeys(core for join in joins for core in join.cores)), lent=self._lent(),
            expected=expected)
        cores, kept, reason = list(spare.cores), dict(spare.kept), spare.reason
        # A core is locked while it is lent; to know which ones can be, we lock
        # them all for the moment that the decision takes.
        self._taking.take()
        locked = self._locks.take(cores)
        if len(locked) < len(cores):
            kept.update(dict.fromkeys(set(cores) - locked, "another service of this user lends it"))
            cores = [core for core in cores if core in locked]
            reason = "" if cores else ("another service of this user lends every spare core: wait for it, or see "
                                       "`rfaas status` in its environment")
        self._kept, self._why_none = kept, reason
        self.core.own_cores = tuple(sorted(set(self._facts.cpuset) - set(cores) - self._lent()))
        memory = node_cores.lendable_memory(self._facts, slurm, reserve=self.memory_reserve)
        self._manage(self.manager.report(NodeReport(
            node=NODE, spare=tuple(cores), memory_bytes=memory, numa=spare.numa), now))

    def _lent(self) -> set[int]:
        return {core for lease in self.manager.book.leases for core in lease.cores}

    # ---- the manager's actions -------------------------------------------------------------------

    def _manage(self, actions: Iterable[manager_core.Action]) -> None:
        now = time.monotonic()
        for action in actions:
            match action:
                case manager_core.Store(epoch=epoch):
                    self._store.keep(epoch)
                case manager_core.Granted():
                    self._grant(action, now)
                case manager_core.Refused(session=session, request=request, reason=reason):
                    self.tell(session, msg.Denied(
                        request, reason, self._why_none or "ask for fewer workers, or wait longer for them"))
                case manager_core.StopWorkers(lease_id=lease, workers=seats, cause=cause, grace_s=grace):
                    if cause is Cause.RELEASED:
                        # Its rank took what it wanted; the end of the current
                        # kernel is waited for only so that its output is whole.
                        grace = agent_core.QUIT_GRACE_S
                    self.workers.act(self.core.stop(lease, seats, REASONS[cause], grace, now))
                case manager_core.Notify():
                    self._notify(action)

    def _grant(self, granted: manager_core.Granted, now: float) -> None:
        session = self.sessions.get(granted.session)
        if session is None or session.kind is None:
            # It ended meanwhile; what the book knows of it ends with it.
            self._manage(self.manager.session_ended(granted.session, now))
            return
        answer = []
        started: list[agent_core.Action] = []
        for lease in granted.leases:
            secret = (msg.lease_secret(self.key, lease.id, lease.epoch, *session.nonces) if session.where
                      else secrets.token_bytes(16))
            told, actions = self.start_lease(lease.id, lease.epoch, session, secret, lease.workers,
                                             lease.memory_per_worker, lease.hard_end, now)
            started += actions
            # Over TCP it doesn't travel: the rank makes the same one.
            answer.append(told if session.where else msgspec.structs.replace(told, secret=secret))
            self.manager.activated(lease.id, now)
            log.info("lease=%d session=%d cores=%s granted", lease.id, session.number, lease.cores)
        # Forked first: the answer's way to the rank costs no time then.
        self.workers.act(started)
        reason = granted.reason if answer else self._why_none or granted.reason
        self.send(session, msg.Granted(granted.request, tuple(answer), reason))

    def _notify(self, notify: manager_core.Notify) -> None:
        lease = self.manager.book.lease(notify.lease_id)
        left = set() if lease is None else {worker.number for worker in lease.workers}
        if left <= set(notify.workers):              # else the others' ends say why
            self.tell_lease_ended(notify.session, notify.lease_id, notify.cause)

    # ---- what the agent's half asks --------------------------------------------------------------

    def _is_held(self, lease: int) -> bool:
        """True if there is a session that keeps the lease."""
        return lease in self.leases and bool(self.leases[lease].holders)

    def let_go(self, lease: int, now: float) -> None:
        owner = self.leases[lease].session
        if owner not in self._outlived:
            if owner in self.sessions:       # else what it had ends with it
                self._manage(self.manager.release(owner, lease, now))
        elif any(self._is_held(held.id) for held in self.manager.book.session_leases(owner)):
            self._manage(self.manager.release(owner, lease, now))
        else:
            self._outlived.discard(owner)
            self._manage(self.manager.session_ended(owner, now))

    def release(self, lease: int, now: float) -> None:
        self._manage(self.manager.release(self.leases[lease].session, lease, now))

    def fail(self, lease: int, now: float) -> None:
        self._manage(self.manager.revoke(lease, now))

    def give_up(self, seats: Mapping[int, Sequence[int]], grace_s: float, now: float, *, owned: bool) -> None:
        super().give_up(seats, grace_s, now, owned=owned)
        for lease, numbers in seats.items():
            self._manage(self.manager.handle(Revoke(lease, tuple(numbers), grace_s), now))

    def stopped(self, lease: int, seat: int, now: float) -> None:
        self._manage(self.manager.stopped(lease, seat, now))
        if lease not in self.leases:
            self._outlived = {owner for owner in self._outlived if self.manager.book.session_leases(owner)}

    def used(self, meter: agent_core.Meter, pid: int) -> None:
        self._store.used(lease=meter.lease, worker=meter.worker, pid=pid, cores=meter.cores, held_s=meter.held_s,
                         cpu_s=meter.cpu_s, exec_ns=meter.exec_ns, poll_ns=meter.poll_ns, count=meter.count)

    # ---- status ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Facts for people and programs, all of them JSON."""
        self._report(time.monotonic())
        view = self._node()
        return {
            **super().status(),
            "stay": self.stay,
            "cores": {"spare": list(view.spare), "lent": list(view.lent), "free": list(view.free),
                      "kept": {str(core): why for core, why in sorted(self._kept.items())},
                      "why_none": self._why_none},
            "memory": {"lendable_bytes": view.memory_bytes, "free_bytes": view.memory_free},
            "leases": [_lease_status(lease) for lease in self.manager.book.leases],
            "key_file": str(self._key_file) if self.key else "",
            "waiting": self.manager.waiting,
            "outlived": len(self._outlived),
            "usage": self._store.usage(),
        }


def _lease_status(lease: Lease) -> dict[str, Any]:
    return {"id": lease.id, "epoch": lease.epoch, "session": lease.session, "state": str(lease.state),
            "cores": list(lease.cores), "memory_bytes": lease.memory_bytes, "hard_end": lease.hard_end}


def _forget_old(base: Path, ours: Path) -> None:
    """Removes the files of services that nobody has started for long: login sessions and jobs come and go."""
    for directory in base.iterdir():
        life = directory / "life.lock"
        try:
            if directory == ours or time.time() - life.stat().st_mtime < FORGET_S:
                continue
            with FileLock(directory / "join.lock") as join, FileLock(life) as lives:
                if join.take() and lives.take():
                    shutil.rmtree(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue                  # no service's directory, or another service was faster


def _detach() -> None:
    """Becomes a child of init: whoever started us has nothing to reap, and no terminal to share."""
    if os.fork() > 0:
        os._exit(0)
    os.chdir("/")
    os.umask(0o077)


def main(argv: list[str] | None = None) -> int:
    """`python -m rfaas_mpi.service --directory D`: serves in the background until nobody is left; 0 if it did."""
    parser = argparse.ArgumentParser(prog="python -m rfaas_mpi.service", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--linger-s", type=float, default=2.0)
    parser.add_argument("--zygote-idle-s", type=float, default=300.0)
    parser.add_argument("--memory-reserve", type=int, default=512 << 20)
    parser.add_argument("--low-priority", action="store_true")
    parser.add_argument("--foreground", action="store_true")
    arguments = parser.parse_args(argv)
    ready = arguments.ready_fd

    def tell(text: bytes) -> None:
        nonlocal ready
        if ready >= 0:
            try:
                os.write(ready, text)
            except BrokenPipeError:
                log.warning("who started the service did not wait for it")
            os.close(ready)
            ready = -1

    if ready >= 0:
        os.set_inheritable(ready, False)
    if not arguments.foreground:
        _detach()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    service = Service(arguments.directory, linger_s=arguments.linger_s, zygote_idle_s=arguments.zygote_idle_s,
                      memory_reserve=arguments.memory_reserve, low_priority=arguments.low_priority)
    try:
        service.start()
    except (OSError, RFaaSError) as error:
        log.error("could not start: %s", error)
        tell(f"{error}\n".encode())
        return 1
    tell(b"ready\n")
    try:
        service.run()
    finally:
        service.close()
        log.info("pid=%d is gone", os.getpid())
    return 0


if __name__ == "__main__":
    sys.exit(main())
