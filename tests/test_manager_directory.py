"""What a manager knows of agents: who, what time it is there, which keys they believe."""

from __future__ import annotations

import pytest

from rfaas_mpi.errors import ServiceError
from rfaas_mpi.manager import directory
from rfaas_mpi.manager.directory import UNPROVED_MAX, Directory, Registration

SECOND = 10**9


def one(incarnation: int, agent: str = "", node: str = "nid1") -> Registration:
    return Registration(node, agent or f"agent {incarnation}", incarnation, "boot", bytes(32), ("tcp://nid1:1",),
                        "nid1")


def numbers(of: Directory, node: str = "nid1") -> list[int]:
    return [registration.incarnation for registration in of.of_node(node)]


def test_an_agent_keeps_its_number_by_its_name_over_restarts_too():
    known = Directory()
    known.add(one(5, "a"))
    assert (known.known_as("nid1", "a"), known.known_as("nid1", "b"), known.known_as("nid2", "a")) == (5, None, None)
    assert Directory(known.of_node("nid1")).known_as("nid1", "a") == 5


def test_the_same_agent_again_with_other_addresses_replaces_what_it_said():
    known = Directory([one(5, "a")])
    known.add(Registration("nid1", "a", 5, "boot", bytes(32), ("tcp://nid1:2",), "nid1"))
    assert numbers(known) == [5] and known.get("nid1", 5).addresses == ("tcp://nid1:2",)


def test_an_agent_s_first_report_ends_what_was_known_of_those_before_it():
    known = Directory([one(3), one(5), one(8)])
    assert known.reported("nid1", 5, 100, 1.0)
    assert numbers(known) == [5, 8]
    assert not known.reported("nid1", 5, 200, 2.0)


def test_agents_that_never_report_are_forgotten_but_not_the_one_that_does():
    known = Directory([one(1)])
    known.reported("nid1", 1, 100, 1.0)
    for number in range(2, 50):
        known.add(one(number))
    assert numbers(known) == [1, *range(50 - UNPROVED_MAX, 50)]


def test_a_user_s_own_agents_have_a_limit_and_the_site_s_have_none(monkeypatch):
    monkeypatch.setattr(directory, "NODES_OF_A_USER_MAX", 2)
    known = Directory([one(1, node="a/7"), one(2, node="b/7"), one(3, node="c"), one(4, node="d")])
    known.check_room("a/7")
    known.check_room("e")
    known.check_room("e/8")
    with pytest.raises(ServiceError, match="uid 7 has agents on 2 nodes"):
        known.check_room("c/7")


def test_an_agent_s_clock_is_never_told_to_be_later_than_it_is():
    known = Directory([one(5)])
    assert known.clock_ns("nid1", 5, 10.0) is None
    known.reported("nid1", 5, 100 * SECOND, 10.0)
    assert known.clock_ns("nid1", 5, 10.0) == 100 * SECOND
    assert known.clock_ns("nid1", 5, 15.5) == int(105.5 * SECOND)
    assert known.clock_ns("nid1", 4, 15.5) is None


def test_an_agent_that_has_registered_only_does_not_hide_the_one_that_reports():
    known = Directory([one(5)])
    known.reported("nid1", 5, 100, 10.0)
    known.add(one(9))
    assert known.clock_ns("nid1", 5, 10.0) == 100


def test_a_key_counts_as_believed_once_the_agent_has_reported_after_it_was_said():
    known = Directory([one(5)])
    old, new = b"o" * 32, b"n" * 32
    known.reported("nid1", 5, 1, 1.0)
    assert known.say("nid1", 5, (old,)) == (old,) and known.believed("nid1") == ()
    known.reported("nid1", 5, 2, 2.0)
    assert known.say("nid1", 5, (old,)) == () and known.believed("nid1") == (old,)
    assert known.say("nid1", 5, (old, new)) == (old, new) and known.believed("nid1") == (old,)
    known.reported("nid1", 5, 3, 3.0)
    # An answer may be lost: as long as there are two, they are said each time.
    assert known.say("nid1", 5, (old, new)) == (old, new) and known.believed("nid1") == (old, new)
    assert known.say("nid1", 5, (new,)) == (new,)


def test_another_agent_believes_nothing_that_the_one_before_was_told():
    known = Directory([one(5), one(6)])
    known.reported("nid1", 5, 1, 1.0)
    known.say("nid1", 5, (b"k" * 32,))
    known.reported("nid1", 5, 2, 2.0)
    known.reported("nid1", 6, 1, 3.0)
    assert known.believed("nid1") == () and known.say("nid1", 6, (b"k" * 32,)) == (b"k" * 32,)
