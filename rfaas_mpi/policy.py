"""What to do when an attempt of an invocation has ended: facts in, action out."""

from __future__ import annotations

import dataclasses

from rfaas_mpi.types import Action, Outcome

__all__ = ["MAX_REISSUES", "MAX_UNKNOWN", "End", "decide"]

MAX_REISSUES = 3
"""How often infrastructure may take an invocation's worker before the rank runs it."""

MAX_UNKNOWN = 1
"""How often an end nobody can explain is tried again elsewhere."""


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """One attempt's end.

    `cause` and `reason` are the service's verdict on the worker, asked for only
    where the worker was lost: `kernel` ends count only if the worker died in
    this very invocation (`own`). `lost` and `unexplained` count the attempts
    that infrastructure and unknown causes have ended before this one. `forced`:
    this invocation was cancelled with force. `closed`: the executor is closing,
    so nothing is started any more.
    """

    outcome: Outcome
    cause: str = ""
    reason: str = ""
    own: bool = True
    lost: int = 0
    unexplained: int = 0
    forced: bool = False
    fallback: bool = True
    closed: bool = False


def decide(end: End) -> Action:
    """The action for an end. Total: every outcome but PENDING has one.

    Raises ValueError for PENDING, since nothing has ended.
    """
    if end.forced and end.outcome is not Outcome.PENDING:
        # Whoever was told that the cancel took effect gets no result any more.
        return Action.CANCEL
    match end.outcome:
        case Outcome.OK:
            return Action.DELIVER
        case Outcome.LARGE:
            return Action.FETCH
        case Outcome.KERNEL_ERROR:
            return Action.FAIL_KERNEL
        case Outcome.BAD_KERNEL:
            return Action.FAIL_BAD_KERNEL
        case Outcome.TIMEOUT:
            return Action.FAIL_TIMEOUT
        case Outcome.CANCELLED:
            return Action.CANCEL
        case Outcome.NO_WORKER:
            if end.closed:
                return Action.CANCEL
            return _last_resort(end)
        case Outcome.BUSY:
            return _again(end)
        case Outcome.NO_ROOM:
            return Action.FAIL_NO_ROOM
        case Outcome.LOST:
            return _lost(end)
    raise ValueError(f"an invocation with outcome {end.outcome!r} has not ended")


def _lost(end: End) -> Action:
    if end.own and end.cause == "kernel":
        return Action.FAIL_TIMEOUT if end.reason == "deadline" else Action.FAIL_KERNEL
    if end.own and end.cause == "unknown":
        if end.unexplained >= MAX_UNKNOWN:
            return Action.FAIL_KERNEL
        return Action.CANCEL if end.closed else Action.REISSUE
    return _again(end)


def _again(end: End) -> Action:
    if end.closed:
        return Action.CANCEL
    if end.lost < MAX_REISSUES:
        return Action.REISSUE
    return _last_resort(end)


def _last_resort(end: End) -> Action:
    return Action.RUN_ON_RANK if end.fallback else Action.FAIL_LOST
