"""Control groups of version 2 do what those of version 1 do: run for real in a guest that has no others."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

import pytest
import site_of_users
from rdma_guest import Guest

SCRIPT = Path(__file__).with_name("groups_v2.py")


@pytest.fixture(scope="module")
def seen() -> dict[str, str]:
    """What became of each promise; the guest boots once for all of them."""
    out, errors = BytesIO(), BytesIO()
    with Guest([site_of_users.interpreter(), str(SCRIPT)], nodes=1, cpus=3, timeout_s=500, stdout=out, stderr=errors,
               environment=site_of_users.environment()) as guest:
        status = guest.wait()
    assert status == 0, errors.getvalue().decode()
    return json.loads(out.getvalue().decode().splitlines()[-1])


@pytest.mark.timeout(560)
@pytest.mark.skipif(os.geteuid() != 0, reason="looks for an interpreter that every user may run: needs root")
@pytest.mark.parametrize("promise", [
    "workers_of_several_users_are_bounded_lowered_and_cleared",
    "an_owner_keeps_its_core_beside_a_group_of_low_priority_and_not_beside_an_idle_thread",
    "a_user_divides_the_group_that_was_delegated_to_him", "root_divides_its_group_where_it_sees_no_other",
    "a_group_with_other_processes_is_not_divided_and_that_is_said", "nothing_is_left"])
def test_where_there_is_version_2_only(seen, promise):
    assert seen[promise] == "", seen[promise]
