"""Which cores of a job its ranks get, and which are lent. Pure: every node computes its own part from the same facts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rfaas_mpi.errors import ConfigError

__all__ = ["NodeLayout", "bind_option", "lay_out", "wrapper", "workers_of"]


# A rank's number on its node, as Open MPI's launcher, MPICH's and srun say it.
_LOCAL = "${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-$SLURM_LOCALID}}"


class NodeLayout(msgspec.Struct, frozen=True):
    """One node of a job: the cores of each of its ranks, and those that are lent."""

    node: str
    ranks: tuple[tuple[int, ...], ...]
    lent: tuple[int, ...]


def lay_out(node: str, cores: Sequence[int], ranks: int, threads: int, workers: int | None) -> NodeLayout:
    """The first cores go to ranks, `threads` to each; of the others at most `workers` are lent.

    Raises ConfigError where the node's ranks need more cores than the job has there.
    """
    need = ranks * threads
    if need > len(cores):
        raise ConfigError(f"{ranks} ranks of {threads} threads need {need} cores, and the job has {len(cores)} on {node}",
                          hint="ask Slurm for more CPUs (--exclusive, or --cpus-per-task), or for fewer ranks; threads "
                               "are what OMP_NUM_THREADS says")
    ordered = sorted(cores)
    rest = ordered[need:]
    return NodeLayout(node, tuple(tuple(ordered[rank * threads:(rank + 1) * threads]) for rank in range(ranks)),
                      tuple(rest if workers is None else rest[:workers]))


def workers_of(workers: int | None, spare: Sequence[int]) -> tuple[int | None, ...]:
    """How many workers each node gets of so many in all, where it has so many cores to spare; None: all of them."""
    if workers is None:
        return (None,) * len(spare)
    given = [0] * len(spare)
    for _ in range(min(workers, sum(spare))):
        # To who has the most left, the first one of several.
        fullest = max(range(len(spare)), key=lambda node: (spare[node] - given[node], -node))
        given[fullest] += 1
    return tuple(given)


def bind_option(layouts: Sequence[NodeLayout]) -> str | None:
    """What binds each rank where it is to run, as an option of srun; None where nodes differ too much for one."""
    lists = {layout.ranks for layout in layouts if layout.ranks}
    if not lists:
        return "--cpu-bind=none"
    longest = max(lists, key=len)
    if any(each != longest[:len(each)] for each in lists):
        return None
    if all(len(cores) == 1 for cores in longest):
        return "--cpu-bind=map_cpu:" + ",".join(str(core) for (core,) in longest)
    return "--cpu-bind=mask_cpu:" + ",".join(hex(sum(1 << core for core in cores)) for cores in longest)


def wrapper(layouts: Sequence[NodeLayout]) -> list[str]:
    """What a rank's command is started through: a shell that binds itself, by its place, however it was started."""
    cases = "\n".join(f"{layout.node}:{number}) cores={','.join(map(str, cores))};;"
                      for layout in layouts for number, cores in enumerate(layout.ranks))
    return ["sh", "-c", f'case "$SLURMD_NODENAME:{_LOCAL}" in\n{cases}\n'
                        f'*) echo "rfaas: no cores for rank {_LOCAL} on $SLURMD_NODENAME" >&2; exit 1;;\nesac\n'
                        'exec taskset -c "$cores" "$@"', "rfaas"]
