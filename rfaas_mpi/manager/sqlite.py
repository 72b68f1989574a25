"""The ledger's tables in one file: SQLite, for a manager that stands alone."""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rfaas_mpi.errors import StoreError

__all__ = ["SqliteFile", "file_system_magic", "network_file_system"]

BUSY_S = 2.0                     # a manager that ends needs so long to let go

# SQLite's write-ahead log needs memory that is shared with everybody who has the
# file open, and locks that mean it.
_NETWORK = {
    0x6969: "nfs", 0x517B: "smb", 0xFE534D42: "smb2", 0xFF534D42: "cifs", 0x5346414F: "afs", 0x6B414653: "afs",
    0x73757245: "coda", 0x564C: "ncp", 0x00C36400: "ceph", 0x0BD00BD0: "lustre", 0x47504653: "gpfs",
    0x20030528: "orangefs", 0x19830326: "beegfs", 0x01021997: "9p", 0xAAD7AAEA: "panfs", 0x65735546: "fuse",
    0x786F4256: "vboxsf",
}


def file_system_magic(path: Path) -> int:
    """The kernel's number of the file system that `path` is on. OSError if it can't be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)      # struct statfs; f_type comes first
    if libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def network_file_system(magic: int) -> str:
    """The name of the network file system (or one that may be) with that number, "" for a local one."""
    return _NETWORK.get(magic, "")


class SqliteFile:
    """Owns the file and one connection; one manager at a time.

    StoreError names the file and the way out: another manager has it open, it lies
    on a network file system, it is damaged, the disk is full.
    """

    errors = sqlite3.Error
    keep_s = None                    # nobody takes it from us: there is nothing to keep

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._lock = threading.RLock()         # one connection: who reads must not see half a group
        try:
            if name := network_file_system(file_system_magic(path.parent)):
                raise StoreError(f"{path} lies on a network file system ({name}), where a power cut or a second "
                                 "manager would damage it", hint="name a file on a local disk")
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise StoreError(f"{path} can't be opened: {error.strerror}",
                             hint="name a file in a directory of the manager's user") from None
        self._db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S, check_same_thread=False)

    def prepare(self, schema: str, version: int, upgrades: Mapping[int, str]) -> None:
        """Makes the tables where there are none. StoreError if a later version wrote the file."""
        try:
            # Nobody else may read it while it is ours: then no second manager can be.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self.transaction():
                found = self._db.execute("PRAGMA user_version").fetchone()[0]
                if found > version:
                    raise StoreError(f"{self.name} was written by a later version (format {found}, this one knows "
                                     f"{version})", hint="start that version, or name another file")
                old = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage'").fetchone()
                steps = [upgrades[step] for step in range(found, version)] if found and old else []
                for statement in ";".join([*steps, schema]).split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={version}")
        except sqlite3.Error as error:
            raise self.trouble(error) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is executed inside is on disk when it is left, all of it or, where that raises, nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[SqliteFile]:
        """Who executes inside sees no half of a transaction, and changes nothing."""
        with self._lock:
            yield self

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._db.execute(statement, parameters)

    def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        self._db.executemany(statement, rows)

    def keep(self) -> None:
        """Nothing to do."""

    def trouble(self, error: Exception) -> StoreError:
        """What SQLite's error means, and the way out."""
        match error.sqlite_errorname if hasattr(error, "sqlite_errorname") else "":
            case "SQLITE_BUSY" | "SQLITE_LOCKED":
                return StoreError(f"{self.name} is in use by another manager", hint="stop that one first")
            case "SQLITE_FULL" | "SQLITE_IOERR_WRITE" | "SQLITE_IOERR_FSYNC" | "SQLITE_IOERR_TRUNCATE":
                return StoreError(f"{self.name} can't be written ({error})",
                                  hint="make room on that disk; nothing is granted before, and nothing is lost")
            case "SQLITE_CORRUPT" | "SQLITE_NOTADB":
                return self.damaged(str(error))
            case _:
                return StoreError(f"{self.name}: {error}")

    def damaged(self, why: str) -> StoreError:
        """The error for a file whose content makes no sense."""
        return StoreError(
            f"{self.name} is damaged ({why})",
            hint=f"put a backup in its place, or begin anew with `mv {self.name} {self.name}.damaged` (and the same "
                 f"for {self._path.name}-wal): leases that run are then left to their end, and their cores lent after "
                 "it")

    def close(self) -> None:
        """Lets go of the file, once nobody writes or reads. Safe to call twice."""
        # SQLite crashes where a statement's connection is closed under it.
        with self._lock:
            self._db.close()
