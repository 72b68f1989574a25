"""A rank written from docs/wire.md alone: it leases a worker, attaches over tcp or verbs, and has kernels run.

    peer.py [--device NAME --gid-index N] PLACE CHECK ...

PLACE is a file: the fields of `Place` below, as JSON. Nothing of rfaas_mpi is imported here: what this agrees on
with a worker, it agrees on by the page. Each CHECK is a function below; `ok CHECK` is printed for each that held.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import pickle
import random
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG_GUARD_S = 150.0

# --- the page's numbers -----------------------------------------------------------------------------

HELLO = struct.Struct("<8sHHIQIi16s16s")
FRAME = struct.Struct("<IHHQ")
ATTACH = struct.Struct("<IIQQII")
ATTACHED = struct.Struct("<iIQ")
ARENA = struct.Struct("<IIQ")
ARENA_READY = struct.Struct("<Ii")
NUMBER = struct.Struct("<II")
KERNEL = struct.Struct("<II32sQ")
BIND = struct.Struct("<IIHHIQ")
ARG = struct.Struct("<BBHIQQ")
REQUEST = struct.Struct("<QIIQQ32s")
REPLY = struct.Struct("<QQQII32s")
DESC = struct.Struct("<IIQQ")
STREAM = struct.Struct("<IHHIIQQ")
TCP_PARCEL = struct.Struct("<II")
VERBS_PARCEL = struct.Struct("<HBBIII16sQQII")
VERBS_MEMORY = struct.Struct("<QQII")

SESSION, WORKER, DATA = 1, 2, 3
HELLO_VERSION, HELLO_UNKNOWN, HELLO_REFUSED = -3, -4, -6
CTL_ATTACH, CTL_ATTACHED, CTL_ARENA, CTL_ARENA_DROP, CTL_KERNEL, CTL_BIND, CTL_UNBIND, CTL_DISCARD = range(1, 9)
CTL_ARENA_READY, CTL_REFUSED = 10, 11
SESSION_JSON = 64
TCP, VERBS = 1, 2
PYTHON, NATIVE, PLAIN, OBJECT_KIND = 1, 2, 3, 5
INLINE, BOUND, CALL = 0, 1, 2
CANARY = 1
OBJECT, STAGED, FETCH = 1, 2, 4
KEPT, SIZES = 1, 2
ERR_INVALID, ERR_PROTOCOL = -1, -8
OK, KERNEL_FAILED, BAD_KERNEL, PROTOCOL_ERROR = 0, 1, 2, 4
STREAM_MAGIC, STREAM_REQUEST, STREAM_REPLY, STREAM_CRC = 0x544D4652, 1, 2, 1
LINE = 64
REDZONE = 64
CANARY_BYTES = 16
ROCE_V2 = 3


def sha256(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def align(at: int, to: int) -> int:
    return -(-at // to) * to


_CRC: list[int] = []


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit into a table, as RFC 3720 has it."""
    if not _CRC:
        for byte in range(256):
            for _ in range(8):
                byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
            _CRC.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


# --- connecting -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Where an agent listens, the file with its key, and what its workers are to look like."""

    host: str
    port: int
    key_file: str
    version: int                         # of the package, as in hellos
    package: str                         # the directory of rfaas_mpi
    library: str                         # with the native kernels
    executable: str
    path: list[str]

    @property
    def key(self) -> bytes:
        return Path(self.key_file).read_bytes()


class Refused(Exception):
    """The agent answered with a status other than 0."""

    def __init__(self, status: int, version: int = 0) -> None:
        super().__init__(f"refused: {status}")
        self.status = status
        self.version = version


def connect(place: Place) -> socket.socket:
    connection = socket.create_connection((place.host, place.port), HANG_GUARD_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes; ConnectionError if the other side ends before."""
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError(f"the connection ended after {len(data)} of {count} bytes")
        data += piece
    return bytes(data)


def is_over(connection: socket.socket) -> bool:
    """Waits for more, and says whether there is none."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def greet(connection: socket.socket, place: Place, kind: int, *, lease: int = 0, worker: int = 0,
          last: bytes = bytes(16), version: int | None = None) -> tuple[bytes, bytes]:
    """Both nonces, ours first. `last`: the 16 bytes that end the hello."""
    nonce = secrets.token_bytes(16)
    said = place.version if version is None else version
    connection.sendall(HELLO.pack(b"RFAASMPI", 1, kind, said, lease, worker, 0, nonce, last))
    magic, protocol, kind_there, theirs, lease_there, worker_there, status, answer, _ = HELLO.unpack(
        receive(connection, HELLO.size))
    assert (magic, protocol, kind_there, lease_there, worker_there) == (b"RFAASMPI", 1, kind, lease, worker)
    if status != 0:
        raise Refused(status, theirs)
    assert theirs == place.version
    return nonce, answer


def prove(connection: socket.socket, secret: bytes, roles: tuple[bytes, bytes], nonces: tuple[bytes, bytes],
          lease: int = 0, worker: int = 0) -> None:
    about = struct.pack("<QI", lease, worker)
    connection.sendall(sha256(secret, roles[0], *nonces, about))
    status, theirs = struct.unpack("<i32s", receive(connection, 36))
    if status != 0:
        assert theirs == bytes(32), "it proves something to who could not"
        raise Refused(status)
    assert hmac.compare_digest(theirs, sha256(secret, roles[1], *nonces, about)), "the agent does not know it"


# --- frames and sessions ------------------------------------------------------------------------------

class Records:
    """One direction of a session: cuts, enciphers and seals, or the other way round."""

    def __init__(self, key: bytes, role: bytes, nonces: tuple[bytes, bytes]) -> None:
        secret = sha256(key, b"seal ", role, *nonces)
        self._cipher, self._tag = sha256(secret, b"cipher"), sha256(secret, b"tag")
        self._n = 0

    def _mix(self, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._cipher + struct.pack("<Q", self._n)).digest(len(data))
        return bytes(a ^ b for a, b in zip(data, stream, strict=True))

    def _tag_of(self, sent: bytes) -> bytes:
        return sha256(self._tag, struct.pack("<QI", self._n, len(sent)), sent)[:16]

    def seal(self, data: bytes) -> bytes:
        records = b""
        for at in range(0, len(data), 1 << 20):
            sent = self._mix(data[at:at + (1 << 20)])
            records += struct.pack("<I", len(sent)) + sent + self._tag_of(sent)
            self._n += 1
        return records

    def open(self, connection: socket.socket) -> bytes:
        """What the next record carries."""
        (length,) = struct.unpack("<I", receive(connection, 4))
        assert 1 <= length <= 1 << 20
        sent, tag = receive(connection, length), receive(connection, 16)
        assert hmac.compare_digest(tag, self._tag_of(sent)), "a record that was changed"
        data = self._mix(sent)
        self._n += 1
        return data


def text64(text: str) -> str:
    """A byte string in JSON."""
    return base64.b64encode(os.fsencode(text)).decode()


@dataclass(frozen=True)
class Lease:
    number: int
    worker: int
    secret: bytes
    session: int


class Session:
    """What a rank says to an agent. close() gives all back."""

    def __init__(self, place: Place, key: bytes | None = None) -> None:
        self.place = place
        self._key = place.key if key is None else key
        self._ids = 0
        self._bytes = b""
        self._connection = connect(place)
        try:
            self._nonces = greet(self._connection, place, SESSION)
            prove(self._connection, self._key, (b"session rank", b"session service"), self._nonces)
            self._out = Records(self._key, b"session rank", self._nonces)
            self._in = Records(self._key, b"session service", self._nonces)
            welcome = self._ask(
                t="join", pid=os.getpid(), executable=text64(place.executable), flags=[],
                path=[text64(entry) for entry in place.path], directory=text64(os.getcwd()),
                environment=[[text64(name), text64(value)] for name, value in os.environ.items()],
                affinity=sorted(os.sched_getaffinity(0)), lend="auto", cores=[], observer=False,
                package=text64(place.package))
            assert welcome["t"] == "welcome", welcome
            self.number = welcome["session"]
            self.transports = welcome["transports"]
        except BaseException:
            self._connection.close()
            raise

    def _ask(self, **message: Any) -> dict[str, Any]:
        self._ids += 1
        body = json.dumps({"id": self._ids, **message}).encode()
        self._connection.sendall(self._out.seal(FRAME.pack(len(body), SESSION_JSON, 0, 0) + body))
        while True:
            answer = self._hear()
            if answer.get("id") == self._ids:
                return answer

    def _take(self, count: int) -> bytes:
        while len(self._bytes) < count:
            self._bytes += self._in.open(self._connection)
        taken, self._bytes = self._bytes[:count], self._bytes[count:]
        return taken

    def _hear(self) -> dict[str, Any]:
        length, kind, descriptors, _ = FRAME.unpack(self._take(FRAME.size))
        assert (kind, descriptors) == (SESSION_JSON, 0)
        return json.loads(self._take(length))

    def lease(self) -> Lease:
        """One worker."""
        answer = self._ask(t="lease", workers_min=1, workers_max=1, cores_per_worker=1, memory_per_worker=None,
                           timeout_s=HANG_GUARD_S)
        assert answer["t"] == "granted", answer
        (lease,) = answer["leases"]
        assert lease["secret"] == "", "a secret that travels"
        secret = sha256(self._key, b"lease", struct.pack("<QQ", lease["id"], lease["epoch"]), *self._nonces)
        return Lease(lease["id"], lease["workers"][0]["number"], secret, self.number)

    def release(self, lease: Lease) -> None:
        assert self._ask(t="release", lease=lease.number)["t"] == "done"

    def close(self) -> None:
        self._connection.close()


# --- a transport ----------------------------------------------------------------------------------------

@dataclass
class Region:
    """A piece of an arena."""

    arena: int
    offset: int
    size: int

    def desc(self, flags: int = 0) -> bytes:
        return DESC.pack(self.arena, flags, self.offset, self.size)


class Memory:
    """An arena of the tcp peer."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self.size
        self._bytes[offset:offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._bytes[offset:offset + size])


class Tcp:
    """Slots as messages on a data connection."""

    number = TCP

    def __init__(self, slots: int, slot_bytes: int, data: socket.socket, crc: bool = False) -> None:
        self._slots, self._slot_bytes, self._data, self.crc = slots, slot_bytes, data, crc
        self._flags = STREAM_CRC if crc else 0

    def parcel(self) -> bytes:
        return TCP_PARCEL.pack(self._flags, 0)

    def attached(self, parcel: bytes) -> None:
        assert parcel == TCP_PARCEL.pack(self._flags, 0)

    def arena(self, size: int) -> tuple[Memory, bytes]:
        return Memory(size), b""

    def arena_ready(self, number: int, memory: Memory, parcel: bytes) -> None:
        assert parcel == b""

    def request(self, slot: int, line: bytes, payload: bytes, inputs: Sequence[tuple[Region, Memory]], *,
                damage: bool = False) -> None:
        head = STREAM.pack(STREAM_MAGIC, STREAM_REQUEST, self._flags, slot, len(inputs), len(payload),
                           sum(region.size for region, _ in inputs))
        message = b"".join([head, line, *(region.desc() for region, _ in inputs), payload,
                            *(memory.read(region.offset, region.size) for region, memory in inputs)])
        if self.crc:
            message += struct.pack("<I", crc32c(message) ^ damage)
        self._data.sendall(message)

    def reply(self, slot: int, arenas: dict[int, Memory], granted: Sequence[Region]) -> tuple[bytes, bytes]:
        """Line and payload of the reply in this slot; its regions are in their arenas then."""
        message = receive(self._data, STREAM.size + LINE)
        magic, kind, flags, at, n, payload_bytes, region_bytes = STREAM.unpack_from(message)
        assert (magic, kind, flags, at) == (STREAM_MAGIC, STREAM_REPLY, self._flags, slot)
        line = message[STREAM.size:]
        descs = receive(self._data, n * DESC.size)
        payload = receive(self._data, payload_bytes)
        message += descs + payload
        total = 0
        assert n <= len(granted)
        for at, asked in zip(range(n), granted, strict=False):
            arena, _, offset, size = DESC.unpack_from(descs, at * DESC.size)
            assert (arena, offset) == (asked.arena, asked.offset) and size <= asked.size
            data = receive(self._data, size)
            arenas[arena].write(offset, data)
            message += data
            total += size
        assert total == region_bytes
        if flags & STREAM_CRC:
            assert struct.unpack("<I", receive(self._data, 4)) == (crc32c(message),)
        return line, payload

    def close(self) -> None:
        self._data.close()


class Verbs:
    """Slots as RDMA writes with immediate from a queue pair of our own."""

    number = VERBS

    def __init__(self, slots: int, slot_bytes: int, device: str, gid_index: int) -> None:
        import pyverbs.enums as e
        from pyverbs.cq import CQ
        from pyverbs.device import Context
        from pyverbs.mr import MR
        from pyverbs.pd import PD
        from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr

        self._e, self._new_memory = e, MR
        self._slots, self._stride, self._gid_index = slots, slot_bytes + 128, gid_index
        self._writable = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        self._context = Context(name=device)
        self._pd = PD(self._context)
        self._ring = MR(self._pd, slots * self._stride, self._writable)
        self._stage = MR(self._pd, slots * self._stride, e.IBV_ACCESS_LOCAL_WRITE)
        self._queue = CQ(self._context, 512)
        self._qp = QP(self._pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._queue, rcq=self._queue, cap=QPCap(
            max_send_wr=64, max_recv_wr=2 * slots)))
        self._psn = random.getrandbits(24)
        self._mirrors: dict[int, tuple[int, int]] = {}          # arena → address and key
        self._sent = 0
        self._arrived: list[tuple[int, int]] = []               # immediate, bytes
        self.attributes = QPAttr(port_num=1)
        self.attributes.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        self._qp.to_init(self.attributes)
        for _ in range(slots + slots // 2):
            self._post_receive()

    def _post_receive(self) -> None:
        from pyverbs.wr import SGE, RecvWR
        # It wants a place for data even where there will be none.
        self._qp.post_recv(RecvWR(num_sge=1, sg=[SGE(self._stage.buf, 1, self._stage.lkey)]))

    def parcel(self) -> bytes:
        gid = ipaddress.IPv6Address(str(self._context.query_gid(1, self._gid_index))).packed
        return VERBS_PARCEL.pack(1, ROCE_V2, self._context.query_port(1).active_mtu, self._qp.qp_num, self._psn, 0,
                                 gid, self._ring.buf, self._slots * self._stride, self._ring.rkey, 0)

    def attached(self, parcel: bytes) -> None:
        from pyverbs.addr import GID, AHAttr, GlobalRoute
        version, path, mtu, number, psn, _, gid, address, size, rkey, reserved = VERBS_PARCEL.unpack(parcel)
        assert (version, path, size, reserved) == (1, ROCE_V2, self._slots * self._stride, 0)
        assert address % 64 == 0 and 0 < number < 1 << 24 and psn < 1 << 24
        self._their_ring, self._their_key = address, rkey
        attributes = self.attributes
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = number, psn, self._psn
        attributes.path_mtu = min(mtu, self._context.query_port(1).active_mtu)
        attributes.min_rnr_timer = 12
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 16, 7, 0
        route = GlobalRoute(dgid=GID(ipaddress.IPv6Address(gid).exploded), sgid_index=self._gid_index)
        attributes.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
        self._qp.to_rts(attributes)

    def arena(self, size: int) -> tuple[VerbsMemory, bytes]:
        memory = VerbsMemory(self._new_memory(self._pd, size, self._writable), size)
        return memory, VERBS_MEMORY.pack(memory.mr.buf, size, memory.mr.rkey, 0)

    def arena_ready(self, number: int, memory: VerbsMemory, parcel: bytes) -> None:
        address, size, rkey, reserved = VERBS_MEMORY.unpack(parcel)
        assert (size, reserved) == (memory.size, 0) and address != 0
        self._mirrors[number] = address, rkey

    def _write(self, mr: Any, at: int, size: int, address: int, rkey: int, slot: int | None = None) -> None:
        from pyverbs.wr import SGE, SendWR
        e = self._e
        flags = e.IBV_SEND_SIGNALED
        if slot is None:
            wr = SendWR(opcode=e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[SGE(mr.buf + at, size, mr.lkey)], send_flags=flags)
        else:
            wr = SendWR(opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, sg=[SGE(mr.buf + at, size, mr.lkey)],
                        imm_data=socket.htonl(slot), send_flags=flags | e.IBV_SEND_SOLICITED)
        wr.set_wr_rdma(rkey, address)
        self._qp.post_send(wr)
        self._sent += 1

    def request(self, slot: int, line: bytes, payload: bytes, inputs: Sequence[tuple[Region, VerbsMemory]]) -> None:
        for region, memory in inputs:
            address, rkey = self._mirrors[region.arena]
            self._write(memory.mr, region.offset, region.size, address + region.offset, rkey)
        # A slot out of range is a lie that the immediate tells; the write itself stays in the ring.
        at = slot % self._slots * self._stride
        self._stage.write(line + payload, LINE + len(payload), at)
        self._write(self._stage, at, LINE + len(payload), self._their_ring + at, self._their_key, slot)

    def write_beyond(self, region: Region, memory: VerbsMemory) -> int:
        """Writes past the mirror's end; the status of the completion."""
        address, rkey = self._mirrors[region.arena]
        self._write(memory.mr, 0, 64, address + memory.size, rkey)
        return self.poll(lambda: False)

    def poll(self, done: Any) -> int:
        """Takes completions until `done()`, or one that failed: its status."""
        e = self._e
        deadline = time.monotonic() + HANG_GUARD_S
        while not done():
            assert time.monotonic() < deadline, "nothing came"
            count, completions = self._queue.poll(4)
            for completion in completions[:count]:
                if completion.status != e.IBV_WC_SUCCESS:
                    return completion.status
                if completion.opcode == e.IBV_WC_RECV_RDMA_WITH_IMM:
                    self._arrived.append((socket.ntohl(completion.imm_data), completion.byte_len))
                    self._post_receive()
                else:
                    self._sent -= 1
        return e.IBV_WC_SUCCESS

    def reply(self, slot: int, arenas: dict[int, Any], granted: Sequence[Region]) -> tuple[bytes, bytes]:
        assert self.poll(lambda: self._arrived and self._sent == 0) == self._e.IBV_WC_SUCCESS
        immediate, size = self._arrived.pop(0)
        assert immediate == slot and LINE <= size <= self._stride
        at = slot * self._stride
        return self._ring.read(LINE, at), self._ring.read(size - LINE, at + LINE) if size > LINE else b""

    def close(self) -> None:
        self._qp.close()
        self._context.close()       # and all that was made of it


class VerbsMemory:
    """An arena of the verbs peer: registered, so that results are written into it."""

    def __init__(self, mr: Any, size: int) -> None:
        self.mr, self.size = mr, size

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= self.size
        self.mr.write(data, len(data), offset)

    def read(self, offset: int, size: int) -> bytes:
        return self.mr.read(size, offset)


# --- a worker, as a rank sees it ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Arg:
    place: int
    size: int
    region: Region | None = None
    flags: int = 0


@dataclass(frozen=True)
class Binding:
    number: int
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]


@dataclass
class Reply:
    status: int
    flags: int
    out_bytes: int
    exec_ns: int
    outputs: list[bytes] = field(default_factory=list)
    payload: bytes = b""


def lay_out(args: Sequence[Arg], start: int, to: int = 0, behind: int = 0) -> tuple[list[int], int]:
    """Where each INLINE argument begins, and where the last one ends."""
    places, at = [], start
    for arg in args:
        if arg.place == INLINE:
            at = align(at, to or (16 if arg.size >= 16 else 8))
            places.append(at)
            at += arg.size + behind
    return places, at


class WorkerLink:
    """Control connection and transport. close() ends both."""

    def __init__(self, place: Place, lease: Lease, options: argparse.Namespace, *, slots: int = 4,
                 slot_bytes: int = 4096, crc: bool = False) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self.arenas: dict[int, Any] = {}
        self._frames = 0
        self._n = 0
        self._kernels = 0
        self._bindings = 0
        with contextlib.ExitStack() as undo:
            over_tcp = not options.device
            self.control, nonce = dial(place, lease, data=over_tcp)
            undo.callback(self.control.close)
            if over_tcp:
                data = dial_data(place, lease, nonce)
                undo.callback(data.close)
                self.link: Any = Tcp(slots, slot_bytes, data, crc)
            else:
                self.link = Verbs(slots, slot_bytes, options.device, options.gid_index)
            self.send(CTL_ATTACH, ATTACH.pack(slots, slot_bytes, 0, 0, self.link.number, 0) + self.link.parcel())
            body = self.expect(CTL_ATTACHED)
            status, _pid, reserved = ATTACHED.unpack_from(body)
            assert (status, reserved) == (0, 0), body[ATTACHED.size:]
            self.link.attached(body[ATTACHED.size:])
            undo.pop_all()

    def send(self, kind: int, body: bytes = b"", cookie: int = 0) -> None:
        self.control.sendall(FRAME.pack(len(body), kind, 0, cookie) + body)
        self._frames += 1

    def hear(self) -> tuple[int, bytes]:
        length, kind, descriptors, _ = FRAME.unpack(receive(self.control, FRAME.size))
        assert descriptors == 0
        return kind, receive(self.control, length)

    def expect(self, kind: int) -> bytes:
        heard, body = self.hear()
        assert heard == kind, (heard, body)
        return body

    def refusal(self) -> str:
        """The worker's last words."""
        text = self.expect(CTL_REFUSED).decode()
        assert is_over(self.control)
        return text

    def arena(self, number: int, size: int) -> Any:
        memory, parcel = self.link.arena(size)
        self.send(CTL_ARENA, ARENA.pack(number, 0, size) + parcel)
        body = self.expect(CTL_ARENA_READY)
        assert ARENA_READY.unpack_from(body) == (number, 0)
        self.link.arena_ready(number, memory, body[ARENA_READY.size:])
        self.arenas[number] = memory
        return memory

    def drop_arena(self, number: int) -> None:
        self.send(CTL_ARENA_DROP, NUMBER.pack(number, 0))
        del self.arenas[number]

    def kernel(self, kind: int, form: str, content: bytes, *, digest: bytes | None = None) -> int:
        blob = bytes((kind, ord(form))) + content
        number, self._kernels = self._kernels, self._kernels + 1
        self.send(CTL_KERNEL, KERNEL.pack(number, kind, digest or hashlib.sha256(blob).digest(), len(blob)) + blob)
        return number

    def native(self, library: str, symbol: str) -> int:
        head = json.dumps({"symbol": symbol, "file": library}).encode()
        return self.kernel(NATIVE, "L", struct.pack("<I", len(head)) + head + Path(library).read_bytes())

    def function(self, module: str, name: str, kind: int = PYTHON) -> int:
        return self.kernel(kind, "R", json.dumps({"module": module, "qualname": name}).encode())

    def bind(self, kernel: int, inputs: Sequence[Arg], outputs: Sequence[Arg], *, meta: bytes = b"",
             flags: int = 0) -> Binding:
        number, self._bindings = 1 << 16 | self._bindings, self._bindings + 1
        wire = b"".join(ARG.pack(arg.place, arg.flags, 0, arg.region.arena if arg.region else 0,
                                 arg.region.offset if arg.region else 0, arg.size) for arg in (*inputs, *outputs))
        self.send(CTL_BIND, BIND.pack(number, kernel, len(inputs), len(outputs), flags, len(meta)) + wire + meta)
        return Binding(number, tuple(inputs), tuple(outputs))

    def unbind(self, binding: Binding) -> None:
        self.send(CTL_UNBIND, NUMBER.pack(binding.number, 0))

    def post(self, binding: int, payload: bytes, flags: int = 0, pushed: Sequence[Region] = (), *,
             slot: int | None = None, **lies: Any) -> tuple[int, int]:
        """Slot and id of a request."""
        at, number = self._n % self.slots, self._n + 1
        self._n += 1
        in_line = payload if len(payload) <= 32 else b""
        line = REQUEST.pack(number, binding, flags | (self._frames & 0xFFFFFF) << 8, len(payload), 0, in_line)
        self.link.request(at if slot is None else slot, line, b"" if len(payload) <= 32 else payload,
                          [(region, self.arenas[region.arena]) for region in pushed], **lies)
        return at, number

    def take(self, posted: tuple[int, int], granted: Sequence[Region] = ()) -> tuple[Reply, bytes, bytes]:
        slot, number = posted
        line, behind = self.link.reply(slot, self.arenas, granted)
        answered, out_bytes, exec_ns, status, flags, payload = REPLY.unpack(line)
        assert answered == number
        return Reply(status, flags, out_bytes, exec_ns), payload, behind

    def call(self, binding: Binding, values: Sequence[bytes | Region], results: Sequence[Region | None] = ()) -> Reply:
        """Invokes it with a value for each input and a region for each CALL output."""
        given = [*values, *(results or [None] * len(binding.outputs))]
        args = [*binding.inputs, *binding.outputs]
        descs = b"".join(region.desc(arg.flags) for arg, region in zip(args, given, strict=True) if arg.place == CALL)
        places, end = lay_out(binding.inputs, len(descs))
        if end > 32:
            places, end = lay_out(binding.inputs, len(descs), 64)
        payload = bytearray(end)
        payload[:len(descs)] = descs
        inline = [value for arg, value in zip(binding.inputs, values, strict=True) if arg.place == INLINE]
        for at, value in zip(places, inline, strict=True):
            payload[at:at + len(value)] = value
        where = [arg.region if arg.place == BOUND else region for arg, region in zip(args, given, strict=True)]
        n = len(binding.inputs)
        granted = [region for arg, region in zip(binding.outputs, where[n:], strict=True) if arg.place != INLINE]
        pushed = [region for arg, region in zip(binding.inputs, where[:n], strict=True) if arg.place != INLINE]
        reply, line, behind = self.take(self.post(binding.number, bytes(payload), 0, pushed), granted)
        if reply.status != OK:
            reply.payload = self._bytes_of(reply, line, behind)
            return reply
        self._take_outputs(binding, reply, line, behind, where[n:])
        return reply

    def _take_outputs(self, binding: Binding, reply: Reply, line: bytes, behind: bytes,
                      where: Sequence[Region | None]) -> None:
        outputs = binding.outputs
        start = 8 * len(outputs) if len(outputs) > 1 else 0
        places, end = lay_out(outputs, start)
        in_line = end <= 32 and len(places) <= 1
        if not in_line:
            places, end = lay_out(outputs, start, 64, CANARY_BYTES)
        assert len(behind) == (0 if in_line else end)
        payload = line if in_line else behind
        sizes = [reply.out_bytes]
        assert bool(reply.flags & SIZES) == (len(outputs) > 1)
        if reply.flags & SIZES:
            sizes = list(struct.unpack_from(f"<{len(outputs)}Q", payload))
            assert sizes[0] == reply.out_bytes
        at = iter(places)
        for arg, size, region in zip(outputs, sizes, where, strict=True):
            assert size <= arg.size
            if arg.place == INLINE:
                begin = next(at)
                reply.outputs.append(payload[begin:begin + size])
            else:
                reply.outputs.append(self.arenas[region.arena].read(region.offset, size))

    @staticmethod
    def _bytes_of(reply: Reply, line: bytes, behind: bytes) -> bytes:
        if reply.flags & KEPT:
            return b""
        whole = behind if reply.out_bytes > 32 else line
        assert len(behind) == (reply.out_bytes if reply.out_bytes > 32 else 0)
        return whole[:reply.out_bytes]

    def call_object(self, binding: Binding, args: tuple[Any, ...], staged: Region | None = None) -> Reply:
        """Invokes a callable; the payload of the reply is an object, as bytes."""
        part = pickle.dumps(args, 5)
        at = align(16, 64 if len(part) >= 64 else 8)
        payload = struct.pack("<HHIQ", 1, 0, 0, len(part)).ljust(at, b"\0") + part
        if staged is None:
            posted = self.post(binding.number, payload, OBJECT)
        else:
            self.arenas[staged.arena].write(staged.offset, payload)
            staged = Region(staged.arena, staged.offset, len(payload))
            posted = self.post(binding.number, staged.desc(), OBJECT | STAGED, [staged])
        reply, line, behind = self.take(posted)
        reply.payload = self._bytes_of(reply, line, behind)
        reply.outputs = [struct.pack("<Q", posted[1])]
        return reply

    def fetch(self, kept_id: int, into: Region) -> bytes:
        reply, _, _ = self.take(self.post(0, struct.pack("<Q", kept_id) + into.desc(), FETCH), [into])
        assert (reply.status, reply.out_bytes) == (OK, into.size)
        return self.arenas[into.arena].read(into.offset, into.size)

    def close(self) -> None:
        self.control.close()
        self.link.close()

    def __enter__(self) -> WorkerLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def value_of(payload: bytes) -> Any:
    """The object in a payload that has one part."""
    n_parts, n_refs, _, size = struct.unpack_from("<HHIQ", payload)
    assert (n_parts, n_refs) == (1, 0)
    at = align(16, 64 if size >= 64 else 8)
    return pickle.loads(payload[at:at + size])


def dial(place: Place, lease: Lease, *, data: bool, secret: bytes | None = None,
         version: int | None = None) -> tuple[socket.socket, bytes]:
    """A control connection that has proved the lease's secret, and the agent's nonce on it."""
    connection = connect(place)
    try:
        last = struct.pack("<QQ", lease.session, data)
        nonces = greet(connection, place, WORKER, lease=lease.number, worker=lease.worker, last=last, version=version)
        prove(connection, lease.secret if secret is None else secret, (b"rank", b"worker"), nonces, lease.number,
              lease.worker)
    except Refused:
        assert is_over(connection), "refused, and not closed"
        connection.close()
        raise
    return connection, nonces[1]


def dial_data(place: Place, lease: Lease, pair: bytes, secret: bytes | None = None) -> socket.socket:
    connection = connect(place)
    try:
        nonces = greet(connection, place, DATA, lease=lease.number, worker=lease.worker, last=pair)
        prove(connection, lease.secret if secret is None else secret, (b"data rank" + pair, b"data worker" + pair),
              nonces, lease.number, lease.worker)
    except Refused:
        assert is_over(connection), "refused, and not closed"
        connection.close()
        raise
    return connection


# --- checks ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def leased(place: Place) -> Iterator[Lease]:
    session = Session(place)
    try:
        lease = session.lease()
        yield lease
        session.release(lease)
    finally:
        session.close()


@contextlib.contextmanager
def worker(place: Place, options: argparse.Namespace, **attributes: Any) -> Iterator[WorkerLink]:
    with leased(place) as lease, WorkerLink(place, lease, options, **attributes) as link:
        yield link


@contextlib.contextmanager
def refused(status: int) -> Iterator[None]:
    try:
        yield
    except Refused as refusal:
        assert refusal.status == status, refusal
    else:
        raise AssertionError(f"let in, where {status} was due")


def doubles(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def check_inline(place: Place, options: argparse.Namespace) -> None:
    """In the line, for as many calls as go more than once round the ring."""
    with worker(place, options) as link:
        binding = link.bind(link.native(place.library, "rfm_scale2"), [Arg(INLINE, 24)], [Arg(INLINE, 24)])
        for n in range(3 * link.slots + 1):
            reply = link.call(binding, [doubles(n, -n, 0.5)])
            assert (reply.status, reply.outputs) == (OK, [doubles(2 * n, -2 * n, 1.0)])


def check_slot(place: Place, options: argparse.Namespace) -> None:
    """Behind the line, up to the last byte that fits; several arguments; a result that is not full."""
    with worker(place, options) as link:
        scale = link.native(place.library, "rfm_scale2")
        for n in (5, 100, link.slot_bytes // 8):
            binding = link.bind(scale, [Arg(INLINE, 8 * n)], [Arg(INLINE, 8 * n)])
            values = [random.uniform(-1, 1) for _ in range(n)]
            assert link.call(binding, [doubles(*values)]).outputs == [doubles(*(2 * value for value in values))]
        total = link.bind(link.native(place.library, "rfm_sum"), [Arg(INLINE, 24), Arg(INLINE, 8), Arg(INLINE, 800)],
                          [Arg(INLINE, 8), Arg(INLINE, 8)])
        reply = link.call(total, [doubles(1, 2, 3), doubles(0.5), doubles(*range(100))])
        assert reply.outputs == [doubles(4956.5), struct.pack("<q", 104)]
        half = link.bind(link.native(place.library, "rfm_half"), [], [Arg(INLINE, 600)])
        assert link.call(half, []).outputs == [b"\x5a" * 300]


def check_arena(place: Place, options: argparse.Namespace) -> None:
    """Arrays in arenas, bound and per call, results in our own memory; one larger than any packet and socket buffer."""
    with worker(place, options) as link:
        size = 1 << 20
        memory = link.arena(1, 4 * size)
        scale = link.native(place.library, "rfm_scale2")
        source, target = Region(1, 0, size), Region(1, 2 * size, size)
        values = [float(n % 1000) for n in range(size // 8)]
        memory.write(0, doubles(*values))
        memory.write(target.offset + size, b"\xee" * 128)
        bound = link.bind(scale, [Arg(BOUND, size, source)], [Arg(BOUND, size, target, CANARY)])
        assert link.call(bound, [source]).outputs == [doubles(*(2 * value for value in values))]
        assert memory.read(target.offset + size, 128) == b"\xee" * 128, "written past the result"
        assert memory.read(0, size) == doubles(*values)
        # The second arena's pieces lie where no alignment is.
        other = link.arena(2, 4096)
        each = link.bind(scale, [Arg(CALL, 800)], [Arg(CALL, 800)])
        for offset in (8, 1608):
            other.write(offset, doubles(*values[1:101]))
            reply = link.call(each, [Region(2, offset, 800)], [Region(2, offset + 800, 800)])
            assert reply.outputs == [doubles(*(2 * value for value in values[1:101]))]
        mixed = link.bind(link.native(place.library, "rfm_sum"), [Arg(CALL, 80), Arg(INLINE, 16)],
                          [Arg(INLINE, 8), Arg(CALL, 8)])
        other.write(0, doubles(*range(10)))
        reply = link.call(mixed, [Region(2, 0, 80), doubles(0.25, 0.25)], [None, Region(2, 3000, 8)])
        assert reply.outputs == [doubles(45.5), struct.pack("<q", 12)]
        link.unbind(mixed)
        link.drop_arena(2)
        assert link.call(bound, [source]).status == OK


def check_python(place: Place, options: argparse.Namespace) -> None:
    """A Python kernel on arrays, and one on objects: small, larger than a slot both ways, and one that raises."""
    with worker(place, options) as link:
        meta = json.dumps([[["<f8", [3]]], [["<f8", [3]]]]).encode()
        negative = link.bind(link.function("numpy", "negative"), [Arg(INLINE, 24)], [Arg(INLINE, 24)], meta=meta)
        assert link.call(negative, [doubles(1, -2, 3)]).outputs == [doubles(-1, 2, -3)]

        empty = [Arg(INLINE, 0)]
        multiply = link.bind(link.function("operator", "mul", OBJECT_KIND), empty, empty, flags=1)
        assert value_of(link.call_object(multiply, (6, 7)).payload) == 42
        link.arena(1, 1 << 20)
        long = "x" * 10_000
        reply = link.call_object(multiply, (long, 2), Region(1, 0, 0))
        assert (reply.status, reply.flags & KEPT) == (OK, KEPT)
        (number,) = struct.unpack("<Q", reply.outputs[0])
        assert value_of(link.fetch(number, Region(1, 1 << 16, reply.out_bytes))) == 2 * long
        failed = link.call_object(multiply, ({}, 2))
        assert failed.status == KERNEL_FAILED and failed.payload.startswith(b"\0rfe1")
        assert b"unsupported operand" in failed.payload


def check_answers_to_nonsense(place: Place, options: argparse.Namespace) -> None:
    """What is wrong with one request is told in its reply, and the next one is served."""
    with worker(place, options) as link:
        damaged = link.kernel(OBJECT_KIND, "R", b"{}", digest=bytes(32))
        binding = link.bind(damaged, [Arg(INLINE, 8)], [Arg(INLINE, 8)])
        reply = link.call(binding, [bytes(8)])
        assert reply.status == BAD_KERNEL and b"digest" in reply.payload
        scale = link.bind(link.native(place.library, "rfm_scale2"), [Arg(INLINE, 8)], [Arg(INLINE, 8)])
        never = Binding(7 << 16, scale.inputs, scale.outputs)
        assert link.call(never, [bytes(8)]).status == PROTOCOL_ERROR
        reply, _, _ = link.take(link.post(scale.number, bytes(16)))
        assert reply.status == PROTOCOL_ERROR, "more bytes than were bound"
        negative = link.bind(link.native(place.library, "rfm_bad_negative"), [Arg(INLINE, 8)], [Arg(INLINE, 8)])
        assert link.call(negative, [bytes(8)]).status == KERNEL_FAILED
        assert link.call(scale, [doubles(4)]).outputs == [doubles(8)]


def check_slot_out_of_range(place: Place, options: argparse.Namespace) -> None:
    """No slot has that number (verbs: no immediate may say so): the worker says so, and the connection ends.

    Several times, since the worker may be about to fall asleep, or asleep, when it comes.
    """
    with leased(place) as lease:
        for slot in (4, 0xFFFFFFFF) * 4:
            with WorkerLink(place, lease, options) as link:
                scale = link.bind(link.native(place.library, "rfm_scale2"), [Arg(INLINE, 8)], [Arg(INLINE, 8)])
                assert link.call(scale, [doubles(1)]).outputs == [doubles(2)]
                link.post(scale.number, bytes(8), slot=slot)
                assert "made no sense" in link.refusal()


def check_frame_that_makes_no_sense(place: Place, options: argparse.Namespace) -> None:
    with worker(place, options) as link:
        link.send(CTL_BIND, BIND.pack(1 << 16, 5, 0, 0, 0, 0))
        assert link.refusal() == "a control frame that made no sense"


def check_arena_that_can_not_be(place: Place, options: argparse.Namespace) -> None:
    """One that is larger than any memory is refused, and nothing else is."""
    with worker(place, options) as link:
        _, parcel = link.link.arena(4096)
        link.send(CTL_ARENA, ARENA.pack(1, 0, 1 << 60) + parcel)
        assert ARENA_READY.unpack_from(link.expect(CTL_ARENA_READY)) == (1, ERR_INVALID)
        scale = link.bind(link.native(place.library, "rfm_scale2"), [Arg(INLINE, 8)], [Arg(INLINE, 8)])
        assert link.call(scale, [doubles(4)]).outputs == [doubles(8)]


def check_attach_that_makes_no_sense(place: Place, _options: argparse.Namespace) -> None:
    """A ring that is none, or a transport that is none: ATTACHED says so, REFUSED follows, and the end."""
    with leased(place) as lease:
        for slots, transport, due in ((3, TCP, ERR_PROTOCOL), (128, TCP, ERR_PROTOCOL), (4, 99, ERR_INVALID)):
            control, _ = dial(place, lease, data=False)
            with control:
                body = ATTACH.pack(slots, 4096, 0, 0, transport, 0) + TCP_PARCEL.pack(0, 0)
                control.sendall(FRAME.pack(len(body), CTL_ATTACH, 0, 0) + body)
                length, kind, _, _ = FRAME.unpack(receive(control, FRAME.size))
                answer = receive(control, length)
                assert (kind, ATTACHED.unpack_from(answer)[0]) == (CTL_ATTACHED, due)
                length, kind, _, _ = FRAME.unpack(receive(control, FRAME.size))
                assert (kind, receive(control, length)) == (CTL_REFUSED, b"a control frame that made no sense")
                assert is_over(control)


def check_wrong_proofs(place: Place, _options: argparse.Namespace) -> None:
    """Who does not know the key, or the lease's secret, is refused and sent away."""
    with refused(HELLO_REFUSED):
        Session(place, secrets.token_bytes(32))
    with leased(place) as lease:
        for secret in (bytes(32), secrets.token_bytes(32), place.key):
            with refused(HELLO_REFUSED):
                dial(place, lease, data=False, secret=secret)
        stranger = Lease(lease.number + 1000, lease.worker, lease.secret, lease.session)
        with refused(HELLO_UNKNOWN):
            dial(place, stranger, data=False)


def check_wrong_version(place: Place, _options: argparse.Namespace) -> None:
    """A version of the package that is too far away is refused, and told which one is there."""
    with leased(place) as lease:
        try:
            dial(place, lease, data=False, version=place.version + (2 << 8))
        except Refused as refusal:
            assert (refusal.status, refusal.version) == (HELLO_VERSION, place.version)
        else:
            raise AssertionError("let in with another version")


# --- checks of one transport ----------------------------------------------------------------------------------

def check_tcp_wrong_data_connections(place: Place, _options: argparse.Namespace) -> None:
    """It belongs to a control connection that waits for it, and proves the secret, too."""
    with leased(place) as lease:
        control, pair = dial(place, lease, data=True)
        with control:
            with refused(HELLO_UNKNOWN):
                dial_data(place, lease, secrets.token_bytes(16))
            with refused(HELLO_REFUSED):
                dial_data(place, lease, pair, secrets.token_bytes(32))
            dial_data(place, lease, pair).close()


def check_tcp_crc(place: Place, options: argparse.Namespace) -> None:
    """Each message carries a crc32c, both ways; one that is wrong ends the connection."""
    with worker(place, options, crc=True) as link:
        link.arena(1, 4096).write(0, doubles(*range(64)))
        binding = link.bind(link.native(place.library, "rfm_scale2"), [Arg(CALL, 512)], [Arg(CALL, 512)])
        reply = link.call(binding, [Region(1, 0, 512)], [Region(1, 1024, 512)])
        assert reply.outputs == [doubles(*(2 * n for n in range(64)))]
        link.post(binding.number, bytes(48), damage=True)
        assert "crc32c" in link.refusal()
    with worker(place, options, crc=True) as link:
        link.link.crc, link.link._flags = False, 0
        link.post(1 << 16, b"")
        assert "made no sense" in link.refusal(), "without what the parcel promised"


def check_tcp_region_outside(place: Place, options: argparse.Namespace) -> None:
    """Data for memory that was not granted: none of it is written."""
    for region in (Region(1, 4096 - 63, 64), Region(1, 1 << 63, 64), Region(2, 0, 64)):
        with worker(place, options) as link:
            link.arena(1, 4096)
            link.arenas[region.arena] = Huge()
            link.post(1 << 16, b"", 0, [region])
            assert link.refusal() == "data for memory that was not granted"


class Huge:
    """Memory that has everything."""

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)


def check_verbs_write_outside(place: Place, options: argparse.Namespace) -> None:
    """Past the mirror's end our device is told that it may not."""
    with worker(place, options) as link:
        memory = link.arena(1, 4096)
        assert link.link.write_beyond(Region(1, 0, 64), memory) == link.link._e.IBV_WC_REM_ACCESS_ERR


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="", help="over verbs, on this device; else over tcp")
    parser.add_argument("--gid-index", type=int, default=0)
    parser.add_argument("place")
    parser.add_argument("checks", nargs="+", choices=CHECKS)
    options = parser.parse_args()
    place = Place(**json.loads(Path(options.place).read_text()))
    for name in options.checks:
        CHECKS[name](place, options)
        print(f"ok {name}", flush=True)


if __name__ == "__main__":
    main()
