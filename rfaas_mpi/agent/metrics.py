"""An agent's figures for Prometheus: what it lends and runs, how fast cores come back, what it refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "Metrics", "Standing"]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_RECLAIM_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


@dataclass(frozen=True)
class Standing:
    """How things are when somebody looks; each mapping says how many, by state."""

    cores: Mapping[str, int] = field(default_factory=dict)
    leases: Mapping[str, int] = field(default_factory=dict)
    workers: Mapping[str, int] = field(default_factory=dict)
    zygotes: Mapping[str, int] = field(default_factory=dict)
    connected: bool = False
    report_age_s: float | None = None            # None: no report was taken yet
    unwritten: int = 0
    forks: int = 0
    turned_away: Mapping[str, int] = field(default_factory=dict)


class _AsItStands(Collector):
    """What is counted when somebody looks."""

    def __init__(self, look: Callable[[], Standing]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        now = self._look()
        for name, text, found in (
                ("cores", "Cores of the node: lent, free to be lent, owned by batch jobs, or kept for another reason.",
                 now.cores),
                ("leases", "Leases that have begun here.", now.leases),
                ("workers", "Workers.", now.workers),
                ("zygotes", "Interpreters from which workers are forked.", now.zygotes)):
            family = GaugeMetricFamily(f"rfaas_agent_{name}", text, labels=["state"])
            for state, number in found.items():
                family.add_metric([state], number)
            yield family
        yield GaugeMetricFamily("rfaas_agent_manager_connected", "1 while the manager is reached.",
                                value=int(now.connected))
        if now.report_age_s is not None:
            yield GaugeMetricFamily("rfaas_agent_report_age_seconds",
                                    "Age of the latest report that the manager has taken.", value=now.report_age_s)
        yield GaugeMetricFamily("rfaas_agent_usage_lines_unwritten",
                                "Lines of usage that the manager has not written down yet.", value=now.unwritten)
        yield CounterMetricFamily("rfaas_agent_forks", "Workers that were forked.", value=now.forks)
        family = CounterMetricFamily("rfaas_agent_connections_turned_away",
                                     "Connections that proved nothing, or not in time.", labels=["reason"])
        for reason, number in now.turned_away.items():
            family.add_metric([reason], number)
        yield family


class Metrics:
    """Owns its registry; `text` may be called at any time by the thread that the agent belongs to."""

    def __init__(self, look: Callable[[], Standing]) -> None:
        prometheus_client.disable_created_metrics()
        self._registry = CollectorRegistry()
        self._registry.register(_AsItStands(look))
        self._reclaim_s = Histogram(
            "rfaas_agent_reclaim_seconds", "From when a worker's cores were wanted back until nothing of it may run "
            "there, by why and by whether it had a grace.", ["cause", "grace"], buckets=_RECLAIM_S,
            registry=self._registry)
        self._refused = Counter("rfaas_agent_grants_refused", "Leases that could not begin, by why.", ["reason"],
                                registry=self._registry)
        self._reclaims: dict[tuple[int, int], tuple[float, str, str]] = {}

    def reclaim(self, lease: int, seat: int, cause: str, grace_s: float, now: float) -> None:
        """The cores of this seat are wanted back; said again for one that is, only its first time counts."""
        self._reclaims.setdefault((lease, seat), (now, cause, "yes" if grace_s > 0 else "no"))

    def freed(self, lease: int, seat: int, now: float) -> None:
        """Nothing of this seat may run on its cores any more, whether they were wanted or not."""
        if (found := self._reclaims.pop((lease, seat), None)) is not None:
            since, cause, grace = found
            self._reclaim_s.labels(cause, grace).observe(max(0.0, now - since))

    def refused(self, reason: str) -> None:
        """A lease could not begin."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)
