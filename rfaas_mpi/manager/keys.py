"""The manager's keys: which it has, where they lie, and what it signs and seals with them.

    grant.key        signs grants                        rotate: makes grant.key.next
    grant.key.next   signs for agents that know it       retire: it takes grant.key's place
    secret.key       leases' secrets are derived from it, so that none of them is on disk

Each is 32 random bytes in a file of mode 0600 in the manager's state directory.
"""

from __future__ import annotations

import hmac
import os
import secrets
import struct
from collections.abc import Collection
from pathlib import Path

from rfaas_mpi import api
from rfaas_mpi.errors import AuthError, ConfigError, ServiceError
from rfaas_mpi.leases import Lease
from rfaas_mpi.leases.grants import AgentClock, GrantBody, GrantSigner, key_id, seal_secret
from rfaas_mpi.manager.directory import Registration
from rfaas_mpi.remote import make_key, read_key

__all__ = ["Keys", "check_agent_key", "name_of", "retire", "rotate", "show"]

GRANT, NEXT, SECRET = "grant.key", "grant.key.next", "secret.key"
_HINT = "only the manager's user may read its keys; if others could, remove the file: the manager makes another"


class Keys:
    """What a manager signs grants with (one key, or two while they rotate) and derives secrets from."""

    def __init__(self, secret: bytes, signers: Collection[bytes]) -> None:
        self._secret = secret
        self._signers = [GrantSigner(each) for each in signers]
        self._directory: Path | None = None

    @classmethod
    def fresh(cls) -> Keys:
        """Keys that nobody has seen and that are gone with the process."""
        return cls(secrets.token_bytes(32), [secrets.token_bytes(32)])

    @classmethod
    def of(cls, directory: Path) -> Keys:
        """Those of a state directory, made where there are none. ConfigError where others could read them."""
        keys = cls(_made(directory / SECRET), _signers(directory))
        keys._directory = directory
        return keys

    def again(self) -> bool:
        """Looks into the directory once more; True if other keys sign now. ConfigError as `of`."""
        if self._directory is None:
            return False
        before = self.public
        self._signers = [GrantSigner(each) for each in _signers(self._directory)]
        return self.public != before

    @property
    def public(self) -> tuple[bytes, ...]:
        """The public keys whose grants agents believe, the oldest first."""
        return tuple(signer.public for signer in self._signers)

    @property
    def mark(self) -> str:
        """Tells managers apart whose leases would have other secrets; no key is learned from it."""
        return hmac.digest(self._secret, b"mark", "sha256")[:16].hex()

    def secret(self, lease: int, epoch: int) -> bytes:
        """The secret of a lease: always the same one."""
        return hmac.digest(self._secret, b"lease" + struct.pack("<QQ", lease, epoch), "sha256")

    def grant(self, lease: Lease, to: Registration, *, seen_ns: int, hard_end_ns: int | None,
              believed: Collection[bytes]) -> bytes:
        """The lease's grant for that agent, by the newest key that it believes. ConfigError if it is too large."""
        signer = next((each for each in reversed(self._signers) if each.public in believed), self._signers[0])
        secret = self.secret(lease.id, lease.epoch)
        return signer.sign(GrantBody(
            grant_id=lease.id, node=to.node, seen=AgentClock(to.boot_id, to.incarnation, seen_ns),
            not_after_ns=lease.not_after_ns, lease=lease.id, epoch=lease.epoch, uid=lease.uid,
            workers=lease.workers, memory_per_worker=lease.memory_per_worker, hard_end_ns=hard_end_ns,
            sealed=seal_secret(to.key, secret, lease.id, lease.epoch)))

    def lent(self, lease: Lease, to: Registration, *, seen_ns: int, hard_end_ns: int | None,
             hard_end_in_s: float | None, believed: Collection[bytes]) -> api.LentLease:
        """What the lease's rank is told. ConfigError for a lease whose grant is too large."""
        grant = self.grant(lease, to, seen_ns=seen_ns, hard_end_ns=hard_end_ns, believed=believed)
        return api.LentLease(
            id=lease.id, epoch=lease.epoch, node=lease.node, host=to.host, workers=lease.workers,
            memory_per_worker=lease.memory_per_worker, hard_end_in_s=hard_end_in_s, grant=grant,
            secret=self.secret(lease.id, lease.epoch), addresses=to.addresses)


def check_agent_key(public: bytes) -> None:
    """ConfigError for a public key to which no secret can be sealed."""
    seal_secret(public, bytes(32), 0, 0)


def name_of(public: bytes) -> str:
    """The name by which grants and logs tell public keys apart."""
    return key_id(public).hex()


# --- files --------------------------------------------------------------------

def _read(path: Path) -> bytes:
    try:
        return read_key(path)
    except AuthError as problem:
        raise ConfigError(Exception.__str__(problem), hint=_HINT) from None


def _made(path: Path) -> bytes:
    try:
        return make_key(path)
    except AuthError as problem:
        raise ConfigError(Exception.__str__(problem), hint=_HINT) from None


def _signers(directory: Path) -> list[bytes]:
    signers = [_made(directory / GRANT)]
    if (directory / NEXT).exists():
        try:
            signers.append(_read(directory / NEXT))
        except ConfigError:
            # `retire` renames it: it may have just become the other one.
            if (directory / NEXT).exists():
                raise
            signers = [_read(directory / GRANT)]
    return signers


def show(directory: Path) -> tuple[bytes, ...]:
    """The public keys of a state directory, the oldest first. ConfigError where there are none, or others read them."""
    if not (directory / GRANT).exists():
        raise ConfigError(f"{directory} holds no key of a manager",
                          hint="name the directory of one with --directory; its first start makes the keys")
    return tuple(GrantSigner(each).public for each in _signers(directory))


def rotate(directory: Path) -> tuple[bytes, ...]:
    """Makes the next key, of which a manager that runs tells its agents. ServiceError if there is one already."""
    keys = show(directory)
    if len(keys) > 1:
        raise ServiceError("the manager has a next key already",
                           hint="once all agents know it, `rfaas manager key retire` ends the rotation")
    _made(directory / NEXT)
    return show(directory)


def retire(directory: Path) -> tuple[bytes, ...]:
    """Removes the older key: agents stop believing it. ServiceError if there is only one."""
    if len(show(directory)) < 2:
        raise ServiceError("the manager has one key only", hint="`rfaas manager key rotate` makes the next one")
    os.replace(directory / NEXT, directory / GRANT)
    return show(directory)
