"""Who calls a manager over a network, and who answers: real sockets, a real munged, and somebody in between."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from managed import GUARD_S, ME, Managed
from munged import Munged
from test_agent_link import KEY, Agent, report, starting
from test_agent_link import line as used_line

from rfaas_mpi import api, identity, munge
from rfaas_mpi.agent.link import LinkLost
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import AuthError, ConfigError, LeaseDenied, ServiceLost
from rfaas_mpi.identity import Challenges, Key, KeyRing, Munge, Prover, Unproved, meant_for
from rfaas_mpi.manager.callers import STRANGER_S, STRANGERS_MAX, Audit, Callers, Muffler, Strangers
from rfaas_mpi.munge import MungeError, Refusal
from rfaas_mpi.remote import make_key

MEANS = ("munge", "key")
# Proofs that somebody made wrong: 5 000 of each kind in `make soak`.
EXAMPLES = int(os.environ.get("RFAAS_SOAK_PROOFS", "150"))


def looks(secret: bytes) -> tuple[bytes, ...]:
    """How it might stand somewhere."""
    return secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)


# --- who is there -----------------------------------------------------------------

@pytest.fixture(scope="module")
def munged(wait_until) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rfaas-munge-") as top:
        Path(top).chmod(0o755)
        daemon = Munged(Path(top) / "a", secrets.token_bytes(128))
        wait_until(daemon.serves, "munged serves")
        yield daemon.socket
        daemon.close()


@dataclass
class Site:
    """A manager on a network that believes MUNGE and one key, and what its user needs to call it."""

    manager: Managed
    callers: Callers
    munged: str
    key: Path
    audit: Path
    clock: list[float]

    def settings(self, means: str, address: str = "", **more: object) -> Settings:
        how: dict[str, object] = ({"manager_key_file": str(self.key)} if means == "key"
                                  else {"munge_socket": self.munged})
        return Settings(**{"manager": address or self.manager.network, "auth": means, "manager_user": str(ME),
                           **how, **more})

    def client(self, means: str, address: str = "", **more: object) -> ManagerClient:
        return ManagerClient(self.settings(means, address, **more))

    def means(self, name: str) -> identity.Means:
        return Key(self.key.read_bytes()) if name == "key" else Munge(self.munged)

    @property
    def authority(self) -> str:
        return self.manager.network.partition("//")[2]

    def lends(self, cores: int = 4) -> None:
        """Its node lends so many cores, by the word of somebody on the Unix socket."""
        with ManagerClient(Settings(manager=self.manager.address)) as call:
            number = call.call("start_agent", starting()).incarnation
            call.call("report", report(number, cores=cores), node="nid1")

    def leases(self) -> tuple[api.LeaseView, ...]:
        with ManagerClient(Settings(manager=self.manager.address)) as call:
            return call.call("leases").leases


@contextlib.contextmanager
def site_at(where: Path, munged: str | None, names: tuple[str, ...] = (), key: Path | None = None, *,
            tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    clock = [0.0]
    where.mkdir(exist_ok=True)
    callers = Callers(keys={ME: key or where / "my.key"}, munge=munged, names=names, audit=where / "audit.log",
                      clock=lambda: time.monotonic() + clock[0])
    with Managed(where, callers=callers, tls=tls) as manager:
        yield Site(manager, callers, munged or "", key or where / "my.key", where / "audit.log", clock)


@pytest.fixture
def site(tmp_path, munged) -> Iterator[Site]:
    with site_at(tmp_path / "m", munged) as made:
        made.lends()
        yield made


@pytest.fixture(scope="module")
def lasting(tmp_path_factory, munged) -> Iterator[Site]:
    """For properties of which hypothesis tries many: none of them changes it."""
    with site_at(tmp_path_factory.mktemp("lasting") / "m", munged) as made:
        made.lends()
        yield made


def demand(workers: int = 1, request: int = 1, **more: object) -> api.AskLease:
    return api.AskLease("s", request, workers, workers, **more)


ASK = msgspec.json.encode(demand())


def exchange(authority: str, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, Any]:
    """One request as it is given: status, body, headers."""
    connection = http.client.HTTPConnection(authority, timeout=GUARD_S)
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers={"Content-Type": "application/json", **headers})
        with connection.getresponse() as response:
            return response.status, response.read(), response.headers


def challenge(authority: str) -> bytes:
    status, body, _ = exchange(authority, "GET", identity.CHALLENGE_PATH)
    assert status == 200
    return msgspec.json.decode(body, type=api.Challenge).challenge


def proof(site: Site, means: str, method: str = "POST", path: str = "/v1/leases", body: bytes = ASK,
          **changes: Any) -> identity.Asked:
    """A good proof of that request, but for the changes."""
    prover = Prover(changes.get("by", site.means(means)), changes.get("receiver", site.authority), ME,
                    seals=changes.get("seals", True))
    return prover.ask(method, path, body, changes.get("challenge") or challenge(site.authority))


def refused(site: Site, header: str | None, *, method: str = "POST", path: str = "/v1/leases",
            body: bytes = ASK, said: str = "") -> None:
    """This request gets 401 with that reason, and nothing for it."""
    before = site.leases()
    headers = {} if header is None else {"Authorization": header}
    status, answer, sent = exchange(site.authority, method, path, body, **headers)
    assert status == 401, answer
    problem = msgspec.json.decode(answer, type=api.Problem)
    assert said in problem.error and sent["WWW-Authenticate"] == "RFaaS"
    assert site.leases() == before


# --- what is right ----------------------------------------------------------------

@pytest.mark.parametrize("means", MEANS)
def test_who_proves_who_he_is_is_served_over_a_network(site, means):
    with site.client(means) as call:
        granted = call.call("ask", demand(2))
        [lease] = granted.leases
        assert len(lease.workers) == 2 and len(lease.secret) == 32
        [view] = call.call("leases").leases
        assert (view.id, view.uid) == (lease.id, ME)
        with pytest.raises(LeaseDenied, match="9 workers"):
            call.call("ask", demand(9, 2))
        assert call.call("release", lease=lease.id).done
        assert call.call("usage", by="uid").by == "uid"


@pytest.mark.parametrize("means", MEANS)
def test_nobody_on_the_way_learns_a_lease_s_secret_or_what_proves_anything(tmp_path, munged, means):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        site.lends()
        with site.client(means, f"http://{way.authority}") as call:
            [lease] = call.call("ask", demand()).leases
        seen = bytes(way.seen)
        assert b"/v1/leases" in seen
        for secret in (lease.secret, lease.grant, site.key.read_bytes()):
            assert not any(look in seen for look in looks(secret))


@pytest.mark.parametrize("means", MEANS)
def test_an_agent_s_line_works_over_a_network_and_nobody_reads_it(tmp_path, munged, wait_until, means):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        agent = line(site, means, f"http://{way.authority}")
        try:
            agent.hears(api.Admitted)
            with site.client(means) as call:
                [lease] = call.call("ask", demand(timeout_s=GUARD_S)).leases
                agent.live = (api.LiveLease(lease.id, lease.epoch, lease.workers),)
                agent.say()
                wait_until(lambda: call.call("leases").leases[0].state == "active", "the report arrives")
                call.call("revoke", api.RevokeLease(grace_s=3.0), lease=lease.id)
            wait_until(lambda: any(getattr(news, "stop", ()) for news in agent.heard), "the order arrives")
            assert b"channel" in way.seen
            assert b"clock_ns" not in way.seen and b"revoked" not in way.seen
        finally:
            agent.link.close()


def line(site: Site, means: str, address: str = "", **more: object) -> Agent:
    given = site.settings(means, address, **more)
    agent = Agent(given.manager, **{name: getattr(given, name) for name in (
        "auth", "manager_user", "manager_key_file", "munge_socket", "ca_file")})
    agent.link.start()
    return agent


# --- what is not ------------------------------------------------------------------

ENDPOINTS = [(route.method, route.path.replace("{node}", "nid1").replace("{lease}", "1").replace("{session}", "s"))
             for route in api.ROUTES] + [("GET", "/v1/agents/nid1/channel"), ("GET", "/metrics")]


@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_who_shows_nothing_or_junk_is_told_what_is_missing(lasting, method, path):
    refused(lasting, None, method=method, path=path, said="has to prove who he is, by munge or key")
    refused(lasting, "Basic cm9vdDpyb290", method=method, path=path, said="has to prove who he is")
    refused(lasting, "RFaaS !", method=method, path=path, said="can't be read")
    nothing = base64.urlsafe_b64encode(b"{}").decode()
    refused(lasting, f"RFaaS {nothing}", method=method, path=path, said="can't be read")
    refused(lasting, "RFaaS " + "A" * 8000, method=method, path=path, said="too long")


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_a_proof_is_good_once(lasting, means, method, path):
    body = ASK if (method, path) == ("POST", "/v1/leases") else b""
    header = proof(lasting, means, method, path, body).header
    status, _, _ = exchange(lasting.authority, method, path, body, Authorization=header)
    assert status != 401
    refused(lasting, header, method=method, path=path, body=body, said="this is a replay")


@pytest.mark.parametrize("means", MEANS)
def test_a_proof_for_one_manager_is_none_for_another(site, tmp_path, munged, means):
    # The same keys, the same munged; it even goes by the other's name.
    with site_at(tmp_path / "other", munged, key=site.key) as stranger:
        refused(stranger, proof(site, means).header, said=f"is for the manager '{site.authority}'")
        for asked in (challenge(site.authority), challenge(stranger.authority)):
            refused(stranger, proof(site, means, challenge=asked).header, said="is for the manager")
    with site_at(tmp_path / "alias", munged, names=(site.authority,), key=site.key) as stranger:
        refused(stranger, proof(site, means).header, said="not one of this manager's")


@pytest.mark.parametrize("means", MEANS)
def test_a_proof_of_before_a_restart_is_none_after_it(tmp_path, munged, means):
    names = ("manager.site:1",)
    with site_at(tmp_path / "m", munged, names=names) as site:
        kept = proof(site, means, receiver=names[0]).header
    with site_at(tmp_path / "m", munged, names=names) as site:
        refused(site, kept, said="made before it started")


@pytest.mark.parametrize("means", MEANS)
def test_a_proof_is_for_one_request_only(site, means):
    other = msgspec.json.encode(demand(2))
    refused(site, proof(site, means).header, body=other, said="something else")
    refused(site, proof(site, means).header, path="/v1/leases?x=1", said="something else")
    refused(site, proof(site, means, "GET", "/v1/leases", b"").header, method="POST", body=b"", said="something else")
    refused(site, proof(site, means, "GET", "/v1/events?after=1", b"").header, method="GET",
            path="/v1/events?after=0", body=b"", said="something else")
    refused(site, changed(proof(site, means).header, public=secrets.token_bytes(32)), said="something else")
    refused(site, changed(proof(site, means).header, challenge=challenge(site.authority)), said="something else")


def shown(header: str) -> dict[str, Any]:
    return json.loads(base64.urlsafe_b64decode(header.partition(" ")[2]))


def changed(header: str, **changes: bytes | str) -> str:
    fields = {**shown(header), **{name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
                                  for name, value in changes.items()}}
    return "RFaaS " + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


@pytest.mark.parametrize("means", MEANS)
def test_an_old_challenge_is_refused(site, means):
    header = proof(site, means).header
    site.clock[0] += identity.CHALLENGE_LIFE_S + 1
    refused(site, header, said="too old")


def test_an_old_credential_is_refused_and_the_clocks_are_named(site, wait_until):
    @dataclass(frozen=True)
    class Brief(Munge):
        def prove(self, role: bytes, covered: bytes, reader_uid: int) -> bytes:
            return munge.encode(role + covered, reader_uid=reader_uid, ttl_s=1, socket=self.socket)

    header = proof(site, "munge", by=Brief(site.munged)).header
    later = munge.encode(b"", ttl_s=1, socket=site.munged)

    def old() -> bool:
        with pytest.raises(MungeError) as error:
            munge.decode(later, socket=site.munged)
        return error.value.refusal is Refusal.EXPIRED

    munge.decode(later, socket=site.munged)
    wait_until(old, "a credential that was made after it is old")
    refused(site, header, said="xpired")


def test_a_credential_of_another_site_is_refused(site, tmp_path, wait_until):
    with tempfile.TemporaryDirectory(prefix="rfaas-munge-") as top:
        other = Munged(Path(top) / "b", secrets.token_bytes(128))
        try:
            wait_until(other.serves, "the other munged serves")
            refused(site, proof(site, "munge", by=Munge(other.socket)).header, said="MUNGE")
        finally:
            other.close()


def test_a_key_that_the_manager_does_not_hold_is_refused(site):
    refused(site, proof(site, "key", by=Key(secrets.token_bytes(32))).header, said="holds no key")
    stolen_name = changed(proof(site, "key", by=Key(secrets.token_bytes(32))).header,
                          key=site.means("key").key_name)
    refused(site, stolen_name, said="another key")


def test_who_takes_the_manager_for_another_user_is_told_which_one_it_is(site):
    with site.client("munge", manager_user="4711") as call:
        with pytest.raises(AuthError, match=f"MUNGE: .*RFAAS_MANAGER_USER={ME}"):
            call.call("leases")


def test_means_that_the_manager_does_not_take_are_refused(tmp_path, munged):
    with site_at(tmp_path / "m", None) as site:
        site.lends()
        with pytest.raises(AuthError, match="believes no proof by munge; set RFAAS_AUTH to key"):
            ManagerClient(Settings(manager=site.manager.network, munge_socket=munged)).call("leases")


@pytest.mark.parametrize("means", MEANS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_proof_with_a_bit_turned_or_an_end_missing_is_refused(lasting, means, data):
    header = proof(lasting, means).header
    raw = bytearray(base64.urlsafe_b64decode(header.partition(" ")[2]))
    if data.draw(st.booleans(), "cut"):
        del raw[data.draw(st.integers(0, len(raw) - 1), "to"):]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1), "at")] ^= 1 << data.draw(st.integers(0, 7), "bit")
    with contextlib.suppress(ValueError):
        # The last letter of a field's base64 may carry nothing.
        if identity._SHOWN.decode(bytes(raw)) == identity._SHOWN.decode(base64.urlsafe_b64decode(header[6:])):
            return
    refused(lasting, "RFaaS " + base64.urlsafe_b64encode(raw).decode())


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300))
def test_junk_is_refused(lasting, junk):
    refused(lasting, "RFaaS " + base64.urlsafe_b64encode(junk).decode())


@pytest.mark.skipif(ME != 0, reason="needs to become another user")
def test_another_user_s_credential_is_his_and_no_use_to_me(site):
    his = His(site.munged)
    with site.client("munge") as call:
        [lease] = call.call("ask", demand()).leases
    path = f"/v1/leases/{lease.id}"
    # His own request is his: what is mine isn't there.
    status, _, sent = exchange(site.authority, "DELETE", path,
                               Authorization=proof(site, "munge", "DELETE", path, b"", by=his).header)
    assert status == 404 and identity.ANSWER_HEADER in sent
    # A credential of mine that he got hold of is for what I asked.
    refused(site, proof(site, "munge", "GET", "/v1/leases", b"").header, method="DELETE", path=path, body=b"",
            said="something else")
    assert [one.state for one in site.leases()] == ["granted"]


@dataclass(frozen=True)
class His(Munge):
    """Credentials made by another user."""

    uid: int = 4711

    def prove(self, role: bytes, covered: bytes, reader_uid: int) -> bytes:
        return subprocess.run(["munge", f"--socket={self.socket}"], input=role + covered, user=self.uid,
                              group=self.uid, extra_groups=[], cwd="/", capture_output=True, check=True).stdout.strip()


def test_without_tls_an_answer_is_never_sent_unsealed(site):
    refused(site, proof(site, "key", seals=False).header, said="without TLS an answer is sealed")


def test_a_munged_that_hangs_holds_up_nobody_who_does_not_need_it(tmp_path, wait_until):
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rfaas-munge-")))
        daemon = Munged(top / "a", secrets.token_bytes(128))
        stack.callback(daemon.close)
        wait_until(daemon.serves, "munged serves")
        site = stack.enter_context(site_at(tmp_path / "m", daemon.socket))
        headers = [proof(site, "munge", "GET", "/v1/leases", b"").header for _ in range(6)]
        pool = stack.enter_context(ThreadPoolExecutor(len(headers)))
        daemon.signal(signal.SIGSTOP)
        waiting = [pool.submit(exchange, site.authority, "GET", "/v1/leases", Authorization=header)
                   for header in headers]
        with site.client("key") as call:
            assert call.call("leases").leases == ()
        assert site.leases() == ()
        assert not any(future.done() for future in waiting), "who needs it was answered, or given up, before"
        daemon.signal(signal.SIGCONT)
        assert all(future.result(GUARD_S)[0] in (200, 401) for future in waiting)


def test_a_caller_whose_node_is_gone_is_noticed(site):
    with socket.create_connection(("127.0.0.1", int(site.authority.rpartition(":")[2]))) as near:
        near.sendall(b"GET /v1/challenge HTTP/1.1\r\nHost: m\r\n\r\n")
        assert near.recv(1)
        options = site.manager.do(lambda server: [
            tuple(far.getsockopt(*option) for option in (
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))
            for handler in server._runner.server.connections
            if (far := handler.transport.get_extra_info("socket")).family == socket.AF_INET])
    assert options == [(1, 5, 15000)]


# --- who answers --------------------------------------------------------------------

class Between:
    """Somebody on the way, who sees all and changes what comes back."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.authority = f"127.0.0.1:{listener.getsockname()[1]}"
        self.seen = bytearray()
        self.change: Callable[[bytes], bytes] = bytes
        self._to: tuple[str, int] | None = None
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def to(self, authority: str) -> None:
        host, _, port = authority.rpartition(":")
        self._to = (host, int(port))
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._ends += [near, far]
                for a, b, change in ((near, far, False), (far, near, True)):
                    self._threads.append(threading.Thread(target=self._pump, args=(a, b, change)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, change: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                self.seen += data
                sink.sendall(self.change(data) if change else data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Every connection breaks."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._threads[0].ident is not None:
            self._threads[0].join(GUARD_S)
        self.cut()
        for thread in self._threads[1:]:
            thread.join(GUARD_S)
        for end in self._ends:
            end.close()


@contextlib.contextmanager
def between() -> Iterator[Between]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        way = Between(listener)
        try:
            yield way
        finally:
            way.close()


def sealed(data: bytes) -> bool:
    return identity.ANSWER_HEADER.encode() in data


def turned(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1:]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the body": lambda data: turned(data, len(data) - 20),
    "the body's end": lambda data: turned(data, len(data) - 1),
    "the status": lambda data: data.replace(b" 200 ", b" 404 ", 1),
    "the proof": lambda data: turned(data, data.index(identity.ANSWER_HEADER.encode()) + 60),
    "no proof": lambda data: data.replace(identity.ANSWER_HEADER.encode(), b"X-Something", 1),
    "another body": lambda data: data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + bytes(
        len(data.partition(b"\r\n\r\n")[2]))}


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("what", CHANGES)
def test_an_answer_that_was_changed_on_its_way_is_not_believed(tmp_path, munged, means, what):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        site.lends()
        with site.client(means, f"http://{way.authority}") as call:
            way.change = lambda data: CHANGES[what](data) if sealed(data) else data
            with pytest.raises(AuthError, match="doesn't prove that it is the manager"):
                call.call("ask", demand())
            way.change = bytes
            assert len(call.call("ask", demand()).leases) == 1, "the same request again gets its answer"


@pytest.mark.parametrize("means", MEANS)
def test_an_answer_to_another_request_is_not_believed(tmp_path, munged, means):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        kept: list[bytes] = []
        with site.client(means, f"http://{way.authority}") as call:
            def swap(data: bytes) -> bytes:
                if sealed(data):
                    kept.append(data)
                    return kept[0]
                return data
            way.change = swap
            assert call.call("leases").leases == ()
            with pytest.raises(AuthError, match="doesn't prove that it is the manager"):
                call.call("leases")


@pytest.mark.parametrize("means", MEANS)
def test_an_order_that_was_changed_on_its_way_is_not_obeyed(tmp_path, munged, wait_until, means):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        opened: list[bytes] = []

        def turn(data: bytes) -> bytes:
            if b"101 Switching" in data:
                opened.append(data)
                return data
            # What comes after the manager's first message.
            return turned(data, len(data) - 1) if opened and data[:1] == b"\x82" else data

        way.change = turn
        agent = line(site, means, f"http://{way.authority}")
        try:
            agent.hears(api.Admitted)
            assert "changed, left out or repeated" in agent.hears(LinkLost).reason
            assert not any(isinstance(news, api.Orders) for news in agent.heard)
            way.change = bytes
            agent.hears(api.Admitted)
            agent.link.used([used_line(1, 1)])
            agent.say()
            wait_until(lambda: agent.link.unwritten == 0, "a report is answered")
        finally:
            agent.link.close()


def test_an_agent_whose_key_is_gone_for_a_while_comes_back_with_it(tmp_path, munged, wait_until):
    with between() as way, site_at(tmp_path / "m", munged, (way.authority,)) as site:
        way.to(site.authority)
        agent = line(site, "key", f"http://{way.authority}")
        try:
            agent.hears(api.Admitted)
            away = site.key.rename(tmp_path / "away")
            before = agent.link._attempt
            way.cut()
            agent.hears(LinkLost)
            wait_until(lambda: agent.link._attempt >= before + 3, "it tries again")
            away.rename(site.key)
            agent.hears(api.Admitted)
        finally:
            agent.link.close()


class Fake:
    """Listens as a manager would, and answers everything with what it is given."""

    def __init__(self, answer: Callable[[str, str, bytes, str], tuple[int, dict[str, str], bytes]]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.authority = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as reader:
                    while request := reader.readline().split():
                        headers = http.client.parse_headers(reader)
                        body = reader.read(int(headers.get("Content-Length", "0")))
                        status, more, answer = self._answer(
                            request[0].decode(), request[1].decode(), body, headers.get("Authorization", ""))
                        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(answer)}",
                                 *(f"{name}: {value}" for name, value in more.items())]
                        connection.sendall("\r\n".join([*lines, "", ""]).encode() + answer)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(GUARD_S)
        self._listener.close()


CHALLENGE = msgspec.json.encode(api.Challenge(bytes(identity._CHALLENGE_BYTES), ("munge", "key")))
ANSWER = msgspec.json.encode(api.Leases(()))


def faking(means: identity.Means | None) -> Fake:
    """A manager that proves what it says by these means: by none, as one would who hopes that nobody looks."""
    def answer(method: str, path: str, body: bytes, header: str) -> tuple[int, dict[str, str], bytes]:
        if path == identity.CHALLENGE_PATH:
            return 200, {}, CHALLENGE
        if means is None:
            return 200, {}, ANSWER
        said = identity._SHOWN.decode(base64.urlsafe_b64decode(header.partition(" ")[2]))
        covered = identity._of_request(said.to, method, path, body, said.challenge, said.public)
        proved, sealed = identity.Caller(ME, "", means, covered, said.public).answer(200, ANSWER)
        return 200, {identity.ANSWER_HEADER: proved}, sealed
    return Fake(answer)


@pytest.mark.parametrize("means", MEANS)
def test_who_proves_nothing_is_no_manager(site, means):
    with faking(None) as fake, site.client(means, f"http://{fake.authority}") as call:
        with pytest.raises(AuthError, match="doesn't prove that it is the manager"):
            call.call("leases")


def test_who_holds_another_key_is_no_manager(site):
    with faking(Key(secrets.token_bytes(32))) as fake, site.client("key", f"http://{fake.authority}") as call:
        with pytest.raises(AuthError, match="doesn't prove that it is the manager"):
            call.call("leases")
    with faking(site.means("key")) as same, site.client("key", f"http://{same.authority}") as call:
        assert call.call("leases").leases == (), "the test's own fake is good but for its key"


@pytest.mark.skipif(ME != 0, reason="needs to become another user")
def test_a_manager_of_another_user_is_not_believed_unless_he_is_named(site):
    with faking(His(site.munged)) as fake:
        with site.client("munge", f"http://{fake.authority}") as call:
            with pytest.raises(AuthError, match="runs as uid 4711, the manager as uid 0; .*RFAAS_MANAGER_USER=4711"):
                call.call("leases")
        with site.client("munge", f"http://{fake.authority}", manager_user="4711") as call:
            assert call.call("leases").leases == ()


def test_a_proof_can_t_be_sent_back_as_an_answer(site):
    # Both cover different things, and say what they are for.
    asked = proof(site, "key")
    mirrored = identity._token(identity._Answered(
        base64.b64decode(shown(asked.header)["public"]), base64.b64decode(shown(asked.header)["proof"])))
    with pytest.raises(AuthError, match="doesn't prove"):
        asked.open(200, mirrored, b"")


# --- keys and settings ----------------------------------------------------------------

def test_a_key_file_that_others_could_read_is_refused_on_both_sides(site, tmp_path):
    site.key.chmod(0o640)
    with pytest.raises(AuthError, match="others may read"):
        site.client("key")
    with pytest.raises(AuthError, match="others may read"):
        Callers(keys={ME: site.key})


def test_a_key_stands_for_the_user_that_the_manager_says(tmp_path):
    his = tmp_path / "his.key"
    callers = Callers(keys={4711: his})
    with Managed(tmp_path, callers=callers) as manager:
        given = Settings(manager=manager.network, manager_key_file=str(his))
        with ManagerClient(given) as call, pytest.raises(AuthError, match="uid 4711 is none"):
            call.call("drain", api.DrainNodes())


def test_one_key_for_two_users_is_refused():
    with pytest.raises(AuthError, match="a key of his own"):
        KeyRing([(1, bytes(32)), (2, bytes(32))])


def test_key_without_a_file_is_an_error_that_names_the_setting():
    with pytest.raises(ConfigError, match="RFAAS_MANAGER_KEY_FILE"):
        ManagerClient(Settings(manager="http://h:1", auth="key"))


def test_a_manager_s_user_that_nobody_knows_is_named():
    with pytest.raises(ConfigError, match="knows no user 'nobody-of-that-name'"):
        ManagerClient(Settings(manager="http://h:1", manager_user="nobody-of-that-name"))


def test_a_network_door_needs_a_means_of_proof(tmp_path):
    with pytest.raises(ConfigError, match="nobody could prove there who he is"):
        with Managed(tmp_path, callers=Callers()):
            raise AssertionError("it listens")


def test_without_munged_the_error_asks_for_it(site, tmp_path):
    with ManagerClient(Settings(manager=site.manager.network, munge_socket=str(tmp_path / "none"))) as call:
        with pytest.raises(MungeError, match="is munged running here"):
            call.call("leases")


# --- TLS ------------------------------------------------------------------------------

def certificate(where: Path) -> ssl.SSLContext:
    """A certificate for 127.0.0.1, signed by itself, in cert.pem; the manager's side of it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "manager")])
    now = datetime.now(timezone.utc)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256()))
    (where / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (where / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(where / "cert.pem", where / "key.pem")
    return context


@pytest.fixture
def tls_site(tmp_path, munged) -> Iterator[Site]:
    with site_at(tmp_path / "m", munged, tls=certificate(tmp_path)) as made:
        made.lends()
        yield made


@pytest.mark.parametrize("means", MEANS)
def test_within_tls_callers_prove_who_they_are_and_the_certificate_who_answers(tls_site, tmp_path, means):
    assert tls_site.manager.network.startswith("https://")
    with tls_site.client(means, ca_file=str(tmp_path / "cert.pem")) as call:
        [lease] = call.call("ask", demand()).leases
        assert len(lease.secret) == 32 and call.call("release", lease=lease.id).done
    with tls_site.client(means) as call:
        with pytest.raises(AuthError, match="certificate .* is not believed: .*RFAAS_CA_FILE"):
            call.call("leases")


@pytest.mark.parametrize("means", MEANS)
def test_an_agent_s_line_works_within_tls(tls_site, tmp_path, means):
    agent = line(tls_site, means, ca_file=str(tmp_path / "cert.pem"))
    try:
        agent.hears(api.Admitted)
        agent.hears(api.Orders)
    finally:
        agent.link.close()
    stranger = line(tls_site, means)
    try:
        assert "ertificate" in stranger.hears(LinkLost).reason
    finally:
        stranger.link.close()


def test_a_manager_without_tls_is_not_called_as_one_with_it(site, tmp_path):
    certificate(tmp_path)
    address = site.manager.network.replace("http:", "https:")
    with site.client("key", address, ca_file=str(tmp_path / "cert.pem")) as call, pytest.raises(ServiceLost):
        call.call("leases")


def test_a_ca_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="RFAAS_CA_FILE"):
        ManagerClient(Settings(manager="https://h:1", ca_file=str(tmp_path / "none")))


# --- what is written down ---------------------------------------------------------------

def entries(site: Site) -> list[dict[str, Any]]:
    return [json.loads(text) for text in site.audit.read_text().splitlines()]


def test_each_change_that_is_asked_for_is_a_line_of_the_audit_log(site):
    with site.client("munge") as call:
        [lease] = call.call("ask", demand()).leases
        call.call("leases")
    with site.client("key") as call, pytest.raises(LeaseDenied):
        call.call("ask", demand(9, 2))
    with ManagerClient(Settings(manager=site.manager.address)) as call:
        call.call("release", lease=lease.id)
    started, asked, denied, released = entries(site)
    assert (started["what"], started["proved"], started["from"]) == ("start_agent", "peer", "unix")
    assert {name: asked[name] for name in ("uid", "proved", "from", "what", "status", "leases")} == {
        "uid": ME, "proved": "munge", "from": "127.0.0.1", "what": "ask", "status": 200,
        "leases": [[lease.id, lease.node]]}
    assert asked["asked"]["workers_max"] == 1
    assert denied["proved"] == f"key {site.means('key').key_name.hex()}" and denied["status"] == 409
    assert "9 workers" in denied["error"]
    assert (released["what"], released["path"], released["status"]) == ("release", f"/v1/leases/{lease.id}", 200)
    text = site.audit.read_bytes()
    for secret in (lease.secret, lease.grant, site.key.read_bytes(), KEY):
        assert not any(look in text for look in looks(secret))
    assert site.audit.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("body", [
    b'{"session": "' + b"x" * 3000 + b'\\u0000"', b'{"session": "\xff"}', b'{"deep": ' + b"[" * 200_000],
    ids=["half", "no UTF-8", "deep"])
def test_a_body_that_makes_no_sense_does_not_get_into_the_audit_log(site, body):
    asked = proof(site, "key", body=body)
    status, answer, sent = exchange(site.authority, "POST", "/v1/leases", body, Authorization=asked.header)
    assert status == 400 and b"error" in asked.open(status, sent[identity.ANSWER_HEADER], answer)
    assert entries(site)[-1]["asked"] == {"unreadable": len(body)}


def test_on_a_full_disk_the_audit_log_keeps_whole_lines_and_goes_on(tmp_path):
    audit = Audit(tmp_path / "audit.log")
    with contextlib.closing(audit):
        audit.write({"what": "first"})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (audit.path.stat().st_size + 5, hard))
        try:
            with pytest.raises(OSError):
                audit.write({"what": "second"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        audit.write({"what": "third"})
    audit.close()
    assert [json.loads(text)["what"] for text in audit.path.read_text().splitlines()] == ["first", "third"]


def test_refusals_are_counted_and_said_once_in_a_while(site, caplog):
    with caplog.at_level(logging.WARNING, "rfaas_mpi.manager.callers"):
        for _ in range(50):
            refused(site, None)
        refused(site, "RFaaS junk")
    assert site.callers.refused == {"nothing": 50, "unreadable": 1}
    said = [record for record in caplog.records if record.name == "rfaas_mpi.manager.callers"]
    assert len(said) == 2 and "127.0.0.1" in said[0].getMessage()


def test_who_says_nothing_is_shown_the_door_and_who_proved_himself_stays(site, wait_until):
    with contextlib.ExitStack() as stack:
        mute, fetching, proved = (http.client.HTTPConnection(site.authority, timeout=GUARD_S) for _ in range(3))
        for connection in (mute, fetching, proved):
            stack.callback(connection.close)
            connection.connect()
        header = proof(site, "key", "GET", "/v1/leases", b"").header
        for connection, path, headers in ((fetching, identity.CHALLENGE_PATH, {}),
                                          (proved, "/v1/leases", {"Authorization": header})):
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                assert response.status == 200 and response.read()
        wait_until(lambda: len(site.callers._strangers._since) >= 2, "both have been seen")
        site.clock[0] += STRANGER_S
        assert mute.sock.recv(1) == b"" and fetching.sock.recv(1) == b""
        header = proof(site, "key", "GET", "/v1/leases", b"").header
        proved.request("GET", "/v1/leases", headers={"Authorization": header})
        with proved.getresponse() as response:
            assert response.status == 200 and response.read()
    assert site.callers.refused["stranger"] == 2


# --- pure -------------------------------------------------------------------------------

def test_strangers_have_their_time_and_too_many_push_the_oldest_out():
    strangers = Strangers()
    assert strangers.to_end(["a", "b"], 0.0) == []
    strangers.knows("b")
    assert strangers.to_end(["a", "b", "c"], 5.0) == []
    assert strangers.to_end(["a", "b", "c"], 10.0) == ["a"]
    assert strangers.to_end(["b", "c"], 14.9) == []
    assert strangers.to_end(["b", "c"], 15.0) == ["c"]
    assert strangers.to_end(["b"], 1000.0) == []
    many = [str(number) for number in range(STRANGERS_MAX)]
    assert strangers.to_end([*many, "b"], 1001.0) == []
    assert strangers.to_end([*many, "b", "x", "y"], 1002.0) == many[:2]
    assert strangers.to_end([], 1003.0) == []


def test_what_happens_often_is_said_once_in_a_while_with_its_count():
    muffler = Muffler(every_s=10)
    assert muffler.hear("a", 0) == 1
    assert [muffler.hear("a", 1) for _ in range(5)] == [None] * 5
    assert muffler.hear("b", 1) == 1
    assert muffler.hear("a", 10) == 6
    assert muffler.counts == {"a": 7, "b": 1}


def test_used_challenges_are_forgotten_once_they_are_too_old_anyway():
    challenges = Challenges(life_s=60)
    for second in range(600):
        challenges.spend(challenges.make(second), second)
    assert len(challenges) <= 63
    kept = challenges.make(600)
    challenges.spend(kept, 659)
    for now in (659, 660):
        with pytest.raises(Unproved, match="replay"):
            challenges.spend(kept, now)
    with pytest.raises(Unproved, match="too old"):
        challenges.spend(kept, 661)


@pytest.mark.parametrize("to, is_it", [
    ("10.0.0.1:8443", True), ("10.0.0.2:8443", False), ("10.0.0.1:8444", False), ("nid1:8443", True),
    ("nid1.cluster.site:8443", True), ("nid11:8443", False), ("rfaas.site:443", True), ("rfaas.site:8443", False),
    ("localhost:8443", False), ("nid1", False), ("", False), (":8443", False)])
def test_a_manager_knows_its_names(to, is_it):
    assert meant_for(to, {"rfaas.site:443"}, ("10.0.0.1", 8443), "nid1.cluster") is is_it


@pytest.mark.parametrize("to, here", [("localhost:1", "127.0.0.1"), ("[::1]:1", "::1"), ("[0:0::1]:1", "::1"),
                                      ("localhost:1", "::1"), ("[fe80::1%eth0]:1", "fe80::1%eth1")])
def test_addresses_are_the_same_however_they_are_written(to, here):
    assert meant_for(to, (), (here, 1), "nid1")
