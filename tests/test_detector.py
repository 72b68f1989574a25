"""The detector: no core is lent outside the rule of its class, whatever happens on the node."""

from __future__ import annotations

import os

import pytest

from batch_world import LAYOUTS, Run
from rfaas_mpi.agent.detector import CoreClass

EVENTS = int(os.environ.get("RFAAS_SOAK_DETECTOR_EVENTS", "6000"))
EVENTS_OF_A_LIFE = 250


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_core_is_lent_outside_the_rule_of_its_class(layout, tmp_path):
    lent = dict.fromkeys(CoreClass, 0)
    lives = max(1, EVENTS // len(LAYOUTS) // EVENTS_OF_A_LIFE)
    for seed in range(lives):
        root = tmp_path / str(seed)
        root.mkdir()
        run = Run(root, seed, layout)
        try:
            for number in range(EVENTS_OF_A_LIFE):
                try:
                    run.event()
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, event {number}, at {run.world.now:.3f}: {error}") from error
        finally:
            run.close()
        for which, count in run.world.lent.items():
            lent[which] += count
    # Else the test would pass a detector that lends nothing.
    assert all(lent[which] > 0 for which in CoreClass if which is not CoreClass.OWNED), lent
