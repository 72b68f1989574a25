"""Who calls a manager over a network, and that it is the manager who answers: proofs good once, sealed answers.

 caller ── GET /v1/challenge ─────────────────────────────▶ manager
 caller ◀─ challenge: good once, for a minute, here only ── manager
 caller ── request · fresh key · proof ───────────────────▶ manager    Authorization: RFaaS …
 caller ◀─ sealed answer · fresh key · proof ────────────── manager    RFaaS-Answer: …

A proof is a MUNGE credential, or an HMAC with a key that both hold; what it covers is

 request   receiver · method · path and query · SHA-256 of the body · challenge · the caller's fresh key
 answer    the above · the manager's fresh key · status · SHA-256 of the sealed body

Both fresh keys (X25519) make the key that seals the answer, or a web socket's
messages in both directions. Within TLS the answer is as it is, and the caller
shows no key of his own. Why it is so: docs/decisions/0014.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import os
import secrets
import struct
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from rfaas_mpi import munge
from rfaas_mpi.errors import AuthError, RFaaSError, ServiceError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

__all__ = ["ANSWER_HEADER", "CHALLENGE_PATH", "SCHEME", "Asked", "Caller", "Challenges", "Channel", "Key", "KeyRing",
           "Munge", "Prover", "Unproved", "Verifier", "meant_for"]

SCHEME = "RFaaS"
ANSWER_HEADER = "RFaaS-Answer"
CHALLENGE_PATH = "/v1/challenge"
CHALLENGE_LIFE_S = 60.0
KEY_BYTES = 32
NAME_BYTES = 8
SEALED_TAG_BYTES = 16
TOKEN_BYTES_MAX = 6000               # of a header; HTTP servers take 8190
SWITCHED = 101                       # the status of a web socket's opening
_MOMENT = struct.Struct("<Q")
_CHALLENGE_BYTES = _MOMENT.size + 16 + 16


class Unproved(Exception):
    """The caller has not proved who he is: to be answered with 401, this text and `hint`; `kind` is one word."""

    def __init__(self, why: str, hint: str = "", *, kind: str = "proof") -> None:
        super().__init__(why)
        self.hint, self.kind = hint, kind


class _Shown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a caller shows. `key` names the shared key; `public` is empty where TLS seals the answer."""

    means: Literal["munge", "key"]
    to: Annotated[str, Meta(max_length=300)]
    challenge: Annotated[bytes, Meta(min_length=_CHALLENGE_BYTES, max_length=_CHALLENGE_BYTES)]
    public: Annotated[bytes, Meta(max_length=KEY_BYTES)]
    proof: Annotated[bytes, Meta(max_length=TOKEN_BYTES_MAX)]
    key: Annotated[bytes, Meta(max_length=NAME_BYTES)] = b""


class _Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manager shows."""

    public: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    proof: Annotated[bytes, Meta(max_length=TOKEN_BYTES_MAX)]


# ---- by what means -------------------------------------------------------------------------------

class Means(Protocol):
    """How to prove something to one reader, and to check what he proves."""

    name: Literal["munge", "key"]
    key_name: bytes

    def prove(self, role: bytes, covered: bytes, reader_uid: int) -> bytes:
        """The proof; only a process of `reader_uid` may be able to check it."""

    def prover(self, role: bytes, covered: bytes, proof: bytes) -> int | None:
        """The uid of who proved that; None where the means tells none. AuthError if it proves nothing."""


@dataclass(frozen=True)
class Munge:
    """By the word of each node's munged; `socket` is where it listens, "" where libmunge looks."""

    socket: str = ""
    name: Literal["munge", "key"] = "munge"
    key_name: bytes = b""

    def prove(self, role: bytes, covered: bytes, reader_uid: int) -> bytes:
        return munge.encode(role + covered, reader_uid=reader_uid, socket=self.socket)

    def prover(self, role: bytes, covered: bytes, proof: bytes) -> int | None:
        credential = munge.decode(proof, socket=self.socket)
        if not hmac.compare_digest(credential.payload, role + covered):
            raise AuthError(f"the credential of uid {credential.uid} was made for something else")
        return credential.uid


@dataclass(frozen=True)
class Key:
    """By a key of 32 bytes that caller and manager share, and nobody else."""

    key: bytes
    name: Literal["munge", "key"] = "key"

    def __repr__(self) -> str:
        return f"Key({self.key_name.hex()})"

    @property
    def key_name(self) -> bytes:
        """8 bytes by which to tell it from others; they don't tell the key."""
        return hmac.digest(self.key, b"rfaas_mpi key name", "sha256")[:NAME_BYTES]

    def prove(self, role: bytes, covered: bytes, reader_uid: int) -> bytes:
        return hmac.digest(self.key, b"rfaas_mpi " + role + covered, "sha256")

    def prover(self, role: bytes, covered: bytes, proof: bytes) -> int | None:
        if not hmac.compare_digest(proof, self.prove(role, covered, 0)):
            raise AuthError("the proof was made with another key, or for something else")
        return None


class KeyRing:
    """A manager's shared keys, and the user that each stands for."""

    def __init__(self, keys: Iterable[tuple[int, bytes]] = ()) -> None:
        self._keys: dict[bytes, tuple[int, Key]] = {}
        for uid, data in keys:
            key = Key(data)
            if self._keys.setdefault(key.key_name, (uid, key))[0] != uid:
                raise AuthError(f"one key stands for uid {uid} and for uid {self._keys[key.key_name][0]}",
                                hint="give each user a key of his own")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, name: bytes) -> tuple[int, Key]:
        """The user and the key. Unproved for one that this manager doesn't hold."""
        found = self._keys.get(name)
        if found is None:
            raise Unproved(f"this manager holds no key {name.hex() or '(none named)'}",
                           "ask its administrator for the key that stands for you", kind="key")
        return found


# ---- what is covered, and with what it is sealed ----------------------------------------------------

def _digest(*parts: bytes) -> bytes:
    """SHA-256 over the parts, each behind its length."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(_MOMENT.pack(len(part)))
        whole.update(part)
    return whole.digest()


def _of_request(to: str, method: str, target: str, body: bytes, challenge: bytes, public: bytes) -> bytes:
    return _digest(b"rfaas_mpi request 1", to.encode(), method.encode(), target.encode(),
                   hashlib.sha256(body).digest(), challenge, public)


def _of_answer(covered: bytes, public: bytes, status: int, sealed: bytes) -> bytes:
    return _digest(b"rfaas_mpi answer 1", covered, public, _MOMENT.pack(status), hashlib.sha256(sealed).digest())


def _fresh() -> tuple[X25519PrivateKey, bytes]:
    try:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    except ImportError as error:
        raise ServiceError("calling a manager over a network needs the package cryptography",
                           hint="pip install 'rfaas_mpi[cluster]'") from error
    private = X25519PrivateKey.generate()
    return private, private.public_key().public_bytes_raw()


def _derive(private: X25519PrivateKey, peer: bytes, covered: bytes, use: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError:
        raise AuthError("the other side's fresh key is none") from None
    return HKDF(SHA256(), KEY_BYTES, salt=covered, info=b"rfaas_mpi " + use).derive(shared)


class _Sealed:
    """One direction: messages are numbered, so that none is left out, repeated or moved."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        self._cipher = ChaCha20Poly1305(key)
        self._number = 0

    def _next(self) -> bytes:
        self._number += 1
        return _MOMENT.pack(self._number).ljust(12, b"\0")

    def seal(self, data: bytes) -> bytes:
        return self._cipher.encrypt(self._next(), data, None)

    def open(self, sealed: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag
        try:
            return self._cipher.decrypt(self._next(), sealed, None)
        except InvalidTag:
            raise AuthError("a message was changed, left out or repeated on its way") from None


class Channel:
    """A web socket's two directions, sealed."""

    def __init__(self, to_send: bytes, to_receive: bytes) -> None:
        self._out, self._in = _Sealed(to_send), _Sealed(to_receive)

    def seal(self, data: bytes) -> bytes:
        """The message as it travels; send them in the order in which they were sealed."""
        return self._out.seal(data)

    def open(self, sealed: bytes) -> bytes:
        """What the next message says. AuthError if it isn't the one that the other side sent next."""
        return self._in.open(sealed)


def _token(what: msgspec.Struct) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(what)).decode()


_SHOWN = msgspec.json.Decoder(_Shown)
_ANSWERED = msgspec.json.Decoder(_Answered)


# ---- the caller's half -----------------------------------------------------------------------------

class Asked:
    """A request's proof, and what opens its answer."""

    def __init__(self, prover: Prover, method: str, target: str, body: bytes, challenge: bytes) -> None:
        self._prover = prover
        self._private, public = _fresh() if prover.seals else (None, b"")
        self._covered = _of_request(prover.receiver, method, target, body, challenge, public)
        means = prover.means
        proof = means.prove(b"request", self._covered, prover.manager_uid)
        shown = _Shown(means.name, prover.receiver, challenge, public, proof, means.key_name)
        self.header = f"{SCHEME} {_token(shown)}"

    def open(self, status: int, header: str | None, sealed: bytes) -> bytes:
        """The answer's body. AuthError unless the manager gave this very answer to this very request."""
        if self._private is None:
            return sealed
        key = self._answerer(status, header, sealed, b"answer")
        return _Sealed(key).open(sealed)

    def channel(self, hello: str) -> Channel | None:
        """What seals the web socket that this request opened, None within TLS; `hello` is the first message on it."""
        if self._private is None:
            return None
        public = self._check(SWITCHED, hello, b"")
        return Channel(_derive(self._private, public, self._covered, b"to manager"),
                       _derive(self._private, public, self._covered, b"to caller"))

    def _answerer(self, status: int, header: str | None, sealed: bytes, use: bytes) -> bytes:
        assert self._private is not None
        return _derive(self._private, self._check(status, header, sealed), self._covered, use)

    def _check(self, status: int, header: str | None, sealed: bytes) -> bytes:
        """The manager's fresh key, once it has proved that this is its answer."""
        hint = "somebody may be in between: nothing of it was believed"
        try:
            shown = _ANSWERED.decode(base64.urlsafe_b64decode(header or ""))
        except (ValueError, msgspec.MsgspecError):
            raise AuthError(f"{self._prover.receiver} doesn't prove that it is the manager", hint=hint) from None
        try:
            uid = self._prover.means.prover(b"answer", _of_answer(self._covered, shown.public, status, sealed),
                                            shown.proof)
        except AuthError as error:
            raise AuthError(f"{self._prover.receiver} doesn't prove that it is the manager: "
                            f"{Exception.__str__(error)}", hint=error.hint or hint) from None
        if uid is not None and uid != self._prover.manager_uid:
            raise AuthError(f"what answers at {self._prover.receiver} runs as uid {uid}, the manager as uid "
                            f"{self._prover.manager_uid}", hint=f"if that is right, set RFAAS_MANAGER_USER={uid}")
        return shown.public


@dataclass(frozen=True)
class Prover:
    """A caller's half: `receiver` is the manager as he dials it (HOST:PORT), `seals` is False within TLS."""

    means: Means
    receiver: str
    manager_uid: int
    seals: bool = True

    def ask(self, method: str, target: str, body: bytes, challenge: bytes) -> Asked:
        """The proof of one request. AuthError, or ServiceError where something isn't installed. May ask munged."""
        return Asked(self, method, target, body, challenge)


# ---- the manager's half ------------------------------------------------------------------------------

class Challenges:
    """Each is good once, for a minute, and only for who made it; nothing is kept of those that nobody has used."""

    def __init__(self, life_s: float = CHALLENGE_LIFE_S) -> None:
        self._life_s = life_s
        self._key = secrets.token_bytes(KEY_BYTES)
        self._used: set[bytes] = set()
        self._order: deque[tuple[float, bytes]] = deque()     # (when it can be forgotten, challenge)

    def __len__(self) -> int:
        return len(self._used)

    def make(self, now: float) -> bytes:
        """A new one."""
        body = _MOMENT.pack(int((now + self._life_s) * 1e9)) + secrets.token_bytes(16)
        return body + self._tag(body)

    def check(self, challenge: bytes, now: float) -> None:
        """Unproved for one that is not ours, too old, or used."""
        body, tag = challenge[:-16], challenge[-16:]
        if not hmac.compare_digest(tag, self._tag(body)):
            raise Unproved("the challenge is not one of this manager's, or it was made before it started",
                           "ask for a new one, and again", kind="challenge")
        if now * 1e9 > _MOMENT.unpack_from(body)[0]:
            raise Unproved("the challenge is too old", "ask for a new one, and again", kind="late")
        if challenge in self._used:
            raise Unproved("the challenge was used before: this is a replay", kind="replay")

    def spend(self, challenge: bytes, now: float) -> None:
        """The same, and from here on it is used."""
        self.check(challenge, now)
        while self._order and self._order[0][0] < now:
            self._used.discard(self._order.popleft()[1])
        self._used.add(challenge)
        self._order.append((now + self._life_s + 1, challenge))

    def _tag(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:16]


class Caller:
    """Who called, by proof; and how he is answered so that nobody else can read, change or make it up."""

    def __init__(self, uid: int, how: str, means: Means | None = None, covered: bytes = b"",
                 public: bytes = b"") -> None:
        self.uid, self.how = uid, how
        self._means, self._covered, self._public = means, covered, public

    @property
    def sealed(self) -> bool:
        """False on a Unix socket and within TLS."""
        return bool(self._public)

    @property
    def means(self) -> str:
        """"munge" or "key"; "" where nothing had to be proved."""
        return "" if self._means is None else self._means.name

    def answer(self, status: int, body: bytes) -> tuple[str, bytes]:
        """(the header, the sealed body). AuthError where munged can't be asked. Call it once; may ask munged."""
        private, public = _fresh()
        sealed = _Sealed(_derive(private, self._public, self._covered, b"answer")).seal(body)
        return self._prove(public, status, sealed), sealed

    def channel(self) -> tuple[str, Channel]:
        """(the first message, what seals all others) on a web socket that he opened. As `answer`."""
        private, public = _fresh()
        hello = self._prove(public, SWITCHED, b"")
        return hello, Channel(_derive(private, self._public, self._covered, b"to caller"),
                              _derive(private, self._public, self._covered, b"to manager"))

    def _prove(self, public: bytes, status: int, sealed: bytes) -> str:
        assert self._means is not None
        proof = self._means.prove(b"answer", _of_answer(self._covered, public, status, sealed), self.uid)
        return _token(_Answered(public, proof))


def meant_for(to: str, names: Collection[str], here: tuple[str, int], hostname: str) -> bool:
    """True if `to` (HOST:PORT, as the caller dialled it) is this manager.

    `names` are those that it was given, `here` the address at which the connection
    arrived; the host's own name counts, too, with any domain.
    """
    if to in names:
        return True
    host, _, port = to.rpartition(":")
    host = host.strip("[]")
    if port != str(here[1]):
        return False
    short = hostname.split(".")[0].lower()
    if host in (short, hostname.lower()) or host.startswith(f"{short}."):
        return True
    arrived = ipaddress.ip_address(here[0].partition("%")[0])
    if host == "localhost":
        return arrived.is_loopback
    try:
        return ipaddress.ip_address(host.partition("%")[0]) == arrived
    except ValueError:
        return False


class Claim(msgspec.Struct, frozen=True):
    """A request over a network, before its body was read; `shown` is what its header says."""

    method: str
    target: str
    shown: _Shown


class Verifier:
    """The manager's half: what it takes as a proof. `claim` before the body is read, `prove`, then `accept`."""

    def __init__(self, *, munge: Munge | None, keys: KeyRing, names: Collection[str] = (), hostname: str = "",
                 challenges: Challenges | None = None) -> None:
        self._munge, self._keys = munge, keys
        self._names = frozenset(name.lower() for name in names)
        self._hostname = hostname or "localhost"
        self.challenges = challenges or Challenges()

    @property
    def means(self) -> tuple[str, ...]:
        """What can be proved by here."""
        return (("munge",) if self._munge is not None else ()) + (("key",) if self._keys else ())

    def claim(self, header: str | None, method: str, target: str, here: tuple[str, int], *, tls: bool,
              now: float) -> Claim:
        """What the caller wants to prove. Unproved for what is none, meant for somebody else, late or seen before."""
        scheme, _, token = (header or "").partition(" ")
        if scheme != SCHEME:
            by = " or ".join(self.means) or "nothing that this manager believes"
            raise Unproved(f"who calls over a network has to prove who he is, by {by}",
                           "set RFAAS_MANAGER_KEY_FILE, or have munged running", kind="nothing")
        try:
            if len(token) > TOKEN_BYTES_MAX:
                raise ValueError("it is too long")
            shown = _SHOWN.decode(base64.urlsafe_b64decode(token))
        except (ValueError, msgspec.MsgspecError) as error:
            raise Unproved(f"the proof can't be read: {error}", kind="unreadable") from None
        if shown.means not in self.means:
            raise Unproved(f"this manager believes no proof by {shown.means}",
                           f"set RFAAS_AUTH to {' or '.join(self.means) or 'nothing: it can check none'}", kind="means")
        if not meant_for(shown.to, self._names, here, self._hostname):
            raise Unproved(f"the proof is for the manager {shown.to!r}, this is {here[0]}:{here[1]}",
                           "dial it by its own name or address, or give it that name with --name", kind="receiver")
        if len(shown.public) != (0 if tls and not shown.public else KEY_BYTES):
            raise Unproved("without TLS an answer is sealed, which takes the caller's key",
                           "run the same version everywhere", kind="unsealed")
        self.challenges.check(shown.challenge, now)
        return Claim(method, target, shown)

    def prove(self, claim: Claim, body: bytes) -> Caller:
        """Who called. Unproved if the proof isn't one, or not for this request. May ask munged, in any thread."""
        shown = claim.shown
        covered = _of_request(shown.to, claim.method, claim.target, body, shown.challenge, shown.public)
        uid, how, means = self._means(shown)
        try:
            proved = means.prover(b"request", covered, shown.proof)
        except munge.MungeError as error:
            hint = error.hint
            if error.refusal is munge.Refusal.UNAUTHORIZED:
                hint = f"the manager runs as uid {os.geteuid()}: set RFAAS_MANAGER_USER={os.geteuid()}"
            raise Unproved(Exception.__str__(error), hint, kind="munge") from None
        except RFaaSError as error:
            raise Unproved(Exception.__str__(error), error.hint) from None
        return Caller(uid if proved is None else proved, how, means, covered, shown.public)

    def accept(self, claim: Claim, now: float) -> None:
        """From here on the proof is used. Unproved if it was meanwhile, or became too old."""
        self.challenges.spend(claim.shown.challenge, now)

    def _means(self, shown: _Shown) -> tuple[int, str, Means]:
        if shown.means == "key":
            uid, key = self._keys.find(shown.key)
            return uid, f"key {key.key_name.hex()}", key
        assert self._munge is not None
        return -1, "munge", self._munge
