"""Signed grants: why an agent believes that a lease on its cores was granted.

 grant = version u8 · key id (8 bytes) · Ed25519 signature (64 bytes) · body

The manager signs, agents hold public keys only. The signature covers a fixed
prefix, the version, the key id and the body, and nothing of the body is decoded
before it was verified. Times in it are the agent's: the manager echoes the clock
of the agent's last report and says until when of that clock the grant may be
shown, so that no two clocks are ever compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rfaas_mpi.errors import AuthError, ConfigError, LeaseDenied
from rfaas_mpi.leases.types import GrantedWorker

__all__ = ["AgentClock", "Admission", "GrantBody", "GrantRefused", "GrantSigner", "LIFE_MAX_NS", "key_id"]

VERSION = 1
KEY_BYTES = 32
KEY_ID_BYTES = 8
SIGNATURE_BYTES = 64
KEYS_MAX = 2                         # the key in use and the one before or after it
GRANT_BYTES_MAX = 1 << 20
LIFE_MAX_NS = 600 * 10**9            # how far ahead `not_after_ns` may lie: seen ids are kept so long
_PREFIX = b"rfaas_mpi grant\0"
_HEAD_BYTES = 1 + KEY_ID_BYTES + SIGNATURE_BYTES


class AgentClock(msgspec.Struct, frozen=True):
    """A moment of one agent's life.

    `boot_id` is the node's, `incarnation` a random number of 64 bits that the
    agent draws when it starts, `ns` its monotonic clock.
    """

    boot_id: str
    incarnation: int
    ns: int


class GrantBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is granted: one lease on one node.

    `seen` is the agent's clock as the manager knew it, `not_after_ns` the last
    moment of that clock at which the grant may be shown, `hard_end_ns` the one
    at which the lease ends (None: when its rank lets it go).
    """

    grant_id: int
    node: str
    seen: AgentClock
    not_after_ns: int
    lease: int
    epoch: int
    uid: int
    workers: tuple[GrantedWorker, ...]
    memory_per_worker: int
    hard_end_ns: int | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """Every core of the lease, in order of its workers."""
        return tuple(core for worker in self.workers for core in worker.cores)


class GrantRefused(LeaseDenied, AuthError):
    """The agent does not act on this grant; the message says why."""


def key_id(public: bytes) -> bytes:
    """The 8 bytes by which grants name a public key of 32 bytes."""
    return hashlib.sha256(public).digest()[:KEY_ID_BYTES]


def _covered(head: bytes, body: bytes) -> bytes:
    return _PREFIX + head + body


class GrantSigner:
    """The manager's half: its private key, 32 bytes of randomness (`secrets.token_bytes(32)`)."""

    def __init__(self, private: bytes) -> None:
        if len(private) != KEY_BYTES:
            raise ConfigError(f"a private key for grants has {KEY_BYTES} bytes, not {len(private)}")
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()
        self._head = bytes((VERSION,)) + key_id(self.public)

    def sign(self, body: GrantBody) -> bytes:
        """The grant as it travels."""
        packed = msgspec.msgpack.encode(body)
        return self._head + self._key.sign(_covered(self._head, packed)) + packed


class Admission:
    """The agent's half, pure: believes a grant or says why not. The agent has the last word on its cores.

    A grant is refused if a key that isn't ours signed it, if it is for another
    node or another life of this agent, late, seen before, if its epoch isn't
    above the highest that one of its cores had, or a core is in use. What was
    refused changes nothing, so that the right grant can follow.
    """

    def __init__(self, node: str, boot_id: str, incarnation: int, keys: Iterable[bytes]) -> None:
        self.node = node
        self.boot_id = boot_id
        self.incarnation = incarnation
        self._keys: dict[bytes, Ed25519PublicKey] = {}
        self._seen: dict[int, int] = {}              # grant id → the moment from which it is late anyway
        self._epochs: dict[int, int] = {}            # core → highest epoch
        self.rotate(keys)

    def rotate(self, keys: Iterable[bytes]) -> None:
        """Believes these public keys from now on and no others: one, or two while they change."""
        found = list(keys)
        if not 1 <= len(found) <= KEYS_MAX:
            raise ConfigError(f"an agent holds one or {KEYS_MAX} public keys of its manager, not {len(found)}")
        if any(len(key) != KEY_BYTES for key in found):
            raise ConfigError(f"a public key of the manager has {KEY_BYTES} bytes")
        self._keys = {key_id(key): Ed25519PublicKey.from_public_bytes(key) for key in found}

    def clock(self, now_ns: int) -> AgentClock:
        """What a report says of this agent's time."""
        return AgentClock(self.boot_id, self.incarnation, now_ns)

    def admit(self, grant: bytes, now_ns: int, spare: Collection[int], in_use: Collection[int]) -> GrantBody:
        """What may be started now; the same grant is refused from here on.

        `spare` are the cores that this node lends, `in_use` those among them on
        which something of ours may still run. Raises GrantRefused.
        """
        body = self._verified(grant)
        self._check(body, now_ns, spare, in_use)
        self._seen = {seen: late for seen, late in self._seen.items() if late >= now_ns}
        self._seen[body.grant_id] = body.not_after_ns
        for core in body.cores:
            self._epochs[core] = body.epoch
        return body

    def _verified(self, grant: bytes) -> GrantBody:
        if not _HEAD_BYTES < len(grant) <= GRANT_BYTES_MAX:
            raise GrantRefused(f"a grant of {len(grant)} bytes is none")
        if grant[0] != VERSION:
            raise GrantRefused(f"a grant of version {grant[0]}; this agent knows version {VERSION}",
                               hint="run manager and agents of the same version")
        head, signature, packed = grant[:1 + KEY_ID_BYTES], grant[1 + KEY_ID_BYTES:_HEAD_BYTES], grant[_HEAD_BYTES:]
        key = self._keys.get(head[1:])
        if key is None:
            raise GrantRefused(f"the grant is signed by key {head[1:].hex()}, which this agent doesn't hold",
                               hint=f"it holds {', '.join(sorted(held.hex() for held in self._keys))}")
        try:
            key.verify(signature, _covered(head, packed))
        except InvalidSignature:
            raise GrantRefused("the grant's signature is not its manager's: it was changed on the way") from None
        try:
            return msgspec.msgpack.decode(packed, type=GrantBody)
        except msgspec.DecodeError as error:
            raise GrantRefused(f"the manager signed what is no grant: {error}") from None

    def _check(self, body: GrantBody, now_ns: int, spare: Collection[int], in_use: Collection[int]) -> None:
        if body.node != self.node:
            raise GrantRefused(f"the grant is for node {body.node}, this is {self.node}")
        if (body.seen.boot_id, body.seen.incarnation) != (self.boot_id, self.incarnation):
            raise GrantRefused("the grant is for an earlier life of this agent", hint="the manager has to grant anew")
        if body.seen.ns > now_ns:
            raise GrantRefused("the grant echoes a moment that this agent hasn't had yet")
        if now_ns > body.not_after_ns:
            raise GrantRefused(f"the grant is {(now_ns - body.not_after_ns) / 1e9:.3g} s late")
        if body.not_after_ns > now_ns + LIFE_MAX_NS:
            raise GrantRefused(f"the grant could be shown for more than {LIFE_MAX_NS // 10**9} s")
        if body.hard_end_ns is not None and now_ns >= body.hard_end_ns:
            raise GrantRefused("the lease is at its hard end already")
        if body.grant_id in self._seen:
            raise GrantRefused(f"grant {body.grant_id} was used before")
        self._check_cores(body, spare, in_use)

    def _check_cores(self, body: GrantBody, spare: Collection[int], in_use: Collection[int]) -> None:
        cores = body.cores
        if not cores or not all(worker.cores for worker in body.workers) or len(set(cores)) != len(cores):
            raise GrantRefused("the grant gives a worker no core, or one core twice")
        for core in cores:
            if core not in spare:
                raise GrantRefused(f"core {core} of {self.node} is not spare now")
            if core in in_use:
                raise GrantRefused(f"core {core} of {self.node} is still in use")
            if body.epoch <= self._epochs.get(core, -1):
                raise GrantRefused(f"epoch {body.epoch} is not above epoch {self._epochs[core]} of core {core}")
