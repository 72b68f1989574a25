"""What a session says over TCP, sealed: nobody on the way reads it, changes it, repeats it or leaves some of it out.

 record = length u32 · that many bytes, enciphered · tag (16 bytes)

A join carries the rank's environment, in which people keep passwords. TLS with
a shared key would do; Python has it from 3.13 on. Until then: the data is XORed
with SHAKE256(cipher key ‖ number), then authenticated with HMAC-SHA256(tag key,
number ‖ length ‖ data). Keys are made of the shared key and both nonces of the
session, for each direction its own, and number counts the records, so that no
pair of key and number is used twice.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from rfaas_mpi.errors import ServiceError

__all__ = ["Opener", "Sealer"]

RECORD_BYTES = 1 << 20               # a longer message is several records
TAG_BYTES = 16
_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")


class _Direction:
    """The keys of one direction, and the number of the next record."""

    def __init__(self, key: bytes, role: bytes, nonces: tuple[bytes, bytes]) -> None:
        secret = hmac.digest(key, b"seal " + role + b"".join(nonces), "sha256")
        self._cipher_key = hmac.digest(secret, b"cipher", "sha256")
        self._tag_key = hmac.digest(secret, b"tag", "sha256")
        self._number = 0

    def _cipher(self, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._cipher_key + _NUMBER.pack(self._number)).digest(len(data))
        mixed = int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")
        return mixed.to_bytes(len(data), "little")

    def _tag(self, length: bytes, data: bytes) -> bytes:
        return hmac.digest(self._tag_key, _NUMBER.pack(self._number) + length + data, "sha256")[:TAG_BYTES]


class Sealer(_Direction):
    """Makes records; `role` is who does."""

    def seal(self, data: bytes) -> bytes:
        """The records that carry `data`; to be sent in the order in which they were made."""
        records = []
        for at in range(0, len(data), RECORD_BYTES):
            piece = self._cipher(data[at:at + RECORD_BYTES])
            length = _LENGTH.pack(len(piece))
            records += [length, piece, self._tag(length, piece)]
            self._number += 1
        return b"".join(records)


class Opener(_Direction):
    """Takes records apart; `role` is who made them."""

    def __init__(self, key: bytes, role: bytes, nonces: tuple[bytes, bytes]) -> None:
        super().__init__(key, role, nonces)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> bytes:
        """What the records that are complete now carry. ServiceError for one that nobody sealed for us."""
        self._buffer += data
        opened = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if not 0 < size <= RECORD_BYTES:
                raise ServiceError("what came over TCP is not sealed as it should be")
            end = _LENGTH.size + size
            if len(self._buffer) < end + TAG_BYTES:
                break
            with memoryview(self._buffer) as whole:
                length, piece = bytes(whole[:_LENGTH.size]), bytes(whole[_LENGTH.size:end])
                tag = bytes(whole[end:end + TAG_BYTES])
            if not hmac.compare_digest(tag, self._tag(length, piece)):
                raise ServiceError("what came over TCP was changed on its way")
            opened.append(self._cipher(piece))
            self._number += 1
            del self._buffer[:end + TAG_BYTES]
        return b"".join(opened)
