"""What a manager keeps on disk: killed at any point it forgets no grant and repeats none."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from lease_manager import RemoteBook
from postgres_server import ledger_at
from test_lease_network import OPERATIONS, WITHIN_S, World

from rfaas_mpi import api
from rfaas_mpi.errors import StoreError
from rfaas_mpi.leases import (
    Action,
    Admit,
    AgentStarted,
    Answered,
    Cause,
    Changes,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Kept,
    Lease,
    LeaseState,
    LiveLease,
    NodeLost,
    NodeReport,
    Notify,
    Revoke,
)
from rfaas_mpi.manager import days as days_module
from rfaas_mpi.manager import ledger as ledger_module
from rfaas_mpi.manager import sqlite as sqlite_module
from rfaas_mpi.manager.accounts import KERNELS_MAX, OTHERS, RECORD, KernelUse
from rfaas_mpi.manager.credit import LentLine
from rfaas_mpi.manager.days import Period, day_of
from rfaas_mpi.manager.directory import Registration
from rfaas_mpi.manager.ledger import KEEP_ENDED_S, Ledger, Usage
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.manager.sqlite import SqliteFile, network_file_system
from rfaas_mpi.placement import pick_cores

GIB = 1 << 30
HERE = Path(__file__).parent


class Clock:
    """A monotonic clock and one on the wall, both of which can be set."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 50.0, 1.8e9

    def tick(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["a file", "a server"])
def place(request, tmp_path) -> str:
    """Where the test's ledger is, in words: a path or a URL."""
    return str(tmp_path / "ledger.db") if request.param == "a file" else request.getfixturevalue("postgres").database()


def opener(place: str, clock: Clock) -> Iterator[Callable[..., Ledger]]:
    """opens the one ledger of the test, again and again; the one before is left as a kill leaves it."""
    ledgers: list[Ledger] = []

    def open_ledger(**more: float) -> Ledger:
        for ledger in ledgers:
            ledger.close()
        ledgers.append(ledger_at(place, monotonic=lambda: clock.monotonic, wall=lambda: clock.wall, **more))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def opened(place, clock):
    """A ledger on each kind of store."""
    yield from opener(place, clock)


@pytest.fixture
def opened_file(tmp_path, clock):
    """One in a file."""
    yield from opener(str(tmp_path / "ledger.db"), clock)


def lease(number: int, **more: object) -> Lease:
    return Lease(**{"id": number, "epoch": number, "node": "n0", "session": 7, "uid": 1000, "request_id": number,
                    "workers": (GrantedWorker(0, (number,)),), "memory_per_worker": GIB, **more})


def changes_of(*leases: Lease, **more: object) -> Changes:
    answers = tuple(Answered(Demand(one.session, one.request_id, one.uid, 1, 1),
                             Grant(one.session, one.request_id, (one,))) for one in leases if one.state.live)
    return Changes(**{"epoch": max((one.epoch for one in leases), default=0), "leases": leases, "answers": answers,
                      **more})


# --- what is there again ----------------------------------------------------

def test_everything_that_was_written_is_there_again(opened):
    first, second = lease(2_000_000_000), lease(2_000_000_001, state=LeaseState.ACTIVE, seen_ns=5, incarnation=3)
    ledger = opened()
    ledger.write([changes_of(first, second, closed=(4, 5), drained={"n1": True, "n2": True})])
    ledger.write([Changes(epoch=0, drained={"n2": False})])
    kept = opened().load()
    assert kept == Kept(leases=[first, second], answers=list(changes_of(first, second).answers), closed=[4, 5],
                        drained=["n1"])
    assert opened().epoch == 2_000_000_001


def test_an_ended_lease_is_remembered_for_a_while_and_its_answer_with_it(opened, clock):
    one = lease(1)
    ended = msgspec.structs.replace(one, state=LeaseState.RELEASED, cause=Cause.RELEASED, workers=())
    ledger = opened()
    ledger.write([changes_of(one)])
    ledger.write([Changes(epoch=1, leases=(ended,))])
    kept = opened().load(remember_s=100.0)
    assert list(kept.leases) == [ended] and [answered.grant.leases for answered in kept.answers] == [(one,)]
    clock.tick(101.0)
    assert opened().load(remember_s=100.0) == Kept(leases=[], answers=[], closed=[], drained=[])


def test_of_too_many_that_ended_a_book_begins_with_the_last_and_with_those_that_were_lost(opened, clock):
    lost = msgspec.structs.replace(lease(1), state=LeaseState.LOST)
    ledger = opened()
    ledger.write([changes_of(lost)])
    for number in range(2, 12):
        clock.tick(60.0)
        ledger.write([changes_of(msgspec.structs.replace(lease(number), state=LeaseState.RELEASED))])
    assert [each.id for each in opened().load(remember_s=1e6, remember_most=5).leases] == [1, 7, 8, 9, 10, 11]
    # However many: those of the last two minutes.
    assert [each.id for each in opened().load(remember_s=1e6, remember_most=1).leases] == [1, 10, 11]


def test_what_ended_long_ago_is_removed_from_the_file(opened, clock, monkeypatch):
    monkeypatch.setattr(ledger_module, "PRUNE_EVERY", 1)
    ledger = opened()
    one = lease(1)
    ledger.write([changes_of(one, closed=(1,))], [used(1)])
    ledger.write([changes_of(msgspec.structs.replace(one, state=LeaseState.RELEASED))])
    ledger.write([changes_of(lease(2))])
    clock.tick(KEEP_ENDED_S + 1)
    ledger.write([])
    assert {table: ledger._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("leases", "answers", "closed", "usage")} == {
                "leases": 1, "answers": 1, "closed": 0, "usage": 0}


def test_of_a_node_that_is_forgotten_nothing_is_left(opened):
    ledger = opened()
    for known in ((Registration("n0/1000", "a", 1, "boot", bytes(32), ("tcp://n0:1",), "n0"),), ()):
        ledger.write([], agents={"n0/1000": known})
    assert ledger._db.execute("SELECT count(*) FROM agents").fetchone() == (0,)


def test_a_first_ledger_begins_above_what_one_before_it_may_have_given_out(opened, clock):
    assert opened().epoch == int(clock.wall)
    clock.tick(1000.0)
    assert opened().epoch == int(clock.wall) - 1000


def test_times_go_on_after_a_reboot(opened, clock, monkeypatch):
    ledger = opened()
    ledger.write([changes_of(lease(1, hard_end=clock.monotonic + 60.0, stopping=(0,), stop_by=clock.monotonic + 2.0))])
    clock.tick(10.0)
    assert opened().load().leases[0].hard_end == clock.monotonic + 50.0
    # The machine starts again: its monotonic clock does, too.
    clock.monotonic = 3.0
    monkeypatch.setattr(ledger_module, "_boot_id", lambda: "another boot")
    ledger = opened()
    kept = ledger.load()
    assert kept.leases[0].hard_end == pytest.approx(53.0) and kept.leases[0].stop_by == pytest.approx(-5.0)
    assert kept.answers[0].grant.leases[0].hard_end == pytest.approx(53.0), "whoever asks again is told the same end"
    # And again, though nothing of that lease was written meanwhile.
    ledger.write([changes_of(lease(2))])
    assert opened().load().leases[0].hard_end == pytest.approx(53.0)
    clock.monotonic = 1003.0
    monkeypatch.setattr(ledger_module, "_boot_id", lambda: "a third boot")
    assert opened().load().leases[0].hard_end == pytest.approx(1053.0)


def test_a_wall_clock_that_jumps_changes_no_time_of_a_lease(opened, clock):
    ledger = opened()
    ledger.write([changes_of(lease(1, hard_end=clock.monotonic + 60.0))])
    clock.wall += 86400.0
    assert opened().load().leases[0].hard_end == clock.monotonic + 60.0


def test_a_write_is_flushed_to_the_disk_before_it_returns(opened_file):
    """No power cut here: what SQLite is told to do about one."""
    ledger = opened_file()
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)         # FULL
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- usage ------------------------------------------------------------------

def used(number: int, **more: object) -> Usage:
    return Usage(**{"node": "n0", "incarnation": 1, "number": number, "lease": 9, "uid": 1000, "cores": 2,
                    "memory_bytes": GIB, "held_s": 3.0, "cpu_s": 1.5, "invocations": 4, **more})


def test_whose_a_lease_was_is_known_as_long_as_it_is_kept(opened):
    ledger = opened()
    ledger.write([changes_of(lease(9), lease(10, uid=1001, node="n1"))])
    assert opened().owners([9, 10, 11]) == {9: (1000, "n0"), 10: (1001, "n1")}


def test_usage_counts_once_however_often_it_is_told(opened):
    ledger = opened()
    for _ in range(3):
        ledger.write([], [used(1), used(2, lease=10, uid=1001)])
    ledger.write([], [used(1, incarnation=2)])
    assert [(row["uid"], row["workers"], row["core_s"], row["invocations"]) for row in opened().usage()] == [
        (1000, 2, 12.0, 8), (1001, 1, 6.0, 4)]
    assert [row["node"] for row in opened().usage(by="node")] == ["n0"]
    with pytest.raises(StoreError, match="ask by uid"):
        opened().usage(by="uid; DROP TABLE usage")


def test_what_a_worker_has_used_so_far_takes_the_place_of_what_it_had(opened):
    ledger = opened()
    ledger.write([], [used(1, held_s=2.0, cpu_s=1.0, invocations=1)])
    ledger.write([], [used(1, held_s=5.0, cpu_s=4.0, invocations=9)])
    ledger.write([], [used(1, held_s=3.0, cpu_s=2.0, invocations=4)])      # that came late
    [row] = opened().usage()
    assert (row["workers"], row["core_s"], row["cpu_s"], row["invocations"]) == (1, 10.0, 4.0, 9)


def test_a_seat_is_charged_for_what_its_workers_held_or_the_manager_s_record_whichever_is_more(opened):
    ledger = opened()
    record = used(RECORD, held_s=10.0, cpu_s=0.0, invocations=0)
    ledger.write([], [used(1), used(2), record])
    [row] = ledger.usage()
    assert (row["workers"], row["core_s"], row["memory_byte_s"], row["cpu_s"]) == (2, 20.0, 10.0 * GIB, 3.0)
    # The agent is back, and knows better.
    ledger.write([], [used(2, held_s=8.0)])
    [row] = ledger.usage()
    assert (row["workers"], row["core_s"]) == (2, 22.0)
    ledger.write([], [record, used(3, seat=1)])
    [row] = ledger.usage()
    assert (row["workers"], row["core_s"]) == (3, 28.0)


def reporter(registry: Registry) -> Callable[..., None]:
    """report(clock_s, *live): node n0 says at that second of its own clock which leases live there."""
    def report(clock_s: int, *live: LiveLease) -> None:
        registry.handle(NodeReport(node="n0", spare=(0, 1), memory_bytes=8 * GIB, incarnation=1, live=live,
                                   clock_ns=clock_s * 10**9), float(clock_s))
        registry.reported("n0", 1, clock_s * 10**9)
    return report


def test_a_lost_lease_is_charged_until_its_agent_was_last_heard_of_and_a_later_word_of_it_isn_t_added(opened):
    ledger = opened()
    registry = Registry(ledger, pick_cores, 0.0)
    report = reporter(registry)
    report(1)
    registry.handle(Demand(session=7, request_id=1, uid=1000, workers_min=2, workers_max=2), 1.0)
    [granted] = registry.flush()
    [one] = granted.leases
    live = LiveLease(one.id, one.epoch, one.workers)
    report(2, live)
    registry.flush()
    report(9, live)
    registry.flush()
    registry.handle(NodeLost(node="n0"), 20.0)
    registry.flush()
    [row] = ledger.usage()
    assert (row["uid"], row["workers"], row["core_s"], row["cpu_s"]) == (1000, 0, 14.0, 0.0)
    # It was only cut off, and its workers ended later.
    registry.used([used(number, lease=one.id, seat=number - 1, cores=1, held_s=12.0) for number in (1, 2)])
    registry.flush()
    [row] = ledger.usage()
    assert (row["workers"], row["core_s"], row["cpu_s"]) == (2, 24.0, 3.0)


def test_sums_by_kernel_add_up_to_what_was_used(opened):
    ledger = opened()
    ledger.write([], [used(1, held_s=10.0, cpu_s=7.0, poll_s=1.0, exec_s=6.0, invocations=5, kernels=(
        KernelUse("pkg.price", 4.0, 3), KernelUse("pkg.sum", 2.0, 2))),
        used(2, held_s=10.0, exec_s=1.0, cpu_s=1.0, invocations=1, kernels=(KernelUse("pkg.price", 1.0, 1),))])
    rest, price, sums = ledger.usage(by="kernel")
    assert price == {"kernel": "pkg.price", "workers": 2, "core_s": 10.0, "memory_byte_s": 5.0 * GIB, "cpu_s": 5.0,
                     "exec_s": 5.0, "poll_s": 0.0, "invocations": 4}
    assert (sums["kernel"], sums["core_s"], sums["cpu_s"], sums["invocations"]) == ("pkg.sum", 4.0, 2.0, 2)
    assert (rest["kernel"], rest["core_s"], rest["cpu_s"], rest["poll_s"], rest["invocations"]) == (
        "", 26.0, 1.0, 1.0, 0)
    [row] = ledger.usage()
    for name in ("core_s", "memory_byte_s", "cpu_s", "exec_s", "poll_s", "invocations"):
        assert row[name] == sum(each[name] for each in (rest, price, sums)), name


def test_a_worker_s_kernels_are_those_of_its_latest_word(opened):
    ledger = opened()
    for kernels in ((KernelUse("a", 1.0, 1),), (KernelUse("b", 2.0, 1), KernelUse("c", 0.5, 1))):
        ledger.write([], [used(1, exec_s=3.0, kernels=kernels)])
    assert [row["kernel"] for row in opened().usage(by="kernel")] == ["", "b", "c"]


def test_numbers_that_no_database_holds_and_none_that_divide_to_nothing_are_no_error(opened):
    """Any user's own agent may send them: the manager writes them down, and whoever asks gets an answer."""
    ledger = opened()
    most, least = (1 << 60) - 1, 1e-200
    ledger.write([], [
        used(1, invocations=most, exec_s=1.0, kernels=tuple(KernelUse("a", 0.01, most) for _ in range(16))),
        used(2, held_s=least, cpu_s=least, exec_s=least, kernels=(KernelUse("b", least, 1),))])
    rest, many, little = opened().usage(by="kernel")
    assert (rest["kernel"], many["kernel"], little["kernel"]) == ("", "a", "b")
    assert many["invocations"] == 2**63 - 1 and little["cpu_s"] == pytest.approx(0.0)


def test_names_that_come_all_at_once_are_no_more_than_those_that_come_one_by_one(opened_file):
    opened_file().write([], [used(1 + number, exec_s=1.0, kernels=(KernelUse(f"k{number}", 1.0, 1),))
                             for number in range(KERNELS_MAX + 50)])
    assert len(opened_file().usage(by="kernel")) == KERNELS_MAX + 2, 'with "" and the others'


def test_a_user_who_makes_names_without_end_fills_nothing(opened_file):
    ledger = opened_file()
    for first in range(0, 3 * KERNELS_MAX, 10):
        ledger.write([], [used(1 + first + i, seat=first + i, exec_s=1.0, kernels=(KernelUse(f"k{first + i}", 1.0, 1),))
                          for i in range(10)])
    ledger.write([], [used(1, uid=1001, lease=10, exec_s=1.0, kernels=(KernelUse("mine", 1.0, 1),))])
    rows = {row["kernel"]: row["invocations"] for row in opened_file().usage(by="kernel")}
    assert len(rows) == KERNELS_MAX + 3 and rows[OTHERS] == 2 * KERNELS_MAX and rows["mine"] == 1
    assert sum(rows.values()) == 4 * (3 * KERNELS_MAX + 1)


def test_accounts_of_an_earlier_format_are_kept(opened_file, tmp_path):
    opened_file().close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as db:
        db.executescript("""
            DROP VIEW seats; DROP TABLE usage; DROP TABLE usage_kernels; DROP TABLE kernels; DROP TABLE usage_days;
            DROP TABLE heard; PRAGMA user_version=1;
            CREATE TABLE usage (
                node TEXT NOT NULL, incarnation INTEGER NOT NULL, number INTEGER NOT NULL,
                at REAL NOT NULL, lease INTEGER NOT NULL, uid INTEGER NOT NULL, kernel TEXT NOT NULL,
                cores INTEGER NOT NULL, memory_bytes INTEGER NOT NULL, held_s REAL NOT NULL, cpu_s REAL NOT NULL,
                exec_s REAL NOT NULL, poll_s REAL NOT NULL, invocations INTEGER NOT NULL,
                PRIMARY KEY (node, incarnation, number)) WITHOUT ROWID;
            INSERT INTO usage VALUES ('n0', 1, 7, 1e9, 3, 1000, '', 2, 5, 4.0, 2.0, 1.0, 3.0, 6);
        """)
    [row] = opened_file().usage(by="node")
    assert row == {"node": "n0", "workers": 1, "core_s": 8.0, "memory_byte_s": 20.0, "cpu_s": 2.0, "exec_s": 1.0,
                   "poll_s": 2.0, "invocations": 6}
    opened_file().write([], [used(7)])
    assert len(opened_file().usage()) == 1


def test_accounts_of_the_format_before_have_their_days(opened, clock):
    ledger = opened()
    record = used(RECORD, lease=11, node="n1", held_s=9.0, cpu_s=0.0, invocations=0)
    ledger.write([changes_of(lease(9))], [
        used(1, exec_s=1.0, kernels=(KernelUse("price", 1.0, 4),)), used(2, seat=1), used(3, lease=11, node="n1"),
        record], jobs={lease(9).session: "nightly"})
    days = {by: ledger.usage(by=by, period=Period(since=0)) for by in ("uid", "node", "job", "kernel")}
    with ledger._db.transaction():
        ledger._db.execute("DROP TABLE usage_days")
        for index in ("answers_last", "closed_at", "jobs_at", "usage_at"):
            ledger._db.execute(f"DROP INDEX {index}")
        ledger._db.execute("DROP TABLE heard")
        if isinstance(ledger._db, SqliteFile):
            ledger._db.execute("PRAGMA user_version=2")
        else:
            ledger._db.execute("UPDATE format SET version = 2")
    clock.wall += 40 * 86400.0
    later = opened()
    assert {by: later.usage(by=by, period=Period(since=0)) for by in days} == days
    assert days["job"] == [{**days["job"][0], "job": "", "core_s": 18.0}, {**days["job"][1], "job": "nightly"}]
    assert later.usage(period=Period(since=day_of(clock.wall) - 39)) == []


def test_what_was_used_is_known_by_day(opened, clock):
    ledger = opened()
    today = day_of(clock.wall)
    ledger.write([changes_of(lease(9))], [used(1, held_s=2.0, cpu_s=1.0, exec_s=1.0, invocations=1,
                                               kernels=(KernelUse("a", 1.0, 1),))], jobs={lease(9).session: "nightly"})
    clock.wall += 86400.0
    ledger.write([], [used(1, held_s=5.0, cpu_s=4.0, exec_s=4.0, invocations=9,
                           kernels=(KernelUse("a", 1.0, 1), KernelUse("b", 3.0, 8)))])
    ledger.write([], [used(1, held_s=3.0, cpu_s=2.0, invocations=4), used(2, uid=1001, lease=10, node="n1")])   # late

    def of(since: int | None, until: int | None, by: str = "uid", uid: int | None = None) -> list[tuple]:
        return [(row[by], row["workers"], row["core_s"], row["cpu_s"], row["invocations"])
                for row in opened().usage(by=by, uid=uid, period=Period(since, until))]
    assert of(today, today + 1) == [(1000, 1, 4.0, 1.0, 1)]
    assert of(today + 1, None) == [(1000, 0, 6.0, 3.0, 8), (1001, 1, 6.0, 1.5, 4)]
    assert of(None, today + 2, "node") == [("n0", 1, 10.0, 4.0, 9), ("n1", 1, 6.0, 1.5, 4)]
    assert of(today, None, "job", 1000) == [("nightly", 1, 10.0, 4.0, 9)]
    assert of(today + 1, None, "kernel", 1000) == [("", 0, 0.0, 0.0, 0), ("b", 1, 6.0, 3.0, 8)]
    assert of(None, today) == []
    with pytest.raises(StoreError, match="not told apart"):
        of(today, None, "lease")


def test_days_add_up_to_what_lines_say_whatever_order_they_come_in(opened, clock):
    """Of workers and the manager's own record of a seat, over a week."""
    ledger = opened()
    chance = random.Random(3)
    held = {(seat, number): 0.0 for seat in range(3) for number in range(4)}
    for _ in range(200):
        (seat, number), ago = chance.choice(list(held)), chance.random() < 0.2
        held_s = held[seat, number] * chance.random() if ago else held[seat, number] + chance.random()
        held[seat, number] = max(held_s, held[seat, number])
        ledger.write([], [used(number, seat=seat, held_s=held_s, cpu_s=held_s / 2, exec_s=held_s / 4,
                               invocations=int(100 * held_s))])
        clock.wall += 3000.0
    for by in ("uid", "node"):
        [days], [lines] = ledger.usage(by=by, period=Period(since=0)), ledger.usage(by=by)
        assert days == {name: pytest.approx(value) for name, value in lines.items()}


def test_sums_of_days_are_kept_longer_than_lines_and_not_for_ever(opened, clock):
    keep = 86400.0
    opened(keep_ended_s=keep).write([changes_of(lease(9))], [used(1)])
    clock.wall += 10 * 86400.0
    ledger = opened(keep_ended_s=keep, usage_days=20)
    ledger._prune()
    assert ledger.usage() == [] and ledger.usage(period=Period(since=0))[0]["core_s"] == 6.0
    clock.wall += 11 * 86400.0
    ledger._prune()
    assert ledger.usage(period=Period(since=0)) == []


def test_jobs_without_end_are_no_more_sums_of_a_day_than_a_user_may_have(opened_file, monkeypatch):
    monkeypatch.setattr(days_module, "JOBS_MAX", 3)
    ledger = opened_file()
    for number in range(1, 8):
        ledger.write([changes_of(lease(number, session=number))], jobs={number: f"job{number}"})
        ledger.write([], [used(number, lease=number)])
    rows = opened_file().usage(by="job", period=Period(since=0))
    assert [(row["job"], row["workers"]) for row in rows] == [(OTHERS, 4), ("job1", 1), ("job2", 1), ("job3", 1)]


def test_what_is_too_old_is_dropped_a_little_at_a_time_until_nothing_is_left(opened, clock, monkeypatch):
    monkeypatch.setattr(ledger_module, "PRUNE_MOST", 3)
    monkeypatch.setattr(ledger_module, "PRUNE_EVERY", 2)
    ledger = opened(keep_ended_s=86400.0)
    ended = [msgspec.structs.replace(lease(number), state=LeaseState.RELEASED) for number in range(1, 11)]
    for one in ended:
        ledger.write([Changes(epoch=one.id, leases=(one,), closed=(one.id,))], [
            used(1, lease=one.id, exec_s=1.0, kernels=(KernelUse("a", 1.0, 1),))], jobs={one.id: "nightly"},
            lent=[LentLine(one.id, 2000, one.uid, one.node, (), 1.0)])
    clock.wall += 2 * 86400.0

    def left() -> list[int]:
        with ledger._db.reading() as db:
            return [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                    for table in ("leases", "closed", "usage", "usage_kernels", "jobs", "lent")]
    assert left() == [10] * 6
    for group in range(12):
        before = left()
        ledger.write([Changes(epoch=100 + group)])
        assert all(old - new <= 3 for old, new in zip(before, left(), strict=True))
    assert left() == [0] * 6


def test_a_node_that_dies_while_no_manager_is_there_is_charged_until_it_was_last_heard_of(opened):
    ledger = opened()
    registry = Registry(ledger, pick_cores, 0.0)
    report = reporter(registry)
    report(1)
    registry.handle(Demand(session=7, request_id=1, uid=1000, workers_min=2, workers_max=2), 1.0)
    [granted] = registry.flush()
    [one] = granted.leases
    for clock_s in (2, 30, 59, 63, 90):
        report(clock_s, LiveLease(one.id, one.epoch, one.workers))
        registry.flush()
    later = opened()
    registry = Registry(later, pick_cores, 200.0)
    registry.handle(NodeLost(node="n0"), 300.0)
    registry.flush()
    [row] = later.usage()
    assert (row["uid"], row["workers"], row["core_s"]) == (1000, 0, 2 * (63 - 2))


def test_counts_that_no_worker_can_have_reached_spoil_nobody_s_sums(opened):
    ledger = opened()
    ledger.write([], [used(number, invocations=2**60 - 1) for number in range(1, 10)] + [used(1, node="n1", uid=1001)])
    assert [(row["uid"], row["workers"], row["invocations"]) for row in ledger.usage()] == [
        (1000, 9, 2**63 - 1), (1001, 1, 4)]


def test_sums_that_can_t_be_read_are_an_error_that_names_the_file(opened):
    ledger = opened()
    ledger.close()
    with pytest.raises(StoreError, match=re.escape(ledger.name)):
        ledger.usage()


# --- a file that is no good -------------------------------------------------

def test_a_second_manager_is_refused(opened_file, tmp_path, monkeypatch):
    opened_file()
    monkeypatch.setattr(sqlite_module, "BUSY_S", 0.0)
    second = subprocess.run([sys.executable, "-c", (
        "import sys\nfrom pathlib import Path\nfrom rfaas_mpi.manager import ledger, sqlite\nsqlite.BUSY_S = 0.0\n"
        "ledger.Ledger(Path(sys.argv[1]))"), str(tmp_path / "ledger.db")], capture_output=True, text=True)
    assert second.returncode == 1 and "in use by another manager; stop that one first" in second.stderr


def test_a_damaged_file_is_an_error_that_names_the_way_out(opened_file, tmp_path):
    opened_file().write([changes_of(lease(1))])
    opened_file().close()
    (tmp_path / "ledger.db").write_bytes(os.urandom(16384))
    with pytest.raises(StoreError, match=r"ledger.db is damaged .*put a backup.*mv .*ledger.db"):
        opened_file()
    assert (tmp_path / "ledger.db").stat().st_size == 16384, "what is damaged is left as it was"


def test_pages_damaged_in_the_middle_are_an_error_that_names_the_way_out(opened_file, tmp_path):
    opened_file().write([changes_of(*(lease(number) for number in range(1, 2000)))])
    opened_file().close()
    with open(tmp_path / "ledger.db", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for page in range(8, size // 4096):
            file.seek(page * 4096)
            file.write(os.urandom(64))
    with pytest.raises(StoreError, match="is damaged .*put a backup"):
        opened_file().load()


def test_a_record_that_makes_no_sense_is_an_error_that_names_the_way_out(opened):
    ledger = opened()
    ledger.write([changes_of(lease(1))])
    ledger._db.execute("UPDATE leases SET body = '{}'")
    with pytest.raises(StoreError, match="makes no sense.*put a backup"):
        ledger.load()


def test_two_live_leases_on_one_core_are_an_error_and_no_start(opened):
    ledger = opened()
    ledger.write([changes_of(lease(1), lease(2, workers=(GrantedWorker(0, (1,)),)))])
    with pytest.raises(StoreError, match="core 1 of node n0 is in both"):
        Registry(ledger, pick_cores, 0.0)


def test_a_file_of_a_later_version_is_refused_untouched(opened_file, tmp_path):
    ledger = opened_file()
    ledger._db.execute(f"PRAGMA user_version={ledger_module.VERSION + 1}")
    with pytest.raises(StoreError, match="later version"):
        opened_file()


@pytest.mark.parametrize("trouble", ["no directory", "a directory", "a link"])
def test_a_place_that_can_t_hold_it_is_named(tmp_path, trouble):
    path = tmp_path / "sub" / "ledger.db"
    if trouble != "no directory":
        path.parent.mkdir()
    if trouble == "a directory":
        path.mkdir()
    if trouble == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"{path} can't be opened"):
        Ledger(path)


def test_a_network_file_system_is_refused_by_name(tmp_path, monkeypatch):
    assert network_file_system(0x6969) == "nfs" and network_file_system(0x0BD00BD0) == "lustre"
    # The kernel's word on a file system that everybody has.
    assert sqlite_module.file_system_magic(Path("/proc")) == 0x9FA0
    assert network_file_system(0x9FA0) == ""
    monkeypatch.setattr(sqlite_module, "file_system_magic", lambda path: 0x6969)
    with pytest.raises(StoreError, match=r"lies on a network file system \(nfs\).*local disk"):
        Ledger(tmp_path / "ledger.db")
    assert not (tmp_path / "ledger.db").exists()


def test_nothing_of_a_write_that_fails_is_there(opened):
    ledger = opened()
    ledger.write([changes_of(lease(1))])
    bad = changes_of(lease(2), closed=("no number",))        # a row that the file can't hold
    with pytest.raises(StoreError):
        ledger.write([changes_of(lease(3)), bad])
    assert [one.id for one in opened().load().leases] == [1]
    ledger = opened()
    ledger.write([changes_of(lease(3))])
    assert [one.id for one in opened().load().leases] == [1, 3]


def test_groups_that_waited_are_written_in_the_order_in_which_they_were_taken(opened):
    registry = Registry(opened(), pick_cores, 0.0)
    registry.handle(report(1), 0.0)
    registry.handle(Demand(session=7, request_id=1, uid=1000, workers_min=1, workers_max=1), 0.0)
    first = registry.take()
    registry.handle(NodeLost("n0"), 1.0)
    second = registry.take()
    # The first could not be written; the second brings it along.
    registry._unwritten.append(first)
    assert [type(action) for action in registry.write(second)] == [Grant, Notify]
    assert [one.state for one in opened().load().leases] == [LeaseState.LOST]


def test_only_a_group_with_news_and_one_that_failed_before_need_the_disk(opened):
    registry = Registry(opened(), pick_cores, 0.0)
    registry.handle(report(1), 0.0)
    assert not registry.must_write(registry.take())
    registry.handle(Demand(session=7, request_id=1, uid=1000, workers_min=1, workers_max=1), 0.0)
    granted = registry.take()
    assert registry.must_write(granted)
    registry._unwritten.append(granted)
    nothing = registry.take()
    assert registry.must_write(nothing)
    assert [type(action) for action in registry.write(nothing)] == [Grant]
    assert not registry.must_write(registry.take())


def test_an_agent_s_number_is_on_disk_before_it_is_told(opened):
    registry = Registry(opened(), pick_cores, 0.0)
    registry.handle(AgentStarted("n0", "a"), 0.0)
    (admit,) = registry.flush()
    assert isinstance(admit, Admit) and opened().epoch == admit.incarnation


# --- what became of leases -------------------------------------------------------

def event(number: int, **more: object) -> api.Event:
    return api.Event(**{"number": number, "at": 1.8e9, "node": "n0", "uid": 1000, "lease_id": number, "workers": (0, 1),
                        "cause": Cause.REVOKED, "grace_s": 1.5, **more})


def test_events_are_kept_and_found_by_number_user_node_lease_and_time(opened, clock):
    known = [event(1, at=clock.wall - 60), event(2, uid=1001, lease_id=1, cause=Cause.EXPIRED),
             event(5, node="n1/1001", uid=1001, workers=(), grace_s=0.0, cause=Cause.NODE_LOST)]
    opened().write([], events=known)
    ledger = opened()
    assert ledger.events() == api.Events(1, tuple(known), more=False)
    for bounds, numbers in (({"after": 1}, [2, 5]), ({"after": 2**70}, []), ({"uid": 1001}, [2, 5]), ({"uid": 9}, []),
                            ({"node": "n0"}, [1, 2]), ({"node": "n1"}, []), ({"lease": 1}, [1, 2]),
                            ({"lease": 1, "uid": 1000}, [1]), ({"since": clock.wall - 1}, [2, 5]),
                            ({"since": clock.wall + 1}, []), ({"since": clock.wall - 1, "after": 2}, [5]),
                            ({"node": "n0", "since": clock.wall - 1, "uid": 1001}, [2])):
        assert [one.number for one in ledger.events(**bounds).events] == numbers, bounds


def test_many_events_come_in_several_answers_none_left_out_and_none_twice(opened, monkeypatch):
    monkeypatch.setattr(ledger_module, "EVENTS_AT_ONCE", 3)
    ledger = opened()
    ledger.write([], events=map(event, range(1, 8)))
    answers, after = [], 0
    while not answers or answers[-1].more:
        answers.append(ledger.events(after=after))
        after = answers[-1].events[-1].number
    assert [[one.number for one in answer.events] for answer in answers] == [[1, 2, 3], [4, 5, 6], [7]]


def test_since_finds_all_of_it_though_the_clock_was_set_back(opened, clock):
    ledger = opened()
    ledger.write([], events=[event(1), event(2, at=clock.wall - 3600), event(3)])
    assert [one.number for one in ledger.events(since=clock.wall - 60).events] == [1, 3]


def test_an_event_that_is_written_again_is_there_once(opened):
    ledger = opened()
    for _ in range(2):
        ledger.write([], events=[event(1)])
    assert len(ledger.events().events) == 1


def test_events_are_forgotten_with_the_leases_of_their_time(opened, clock):
    ledger = opened(keep_ended_s=86400.0)
    ledger.write([], events=[event(1), event(2, at=clock.wall + 86400)])
    clock.tick(86401.0)
    ledger._prune()
    found = ledger.events()
    assert (found.first, [one.number for one in found.events]) == (2, [2])


def test_an_event_is_on_disk_with_the_change_that_it_tells_of_and_not_before(opened, clock):
    registry = Registry(opened(), pick_cores, 0.0, wall=lambda: clock.wall)
    registry.handle(report(1), 0.0)
    registry.handle(Demand(session=7, request_id=1, uid=1000, workers_min=2, workers_max=2), 0.0)
    (grant,) = registry.flush()
    (one,) = grant.leases
    registry.handle(Revoke(one.id, grace_s=2.0), 1.0)
    group = registry.take()
    assert opened().events().events == ()
    registry._ledger = opened()
    registry.write(group)
    (found,) = opened().events().events
    assert found == api.Event(found.number, clock.wall, "n0", 1000, one.id, (0, 1), Cause.REVOKED, 2.0)


def test_numbers_of_events_rise_over_managers_whatever_the_clock_says(opened, clock):
    def lost(registry: Registry, request: int) -> None:
        registry.handle(msgspec.structs.replace(report(1), node=f"n{request}"), 0.0)
        registry.handle(Demand(session=7, request_id=request, uid=1000, workers_min=1, workers_max=1), 0.0)
        registry.handle(NodeLost(f"n{request}"), 1.0)
        registry.flush()

    for request in range(1, 4):
        lost(Registry(opened(), pick_cores, 0.0, wall=lambda: clock.wall), request)
        clock.wall -= 1000.0
    numbers = [one.number for one in opened().events().events]
    assert numbers == [1_800_000_000_000, 1_800_000_000_001, 1_800_000_000_002]


# --- a disk that is full ----------------------------------------------------

def report(clock_ns: int, cores: int = 4) -> NodeReport:
    return NodeReport(node="n0", spare=tuple(range(cores)), memory_bytes=8 * GIB, incarnation=1, clock_ns=clock_ns,
                      live=())


def test_a_full_disk_grants_nothing_and_loses_nothing(opened_file, tmp_path):
    """The file may not grow any more; the file system's own limit is tried below."""
    registry = Registry(opened_file(), pick_cores, 0.0)
    registry.handle(report(1, cores=64), 0.0)
    registry.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    demands = [Demand(session=7, request_id=number, uid=1000, workers_min=1, workers_max=1) for number in range(30)]
    said: list[Action] = []
    failed = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "ledger.db-wal").stat().st_size + 20_000, hard))
    try:
        for demand in demands:
            registry.handle(demand, 1.0)
            try:
                said += registry.flush()
            except StoreError as error:
                assert "make room on that disk" in str(error)
                failed += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed > 0
    # As many as were said are on disk, and the others are said once there is room.
    written = {one.id for one in registry.book.leases}
    said += registry.flush()
    assert {one.id for grant in said if isinstance(grant, Grant) for one in grant.leases} == written
    assert len(written) == len(demands)
    assert {one.id for one in opened_file().load().leases} == written


def test_a_manager_on_a_full_file_system_goes_on_when_there_is_room(tmp_path):
    """On a tmpfs of its own, in a mount namespace of its own."""
    script = f"mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec {sys.executable} {HERE / 'full_disk.py'} {tmp_path}"
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    ran = subprocess.run(["unshare", "--mount", *as_root, "sh", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "every grant is there"


# --- a manager that is killed -----------------------------------------------

class KilledWorld(World):
    """The same network, with a manager in a process of its own and a store on a real disk."""

    def __init__(self, place: str, choose: random.Random) -> None:
        self.place = place
        self.choose = choose
        self.kills = 0
        self.seen: dict[int, tuple[int, int]] = {}           # lease → whose it is
        self.book: RemoteBook | None = None                  # type: ignore[assignment]
        super().__init__()

    def restart_manager(self) -> None:
        if self.book is not None:
            self.book.close()
        self.book = RemoteBook(self.place, self.now, WITHIN_S)

    def handle(self, events: list[Event], *, crash: str = "") -> None:
        if crash:
            self.kills += 1
            actions = self.book.handle_and_die(events, self.now, self.choose.randrange(4), self.choose.randrange(400))
            self.restart_manager()
        else:
            actions = self.book.handle(events, self.now)
        for action in actions:
            self.wire.append(action)
            if isinstance(action, Grant):
                self.grants += len(action.leases)
                for one in action.leases:
                    self.seen.setdefault(one.id, (action.session, action.request_id))
                    assert self.seen[one.id] == (action.session, action.request_id), "a lease's number came twice"

    def end(self) -> None:
        super().end()
        self.book.close()


def test_a_manager_killed_at_any_point_forgets_no_grant_and_repeats_none(place):
    """RFAAS_SOAK_KILLS sets how often."""
    kills = int(os.environ.get("RFAAS_SOAK_KILLS", "10" if place.startswith("postgresql:") else "20"))
    choose = random.Random(kills)
    world = KilledWorld(place, choose)
    often = {**OPERATIONS, World.manager_is_killed: 3}
    try:
        # How much is done before a kill depends on where it strikes.
        while world.kills < kills or world.grants <= kills:
            operation = choose.choices(list(often), list(often.values()))[0]
            operation(world, choose)
            world.check()
        world.end()
    finally:
        world.book.close()
    with contextlib.closing(ledger_at(place)) as ledger:
        assert not any(one.state.live for one in ledger.load(remember_s=1e9).leases)


CLOSE_UNDER_A_WRITER = """
import sys, threading
from pathlib import Path
from rfaas_mpi.errors import StoreError
from rfaas_mpi.manager.ledger import Ledger, Usage

def write(ledger, begun):
    for number in range(10**6):
        begun.set()
        try:
            # (Of a lease each: those of one seat are summed up with all that sat there.)
            ledger.write([], [Usage("nid1", 1, one, one, 1, 1, 1, 1.0, 1.0)
                              for one in range(300 * number, 300 * (number + 1))])
        except StoreError:
            return                       # it is closed

for round in range(20):
    ledger, begun = Ledger(Path(sys.argv[1]) / f"{round}.db"), threading.Event()
    writer = threading.Thread(target=write, args=(ledger, begun))
    writer.start()
    for _ in range(1 + round % 5):
        begun.clear()
        begun.wait()
    ledger.close()
    writer.join()
"""


def test_a_ledger_that_is_closed_while_somebody_writes_takes_nobody_down(tmp_path):
    done = subprocess.run([sys.executable, "-c", CLOSE_UNDER_A_WRITER, str(tmp_path)], capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0 and done.stderr == "", done
