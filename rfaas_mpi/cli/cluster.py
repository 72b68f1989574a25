"""What people ask a cluster's manager: leases, nodes, usage, policy, events."""

from __future__ import annotations

import pwd
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from rfaas_mpi import api
from rfaas_mpi._version import __version__
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError, ServiceError

__all__ = ["drain", "lease", "leases", "log", "policy", "revoke", "status", "undrain", "usage"]

POLL_S = 1.0
USAGE_BY = {"user": "uid", "job": "job", "kernel": "kernel", "node": "node", "lease": "lease"}

Answer = tuple[dict[str, Any], list[str]]


def client(manager: str | None) -> ManagerClient:
    """Calls the manager that is named, or that RFAAS_MANAGER names. ConfigError if there is none."""
    settings = Settings.load(manager=manager)
    if settings.manager is None:
        raise ConfigError("no manager is named",
                          hint="set RFAAS_MANAGER, or say --manager unix:/run/rfaas/manager.sock")
    return ManagerClient(settings)


def user_name(uid: int) -> str:
    """The name of a uid here, its number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def plain(answer: msgspec.Struct) -> Any:
    """An answer as json.dumps takes it."""
    return msgspec.to_builtins(answer)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def span(seconds: float | None) -> str:
    """A time as people read it, "-" for none."""
    match seconds:
        case None:
            return "-"
        case _ if seconds < 120:
            return f"{seconds:.3g} s"
        case _ if seconds < 7200:
            return f"{seconds / 60:.0f} min"
        case _:
            return f"{seconds / 3600:.1f} h"


def _many(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# --- leases -------------------------------------------------------------------

def leases(manager: str | None) -> Answer:
    """The caller's live leases; an administrator's are all."""
    with client(manager) as asked:
        found: api.Leases = asked.call("leases")
    rows = [(str(one.id), one.node, user_name(one.uid), str(one.state), str(len(one.workers)),
             core_ranges(core for worker in one.workers for core in worker.cores),
             gib(one.memory_per_worker * len(one.workers)), span(one.hard_end_in_s)) for one in found.leases]
    lines = table(("LEASE", "NODE", "USER", "STATE", "WORKERS", "CORES", "MEMORY", "ENDS IN"), rows)
    return plain(found), lines if rows else ["No leases."]


def lease(manager: str | None, number: int) -> Answer:
    """One lease, also one that ended not long ago."""
    with client(manager) as asked:
        one: api.LeaseView = asked.call("lease", lease=number)
    lines = [f"lease    {one.id}, epoch {one.epoch}, {one.state}" + (f" ({one.cause})" if one.cause else ""),
             f"user     {user_name(one.uid)}",
             f"node     {one.node}" + (f" on {one.host}" if one.host and one.host != one.node else ""),
             f"memory   {gib(one.memory_per_worker)} for each worker",
             f"ends     {'in ' + span(one.hard_end_in_s) if one.hard_end_in_s is not None else 'with its rank'}"]
    for worker in one.workers:
        stops = f", stops in {span(one.stop_in_s)}" if worker.number in one.stopping else ""
        lines.append(f"worker   {worker.number}: core {core_ranges(worker.cores)}{stops}")
    return plain(one), lines


def revoke(manager: str | None, number: int, grace_s: float) -> Answer:
    """Takes a lease back."""
    with client(manager) as asked:
        asked.call("revoke", api.RevokeLease(grace_s=grace_s), lease=number)
    within = f", within {span(grace_s)}" if grace_s else ""
    return {"lease": number, "grace_s": grace_s}, [f"Lease {number} is taken back{within}."]


# --- nodes --------------------------------------------------------------------

def drain(manager: str | None, nodes: tuple[str, ...], grace_s: float) -> Answer:
    """Takes back what is lent on these nodes (none named: all), and lends nothing there."""
    with client(manager) as asked:
        asked.call("drain", api.DrainNodes(nodes=nodes, grace_s=grace_s))
    return {"nodes": list(nodes) or "all", "grace_s": grace_s}, [
        f"{', '.join(nodes) or 'All nodes'}: everything is taken back, and nothing lent until `rfaas undrain`."]


def undrain(manager: str | None, nodes: tuple[str, ...]) -> Answer:
    """Lets drained nodes lend again (none named: all)."""
    with client(manager) as asked:
        asked.call("undrain", api.UndrainNodes(nodes=nodes))
    return {"nodes": list(nodes) or "all"}, [f"{', '.join(nodes) or 'All nodes'}: lent again."]


def status(manager: str | None) -> Answer:
    """The manager, its nodes and the caller's leases."""
    with client(manager) as asked:
        nodes: api.Nodes = asked.call("nodes")
        live: api.Leases = asked.call("leases")
        address = str(asked.address)
    lines = [f"manager    {address}",
             f"nodes      {len(nodes.nodes)}"]
    for node in nodes.nodes:
        condition = "".join(f", {word}" for word, true in (("silent", node.silent), ("drained", node.drained)) if true)
        if (version := nodes.versions.get(node.node, __version__)) != __version__:
            condition += f", version {version}"
        lines.append(f"  {node.node}: {_many(len(node.spare), 'core')}, {len(node.lent)} lent, "
                     f"{len(node.free)} free, {gib(node.memory_free)} of {gib(node.memory_bytes)} free{condition}")
    lines.append(f"leases     {len(live.leases)}")
    lines += [f"  {one.id}: {one.state} on {one.node}, {_many(len(one.workers), 'worker')}, {user_name(one.uid)}"
              for one in live.leases]
    return {"running": True, "manager": address, **plain(nodes), **plain(live)}, lines


# --- accounts and rules -----------------------------------------------------------

def usage(manager: str | None, by: str, since: str | None = None, until: str | None = None) -> Answer:
    """Sums of what workers used: the caller's, all for an administrator."""
    days = {name: text for name, text in (("since", since), ("until", until)) if text is not None}
    with client(manager) as asked:
        found: api.UsageSums = asked.call("usage", by=USAGE_BY[by], **days)
    if days and not (found.since or found.until):
        raise ServiceError("the manager is of an earlier version, which keeps no sums of days",
                           hint="leave --since and --until out")
    column = USAGE_BY[by]
    rows = []
    priced = any(found.prices.values())
    lent = any(row.get("lent_core_s") for row in found.rows)
    for row in found.rows:
        name = user_name(row[column]) if by == "user" else str(row[column]) or "-"
        rows.append((name, str(row["workers"]), f"{row['core_s'] / 3600:.3f}",
                     f"{row['memory_byte_s'] / 3600 / 2**30:.3f}", f"{row['cpu_s']:.1f}", f"{row['exec_s']:.1f}",
                     f"{row['poll_s']:.1f}", str(row["invocations"]), *([f"{row['cost']:.4f}"] if priced else []),
                     *([f"{row['lent_core_s'] / 3600:.3f}", f"{row['credit_core_s'] / 3600:.3f}"] if lent else [])))
    lines = table((by.upper(), "WORKERS", "CORE-H", "GIB-H", "CPU-S", "EXEC-S", "POLL-S", "INVOCATIONS",
                   *(["COST"] if priced else []), *(["LENT-H", "CREDIT-H"] if lent else [])), rows)
    none = "Nothing was used then." if days else "Nothing was used yet."
    return {"by": by, "since": found.since or None, "until": found.until or None, "rows": list(found.rows),
            "prices": found.prices}, lines if rows else [none]


def policy(manager: str | None) -> Answer:
    """Who may lend to all, and who administers."""
    with client(manager) as asked:
        found: api.PolicyView = asked.call("policy")
    quota = "any number of cores" if found.cores_max is None else f"{_many(found.cores_max, 'core')} at a time"
    return plain(found), [f"lend to all   {', '.join(map(user_name, found.lenders))}",
                          f"administer    {', '.join(map(user_name, found.admins))}",
                          f"placement     {found.placement}",
                          f"you           {quota}, weight {found.weight:g}"]


def events(found: api.Events) -> Iterator[str]:
    """A line for each."""
    for one in found.events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at))
        grace = f", within {span(one.grace_s)}" if one.grace_s else ""
        yield (f"{when}  lease {one.lease_id} on {one.node} ({user_name(one.uid)}): "
               f"{_many(len(one.workers), 'worker')} {one.cause}{grace}")


def log(manager: str | None, *, follow: bool, say: Callable[[dict[str, Any], list[str]], None],
        **bounds: str | int | None) -> None:
    """Hands what became of the caller's leases to `say`: what is kept, and with `follow` what comes, until Ctrl-C.

    `bounds`: the `node`, the `lease`, and `since` when; None for any.
    """
    wanted = {name: value for name, value in bounds.items() if value is not None}
    nothing = "Nothing like that happened to your leases." if wanted else "Nothing happened to your leases."
    after = 0
    with client(manager) as asked:
        while True:
            found = _events(asked, after, wanted)
            if found.events or not follow:
                said = plain(found)
                del said["more"]             # all of them are there
                say(said, list(events(found)) or [nothing])
            if not follow:
                return
            after = max([after, *(one.number for one in found.events)])
            time.sleep(POLL_S)


def _events(asked: ManagerClient, after: int, wanted: Mapping[str, object]) -> api.Events:
    """All of them, however many answers they come in. ServiceError for a manager that can't look for some only."""
    found: list[api.Event] = []
    while True:
        some: api.Events = asked.call("events", after=after, **wanted)
        if wanted and some.more is None:
            raise ServiceError("the manager is of an earlier version, which can't look for some events only",
                               hint=f"leave {', '.join(f'--{name}' for name in wanted)} out")
        found += some.events
        if not some.more:
            return msgspec.structs.replace(some, events=tuple(found))
        after = some.events[-1].number
