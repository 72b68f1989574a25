"""Slurm is asked seldom, once for all who want to know, and what it said last stays while it says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rfaas_mpi.errors import ServiceError
from rfaas_mpi.slurm import facts, run
from rfaas_mpi.slurm.reader import EVERY_S, Pace, Reader


class Slurm:
    """Counts who asks, at a time of its own; says nothing while it is `away`."""

    def __init__(self) -> None:
        self.now, self.asked, self.away = 1000.0, 0, False

    def read(self) -> int:
        self.asked += 1
        if self.away:
            raise ServiceError("squeue failed: no answer")
        return self.asked

    def reader(self) -> Reader[int]:
        return Reader(self.read, clock=lambda: self.now)


def test_whoever_asks_within_ten_seconds_hears_the_same_and_slurm_is_asked_once():
    slurm = Slurm()
    reader = slurm.reader()
    assert [reader.look() for _ in range(100)] == [1] * 100 and slurm.asked == 1
    slurm.now += EVERY_S - 0.1
    assert reader.look() == 1 and 0.0 < reader.next_in_s < 0.2
    slurm.now += 0.1
    assert reader.look() == 2 and reader.age_s == 0.0


def test_what_was_read_last_stays_with_its_age_while_slurm_does_not_answer():
    slurm = Slurm()
    reader = slurm.reader()
    reader.look()
    slurm.away = True
    slurm.now += 50.0
    assert reader.look() == 1 and reader.age_s == 50.0 and "no answer" in reader.error
    slurm.away = False
    slurm.now += EVERY_S
    assert reader.look() == 3 and reader.age_s == 0.0 and not reader.error


def test_what_never_could_be_read_is_nothing():
    slurm = Slurm()
    slurm.away = True
    reader = slurm.reader()
    assert reader.look() is None and reader.age_s is None and reader.error


def test_slurm_that_does_not_answer_is_asked_less_and_less_often_until_it_does():
    pace, now, waits = Pace(), 0.0, []
    for _ in range(8):
        pace.failed(now)
        waits.append(pace.next_at - now)
        assert not pace.due(pace.next_at - 0.1) and pace.due(pace.next_at)
        now = pace.next_at
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    pace.answered(now)
    assert pace.next_at - now == EVERY_S


def test_a_job_s_end_is_its_own_among_the_tasks_of_an_array_and_none_where_it_has_no_limit():
    shown = "7|1795446577\n8|NONE\n9|1826982517\n"
    assert [facts.end_of(shown, job) for job in (7, 8, 9, 10)] == [1795446577.0, None, 1826982517.0, None]


def test_of_several_jobs_that_are_planned_for_a_node_the_first_one_counts():
    shown = "3|200|n[1-2]\n4|100|n1\n5|50|(null)\n6|N/A|n2\nnews of the cluster\n"
    assert facts.planned(shown) == {"n1": 100.0, "n2": 200.0}


def test_a_reservation_that_has_not_begun_ends_windows():
    shown = ("ReservationName=m StartTime=300 EndTime=400 Nodes=n[1-2] State=INACTIVE\n"
             "ReservationName=now StartTime=100 EndTime=400 Nodes=n3 State=ACTIVE\n"
             "ReservationName=licences StartTime=100 EndTime=400 Nodes=(null) State=INACTIVE\n")
    assert facts.reserved(shown) == {"n1": 300.0, "n2": 300.0}
    assert facts.reserved("No reservations in the system\n") == {}


def test_a_job_s_name_can_not_pass_for_another_job():
    true = "x9|7|ada|low|R|None|n1||10:00|9:00|mine\n8|ada|low|S|None|n1||10:00|9:00|rfaas-pilot"
    (found,) = facts.jobs(true, "x9|")
    assert (found.id, found.name) == ("7", "mine")


def test_what_is_asked_for_facts_is_not_narrowed_by_what_a_user_sets_for_his_own_eyes(monkeypatch):
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    said = run.read(["env"])
    assert "SQUEUE_USERS" not in said and "SLURM_TIME_FORMAT=%s\n" in said


def test_a_command_that_fails_is_no_answer():
    with pytest.raises(ServiceError, match="failed"):
        run.read(["ls", str(Path("/nowhere"))])
