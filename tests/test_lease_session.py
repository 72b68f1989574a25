"""A session that begins with a grant: who is let in by an agent's door, and who is not, from both ends."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import proxy

from rfaas_mpi import messages as msg
from rfaas_mpi import remote
from rfaas_mpi.agent import door
from rfaas_mpi.agent.door import Door, Guest
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import (
    AuthError,
    ConfigError,
    LeaseDenied,
    NestedError,
    ServiceError,
    ServiceLost,
    TransportError,
)
from rfaas_mpi.leases.grants import Admission, AgentClock, AgentKey, GrantBody, GrantRefused, GrantSigner, seal_secret
from rfaas_mpi.leases.types import GrantedWorker
from rfaas_mpi.remote import Address
from rfaas_mpi.sealing import Opener, Sealer
from rfaas_mpi.session import Session
from rfaas_mpi.types import TcpOptions

GUARD_S = 60.0
NODE, BOOT, LIFE = "n1", "2b1c7d", 77
MANAGER, OTHER_MANAGER = GrantSigner(b"m" * 32), GrantSigner(b"o" * 32)
REFUSED = msg.PROOF_ANSWER.pack(msg.HELLO_REFUSED, bytes(msg.PROOF_BYTES))
SETTINGS = Settings(start_timeout_s=GUARD_S)


def secret_of(lease: int) -> bytes:
    return bytes((lease % 256,)) * 32


class Host:
    """What of an agent concerns its door: believes grants, and answers join and use."""

    def __init__(self) -> None:
        self.key = AgentKey()
        self.admission = Admission(NODE, BOOT, LIFE, [MANAGER.public])
        self.begun: dict[int, bytes] = {}            # lease → its secret
        self.guests: list[Guest] = []
        self.selector = selectors.DefaultSelector()
        self.door = Door(self.selector, self, grants=True)

    def secret_for(self, lease: int, grant: bytes) -> bytes | None:
        if not grant:
            return self.begun.get(lease)
        body = self.admission.peek(grant)
        return self.key.open(body.sealed, lease, body.epoch)

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        return self.begun.get(lease) if worker == 1 else None

    def session_came(self, guest: Guest) -> None:
        self.guests.append(guest)
        guest.connection.close()

    def worker_came(self, guest: Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        self.guests.append(guest)
        connections[0].send(b"worker %d" % hello.worker)

    def lease_came(self, guest: Guest, lease: int, grant: bytes) -> None:
        self.guests.append(guest)
        sealer = Sealer(guest.secret, msg.ROLE_LEASE_AGENT, guest.nonces) if guest.remote else None
        opener = Opener(guest.secret, msg.ROLE_LEASE_RANK, guest.nonces) if guest.remote else None
        frames = msg.FrameReader()

        def end() -> None:
            self.selector.unregister(guest.connection)
            guest.connection.close()

        def hear(_mask: int) -> None:
            try:
                data = guest.connection.recv(1 << 16)
                for frame in frames.feed(opener.feed(data) if opener else data):
                    packed = msg.pack_message(self.answer(msg.unpack_request(frame.body), lease, grant))
                    guest.connection.send(sealer.seal(packed) if sealer else packed)
            except (OSError, ServiceError):
                data = b""
            if not data:
                end()

        self.selector.register(guest.connection, selectors.EVENT_READ, hear)

    def answer(self, request: msg.AnyRequest, lease: int, grant: bytes) -> msg.Answer:
        match request:
            case msg.Join():
                return msg.Welcome(request.id, session=len(self.guests), service_pid=os.getpid(), cores=(), spare=(),
                                   memory_bytes=0, transports=("tcp",), host=socket.gethostname(),
                                   listen=tuple(map(str, self.door.addresses)))
            case msg.Use():
                if lease not in self.begun:
                    try:
                        body = self.admission.admit(grant, time.monotonic_ns(), range(8), ())
                    except GrantRefused as error:
                        return msg.Denied(request.id, Exception.__str__(error), error.hint)
                    self.begun[lease] = self.key.open(body.sealed, lease, body.epoch)
                return msg.Granted(request.id, (msg.GrantLease(lease, lease, b"", (msg.WorkerInfo(1, (lease % 8,)),),
                                                               1 << 20),))
        return msg.Failed(request.id, "not here")

    def turn(self, timeout_s: float = 0.0) -> None:
        for key, mask in self.selector.select(timeout_s):
            key.data(mask)

    def close(self) -> None:
        self.door.close()
        for key in list(self.selector.get_map().values()):
            self.selector.unregister(key.fileobj)
            key.fileobj.close()
        self.selector.close()


@dataclass(frozen=True)
class Lent:
    """What a manager tells a rank."""

    id: int
    grant: bytes
    secret: bytes
    addresses: tuple[str, ...]
    host: str = field(default_factory=socket.gethostname)


@dataclass
class Agent:
    """A host whose door is open, on both sockets, and looked at by a thread."""

    host: Host
    path: Path
    address: Address
    leases: Iterator[int]

    @property
    def addresses(self) -> tuple[str, ...]:
        return f"unix:{self.path}", str(self.address)

    def grant(self, lease: int, *, signer: GrantSigner = MANAGER, key: bytes = b"", **changes: object) -> bytes:
        now = time.monotonic_ns()
        body = GrantBody(grant_id=lease, node=NODE, seen=AgentClock(BOOT, LIFE, now), not_after_ns=now + 10 * 10**9,
                         lease=lease, epoch=lease, uid=os.geteuid(), workers=(GrantedWorker(0, (lease % 8,)),),
                         memory_per_worker=1 << 20,
                         sealed=seal_secret(key or self.host.key.public, secret_of(lease), lease, lease))
        return signer.sign(msgspec.structs.replace(body, **changes))

    def lend(self, over: str = "both", **changes: object) -> Lent:
        """A lease that nobody has used, as its rank hears of it."""
        lease = next(self.leases)
        where = {"unix": self.addresses[:1], "tcp": self.addresses[1:], "both": self.addresses}[over]
        return Lent(lease, self.grant(lease, **changes), secret_of(lease), where)

    def knock(self) -> socket.socket:
        connection = socket.create_connection(self.address, GUARD_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(GUARD_S)
        return connection


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Agent]:
    host = Host()
    wake_r, wake_w = socket.socketpair()
    done = False

    def serve() -> None:
        while not done:
            host.turn(10.0)
            host.door.tick(time.monotonic())

    try:
        host.door.listen_unix(directory / "socket")
        host.door.listen_tcp([Address("127.0.0.1", 0)], b"", TcpOptions())
        host.selector.register(wake_r, selectors.EVENT_READ, lambda _m: wake_r.recv(1))
        thread = threading.Thread(target=serve, name="agent")
        thread.start()
        try:
            yield Agent(host, directory / "socket", host.door.addresses[0], iter(range(1, 1 << 20)))
        finally:
            done = True
            wake_w.send(b"x")
            thread.join(GUARD_S)
    finally:
        host.close()
        wake_w.close()


@pytest.fixture(scope="module")
def agent(tmp_path_factory) -> Iterator[Agent]:
    with running(tmp_path_factory.mktemp("agent")) as agent:
        yield agent


def opened(lent: Lent) -> Session:
    return Session.open_lease(lent, SETTINGS)


def changed(lent: Lent, **changes: object) -> Lent:
    return Lent(**{**{name: getattr(lent, name) for name in ("id", "grant", "secret", "addresses", "host")}, **changes})


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


# --- both ends ------------------------------------------------------------------------------------

@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_a_rank_with_its_grant_begins_its_lease(agent, over):
    lent = agent.lend(over)
    with opened(lent) as session:
        assert session.remote == (over == "tcp")
        lease = session.use()
        assert (lease.id, lease.epoch, lease.secret) == (lent.id, lent.id, lent.secret)
        assert lease.endpoint == (str(agent.address) if over == "tcp" else f"unix:{agent.path}")
        assert session.use() == lease, "asked again, it is the same lease"
        # The same secret leads to its workers.
        with socket.socket(fileno=session.dial(lease, 1)) as worker:
            worker.settimeout(GUARD_S)
            assert worker.recv(8, socket.MSG_WAITALL) == b"worker 1"
        with pytest.raises(TransportError, match="can't be reached"):
            session.dial(lease, 2)


@pytest.mark.parametrize("over", ["unix", "tcp"])
def test_another_process_of_the_user_joins_a_lease_that_has_begun_without_its_grant(agent, over):
    lent = agent.lend(over)
    with opened(lent) as first:
        mine = first.use()
        with opened(changed(lent, grant=b"")) as second:
            assert second.use() == mine


def test_nobody_joins_a_lease_that_has_not_begun(agent):
    with pytest.raises(AuthError, match="does not believe the grant"):
        opened(changed(agent.lend(), grant=b""))


def test_the_agent_says_why_a_grant_that_it_believes_can_not_be_used(agent):
    with opened(agent.lend(not_after_ns=time.monotonic_ns() - 10**9)) as session:
        with pytest.raises(LeaseDenied, match="s late"):
            session.use()
    with opened(agent.lend(workers=(GrantedWorker(0, (99,)),))) as session:
        with pytest.raises(LeaseDenied, match="core 99 of n1 is not spare"):
            session.use()


def test_an_agent_that_goes_before_it_says_welcome_is_an_error_that_names_it(agent, monkeypatch):
    def go(*_: object) -> msg.Answer:
        raise ServiceError("it ends")

    monkeypatch.setattr(agent.host, "answer", go)
    lent = agent.lend()
    with pytest.raises(ServiceError, match=f"agent of lease {lent.id} at .* said no more"):
        opened(lent)


def test_an_agent_that_can_not_start_the_rank_s_workers_says_why(agent, monkeypatch):
    monkeypatch.setattr(agent.host, "answer",
                        lambda request, *_: msg.Failed(request.id, "no such interpreter", "copy it"))
    lent = agent.lend()
    with pytest.raises(ServiceError, match="no such interpreter; copy it"):
        opened(lent)
    assert agent.host.guests[-1].hello.lease == lent.id and not agent.host.guests[-1].remote, "it is dialled once"


@pytest.mark.parametrize("ids", [(), (1 << 40,), (1, 2)])
def test_an_answer_that_is_about_another_lease_is_none(agent, monkeypatch, ids):
    with opened(agent.lend()) as session:
        leases = tuple(msg.GrantLease(number, 1, b"", (), 0) for number in ids)
        monkeypatch.setattr(agent.host, "answer", lambda request, *_: msg.Granted(request.id, leases))
        with pytest.raises(ServiceError, match="answered with leases"):
            session.use()


def test_no_lease_is_begun_inside_a_kernel(agent, monkeypatch):
    monkeypatch.setattr("rfaas_mpi.config.inside_worker", lambda: True)
    with pytest.raises(NestedError):
        opened(agent.lend())


def test_a_session_without_a_lease_has_nothing_to_use():
    here, there = socket.socketpair()
    with there, Session(here, Address("n1", 1), SETTINGS, None) as session:
        with pytest.raises(ConfigError, match="request one"):
            session.use()


def test_a_lease_s_session_says_whose_it_is_when_it_ends(agent):
    lent = agent.lend()
    with opened(lent) as session:
        session._connection.shutdown(socket.SHUT_RDWR)
        session._reader.join(GUARD_S)
        with pytest.raises(ServiceLost, match=f"agent of lease {lent.id} at .*ask for another lease"):
            session.use()


# --- which address ----------------------------------------------------------------------------------

def test_the_socket_of_this_node_comes_before_the_network(agent):
    lent = agent.lend()
    for addresses in (lent.addresses, lent.addresses[::-1]):
        with opened(changed(lent, addresses=addresses)) as session:
            assert not session.remote
    with opened(changed(lent, host="another-node")) as session:
        assert session.remote, "a socket of another node with the same path is not ours"


def test_an_agent_of_this_node_that_is_not_the_lease_s_is_passed_over(agent, tmp_path):
    with running(tmp_path) as other:
        lent = agent.lend("tcp")
        with opened(changed(lent, addresses=(f"unix:{other.path}", *lent.addresses))) as session:
            assert session.remote and session.use().id == lent.id
        assert other.host.door.counts["refused"] == 1


def test_an_address_where_nobody_answers_is_passed_over(agent, tmp_path):
    lent = agent.lend("tcp")
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    left_behind = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as once:
        once.bind(str(left_behind))
    with opened(changed(lent, addresses=(f"unix:{left_behind}", "unix:/no/such/socket", dead, *lent.addresses))) as s:
        assert s.use().id == lent.id
    with pytest.raises(ServiceError, match=f"lease {lent.id} can't be reached: .*{left_behind}.*refused.*{dead}"):
        opened(changed(lent, addresses=(f"unix:{left_behind}", dead)))


def test_one_that_never_answers_leaves_time_for_the_next(agent):
    lent = agent.lend("tcp")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with Session.open_lease(changed(lent, addresses=(address, *lent.addresses)),
                                Settings(start_timeout_s=4.0)) as session:
            assert session.use().id == lent.id


def test_a_lease_without_an_address_is_an_error_that_says_so(agent):
    with pytest.raises(ServiceError, match="told no address"):
        opened(changed(agent.lend(), addresses=()))


# --- who is not let in: the rank's view ---------------------------------------------------------------

@pytest.mark.parametrize("over", ["unix", "tcp"])
@pytest.mark.parametrize("what", ["another manager's", "for another agent", "of another lease", "another secret",
                                  "a bit turned", "cut short", "something behind it"])
def test_a_grant_that_is_not_good_here_is_refused(agent, over, what):
    lent = agent.lend(over)
    bad = {
        "another manager's": lambda: changed(lent, grant=agent.grant(lent.id, signer=OTHER_MANAGER)),
        "for another agent": lambda: changed(lent, grant=agent.grant(lent.id, key=AgentKey().public)),
        "of another lease": lambda: changed(lent, grant=agent.lend().grant),
        "another secret": lambda: changed(lent, secret=secret_of(lent.id + 1)),
        "a bit turned": lambda: changed(lent, grant=lent.grant[:200] + bytes((lent.grant[200] ^ 1,))
                                        + lent.grant[201:]),
        "cut short": lambda: changed(lent, grant=lent.grant[:-1]),
        "something behind it": lambda: changed(lent, grant=lent.grant + b"\0"),
    }[what]()
    with pytest.raises(AuthError, match=f"grant of lease {lent.id}.*ask for another lease"):
        opened(bad)
    with opened(lent) as session:
        assert session.use().id == lent.id, "and the right one is good for all that"


def test_a_secret_that_can_be_guessed_is_not_even_shown(agent):
    for lent in (changed(agent.lend(), secret=b""), changed(agent.lend(), grant=bytes(msg.GRANT_BYTES_MAX + 1))):
        with pytest.raises(AuthError, match="same version"):
            opened(lent)


@pytest.mark.parametrize("how", ["nothing", "zeros", "the rank's own", "of another kind"])
def test_who_listens_without_the_secret_is_found_out(agent, how):
    """It answers as the lease's agent would, but for the proof."""
    lent = agent.lend()
    with socket.create_server(("127.0.0.1", 0)) as fake:
        def serve() -> None:
            connection, _ = fake.accept()
            with connection:
                hello = msg.Hello.unpack(connection.recv(64, socket.MSG_WAITALL))
                nonce = os.urandom(16)
                connection.sendall(msg.Hello.make(hello.kind, nonce, lease=hello.lease).pack())
                said = connection.recv(4 + len(lent.grant) + 32, socket.MSG_WAITALL)
                proof = {"zeros": bytes(32), "the rank's own": said[-32:],
                         "of another kind": msg.proof(lent.secret, msg.ROLE_WORKER, hello.nonce, nonce, lent.id, 0)}
                if how != "nothing":
                    connection.sendall(msg.PROOF_ANSWER.pack(msg.HELLO_OK, proof[how]))
                    assert is_closed(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        at = f"tcp://127.0.0.1:{fake.getsockname()[1]}"
        why = "no answer" if how == "nothing" else "not the lease's agent"
        with pytest.raises((AuthError, ServiceError), match=why):
            opened(changed(lent, addresses=(at,)))
        thread.join(GUARD_S)
        assert not thread.is_alive()


def test_a_door_without_grants_takes_none(tmp_path):
    selector, host = selectors.DefaultSelector(), Host()
    plain = Door(selector, host)
    try:
        plain.listen_unix(tmp_path / "socket")
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / "socket"))
            connection.sendall(msg.Hello.make(msg.KIND_LEASE, bytes(16), lease=1).pack())
            for _ in range(2):
                for key, mask in selector.select(GUARD_S):
                    key.data(mask)
            assert msg.Hello.unpack(connection.recv(64)).status == msg.HELLO_REFUSED
            assert is_closed(connection)
    finally:
        plain.close()
        selector.close()
        host.close()


# --- what is seen on the way ----------------------------------------------------------------------------

def test_nothing_of_a_lease_s_session_can_be_read_on_its_way(agent, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery staple")
    lent = agent.lend("tcp")
    with proxy(agent.address) as (address, seen):
        with opened(changed(lent, addresses=(str(address),))) as session:
            session.use()
        assert lent.grant in seen, "that is no secret"
        assert lent.secret not in seen and b"horse" not in seen and b"PATH" not in seen


@pytest.mark.parametrize("behind", [0, 5, 40, 1000])
def test_a_bit_turned_on_the_way_ends_the_session_and_nothing_else(agent, behind):
    lent = agent.lend("tcp")
    proof_at = 64 + 4 + len(lent.grant)
    with proxy(agent.address, turn_bit_at=proof_at + behind) as (address, _):
        with pytest.raises((AuthError, ServiceError)):
            Session.open_lease(changed(lent, addresses=(str(address),)), SETTINGS)
    with opened(lent) as session:
        assert session.use().id == lent.id


def recorded_words(agent: Agent, lent: Lent) -> bytes:
    """All that a rank said in a good session."""
    with proxy(agent.address) as (address, seen):
        with opened(changed(lent, addresses=(str(address),))) as session:
            session.use()
        return bytes(seen)


def test_a_session_that_is_repeated_word_for_word_is_refused(agent):
    lent = agent.lend("tcp")
    recorded = recorded_words(agent, lent)
    came = len(agent.host.guests)
    with agent.knock() as connection:
        connection.sendall(recorded)
        assert msg.Hello.unpack(connection.recv(64, socket.MSG_WAITALL)).status == msg.HELLO_OK
        with contextlib.suppress(ConnectionError):
            assert connection.recv(len(REFUSED), socket.MSG_WAITALL) == REFUSED
        assert is_closed(connection)
    assert len(agent.host.guests) == came


# --- who is not let in: byte by byte -----------------------------------------------------------------------

class Rank:
    """A rank that does what it likes, step by step."""

    def __init__(self, connection: socket.socket, lease: int, **changes: object) -> None:
        self.connection = connection
        self.hello = msg.Hello.make(msg.KIND_LEASE, os.urandom(16), lease=lease)._replace(**changes)
        connection.sendall(self.hello.pack())
        self.answer = msg.Hello.unpack(connection.recv(64, socket.MSG_WAITALL))

    def proof(self, secret: bytes, grant: bytes, role: bytes | None = None) -> bytes:
        roles = msg.lease_roles(grant)
        return msg.proof(secret, roles[0] if role is None else role, self.hello.nonce, self.answer.nonce,
                         self.hello.lease, self.hello.worker)

    def show(self, grant: bytes, proof: bytes) -> bytes:
        """All that is answered to it before the connection is closed; nothing more where it isn't."""
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(msg.GRANT_LENGTH.pack(len(grant)) + grant + proof)
        return self.connection.recv(len(REFUSED), socket.MSG_WAITALL)


def test_every_refusal_looks_the_same(agent):
    """A stranger can't find out which leases there are, which grants are believed, or whether it was the proof."""
    lent, begun = agent.lend(), agent.lend()
    with opened(begun) as owner:
        owner.use()
        wrong = bytes(32)
        shown: list[tuple[int, bytes, bytes]] = [
            (lent.id, lent.grant, wrong),                                             # a good grant, no secret
            (lent.id, lent.grant[:-1], lent.secret),                                  # not whole
            (lent.id, agent.grant(lent.id, signer=OTHER_MANAGER), lent.secret),
            (lent.id, b"", lent.secret),                                              # not begun
            (begun.id, b"", wrong),                                                   # begun
            (1 << 60, b"", wrong),                                                    # never was
            (1 << 60, lent.grant, lent.secret),                                       # of another lease
            (0, b"x", wrong), ((1 << 64) - 1, bytes(msg.GRANT_BYTES_MAX), wrong)]
        for lease, grant, secret in shown:
            with agent.knock() as connection:
                rank = Rank(connection, lease)
                assert rank.answer.status == msg.HELLO_OK
                assert rank.show(grant, rank.proof(secret, grant)) == REFUSED
                assert is_closed(connection)


def test_a_proof_of_another_kind_or_grant_or_connection_is_none(agent):
    lent = agent.lend()
    with opened(lent) as owner, agent.knock() as elsewhere:
        owner.use()
        other = Rank(elsewhere, lent.id)
        proofs: list[Callable[[Rank], bytes]] = [
            lambda rank, role=role: rank.proof(lent.secret, lent.grant, role)
            for role in (msg.ROLE_RANK, msg.ROLE_SESSION_RANK, msg.ROLE_DATA_RANK, msg.ROLE_LEASE_RANK,
                         msg.lease_roles(lent.grant)[1])]
        proofs += [lambda rank: other.proof(lent.secret, lent.grant),                 # of another connection
                   lambda rank: rank.proof(lent.secret, b""),                         # for no grant
                   lambda rank: rank.proof(lent.secret, agent.grant(lent.id))]        # for one that was made anew
        for proof in proofs:
            with agent.knock() as connection:
                rank = Rank(connection, lent.id)
                assert rank.show(lent.grant, proof(rank)) == REFUSED
        # Somebody on the way who leaves the grant out, or puts in another one, is seen.
        for instead in (b"", agent.grant(lent.id)):
            with agent.knock() as connection:
                rank = Rank(connection, lent.id)
                assert rank.show(instead, rank.proof(lent.secret, lent.grant)) == REFUSED


@pytest.mark.parametrize("length", [msg.GRANT_BYTES_MAX + 1, 1 << 31, (1 << 32) - 1])
def test_of_a_grant_that_is_too_long_nothing_is_read(agent, length):
    with agent.knock() as connection:
        rank = Rank(connection, 1)
        connection.sendall(msg.GRANT_LENGTH.pack(length))
        assert connection.recv(len(REFUSED), socket.MSG_WAITALL) == REFUSED
        assert rank.answer.status == msg.HELLO_OK and is_closed(connection)


def test_a_session_that_is_cut_anywhere_before_its_proof_is_none(agent):
    lent = agent.lend()
    came = len(agent.host.guests)
    for cut in range(64 + 4 + len(lent.grant) + 32):
        with agent.knock() as connection:
            if cut < 64:
                connection.sendall(msg.Hello.make(msg.KIND_LEASE, bytes(16), lease=lent.id).pack()[:cut])
            else:
                rank = Rank(connection, lent.id)
                words = msg.GRANT_LENGTH.pack(len(lent.grant)) + lent.grant + rank.proof(lent.secret, lent.grant)
                connection.sendall(words[:cut - 64])
            connection.shutdown(socket.SHUT_WR)
            assert is_closed(connection), cut
    assert len(agent.host.guests) == came


@pytest.fixture(scope="module")
def stepwise() -> Iterator[tuple[Host, Agent]]:
    """An agent that is looked at by the test itself."""
    host = Host()
    host.door.listen_tcp([Address("127.0.0.1", 0)], b"", TcpOptions())
    try:
        yield host, Agent(host, Path("/nowhere"), host.door.addresses[0], iter(range(1, 1 << 20)))
    finally:
        host.close()


CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.just(0)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.integers(0, 255)),
    st.tuples(st.just("swap"), st.integers(0, 1 << 16), st.integers(0, 1 << 16)),
    st.tuples(st.just("none"), st.just(0), st.just(0)))


@settings(deadline=None, max_examples=300)
@given(change=CHANGES, pieces=st.lists(st.integers(0, 1 << 16), max_size=4))
def test_only_the_very_grant_of_the_manager_opens_a_session_however_it_comes(stepwise, change, pieces):
    """Even to who knows the secret and proves it for the grant that he shows."""
    host, agent = stepwise
    lent = agent.lend()
    how, at, what = change
    grant, at = lent.grant, at % len(lent.grant)
    match how:
        case "flip":
            grant = grant[:at] + bytes((grant[at] ^ what,)) + grant[at + 1:]
        case "cut":
            grant = grant[:at]
        case "insert":
            grant = grant[:at] + bytes((what,)) + grant[at:]
        case "swap":
            other = agent.lend().grant
            grant = grant[:at] + other[what % len(other):]
    with agent.knock() as connection:
        connection.setblocking(False)

        def hear(size: int) -> bytes:
            heard, deadline = b"", time.monotonic() + GUARD_S
            while len(heard) < size and time.monotonic() < deadline:
                host.turn()
                with contextlib.suppress(BlockingIOError):
                    piece = connection.recv(size - len(heard))
                    if not piece:
                        break
                    heard += piece
            return heard

        hello = msg.Hello.make(msg.KIND_LEASE, os.urandom(16), lease=lent.id)
        connection.sendall(hello.pack())
        nonce = msg.Hello.unpack(hear(64)).nonce
        ranks, agents = msg.lease_roles(grant)
        words = (msg.GRANT_LENGTH.pack(len(grant)) + grant
                 + msg.proof(lent.secret, ranks, hello.nonce, nonce, lent.id, 0))
        places = sorted({0, len(words), *(place % len(words) for place in pieces)})
        for begin, end in zip(places, places[1:], strict=False):
            connection.sendall(words[begin:end])
            host.turn()
        answer = hear(len(REFUSED))
        if grant == lent.grant:
            assert answer == msg.PROOF_ANSWER.pack(msg.HELLO_OK, msg.proof(lent.secret, agents, hello.nonce, nonce,
                                                                           lent.id, 0))
        else:
            assert answer == REFUSED
    while host.door.next_deadline() is not None:
        host.turn()


# --- strangers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said", [b"", b"\1\0", b"\1\1\0\0half", b"\0\0\0\0half a proof"])
def test_who_takes_too_long_with_its_grant_is_sent_away(monkeypatch, stepwise, wait_until, said):
    monkeypatch.setattr(door, "HELLO_S", 0.05)
    host, agent = stepwise
    late = host.door.counts["late"]
    with agent.knock() as connection:
        connection.sendall(msg.Hello.make(msg.KIND_LEASE, bytes(16), lease=1).pack() + said)

        def away() -> bool:
            host.turn(0.01)
            host.door.tick(time.monotonic())
            return host.door.counts["late"] == late + 1

        wait_until(away, "the guest is sent away")
        connection.recv(64, socket.MSG_WAITALL)
        assert is_closed(connection)


def test_a_door_full_of_half_grants_lets_a_rank_in(agent):
    before = agent.host.door.counts["crowded_out"]
    half = []
    try:
        for _ in range(door.REMOTE_MAX + 20):
            half.append(agent.knock())
            Rank(half[-1], 1)
            half[-1].sendall(msg.GRANT_LENGTH.pack(msg.GRANT_BYTES_MAX) + bytes(1000))
        with opened(agent.lend("tcp")) as session:
            assert session.use()
        assert agent.host.door.counts["crowded_out"] >= before + 20
    finally:
        for connection in half:
            connection.close()


def test_there_is_no_session_of_kind_1_over_tcp_without_a_shared_key(agent):
    with agent.knock() as connection:
        connection.sendall(msg.Hello.make(msg.KIND_SESSION, bytes(16)).pack())
        assert msg.Hello.unpack(connection.recv(64, socket.MSG_WAITALL)).status == msg.HELLO_REFUSED
        assert is_closed(connection)


# --- other users on this node --------------------------------------------------------------------------------

OTHER_UID = 61001
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def as_another_user(uid: int, act: Callable[[], object]) -> str:
    """What `act` gives in a process of that user, as text, or the error that it raised."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresuid(uid, uid, uid)
            os.write(tell, repr(act()).encode())
        except BaseException as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One in which every user of this node may make what he likes."""
    with tempfile.TemporaryDirectory(prefix="rfaas-test-", dir="/tmp") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@pytest.fixture
def open_agent(open_directory) -> Iterator[Agent]:
    """An agent whose socket every user of this node can reach."""
    with running(open_directory) as agent:
        yield agent


def knock_unix(path: Path, kind: int, lease: int, worker: int = 0) -> msg.Hello:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(GUARD_S)
        connection.connect(str(path))
        connection.sendall(msg.Hello.make(kind, bytes(16), lease=lease, worker=worker).pack())
        data = connection.recv(64, socket.MSG_WAITALL)
        return msg.Hello.unpack(data)


@as_root
def test_what_another_user_listens_at_is_no_agent(open_directory):
    """He could have the proof made by the real one, and stand in between."""
    path = open_directory / "socket"
    listening, listen = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(OTHER_UID, OTHER_UID, OTHER_UID)
        with socket.socket(socket.AF_UNIX) as fake:
            fake.bind(str(path))
            fake.listen()
            os.write(listen, b"x")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(listening, 1) == b"x"
        lent = Lent(1, b"", bytes(32), (f"unix:{path}",))
        with pytest.raises(AuthError, match=f"runs as uid {OTHER_UID}.*RFAAS_MANAGER_USER={OTHER_UID}"):
            opened(lent)
        here, there = socket.socketpair()
        with there, Session(here, Address("n1", 1), SETTINGS, None) as session:
            lease = msg.GrantLease(1, 1, bytes(32), (), 0, endpoint=f"unix:{path}")
            with pytest.raises(AuthError, match=f"runs as uid {OTHER_UID}"):
                session.dial(lease, 1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(listening)
        os.close(listen)


@as_root
def test_another_user_comes_with_a_grant_and_to_workers_but_has_no_session_of_the_agents_own(open_agent):
    lent = open_agent.lend("unix")

    def act() -> tuple[int, bytes, int]:
        with opened(lent) as session:
            lease = session.use()
            with socket.socket(fileno=session.dial(lease, 1)) as worker:
                said = worker.recv(8, socket.MSG_WAITALL)
            return lease.id, said, knock_unix(open_agent.path, msg.KIND_SESSION, 0).status

    assert as_another_user(OTHER_UID, act) == repr((lent.id, b"worker 1", msg.HELLO_REFUSED))
    assert {guest.uid for guest in open_agent.host.guests} == {OTHER_UID}


@as_root
def test_another_user_without_the_secret_is_let_in_nowhere(open_agent):
    lent = open_agent.lend("unix")
    with opened(lent) as session:
        lease = session.use()
        came = len(open_agent.host.guests)
        stolen = changed(lent, secret=bytes(32))
        assert as_another_user(OTHER_UID, lambda: opened(stolen)).startswith("AuthError")
        assert as_another_user(OTHER_UID, lambda: opened(changed(stolen, grant=b""))).startswith("AuthError")

        def dial() -> object:
            # A session of its own, and the lease of somebody else.
            mine = Session(socket.socketpair()[0], open_agent.path, SETTINGS, None)
            return mine.dial(msgspec.structs.replace(lease, secret=bytes(32)), 1)

        assert as_another_user(OTHER_UID, dial).startswith("AuthError")
        assert len(open_agent.host.guests) == came


@as_root
def test_a_user_who_fills_the_door_keeps_no_other_out(open_agent):
    many = door.OTHERS_MAX + 10
    silent = []

    def connected() -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(open_agent.path))
        silent.append(connection)

    def fill() -> int:
        for _ in range(many):
            connected()
        # The last one is looked at: so are all before it.
        return knock_unix(open_agent.path, msg.KIND_LEASE, 1).status

    # Who came before him, and is slow, stays too.
    slow = socket.socket(socket.AF_UNIX)
    slow.settimeout(GUARD_S)
    slow.connect(str(open_agent.path))
    held, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(OTHER_UID, OTHER_UID, OTHER_UID)
        os.write(hold, b"%d" % fill())
        os.close(hold)
        signal.pause()
        os._exit(0)
    try:
        os.close(hold)
        assert os.read(held, 8) == b"0"
        with slow:
            assert Rank(slow, 1).answer.status == msg.HELLO_OK
        assert open_agent.host.door.counts["crowded_out"] >= 10
        with opened(open_agent.lend("unix")) as session:
            assert session.use()
        assert open_agent.host.door.counts["accepted"] >= many
    finally:
        os.close(held)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_an_agent_s_socket_is_for_everybody(agent):
    assert agent.path.stat().st_mode & 0o777 == 0o666


# --- a lease's address -----------------------------------------------------------------------------------------

def test_a_lease_s_workers_are_dialled_where_its_endpoint_says(agent):
    """As they are by a process that only joined: it has the lease, and a session of another one."""
    mine, theirs = agent.lend("unix"), agent.lend("tcp")
    with opened(mine) as one, opened(theirs) as other:
        unix, tcp = one.use(), other.use()
        for session in (one, other):
            for lease, transport in ((unix, "shm"), (tcp, "verbs")):
                control, data = session.reach(lease, 1, transport)
                with socket.socket(fileno=control) as connection:
                    assert connection.family == (socket.AF_UNIX if transport == "shm" else socket.AF_INET)
                assert data == -1
        with pytest.raises(ConfigError, match="share no memory"):
            one.reach(tcp, 1, "shm")
        assert remote.local_address(one.listen[0]) == agent.address
