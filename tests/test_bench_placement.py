"""The comparison of placement's policies: the same trace for all of them, and figures that follow from it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rfaas_mpi.bench.placement import SCENARIOS, Scenario, compare, main, measure_decisions, replay, tables, trace
from rfaas_mpi.placement import POLICIES, Settings

SMALL = Scenario("small", nodes=60, seconds=600.0, idle_nodes=10.0)
# A demand's half call and constants are all that a place costs: windows decide.
EVICTIONS = replace(SCENARIOS[2], nodes=200, seconds=1800.0, load=0.25)


def test_a_seed_gives_one_trace_and_another_seed_another():
    assert trace(SMALL, 3) == trace(SMALL, 3) != trace(SMALL, 4)


def test_a_trace_has_about_the_idle_nodes_that_were_asked_for():
    idle = []
    for seed in range(20):
        data = trace(SCENARIOS[0], seed)
        idle.append(sum(min(window.end, 3600.0) - max(window.begin, 0.0) for window in data.windows) / 3600.0)
    assert 0.7 * 30 < sum(idle) / len(idle) < 1.3 * 30


def test_no_node_is_in_two_windows_at_once():
    ends: dict[int, float] = {}
    for window in sorted(trace(SCENARIOS[0], 1).windows, key=lambda window: window.begin):
        assert ends.get(window.node, window.begin) <= window.begin < window.end
        ends[window.node] = window.end


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_replay_is_repeatable_and_its_shares_are_shares(policy):
    data = trace(SMALL, 1)
    one = replay(SMALL, data, policy, Settings())
    assert replay(SMALL, data, policy, Settings()) == one
    assert one["workers"] > 100
    assert all(0.0 <= one[share] <= 1.0 for share in ("granted", "evicted", "gave_up"))
    assert 0.0 <= one["wait_s"] <= SMALL.gives_up_s
    assert one["lost_s"] == pytest.approx(one["transfer_s"] + one["slowdown_s"] + one["redo_s"])


def test_where_windows_decide_the_default_has_fewer_evictions_than_chance_and_more_than_foreknowledge():
    settings = Settings(survival=EVICTIONS.windows, contention=0.0, memory_contention=0.0)

    def evicted(policy: str, clairvoyant: bool = False) -> float:
        return sum(replay(EVICTIONS, trace(EVICTIONS, seed), policy, settings, clairvoyant=clairvoyant)["evicted"]
                   for seed in range(3))

    assert evicted("default", clairvoyant=True) < evicted("default") < 0.8 * evicted("random")


def test_every_row_is_reported_with_its_interval_and_as_a_table():
    found = compare(SMALL, range(2))
    assert set(POLICIES) < set(found)
    assert all(set(figure) == {"mean", "half_95"} for figures in found.values() for figure in figures.values())
    text = tables({"comparison": {"small": {"rows": found}}, "decisions": {"nodes": 50, **measure_decisions(50, 3)}})
    assert text.count("\n| default") == 3 + 2 and "over 50 nodes" in text


def test_the_command_writes_what_it_prints_as_tables(tmp_path, capsys):
    file = tmp_path / "figures.json"
    main(["--seeds", "0", "--decisions", "2", "--nodes", "20", "--out", str(file)])
    data = json.loads(file.read_text())
    assert data["decisions"]["nodes"] == 20 and data["command"][-1] == str(file)
    assert capsys.readouterr().out == ""
    main(["--tables", str(file)])
    assert "over 20 nodes" in capsys.readouterr().out
