"""The benchmarks over a network: bare processes that answer, figures with their names; no test here judges a time."""

from __future__ import annotations

import os
import signal

import pytest

from rfaas_mpi.bench import network, raw, suite
from rfaas_mpi.bench.network import BarePair, Exchange
from rfaas_mpi.bench.stage import Options
from rfaas_mpi.errors import ClosedError, ConfigError

TINY = Options(transport="tcp", runs=1, quick=True)


@pytest.fixture
def pair():
    with BarePair(data_bytes=1 << 18) as pair:
        yield pair


# --- the bare processes ----------------------------------------------------------

@pytest.mark.parametrize("exchange", [
    Exchange(), Exchange(sleep=True), Exchange(up=100_000), Exchange(down=100_000), Exchange(up=8, down=1 << 18),
    Exchange(up=1 << 16, burst=7, places=4), Exchange(down=1 << 16, burst=64, places=3), Exchange(up=1 << 18, sleep=True),
], ids=str)
def test_a_bare_partner_answers_every_armed_call(pair, exchange):
    for _ in range(2):
        pair.arm(exchange, 20)
        assert pair.calls(12) > 0
        samples = pair.samples(8)
        assert len(samples) == 8 and min(samples) > 0


@pytest.mark.parametrize("exchange", [
    Exchange(up=1 << 20), Exchange(down=(1 << 18) + 1), Exchange(up=1 << 17, places=3), Exchange(burst=0),
    Exchange(burst=65), Exchange(places=0)], ids=str)
def test_an_exchange_that_does_not_fit_is_refused(pair, exchange):
    with pytest.raises(ValueError, match="out of range"):
        pair.arm(exchange, 1)


def test_more_calls_than_were_armed_are_refused(pair):
    pair.arm(Exchange(), 3)
    with pytest.raises(ValueError, match="out of range"):
        pair.calls(4)
    with pytest.raises(ValueError, match="out of range"):
        pair.arm(Exchange(), 1)
    assert pair.calls(3) > 0


def test_a_partner_that_ended_is_an_error_and_no_hang(pair):
    os.kill(pair.pid, signal.SIGKILL)
    with pytest.raises(raw.BenchError, match="has ended"):
        pair.arm(Exchange(), 10)
        pair.calls(10)


def test_a_closed_pair_says_so_and_leaves_no_process():
    pair = BarePair()
    pid = pair.pid
    pair.close()
    pair.close()
    with pytest.raises(ClosedError):
        pair.arm(Exchange(), 1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- the figures --------------------------------------------------------------------

def is_whole(data: dict) -> bool:
    """Each figure: a plain number, its p99 and count, and all of it below `figures`."""
    return all(data[name] == figure["p50"] and data[f"{name}_p99"] == figure["p99"]
               and data[f"{name}_count"] == figure["count"] > 0 for name, figure in data["figures"].items())


@pytest.fixture
def tiny(monkeypatch):
    """So little that it is no measurement."""
    monkeypatch.setattr(network, "CYCLES", 8)
    monkeypatch.setattr(network, "PIPELINED_BLOCK", 128)
    monkeypatch.setattr(network, "STREAM_CYCLES", 2)
    monkeypatch.setattr(network, "BLOCK_BYTES", 1 << 20)


def test_latency_over_tcp_has_its_figures_beside_the_bare_ones(tiny):
    data = suite.measure("latency", TINY)
    assert set(data["figures"]) == {
        "tcp_raw_us", "tcp_latency_us", "tcp_over_raw", "tcp_per_s", "tcp_pipelined_over_sequential",
        "tcp_warm_raw_us", "tcp_warm_us", "tcp_warm_over_raw"}
    assert is_whole(data)
    assert data["tcp_aa"] == data["figures"]["tcp_over_raw"]["aa"]["p50"]
    assert data["settings"]["transport"] == "tcp"
    assert data["pinning"]["rank_core"] not in data["pinning"]["worker_cores"]


def test_the_bandwidth_is_that_of_the_worse_way(tiny):
    data = network.measure_network_payload(TINY, (1 << 16, 1 << 20))
    assert is_whole(data)
    for size in ("64KiB", "1MiB"):
        ways = [data[f"tcp_{way}_over_raw_{size}"] for way in ("up", "down")]
        assert data[f"tcp_bandwidth_over_raw_{size}"] == min(ways) > 0
        assert all(data["figures"][f"tcp_{way}_over_raw_{size}"]["aa"]["count"] > 0 for way in ("up", "down"))


@pytest.mark.parametrize("what", ["throughput", "cold", "all"])
def test_what_is_measured_on_shared_memory_only_says_so(what):
    with pytest.raises(ConfigError, match="shared memory only"):
        suite.measure(what, TINY)
