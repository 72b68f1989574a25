"""The benchmarks over a network: bare processes that answer, figures with their names; no test here judges a time."""

from __future__ import annotations

import os
import signal

import pytest

from rfaas_mpi.bench import network, null, raw, suite
from rfaas_mpi.bench.bare import NULL_LIBRARY, BarePair, Exchange, VerbsPair
from rfaas_mpi.bench.stage import Options
from rfaas_mpi.errors import ClosedError, ConfigError

TINY = Options(transport="tcp", runs=1, quick=True)


# Verbs runs over a device that is none, where its headers are; tests/verbs measures over one.
KINDS = ["tcp", pytest.param("verbs", marks=pytest.mark.skipif(not NULL_LIBRARY.exists(), reason="no libibverbs-dev"))]


@pytest.fixture(scope="module", autouse=True)
def null_device(tmp_path_factory):
    """What its processes share; the library looks for it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RFM_NULL_DEVICE", str(tmp_path_factory.mktemp("null") / "device"))
        yield


def open_pair(kind: str, **arguments: object) -> BarePair:
    return BarePair(**arguments) if kind == "tcp" else VerbsPair(library=NULL_LIBRARY, **arguments)


@pytest.fixture(params=KINDS)
def pair(request):
    with open_pair(request.param, data_bytes=1 << 18) as pair:
        yield pair


# --- the bare processes ----------------------------------------------------------

@pytest.mark.parametrize("exchange", [
    Exchange(), Exchange(sleep=True), Exchange(up=100_000), Exchange(down=100_000), Exchange(up=8, down=1 << 18),
    Exchange(up=1 << 16, burst=7, places=4), Exchange(down=1 << 16, burst=64, places=3),
    Exchange(up=1 << 18, sleep=True),
    Exchange(up=8, down=8, burst=64, places=8, sleep=True),
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


@pytest.mark.parametrize("sleep", [False, True])
def test_a_partner_that_ends_in_the_middle_ends_the_wait(pair, sleep):
    pair.arm(Exchange(sleep=sleep), 10)
    pair.calls(1)
    os.kill(pair.pid, signal.SIGKILL)
    with pytest.raises(raw.BenchError, match="has ended"):
        pair.calls(9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_pair_says_so_and_leaves_no_process(kind):
    pair = open_pair(kind)
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
        "tcp_raw_pipelined_over_sequential",
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


@pytest.mark.skipif(not NULL_LIBRARY.exists(), reason="no libibverbs-dev")
def test_the_transport_itself_is_measured_over_a_device_that_is_none(monkeypatch):
    monkeypatch.setattr(null, "BLOCK", 500)
    data = suite.measure("latency", Options(transport="verbs", provider="null", runs=2, quick=True))
    assert set(data["figures"]) == {f"verbs_null{size}{what}_ns"
                                    for size in ("", "_1KiB") for what in ("", "_raw", "_over_raw")}
    assert is_whole(data)
    assert data["settings"]["provider"] == "null"
    assert data["figures"]["verbs_null_over_raw_ns"]["aa"]["count"] > 0


@pytest.mark.parametrize(("what", "transport"), [("latency", "tcp"), ("payload", "verbs"), ("all", "shm")])
def test_a_device_that_is_none_is_for_the_latency_of_verbs(what, transport):
    with pytest.raises(ConfigError, match="is for the latency of verbs"):
        suite.measure(what, Options(transport=transport, provider="null"))


@pytest.mark.skipif(not NULL_LIBRARY.exists(), reason="no libibverbs-dev")
def test_a_device_that_there_is_not_is_named():
    with pytest.raises(raw.BenchError, match="no RDMA device elsewhere7"):
        VerbsPair(device="elsewhere7", library=NULL_LIBRARY)


@pytest.mark.parametrize("what", ["throughput", "cold", "all"])
def test_what_is_measured_on_shared_memory_only_says_so(what):
    with pytest.raises(ConfigError, match="shared memory only"):
        suite.measure(what, TINY)
