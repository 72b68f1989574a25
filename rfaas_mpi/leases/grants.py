"""Signed grants: why an agent believes that a lease on its cores was granted.

 grant = version u8 · key id (8 bytes) · Ed25519 signature (64 bytes) · body

The manager signs, agents hold public keys only. The signature covers a fixed
prefix, the version, the key id and the body, and nothing of the body is decoded
before it was verified. Times in it are the agent's: the manager echoes the clock
of the agent's last report and says until when of that clock the grant may be
shown, so that no two clocks are ever compared.

 sealed secret = ephemeral X25519 key (32) · enciphered secret (32) · tag (16)

The lease's secret travels in the body, readable by one agent only: the rank has it
from the manager, the agent from the grant that the rank shows.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Container, Iterable
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from rfaas_mpi.errors import AuthError, ConfigError, LeaseDenied
from rfaas_mpi.leases.types import GrantedWorker
from rfaas_mpi.messages import GRANT_BYTES_MAX

__all__ = ["AgentClock", "AgentKey", "Admission", "GrantBody", "GrantRefused", "GrantSigner", "LIFE_MAX_NS",
           "SECRET_BYTES", "key_id", "seal_secret"]

VERSION = 1
KEY_BYTES = 32
KEY_ID_BYTES = 8
SIGNATURE_BYTES = 64
SECRET_BYTES = 32                    # of a lease
KEYS_MAX = 2                         # the key in use and the one before or after it
LIFE_MAX_NS = 600 * 10**9            # how far ahead `not_after_ns` may lie: seen ids are kept so long
VERIFIED_KEPT = 16
OVER_MAX = 4096                      # leases of which a report says that they are over
_PREFIX = b"rfaas_mpi grant\0"
_HEAD_BYTES = 1 + KEY_ID_BYTES + SIGNATURE_BYTES
_SEAL_PREFIX = b"rfaas_mpi lease secret\0"
_SEALED_BYTES = KEY_BYTES + SECRET_BYTES + 16
_NO_NONCE = bytes(12)                # each key is used once


class AgentClock(msgspec.Struct, frozen=True):
    """A moment of one agent's life.

    `boot_id` is the node's, `incarnation` the number that the manager gave to
    the agent when it registered, `ns` its monotonic clock.
    """

    boot_id: str
    incarnation: int
    ns: int


class GrantBody(msgspec.Struct, frozen=True):
    """What is granted: one lease on one node.

    `seen` is the agent's clock as the manager knew it, `not_after_ns` the last
    moment of that clock at which the grant may be shown, `hard_end_ns` the one
    at which the lease ends (None: when its rank lets it go), `sealed` the lease's
    secret for this agent's eyes (`seal_secret`). What a newer manager says besides is
    ignored: what must not be, needs another VERSION.
    """

    grant_id: int
    node: str
    seen: AgentClock
    not_after_ns: int
    lease: Annotated[int, Meta(ge=0)]
    epoch: Annotated[int, Meta(ge=0)]
    uid: int
    workers: tuple[GrantedWorker, ...]
    memory_per_worker: int
    hard_end_ns: int | None = None
    sealed: bytes = b""

    @property
    def cores(self) -> tuple[int, ...]:
        """Every core of the lease, in order of its workers."""
        return tuple(core for worker in self.workers for core in worker.cores)


class GrantRefused(LeaseDenied, AuthError):
    """The agent does not act on this grant; the message says why, and `reason` in one word, to count them by."""

    reason = "malformed"

    def __init__(self, message: str = "", *, hint: str = "", reason: str = "") -> None:
        super().__init__(message, hint=hint)
        if reason:
            self.reason = reason


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
        """The grant as it travels. ConfigError for one with more workers than fit into one (thousands)."""
        packed = msgspec.msgpack.encode(body)
        if (size := _HEAD_BYTES + len(packed)) > GRANT_BYTES_MAX:
            raise ConfigError(f"the grant of lease {body.lease} with {len(body.workers)} workers has {size} bytes, "
                              f"and {GRANT_BYTES_MAX} are the limit",
                              hint="ask for fewer workers, with more cores each")
        return self._head + self._key.sign(_covered(self._head, packed)) + packed


# --- the lease's secret -------------------------------------------------------

def seal_secret(public: bytes, secret: bytes, lease: int, epoch: int) -> bytes:
    """The secret, for the agent with this public key and this lease only. ConfigError for a key that is none."""
    if len(public) != KEY_BYTES or len(secret) != SECRET_BYTES:
        raise ConfigError(f"an agent's public key has {KEY_BYTES} bytes and a lease's secret {SECRET_BYTES}, "
                          f"not {len(public)} and {len(secret)}")
    once = X25519PrivateKey.generate()
    try:
        shared = once.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        # A point of low order: everybody would know what comes out.
        raise ConfigError("what the agent registered as its public key is none") from None
    ours = once.public_key().public_bytes_raw()
    return ours + _cipher(shared, ours, public).encrypt(_NO_NONCE, secret, _bound(lease, epoch))


class AgentKey:
    """An agent's key for secrets: made when it starts, never stored, public half told when it registers."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def open(self, sealed: bytes, lease: int, epoch: int) -> bytes:
        """The secret that was sealed for us and this lease. GrantRefused for anything else."""
        if len(sealed) != _SEALED_BYTES:
            raise GrantRefused(f"the grant of lease {lease} carries no secret for this agent",
                               hint="manager and agents have to run the same version", reason="secret")
        theirs = sealed[:KEY_BYTES]
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(theirs))
            return _cipher(shared, theirs, self.public).decrypt(_NO_NONCE, sealed[KEY_BYTES:], _bound(lease, epoch))
        except (InvalidTag, ValueError):
            raise GrantRefused(f"the secret of lease {lease} is sealed for another agent, or another life of this one",
                               hint="the manager has to grant anew", reason="secret") from None


def _cipher(shared: bytes, ephemeral: bytes, public: bytes) -> ChaCha20Poly1305:
    key = HKDF(SHA256(), 32, salt=None, info=_SEAL_PREFIX + ephemeral + public).derive(shared)
    return ChaCha20Poly1305(key)


def _bound(lease: int, epoch: int) -> bytes:
    return struct.pack("<QQ", lease, epoch)


# --- the agent's half ---------------------------------------------------------

class Admission:
    """Pure: believes a grant or says why not. The agent has the last word on its cores.

    A grant is refused if a key that isn't ours signed it, if it is for another
    node or another life of this agent, late, seen before or taken back meanwhile,
    if its epoch isn't above the highest that one of its cores had, or a core is in
    use. What was refused changes nothing, so that the right grant can follow.
    """

    def __init__(self, node: str, boot_id: str, incarnation: int, keys: Iterable[bytes]) -> None:
        self.node = node
        self.boot_id = boot_id
        self.incarnation = incarnation
        self._keys: dict[bytes, Ed25519PublicKey] = {}
        self._seen: dict[int, int] = {}              # grant id → the moment from which it is late anyway
        self._epochs: dict[int, int] = {}            # core → highest epoch
        self._used: dict[int, int] = {}              # lease → the moment from which its grant is late anyway
        self._forbidden: dict[int, int] = {}         # likewise
        # Those that were verified last: a lease's grant is looked at several times until it is admitted.
        self._verified_ones: dict[bytes, GrantBody] = {}
        self.rotate(keys)

    def rotate(self, keys: Iterable[bytes]) -> None:
        """Believes these public keys from now on and no others: one, or two while they change."""
        found = list(keys)
        if not 1 <= len(found) <= KEYS_MAX:
            raise ConfigError(f"an agent holds one or {KEYS_MAX} public keys of its manager, not {len(found)}")
        if any(len(key) != KEY_BYTES for key in found):
            raise ConfigError(f"a public key of the manager has {KEY_BYTES} bytes")
        self._keys = {key_id(key): Ed25519PublicKey.from_public_bytes(key) for key in found}
        self._verified_ones.clear()

    def clock(self, now_ns: int) -> AgentClock:
        """What a report says of this agent's time."""
        return AgentClock(self.boot_id, self.incarnation, now_ns)

    def peek(self, grant: bytes) -> GrantBody:
        """What the manager signed; nothing is admitted, and it may be late, used or impossible. Raises GrantRefused."""
        return self._verified(grant)

    def check(self, grant: bytes, now_ns: int, spare: Collection[int], in_use: Collection[int]) -> GrantBody:
        """What `admit` would say now; nothing is admitted. Raises GrantRefused."""
        body = self._verified(grant)
        self._check(body, now_ns, spare, in_use)
        return body

    def forbid(self, lease: int, now_ns: int) -> None:
        """Refuses this lease's grant from now on: its stop was faster."""
        self._forbidden[lease] = now_ns + LIFE_MAX_NS

    def over(self, now_ns: int, live: Container[int]) -> tuple[int, ...]:
        """What reports say of leases that never begin (again) here, the latest first: not live, and used or forbidden.

        Only for as long as their grants aren't late: then that says it.
        """
        self._forget(now_ns)
        known = {**self._used, **self._forbidden}
        return tuple(lease for lease in reversed(known) if lease not in live)[:OVER_MAX]

    def admit(self, grant: bytes, now_ns: int, spare: Collection[int], in_use: Collection[int]) -> GrantBody:
        """What may be started now; the same grant is refused from here on.

        `spare` are the cores that this node lends, `in_use` those among them on
        which something of ours may still run. Raises GrantRefused.
        """
        body = self.check(grant, now_ns, spare, in_use)
        self._forget(now_ns)
        self._seen[body.grant_id] = self._used[body.lease] = body.not_after_ns
        for core in body.cores:
            self._epochs[core] = body.epoch
        return body

    def _forget(self, now_ns: int) -> None:
        for known in (self._seen, self._used, self._forbidden):
            for number in [number for number, late in known.items() if late < now_ns]:
                del known[number]

    def _verified(self, grant: bytes) -> GrantBody:
        found = self._verified_ones.get(grant)
        if found is None:
            found = self._verify(grant)
            if len(self._verified_ones) >= VERIFIED_KEPT:
                del self._verified_ones[next(iter(self._verified_ones))]
            self._verified_ones[grant] = found
        return found

    def _verify(self, grant: bytes) -> GrantBody:
        if not _HEAD_BYTES < len(grant) <= GRANT_BYTES_MAX:
            raise GrantRefused(f"a grant of {len(grant)} bytes is none")
        if grant[0] != VERSION:
            raise GrantRefused(f"a grant of version {grant[0]}; this agent knows version {VERSION}",
                               hint="run manager and agents of the same version", reason="version")
        head, signature, packed = grant[:1 + KEY_ID_BYTES], grant[1 + KEY_ID_BYTES:_HEAD_BYTES], grant[_HEAD_BYTES:]
        key = self._keys.get(head[1:])
        if key is None:
            raise GrantRefused(f"the grant is signed by key {head[1:].hex()}, which this agent doesn't hold",
                               hint=f"it holds {', '.join(sorted(held.hex() for held in self._keys))}", reason="key")
        try:
            key.verify(signature, _covered(head, packed))
        except InvalidSignature:
            raise GrantRefused("the grant's signature is not its manager's: it was changed on the way",
                               reason="signature") from None
        try:
            return msgspec.msgpack.decode(packed, type=GrantBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise GrantRefused(f"the manager signed what is no grant: {error}") from None

    def _check(self, body: GrantBody, now_ns: int, spare: Collection[int], in_use: Collection[int]) -> None:
        if body.node != self.node:
            raise GrantRefused(f"the grant is for node {body.node}, this is {self.node}", reason="node")
        if (body.seen.boot_id, body.seen.incarnation) != (self.boot_id, self.incarnation):
            raise GrantRefused("the grant is for an earlier life of this agent", hint="the manager has to grant anew",
                               reason="life")
        if body.seen.ns > now_ns:
            raise GrantRefused("the grant echoes a moment that this agent hasn't had yet", reason="life")
        if now_ns > body.not_after_ns:
            raise GrantRefused(f"the grant is {(now_ns - body.not_after_ns) / 1e9:.3g} s late", reason="late")
        if body.not_after_ns > now_ns + LIFE_MAX_NS:
            raise GrantRefused(f"the grant could be shown for more than {LIFE_MAX_NS // 10**9} s", reason="late")
        if body.hard_end_ns is not None and now_ns >= body.hard_end_ns:
            raise GrantRefused("the lease is at its hard end already", reason="late")
        if body.grant_id in self._seen:
            raise GrantRefused(f"grant {body.grant_id} was used before", reason="used")
        if body.lease in self._forbidden:
            raise GrantRefused(f"lease {body.lease} was taken back before it began", hint="ask for another one",
                               reason="revoked")
        self._check_cores(body, spare, in_use)

    def _check_cores(self, body: GrantBody, spare: Collection[int], in_use: Collection[int]) -> None:
        cores = body.cores
        if not cores or not all(worker.cores for worker in body.workers) or len(set(cores)) != len(cores):
            raise GrantRefused("the grant gives a worker no core, or one core twice")
        for core in cores:
            if core not in spare:
                raise GrantRefused(f"core {core} of {self.node} is not spare now", reason="core")
            if core in in_use:
                raise GrantRefused(f"core {core} of {self.node} is still in use", reason="core")
            if body.epoch <= self._epochs.get(core, -1):
                raise GrantRefused(f"epoch {body.epoch} is not above epoch {self._epochs[core]} of core {core}",
                                   reason="core")
