"""What an agent tells Prometheus: a real manager, a real agent, and figures that follow what happens to it."""

from __future__ import annotations

import contextlib
import http.client
import re
import selectors
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import GUARD_S, Cluster, Daemon, wait_until
from test_agent_daemon import Rank, all_free, lend

from rfaas_mpi import api
from rfaas_mpi import messages as msg
from rfaas_mpi.agent import scrape
from rfaas_mpi.agent.metrics import Metrics, Standing
from rfaas_mpi.errors import AuthError, ConfigError, LeaseDenied

ADMIN = Path(__file__).parent.parent / "docs" / "admin.md"


class Watched(Cluster):
    """One agent of two cores that tells its figures."""

    def __init__(self, metrics: str = "", **changes: str) -> None:
        super().__init__(["0-1"], sockets=[0], **changes)
        self.place = self.directory / "figures"
        words = ["agent", "--manager", f"unix:{self.socket}", "--node", "node0", "--cores", "0-1", "--directory",
                 self.directory / "node0", "--metrics", metrics or f"unix:{self.place}"]
        self.agents = [Daemon(self.directory / "node0.log", words, None, **self.environment)]

    def dial(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(GUARD_S)
        connection.connect(str(self.place))
        return connection

    def get(self, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
        with self.dial() as connection, contextlib.closing(http.client.HTTPConnection("agent")) as asked:
            asked.sock = connection
            asked.request(method, path)
            answer = asked.getresponse()
            return answer.status, answer.read().decode()

    def figures(self) -> dict[str, float]:
        status, text = self.get()
        assert status == 200
        return dict_of(text)


def dict_of(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in
            (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """For all tests, which look at differences."""
    with Watched() as cluster:
        yield cluster


def cores(watched: Watched) -> dict[str, float]:
    found = watched.figures()
    return {state: found[f'rfaas_agent_cores{{state="{state}"}}'] for state in ("lent", "free", "owned", "kept")}


# --- figures --------------------------------------------------------------------------------------

def reclaims(found: dict[str, float]) -> float:
    return sum(number for name, number in found.items() if name.startswith("rfaas_agent_reclaim_seconds_count"))


def test_figures_follow_a_lease_from_its_begin_to_the_cores_that_came_back(watched):
    before = watched.figures()
    assert cores(watched) | {"kept": 0} == {"lent": 0, "free": 2, "owned": 0, "kept": 0}
    lent = lend(watched)
    with Rank(watched, lent) as rank:
        rank.use()
        wait_until(lambda: watched.figures()['rfaas_agent_workers{state="serving"}'] == 1, "its worker serves")
        found = watched.figures()
        assert (cores(watched)["lent"], cores(watched)["free"]) == (1, 1)
        assert found['rfaas_agent_leases{state="active"}'] == 1
        assert found["rfaas_agent_forks_total"] == before["rfaas_agent_forks_total"] + 1
        assert found['rfaas_agent_zygotes{state="busy"}'] == 1
        watched.call("revoke", api.RevokeLease(grace_s=0.0), lease=lent.id)
        rank.hears(msg.LeaseEnded)
        all_free(watched)
    wait_until(lambda: watched.figures()['rfaas_agent_zygotes{state="idle"}'] == 1, "its worker is gone")
    found = watched.figures()
    assert cores(watched)["free"] == 2
    assert reclaims(found) == reclaims(before) + 1
    assert found['rfaas_agent_reclaim_seconds_count{cause="revoked",grace="no"}'] >= 1
    assert found['rfaas_agent_reclaim_seconds_sum{cause="revoked",grace="no"}'] > 0


def test_a_lease_that_its_rank_gives_back_is_no_reclaim(watched):
    before = reclaims(watched.figures())
    with Rank(watched, lend(watched)) as rank:
        rank.use()
        rank.session.release(rank.lent.id)
    all_free(watched)
    assert reclaims(watched.figures()) == before


def test_refused_grants_are_counted_by_why(watched):
    before = watched.figures()
    used, forged_, away = ('rfaas_agent_grants_refused_total{reason="used"}',
                           'rfaas_agent_grants_refused_total{reason="signature"}',
                           'rfaas_agent_connections_turned_away_total{reason="refused"}')
    lent = lend(watched)
    with Rank(watched, lent) as rank:
        rank.use()
    all_free(watched)
    with Rank(watched, lent) as rank, pytest.raises(LeaseDenied, match="used before"):
        rank.use()
    assert watched.figures()[used] == before.get(used, 0) + 1
    other = lend(watched)
    forged = bytearray(other.grant)
    forged[-1] ^= 1
    with pytest.raises((AuthError, LeaseDenied)):
        Rank(watched, api.LentLease(**{name: getattr(lent, name) for name in lent.__struct_fields__ if name != "grant"},
                                    grant=bytes(forged)))
    found = watched.figures()
    assert (found[forged_], found[away]) == (before.get(forged_, 0) + 1, before[away] + 1)
    # Else its core is held until its grant is late.
    watched.call("release", lease=other.id)
    all_free(watched)


def test_a_manager_that_is_gone_is_seen_and_so_is_its_return(watched):
    wait_until(lambda: "rfaas_agent_report_age_seconds" in watched.figures(), "a report was taken")
    assert watched.figures()["rfaas_agent_manager_connected"] == 1
    watched.manager.stop()
    wait_until(lambda: watched.figures()["rfaas_agent_manager_connected"] == 0, "the agent has lost it")
    before = watched.figures()["rfaas_agent_report_age_seconds"]
    assert watched.figures()["rfaas_agent_report_age_seconds"] > before
    watched.restart_manager()
    wait_until(lambda: watched.figures()["rfaas_agent_manager_connected"] == 1, "it has it back")


def test_figures_are_told_on_a_port_too():
    with Watched("127.0.0.1:0") as cluster:
        (url,) = re.findall(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", cluster.agents[0].said())
        with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert dict_of(answer.read().decode())['rfaas_agent_cores{state="free"}'] == 2


def test_an_address_that_is_taken_or_none_is_an_error_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as taken, selectors.DefaultSelector() as selector:
        port = taken.getsockname()[1]
        for where, why in ((f"127.0.0.1:{port}", f"127.0.0.1:{port}: Address already in use"),
                           ("unix:figures", "unix:figures is no address"), ("nowhere", "'nowhere' is no address"),
                           ("unix:/proc/figures", "unix:/proc/figures")):
            door = scrape.ScrapeDoor(selector, bytes, "text/plain")
            with pytest.raises(ConfigError, match=re.escape(why)):
                door.listen(where)
            door.close()


def test_what_an_administrator_is_told_to_watch_is_there(watched):
    """Each name in docs/admin.md is one that the agent or the manager tells."""
    lent = lend(watched)
    with Rank(watched, lent) as rank:
        rank.use()
        watched.call("revoke", api.RevokeLease(grace_s=0.0), lease=lent.id)
        rank.hears(msg.LeaseEnded)
    all_free(watched)
    with Rank(watched, lent) as rank, pytest.raises(LeaseDenied):
        rank.use()
    with socket.socket(socket.AF_UNIX) as connection, contextlib.closing(http.client.HTTPConnection("m")) as asked:
        connection.connect(str(watched.socket))
        asked.sock = connection
        asked.request("GET", "/metrics")
        told = {*watched.figures(), *dict_of(asked.getresponse().read().decode())}
    families = {name.partition("{")[0] for name in told}
    families |= {re.sub("_(bucket|sum|count)$", "", name) for name in families}
    named = set(re.findall(r"rfaas_(?:agent|manager)_[a-z_]+", ADMIN.read_text()))
    assert len(named) > 10
    assert named - families == set()


# --- who reads them ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/metrics?name=x", 200), ("GET", "/", 404), ("GET", "/metrics/x", 404), ("POST", "/metrics", 405)])
def test_there_is_nothing_but_the_figures(watched, method, path, status):
    assert watched.get(path, method)[0] == status


@pytest.mark.parametrize("said", [b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"\xff\x00\n\n", b"GET /" + b"x" * 9000])
def test_what_is_no_request_is_told_so_and_the_agent_goes_on(watched, said):
    with watched.dial() as connection:
        connection.sendall(said)
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 400 ")
    assert watched.get()[0] == 200


def test_who_says_nothing_is_sent_away_and_holds_nobody_up(watched):
    silent = [watched.dial() for _ in range(scrape.READERS_MAX + 1)]
    try:
        assert silent[0].recv(1) == b"", "one too many: the oldest has to go"
        assert watched.get()[0] == 200
        assert all(connection.recv(1) == b"" for connection in silent), "in time all of them have to"
    finally:
        for connection in silent:
            connection.close()


# --- counted ----------------------------------------------------------------------------------------

def test_a_reclaim_that_is_said_again_counts_once_and_from_its_first_time():
    metrics = Metrics(Standing)
    metrics.reclaim(7, 0, "revoked", 5.0, 100.0)
    metrics.reclaim(7, 0, "owner", 0.0, 101.0)
    metrics.freed(7, 0, 101.5)
    metrics.freed(7, 0, 102.0)
    metrics.freed(8, 0, 102.0)
    found = dict_of(metrics.text().decode())
    assert found['rfaas_agent_reclaim_seconds_sum{cause="revoked",grace="yes"}'] == 1.5
    assert sum(number for name, number in found.items() if "reclaim_seconds_count" in name) == 1
    assert "rfaas_agent_report_age_seconds" not in found
