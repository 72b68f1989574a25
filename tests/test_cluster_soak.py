"""A cluster under ranks whose every call is counted, while faults are done to it at random: none lost, none doubled.

    RFAAS_SOAK_CLUSTER_FAULTS=1000 RFAAS_SOAK_CLUSTER_SEED=7 … -s     # prints what was counted
"""

from __future__ import annotations

import os
import secrets

import netns
import pytest
from cluster import Star
from cluster_faults import KINDS, LINK_KINDS, Disorder, plan

from rfaas_mpi.manager.ledger import Ledger

FAULTS = int(os.environ.get("RFAAS_SOAK_CLUSTER_FAULTS", "15"))
# Always the same faults for whoever changes something; other ones each time that many are asked for.
SEED = int(os.environ.get("RFAAS_SOAK_CLUSTER_SEED", "0")) or (secrets.randbelow(1 << 30) if FAULTS > 15 else 7)


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


# --- the judge sees what is wrong ------------------------------------------------------------------

RIGHT = {"rank1.journal": "sub rank1.1\nend rank1.1 result\nsub rank1.2\nend rank1.2 result\n",
         "ran-7": "b rank1.1 5 0 100\ne rank1.1 200\n", "ran-8": "b rank1.2 5 0 200\ne rank1.2 300\n"}
LOG = ("lends 0,1, listens at x\nlease=3 session=1 uid=0 cores=(0, 1) begins\nlease=3 seat=0 cores=(0,) are free\n"
       "lease=4 session=2 uid=0 cores=(0,) begins\n")
WRONG = {
    "never ended": {"rank1.journal": RIGHT["rank1.journal"] + "sub rank1.3\n"},
    "ended twice": {"rank1.journal": RIGHT["rank1.journal"] + "end rank1.1 error X\n"},
    "a result that nobody has found": {"ran-8": "b rank1.2 5 0 200\n"},
    "began 0 times": {"rank1.journal": RIGHT["rank1.journal"] + "sub rank1.3\nend rank1.3 error X\n"},
    "at the same time": {"ran-8": "b rank1.2 5 0 199\ne rank1.2 300\n"},
    "is no agent's": {"ran-8": "b rank1.2 6 0 200\ne rank1.2 300\n"},
    "is lent again": {"log": LOG + "lease=5 session=2 uid=0 cores=(1,) begins\n"},
}


@pytest.mark.parametrize("what", ["", *WRONG])
def test_what_is_lost_or_doubled_is_seen(what):
    disorder = Disorder(1, 0)
    try:
        disorder.node_of[5] = "node0"
        (disorder.cluster.directory / "manager").mkdir()
        Ledger(disorder.cluster.directory / "manager" / "ledger.db").close()
        files = {"log": LOG, **RIGHT, **WRONG.get(what, {})}
        disorder.cluster.agents[0].log.write_text(files.pop("log"))
        for name, text in files.items():
            (disorder.journals / name).write_text(text)
        if what:
            with pytest.raises(AssertionError, match=what):
                disorder.verdict()
        else:
            assert "2 invocations: {'result': 2}" in disorder.verdict()
    finally:
        disorder.close()


def test_the_same_seed_has_the_same_faults_and_another_one_others():
    assert plan(1, 50, True) == plan(1, 50, True) != plan(2, 50, True)
    assert {fault.what for fault in plan(1, 1000, True)} == {*KINDS, *LINK_KINDS}
