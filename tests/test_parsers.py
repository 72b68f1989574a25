"""What a peer may send is taken as it is meant, or refused with an error of ours: any bytes, cut anywhere.

The parsers of C have fuzz targets of their own (csrc/fuzz).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator

import msgspec
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from rfaas_mpi import messages as msg
from rfaas_mpi.agent import door
from rfaas_mpi.errors import ServiceError
from rfaas_mpi.remote import Address
from rfaas_mpi.sealing import Opener, Sealer
from rfaas_mpi.session import Session, service_directory
from rfaas_mpi.types import TcpOptions

GUARD_S = 60.0
SECRET, KEY = b"s" * 32, b"k" * 32
U16 = st.sampled_from((0, 1, 2, 3, 4, 0xFFFE, 0xFFFF)) | st.integers(0, 0xFFFF)
U32 = st.sampled_from((0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)) | st.integers(0, (1 << 32) - 1)
U64 = st.sampled_from((0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)) | st.integers(0, (1 << 64) - 1)
STATUSES = {msg.HELLO_OK, msg.HELLO_BAD_MAGIC, msg.HELLO_PROTOCOL, msg.HELLO_VERSION, msg.HELLO_REFUSED,
            msg.HELLO_UNKNOWN}


def cut(data: bytes, where: list[int]) -> Iterator[bytes]:
    """The same bytes in pieces."""
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in where)})
    for begin, end in zip(places, places[1:], strict=False):
        yield data[begin:end]


CUTS = st.lists(st.integers(0, 1 << 20), max_size=6)


# --- hellos and frames ------------------------------------------------------------------------

@given(st.binary(min_size=64, max_size=64))
def test_any_64_bytes_are_a_hello_with_a_status(data):
    hello = msg.Hello.unpack(data)
    assert hello.pack() == data
    assert hello.problem() in STATUSES


FRAMES = st.lists(st.tuples(U16, U16, U64, st.binary(max_size=200)), max_size=5)


@given(FRAMES, CUTS)
def test_frames_are_the_same_however_they_were_cut(frames, where):
    data = b"".join(msg.pack_frame(kind, body, descriptors=fds, cookie=cookie) for kind, fds, cookie, body in frames)
    reader = msg.FrameReader()
    got = [frame for piece in cut(data, where) for frame in reader.feed(piece)]
    assert [tuple(frame) for frame in got] == frames


@given(st.binary(max_size=400), CUTS)
def test_any_bytes_are_frames_or_an_error(data, where):
    def read(pieces: list[bytes]) -> tuple[list[msg.Frame], bool]:
        reader, frames = msg.FrameReader(), []
        try:
            for piece in pieces:
                for frame in reader.feed(piece):
                    frames.append(frame)
        except ServiceError:
            return frames, True
        return frames, False

    whole = read([data])
    assert read(list(cut(data, where))) == whole
    assert all(len(frame.body) <= msg.MAX_BODY for frame in whole[0])


# --- messages -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("t", "id", "lease", "cores", "x")),
                                                                inner, max_size=4), max_leaves=10)
TAGS = st.sampled_from(("join", "lease", "kill", "release", "status", "stay", "listen", "down", "welcome", "granted",
                        "denied", "failed", "done", "listening", "log", "ready", "ended", "lease_ended", "no such"))
FIELDS = st.sampled_from(("id", "pid", "executable", "flags", "path", "directory", "environment", "affinity", "lend",
                          "cores", "observer", "workers_min", "workers_max", "cores_per_worker", "timeout_s", "lease",
                          "worker", "reason", "invocation", "addresses", "key_file", "tcp", "leases", "lines"))
SOMETHING = JSON | st.sampled_from((-1, 0, 1 << 63, 1 << 64, 10**30, 1e308, "", "\0", [], [[]], {}))
MESSAGES = st.builds(lambda tag, fields: {"t": tag, **fields}, TAGS, st.dictionaries(FIELDS, SOMETHING, max_size=8))


def takes(body: bytes) -> None:
    for unpack in (msg.unpack_request, msg.unpack_to_rank):
        with contextlib.suppress(ServiceError):
            assert isinstance(unpack(body), msgspec.Struct)


@given(st.binary(max_size=200) | (JSON | MESSAGES).map(msgspec.json.encode))
def test_any_body_is_a_message_or_an_error_of_ours(body):
    takes(body)


@given(MESSAGES.map(msgspec.json.encode), st.integers(0), st.binary(max_size=3))
def test_a_message_that_was_changed_somewhere_is_one_or_an_error_of_ours(body, at, instead):
    at %= len(body)
    takes(body[:at] + instead + body[at + 1:])


@pytest.mark.parametrize("start", ['{"t":"status","id":1,"x":', '{"t":', '{"t":"log","lines":', '{"t":"status","data":'])
def test_a_body_that_never_ends_to_begin_is_an_error_of_ours(start):
    for again in ("[", '{"a":'):
        body = (start + again * 100_000).encode()
        with pytest.raises(ServiceError):
            msg.unpack_request(body)
        with pytest.raises(ServiceError):
            msg.unpack_to_rank(body)


# --- sealing ---------------------------------------------------------------------------------------

def records(texts: list[bytes], role: bytes = b"rank") -> list[bytes]:
    sealer = Sealer(KEY, role, (b"a" * 16, b"b" * 16))
    return [sealer.seal(text) for text in texts]


TEXTS = st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=5)


def opened(data: bytes, where: list[int]) -> tuple[bytes, bool]:
    """What came out, and whether it was refused then."""
    opener, came = Opener(KEY, b"rank", (b"a" * 16, b"b" * 16)), b""
    try:
        for piece in cut(data, where):
            came += opener.feed(piece)
    except ServiceError:
        return came, True
    return came, False


@given(TEXTS, CUTS, st.data())
def test_of_what_was_changed_on_its_way_only_what_came_before_is_believed(texts, where, data):
    sealed = records(texts)
    total, plain = b"".join(sealed), b"".join(texts)
    assert opened(total, where) == (plain, False)
    at = data.draw(st.integers(0, len(total) - 1), "at")
    how = data.draw(st.sampled_from(("flip", "cut", "insert", "repeat", "leave out", "of another")), "how")
    number = data.draw(st.integers(0, len(sealed) - 1), "record")
    match how:
        case "flip":
            bad = total[:at] + bytes((total[at] ^ data.draw(st.integers(1, 255)),)) + total[at + 1:]
        case "cut":
            bad = total[:at]
        case "insert":
            bad = total[:at] + data.draw(st.binary(min_size=1, max_size=40)) + total[at:]
        case "repeat":
            bad = b"".join([*sealed[:number + 1], *sealed[number:]])
        case "leave out":
            bad = b"".join(sealed[:number] + sealed[number + 1:])
        case _:
            bad = b"".join([*sealed[:number], records(texts, b"service")[number], *sealed[number + 1:]])
    came, _ = opened(bad, where)
    assert plain.startswith(came)
    # A piece that holds a good record and a bad one is refused whole.
    assert came != plain or bad.startswith(total)


# --- the door ----------------------------------------------------------------------------------------

class _Host:
    """A service with one lease of one worker."""

    def __init__(self) -> None:
        self.came: list[str] = []

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        return SECRET if (lease, worker) == (1, 1) else None

    def session_came(self, guest: door.Guest) -> None:
        guest.connection.close()
        self.came.append("session")

    def worker_came(self, guest: door.Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        self.came.append("worker")


@pytest.fixture(scope="module")
def at_the_door():
    """A door on TCP, in this process, and a way to let it look at who is there."""
    selector, host = selectors.DefaultSelector(), _Host()
    mine = door.Door(selector, host)
    mine.listen_tcp([Address("127.0.0.1", 0)], KEY, TcpOptions())
    try:
        yield mine, host, selector
    finally:
        mine.close()
        selector.close()


HELLOS = st.builds(
    msg.Hello, magic=st.just(msg.MAGIC) | st.binary(min_size=8, max_size=8), protocol=st.just(msg.PROTOCOL) | U16,
    kind=st.sampled_from((1, 2, 3)) | U16, version=st.just(msg.version_number()) | U32, lease=st.just(1) | U64,
    worker=st.just(1) | U32, status=st.sampled_from((0, -1, (1 << 31) - 1)), nonce=st.binary(min_size=16, max_size=16),
    session=U64, data=st.sampled_from((0, 1, 2)) | U64)
# What comes behind the hello: a right proof, one of another kind, another's, or none.
PROOFS = st.sampled_from(("right", "key", "secret", "role", "nonce", "garbage", "half", "none"))


@settings(deadline=None, max_examples=200)
@given(hello=HELLOS, proof=PROOFS, length=st.just(64) | st.integers(0, 64), behind=st.binary(max_size=80), where=CUTS)
def test_only_who_proves_to_know_is_let_in_whatever_else_it_says(at_the_door, hello, proof, length, behind, where):
    mine, host, selector = at_the_door

    def turn() -> None:
        for key, mask in selector.select(0):
            key.data(mask)

    def hear(connection: socket.socket, size: int) -> bytes:
        """So many bytes of it, less if it is closed; the door looks meanwhile."""
        heard = b""
        while len(heard) < size:
            turn()
            with contextlib.suppress(BlockingIOError):
                try:
                    piece = connection.recv(size - len(heard))
                except ConnectionError:
                    piece = b""
                if not piece:
                    break
                heard += piece
        return heard

    def send(connection: socket.socket, data: bytes) -> None:
        for piece in cut(data, where):
            with contextlib.suppress(ConnectionError):
                connection.send(piece)
            turn()

    before, came = dict(mine.counts), len(host.came)
    with socket.create_connection((mine.addresses[0].host, mine.addresses[0].port), GUARD_S) as connection:
        connection.setblocking(False)
        turn()
        send(connection, hello.pack()[:length])
        answer = hear(connection, 64) if length == 64 else b""
        status = msg.Hello.unpack(answer).status if answer else None
        if status == msg.HELLO_OK:
            nonce = msg.Hello.unpack(answer).nonce
            session = hello.kind == msg.KIND_SESSION
            role = msg.ROLE_SESSION_RANK if session else msg.ROLE_RANK
            secret = KEY if session else SECRET
            good = msg.proof(secret, role, hello.nonce, nonce, hello.lease, hello.worker)
            given_proof = {
                "right": good, "half": good[:17], "none": b"", "garbage": (behind + bytes(32))[:32],
                "key": msg.proof(SECRET if session else KEY, role, hello.nonce, nonce, hello.lease, hello.worker),
                "secret": msg.proof(secret[:-1] + b"\0", role, hello.nonce, nonce, hello.lease, hello.worker),
                "role": msg.proof(secret, msg.ROLE_DATA_RANK, hello.nonce, nonce, hello.lease, hello.worker),
                "nonce": msg.proof(secret, role, hello.nonce, hello.nonce, hello.lease, hello.worker)}[proof]
            send(connection, given_proof + behind)
            if len(given_proof) + len(behind) >= 32:
                said, _ = msg.PROOF_ANSWER.unpack(hear(connection, msg.PROOF_ANSWER.size))
                assert (said == msg.HELLO_OK) == (proof == "right")
        elif length == 64:
            assert status in STATUSES
    while mine.next_deadline() is not None:     # its end is seen, too
        turn()
    let_in = mine.counts["let_in"] - before["let_in"]
    assert len(host.came) - came == let_in
    assert let_in == 0 or (proof == "right" and status == msg.HELLO_OK)
    if proof == "right" and status == msg.HELLO_OK and hello.kind == msg.KIND_SESSION:
        assert host.came[-1] == "session"
    gone = sum(mine.counts[name] - before[name] for name in ("let_in", "refused", "broken"))
    assert gone == mine.counts["accepted"] - before["accepted"] == 1


# --- a service ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return tiny.make_view(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def service(view):
    """A session with a service of its own, that has to outlive everything that others say to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(view))
        with Session.open(tiny.settings()) as session:
            yield session


NUMBERS = st.sampled_from((-(1 << 63), -1, 0, 1, 2, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, 10**30))
SECONDS = st.sampled_from((-1e308, -1.0, 0.0, 1e-300, 1e10, 1e308))
REQUESTS = st.one_of(
    st.builds(dict, t=st.just("lease"), workers_min=NUMBERS, workers_max=NUMBERS, cores_per_worker=NUMBERS,
              memory_per_worker=st.none() | NUMBERS, timeout_s=SECONDS),
    st.builds(dict, t=st.just("kill"), lease=NUMBERS, worker=NUMBERS, reason=st.sampled_from(("", "cancel", "link")),
              invocation=NUMBERS),
    st.builds(dict, t=st.just("release"), lease=NUMBERS),
    st.builds(dict, t=st.just("listen"), addresses=st.lists(st.sampled_from(
        ("", "x", "tcp://", "tcp://h:0x", "[::1", "\0:1", "tcp://127.0.0.1:70000", "a" * 300 + ":1")), max_size=2),
        key_file=st.sampled_from(("", "AA==", "L25vbmUvc3VjaA==")), cores=st.lists(NUMBERS, max_size=2)),
    st.builds(dict, t=st.just("join"), pid=NUMBERS, executable=st.just(""), flags=st.just([]), path=st.just([]),
              directory=st.just(""), environment=st.just([["AA==", "AA=="]]), affinity=st.lists(NUMBERS, max_size=3),
              lend=st.sampled_from(("auto", "no", "perhaps")), cores=st.lists(NUMBERS, max_size=2),
              observer=st.just(True)))


# Bodies that are no requests, and that once were an end of the service.
BODIES = st.one_of(REQUESTS, REQUESTS, st.binary(max_size=40), st.sampled_from(
    (b'{"t":"status","id":1,"x":' + b"[" * 100_000, b'{"t":"status","id":1,"\xff":1}', b'{"t":"\xff"}')))


@settings(deadline=None, max_examples=80)
@given(asked=st.lists(BODIES, min_size=1, max_size=4), joined=st.booleans())
def test_a_service_outlives_whatever_its_sessions_ask_of_it(service, asked, joined):
    welcome = {"t": "join", "pid": 1, "executable": "", "flags": [], "path": [], "directory": "", "environment": [],
               "affinity": [], "observer": True}
    asked = [welcome, *asked] if joined else asked
    asked.append({"t": "status"})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(GUARD_S)
        connection.connect(str(service_directory(service.settings) / "socket"))
        connection.sendall(msg.Hello.make(msg.KIND_SESSION, bytes(16)).pack())
        assert len(connection.recv(64, socket.MSG_WAITALL)) == 64
        reader, answers = msg.FrameReader(), []
        with contextlib.suppress(ConnectionError):
            for number, request in enumerate(asked, 1):
                body = request if isinstance(request, bytes) else msgspec.json.encode({**request, "id": number})
                connection.sendall(msg.pack_frame(msg.FRAME_JSON, body))
            while len(asked) not in [answer.id for answer in answers]:
                data = connection.recv(1 << 16)
                if not data:
                    break
                answers += [msg.unpack_to_rank(frame.body) for frame in reader.feed(data)]
    assert all(isinstance(answer, msg.Answer) for answer in answers)
    assert service.status()["pid"] == service.service_pid
