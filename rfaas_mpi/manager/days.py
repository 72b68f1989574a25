"""What was used on each day (UTC), for longer than each worker's own line is kept. Pure.

    a worker's line ── what is more than before ──▶ its day's sums: of its user, node, job and kernels

A worker that runs past midnight counts on both days, by when its agent told what it had used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from datetime import UTC, date, datetime, timedelta

import msgspec

from rfaas_mpi.manager.accounts import OTHERS, RECORD, Usage

__all__ = ["DAY_S", "Days", "JOBS_MAX", "Period", "SUMS", "Told", "day_of", "moment", "period"]

DAY_S = 86400
JOBS_MAX = 1000                  # of one user and day that are kept apart
SUMS = ("workers", "core_s", "memory_byte_s", "cpu_s", "exec_s", "poll_s", "invocations")
_EPOCH = date(1970, 1, 1)
_AGO = re.compile(r"P(?=\d)(?:(\d{1,4})Y)?(?:(\d{1,5})M)?(?:(\d{1,5})W)?(?:(\d{1,6})D)?", re.ASCII)
_HOURS_AGO = re.compile(r"PT(?=\d)(?:(\d{1,6})H)?(?:(\d{1,6})M)?", re.ASCII)
_HINT = "it is a date like 2026-11-01, or how long ago in days, weeks, months or years: P7D, P2W, P1M, P1Y"


class Told(msgspec.Struct, frozen=True):
    """What is known of a worker: all that it had used when its agent last told."""

    held_s: float = 0.0
    cpu_s: float = 0.0
    exec_s: float = 0.0
    poll_s: float = 0.0
    invocations: int = 0
    kernels: Mapping[str, tuple[float, int]] = {}          # name → seconds, calls


class Days:
    """What is to be added to days' sums: by day, user, what a sum is of, and its name.

    Of what: "" for all that a user used, "node", "job" or "kernel".
    """

    def __init__(self) -> None:
        self.more: dict[tuple[int, int, str, str], list[float]] = {}

    def add(self, day: int, one: Usage, seat: Mapping[int, Told], job: str) -> None:
        """This line takes the place of what was known; `seat`: of all who sat there, by number."""
        before = seat.get(one.number)
        old = before or Told()
        more = (0 if before is not None or one.number == RECORD else 1,
                *_held(one, seat), one.cpu_s - old.cpu_s, one.exec_s - old.exec_s, one.poll_s - old.poll_s,
                one.invocations - old.invocations)
        for what, name in (("", ""), ("node", one.node), ("job", job)):
            self._add((day, one.uid, what, name), more)
        if not one.kernels:
            return
        ran = {each.kernel: (each.exec_s, each.invocations) for each in one.kernels}
        for name in ran.keys() | old.kernels.keys():
            seconds, calls = ran.get(name, (0.0, 0))
            had_s, had_calls = old.kernels.get(name, (0.0, 0))
            self._add((day, one.uid, "kernel", name), (
                0 if name in old.kernels else 1, (seconds - had_s) * one.cores, (seconds - had_s) * one.memory_bytes,
                _share(seconds, one.cpu_s - one.poll_s, one.exec_s) - _share(had_s, old.cpu_s - old.poll_s, old.exec_s),
                seconds - had_s, 0.0, calls - had_calls))

    def _add(self, key: tuple[int, int, str, str], more: tuple[float, ...]) -> None:
        sums = self.more.setdefault(key, [0.0] * len(SUMS))
        for number, value in enumerate(more):
            sums[number] += value


def _held(one: Usage, seat: Mapping[int, Told]) -> tuple[float, float]:
    """Core-seconds and byte-seconds by which the seat's grow."""
    after = {number: told.held_s for number, told in seat.items()} | {one.number: one.held_s}
    more = _seat_s(after) - _seat_s({number: told.held_s for number, told in seat.items()})
    return more * one.cores, more * one.memory_bytes


def _seat_s(held_s: Mapping[int, float]) -> float:
    """For how long a seat was held: as its workers say, or the manager's record, whichever is more."""
    return max(sum(held for number, held in held_s.items() if number != RECORD), held_s.get(RECORD, 0.0))


def _share(kernel_s: float, cpu_s: float, exec_s: float) -> float:
    """A kernel's part of the CPU time that wasn't polling."""
    return cpu_s * kernel_s / exec_s if min(kernel_s, cpu_s, exec_s) > 1e-9 else 0.0


def job_of(job: str, known: Set[str]) -> str:
    """The name under which a job counts: its own, unless its user had too many that day."""
    return job if job in known or len(known) < JOBS_MAX else OTHERS


# --- periods ------------------------------------------------------------------

class Period(msgspec.Struct, frozen=True):
    """Days from `since` on and before `until`, counted from 1970; None: from the first, or up to today."""

    since: int | None = None
    until: int | None = None

    def __bool__(self) -> bool:
        return self.since is not None or self.until is not None

    def dates(self) -> tuple[str, str]:
        """Both as ISO 8601 has them, "" for None."""
        return _date(self.since), _date(self.until)


def day_of(at: float) -> int:
    """The day of a moment, which is in seconds since 1970."""
    return int(at // DAY_S)


def period(since: str, until: str, at: float) -> Period:
    """What was asked for at that moment; "" for what wasn't said. ValueError that names the field."""
    today = datetime.fromtimestamp(at, UTC).date()
    found = Period(_day("since", since, today), _day("until", until, today))
    if found.since is not None and found.until is not None and found.since >= found.until:
        raise ValueError(f"until is {until}, which is not after since, {since}: no day lies between them")
    return found


def moment(field: str, text: str, at: float) -> float | None:
    """Seconds since 1970: the begin of a day (UTC), or some hours and minutes before `at`; None for "". ValueError."""
    if (ago := _HOURS_AGO.fullmatch(text)) is not None:
        hours, minutes = (int(group or 0) for group in ago.groups())
        return at - 3600 * hours - 60 * minutes
    try:
        day = _day(field, text, datetime.fromtimestamp(at, UTC).date())
    except ValueError as error:
        raise ValueError(f"{error}, or in hours and minutes: PT12H, PT1H30M") from None
    return None if day is None else float(day * DAY_S)


def _day(field: str, text: str, today: date) -> int | None:
    if not text:
        return None
    try:
        if (ago := _AGO.fullmatch(text)) is None:
            return (date.fromisoformat(text) - _EPOCH).days
        years, months, weeks, days = (int(group or 0) for group in ago.groups())
        month = today.year * 12 + today.month - 1 - 12 * years - months
        # The 31st a month ago may be the 30th.
        day = _before(date(month // 12, month % 12 + 1, 1), today.day)
        return (day - timedelta(days=7 * weeks + days) - _EPOCH).days
    except (ValueError, OverflowError):
        raise ValueError(f"{field} is {text[:40]!r}: {_HINT}") from None


def _before(first: date, day: int) -> date:
    """That day of the month which begins with `first`, or its last one."""
    last = (first.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)
    return first.replace(day=min(day, last.day))


def _date(day: int | None) -> str:
    return "" if day is None else (_EPOCH + timedelta(days=day)).isoformat()
