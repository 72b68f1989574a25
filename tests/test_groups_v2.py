"""Control groups of version 2 do what those of version 1 do: run for real in a guest that has no others."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import site_of_users
from guest_beside import GuestBeside

SCRIPT = Path(__file__).with_name("groups_v2.py")

guest: GuestBeside | None = None


def begin_beside() -> None:
    """Starts it before all tests; what is wrong with that, its own tests say."""
    if os.geteuid() == 0:
        with contextlib.suppress(AssertionError, OSError):
            begun()


def begun() -> GuestBeside:
    """The guest, which boots once for all of them. AssertionError without a Python for every user."""
    global guest
    guest = guest or GuestBeside([site_of_users.interpreter(), str(SCRIPT)], "--nodes", 1, "--cpus", 3,
                                 timeout_s=1200, environment=site_of_users.environment())
    return guest


def end_beside() -> None:
    global guest
    if guest is not None:
        guest.close()
        guest = None


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, str]]:
    """What became of each promise."""
    running = begun()
    assert running.wait() == 0, running.errors()
    yield json.loads(running.output().splitlines()[-1])
    end_beside()


@pytest.mark.timeout(1500)
@pytest.mark.skipif(os.geteuid() != 0, reason="looks for an interpreter that every user may run: needs root")
@pytest.mark.parametrize("promise", [
    "workers_of_several_users_are_bounded_lowered_and_cleared",
    "a_whole_service_serves_a_job_that_comes_a_drain_and_the_main_job",
    "slurms_own_prolog_takes_everything_back_and_its_epilog_has_it_lent_again",
    "an_owner_keeps_its_core_beside_a_group_of_low_priority_and_not_beside_an_idle_thread",
    "a_user_divides_the_group_that_was_delegated_to_him", "root_divides_its_group_where_it_sees_no_other",
    "a_group_with_other_processes_is_not_divided_and_that_is_said",
    "a_watcher_of_proc_finds_no_owner_on_a_core_that_is_lent", "nothing_is_left"])
def test_where_there_is_version_2_only(seen, promise):
    assert seen[promise] == "", seen[promise]
