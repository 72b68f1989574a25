"""What a cluster's manager must not forget: epochs, grants, their ends, and who used what.

    Ledger ──▶ Database: a file (sqlite.py) or a server that managers share (postgres.py)

    leases    one row for each, as it stands now; `ended_at` is NULL while it lives
    answers   (session, request) → the demand and its grant
    closed    sessions that ended        drained   nodes that lend nothing
    usage     what a worker has used     meta      epoch, clock, version
    usage_kernels  in which kernels      kernels   names of each user's that are kept apart
    lent      what a lease has, or had, of a lender's cores (credit.py)
    usage_days     sums of each day      heard     what an agent's clock showed, now and then
    events    why workers of a lease ended, where its rank didn't want it

Times in a lease are seconds on the manager's monotonic clock, which begins anew
with each boot; `meta` says which boot it was, and what the wall clock showed then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from rfaas_mpi import api
from rfaas_mpi.errors import StoreError
from rfaas_mpi.leases import Answered, Cause, Changes, Demand, Grant, Kept, Lease, LeaseState
from rfaas_mpi.leases.book import REMEMBER_LEAST_S
from rfaas_mpi.manager.accounts import Usage, believable, by_kernel
from rfaas_mpi.manager.credit import LentLine
from rfaas_mpi.manager.days import SUMS, Days, Period, Told, day_of, job_of
from rfaas_mpi.manager.directory import Registration
from rfaas_mpi.manager.sqlite import SqliteFile

__all__ = ["USAGE_BY", "USAGE_DAYS", "USAGE_SUMS", "Database", "Ledger", "Usage"]

log = logging.getLogger("rfaas_mpi.manager.ledger")

VERSION = 3
PRUNE_EVERY = 1000               # groups
PRUNE_MOST = 1000                # rows of a table at once: who waits for the group waits for that, too
AT_ONCE = 500                    # what one statement asks for
EVENTS_AT_ONCE = 1000            # who asks for more of them asks again
USAGE_DAYS = 400                 # for which days' sums are kept
KEEP_ENDED_S = 30 * 86400.0
NOTED_EVERY_S = 86400.0          # that a kernel's name is in use
_INTEGER_MAX = 2**63 - 1

# SQL that SQLite and PostgreSQL both understand, here and below; what they call differently
# in it, postgres.py changes.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    id INTEGER PRIMARY KEY, session INTEGER NOT NULL, request INTEGER NOT NULL, uid INTEGER NOT NULL,
    node TEXT NOT NULL, state TEXT NOT NULL, granted_at REAL NOT NULL, ended_at REAL, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS leases_ended ON leases (ended_at);
CREATE TABLE IF NOT EXISTS answers (
    session INTEGER NOT NULL, request INTEGER NOT NULL, last_lease INTEGER NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (session, request)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_last ON answers (last_lease);
CREATE TABLE IF NOT EXISTS closed (session INTEGER PRIMARY KEY, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS closed_at ON closed (at);
CREATE TABLE IF NOT EXISTS agents (node TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (session INTEGER PRIMARY KEY, job TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_at ON jobs (at);
CREATE TABLE IF NOT EXISTS heard (
    node TEXT PRIMARY KEY, incarnation INTEGER NOT NULL, clock_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drained (node TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage (
    node TEXT NOT NULL, incarnation INTEGER NOT NULL, lease INTEGER NOT NULL, seat INTEGER NOT NULL,
    number INTEGER NOT NULL, at REAL NOT NULL, uid INTEGER NOT NULL, cores INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL, held_s REAL NOT NULL, cpu_s REAL NOT NULL, exec_s REAL NOT NULL,
    poll_s REAL NOT NULL, invocations INTEGER NOT NULL,
    PRIMARY KEY (node, incarnation, lease, seat, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS usage_at ON usage (at);
CREATE TABLE IF NOT EXISTS usage_kernels (
    node TEXT NOT NULL, incarnation INTEGER NOT NULL, lease INTEGER NOT NULL, seat INTEGER NOT NULL,
    number INTEGER NOT NULL, kernel TEXT NOT NULL, exec_s REAL NOT NULL, invocations INTEGER NOT NULL,
    PRIMARY KEY (node, incarnation, lease, seat, number, kernel)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS kernels (
    uid INTEGER NOT NULL, kernel TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (uid, kernel)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lent (
    lease INTEGER NOT NULL, owner INTEGER NOT NULL, uid INTEGER NOT NULL, node TEXT NOT NULL, cores TEXT NOT NULL,
    core_s REAL NOT NULL, at REAL NOT NULL, PRIMARY KEY (lease, owner)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lent_at ON lent (at);
CREATE TABLE IF NOT EXISTS usage_days (
    day INTEGER NOT NULL, uid INTEGER NOT NULL, what TEXT NOT NULL, name TEXT NOT NULL, workers REAL NOT NULL,
    core_s REAL NOT NULL, memory_byte_s REAL NOT NULL, cpu_s REAL NOT NULL, exec_s REAL NOT NULL,
    poll_s REAL NOT NULL, invocations REAL NOT NULL, PRIMARY KEY (day, uid, what, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, at REAL NOT NULL, node TEXT NOT NULL, uid INTEGER NOT NULL, lease INTEGER NOT NULL,
    workers TEXT NOT NULL, cause TEXT NOT NULL, grace_s REAL NOT NULL);
CREATE INDEX IF NOT EXISTS events_at ON events (at, number);
CREATE INDEX IF NOT EXISTS events_node ON events (node, number);
CREATE INDEX IF NOT EXISTS events_uid ON events (uid, number);
CREATE INDEX IF NOT EXISTS events_lease ON events (lease, number);
CREATE VIEW IF NOT EXISTS seats AS
    SELECT node, incarnation, lease, seat, uid, workers, cores, memory_bytes,
           CASE WHEN held_s > record_s THEN held_s ELSE record_s END AS held_s, cpu_s, exec_s, poll_s, invocations
    FROM (SELECT node, incarnation, lease, seat, max(uid) AS uid, max(cores) AS cores,
                 max(memory_bytes) AS memory_bytes, sum(CASE number WHEN 0 THEN 0 ELSE 1 END) AS workers,
                 sum(CASE number WHEN 0 THEN 0 ELSE held_s END) AS held_s,
                 max(CASE number WHEN 0 THEN held_s ELSE 0 END) AS record_s,
                 sum(cpu_s) AS cpu_s, sum(exec_s) AS exec_s, sum(poll_s) AS poll_s,
                 sum(CAST(invocations AS DOUBLE PRECISION)) AS invocations
          FROM usage GROUP BY node, incarnation, lease, seat) AS summed;
"""

# Format 1 had a line for each worker that ended, and no seats.
_FROM_1 = """
ALTER TABLE usage RENAME TO usage_1;
CREATE TABLE usage (
    node TEXT NOT NULL, incarnation INTEGER NOT NULL, lease INTEGER NOT NULL, seat INTEGER NOT NULL,
    number INTEGER NOT NULL, at REAL NOT NULL, uid INTEGER NOT NULL, cores INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL, held_s REAL NOT NULL, cpu_s REAL NOT NULL, exec_s REAL NOT NULL,
    poll_s REAL NOT NULL, invocations INTEGER NOT NULL,
    PRIMARY KEY (node, incarnation, lease, seat, number)) WITHOUT ROWID;
INSERT INTO usage SELECT node, incarnation, lease, 0, number, at, uid, cores, memory_bytes, held_s, cpu_s, exec_s,
    min(poll_s, cpu_s), invocations FROM usage_1;
DROP TABLE usage_1
"""

# Format 2 had no sums of days: all of a worker counts on the day of its last line.
_SEATS_2 = """
SELECT node, lease, max(uid) AS uid, CAST(max(at) - 0.5 AS BIGINT) / 86400 AS day, max(cores) AS cores,
       max(memory_bytes) AS memory_bytes, sum(CASE number WHEN 0 THEN 0 ELSE 1 END) AS workers,
       CASE WHEN sum(CASE number WHEN 0 THEN 0 ELSE held_s END) > max(CASE number WHEN 0 THEN held_s ELSE 0 END)
            THEN sum(CASE number WHEN 0 THEN 0 ELSE held_s END)
            ELSE max(CASE number WHEN 0 THEN held_s ELSE 0 END) END AS held_s,
       sum(cpu_s) AS cpu_s, sum(exec_s) AS exec_s, sum(poll_s) AS poll_s,
       sum(CAST(invocations AS DOUBLE PRECISION)) AS invocations
FROM usage GROUP BY node, incarnation, lease, seat
"""
_SUMS_2 = ("sum(workers), sum(held_s * cores), sum(held_s * memory_bytes), sum(cpu_s), sum(exec_s), sum(poll_s), "
           "sum(invocations)")
_FROM_2 = f"""
CREATE TABLE IF NOT EXISTS jobs (session INTEGER PRIMARY KEY, job TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS usage_kernels (
    node TEXT NOT NULL, incarnation INTEGER NOT NULL, lease INTEGER NOT NULL, seat INTEGER NOT NULL,
    number INTEGER NOT NULL, kernel TEXT NOT NULL, exec_s REAL NOT NULL, invocations INTEGER NOT NULL,
    PRIMARY KEY (node, incarnation, lease, seat, number, kernel)) WITHOUT ROWID;
CREATE TABLE usage_days (
    day INTEGER NOT NULL, uid INTEGER NOT NULL, what TEXT NOT NULL, name TEXT NOT NULL, workers REAL NOT NULL,
    core_s REAL NOT NULL, memory_byte_s REAL NOT NULL, cpu_s REAL NOT NULL, exec_s REAL NOT NULL,
    poll_s REAL NOT NULL, invocations REAL NOT NULL, PRIMARY KEY (day, uid, what, name)) WITHOUT ROWID;
INSERT INTO usage_days SELECT day, uid, '', '', {_SUMS_2} FROM ({_SEATS_2}) AS summed GROUP BY day, uid;
INSERT INTO usage_days SELECT day, uid, 'node', node, {_SUMS_2} FROM ({_SEATS_2}) AS summed GROUP BY day, uid, node;
INSERT INTO usage_days SELECT day, uid, 'job', job, {_SUMS_2}
    FROM (SELECT summed.*, coalesce(jobs.job, '') AS job FROM ({_SEATS_2}) AS summed
          LEFT JOIN leases ON leases.id = summed.lease LEFT JOIN jobs ON jobs.session = leases.session) AS named
    GROUP BY day, uid, job;
INSERT INTO usage_days SELECT CAST(usage.at - 0.5 AS BIGINT) / 86400, usage.uid, 'kernel', usage_kernels.kernel,
    count(*), sum(usage_kernels.exec_s * usage.cores), sum(usage_kernels.exec_s * usage.memory_bytes),
    sum(CASE WHEN usage.exec_s > 1e-9 AND usage_kernels.exec_s > 1e-9 AND usage.cpu_s - usage.poll_s > 1e-9
        THEN (usage.cpu_s - usage.poll_s) * usage_kernels.exec_s / usage.exec_s ELSE 0 END),
    sum(usage_kernels.exec_s), 0, sum(CAST(usage_kernels.invocations AS DOUBLE PRECISION))
    FROM usage_kernels JOIN usage USING (node, incarnation, lease, seat, number) GROUP BY 1, 2, 4
"""

# What usage is summed by: its column, and where it stands.
USAGE_BY = {
    **{name: (f"seats.{name}", "seats") for name in ("uid", "node", "lease")},
    "job": ("coalesce(jobs.job, '')", "seats LEFT JOIN leases ON leases.id = seats.lease "
                                      "LEFT JOIN jobs ON jobs.session = leases.session"),
    "kernel": ("usage_kernels.kernel", "usage_kernels JOIN usage USING (node, incarnation, lease, seat, number)"),
}

_SUMS = {
    "workers": "CAST(sum(seats.workers) AS BIGINT)", "core_s": "sum(seats.held_s * seats.cores)",
    "memory_byte_s": "sum(seats.held_s * seats.memory_bytes)", "cpu_s": "sum(seats.cpu_s)",
    "exec_s": "sum(seats.exec_s)", "poll_s": "sum(seats.poll_s)",
    # Workers say themselves how often they were called: a sum of integers that is too large is an error.
    "invocations": "sum(seats.invocations)",
}
# A kernel has what its worker held while it ran, and its part of the CPU time that wasn't polling.
_KERNEL_SUMS = {
    "workers": "count(*)", "core_s": "sum(usage_kernels.exec_s * usage.cores)",
    "memory_byte_s": "sum(usage_kernels.exec_s * usage.memory_bytes)",
    # A product that is too small is an error to PostgreSQL; below a nanosecond there is nothing to share.
    "cpu_s": "sum(CASE WHEN usage.exec_s > 1e-9 AND usage_kernels.exec_s > 1e-9 AND usage.cpu_s - usage.poll_s > 1e-9 "
             "THEN (usage.cpu_s - usage.poll_s) * usage_kernels.exec_s / usage.exec_s ELSE 0 END)",
    "exec_s": "sum(usage_kernels.exec_s)", "poll_s": "CAST(0 AS DOUBLE PRECISION)",
    "invocations": "sum(CAST(usage_kernels.invocations AS DOUBLE PRECISION))",
}

USAGE_SUMS = tuple(_SUMS)

_encode = msgspec.json.Encoder().encode
_decode_lease = msgspec.json.Decoder(Lease).decode


class _Answer(msgspec.Struct, frozen=True):
    demand: Demand
    grant: Grant


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_numbers = msgspec.json.Decoder(tuple[int, ...]).decode
_decode_agents = msgspec.json.Decoder(tuple[Registration, ...]).decode


class Statements(Protocol):
    """What executes SQL that SQLite and PostgreSQL both understand, with `?` for parameters."""

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """A cursor over the rows that were found."""

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """The statement once for each row."""


class Database(Statements, Protocol):
    """Where the tables lie. Whose `execute` fails raises one of `errors`, of which `trouble` makes a StoreError.

    `keep_s`: how often to call `keep`, without which somebody else may take the tables over; None: never.
    """

    name: str
    errors: type[Exception]
    keep_s: float | None

    def prepare(self, schema: str, version: int, upgrades: Mapping[int, str]) -> None:
        """Makes the tables where there are none. StoreError if a later version wrote them.

        `upgrades`: statements by which a format becomes the next one.
        """

    def transaction(self) -> AbstractContextManager[None]:
        """What is executed inside is durable when it is left, all of it or, where that raises, nothing."""

    def reading(self) -> AbstractContextManager[Statements]:
        """Who executes inside sees no half of a transaction, and changes nothing."""

    def keep(self) -> None:
        """Shows that we live. NotLeading once another manager has taken over, StoreError where that isn't known."""

    def trouble(self, error: Exception) -> StoreError:
        """What an error of the database's means, and the way out."""

    def damaged(self, why: str) -> StoreError:
        """The error for tables whose content makes no sense."""

    def close(self) -> None:
        """Safe to call twice."""


class Ledger:
    """Owns a database, or the SQLite file of that path; one manager at a time.

    `write` returns once all of it would be there after a power cut. StoreError
    names the place and the way out: another manager has it, it is damaged, it
    can't be written. After a StoreError from `write` all of that call is there or
    nothing, and it may be called again.

    The first ledger in a place begins with a high epoch, since there may have been
    another one before it, whose leases still run somewhere.
    """

    def __init__(self, place: Path | Database, *, monotonic: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time, keep_ended_s: float = KEEP_ENDED_S,
                 usage_days: int = USAGE_DAYS) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._keep_ended_s = keep_ended_s
        self._usage_days = usage_days
        self._more_to_prune = False
        self._jobs_of: dict[tuple[int, int], set[str]] = {}    # (day, user) → those that count by themselves
        self._offset = float("nan")            # wall clock less monotonic clock, as written down
        self._groups = 0
        self._kernels: dict[int, dict[str, float]] = {}        # user → names that are kept apart → when it was noted
        self._db: Database = SqliteFile(place) if isinstance(place, Path) else place
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return self._db.name

    @property
    def keep_s(self) -> float | None:
        """How often to call `keep`; None: never."""
        return self._db.keep_s

    def keep(self) -> None:
        """Shows that this manager lives. NotLeading once another one has taken over; StoreError as `write`."""
        self._db.keep()

    def _prepare(self) -> None:
        self._db.prepare(_SCHEMA, VERSION, {1: _FROM_1, 2: _FROM_2})
        try:
            with self._db.transaction():
                self._db.execute("INSERT INTO meta VALUES ('epoch', ?) ON CONFLICT DO NOTHING", (int(self._wall()),))
                self.epoch = int(_meta(self._db, "epoch"))
                self._carry_over()
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        except msgspec.MsgspecError as error:
            raise self._db.damaged(f"a record makes no sense: {error}") from error

    def _carry_over(self) -> None:
        """Has the times of leases that live, and of what was answered for them, go by this manager's clock.

        All of them at once: `meta` tells of one clock, and most leases are not written again.
        """
        boot, offset = _meta(self._db, "boot"), _meta(self._db, "offset")
        if boot in ("", _boot_id()):
            return
        shift = float(offset) - (self._wall() - self._monotonic())
        leases = [_later(_decode_lease(body), shift) for body, in self._db.execute(
            "SELECT body FROM leases WHERE ended_at IS NULL").fetchall()]
        answers = [_decode_answer(body) for body, in self._db.execute(
            "SELECT body FROM answers WHERE (session, request) IN "
            "(SELECT session, request FROM leases WHERE ended_at IS NULL)").fetchall()]
        self._db.executemany("UPDATE leases SET body = ? WHERE id = ?",
                             [(_encode(lease).decode(), lease.id) for lease in leases])
        self._db.executemany(
            "UPDATE answers SET body = ? WHERE session = ? AND request = ?",
            [(_encode(_Answer(found.demand, msgspec.structs.replace(found.grant, leases=tuple(
                _later(lease, shift) for lease in found.grant.leases)))).decode(),
              found.demand.session, found.demand.request_id) for found in answers])
        self._write_clock()

    # --- reading -----------------------------------------------------------------------------------

    def load(self, *, remember_s: float = 3600.0, remember_most: int | None = None) -> Kept:
        """What a new book begins with: live leases, those that ended less than `remember_s` ago, their answers.

        Of more than `remember_most` only those that a book would remember.
        """
        now = self._wall()
        try:
            with self._db.reading() as db:
                lost = since = now - remember_s
                if remember_most is not None and (row := db.execute(
                        "SELECT ended_at FROM leases WHERE ended_at > ? ORDER BY ended_at DESC LIMIT 1 OFFSET ?",
                        (since, remember_most)).fetchone()):
                    since = min(row[0], max(since, now - REMEMBER_LEAST_S))
                return self._load(db, since, lost)
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        except msgspec.MsgspecError as error:
            raise self._db.damaged(f"a record makes no sense: {error}") from error

    def agents(self) -> list[Registration]:
        """What the agents of each node said when they registered."""
        try:
            with self._db.reading() as db:
                return [one for body, in db.execute("SELECT body FROM agents ORDER BY node")
                        for one in _decode_agents(body)]
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        except msgspec.MsgspecError as error:
            raise self._db.damaged(f"an agent's record makes no sense: {error}") from error

    def _load(self, db: Statements, since: float, lost: float) -> Kept:
        leases = [_decode_lease(body) for body, in db.execute(
            "SELECT body FROM leases WHERE ended_at IS NULL OR ended_at > ? OR (ended_at > ? AND state = ?) "
            "ORDER BY id", (since, lost, str(LeaseState.LOST)))]
        # An answer lives as long as its leases, of which the last was granted last.
        recent = {(lease.session, lease.request_id) for lease in leases}
        first = min((lease.id for lease in leases), default=0)
        answers = []
        for session, request, body in db.execute(
                "SELECT session, request, body FROM answers WHERE last_lease >= ?", (first,)):
            if (session, request) in recent:
                found = _decode_answer(body)
                answers.append(Answered(found.demand, found.grant))
        return Kept(
            leases=leases, answers=answers,
            # All of the hour: a demand may come again long after its session's end, and they are small.
            closed=[session for session, in db.execute("SELECT session FROM closed WHERE at > ?", (lost,))],
            drained=[node for node, in db.execute("SELECT node FROM drained ORDER BY node")])

    def usage(self, *, by: str = "uid", uid: int | None = None,
              period: Period = Period()) -> list[dict[str, int | float | str]]:
        """Sums of every line that is kept, or of the days of a period, by one of USAGE_BY; of one user only, or of all.

        StoreError; for leases of a period, too, which days' sums don't tell apart.
        """
        if by not in USAGE_BY:
            raise StoreError(f"usage is not kept by {by!r}", hint=f"ask by {', '.join(USAGE_BY)}")
        if period and by == "lease":
            raise StoreError("leases are not told apart in the sums of days",
                             hint="leave the period out: leases of the last 30 days are kept one by one")
        try:
            with self._db.reading() as db:
                rows = _of_days(db, by, uid, period) if period else _sums(db, by, uid)
                if by != "kernel":
                    return rows
                total = _of_days(db, "uid", uid, period) if period else _sums(db, "uid", uid)
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        return by_kernel(rows, {name: sum(row[name] for row in total) for name in _SUMS} if total else None)

    def owners(self, leases: Iterable[int]) -> dict[int, tuple[int, str]]:
        """The user and the node of each of these leases that is kept, also of what the book forgot. StoreError."""
        wanted = list(leases)
        found: dict[int, tuple[int, str]] = {}
        try:
            with self._db.reading() as db:
                while wanted:
                    some, wanted = wanted[:AT_ONCE], wanted[AT_ONCE:]
                    found.update((lease, (uid, node)) for lease, uid, node in db.execute(
                        f"SELECT id, uid, node FROM leases WHERE id IN ({', '.join('?' * len(some))})", some))
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        return found

    def heard(self) -> dict[str, tuple[int, int]]:
        """Node → its agent's number, and what that one's clock showed not long before it was last heard of."""
        try:
            with self._db.reading() as db:
                return {node: (incarnation, clock_ns) for node, incarnation, clock_ns in db.execute(
                    "SELECT node, incarnation, clock_ns FROM heard")}
        except self._db.errors as error:
            raise self._db.trouble(error) from error

    def core_s(self, half_life_s: float) -> dict[int, float]:
        """User → core-seconds that were held, half of them forgotten each half-life; by the hour, which is enough."""
        now = self._wall()
        had: dict[int, float] = {}
        try:
            with self._db.reading() as db:
                ended = db.execute(
                    "SELECT uid, CAST(at AS BIGINT) / 3600 * 3600 + 1800, sum(held_s * cores) FROM usage "
                    "WHERE at > ? AND number > 0 AND lease NOT IN (SELECT id FROM leases WHERE ended_at IS NULL) "
                    "GROUP BY 1, 2", (now - 20 * half_life_s,)).fetchall()
                live = [(granted_at, _decode_lease(body)) for granted_at, body in db.execute(
                    "SELECT granted_at, body FROM leases WHERE ended_at IS NULL")]
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        for uid, at, amount in ended:
            had[uid] = had.get(uid, 0.0) + amount * 0.5 ** (max(0.0, now - at) / half_life_s)
        for granted_at, lease in live:
            had[lease.uid] = had.get(lease.uid, 0.0) + max(0.0, now - granted_at) * len(lease.cores)
        return had

    def lent(self, half_life_s: float) -> tuple[list[LentLine], dict[int, float]]:
        """Loans of leases that live; and lender → core-seconds of all others, half of them forgotten each half-life."""
        now = self._wall()
        lines, had = [], dict[int, float]()
        try:
            with self._db.reading() as db:
                for lease, owner, uid, node, cores, core_s, at, live in db.execute(
                        "SELECT lent.lease, lent.owner, lent.uid, lent.node, lent.cores, lent.core_s, lent.at, "
                        "CASE WHEN leases.id IS NULL THEN 0 ELSE 1 END FROM lent LEFT JOIN leases "
                        "ON leases.id = lent.lease AND leases.ended_at IS NULL WHERE lent.at > ? OR lent.cores <> '[]'",
                        (now - 20 * half_life_s,)):
                    if live and cores != "[]":
                        lines.append(LentLine(lease, owner, uid, node, _decode_numbers(cores), core_s,
                                              max(0.0, now - at)))
                    else:
                        had[owner] = had.get(owner, 0.0) + core_s * 0.5 ** (max(0.0, now - at) / half_life_s)
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        except msgspec.MsgspecError as error:
            raise self._db.damaged(f"a record of what is lent makes no sense: {error}") from error
        return lines, had

    def lent_core_s(self, uid: int | None = None) -> dict[int, float]:
        """Lender → core-seconds in all lines that are kept; of one user, or of all. StoreError."""
        try:
            with self._db.reading() as db:
                return dict(db.execute(
                    f"SELECT owner, sum(core_s) FROM lent {'' if uid is None else 'WHERE owner = ? '}GROUP BY owner",
                    () if uid is None else (uid,)).fetchall())
        except self._db.errors as error:
            raise self._db.trouble(error) from error

    def last_event(self) -> int:
        """The number of the newest event that is kept, 0 without any. StoreError."""
        try:
            with self._db.reading() as db:
                return db.execute("SELECT coalesce(max(number), 0) FROM events").fetchone()[0]
        except self._db.errors as error:
            raise self._db.trouble(error) from error

    def events(self, *, after: int = 0, since: float | None = None, uid: int | None = None, node: str | None = None,
               lease: int | None = None) -> api.Events:
        """The events above `after` that are kept, at most EVENTS_AT_ONCE; of one user, node or lease only, or of all.

        StoreError.
        """
        try:
            with self._db.reading() as db:
                first = db.execute("SELECT coalesce(min(number), 1) FROM events").fetchone()[0]
                if since is not None and not after:
                    # Numbers are what is looked up in order: not all that happened before.
                    (number,) = db.execute("SELECT min(number) FROM events WHERE at >= ?", (since,)).fetchone()
                    after = _INTEGER_MAX if number is None else number - 1
                bounds = [(f"{column} ?", value) for column, value in (
                    ("number >", min(after, _INTEGER_MAX)), ("at >=", since), ("uid =", uid), ("node =", node),
                    ("lease =", lease)) if value is not None]
                rows = db.execute(
                    "SELECT number, at, node, uid, lease, workers, cause, grace_s FROM events "
                    f"WHERE {' AND '.join(bound for bound, _ in bounds)} ORDER BY number LIMIT ?",
                    (*(value for _, value in bounds), EVENTS_AT_ONCE + 1)).fetchall()
        except self._db.errors as error:
            raise self._db.trouble(error) from error
        try:
            found = tuple(api.Event(*known, workers=_decode_numbers(workers), cause=Cause(cause), grace_s=grace_s)
                          for *known, workers, cause, grace_s in rows[:EVENTS_AT_ONCE])
        except ValueError as error:          # msgspec's are, too
            raise self._db.damaged(f"a record of a lease's end makes no sense: {error}") from error
        return api.Events(first, found, len(rows) > EVENTS_AT_ONCE)

    # --- writing -----------------------------------------------------------------------------------

    def write(self, changes: Sequence[Changes], usage: Iterable[Usage] = (),
              agents: Mapping[str, tuple[Registration, ...]] = {}, jobs: Mapping[int, str] = {},
              lent: Iterable[LentLine] = (), heard: Mapping[str, tuple[int, int]] = {},
              events: Iterable[api.Event] = ()) -> None:
        """Makes all of it durable, in this order, with one flush; all or nothing.

        `agents`: all that is known of these nodes', `jobs`: the batch job of these sessions, `heard`: what the clocks
        of these nodes' agents show, `events`: what became of leases.
        """
        epoch = max([self.epoch, *(each.epoch for each in changes)])
        try:
            with self._db.transaction():
                if epoch > self.epoch:
                    self._db.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (epoch,))
                for each in changes:
                    self._write(each)
                self._db.executemany(
                    "INSERT INTO agents VALUES (?, ?) ON CONFLICT (node) DO UPDATE SET body = excluded.body",
                    [(node, _encode(known).decode()) for node, known in agents.items() if known])
                for table in ("agents", "heard"):
                    self._db.executemany(f"DELETE FROM {table} WHERE node = ?",
                                         [(node,) for node, known in agents.items() if not known])
                self._db.executemany(
                    "INSERT INTO jobs VALUES (?, ?, ?) ON CONFLICT (session) DO UPDATE SET job = excluded.job, "
                    "at = excluded.at", [(session, job, self._wall()) for session, job in jobs.items()])
                self._db.executemany(
                    "INSERT INTO lent VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (lease, owner) DO UPDATE SET "
                    "cores = excluded.cores, core_s = excluded.core_s, at = excluded.at",
                    [(line.lease, line.owner, line.uid, line.node, _encode(line.cores).decode(), line.core_s,
                      self._wall()) for line in lent])
                self._write_usage(usage)
                self._db.executemany(
                    "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    [(event.number, event.at, event.node, event.uid, event.lease_id, _encode(event.workers).decode(),
                      str(event.cause), event.grace_s) for event in events])
                self._db.executemany(
                    "INSERT INTO heard VALUES (?, ?, ?) ON CONFLICT (node) DO UPDATE SET "
                    "incarnation = excluded.incarnation, clock_ns = excluded.clock_ns",
                    [(node, *clock) for node, clock in heard.items()])
                self._write_clock()
                self._groups += 1
                if self._groups % PRUNE_EVERY == 0 or self._more_to_prune:
                    self._prune()
        except BaseException as error:
            self._offset = float("nan")
            self._kernels = {}
            self._jobs_of = {}
            if isinstance(error, self._db.errors):
                raise self._db.trouble(error) from error
            raise
        self.epoch = epoch

    def _write(self, changes: Changes) -> None:
        at, db = self._wall(), self._db
        db.executemany(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "state = excluded.state, ended_at = excluded.ended_at, body = excluded.body",
            [(lease.id, lease.session, lease.request_id, lease.uid, lease.node, str(lease.state), at,
              None if lease.state.live else at, _encode(lease).decode()) for lease in changes.leases])
        db.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT (session, request) DO UPDATE SET "
            "last_lease = excluded.last_lease, body = excluded.body",
            [(answered.demand.session, answered.demand.request_id, answered.grant.leases[-1].id,
              _encode(_Answer(answered.demand, answered.grant)).decode()) for answered in changes.answers])
        db.executemany("INSERT INTO closed VALUES (?, ?) ON CONFLICT DO NOTHING",
                       [(session, at) for session in changes.closed])
        for node, drained in changes.drained.items():
            if drained:
                db.execute("INSERT INTO drained VALUES (?, ?) ON CONFLICT DO NOTHING", (node, at))
            else:
                db.execute("DELETE FROM drained WHERE node = ?", (node,))

    def _write_usage(self, usage: Iterable[Usage]) -> None:
        """The latest that is known of each worker takes the place of what was known before."""
        at = self._wall()
        day = day_of(at)
        days = Days()
        for one in usage:
            one = believable(one, self._names(one.uid) if one.kernels else ())
            seat = self._seat(one)
            done = self._db.execute(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (node, incarnation, lease, seat, number) DO UPDATE SET at = excluded.at, "
                "held_s = excluded.held_s, cpu_s = excluded.cpu_s, exec_s = excluded.exec_s, "
                "poll_s = excluded.poll_s, invocations = excluded.invocations "
                "WHERE excluded.held_s >= usage.held_s",
                (one.node, one.incarnation, one.lease, one.seat, one.number, at, one.uid, one.cores,
                 one.memory_bytes, one.held_s, one.cpu_s, one.exec_s, one.poll_s, one.invocations))
            if not done.rowcount:
                continue
            days.add(day, one, seat, self._job(day, one))
            if not one.kernels:
                continue
            key = (one.node, one.incarnation, one.lease, one.seat, one.number)
            self._db.execute("DELETE FROM usage_kernels WHERE node = ? AND incarnation = ? AND lease = ? AND seat = ? "
                             "AND number = ?", key)
            self._db.executemany("INSERT INTO usage_kernels VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                                 [(*key, each.kernel, each.exec_s, each.invocations) for each in one.kernels])
            self._note_names(one.uid, [each.kernel for each in one.kernels], at)
        self._db.executemany(
            f"INSERT INTO usage_days VALUES (?, ?, ?, ?{', ?' * len(SUMS)}) ON CONFLICT (day, uid, what, name) "
            f"DO UPDATE SET {', '.join(f'{name} = usage_days.{name} + excluded.{name}' for name in SUMS)}",
            [(*key, *sums) for key, sums in days.more.items()])

    def _seat(self, one: Usage) -> dict[int, Told]:
        """What is known of each who had this worker's seat; of kernels, this worker's own."""
        key = (one.node, one.incarnation, one.lease, one.seat)
        kernels = {} if not one.kernels else {name: (exec_s, invocations) for name, exec_s, invocations in
                                              self._db.execute(
            "SELECT kernel, exec_s, invocations FROM usage_kernels WHERE node = ? AND incarnation = ? AND lease = ? "
            "AND seat = ? AND number = ?", (*key, one.number))}
        return {number: Told(held_s, cpu_s, exec_s, poll_s, invocations, kernels if number == one.number else {})
                for number, held_s, cpu_s, exec_s, poll_s, invocations in self._db.execute(
            "SELECT number, held_s, cpu_s, exec_s, poll_s, invocations FROM usage WHERE node = ? AND incarnation = ? "
            "AND lease = ? AND seat = ?", key)}

    def _job(self, day: int, one: Usage) -> str:
        """What its job counts as."""
        row = self._db.execute("SELECT jobs.job FROM leases JOIN jobs ON jobs.session = leases.session "
                               "WHERE leases.id = ?", (one.lease,)).fetchone()
        if (known := self._jobs_of.get((day, one.uid))) is None:
            self._jobs_of = {key: names for key, names in self._jobs_of.items() if key[0] == day}
            known = self._jobs_of[day, one.uid] = {name for (name,) in self._db.execute(
                "SELECT name FROM usage_days WHERE day = ? AND uid = ? AND what = 'job'", (day, one.uid))}
        name = job_of(row[0] if row else "", known)
        known.add(name)
        return name

    def _names(self, uid: int) -> dict[str, float]:
        if uid not in self._kernels:
            self._kernels[uid] = dict(self._db.execute("SELECT kernel, at FROM kernels WHERE uid = ?", (uid,)))
        return self._kernels[uid]

    def _note_names(self, uid: int, names: Iterable[str], at: float) -> None:
        """That these were used now; once a day is enough to know when they weren't for long."""
        known = self._names(uid)
        old = [name for name in names if not abs(at - known.get(name, float("-inf"))) < NOTED_EVERY_S]
        self._db.executemany("INSERT INTO kernels VALUES (?, ?, ?) ON CONFLICT (uid, kernel) DO UPDATE SET "
                             "at = excluded.at", [(uid, name, at) for name in old])
        known.update(dict.fromkeys(old, at))

    def _write_clock(self) -> None:
        offset = self._wall() - self._monotonic()
        # Not "greater than": the first offset is no number.
        if not abs(offset - self._offset) < 1.0:
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                [("boot", _boot_id()), ("offset", offset)])
            self._offset = offset

    def _prune(self) -> None:
        """Drops what was kept for long enough; what is too much of it at once, with the groups that follow."""
        now = self._wall()
        before = now - self._keep_ended_s
        old = "(SELECT id FROM leases WHERE ended_at < ? ORDER BY ended_at, id LIMIT ?)"
        lines = ("(SELECT node, incarnation, lease, seat, number FROM usage WHERE at < ? "
                 "ORDER BY at, node, incarnation, lease, seat, number LIMIT ?)")
        dropped = []
        for statement in (
                f"DELETE FROM answers WHERE last_lease IN {old}", f"DELETE FROM leases WHERE id IN {old}",
                "DELETE FROM closed WHERE session IN (SELECT session FROM closed WHERE at < ? ORDER BY at LIMIT ?)",
                "DELETE FROM events WHERE number IN (SELECT number FROM events WHERE at < ? ORDER BY at LIMIT ?)",
                f"DELETE FROM usage_kernels WHERE (node, incarnation, lease, seat, number) IN {lines}",
                f"DELETE FROM usage WHERE (node, incarnation, lease, seat, number) IN {lines}"):
            dropped.append(self._db.execute(statement, (before, PRUNE_MOST)).rowcount)
        self._db.execute("DELETE FROM kernels WHERE at < ?", (before,))
        dropped.append(self._db.execute(
            "DELETE FROM lent WHERE (lease, owner) IN (SELECT lease, owner FROM lent WHERE at < ? AND lease NOT IN "
            "(SELECT id FROM leases WHERE ended_at IS NULL) ORDER BY at, lease, owner LIMIT ?)",
            (before, PRUNE_MOST)).rowcount)
        self._db.execute("DELETE FROM usage_days WHERE day < ?", (day_of(now) - self._usage_days,))
        self._kernels = {}
        # As long as its session's leases are there.
        dropped.append(self._db.execute(
            "DELETE FROM jobs WHERE session IN (SELECT session FROM jobs WHERE at < ? AND session NOT IN "
            "(SELECT session FROM leases) ORDER BY at LIMIT ?)", (before, PRUNE_MOST)).rowcount)
        # A line has several kernels.
        self._more_to_prune = any(number >= PRUNE_MOST for number in dropped)

    def close(self) -> None:
        """Lets go of the database, once nobody writes or reads. Safe to call twice."""
        self._db.close()


def _later(lease: Lease, shift: float) -> Lease:
    return msgspec.structs.replace(
        lease, hard_end=None if lease.hard_end is None else lease.hard_end + shift,
        stop_by=None if lease.stop_by is None else lease.stop_by + shift)


def _meta(db: Statements, name: str) -> str | float:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return row[0] if row else ""


def _sums(db: Statements, by: str, uid: int | None) -> list[dict[str, Any]]:
    column, of = USAGE_BY[by]
    sums = _KERNEL_SUMS if by == "kernel" else _SUMS
    whose = "" if uid is None else f"WHERE {'usage' if by == 'kernel' else 'seats'}.uid = ? "
    rows = db.execute(f"SELECT {column}, {', '.join(sums.values())} FROM {of} {whose}GROUP BY 1 ORDER BY 1",
                      () if uid is None else (uid,))
    return [{**(found := dict(zip((by, *sums), row, strict=True))),
             "invocations": min(int(found["invocations"]), _INTEGER_MAX)} for row in rows]


def _of_days(db: Statements, by: str, uid: int | None, period: Period) -> list[dict[str, Any]]:
    """The same as `_sums`, from days' sums."""
    column = "uid" if by == "uid" else "name"
    bounds = [("what = ?", "" if by == "uid" else by), *(
        (f"{field} ?", value) for field, value in (("uid =", uid), ("day >=", period.since), ("day <", period.until))
        if value is not None)]
    rows = db.execute(
        f"SELECT {column}, {', '.join(f'sum({name})' for name in SUMS)} FROM usage_days "
        f"WHERE {' AND '.join(bound for bound, _ in bounds)} GROUP BY {column} ORDER BY {column}",
        tuple(value for _, value in bounds))
    found = []
    for name, *sums in rows:
        # What a kernel had one day may be the others' the next.
        row = dict(zip(SUMS, (max(0.0, value) for value in sums), strict=True))
        if any(row.values()):
            found.append({by: name, **row, "workers": round(row["workers"]),
                          "invocations": min(round(row["invocations"]), _INTEGER_MAX)})
    return found


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
