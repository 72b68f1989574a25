"""`rfaas lease explain`: where workers would go, and why not elsewhere."""

from __future__ import annotations

from rfaas_mpi import api
from rfaas_mpi.cli.cluster import Answer, client, plain, table
from rfaas_mpi.client import here
from rfaas_mpi.config import Settings, size_of
from rfaas_mpi.errors import ConfigError

__all__ = ["explain"]


def explain(manager: str | None, *, workers: str, cores: int, memory: str | None, duration_s: float | None,
            least_s: float, at: str | None) -> Answer:
    """What the caller's demand would get now; nothing is granted."""
    least, most = _range(workers)
    place = here(switches=Settings.load().switches) if at is None else api.Place(node=at)
    with client(manager) as asked:
        found: api.Explanation = asked.call("explain", api.AskLease(
            session="explain", request_id=0, workers_min=least, workers_max=most, cores_per_worker=cores,
            memory_per_worker=None if memory is None else _size(memory), duration_s=duration_s, least_s=least_s,
            place=place))
    what = f"{found.workers} of {most} worker{'s' if most != 1 else ''}" + (f" with {cores} cores each" * (cores > 1))
    lines = [f"{what} would be granted now (policy {found.policy})" if found.granted else
             f"refused now, or made to wait: {found.reason}"]
    if found.granted and found.reason:
        lines.append(found.reason)
    return plain(found), lines + (["", *_nodes(found)] if found.nodes else [])


def _nodes(found: api.Explanation) -> list[str]:
    rows = []
    # Those that are chosen first, then those that would do, by what they cost.
    for one in sorted(found.nodes, key=lambda one: (-one.chosen, one.terms is None,
                                                    one.terms.total_s if one.terms else 0.0, one.node)):
        if one.terms is None:
            rows.append((one.node, "-", "-", "-", "; ".join(one.refused)))
            continue
        parts = ", ".join(f"{name} {value:.3g}" for name, value in (
            ("queueing", one.terms.queueing_s), ("transfer", one.terms.transfer_s),
            ("slowdown", one.terms.slowdown_s), ("eviction", one.terms.eviction_s),
            ("fairness", one.terms.fairness_s)) if value > 0)
        rows.append((one.node, str(one.chosen), str(one.room), f"{one.terms.total_s:.3g}", parts))
    return table(("NODE", "CHOSEN", "ROOM", "COST, S", "WHY"), rows)


def _range(text: str) -> tuple[int, int]:
    low, separator, high = text.partition(":")
    try:
        least, most = int(low), int(high if separator else low)
    except ValueError:
        least = most = -1
    if not 0 <= least <= most or most < 1:
        raise ConfigError(f"--workers {text} is not possible", hint="a number, or MIN:MAX with 0 <= MIN <= MAX")
    return least, most


def _size(text: str) -> int:
    try:
        return size_of(text)
    except ValueError as error:
        raise ConfigError(f"--memory {text} is not possible: {error}") from None
