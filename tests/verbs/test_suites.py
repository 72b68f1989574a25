"""What executors promise over shm and tcp holds over verbs: the same tests, from rank to worker on two devices."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from verbs import conftest

SUITES = ("test_executor.py", "test_futures.py", "test_requests.py", "test_bad_input.py")
# Emulated, these take minutes, or count on so much being done in so much time.
LONG = ("results_that_nobody_reads_do_not_pile_up", "long_generator_keeps_few_calls_alive", "3000000",
        "submit_never_waits_for_a_slot", "what_runs_is_what_a_callable_is_now", "results_larger_than_a_slot_arrive",
        "eight_threads_may_use_one_executor")


@pytest.mark.timeout(1500)
def test_what_executors_promise_holds_over_verbs(nodes):
    tests = conftest.HERE.parent
    chosen = " and ".join(["verbs", *(f"not {name}" for name in LONG if conftest.IN_GUEST)])
    # A service that stays between two tests starts once.
    slow = {"RFAAS_LINGER_S": "10", "RFAAS_START_TIMEOUT_S": "100"} if conftest.IN_GUEST else {}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout",
                           *(("-o", f"timeout={conftest.TEST_TIMEOUT_S}") if conftest.IN_GUEST else ()),
                           "--durations=10", "-k", chosen, *(tests / name for name in SUITES)],
                          cwd=conftest.REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=1480, env={**os.environ, **slow}, check=False)
    assert done.returncode == 0, done.stdout
