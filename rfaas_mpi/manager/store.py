"""What outlives the service: the highest epoch ever given out, and who used what. SQLite in the runtime directory."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

__all__ = ["Store"]

log = logging.getLogger("rfaas_mpi.manager.store")

# Epochs are reserved so many at a time: one flush to disk covers them all, and
# a grant mostly waits for none. Those that are lost in a crash are just skipped.
EPOCHS_AHEAD = 256
_USAGE_KEPT = 20_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS epoch (one INTEGER PRIMARY KEY CHECK (one = 1), reserved INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, lease INTEGER NOT NULL, worker INTEGER NOT NULL, pid INTEGER NOT NULL,
    cores INTEGER NOT NULL, held_s REAL NOT NULL, cpu_s REAL NOT NULL, exec_s REAL NOT NULL, poll_s REAL NOT NULL,
    invocations INTEGER NOT NULL);
"""


class Store:
    """Owns the database file. Raises OSError or sqlite3.Error where it can't be written."""

    def __init__(self, path: Path) -> None:
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = path.with_suffix(".damaged")
            log.error("%s is damaged (%s); it is now %s and a new one is begun", path, error, aside)
            for suffix in ("-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            os.replace(path, aside)
            self._open(path)
            # What was given out is not known any more: begin above all of it.
            self._reserve(int(time.time()))
            self.epoch = self._reserved

    def _open(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        # Two connections: an epoch is on disk before it is used, usage may lag.
        self._epochs = sqlite3.connect(path, isolation_level=None)
        self._usage = sqlite3.connect(path, isolation_level=None)
        try:
            self._epochs.execute("PRAGMA journal_mode=WAL")
            self._epochs.execute("PRAGMA synchronous=FULL")
            self._usage.execute("PRAGMA synchronous=OFF")
            self._epochs.executescript(_SCHEMA)
            row = self._epochs.execute("SELECT reserved FROM epoch").fetchone()
        except sqlite3.Error:
            self._usage.close()
            self._epochs.close()
            raise
        self._reserved = 0 if row is None else int(row[0])
        self.epoch = self._reserved

    def _reserve(self, epoch: int) -> None:
        self._epochs.execute("INSERT INTO epoch VALUES (1, ?) "
                             "ON CONFLICT (one) DO UPDATE SET reserved = excluded.reserved", (epoch,))
        self._reserved = epoch

    def keep(self, epoch: int) -> None:
        """Returns once no later Store begins at or below `epoch`, even after a power cut."""
        if epoch > self._reserved:
            self._reserve(epoch + EPOCHS_AHEAD)
        self.epoch = max(self.epoch, epoch)

    def used(self, *, lease: int, worker: int, pid: int, cores: int, held_s: float, cpu_s: float, exec_ns: int,
             poll_ns: int, count: int) -> None:
        """Adds a line to the usage table; `exec_ns` and `poll_ns` are cut to what the process can have used."""
        exec_s = min(exec_ns * 1e-9, held_s)
        poll_s = min(poll_ns * 1e-9, max(0.0, held_s - exec_s))
        self._usage.execute(
            "INSERT INTO usage (at, lease, worker, pid, cores, held_s, cpu_s, exec_s, poll_s, invocations) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (time.time(), lease, worker, pid, cores, held_s, cpu_s, exec_s, poll_s, min(count, 2**63 - 1)))

    def usage(self) -> dict[str, Any]:
        """Sums over everything that is kept."""
        # The counts are workers' own: total() doesn't mind how large they are, sum() does.
        row = self._usage.execute("SELECT count(*), coalesce(sum(held_s * cores), 0), coalesce(sum(cpu_s), 0), "
                                  "coalesce(sum(exec_s), 0), CAST(total(invocations) AS INTEGER) FROM usage").fetchone()
        return dict(zip(("workers", "core_s", "cpu_s", "exec_s", "invocations"), row, strict=True))

    def close(self) -> None:
        """Drops old usage and closes the file. Safe to call twice."""
        try:
            self._usage.execute("DELETE FROM usage WHERE id <= (SELECT max(id) FROM usage) - ?", (_USAGE_KEPT,))
        except sqlite3.ProgrammingError:
            return                    # closed already
        self._usage.close()
        self._epochs.close()
