"""Which nodes and cores a demand gets: pure functions over facts."""

from rfaas_mpi.placement.facts import (
    Asked,
    AskedFrom,
    ClusterView,
    Needs,
    NodeFacts,
    Placed,
    Placement,
    RankPlace,
    Refusal,
    Terms,
    Verdict,
)
from rfaas_mpi.placement.pick import pick_cores
from rfaas_mpi.placement.placer import Cohorts, Placer
from rfaas_mpi.placement.policies import POLICIES, Policy, explain, fill, place
from rfaas_mpi.placement.score import Settings
from rfaas_mpi.placement.survival import Learned, LogNormals, Survival, Window
from rfaas_mpi.placement.windows import ByPartition, Windows

__all__ = ["POLICIES", "Asked", "AskedFrom", "ByPartition", "ClusterView", "Cohorts", "Learned", "LogNormals", "Needs",
           "NodeFacts", "Placed", "Placement", "Placer", "Policy", "RankPlace", "Refusal", "Settings", "Survival",
           "Terms", "Verdict", "Window", "Windows", "explain", "fill", "pick_cores", "place"]
