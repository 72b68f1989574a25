"""Which transports tests of executors run over, and an executor over each: all that this machine has.

Without a verbs device, what runs over verbs is run in the guest: see verbs/test_suites.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from verbs import support

DEVICES = support.active_nodes()
OVER = ("shm", "tcp", "verbs") if DEVICES else ("shm", "tcp")


@contextlib.contextmanager
def executor_over(transport: str, **settings: object) -> Iterator[object]:
    """An executor with one worker over this transport, or "inline".

    For tcp this node's service listens on TCP; for verbs, rank and worker have devices of their own where there
    are two.
    """
    from rfaas_mpi import Executor
    from rfaas_mpi.config import Settings
    from rfaas_mpi.session import Session
    with contextlib.ExitStack() as stack:
        if transport == "tcp":
            # Held, so that the service does not leave before the executor comes.
            session = stack.enter_context(Session.open(Settings.load()))
            session.open_door(["127.0.0.1:0"])
        if transport == "verbs":
            settings = {"device": DEVICES[0].device, **settings}
            stack.enter_context(_variable("RFAAS_DEVICE", DEVICES[-1].device))
        yield stack.enter_context(Executor(workers=1, transport=transport, **settings))


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
