"""up, down and status: what the CLI asks the service of this node, as an observer that keeps nothing alive."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rfaas_mpi import config
from rfaas_mpi.agent import sandbox
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.errors import NoService, RFaaSError
from rfaas_mpi.session import Session


def _running(settings: config.Settings) -> Session | None:
    """A session with the service that runs, None if there is none; never starts one."""
    try:
        return Session.open(settings, start=False, observer=True)
    except NoService:
        return None


def status(**which: Any) -> dict[str, Any]:
    """`running`, and the service's own facts if it is. Starts nothing. `service`, `key_file`: another node's."""
    settings = config.Settings.load(**which)
    session = _running(settings)
    if session is None:
        where = {"service": settings.service} if settings.service else {}
        return {"running": False, **where, "sandbox": _sandbox()}
    with session:
        return {"running": True, **session.status(), "sandbox": _sandbox()}


def _sandbox() -> dict[str, Any]:
    """The level that workers of a rank started like this process would get; `error` where it can't be kept."""
    try:
        return sandbox.level()
    except RFaaSError as error:
        return {"policy": config.Settings.load().sandbox, "error": str(error)}


def up(listen: Sequence[str] = (), key_file: Path | None = None) -> dict[str, Any]:
    """Starts or joins this node's service and has it stay; its facts. ServiceError if it can't be started.

    `listen`: addresses at which it also listens on TCP, to who knows the key in `key_file`.
    """
    settings = config.Settings.load().with_(service=None)
    with Session.open(settings, observer=True) as session:
        if listen:
            session.open_door(listen, key_file)
        session.stay()
        return {"running": True, **session.status(), "sandbox": _sandbox()}


def down(**which: Any) -> dict[str, Any]:
    """Ends the service, if one runs; returns when its process is gone. `service`, `key_file`: another node's."""
    session = _running(config.Settings.load(**which))
    if session is None:
        return {"running": False, "was_running": False}
    with session:
        session.down()
    return {"running": False, "was_running": True}


def describe(data: dict[str, Any]) -> Iterator[str]:
    """status() for people, within 80 columns where the facts are that short."""
    if not data["running"]:
        yield (f"No service runs at {data['service']}; `rfaas up --listen` there starts one." if data.get("service")
               else "No service runs; the first Executor starts one (or `rfaas up`).")
        yield from _levels(data)
        return
    cores, memory = data["cores"], data["memory"]
    stays = "stays until `rfaas down`" if data["stay"] else "leaves after its last rank"
    yield f"service    pid {data['pid']}, version {data['version']}, up {_duration(data['uptime_s'])}, {stays}"
    yield f"           {data['directory']}"
    for address in data.get("listen", ()):
        yield f"listens    {address} on {data['host']}"
    if data.get("key_file"):
        yield f"key        {data['key_file']}"
    lendable = core_ranges([*cores["lent"], *cores["free"]])
    if lendable:
        yield f"cores      {lendable}: lent {core_ranges(cores['lent']) or 'none'}, " \
              f"free {core_ranges(cores['free']) or 'none'}"
    else:
        yield f"cores      none to lend: {cores['why_none'] or 'every core is kept'}"
    yield f"memory     {_gib(memory['free_bytes'])} of {_gib(memory['lendable_bytes'])} free"
    yield from _levels(data)
    if limit := data.get("memory_limit"):
        yield from textwrap.wrap({"cgroup": "a control group bounds each worker's memory"}.get(
            limit["means"], f"what workers hold is looked at: {limit['why']}"), 79, initial_indent="limit      ",
            subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
    if (spin := data.get("spin_us_max")) is not None:
        yield f"polling    workers sleep {f'after {spin} us without work' if spin else 'as soon as they have no work'}"
    yield f"ranks      {len(data['sessions'])}" + (f", {data['waiting']} waiting for cores" if data["waiting"] else "")
    for rank in data["sessions"]:
        where = f" at {rank['where']}" if rank.get("where") else ""
        yield f"  pid {rank['pid']}{where}, for {_duration(rank['age_s'])}"
    yield f"leases     {len(data['leases'])}"
    for lease in data["leases"]:
        yield (f"  {lease['id']}: {lease['state'].lower()}, cores {core_ranges(lease['cores'])}, "
               f"{_gib(lease['memory_bytes'])}")
    yield f"workers    {len(data['workers'])}"
    for worker in data["workers"]:
        doing = "running" if worker["running"] else worker["state"].lower()
        yield (f"  {worker['number']}: pid {worker['pid']}, core {core_ranges(worker['cores'])}, {doing}, "
               f"{worker['invocations']} invocations in {_duration(worker['exec_ns'] / 1e9)}")


def _levels(data: dict[str, Any]) -> Iterator[str]:
    """What workers are kept from: those that there are, else those that there would be."""
    levels = [zygote["sandbox"] for zygote in data.get("zygotes", ()) if zygote["sandbox"]] or [data["sandbox"]]
    for text in dict.fromkeys(level.get("error") or sandbox.level_text(level) for level in levels):
        yield from textwrap.wrap(text, 79, initial_indent="sandbox    ", subsequent_indent=" " * 11,
                                 break_long_words=False, break_on_hyphens=False)


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
