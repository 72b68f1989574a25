"""The manager's figures for Prometheus: what somebody would be woken up for, and nothing else."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator
from math import nan

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rfaas_mpi.leases import LeaseState
from rfaas_mpi.manager.cluster import Cluster
from rfaas_mpi.slurm.facts import Seen
from rfaas_mpi.slurm.reader import Reader

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_WRITE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class _AsItStands(Collector):
    """Gauges that are counted when somebody looks."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[GaugeMetricFamily]:
        cluster = self._cluster
        leases = GaugeMetricFamily("rfaas_manager_leases", "Live leases.", labels=["state"])
        states = Count(lease.state for lease in cluster.book.leases)
        for state in LeaseState:
            if state.live:
                leases.add_metric([str(state)], states[state])
        yield leases
        agents = GaugeMetricFamily("rfaas_manager_agents", "Node agents, by whether they are heard of.",
                                   labels=["condition"])
        for condition, number in cluster.agents.conditions().items():
            agents.add_metric([condition], number)
        yield agents
        yield GaugeMetricFamily("rfaas_manager_demands_waiting", "Demands that wait for cores.",
                                value=cluster.manager.waiting)


class Metrics:
    """Owns its registry; `text` may be called at any time by the thread that the cluster belongs to."""

    def __init__(self, cluster: Cluster, slurm: Reader[Seen] | None = None) -> None:
        # When a counter began is nothing that anybody asks for.
        prometheus_client.disable_created_metrics()
        self._registry = CollectorRegistry()
        self._registry.register(_AsItStands(cluster))
        self.granted = Counter("rfaas_manager_leases_granted", "Leases granted.", registry=self._registry)
        self.refused = Counter("rfaas_manager_demands_refused", "Demands that could not be met.",
                               registry=self._registry)
        self.unproved = Counter("rfaas_manager_authentications_refused", "Requests whose caller could not prove who "
                                "he is, or may not do what he asked for.", registry=self._registry)
        self.write_s = Histogram("rfaas_manager_ledger_write_seconds", "Time to make a group of changes durable.",
                                 buckets=_WRITE_S, registry=self._registry)
        self.write_failures = Counter("rfaas_manager_ledger_write_failures", "Groups that could not be written.",
                                      registry=self._registry)

        if slurm is not None:
            Gauge("rfaas_manager_slurm_age_seconds", "Since when it was not heard what Slurm plans (NaN: never yet).",
                  registry=self._registry).set_function(lambda: nan if slurm.age_s is None else slurm.age_s)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)
