"""Which pilots are queued and taken out again, by what Slurm says; no Slurm runs here."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from rfaas_mpi.cli import main
from rfaas_mpi.slurm import facts, pilots
from rfaas_mpi.slurm.facts import Job, Nodes
from rfaas_mpi.slurm.pilots import Cancel, Filling, Submit, Wanted

NAME = "rfaas-pilot-1"


def job(number: int, state: str = "PD", minutes: int = 8, *, user: str = "ada", name: str = NAME,
        reason: str = "Resources", where: str = "", excluded: tuple[str, ...] = (), left_s: int | None = None,
        partition: str = "low") -> Job:
    return Job(str(number), user, (partition,), state, reason, where, excluded, minutes * 60, left_s, name)


def other(number: int = 99, **changes: object) -> Job:
    return job(number, **{"user": "bob", "name": "app", "partition": "high", **changes})  # type: ignore[arg-type]


def nodes(state: str = "allocated", *names: str, partition: str = "low", limit_s: int | None = None) -> Nodes:
    return Nodes(partition, state, names or ("n1", "n2", "n3", "n4"), limit_s)


def filling(nodes_max: int = 3, **options: object) -> Filling:
    return Filling(Wanted("low", nodes_max, **options), "ada", NAME)  # type: ignore[arg-type]


def lengths(actions: list[pilots.Action]) -> list[int]:
    return [action.minutes for action in actions if isinstance(action, Submit)]


def cancelled(actions: list[pilots.Action]) -> list[str]:
    return [action.job for action in actions if isinstance(action, Cancel)]


def test_no_more_run_and_wait_together_than_may_run():
    assert lengths(filling(3).look([], [nodes()], 0.0)) == [90, 56, 34]
    have = [job(1, "R", where="n1"), job(2, minutes=90)]
    assert lengths(filling(3).look(have, [nodes()], 0.0)) == [56]
    assert lengths(filling(30, queued_max=4).look(have, [nodes()], 0.0)) == [56, 34, 22]
    assert cancelled(filling(1).look([job(1), job(2, minutes=90), job(3, minutes=2)], [nodes()], 0.0)) == ["1", "2"]


def test_the_queue_holds_a_mix_of_all_lengths_that_the_partition_allows():
    downwards = [*reversed(pilots.LENGTHS)]
    assert lengths(filling(20).look([], [nodes()], 0.0)) == [*downwards, *downwards, 90, 56]
    assert lengths(filling(4).look([], [nodes(limit_s=600)], 0.0)) == [8, 6, 4, 2]
    one = filling(4)
    assert one.look([], [nodes(limit_s=60)], 0.0) == [] and not one.lengths


def test_while_others_wait_for_resources_no_pilot_waits():
    shared = [nodes(), nodes(partition="high")]
    have = [job(1, "R", where="n1"), job(2)]
    assert filling().look([*have, other()], shared, 0.0) == [Cancel("2", "others wait for resources")]
    assert lengths(filling().look([*have, other(reason="Dependency")], shared, 0.0)) == [90]
    assert lengths(filling(busy_max=1).look([*have, other()], shared, 0.0)) == [90]
    # One that waits for nodes that pilots have no part in harms nobody.
    apart = [nodes(), nodes("allocated", "gpu1", partition="high")]
    assert lengths(filling().look([*have, other()], apart, 0.0)) == [90]


def test_who_has_just_come_and_is_about_to_start_takes_no_pilot_out_of_the_queue():
    shared, one = [nodes(), nodes(partition="high")], filling(1)
    assert one.look([job(1)], shared, 0.0) == []
    assert one.look([job(1), other(5)], shared, 10.0) == []
    assert one.look([job(1), other(6)], shared, 20.0) == []
    assert cancelled(one.look([job(1), other(6)], shared, 30.0)) == ["1"] and one.busy
    array = replace(other(7), id="7_[1-9]"), replace(other(7), id="7_[4-9]")
    one = filling(1)
    one.look([job(1)], shared, 0.0)
    assert one.look([job(1), array[0]], shared, 10.0) == []
    assert cancelled(one.look([job(1), array[1]], shared, 20.0)) == ["1"]


@pytest.mark.parametrize("state", ["maint", "reserved", "drained", "draining", "drained*", "idle~", "idle#", "idle%",
                                   "idle!", "idle$", "idle@", "powered_down", "reboot^"])
def test_nodes_in_such_a_state_are_left_alone(state):
    found = filling(1).look([], [nodes("idle", "n1"), nodes(state, "n2", "n3")], 0.0)
    assert found == [Submit(90, ("n2", "n3"))]
    assert filling(1).look([], [nodes(state, "n2", "n3")], 0.0) == []


@pytest.mark.parametrize("state", ["idle", "idle*", "mixed", "allocated", "completing", "down"])
def test_nodes_in_any_other_state_are_not(state):
    assert not pilots.left_alone(state)


def test_pilots_that_would_take_a_node_that_is_to_be_left_alone_are_queued_anew():
    look = [nodes("idle", "n1"), nodes("drained", "n2")]
    assert filling(1).look([job(1, minutes=90)], look, 0.0) == [
        Cancel("1", "other nodes are to be left alone"), Submit(90, ("n2",))]
    assert filling(1).look([job(1, minutes=90, excluded=("n2",))], look, 0.0) == []


def test_what_is_planned_for_a_pilot_that_waits_is_not_kept_from_it():
    look = [nodes("allocated", "n1"), nodes("planned", "n2")]
    assert filling(1).look([], look, 0.0) == [Submit(90, ("n2",))]
    assert filling(1).look([job(1)], look, 0.0) == []
    assert filling(1).look([job(1, excluded=("n2",))], look, 0.0) == []


def test_a_pilot_that_is_too_long_for_what_is_idle_is_replaced_by_shorter_and_shorter_ones():
    look, one, now, minutes, seen = [nodes("idle")], filling(1), 0.0, 90, []
    for number in range(12):
        for _ in range(4):
            found = one.look([job(number, minutes=minutes)], look, now)
            now += 10.0
            if found:
                assert cancelled(found) == [str(number)]
                (minutes,) = lengths(found)
                seen.append(minutes)
                break
    assert seen == [14, 6, 4, 2]


def test_where_nothing_is_idle_or_slurm_shortens_pilots_itself_they_wait_on():
    for one, look in ((filling(1), [nodes()]), (filling(1, time_min=2), [nodes("idle")])):
        assert [one.look([job(1, minutes=90)], look, now) for now in (0.0, 30.0, 60.0)] == [[], [], []]


def test_a_pilot_whose_time_was_over_has_a_successor_at_once_and_one_that_gave_way_has_none():
    one = filling(2)
    assert one.look([job(1, "R", where="n1", left_s=100), job(2, "R", where="n2", left_s=1000)], [nodes()], 50.0) == []
    assert one.left("n2", 55.0) == []
    assert one.left("n9", 55.0) == []
    assert one.left("n1", 149.0) == [Submit(8)]
    assert one.left("n1", 149.0) == []
    one = filling(1, time_min=2)
    one.look([job(1, "R", minutes=3, where="n1", left_s=100)], [nodes()], 50.0)
    assert one.left("n1", 149.0) == [Submit(90)]


@pytest.mark.parametrize("state", ["draining", "drained*", "maint", "mixed@", "failing"])
def test_a_pilot_leaves_a_node_that_is_to_be_empty(state):
    have = [job(1, "R", where="n1"), job(2, "R", where="n2")]
    assert cancelled(filling(2).look(have, [nodes(state, "n1"), nodes("allocated", "n2")], 0.0)) == ["1"]


@pytest.mark.parametrize("state", ["allocated", "mixed", "completing", "allocated#", "planned"])
def test_a_pilot_stays_on_a_node_in_any_other_state(state):
    assert cancelled(filling(1).look([job(1, "R", where="n1")], [nodes(state, "n1")], 0.0)) == []


def test_a_suspended_pilot_is_taken_out():
    assert cancelled(filling(1).look([job(1, "S")], [nodes()], 0.0)) == ["1"]


def test_sbatch_is_asked_for_a_node_that_others_take_back():
    wanted = Wanted("low", 4, time_min=5, account="a b", qos="idle")
    options = pilots.batch_options(Submit(22, ("n1", "n2")), wanted, NAME, "/d/%N.log")
    assert {"--no-requeue", "--exclusive", "--nodes=1", "--time=22", "--time-min=5", "--nice=68", "--exclude=n1,n2",
            "--account=a b", "--qos=idle", "--partition=low", "--signal=USR1@5"} <= set(options)
    assert "--time-min=2" in pilots.batch_options(Submit(2), wanted, NAME, "/d/%N.log")


def test_queue_and_nodes_are_read_as_squeue_and_sinfo_print_them():
    shown = ("7|ada|low|R|None|n1||10:00|1-00:00:05|rfaas-pilot-1\n"
             "8_[1-9%2]|bob|high,low|PD|Resources||n[1-2]|UNLIMITED|INVALID|a|b c\nslurm says hello\n")
    first, second = facts.jobs(shown)
    assert first == Job("7", "ada", ("low",), "R", "None", "n1", (), 600, 86405, "rfaas-pilot-1")
    assert second == Job("8_[1-9%2]", "bob", ("high", "low"), "PD", "Resources", "", ("n1", "n2"), None, None, "a|b c")
    assert facts.nodes("low*|IDLE~|n[1-2],x|30:00\nhigh|mixed|n3|infinite\n") == (
        Nodes("low", "idle~", ("n1", "n2", "x"), 1800), Nodes("high", "mixed", ("n3",), None))


# --- preemption ------------------------------------------------------------------------------------

PARTITIONS = ("PartitionName=low AllowQos=ALL QoS=N/A GraceTime=0 MaxTime=1:00:00 Nodes=n[1-4] PriorityTier=1 "
              "PreemptMode=CANCEL TRESBillingWeights=CPU=0.5,Mem=0.1G\n"
              "PartitionName=high AllowQos=ALL QoS=N/A GraceTime=0 Nodes=n[3-4] PriorityTier=10 PreemptMode=OFF\n"
              "PartitionName=gpu QoS=spare GraceTime=0 Nodes=g[1-2] PriorityTier=1 PreemptMode=REQUEUE\n")
PRIO, QOS = "PreemptType             = preempt/partition_prio\n", "PreemptType   = preempt/qos\n"
KNOWN = "normal|spare|cluster|1.000000\nspare||cluster|0.250000\n"


@pytest.mark.parametrize("partition, config, qos, own, can, why", [
    ("low", PRIO, "", None, True, "jobs of high preempt those of low"),
    ("high", PRIO, "", None, False, "PreemptMode=OFF"),
    ("gpu", PRIO, "", None, False, "higher PriorityTier"),
    ("none", PRIO, "", None, False, "no partition none"),
    ("low", "PreemptType = preempt/none\n", "", None, False, "nothing is preempted"),
    ("low", QOS, KNOWN, "spare", True, "QOS normal preempt those of spare"),
    ("gpu", QOS, KNOWN, None, True, "QOS normal preempt those of spare"),
    ("low", QOS, KNOWN, "normal", False, "no QOS preempts normal"),
    ("low", QOS, KNOWN, None, None, "--qos spare"),
    ("low", QOS, "", "spare", None, "sacctmgr"),
])
def test_whether_pilots_would_give_way_is_told_by_the_configuration(partition, config, qos, own, can, why):
    found = pilots.preemption(partition, config, PARTITIONS, qos, own)
    assert found.preemptible is can and why in found.why, found
    assert bool(found.advice) is (can is not True)


def test_what_a_pilot_costs_is_told():
    assert pilots.preemption("low", PRIO, PARTITIONS, "", None).charges == ("TRESBillingWeights=CPU=0.5,Mem=0.1G",)
    assert pilots.preemption("gpu", QOS, PARTITIONS, KNOWN, None).charges[1] == "UsageFactor=0.250000 (QOS spare)"


def test_a_partition_that_is_not_there_is_named_with_those_that_are_and_only_a_name_gets_a_line():
    found = pilots.preemption("nosuch", PRIO, PARTITIONS, "", None)
    assert found.preemptible is False and found.why.startswith("there is no partition nosuch; there are ")
    assert any(line.startswith("PartitionName=nosuch ") for line in found.advice)
    assert pilots.preemption("a b;$(touch owned)", PRIO, PARTITIONS, "", None).advice == ()


def test_pilots_for_a_partition_that_is_not_there_are_refused_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr("rfaas_mpi.slurm.filling.look_up",
                        lambda partition, qos: pilots.preemption(partition, PRIO, PARTITIONS, "", qos))
    assert main(["slurm", "pilots", "--partition", "nosuch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rfaas: there is no partition nosuch; there are ") and "waiting" not in said
