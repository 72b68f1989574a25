"""The ledger's tables on a PostgreSQL server, which several managers may name: one leads, the others stand by.

    try_lead ──▶ advisory lock of one session ──▶ term + 1 ──▶ transactions, each only in its term
                  └ its end lets the next one lead              └ that of an earlier manager fails

Whoever has the lock leads. A manager that is stopped, cut off or starved shows no life
on its session, which the server ends; when it wakes up, the term is another one's, and
nothing that it still wants to write is written.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import conninfo, errors

from rfaas_mpi.errors import ConfigError, NotLeading, StoreError

__all__ = ["Postgres"]

log = logging.getLogger("rfaas_mpi.manager.postgres")

SCHEMA = "rfaas"
LOCK = 0x7266616173              # one in each database: "rfaas"
VERSION_MIN = 140000             # ends sessions that show no life
KEEP_S = 2.0                     # a leader shows life so often
SILENT_S = 8.0                   # and is given up after so long
STARTS_S = 60.0                  # it may be busy for so long with what it found, before it keeps its place itself
CONNECT_S = 5
CLOSE_S = 2.0                    # an end waits so long for who writes

# A server that is gone is noticed by us as soon as a manager that is gone is by the server.
_ALIVE = {"keepalives": 1, "keepalives_idle": 3, "keepalives_interval": 2, "keepalives_count": 2,
          "tcp_user_timeout": 8000, "connect_timeout": CONNECT_S}
_SERVER_ALIVE = {"tcp_keepalives_idle": "3", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "2",
                 "tcp_user_timeout": "8000"}
_NO_PASSWORD = ("put it into a file that only the manager's user may read, ~/.pgpass or the one that PGPASSFILE names, "
                "or name a service of pg_service.conf: postgresql:///?service=rfaas")
_PRIMARY = "name the primary server, or all of them with ?target_session_attrs=read-write"
_SECRET = ("password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret")


class Postgres:
    """Owns the session that leads and one that only reads; nobody is asked before `try_lead`.

    `keys` stands for the keys that secrets are derived from: managers that share a
    database have to have the same. ConfigError for what is no address, or holds a
    password. StoreError where the server can't be reached or doesn't do: it may be
    tried again. NotLeading once another manager has led.
    """

    errors = psycopg.Error
    keep_s: float | None = KEEP_S

    def __init__(self, url: str, *, keys: str = "") -> None:
        self._options = _options_of(url)
        self.name = _name_of(self._options)
        self._keys = keys
        self._me = f"{socket.gethostname()} (pid {os.getpid()})"
        self._lock = threading.RLock()               # over the leading session
        self._read_lock = threading.Lock()
        self._leading: psycopg.Connection[Any] | None = None
        self._reading: psycopg.Connection[Any] | None = None
        self._holds = False                          # the leading session has the lock
        self._term: int | None = None                # once we have led
        self._kept = threading.Event()               # this manager shows life itself, or has ended
        self._keeper: threading.Thread | None = None
        self._closed = False

    # ---- who leads -----------------------------------------------------------------------------------

    def try_lead(self) -> bool:
        """True once this manager leads, False while another one does. StoreError, NotLeading as the class says."""
        with self._lock:
            try:
                return self._try_lead()
            except psycopg.Error as error:
                self._drop()
                raise self.trouble(error) from error
            except BaseException:
                self._drop()
                raise

    def leader(self) -> str:
        """Who leads, or led last, for people; "" if nobody ever did. StoreError."""
        try:
            with self.reading() as db:
                row = _term_of(db)
        except psycopg.Error as error:
            raise self.trouble(error) from error
        return "" if row is None else row[1]

    def _try_lead(self) -> bool:
        db = self._connected()
        if self._holds:
            return True
        self._check_keys(_term_of(db))
        if not db.execute("SELECT pg_try_advisory_lock(%s)", (LOCK,)).fetchone()[0]:
            self._check_term(_term_of(db))
            return False
        with db.transaction():
            if db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (SCHEMA,)).fetchone() is None:
                db.execute(f"CREATE SCHEMA {SCHEMA}")
            db.execute("CREATE TABLE IF NOT EXISTS term (number BIGINT NOT NULL, leader TEXT NOT NULL, "
                       "keys TEXT NOT NULL)")
            # Waits for what an earlier leader's session may still be writing; nothing of its term is written after.
            row = db.execute("SELECT number, leader, keys FROM term FOR UPDATE").fetchone()
            self._check_keys(row)
            self._check_term(row)
            number = self._term if self._term is not None else 1 + (0 if row is None else row[0])
            if row is None:
                db.execute("INSERT INTO term VALUES (%s, %s, %s)", (number, self._me, self._keys))
            else:
                db.execute("UPDATE term SET number = %s, leader = %s", (number, self._me))
        if self._term is None:
            log.info("%s leads %s, in term %d", self._me, self.name, number)
        self._term, self._holds = number, True
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep_while_starting, name="rfaas-lead", daemon=True)
            self._keeper.start()
        return True

    def _keep_while_starting(self) -> None:
        """Shows life for a manager that is busy with what it found, up to its first keep().

        From a thread, so that one that is frozen then is given up as soon as at any other time.
        """
        deadline = time.monotonic() + STARTS_S
        while not self._kept.wait(KEEP_S) and time.monotonic() < deadline:
            with self._lock:
                if self._leading is not None and not self._closed:
                    # Whoever uses a session next that has ended finds out, and says it.
                    with suppress(psycopg.Error):
                        self._leading.execute("SELECT 1")

    def _check_term(self, row: tuple[Any, ...] | None) -> None:
        if self._term is not None and (row is None or row[0] != self._term):
            who = "nobody" if row is None else row[1]
            raise NotLeading(f"another manager, {who}, leads {self.name} now",
                             hint="this one has ended; start it again to stand by")

    def _check_keys(self, row: tuple[Any, ...] | None) -> None:
        if row is not None and row[2] != self._keys:
            raise StoreError(f"{self.name} belongs to managers with another secret.key than this one's",
                             hint="copy secret.key and grant.key from the directory of the first manager into this "
                                  "one's")

    def _connected(self) -> psycopg.Connection[Any]:
        """The leading session, a new one if it has ended."""
        if self._closed:
            raise StoreError(f"{self.name} is closed")
        if self._leading is not None and (self._leading.closed or self._leading.broken):
            self._drop()
        if self._leading is None:
            self._leading = self._session()
            silent_ms = str(int(1000 * SILENT_S))
            for name, value in {**_SERVER_ALIVE, "idle_session_timeout": silent_ms,
                                "idle_in_transaction_session_timeout": silent_ms}.items():
                self._leading.execute("SELECT set_config(%s, %s, false)", (name, value))
        return self._leading

    def _session(self) -> psycopg.Connection[Any]:
        db = psycopg.connect(**{**self._options, **_ALIVE, "application_name": "rfaas manager"}, autocommit=True)
        try:
            if db.info.server_version < VERSION_MIN:
                raise StoreError(f"{self.name} is PostgreSQL {db.info.server_version // 10000}, which ends no session "
                                 "that shows no life", hint="PostgreSQL 14 or newer does")
            if db.execute("SELECT pg_is_in_recovery()").fetchone() == (True,):
                # Who reads there may miss the last grants.
                raise StoreError(f"{self.name} is a standby server's copy", hint=_PRIMARY)
            db.execute(f"SET search_path = {SCHEMA}")
            if db.execute("SHOW fsync").fetchone() == ("off",):
                raise StoreError(f"{self.name} runs with fsync = off: a power cut would lose grants",
                                 hint="set fsync = on in postgresql.conf")
            if db.execute("SHOW synchronous_commit").fetchone()[0] not in ("on", "remote_apply"):
                db.execute("SET synchronous_commit = on")
        except BaseException:
            db.close()
            raise
        return db

    def _drop(self) -> None:
        self._holds = False
        if self._leading is not None:
            self._leading.close()
            self._leading = None

    def keep(self) -> None:
        """Shows the server that this manager lives. NotLeading once another one has taken over, StoreError as ever."""
        with self._lock:
            try:
                self._check_term(_term_of(self._ours()))
                self._kept.set()
            except psycopg.Error as error:
                self._drop()
                raise self.trouble(error) from error

    def _ours(self) -> psycopg.Connection[Any]:
        """The session that leads. StoreError while we don't, NotLeading once another one has."""
        self._connected()
        if not self._holds and not self.try_lead():
            raise StoreError(f"another manager is about to lead {self.name}", hint="this one goes on if it does not")
        assert self._leading is not None
        return self._leading

    # ---- as the ledger uses it -----------------------------------------------------------------------

    def prepare(self, schema: str, version: int, upgrades: Mapping[int, str]) -> None:
        """Makes the tables where there are none. StoreError if a later version wrote them, or another one leads."""
        if not self.try_lead():
            raise StoreError(f"{self.name} is led by another manager, {self.leader()}",
                             hint="stop that one, or let this one stand by")
        try:
            with self.transaction():
                self.execute("CREATE TABLE IF NOT EXISTS format (version BIGINT NOT NULL)")
                row = self.execute("SELECT version FROM format").fetchone()
                if row is not None and row[0] > version:
                    raise StoreError(f"{self.name} was written by a later version (format {row[0]}, this one knows "
                                     f"{version})", hint="start that version, or name another database")
                steps = [] if row is None else [upgrades[step] for step in range(row[0], version)]
                for statement in _dialect(";".join([*steps, schema])).split(";"):
                    if statement.strip():
                        self.execute(statement)
                self.execute("DELETE FROM format")
                self.execute("INSERT INTO format VALUES (?)", (version,))
        except psycopg.Error as error:
            raise self.trouble(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is executed inside is on the server's disk when it is left, and this manager led; else none of it is."""
        with self._lock:
            db = self._ours()
            try:
                with db.transaction():
                    # Nobody begins a new term while this row is held.
                    self._check_term(db.execute("SELECT number, leader, keys FROM term FOR SHARE").fetchone())
                    yield
            except BaseException:
                if db.closed or db.broken:
                    self._drop()
                raise

    @contextmanager
    def reading(self) -> Iterator[_Statements]:
        """Who executes inside sees no half of a transaction; the server refuses to write anything there."""
        with self._read_lock:
            if self._closed:
                raise StoreError(f"{self.name} is closed")
            if self._reading is not None and not _answers(self._reading):
                self._reading.close()
                self._reading = None
            if self._reading is None:
                self._reading = self._session()
                self._reading.execute("SET default_transaction_read_only = on")
            # Several statements see the same moment.
            with self._reading.transaction():
                self._reading.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                yield _Statements(self._reading)

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        assert self._leading is not None
        return _Statements(self._leading).execute(statement, parameters)

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        assert self._leading is not None
        _Statements(self._leading).executemany(statement, rows)

    def trouble(self, error: Exception) -> StoreError:
        """What PostgreSQL's error means, and the way out."""
        said = " ".join(str(error).split()) or type(error).__name__
        match error:
            case errors.DiskFull() | errors.IoError():
                return StoreError(f"{self.name} can't be written ({said})",
                                  hint="make room on the server's disk; nothing is granted before, and nothing is lost")
            case errors.ReadOnlySqlTransaction():
                return StoreError(f"{self.name} can't be written: it is read-only", hint=_PRIMARY)
            case errors.InsufficientPrivilege():
                return StoreError(f"{self.name} doesn't let this user do what a manager does ({said})",
                                  hint=f"who administers the server: CREATE SCHEMA {SCHEMA} AUTHORIZATION USER")
            case errors.DataCorrupted() | errors.IndexCorrupted():
                return self.damaged(said)
            case psycopg.OperationalError() | psycopg.InterfaceError():
                return StoreError(f"{self.name} can't be reached: {said}",
                                  hint="does it run, and let this user in? Nothing is granted before, and nothing "
                                       "is lost")
            case _:
                return StoreError(f"{self.name}: {said}")

    def damaged(self, why: str) -> StoreError:
        """The error for tables whose content makes no sense."""
        return StoreError(
            f"{self.name} is damaged ({why})",
            hint="put a backup in its place, or begin anew with `ALTER SCHEMA rfaas RENAME TO rfaas_damaged`: leases "
                 "that run are then left to their end, and their cores lent after it")

    def close(self) -> None:
        """Ends the sessions: another manager may lead. Waits for who writes, not for a server. Safe to call twice."""
        self._closed = True
        self._kept.set()
        for lock, name in ((self._lock, "_leading"), (self._read_lock, "_reading")):
            if not lock.acquire(timeout=CLOSE_S):
                _cut(getattr(self, name))
                lock.acquire()
            try:
                if (db := getattr(self, name)) is not None:
                    db.close()
                    setattr(self, name, None)
                self._holds = False
            finally:
                lock.release()
        if self._keeper is not None:
            self._keeper.join()


class _Statements:
    """Executes what the ledger has written for SQLite, too."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self._db = db

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        return self._db.execute(statement.replace("?", "%s"), tuple(map(_plain, parameters)) or None)

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        if found := [tuple(map(_plain, row)) for row in rows]:
            with self._db.cursor() as cursor:
                cursor.executemany(statement.replace("?", "%s"), found)


def _plain(value: Any) -> Any:
    # PostgreSQL's texts hold every character but this one, which a kernel's name may have.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


def _dialect(schema: str) -> str:
    """SQLite's tables as PostgreSQL's."""
    for sqlite, postgres in ((r"\bINTEGER\b", "BIGINT"), (r"\bREAL\b", "DOUBLE PRECISION"), (r"\) WITHOUT ROWID", ")"),
                             (r"\bvalue\)", "value TEXT)"), (r"CREATE VIEW IF NOT EXISTS", "CREATE OR REPLACE VIEW")):
        schema = re.sub(sqlite, postgres, schema)
    return schema


def _term_of(db: Any) -> tuple[Any, ...] | None:
    """(number, leader, keys) as they stand, None before the first manager."""
    if db.execute(f"SELECT to_regclass('{SCHEMA}.term')").fetchone()[0] is None:
        return None
    return db.execute("SELECT number, leader, keys FROM term").fetchone()


def _answers(db: psycopg.Connection[Any]) -> bool:
    """False for a session that has ended; that the server ended it is only known once it is used."""
    try:
        db.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def _cut(db: psycopg.Connection[Any] | None) -> None:
    """Ends a session under whoever waits for its server."""
    if db is not None:
        with suppress(OSError, psycopg.Error):
            with socket.socket(fileno=os.dup(db.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _options_of(url: str) -> dict[str, Any]:
    """What a URL says. ConfigError for one that is none, or that holds a secret; what it holds is not repeated."""
    form = "it looks like postgresql://HOST/DATABASE, postgresql://USER@HOST:PORT/DATABASE?sslmode=verify-full"
    if not re.match(r"postgres(ql)?://", url):
        raise ConfigError("the store is no address of a PostgreSQL database", hint=form)
    try:
        options = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        # What libpq says of it may quote it.
        raise ConfigError("the store's address can't be understood", hint=form) from None
    if any(options.get(name) for name in _SECRET):
        raise ConfigError("the store's address holds a password, which everybody on this node can read in the list "
                          "of processes", hint=_NO_PASSWORD)
    return options


def _name_of(options: dict[str, Any]) -> str:
    """The database, for messages."""
    if service := options.get("service"):
        return f"postgresql:///?service={service}"
    user, host, port = (str(options.get(name) or "") for name in ("user", "host", "port"))
    return f"postgresql://{user + '@' if user else ''}{host}{':' + port if port else ''}/{options.get('dbname') or ''}"
