"""How an agent begins in its directory, whoever has been there before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfaas_mpi.agent.server import LOG_BYTES, AgentServer
from rfaas_mpi.errors import ServiceError

LONG = b"x" * (LOG_BYTES + 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


class Bare(AgentServer):
    """Lends nothing: what a server does before anybody joins."""

    offer = session_over = let_go = release = fail = stopped = used = None


@contextlib.contextmanager
def begun(place: Path) -> Iterator[None]:
    with contextlib.closing(Bare(place, zygote_idle_s=1.0)) as server:
        server.begin()
        yield


def test_a_long_log_is_begun_anew_and_a_short_one_is_kept(place):
    (place / "log").write_bytes(LONG)
    with begun(place):
        assert (place / "log").read_bytes() == b""
    (place / "log").write_bytes(b"short")
    with begun(place):
        assert (place / "log").read_bytes() == b"short"


@pytest.mark.parametrize("lead", [os.symlink, os.link])
def test_the_file_that_another_name_leads_to_is_not_emptied(place, tmp_path, lead):
    (tmp_path / "others").write_bytes(LONG)
    lead(tmp_path / "others", place / "log")
    with begun(place):
        assert (tmp_path / "others").read_bytes() == LONG


def test_a_pipe_in_the_place_of_the_log_holds_nothing_up(place):
    os.mkfifo(place / "log")
    with begun(place):
        assert (place / "log").is_fifo()


def test_a_life_lock_that_is_somebody_elses_file_is_not_written(place, tmp_path):
    (tmp_path / "others").write_bytes(b"theirs")
    os.link(tmp_path / "others", place / "life.lock")
    with pytest.raises(ServiceError, match="another name"), begun(place):
        pass
    assert (tmp_path / "others").read_bytes() == b"theirs"
