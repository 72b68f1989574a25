"""Which cores and how much memory of this node may be lent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

__all__ = ["NodeFacts", "Rank", "SlurmFacts", "SpareCores", "launch_key", "lendable_memory",
           "local_ranks", "read_node_facts", "slurm_facts", "spare_cores"]


class NodeFacts(msgspec.Struct, frozen=True):
    """This node as the process may use it: read once, judged by pure functions."""

    cpuset: tuple[int, ...]             # CPUs that this process may ever run on
    online: int = 0                     # CPUs of the whole node (0: as the cpuset)
    quota_cpus: float | None = None     # cpu.max / cfs quota in CPUs
    core_of: dict[int, int] = {}        # CPU → its physical core's lowest CPU
    numa: dict[int, int] = {}           # CPU → NUMA node
    memory_total: int = 0
    memory_limit: int | None = None     # the tightest cgroup limit
    slurm_node: bool = False            # Slurm is configured here


class SlurmFacts(msgspec.Struct, frozen=True):
    """What Slurm told this process about its job."""

    in_job: bool = False
    cpus: int | None = None             # the job's CPUs on this node
    memory_bytes: int | None = None     # the job's memory on this node


class Rank(msgspec.Struct, frozen=True):
    """A rank that joined: as its session announced it."""

    pid: int
    mask: tuple[int, ...]               # its affinity mask
    local_ranks: int = 1                # local_ranks(its environment)
    launch: str = ""                    # launch_key(its environment, …)


class SpareCores(msgspec.Struct, frozen=True):
    """What may be lent, in the order in which to lend it, and why not the rest."""

    cores: tuple[int, ...]
    kept: dict[int, str]                # core → why it is not lent
    numa: dict[int, int] = {}
    reason: str = ""                    # one line, if nothing at all is lent


def local_ranks(environ: Mapping[str, str]) -> int:
    """How many ranks of this launch run on this node, by the launcher's variables."""
    raise NotImplementedError


def launch_key(environ: Mapping[str, str], pid: int, parent_pid: int) -> str:
    """What the ranks of one launch on this node have in common."""
    raise NotImplementedError


def slurm_facts(environ: Mapping[str, str]) -> SlurmFacts:
    """What SLURM_* variables say about the job around this process."""
    raise NotImplementedError


def spare_cores(facts: NodeFacts, ranks: Sequence[Rank] = (),
                slurm: SlurmFacts = SlurmFacts(), *, lend: bool = False) -> SpareCores:
    """The cores to lend; `lend` (RFAAS_LEND=1) lends on a login node too."""
    raise NotImplementedError


def lendable_memory(facts: NodeFacts, slurm: SlurmFacts = SlurmFacts()) -> int:
    """Bytes that may be lent."""
    raise NotImplementedError


def read_node_facts(root: Path = Path("/")) -> NodeFacts:
    """Read this node's facts from /proc and /sys; never raises for a missing file."""
    raise NotImplementedError
