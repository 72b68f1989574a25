"""Communicators that lease for all of their ranks at once. The only module that imports mpi4py.

    every rank   says what it asks for, opens its session ──▶ all know who differs or failed
    rank 0       ── one demand ──▶ leases ── each rank's share, with the leases' secrets ──▶ all
    every rank   keeps the leases of its share, connects to its workers ──▶ all know who failed

What may take long is done by a thread, while the ranks go on telling each other that they are
there: one that is gone is missed within seconds, however long the others may lawfully wait. From then on no rank needs another one: each has sessions and connections of its own,
and a lease ends with the last rank that keeps it. There is no MPI call after that.
"""

from __future__ import annotations

import logging
import pickle
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from rfaas_mpi import errors, gang
from rfaas_mpi.crew import Crew
from rfaas_mpi.errors import ConfigError, RFaaSError, ServiceError, TransportError
from rfaas_mpi.messages import Grant, GrantLease, RankAt

__all__ = ["Ask", "hire", "parts"]

log = logging.getLogger("rfaas_mpi.mpi")

_SPIN_S = 0.001
_PAUSE_S = 0.0005
# While one of them is at work all ranks tell each other so often that they are there …
_BEAT_S = 1.0
# … and who is not heard of for so long is taken to be gone.
_SILENT_S = 8.0
# What ranks may take besides what their settings let them wait for.
_LATE_S = 8.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ask:
    """What one rank asks for: the crew that is to have the workers, how many in all, and what all have to agree on."""

    crew: Crew
    terms: Mapping[str, str]
    workers_min: int
    workers_max: int | None
    cores_per_worker: int


@dataclass(frozen=True)
class _Here:
    """What a rank that is ready says of itself."""

    service: str
    place: RankAt


@dataclass(frozen=True)
class _Failure:
    """Why a rank can't take part, for the others."""

    kind: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        return cls(type(error).__name__, Exception.__str__(error), getattr(error, "hint", ""))

    def error(self, rank: int) -> RFaaSError:
        """What other ranks raise."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, RFaaSError)):
            kind = ConfigError if self.kind in ("TypeError", "ValueError") else ServiceError
        found: RFaaSError = kind(f"rank {rank} failed to set up the executor: {self.message}", hint=self.hint)
        return found


@dataclass(frozen=True)
class _Share:
    """What one rank gets: the leases that it keeps, with its workers alone; those workers (by lease and number) that
    are its to replace; and how many more it may lease for itself (None: as many as there are).
    """

    grant: Grant
    owned: frozenset[tuple[int, int]] = frozenset()
    more: int | None = 0


def hire(comm: Any, prepare: Callable[[], Ask]) -> int | None:
    """Has every rank of the communicator connected to its share of the workers that `prepare` asks for.

    Collective. On return each rank's crew has its workers, or none where there are too few;
    it returns how many more this rank may lease for itself, where the settings have an
    executor grow (`idle_s`), without asking the others; None: as many as there are.
    Otherwise all ranks raise: what failed on this one; or, of the same kind, what failed on
    another one, which is named; ConfigError where they ask for different things. A crew that
    was made is closed then.
    """
    world = _World(comm)
    try:
        ask = prepare()
    except Exception as error:
        world.gather(_Failure.of(error))
        raise
    crew, settings = ask.crew, ask.crew.settings
    limit_s = settings.start_timeout_s + _LATE_S
    try:
        _check(world.agreed(dict(ask.terms)))
        lending = world.together(crew.open, limit_s)
        mine = _Here("none", RankAt("")) if lending is None else _Here(lending.service, lending.place)
        seen = world.agreed(mine, _SILENT_S)
        _check([{"the service": here.service} for here in seen])
        _at_finalize(crew)
        if lending is None:
            return 0
        whole = Grant(())
        # Who gives back what is idle begins with little: what is leased together goes back together.
        grows = settings.idle_s is not None
        first = max(1, ask.workers_min) if grows else ask.workers_max
        if world.rank == 0:
            whole = world.together(
                lambda: lending.ask(ask.workers_min, first, ask.cores_per_worker,
                                    settings.memory_per_worker, _places([here.place for here in seen])),
                settings.lease_timeout_s + limit_s)
        else:
            world.together(None, settings.lease_timeout_s + limit_s)
        share: _Share = world.scatter(
            _shares(whole, [here.place.node for here in seen], lending.host, ask.workers_max if grows else 0)
            if world.rank == 0 else ())
        world.together(lambda: crew.hire(lambda lending: lending.take(share.grant, share.owned, whole)), limit_s)
        lending.leave_to_others()
        return share.more
    except BaseException:
        crew.close()
        raise


def _check(terms: Sequence[Mapping[str, str]]) -> None:
    if differs := gang.disagreement(terms):
        raise ConfigError(f"the ranks of this executor don't ask for the same: {differs}",
                          hint="give all ranks the same arguments and settings; ranks of several nodes need a "
                               "cluster's manager (RFAAS_MANAGER)")


def _places(ranks: Sequence[RankAt]) -> list[RankAt]:
    """How many of them run at each place; rank 0's comes first."""
    return [msgspec.structs.replace(place, ranks=count) for place, count in Counter(ranks).items()]


def parts(grant: Grant, ranks: int, host: str = "") -> list[Grant]:
    """The parts of a grant that so many ranks on one host get."""
    return [share.grant for share in _shares(grant, [host] * ranks, host, 0)]


def _shares(grant: Grant, ranks: Sequence[str], host: str, most: int | None) -> list[_Share]:
    """Each rank's share of a grant, and of what all ranks may have beyond it, up to `most` in all."""
    workers = [(lease, worker) for lease in grant.leases for worker in lease.workers]
    numbers_of = gang.shares(ranks, [lease.host or host for lease, _ in workers])
    owners = gang.owners(numbers_of, len(workers))
    more = gang.allowances(None if most is None else most - len(workers), len(ranks), owners)
    found = []
    for rank, mine in enumerate(numbers_of):
        numbers: dict[int, set[int]] = {}
        for number in mine:
            lease, worker = workers[number]
            numbers.setdefault(lease.id, set()).add(worker.number)
        part = Grant(tuple(_part(lease, numbers[lease.id]) for lease in grant.leases if lease.id in numbers),
                     grant.reason or ("" if mine else f"{len(workers)} workers serve {len(ranks)} ranks"))
        owned = frozenset((lease.id, worker.number) for (lease, worker), owner in zip(workers, owners, strict=True)
                          if owner == rank)
        found.append(_Share(part, owned, more[rank]))
    return found


def _part(lease: GrantLease, numbers: set[int]) -> GrantLease:
    return msgspec.structs.replace(
        lease, workers=tuple(worker for worker in lease.workers if worker.number in numbers),
        memory_bytes=lease.memory_per_worker * len(numbers))


# ---- what goes over the communicator -----------------------------------------------------------------

class _World:
    """A communicator, for the set-up of one executor.

    Raises TypeError for what is none, ConfigError for one that can't be used: MPI has not
    begun or has ended, it was freed, it is an inter-communicator, or this isn't the thread
    in which MPI may be called.
    """

    def __init__(self, comm: Any) -> None:
        if "mpi4py.MPI" not in sys.modules:
            # Whoever has a communicator has imported it; importing it here could begin MPI.
            raise TypeError(f"comm={comm!r} is no communicator of mpi4py")
        from mpi4py import MPI
        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"comm={comm!r} is no communicator of mpi4py")
        if not MPI.Is_initialized():
            raise ConfigError("MPI is not initialized", hint="call MPI.Init() (or MPI.Init_thread()) first")
        if MPI.Is_finalized():
            raise ConfigError("MPI is finalized already", hint="make the Executor before MPI.Finalize()")
        if comm == MPI.COMM_NULL:
            raise ConfigError("comm is MPI.COMM_NULL", hint="only the ranks of a communicator make an Executor on it")
        if comm.Is_inter():
            raise ConfigError("comm is an inter-communicator", hint="merge its groups (comm.Merge()), or give each "
                                                                    "group's own communicator")
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
            raise ConfigError("MPI may be called from its main thread only (MPI_THREAD_FUNNELED)",
                              hint="make the Executor there, or begin MPI with MPI_THREAD_MULTIPLE")
        self._mpi = MPI
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def gather(self, mine: Any, patience_s: float | None = None) -> list[Any]:
        """What each rank says, in their order. Without `patience_s` all come when they come."""
        MPI, comm = self._mpi, self._comm
        data = np.frombuffer(pickle.dumps(mine), np.uint8)
        # Requests don't keep what they are given: our variables do, until they have ended.
        length, lengths = np.array([data.size], np.int64), np.empty(self.size, np.int64)
        self._wait(comm.Iallgather([length, MPI.INT64_T], [lengths, MPI.INT64_T]), (length, lengths), patience_s)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        said = np.empty(int(starts[-1]), np.uint8)
        self._wait(comm.Iallgatherv([data, MPI.BYTE], [said, lengths.tolist(), starts[:-1].tolist(), MPI.BYTE]),
                   (data, said))
        return [pickle.loads(said[starts[n]:starts[n + 1]].tobytes()) for n in range(self.size)]

    def agreed(self, mine: Any, patience_s: float | None = None) -> list[Any]:
        """What each rank says, as `gather`; raises what one of them failed with."""
        said = self.gather(mine, patience_s)
        for rank, theirs in enumerate(said):
            if isinstance(theirs, _Failure):
                raise theirs.error(rank)
        return said

    def together(self, act: Callable[[], _T] | None, limit_s: float) -> Any:
        """What `act` returns, once it has ended on all ranks; None has ended already.

        Raises what it raised here, or what failed on another rank; ServiceError where a rank is
        not heard of any more, or where it takes longer than `limit_s`. `act` may go on then.
        """
        job = _Job(act)
        begun = time.monotonic()
        while True:
            job.ended.wait(_BEAT_S)
            late = time.monotonic() - begun > limit_s
            # Nobody is later than the others by more than a beat.
            told = self.gather((job.said(), late), _SILENT_S)
            said = [how for how, _ in told]
            if job.error is not None and isinstance(said[self.rank], _Failure):
                raise job.error
            for rank, theirs in enumerate(said):
                if isinstance(theirs, _Failure):
                    raise theirs.error(rank)
            if all(said):
                return job.value
            if any(late for _, late in told):
                # By what all have heard: one that went by its own clock alone would leave the others waiting.
                busy = gang.ranks_text(rank for rank, done in enumerate(said) if not done)
                raise ServiceError(f"{busy} took longer than {limit_s:.0f} s to set the executor up",
                                   hint="the log of that rank's node or of the manager may say why")

    def scatter(self, parts: Sequence[Any]) -> Any:
        """Rank 0 has one for each rank."""
        MPI, comm = self._mpi, self._comm
        length, data, lengths = np.empty(1, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64)
        send: Any = None
        if self.rank == 0:
            packed = [pickle.dumps(part) for part in parts]
            data, lengths = np.frombuffer(b"".join(packed), np.uint8), np.array(list(map(len, packed)), np.int64)
            send = [lengths, MPI.INT64_T]
        self._wait(comm.Iscatter(send, [length, MPI.INT64_T], root=0), (lengths, length))
        mine = np.empty(int(length[0]), np.uint8)
        if self.rank == 0:
            send = [data, lengths.tolist(), np.concatenate(([0], np.cumsum(lengths)))[:-1].tolist(), MPI.BYTE]
        self._wait(comm.Iscatterv(send, [mine, MPI.BYTE], root=0), (data, mine))
        return pickle.loads(mine.tobytes())

    def _wait(self, request: Any, buffers: Any, patience_s: float | None = _SILENT_S) -> None:
        begun = time.monotonic()
        try:
            while not request.Test():
                took = time.monotonic() - begun
                if patience_s is not None and took > patience_s:
                    # MPI may still write there.
                    _left.append((request, buffers))
                    raise ServiceError(f"a rank of the communicator was not heard of for {took:.0f} s while the "
                                       "executor was set up",
                                       hint="it may have died, or be stopped; the communicator can't be used any more")
                if took > _SPIN_S:
                    time.sleep(_PAUSE_S)
        except self._mpi.Exception as error:
            raise TransportError(f"MPI failed while an executor was set up: {error}",
                                 hint="is the communicator still whole?") from error


_left: list[Any] = []


class _Job:
    """Something that a thread does while its rank goes on taking part."""

    def __init__(self, act: Callable[[], Any] | None) -> None:
        self.ended = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self._act = act
        if act is None:
            self.ended.set()
        else:
            threading.Thread(target=self._run, name="rfaas-gang", daemon=True).start()

    def _run(self) -> None:
        assert self._act is not None
        try:
            self.value = self._act()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def said(self) -> bool | _Failure:
        """Whether it has ended, for the others, or what it failed with."""
        if not self.ended.is_set():
            return False
        return True if self.error is None else _Failure.of(self.error)


# ---- the end of MPI ----------------------------------------------------------------------------------

_crews: weakref.WeakSet[Crew] = weakref.WeakSet()
_watches: list[int] = []


def _at_finalize(crew: Crew) -> None:
    """Has MPI.Finalize() close the crew, if that is called: its application takes that for the end."""
    _crews.add(crew)
    if _watches:
        return
    from mpi4py import MPI

    def ends(comm: Any, keyval: int, value: Any) -> None:
        for crew in list(_crews):
            try:
                crew.close()
            except Exception:
                # MPI has to end all the same, and the other executors.
                log.exception("could not close an executor at MPI.Finalize()")

    _watches.append(MPI.Comm.Create_keyval(delete_fn=ends))
    MPI.COMM_SELF.Set_attr(_watches[0], None)
