"""What workers print: lines, which invocation of whose wrote each, and as many of them as a rank can bear.

A worker marks in its output who has written what stands before the mark
(csrc/output.h). What stands behind the last mark is the running invocation's,
if its page shows that nothing else can have written it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["Line", "Lines", "Listening", "Writer"]

_LINE_BYTES = 8192                   # longer lines are cut into pieces
_BURST_BYTES = 8 << 20               # of output that a worker may print at once …
_BYTES_PER_S = 4 << 20               # … and what it may print on and on
_HELD_BYTES = 1 << 20                # of output whose mark has not come

_WORD = (1 << 64) - 1
_MAGIC = b"\0\x1erfaas\x1e"          # struct rfm_mark
_DIGITS = 24                         # 16 of the invocation, 8 of the connection that it came by

_ID, _CONN, _COUNT = 0, 1, 6         # words of struct rfm_page …
_HEARD, _CLEAN, _MARKS, _TAKEN = 248, 249, 250, 251     # … and of its output


class Writer(NamedTuple):
    """An invocation, and the connection that it came by; 0: none, or nobody knows which."""

    invocation: int = 0
    connection: int = 0


class Line(NamedTuple):
    """A line, and who wrote it, as a Writer says it."""

    invocation: int
    text: str
    connection: int = 0


class Listening:
    """Reads a worker's output, so that the worker knows of it, and its page shows whose it is."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page

    def read(self, read: Callable[[], tuple[bytes, bool]]) -> tuple[bytes, bool, Writer | None]:
        """What `read` returns; and whose it is behind its last mark: None where that isn't known yet."""
        with memoryview(self._page) as raw, raw.cast("Q") as words:
            # Odd while we read: a call that ends meanwhile leaves a mark, whatever is left in the pipe.
            heard = words[_HEARD] | 1
            words[_HEARD] = heard
            try:
                before = _state(words)
                data, ended = read()
                after = _state(words)
                # Before we say that we read no more: marks are none of what it looks for.
                words[_TAKEN] = words[_TAKEN] + len(data) & _WORD
            finally:
                words[_HEARD] = heard + 1 & _WORD
            if words[_MARKS] == 0:
                return data, ended, Writer()
            known = before == after and before.count == before.clean
            # It goes on naming the connection of a call that has ended.
            return data, ended, (Writer(before.invocation, before.connection & 0xffffffff if before.invocation else 0)
                                 if known else None)


class _State(NamedTuple):
    """What a worker is at; the same twice if it was at the same all the time."""

    invocation: int
    connection: int                      # and whether it runs
    count: int
    clean: int
    again: int


def _state(words: memoryview[int]) -> _State:
    return _State(words[_ID], words[_CONN], words[_COUNT], words[_CLEAN], words[_ID])


class Lines:
    """Makes lines of a worker's output."""

    def __init__(self, now: float) -> None:
        self._cut = b""                      # the begin of a mark, perhaps
        self._held = b""                     # an unfinished line, or what has no mark yet
        self._owner: Writer | None = Writer()    # whose that is
        self._last: list[Line] = []          # of a flood
        self._allowance = float(_BURST_BYTES)
        self._filled_at = now
        self._dropped = 0
        self.since: float | None = None      # something waits since then

    def feed(self, data: bytes, now: float, owner: Writer | None = Writer()) -> list[Line]:
        """The lines that `data` completes, less what is too much. Behind its last mark it is `owner`'s; None: it has
        to wait for the next mark."""
        self._allowance = min(_BURST_BYTES, self._allowance + (now - self._filled_at) * _BYTES_PER_S)
        self._filled_at = now
        if len(data) > self._allowance:
            # Its last lines are still worth keeping: they say how it ended. More is not even looked at.
            data, self._cut = self._cut + data, b""
            kept = data if len(data) <= _LINE_BYTES else data[-_LINE_BYTES:].partition(b"\n")[2] or _half_mark(data)
            self._dropped += len(self._held) + len(data) - len(kept) + sum(len(line.text) + 1 for line in self._last)
            self._held = b""
            self._last = list(self._whole(kept, owner))
            lines = []
        else:
            self._allowance -= len(data)
            lines = [*self._left_out(f": it came faster than {_BYTES_PER_S >> 20} MiB/s")] if data else []
            lines += self._whole(data, owner)
        waits = bool(self._held or self._cut or self._last or self._dropped)
        self.since = (self.since or now) if waits else None
        return lines

    def flush(self) -> list[Line]:
        """The unfinished line, and what was left out, too."""
        lines = [*self._left_out("")]
        held, self._held, self._cut = self._held + self._cut, b"", b""
        if held:
            lines += _lines(held.removesuffix(b"\n"), self._owner or Writer())
        self.since = None
        return lines

    def _left_out(self, why: str) -> Iterator[Line]:
        dropped, self._dropped = self._dropped, 0
        last, self._last = self._last, []
        if dropped:
            yield Line(0, f"({dropped} bytes of output are left out{why})")
        yield from last

    def _whole(self, data: bytes, owner: Writer | None) -> Iterator[Line]:
        segments, tail = self._split(data)
        for writer, written in segments:
            written, self._held = self._held + written, b""
            if written:
                yield from _lines(written.removesuffix(b"\n"), writer)
        self._held += tail
        self._owner = owner
        if owner is None and len(self._held) <= _HELD_BYTES:
            return
        *whole, rest = self._held.split(b"\n")
        while len(rest) > _LINE_BYTES:
            whole.append(rest[:_LINE_BYTES])
            rest = rest[_LINE_BYTES:]
        self._held = rest
        if whole:
            yield from _lines(b"\n".join(whole), owner or Writer())

    def _split(self, data: bytes) -> tuple[list[tuple[Writer, bytes]], bytes]:
        """What has a mark behind it, and what has none."""
        data, self._cut = self._cut + data, b""
        if _MAGIC[:1] not in data:
            return [], data
        segments: list[tuple[Writer, bytes]] = []
        written, *rest = data.split(_MAGIC)
        for at, part in enumerate(rest):
            digits = part[:_DIGITS]
            if len(digits) < _DIGITS and at == len(rest) - 1:
                self._cut = _MAGIC + part
                return segments, written
            try:
                found = int(digits, 16) if digits.isalnum() else -1
            except ValueError:
                found = -1
            if found < 0:
                written += _MAGIC + part         # the kernel's own
                continue
            segments.append((Writer(*divmod(found, 1 << 32)), written))
            written = part[_DIGITS:]
        for length in range(len(_MAGIC) - 1, 0, -1):
            if written.endswith(_MAGIC[:length]):
                self._cut = written[-length:]
                return segments, written[:-length]
        return segments, written


def _half_mark(data: bytes) -> bytes:
    """What may be the begin of a mark, at the end of `data`."""
    _, begin, rest = data[1 - len(_MAGIC) - _DIGITS:].rpartition(_MAGIC[:1])
    return begin + rest if begin else b""


def _lines(written: bytes, writer: Writer) -> Iterator[Line]:
    for line in written.split(b"\n"):
        line = line.removesuffix(b"\r")
        for at in range(0, max(1, len(line)), _LINE_BYTES):
            yield Line(writer.invocation, line[at:at + _LINE_BYTES].decode("utf-8", "backslashreplace"),
                       writer.connection)
