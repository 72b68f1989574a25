"""up, down and status: what the CLI asks the service of this node, as an observer that keeps nothing alive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rfaas_mpi.errors import ServiceError
from rfaas_mpi.session import Session


def _running() -> Session | None:
    """A session with the service that runs, None if there is none; never starts one."""
    try:
        return Session.open(start=False, observer=True)
    except ServiceError as error:
        if type(error) is ServiceError and Exception.__str__(error).startswith("no service runs"):
            return None
        raise


def status() -> dict[str, Any]:
    """`running`, and the service's own facts if it is. Starts nothing."""
    session = _running()
    if session is None:
        return {"running": False}
    with session:
        return {"running": True, **session.status()}


def up() -> dict[str, Any]:
    """Starts or joins the service and has it stay; its facts. ServiceError if it can't be started."""
    with Session.open(observer=True) as session:
        session.stay()
        return {"running": True, **session.status()}


def down() -> dict[str, Any]:
    """Ends the service, if one runs; returns when its process is gone."""
    session = _running()
    if session is None:
        return {"running": False, "was_running": False}
    with session:
        session.down()
    return {"running": False, "was_running": True}


def describe(data: dict[str, Any]) -> Iterator[str]:
    """status() for people, within 80 columns where the facts are that short."""
    if not data["running"]:
        yield "No service runs; the first Executor starts one (or `rfaas up`)."
        return
    for name, value in data.items():
        if name != "running":
            yield f"{name}: {value}"
