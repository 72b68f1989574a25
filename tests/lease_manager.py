"""A manager to kill: a registry in a process of its own, told on stdin, answering on stdout.

    python lease_manager.py PLACE         one JSON object a line, each way
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType

import msgspec
from postgres_server import ledger_at

from rfaas_mpi.errors import StoreError
from rfaas_mpi.leases import Action, Event, Lease, NodeView
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.placement import pick_cores


class Told(msgspec.Struct, frozen=True):
    """Events that make one group."""

    now: float
    events: tuple[Event, ...] = ()


class Done(msgspec.Struct, frozen=True):
    """The end of an answer, and what the manager then knows; `trouble` says why nothing was done."""

    leases: tuple[Lease, ...] = ()
    nodes: tuple[NodeView, ...] = ()
    deadline: float | None = None
    trouble: str = ""


def main(place: str, begin_within_s: float) -> None:
    """Serves until its stdin ends."""
    ledger = ledger_at(place, monotonic=lambda: now)
    decode = msgspec.json.Decoder(Told).decode
    now = msgspec.json.decode(sys.stdin.buffer.readline(), type=float)
    registry = Registry(ledger, pick_cores, now, begin_within_s=begin_within_s, remember_s=1e9)
    _say("done", _done(registry))
    for line in sys.stdin.buffer:
        told = decode(line)
        now = told.now
        for event in told.events:
            registry.handle(event, now)
        try:
            actions = registry.flush()
        except StoreError as error:
            _say("done", Done(trouble=str(error)))
            continue
        for action in actions:
            _say("act", action)
        _say("done", _done(registry))


def _done(registry: Registry) -> Done:
    book = registry.book
    return Done(leases=tuple(book.leases), nodes=tuple(book.nodes), deadline=book.next_deadline())


def _say(kind: str, what: object) -> None:
    os.write(1, kind.encode() + b" " + msgspec.json.encode(what) + b"\n")


class RemoteBook:
    """That process, seen from outside."""

    def __init__(self, place: str, now: float, begin_within_s: float) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, place, str(begin_within_s)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._decode_action = msgspec.json.Decoder(Action).decode
        self._decode_done = msgspec.json.Decoder(Done).decode
        self._tell(msgspec.json.encode(now))
        self._done = Done()
        assert self._read() is None

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _read(self) -> Action | None:
        """The next action, None at the end of an answer. EOFError if the process ended first."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        kind, _, body = line.partition(b" ")
        if kind == b"act":
            return self._decode_action(body)
        self._done = self._decode_done(body)
        return None

    def handle(self, events: list[Event], now: float) -> list[Action]:
        """What was done about these events; none of it if `trouble` says why."""
        self._tell(msgspec.json.encode(Told(now, tuple(events))))
        actions = []
        while (action := self._read()) is not None:
            actions.append(action)
        return actions

    def handle_and_die(self, events: list[Event], now: float, answers: int, spins: int) -> list[Action]:
        """Kills it after so many answers, or earlier than the first; what it had said by then."""
        self._tell(msgspec.json.encode(Told(now, tuple(events))))
        actions: list[Action] = []
        for _ in range(spins):
            os.sched_yield()
        try:
            while len(actions) < answers and (action := self._read()) is not None:
                actions.append(action)
            self.kill()
            # What it had written into the pipe by then has been said too.
            while (action := self._read()) is not None:
                actions.append(action)
        except EOFError:
            self.kill()
        return actions

    @property
    def leases(self) -> list[Lease]:
        return list(self._done.leases)

    @property
    def nodes(self) -> list[NodeView]:
        return list(self._done.nodes)

    @property
    def trouble(self) -> str:
        return self._done.trouble

    def next_deadline(self) -> float | None:
        return self._done.deadline

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> RemoteBook:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
