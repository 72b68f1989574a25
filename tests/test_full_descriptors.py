"""A process whose descriptors are all in use lets those who dial wait, and doesn't turn in circles for them."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfaas_mpi.agent.door import Door, Guest
from rfaas_mpi.agent.scrape import ScrapeDoor
from rfaas_mpi.remote import Address
from rfaas_mpi.types import TcpOptions

GUARD_S = 60.0


class Host:
    """A service that knows of no lease: nobody here comes further than the door."""

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        return None

    def session_came(self, guest: Guest) -> None:
        raise AssertionError("nobody proved anything")

    def worker_came(self, guest: Guest, hello: object, connections: list[socket.socket]) -> None:
        raise AssertionError("nobody proved anything")

    def secret_for(self, lease: int, grant: bytes) -> bytes | None:
        return None

    def lease_came(self, guest: Guest, lease: int, grant: bytes) -> None:
        raise AssertionError("nobody proved anything")


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Every descriptor that this process may have is in use."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def turn(selector: selectors.BaseSelector, timeout_s: float = 0.0) -> int:
    """As an agent's loop has it; how many events there were."""
    events = selector.select(timeout_s)
    for key, mask in events:
        key.data(mask)
    return len(events)


def test_the_door_looks_away_for_a_moment_and_then_lets_them_in(selector, tmp_path):
    door = Door(selector, Host(), grants=True)
    door.listen_unix(tmp_path / "socket")
    with contextlib.closing(door), socket.socket(socket.AF_UNIX) as rank:
        rank.connect(str(tmp_path / "socket"))
        with none_left():
            assert turn(selector, GUARD_S) == 1
            assert turn(selector) == 0, "it is asked again at once"
        again = door.next_deadline()
        door.tick(again - 0.001)
        assert turn(selector) == 0
        door.tick(again)
        assert turn(selector, GUARD_S) == 1
        assert door.counts["accepted"] == 1


def test_all_listeners_of_a_door_wait_and_new_ones_with_them(selector, tmp_path):
    door = Door(selector, Host(), grants=True)
    door.listen_unix(tmp_path / "socket")
    door.listen_tcp([Address("127.0.0.1", 0)], b"", TcpOptions())
    there = door.addresses[0]
    with (contextlib.closing(door), socket.socket(socket.AF_UNIX) as rank,
          socket.create_connection((there.host, there.port), GUARD_S)):
        rank.connect(str(tmp_path / "socket"))
        with none_left():
            assert turn(selector, GUARD_S) >= 1
            assert turn(selector) == 0
        door.listen_tcp([Address("127.0.0.2", 0)], b"", TcpOptions())
        late = door.addresses[1]
        with socket.create_connection((late.host, late.port), GUARD_S):
            assert turn(selector) == 0
            door.tick(door.next_deadline())
            while door.counts["accepted"] < 3:
                assert turn(selector, GUARD_S), "somebody isn't let in"


def test_a_door_ends_while_it_looks_away(selector, tmp_path):
    door = Door(selector, Host())
    door.listen_unix(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(str(tmp_path / "socket"))
        with none_left():
            turn(selector, GUARD_S)
        door.close()
        door.close()
        assert door.next_deadline() is None and not selector.get_map()
        with pytest.raises(ConnectionResetError):
            rank.recv(1)


def test_who_reads_figures_waits_and_then_has_them(selector, tmp_path: Path):
    scrapes = ScrapeDoor(selector, lambda: b"figure 1\n", "text/plain")
    scrapes.listen(f"unix:{tmp_path / 'figures'}")
    with contextlib.closing(scrapes), socket.socket(socket.AF_UNIX) as reader:
        reader.settimeout(GUARD_S)
        reader.connect(str(tmp_path / "figures"))
        reader.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        with none_left():
            assert turn(selector, GUARD_S) == 1
            assert turn(selector) == 0, "it is asked again at once"
        again = scrapes.next_deadline()
        scrapes.tick(again - 0.001)
        assert turn(selector) == 0
        scrapes.tick(again)
        while turn(selector, GUARD_S) and scrapes.next_deadline() is not None:
            continue
        assert reader.recv(4096).endswith(b"figure 1\n")


def test_figures_end_while_nobody_is_looked_at(selector, tmp_path):
    scrapes = ScrapeDoor(selector, bytes, "text/plain")
    scrapes.listen(f"unix:{tmp_path / 'figures'}")
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(tmp_path / "figures"))
        with none_left():
            turn(selector, GUARD_S)
        scrapes.close()
        scrapes.close()
        assert scrapes.next_deadline() is None and not selector.get_map()
