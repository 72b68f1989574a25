"""The benchmarks measure what they say, beside two bare processes; no test here judges a time."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array

import pytest

from rfaas_mpi.bench import measure, raw
from rfaas_mpi.errors import ClosedError

TWO_CORES = len(os.sched_getaffinity(0)) >= 2


@pytest.fixture
def partner():
    with raw.Partner(data_bytes=8192) as partner:
        yield partner


# --- arithmetic ------------------------------------------------------------------

def run_of(**blocks: list[float]) -> measure.Run:
    return measure.Run({name: list(values) for name, values in blocks.items()}, {name: [] for name in blocks})


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(n) for n in range(1, 101)]
    assert measure.percentile(values, 50) == 50.0
    assert measure.percentile(values, 99) == 99.0
    assert measure.percentile([7.0], 99) == 7.0


def test_no_value_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match="no value was measured"):
        measure.percentile([], 50)


def test_over_raw_pairs_the_blocks_of_one_cycle():
    # The machine slows down by 1000 in the middle; both subjects meet it.
    drifting = run_of(raw=[100.0, 1100.0, 100.0], native=[150.0, 1150.0, 150.0], raw_again=[100.0, 1100.0, 100.0])
    result = measure.over([drifting], "native", "raw", "raw_again")
    assert result["p50"] == 50.0
    assert result["p99"] == 50.0
    assert result["count"] == 3
    assert result["aa"]["p50"] == 0.0


def test_over_raw_is_the_best_of_the_runs_and_tells_all():
    runs = [run_of(raw=[100.0] * 3, native=[100.0 + more] * 3, raw_again=[101.0] * 3) for more in (70.0, 40.0, 55.0)]
    result = measure.over(runs, "native", "raw", "raw_again")
    assert result["p50"] == 40.0
    assert result["runs"] == [70.0, 40.0, 55.0]
    assert result["aa"]["p50"] == 1.0


def test_a_ratio_is_taken_block_by_block():
    result = measure.ratio([run_of(futex=[10.0, 20.0], warm=[15.0, 30.0], futex_again=[10.0, 20.0])],
                           "warm", "futex", "futex_again")
    assert result["p50"] == 1.5
    assert result["aa"]["p50"] == 1.0


def test_the_p99_of_a_rate_is_what_99_percent_of_the_blocks_reach():
    runs = [run_of(native=[1000.0] * 99 + [2000.0])]
    result = measure.rate_figure(runs, "native")
    assert result["p50"] == 1_000_000
    assert result["p99"] == 1_000_000
    assert result["count"] == 100
    slow = measure.rate_figure([run_of(native=[1000.0] * 50 + [2000.0] * 50)], "native")
    assert slow["p99"] == 500_000


def test_subjects_alternate_in_blocks_and_rest_between():
    log: list[str] = []

    def subject(name: str) -> measure.Subject:
        def block(count: int) -> int:
            log.append(f"{name}{count}")
            return 10 * count

        return measure.Subject(name, block)

    run = measure.interleave([subject("a"), subject("b")], cycles=2, block=5, between=lambda: log.append("rest"))
    assert log == ["rest", "a5", "rest", "b5"] * 2
    assert run.blocks == {"a": [10.0, 10.0], "b": [10.0, 10.0]}


def test_single_invocations_are_counted_one_by_one():
    one = measure.Subject("one", lambda n: 10 * n, lambda n: [12] * n)
    run = measure.interleave([one], cycles=3, block=4)
    figure = measure.latency_figure([run], "one")
    assert figure == {"p50": 12.0, "p99": 12.0, "count": 12, "unit": "ns", "in_blocks": 10.0}


def test_where_only_single_invocations_are_timed_they_make_the_block():
    run = measure.interleave([measure.Subject("one", singles=lambda n: [10] * (n - 1) + [50])], cycles=2, block=4)
    assert run.blocks["one"] == [20.0, 20.0]
    assert run.singles["one"] == [10, 10, 10, 50] * 2


def test_what_is_prepared_is_as_much_as_what_is_measured():
    prepared: list[int] = []
    subject = measure.Subject("one", lambda n: n, lambda n: [1] * n, prepared.append)
    measure.interleave([subject], cycles=2, block=7)
    assert prepared == [7, 7, 7, 7]


# --- the bare processes ------------------------------------------------------------

@pytest.mark.parametrize("mode", [raw.MAILBOX, raw.DOUBLE, raw.FUTEX])
def test_a_bare_partner_answers_every_armed_call(partner, mode):
    for _ in range(3):
        partner.arm(mode, 20, 64)
        assert partner.calls(10) > 0
        samples = partner.samples(9)
        assert len(samples) == 9 and min(samples) > 0
        assert partner.call() > 0


def test_a_bare_partner_doubles_the_shared_values(partner):
    x, y = (view.cast("d") for view in partner.buffers())
    for index in range(len(x)):
        x[index] = float(index)
    partner.arm(raw.DOUBLE, 1, 4096)
    partner.call()
    assert list(y) == [2.0 * index for index in range(512)] + [0.0] * 512
    del x, y


def test_a_call_that_was_not_armed_is_refused_not_waited_for(partner):
    with pytest.raises(ValueError, match="out of range"):
        partner.call()
    partner.arm(raw.MAILBOX, 1)
    with pytest.raises(ValueError, match="out of range"):
        partner.arm(raw.MAILBOX, 1)
    partner.call()


def test_more_bytes_than_are_shared_are_refused(partner):
    with pytest.raises(ValueError, match="out of range"):
        partner.arm(raw.DOUBLE, 1, 16384)


def test_a_killed_partner_is_an_error_not_a_hang(partner):
    os.kill(partner.pid, 9)
    with pytest.raises(raw.BenchError, match="has ended"):
        partner.arm(raw.MAILBOX, 1)


def test_a_closed_partner_is_gone_and_says_so():
    partner = raw.Partner()
    pid = partner.pid
    partner.close()
    partner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ClosedError):
        partner.arm(raw.MAILBOX, 1)


@pytest.mark.skipif(not TWO_CORES, reason="a partner on a core of its own needs two cores")
def test_a_partner_runs_on_the_core_it_was_given():
    core = max(os.sched_getaffinity(0))
    with raw.Partner(cpu=core) as partner:
        assert os.sched_getaffinity(partner.pid) == {core}


def test_a_partner_ends_with_its_caller(wait_until):
    code = ("import os, sys\n"
            "from rfaas_mpi.bench import raw\n"
            "print(raw.Partner().pid, flush=True)\n"
            "os.kill(os.getpid(), 9)\n")
    # communicate() returns only once nobody holds the pipe: the partner must not.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)

    def gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(gone, f"the partner {pid} outlives its caller")


def test_the_local_kernel_is_the_one_the_partner_runs(partner):
    x, y = array("d", [1.5, -2.0, 0.25]), array("d", [0.0] * 3)
    raw.library().rfm_bench_local(x.buffer_info()[0], y.buffer_info()[0], 3)
    assert list(y) == [3.0, -4.0, 0.5]
