"""A PostgreSQL server of the tests' own, from Debian's package: a directory, a Unix socket, a port of 127.0.0.1."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.postgres import Postgres

GUARD_S = 60.0
NOBODY = 65534                       # as root it doesn't run


def free_ports() -> Iterator[int]:
    """Ports that are probably free, and stay so while a server is down: the kernel gives them to nobody by itself."""
    below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen = random.SystemRandom()
    while True:
        yield chosen.randrange(10_000, max(10_001, below))


def program(name: str) -> str:
    """Where Debian has it, the newest one."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    path = str(found[-1]) if found else shutil.which(name)
    assert path, f"{name} is missing: tools/system_packages.sh installs it"
    return path


def ledger_at(place: str, **more: Any) -> Ledger:
    """The ledger in a file or at a URL, as soon as the server has seen the end of who had it before."""
    if not place.startswith("postgresql:"):
        return Ledger(Path(place), **more)
    store, deadline = Postgres(place), time.monotonic() + GUARD_S
    while not store.try_lead():
        assert time.monotonic() < deadline, f"{store.leader()} doesn't let go"
        time.sleep(0.002)
    return Ledger(store, **more)


class PortTaken(Exception):
    """Nothing was started."""


class PostgresServer:
    """Runs from its making to close(); ends with who made it. `database()` is the URL of a new, empty one.

    It listens on the first of `ports` that nobody has, and keeps it.
    """

    def __init__(self, ports: Iterator[int] | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rfaas-pg-"))
        self.data = self.directory / "data"
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user = []
        if os.geteuid() == 0:
            os.chown(self.directory, NOBODY, NOBODY)
            self._as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        self.port = 0
        self._environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        try:
            # Over the socket everybody is let in who reaches it, which is its owner and root; over the port with a
            # password.
            self._run("initdb", "--pgdata", str(self.data), "--username", "rfaas", "--auth-local=trust",
                      "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions")
            for self.port in ports or free_ports():
                try:
                    self.start()
                    break
                except PortTaken:
                    continue
        except BaseException:
            self.close()
            raise

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run([*self._as_user, program(name), *arguments], cwd=self.directory,
                              env=self._environment, capture_output=True, text=True, timeout=GUARD_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, **settings: str) -> None:
        """Returns once it answers; PortTaken. Its disk is synced: what a manager is told to be durable is."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.directory),
                    "port": str(self.port), "max_connections": "50", "shared_buffers": "16MB", **settings}
        log = self.directory / "log"
        said = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*(self._as_user or ["setpriv"]), "--pdeathsig", "INT", "--", program("postgres"), "-D",
                 str(self.data), *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))],
                cwd=self.directory, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True)
        deadline = time.monotonic() + GUARD_S
        while not self.answers():
            if self._process.poll() is not None and b"Address already in use" in log.read_bytes()[said:]:
                self._process = None
                raise PortTaken(f"somebody else has port {self.port}")
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def answers(self) -> bool:
        try:
            self.ask("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def ask(self, statement: str, database: str = "postgres") -> list[tuple]:
        """What an administrator of the server finds."""
        with psycopg.connect(host=str(self.directory), port=self.port, user="rfaas", dbname=database,
                             autocommit=True) as db:
            cursor = db.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """The URL of a new one, over the socket."""
        name = f"rfaas{next(self._numbers)}"
        self.ask(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str, query: str = "") -> str:
        """The URL of a database over the socket."""
        return f"postgresql://rfaas@/{name}?host={self.directory}&port={self.port}{query}"

    def end_sessions(self) -> None:
        """Every manager's, as an administrator would."""
        self.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rfaas manager'")

    def stop(self, number: int = signal.SIGINT) -> None:
        """Ends it: SIGINT at once but in order, SIGQUIT as a crash would."""
        if self._process is not None:
            process, self._process = self._process, None
            process.send_signal(number)
            process.wait(GUARD_S)

    def close(self) -> None:
        """Safe to call twice."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)
