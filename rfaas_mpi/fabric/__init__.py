"""The data plane: what of csrc/ the rest of the package sees."""

from rfaas_mpi.fabric._fabric import *  # noqa: F403
from rfaas_mpi.fabric._fabric import __all__  # noqa: F401
