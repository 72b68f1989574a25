"""The lease state machine: events in, actions out; no clock, no socket."""

from rfaas_mpi.leases.book import LeaseBook, check_demand
from rfaas_mpi.leases.types import (
    Action,
    Activated,
    Admit,
    AgentStarted,
    Answered,
    Cause,
    Changes,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Kept,
    Lease,
    LeaseState,
    LiveLease,
    NodeDrained,
    NodeLost,
    NodeReport,
    NodeSilent,
    NodeUndrained,
    NodeView,
    Notify,
    Refuse,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Superseded,
    Tick,
    WorkersStopped,
)

__all__ = [
    "Action", "Activated", "Admit", "AgentStarted", "Answered", "Cause", "Changes",
    "Demand", "Event", "Grant", "GrantedWorker", "Kept", "Lease", "LeaseBook",
    "LeaseState", "LiveLease", "NodeDrained", "NodeLost", "NodeReport", "NodeSilent",
    "NodeUndrained", "NodeView", "Notify", "Refuse", "Release", "Revoke", "SessionEnded",
    "StopWorkers", "Store", "Superseded", "Tick", "WorkersStopped", "check_demand",
]
