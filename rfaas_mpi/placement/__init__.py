"""Which cores a demand gets: pure functions over facts."""

from rfaas_mpi.placement.pick import pick_cores

__all__ = ["pick_cores"]
