"""A cluster under ranks whose every call is counted, while faults are done to it at random: none lost, none doubled.

    RFAAS_SOAK_CLUSTER_FAULTS=1000 RFAAS_SOAK_CLUSTER_SEED=7 … -s     # prints what was counted
"""

from __future__ import annotations

import os
import secrets

import netns
import pytest
from cluster import Star
from cluster_faults import Disorder

FAULTS = int(os.environ.get("RFAAS_SOAK_CLUSTER_FAULTS", "15"))
SEED = int(os.environ.get("RFAAS_SOAK_CLUSTER_SEED", "0")) or secrets.randbelow(1 << 30)


def disordered(star: Star | None) -> None:
    print(f"RFAAS_SOAK_CLUSTER_SEED={SEED}")
    disorder = Disorder(SEED, FAULTS, star=star)
    try:
        disorder.start()
        disorder.run()
        disorder.cluster.manager.stop()
        print(disorder.verdict())
    except BaseException as error:
        error.add_note(f"RFAAS_SOAK_CLUSTER_SEED={SEED}, {sum(disorder.done.values())} faults: "
                       f"{[fault.what for fault in disorder.plan[:sum(disorder.done.values()) + 1]]}")
        raise
    finally:
        disorder.close()


@pytest.mark.timeout(300 + 10 * FAULTS)
def test_whatever_happens_on_loopback_each_call_ends_once_and_no_core_is_lent_twice():
    disordered(None)


@pytest.mark.timeout(300 + 10 * FAULTS)
def test_whatever_happens_to_four_nodes_each_call_ends_once_and_no_core_is_lent_twice():
    if reason := netns.why_not():
        pytest.skip(reason)
    star = Star(4)
    try:
        disordered(star)
    finally:
        star.close()
