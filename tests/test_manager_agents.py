"""Who is silent and who is dead: nobody early, nobody forgotten."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi import api
from rfaas_mpi.leases import NodeLost, NodeSilent
from rfaas_mpi.manager.agents import DEAD_AFTER_S, HEARTBEAT_S, SILENT_AFTER_S, Agents


def test_two_missed_heartbeats_are_no_silence_and_three_are():
    agents = Agents()
    agents.heard("n0", 0.0)
    assert agents.tick(3 * HEARTBEAT_S) == []
    assert agents.next_deadline() == SILENT_AFTER_S
    assert agents.tick(SILENT_AFTER_S) == [NodeSilent("n0")]
    assert agents.tick(SILENT_AFTER_S) == []


def test_a_silent_agent_is_dead_once_its_time_is_over():
    agents = Agents()
    agents.heard("n0", 0.0)
    agents.tick(SILENT_AFTER_S)
    assert agents.next_deadline() == DEAD_AFTER_S
    assert agents.tick(DEAD_AFTER_S) == [NodeLost("n0")]
    assert len(agents) == 0 and agents.next_deadline() is None and agents.age_s("n0", 400.0) is None


def test_after_a_long_pause_of_the_manager_nobody_is_dead_who_had_no_time_to_speak():
    agents = Agents()
    agents.heard("n0", 0.0)
    assert agents.tick(10_000.0) == [NodeSilent("n0")]
    assert agents.next_deadline() == 10_000.0 + SILENT_AFTER_S


def test_a_silent_agent_that_is_heard_of_again_is_neither():
    agents = Agents()
    agents.heard("n0", 0.0)
    agents.tick(SILENT_AFTER_S)
    agents.heard("n0", 100.0)
    assert agents.tick(DEAD_AFTER_S - 200.0) == [] and agents.age_s("n0", 101.0) == 1.0


def test_nodes_with_leases_have_their_time_when_a_manager_starts():
    agents = Agents()
    agents.expected(["n0", "n1"], 50.0)
    agents.heard("n1", 60.0)
    assert agents.tick(50.0 + SILENT_AFTER_S) == [NodeSilent("n0")]


def test_limits_out_of_order_are_refused():
    with pytest.raises(ValueError, match="0 < silent <= dead"):
        Agents(silent_after_s=10.0, dead_after_s=5.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 60.0)), max_size=60))
def test_each_silence_and_death_comes_in_its_time_and_once(sayings):
    """Against the plain definition: looked at after every step."""
    agents = Agents(silent_after_s=30.0, dead_after_s=80.0)
    heard: dict[str, float] = {}
    dead_at: dict[str, float] = {}
    now = 0.0
    for node, pause in sayings:
        now += pause
        for event in agents.tick(now):
            match event:
                case NodeSilent():
                    assert now - heard[event.node] >= 30.0 and event.node not in dead_at
                    dead_at[event.node] = max(heard[event.node] + 80.0, now + 30.0)
                case NodeLost():
                    assert now >= dead_at.pop(event.node)
                    del heard[event.node]
        assert all(now < dead_at.get(one, since + 30.0) for one, since in heard.items())
        agents.heard(node, now)
        heard[node] = now
        dead_at.pop(node, None)
    assert len(agents._due) <= 4 * len(heard) + 64


@pytest.mark.parametrize("address", ["unix:/tmp/my jobs;1/n1/socket", "tcp://10.0.0.1:4711", "tcp://[::1]:0"])
def test_agents_may_listen_at_any_path(address):
    assert msgspec.convert(address, api.Address) == address


@pytest.mark.parametrize("address", ["unix:/a\nb", "unix:relative", "tcp://a b:1", "tcp://a\n:1", "http://a:1"])
def test_what_is_no_address_of_an_agent_is_refused(address):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(address, api.Address)
