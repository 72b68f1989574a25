"""`rfaas bench --transport verbs` measures over a device, and what it says is whole; no test here judges a time."""

from __future__ import annotations

import pytest


@pytest.fixture
def tiny(monkeypatch):
    """So little that it is no measurement."""
    from rfaas_mpi.bench import network
    from rfaas_mpi.bench.stage import Options

    for name, value in {"CYCLES": 8, "PIPELINED_BLOCK": 128, "STREAM_CYCLES": 2, "BLOCK_BYTES": 1 << 20}.items():
        monkeypatch.setattr(network, name, value)
    return Options(transport="verbs", runs=1, quick=True)


def is_whole(data: dict) -> bool:
    return all(data[name] == figure["p50"] > 0 and data[f"{name}_count"] == figure["count"] > 0
               for name, figure in data["figures"].items())


def test_latency_over_verbs_has_its_figures_beside_the_bare_ones(tiny, nodes):
    from rfaas_mpi.bench import suite

    data = suite.measure("latency", tiny)
    assert set(data["figures"]) == {
        "verbs_raw_us", "verbs_latency_us", "verbs_over_raw", "verbs_per_s", "verbs_pipelined_over_sequential",
        "verbs_raw_pipelined_over_sequential",
        "verbs_warm_raw_us", "verbs_warm_us", "verbs_warm_over_raw"}
    assert is_whole(data)
    assert data["verbs_aa"] == data["figures"]["verbs_over_raw"]["aa"]["p50"]


def test_the_bandwidth_over_verbs_is_that_of_the_worse_way(tiny, nodes):
    from rfaas_mpi.bench import network

    data = network.measure_network_payload(tiny, (1 << 18,))
    assert is_whole(data)
    ways = [data[f"verbs_{way}_over_raw_256KiB"] for way in ("up", "down")]
    assert data["verbs_bandwidth_over_raw_256KiB"] == min(ways) > 0
