"""The lease state machine: events in, actions out; no clock, no socket."""

from rfaas_mpi.leases.book import LeaseBook
from rfaas_mpi.leases.types import (
    Action,
    Activated,
    Cause,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Lease,
    LeaseState,
    NodeLost,
    NodeReport,
    NodeView,
    Notify,
    Refuse,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Tick,
    WorkersStopped,
)

__all__ = [
    "Action", "Activated", "Cause", "Demand", "Event", "Grant", "GrantedWorker",
    "Lease", "LeaseBook", "LeaseState", "NodeLost", "NodeReport", "NodeView", "Notify",
    "Refuse", "Release", "Revoke", "SessionEnded", "StopWorkers", "Store", "Tick",
    "WorkersStopped",
]
