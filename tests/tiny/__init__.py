"""Real service, real zygote, real worker processes; only what a worker serves is a few lines of ours."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rfaas_mpi
from rfaas_mpi import messages as msg
from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session

PACKAGE = Path(rfaas_mpi._version.__file__).parent
_numbers = itertools.count(1)


def make_view(directory: Path) -> Path:
    """A copy of the package (of links) in which rfaas_mpi.worker.main is the tiny one; goes on sys.path."""
    package = directory / "rfaas_mpi"
    package.mkdir(parents=True)
    for entry in PACKAGE.iterdir():
        if entry.name not in ("worker", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "worker").mkdir()
    (package / "worker" / "__init__.py").write_text("")
    (package / "worker" / "main.py").symlink_to(Path(__file__).parent / "worker_main.py")
    return directory


def settings(**changes: Any) -> Settings:
    """Settings with a runtime directory of their own, so that the service is this test's alone."""
    base = Path(os.environ["RFAAS_RUNTIME_DIR"]) / f"s{next(_numbers)}"
    return Settings.load(runtime_dir=str(base), **{"cores": (0, 1), "linger_s": 0.2, **changes})


class Events:
    """Everything that a session was told."""

    def __init__(self) -> None:
        self.seen: list[msg.AnyEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: msg.AnyEvent) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def wait(self, kind: type, guard_s: float = 20.0, **facts: Any) -> Any:
        """The first event of that kind and with those facts."""
        def find() -> Any:
            return next((event for event in self.seen if isinstance(event, kind)
                         and all(getattr(event, name) == value for name, value in facts.items())), None)
        with self._changed:
            found = self._changed.wait_for(find, guard_s)
        assert found is not None, f"no {kind.__name__} {facts} in {self.seen}"
        return found

    def lines(self) -> list[str]:
        with self._changed:
            return [line for event in self.seen if isinstance(event, msg.Log) for line in event.lines]


class Rank:
    """A session, its lease with one worker or more, and connections to them."""

    def __init__(self, chosen: Settings, workers: int = 1, **demand: Any) -> None:
        self.events = Events()
        self.session = Session.open(chosen, on_event=self.events)
        self.grant = self.session.request(workers, workers, **demand)
        self.lease = self.grant.leases[0]
        self._open: list[socket.socket] = []

    @property
    def worker(self) -> int:
        return self.lease.workers[0].number

    def dial(self, worker: int | None = None) -> Line:
        connection = socket.socket(fileno=self.session.dial(self.lease, worker or self.worker))
        connection.settimeout(30.0)
        self._open.append(connection)
        return Line(connection)

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        self.session.close()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Line:
    """Tells a tiny worker what to do."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def do(self, statement: str) -> None:
        self.connection.sendall(f"exec {statement}\n".encode())

    def ask(self, expression: str) -> Any:
        self.connection.sendall(f"eval {expression}\n".encode())
        said = b""
        while not said.endswith(b"\n"):
            piece = self.connection.recv(1 << 16)
            if not piece:
                raise ConnectionResetError("the worker is gone")
            said += piece
        return ast.literal_eval(said.decode())


@contextlib.contextmanager
def other_rank(view: Path, chosen: Settings, body: str) -> Iterator[subprocess.Popen[str]]:
    """A rank in a process of its own: `body` runs with `settings`, `rank(workers)` and `say(text)`; ends by a kill."""
    code = f"""
import sys, time
sys.path.insert(0, {str(view)!r})
sys.path.insert(1, {str(Path(__file__).parent.parent)!r})
from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session
import tiny
settings = Settings(**{ {name: getattr(chosen, name) for name in chosen.__dataclass_fields__}!r})
def say(text):
    print(text, flush=True)
{body}
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
