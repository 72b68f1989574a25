"""MUNGE: credentials that say which user made them, believed by every node that shares the site's key.

libmunge is called through cffi, where it is installed; nothing is compiled. A
call is one round trip to the local munged over its Unix socket.
"""

from __future__ import annotations

import ctypes.util
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from rfaas_mpi.errors import AuthError, ServiceError

__all__ = ["Credential", "MungeError", "Refusal", "decode", "encode"]

ANY_USER = -1                        # MUNGE_UID_ANY
PAYLOAD_BYTES_MAX = 1 << 16          # ours: a credential carries a proof or a key, never data
TTL_MAX_S = 3600                     # munged's own bound, unless it is compiled otherwise
CREDENTIAL_BYTES_MAX = 1 << 18

_HEADER = """
typedef enum { MUNGE_OPT_TTL = 4, MUNGE_OPT_SOCKET = 8,
               MUNGE_OPT_UID_RESTRICTION = 9 } munge_opt_t;
typedef struct munge_ctx *munge_ctx_t;
munge_ctx_t munge_ctx_create(void);
void munge_ctx_destroy(munge_ctx_t ctx);
const char *munge_ctx_strerror(munge_ctx_t ctx);
int munge_ctx_set(munge_ctx_t ctx, munge_opt_t option, ...);
int munge_encode(char **credential, munge_ctx_t ctx, const void *data, int size);
int munge_decode(const char *credential, munge_ctx_t ctx, void **data, int *size, uint32_t *uid, uint32_t *gid);
const char *munge_strerror(int error);
void free(void *memory);
"""


class Refusal(IntEnum):
    """Why a credential is not believed: libmunge's numbers, as in munge.h."""

    SOCKET = 6
    BAD_CREDENTIAL = 8
    BAD_VERSION = 9
    BAD_CIPHER = 10
    BAD_MAC = 11
    BAD_ZIP = 12
    BAD_REALM = 13
    INVALID = 14
    EXPIRED = 15
    REWOUND = 16
    REPLAYED = 17
    UNAUTHORIZED = 18
    OTHER = -1


_HINTS = {
    Refusal.EXPIRED: "synchronise the clocks of both nodes",
    Refusal.REWOUND: "it was made in this node's future: synchronise the clocks of both nodes",
    Refusal.INVALID: "both nodes need the same munge.key",
    Refusal.SOCKET: "is munged running here, and is its socket the one that was named?",
}


class MungeError(AuthError):
    """A credential could not be made, or is not believed; `refusal` says why."""

    refusal: Refusal = Refusal.OTHER


@dataclass(frozen=True)
class Credential:
    """Who made a credential, by the word of his node's munged, and what it carries."""

    uid: int
    gid: int
    payload: bytes


@cache
def _library() -> tuple[Any, Any]:
    try:
        from cffi import FFI
    except ImportError as error:
        raise ServiceError("MUNGE needs the package cffi", hint="pip install 'rfaas_mpi[cluster]'") from error
    ffi = FFI()
    ffi.cdef(_HEADER)
    name = ctypes.util.find_library("munge") or "libmunge.so.2"
    try:
        return ffi, ffi.dlopen(name)
    except OSError as error:
        raise ServiceError(f"this node has no libmunge: {error}",
                           hint="install it (Debian: apt-get install libmunge2 munge)") from error


class _Context:
    """A libmunge context; close() frees it."""

    def __init__(self, socket: str) -> None:
        self.ffi, self.lib = _library()
        self._ctx = self.lib.munge_ctx_create()
        if self._ctx == self.ffi.NULL:
            raise MemoryError("libmunge has no memory for a context")
        self._kept = self.ffi.new("char[]", socket.encode()) if socket else None
        if self._kept is not None:
            self.set(self.lib.MUNGE_OPT_SOCKET, self._kept)

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the context; safe to call twice."""
        ctx, self._ctx = self._ctx, self.ffi.NULL
        if ctx != self.ffi.NULL:
            self.lib.munge_ctx_destroy(ctx)

    def set(self, option: int, value: Any) -> None:
        self.check(self.lib.munge_ctx_set(self._ctx, option, value), "a setting")

    def encode(self, payload: bytes) -> bytes:
        out = self.ffi.new("char **")
        self.check(self.lib.munge_encode(out, self._ctx, payload, len(payload)), "a credential can't be made")
        try:
            return bytes(self.ffi.string(out[0]))
        finally:
            self.lib.free(out[0])

    def decode(self, credential: bytes) -> Credential:
        data, size = self.ffi.new("void **"), self.ffi.new("int *")
        uid, gid = self.ffi.new("uint32_t *"), self.ffi.new("uint32_t *")
        rc = self.lib.munge_decode(credential, self._ctx, data, size, uid, gid)
        try:
            # Expired and replayed ones come with their payload: it is not to be used.
            self.check(rc, "the credential is not believed")
            return Credential(uid[0], gid[0], bytes(self.ffi.buffer(data[0], size[0])) if size[0] else b"")
        finally:
            if data[0] != self.ffi.NULL:
                self.lib.free(data[0])

    def check(self, rc: int, what: str) -> None:
        if rc == 0:
            return
        why = self.lib.munge_ctx_strerror(self._ctx)
        if why == self.ffi.NULL:
            why = self.lib.munge_strerror(rc)
        refusal = Refusal(rc) if rc in set(Refusal) else Refusal.OTHER
        error = MungeError(f"MUNGE: {what}: {self.ffi.string(why).decode(errors='replace')}",
                           hint=_HINTS.get(refusal, ""))
        error.refusal = refusal
        raise error


def encode(payload: bytes = b"", *, reader_uid: int = ANY_USER, ttl_s: int = 0, socket: str = "") -> bytes:
    """A credential for `payload`, made as the calling user.

    Only `reader_uid` (and root, for himself) may decode it, if given. It is
    believed for `ttl_s` seconds (0: munged's own setting, usually 300).
    `socket` is munged's; "" the one that libmunge was built with. Raises
    MungeError where munged can't be asked, ServiceError without libmunge.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a credential carries up to {PAYLOAD_BYTES_MAX} bytes, not {len(payload)}")
    if not 0 <= ttl_s <= TTL_MAX_S:
        raise ValueError(f"ttl_s is 0 to {TTL_MAX_S}, not {ttl_s}")
    with _Context(socket) as context:
        context.set(context.lib.MUNGE_OPT_TTL, context.ffi.cast("int", ttl_s))
        if reader_uid != ANY_USER:
            context.set(context.lib.MUNGE_OPT_UID_RESTRICTION, context.ffi.cast("uint32_t", reader_uid))
        return context.encode(payload)


def decode(credential: bytes, *, socket: str = "") -> Credential:
    """Who made the credential; the second time on this node is refused as a replay.

    Raises MungeError for what is not to be believed: changed, expired, made with
    another key, for another reader, or used before.
    """
    if len(credential) > CREDENTIAL_BYTES_MAX or b"\0" in credential:
        error = MungeError(f"MUNGE: {len(credential)} bytes are no credential")
        error.refusal = Refusal.BAD_CREDENTIAL
        raise error
    with _Context(socket) as context:
        return context.decode(credential)
