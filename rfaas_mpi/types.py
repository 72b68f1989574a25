"""Facts and names that every part shares; depends on nothing."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["UNDEFINED", "Action", "Chunk", "Initialised", "Outcome", "TcpOptions", "apply"]

UNDEFINED = -32766
"""What Waitany and Testany return where no request is active, as in MPI."""


class Outcome(enum.IntEnum):
    """How an invocation's last attempt ended; the numbers are the fabric's."""

    PENDING = 0
    OK = 1
    KERNEL_ERROR = 2
    BAD_KERNEL = 3
    LARGE = 4
    LOST = 5
    TIMEOUT = 6
    CANCELLED = 7
    NO_WORKER = 8
    BUSY = 9
    NO_ROOM = 10


class Action(enum.Enum):
    """What the rank does about the end of an attempt."""

    DELIVER = "deliver"
    FETCH = "fetch"
    REISSUE = "reissue"
    RUN_ON_RANK = "run on rank"
    FAIL_KERNEL = "fail kernel"
    FAIL_BAD_KERNEL = "fail bad kernel"
    FAIL_NO_ROOM = "fail no room"
    FAIL_TIMEOUT = "fail timeout"
    FAIL_LOST = "fail lost"
    CANCEL = "cancel"


@dataclass(frozen=True)
class TcpOptions:
    """When a silent TCP peer is given up: asked after `idle_s`, then each `probe_s`, `probes` times.

    `timeout_s` bounds how long what was sent may stay unacknowledged.
    """

    idle_s: int = 5
    probe_s: int = 2
    probes: int = 3
    timeout_s: float = 15.0


_initialised: set[tuple[bytes, int]] = set()
_keys = itertools.count(1)


class Initialised:
    """A callable that runs an initializer once in each process before its first call.

    Executors with an initializer send their callables wrapped in this, so that
    a worker that joins late, or replaces another one, runs it too.
    """

    def __init__(self, fn: Callable[..., Any], initializer: Callable[..., Any],
                 initargs: tuple[Any, ...], key: tuple[bytes, int]) -> None:
        self.fn = fn
        self.initializer = initializer
        self.initargs = initargs
        self.key = key

    @staticmethod
    def new_key(token: bytes) -> tuple[bytes, int]:
        """A key that no other executor of any process has."""
        return token, next(_keys)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.key not in _initialised:
            self.initializer(*self.initargs)
            _initialised.add(self.key)
        return self.fn(*args, **kwargs)


class Chunk:
    """A callable that calls another one for each tuple of arguments in a list."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [self.fn(*item) for item in chunk]


def apply(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a callable that travelled with the call."""
    return fn(*args, **kwargs)
