"""A node's agent caps for how long workers poll for work, whatever their rank wants."""

from __future__ import annotations

import os
from pathlib import Path

import faults
import pytest
from cluster import Cluster, wait_until

from rfaas_mpi import Executor
from rfaas_mpi import messages as msg
from rfaas_mpi.agent.pool import ZygoteKind
from rfaas_mpi.errors import ConfigError

LONG_S = 10.0                        # that a rank would have its workers spin


def kind(spin_us_max: int | None, **environment: str) -> ZygoteKind:
    join = msg.Join(1, pid=1, executable=b"/usr/bin/python3", flags=(), path=(), directory=b"/", affinity=(0,),
                    environment=tuple((os.fsencode(name), os.fsencode(value))
                                      for name, value in environment.items()))
    return ZygoteKind.of(join, spin_us_max=spin_us_max)


@pytest.mark.parametrize(("wanted", "most", "spin_us"), [
    ("5000", 100, "100"), ("50", 100, "50"), (None, 0, "0"), (None, 2000, "1000"), ("5000", None, "5000")])
def test_workers_spin_for_as_long_as_their_rank_wants_and_no_longer_than_the_node_allows(wanted, most, spin_us):
    given = {} if wanted is None else {"RFAAS_SPIN_US": wanted}
    found = {os.fsdecode(name): os.fsdecode(value) for name, value in kind(most, **given).environment}
    assert found.get("RFAAS_SPIN_US") == spin_us


def test_a_rank_can_t_raise_the_cap_itself():
    found = dict(kind(100, RFAAS_SPIN_US="5000", RFAAS_SPIN_US_MAX="9000").environment)
    assert found[b"RFAAS_SPIN_US"] == b"100"


def test_a_wish_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match="RFAAS_SPIN_US='long'"):
        kind(100, RFAAS_SPIN_US="long")


def asleep(pid: int) -> bool:
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_of_a_site_that_forbids_hot_polling_sleeps_though_its_rank_wants_it_hot(monkeypatch):
    monkeypatch.setenv("RFAAS_SPIN_US", str(int(LONG_S * 1e6)))
    with (Cluster(["0-1"], sockets=[0], RFAAS_SPIN_US_MAX="0") as cluster,
          Executor(1, manager=cluster.environment["RFAAS_MANAGER"], fallback=False,
                   manager_user=cluster.environment["RFAAS_MANAGER_USER"]) as ex):
        assert ex.submit(faults.plus_one, 41).result() == 42
        (pid,) = faults.worker_pids(ex).values()
        wait_until(lambda: asleep(pid), "it sleeps")
        # Else it would have spun for all of that before, as far as the processor was its own.
        assert cpu_s(pid) < LONG_S / 10
