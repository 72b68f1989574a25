"""Spare cores and memory of a node: machines of many shapes, and this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.agent.cores import (
    NodeFacts,
    Rank,
    SlurmFacts,
    launch_key,
    launcher_pid,
    lendable_memory,
    local_ranks,
    read_node_facts,
    slurm_facts,
    spare_cores,
)

GIB = 2**30


def machine(cores: int, *, threads: int = 1, sockets: int = 1, first: int = 0,
            **more) -> NodeFacts:
    """Linux' usual numbering: first all cores, then all second threads."""
    cpus = range(first, first + cores * threads)
    return NodeFacts(
        cpuset=tuple(cpus), core_of={cpu: first + (cpu - first) % cores for cpu in cpus},
        numa={cpu: (cpu - first) % cores * sockets // cores for cpu in cpus}, **more)


def bound(pid: int, *mask: int, **more) -> Rank:
    return Rank(pid=pid, mask=mask, **more)


def floating(facts: NodeFacts, pid: int = 1, **more) -> Rank:
    return Rank(pid=pid, mask=facts.cpuset, **more)


# --- shapes of machines -----------------------------------------------------

def test_a_two_core_vm_lends_one_core_and_keeps_core_0_for_the_rank():
    facts = machine(2)
    spare = spare_cores(facts, [floating(facts)])
    assert spare.cores == (1,) and set(spare.kept) == {0}


def test_before_anybody_joined_one_rank_is_expected():
    assert spare_cores(machine(4)).cores == (1, 2, 3)


def test_a_newcomer_that_floats_takes_no_lent_core_back_but_one_that_is_bound_to_it_does():
    facts = machine(2)
    first, second = floating(facts, 1, launch="a"), floating(facts, 2, launch="b")
    assert spare_cores(facts, [first, second]).cores == ()
    assert spare_cores(facts, [first, second], lent={1}).cores == (1,)
    assert spare_cores(facts, [first, bound(2, 1, launch="b")], lent={1}).cores == ()


def test_one_core_is_never_lent_and_the_reason_says_what_helps():
    spare = spare_cores(machine(1))
    assert spare.cores == () and "RFAAS_CORES" in spare.reason


def test_a_laptop_lends_whole_physical_cores_before_second_threads():
    facts = machine(4, threads=2)
    spare = spare_cores(facts, [floating(facts)])
    assert spare.cores == (1, 2, 3, 5, 6, 7)
    assert "shares its physical core" in spare.kept[4]


def test_two_threads_of_one_core_lend_nothing_to_their_own_sibling():
    spare = spare_cores(machine(1, threads=2))
    assert spare.cores == () and "share a physical core" in spare.reason


def test_a_large_node_lends_near_the_rank_first():
    facts = machine(64, threads=2, sockets=2)
    spare = spare_cores(facts, [bound(1, 40)])
    assert len(spare.cores) == 126
    assert spare.cores[:31] == tuple(c for c in range(32, 64) if c != 40)
    assert {spare.numa[core] for core in spare.cores[:31]} == {1}
    assert all(core < 64 for core in spare.cores[:62])
    assert 104 in spare.kept  # 40's second thread


def test_core_0_is_the_last_to_be_lent():
    facts = machine(4, threads=2)
    assert spare_cores(facts, [bound(1, 3)]).cores == (1, 2, 5, 6, 0, 4)


def test_a_cpuset_is_all_that_there_is():
    facts = machine(3, first=8, online=64)
    assert spare_cores(facts).cores == (9, 10)


# --- ranks ------------------------------------------------------------------

def test_local_ranks_are_counted_by_the_launcher_not_by_who_has_joined():
    facts = machine(8)
    first = floating(facts, 1, local_ranks=3, launch="a")
    assert spare_cores(facts, [first]).cores == (3, 4, 5, 6, 7)
    rest = [floating(facts, pid, local_ranks=3, launch="a") for pid in (2, 3)]
    assert spare_cores(facts, [first, *rest]).cores == (3, 4, 5, 6, 7)


def test_two_launches_at_once_need_the_cores_of_both():
    facts = machine(8)
    ranks = [floating(facts, 1, local_ranks=2, launch="a"),
             floating(facts, 2, local_ranks=3, launch="b")]
    assert len(spare_cores(facts, ranks).cores) == 3


def test_two_executors_of_one_rank_count_once():
    facts = machine(4)
    assert spare_cores(facts, [floating(facts), floating(facts)]).cores == (1, 2, 3)


def test_processes_without_a_launcher_count_one_by_one():
    facts = machine(4)
    ranks = [floating(facts, 1), floating(facts, 2)]
    assert spare_cores(facts, ranks).cores == (2, 3)


def test_a_bound_rank_keeps_its_cores_and_no_other():
    facts = machine(4)
    assert spare_cores(facts, [bound(1, 2)]).cores == (1, 3, 0)


def test_ranks_yet_to_join_keep_a_core_although_the_first_one_is_bound():
    facts = machine(8)
    spare = spare_cores(facts, [bound(1, 0, local_ranks=4, launch="a")])
    assert spare.cores == (4, 5, 6, 7)


def test_as_many_ranks_as_cores_leave_nothing_and_the_reason_says_so():
    facts = machine(2)
    spare = spare_cores(facts, [floating(facts, local_ranks=2)])
    assert spare.cores == () and "fewer ranks" in spare.reason


def test_ranks_bound_to_whole_sockets_are_told_to_bind_to_cores():
    facts = machine(4, sockets=2)
    ranks = [bound(1, 0, 1, local_ranks=2, launch="a"),
             bound(2, 2, 3, local_ranks=2, launch="a")]
    spare = spare_cores(facts, ranks)
    assert spare.cores == () and "--bind-to core" in spare.reason


def test_a_mask_that_lies_outside_of_our_cpuset_is_no_binding_here():
    facts = machine(4)
    assert spare_cores(facts, [bound(1, 60, 61)]).cores == (1, 2, 3)


# --- quota, settings, clusters ----------------------------------------------

@pytest.mark.parametrize("quota, cores", [
    (0.5, 0), (1.5, 0), (1.99, 0), (2.0, 1), (3.7, 2), (64.0, 7)])
def test_the_cpu_quota_bounds_what_is_lent(quota, cores):
    spare = spare_cores(machine(8, quota_cpus=quota))
    assert len(spare.cores) == cores
    assert cores or f"{quota:g} CPUs" in spare.reason
    assert len(spare.cores) + len(spare.kept) == 8


def test_lending_can_be_turned_off():
    spare = spare_cores(machine(8), lend="no")
    assert spare.cores == () and "RFAAS_LEND" in spare.reason


def test_a_setting_that_means_nothing_is_no_permission_to_lend():
    with pytest.raises(ValueError, match="auto"):
        spare_cores(machine(8), lend="perhaps")


def test_named_cores_are_lent_exactly_as_far_as_they_may_be_used():
    facts = machine(4, threads=2)
    spare = spare_cores(facts, [bound(1, 0)], only=(6, 2, 99))
    assert spare.cores == (6, 2) and set(spare.kept) == {0, 1, 3, 4, 5, 7}
    assert "99" in spare_cores(facts, only=(99,)).reason


def test_a_login_node_lends_nothing_unless_told_to():
    facts = machine(8, slurm_node=True)
    spare = spare_cores(facts)
    assert spare.cores == () and "RFAAS_LEND=yes" in spare.reason
    assert spare_cores(facts, lend="yes").cores != ()
    assert spare_cores(machine(8), slurm=SlurmFacts(configured=True)).cores == ()


def test_a_node_of_a_slurm_job_lends_the_job_s_spare_cores():
    facts = machine(8, slurm_node=True, online=64)
    assert spare_cores(facts, slurm=SlurmFacts(in_job=True, cpus=8)).cores != ()


def test_another_job_s_cores_are_never_lent_where_no_cgroup_keeps_us_off_them():
    facts = machine(64, slurm_node=True, online=64)
    spare = spare_cores(facts, slurm=SlurmFacts(in_job=True, cpus=4))
    assert spare.cores == () and "4 of 64" in spare.reason
    # The whole node, at a site that counts physical cores.
    whole = machine(32, threads=2, slurm_node=True, online=64)
    assert spare_cores(whole, slurm=SlurmFacts(in_job=True, cpus=32)).cores != ()


@given(cores=st.integers(1, 24), threads=st.integers(1, 2), sockets=st.integers(1, 3),
       quota=st.none() | st.floats(0.1, 40), data=st.data())
def test_every_core_is_either_lent_or_kept_with_a_reason(
        cores, threads, sockets, quota, data):
    facts = machine(cores, threads=threads, sockets=sockets, quota_cpus=quota)
    masks = st.lists(st.sampled_from(facts.cpuset), min_size=1, unique=True)
    ranks = data.draw(st.lists(st.builds(
        Rank, pid=st.integers(1, 9), mask=masks.map(tuple),
        local_ranks=st.integers(1, 9), launch=st.sampled_from(("", "a", "b"))),
        max_size=6))
    spare = spare_cores(facts, ranks)
    assert sorted([*spare.cores, *spare.kept]) == list(facts.cpuset)
    assert bool(spare.reason) == (not spare.cores)
    assert set(spare.numa) == set(spare.cores)
    for rank in ranks:
        if len(rank.mask) < len(facts.cpuset):
            lent = {facts.core_of[core] for core in spare.cores}
            assert lent.isdisjoint(facts.core_of[core] for core in rank.mask)
    if spare.cores:
        assert spare.cores[0] != 0 or set(spare.cores) <= {0, cores}


# --- memory -----------------------------------------------------------------

def test_memory_is_the_tightest_limit_less_the_reserve():
    facts = machine(2, memory_total=8 * GIB, memory_limit=4 * GIB)
    assert lendable_memory(facts, reserve=GIB) == 3 * GIB
    slurm = SlurmFacts(in_job=True, memory_bytes=2 * GIB)
    assert lendable_memory(facts, slurm, reserve=GIB) == GIB
    assert lendable_memory(facts, slurm, reserve=64 * GIB) == 0
    assert lendable_memory(machine(2), reserve=GIB) == 0


# --- what launchers say -----------------------------------------------------

@pytest.mark.parametrize("environ, count", [
    ({}, 1),
    ({"MPI_LOCALNRANKS": "4"}, 4),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "SLURM_TASKS_PER_NODE": "9"}, 3),
    ({"SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
    ({"SLURM_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
    ({"SLURM_TASKS_PER_NODE": "2(x3),5"}, 5),
    ({"SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2",
      "SLURM_NODEID": "0"}, 2),
    ({"SLURM_TASKS_PER_NODE": "2", "SLURM_NODEID": "7"}, 2),
    ({"MPI_LOCALNRANKS": "many", "SLURM_TASKS_PER_NODE": "?"}, 1),
    ({"MPI_LOCALNRANKS": "0"}, 1)])
def test_local_ranks_come_from_the_launcher_s_variables(environ, count):
    assert local_ranks(environ) == count


def test_the_ranks_of_one_launch_share_a_key_and_no_other_does():
    hydra = {"MPI_LOCALNRANKS": "2", "PMI_RANK": "0"}
    assert launch_key(hydra, 11, 10) == launch_key(hydra, 12, 10)
    assert launch_key(hydra, 21, 20) != launch_key(hydra, 11, 10)
    assert launch_key({}, 11, 10) != launch_key({}, 12, 10)
    srun = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1", "SLURM_PROCID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert launch_key(srun, 11, 10) == launch_key(srun, 12, 13)
    assert launch_key({**srun, "SLURM_STEP_ID": "2"}, 11, 10) != launch_key(srun, 11, 10)
    ompi = {"PMIX_NAMESPACE": "prterun-n-77@1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert launch_key(ompi, 11, 10) == launch_key(ompi, 12, 13)


def test_the_launcher_is_found_behind_wrapper_scripts():
    # launcher (this process) → sh with the rank's variables → rank
    show = ("import os; from rfaas_mpi.agent.cores import launcher_pid; "
            "print(launcher_pid(dict(os.environ), os.getpid()))")
    found = subprocess.run(
        ["sh", "-c", '"$0" -c "$1"; true', sys.executable, show],
        env={**os.environ, "MPI_LOCALNRANKS": "2"},
        stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert int(found.stdout) == os.getpid()


def test_a_process_that_is_gone_has_no_launcher(tmp_path):
    assert launcher_pid({"PMI_RANK": "0"}, 12, tmp_path) == 0


def test_slurm_says_what_the_job_has_on_this_node():
    environ = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1",
               "SLURM_JOB_CPUS_PER_NODE": "72(x2),36", "SLURM_CPUS_ON_NODE": "48",
               "SLURM_MEM_PER_CPU": "1024"}
    assert slurm_facts(environ) == SlurmFacts(
        in_job=True, cpus=48, memory_bytes=48 * GIB)
    environ |= {"SLURM_MEM_PER_NODE": "2048"}
    assert slurm_facts(environ).memory_bytes == 2 * GIB


def test_the_shell_of_an_allocation_on_a_login_node_is_not_in_the_job():
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "72"}
    assert slurm_facts(environ) == SlurmFacts()
    assert slurm_facts({"SLURM_CONF": "/x"}) == SlurmFacts(configured=True)


# --- reading /proc and /sys -------------------------------------------------

def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """4 cores with 2 threads each on 2 NUMA nodes, 16 GiB, no cgroups yet."""
    write(tmp_path, {
        "sys/devices/system/cpu/online": "0-7",
        "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 5 kB",
        "sys/devices/system/node/node0/cpulist": "0-1,4-5",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7",
        **{f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list":
           f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}})
    return tmp_path


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
ALL = range(8)


def test_a_node_without_cgroups_is_read_whole(node):
    facts = read_node_facts(node, ALL)
    assert facts == NodeFacts(
        cpuset=tuple(ALL), online=8, core_of={cpu: cpu % 4 for cpu in ALL},
        numa={0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}, memory_total=16 * GIB)


def test_cgroup_v2_limits_are_read_from_the_own_group_and_all_above_it(node):
    write(node, {
        "proc/self/mountinfo": V2_MOUNT,
        "proc/self/cgroup": "0::/user.slice/job",
        "sys/fs/cgroup/cpuset.cpus.effective": "0-7",
        "sys/fs/cgroup/user.slice/cpuset.cpus.effective": "1-3,5",
        "sys/fs/cgroup/user.slice/cpu.max": "150000 100000",
        "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/memory.max": str(4 * GIB),
        "sys/fs/cgroup/user.slice/job/memory.max": "max"})
    facts = read_node_facts(node, ALL)
    assert facts.cpuset == (1, 2, 3, 5)
    assert facts.quota_cpus == 1.5 and facts.memory_limit == 4 * GIB


def test_cgroup_v1_limits_are_read_each_from_its_own_hierarchy(node):
    write(node, {
        "proc/self/mountinfo":
            "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
            "32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
            "33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "proc/self/cgroup": "4:cpu,cpuacct:/a\n3:cpuset:/slurm/uid_1/job_2\n2:memory:/m",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpuset/cpuset.effective_cpus": "0-7",
        "sys/fs/cgroup/cpuset/slurm/uid_1/job_2/cpuset.effective_cpus": "4-7",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/m/memory.limit_in_bytes": str(2 * GIB)})
    facts = read_node_facts(node, ALL)
    assert facts.cpuset == (4, 5, 6, 7)
    assert facts.quota_cpus == 3.0 and facts.memory_limit == 2 * GIB


def test_hybrid_cgroups_are_read_from_wherever_the_controller_is(node):
    write(node, {
        "proc/self/mountinfo":
            "32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
            "38 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        "proc/self/cgroup": "3:cpuset:/c\n1:name=systemd:/s\n0::/u",
        "sys/fs/cgroup/cpuset/c/cpuset.effective_cpus": "2-3",
        "sys/fs/cgroup/unified/u/cpu.max": "50000 100000"})
    facts = read_node_facts(node, ALL)
    assert facts.cpuset == (2, 3) and facts.quota_cpus == 0.5


@pytest.mark.parametrize("top, path", [
    ("/docker/abc", "/docker/abc"),     # a container without a cgroup namespace
    ("/", "/"),                         # with one
    ("/../..", "/../../x"),             # a mount from outside of ours
    ("/docker/abc", "/somewhere/else")])
def test_a_container_s_limits_are_found_at_its_own_mount(node, top, path):
    write(node, {
        "proc/self/mountinfo": V2_MOUNT.replace(" / ", f" {top} ", 1),
        "proc/self/cgroup": f"0::{path}",
        "sys/fs/cgroup/cpu.max": "200000 100000"})
    assert read_node_facts(node, ALL).quota_cpus == 2.0


def test_a_cgroup_that_contradicts_the_kernel_s_answer_is_not_believed(node):
    write(node, {"proc/self/mountinfo": V2_MOUNT, "proc/self/cgroup": "0::/",
                 "sys/fs/cgroup/cpuset.cpus.effective": "64-67"})
    assert read_node_facts(node, (2, 3)).cpuset == (2, 3)


@pytest.mark.parametrize("conf", ["etc/slurm/slurm.conf", "run/slurm/conf/slurm.conf"])
def test_slurm_s_configuration_makes_it_a_node_of_a_cluster(node, conf):
    assert not read_node_facts(node, ALL).slurm_node
    write(node, {conf: "ClusterName=c"})
    assert read_node_facts(node, ALL).slurm_node


def test_a_bare_root_still_gives_the_cpus_that_the_kernel_allows(tmp_path):
    facts = read_node_facts(tmp_path, (0, 1))
    assert facts == NodeFacts(cpuset=(0, 1), online=2, core_of={0: 0, 1: 1},
                              numa={0: 0, 1: 0})


def test_this_machine_is_seen_whole_by_a_process_bound_to_one_core():
    narrow = subprocess.run(
        [sys.executable, "-c",
         "import os\n"
         "from rfaas_mpi.agent.cores import read_node_facts\n"
         "core = max(os.sched_getaffinity(0))\n"
         "os.sched_setaffinity(0, {core})\n"
         "facts = read_node_facts()\n"
         "assert os.sched_getaffinity(0) == {core}, 'the caller was moved'\n"
         "print(*facts.cpuset)"],
        stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    facts = read_node_facts()
    assert tuple(map(int, narrow.stdout.split())) == facts.cpuset
    assert set(os.sched_getaffinity(0)) <= set(facts.cpuset)
    assert len(facts.cpuset) <= facts.online
    assert lendable_memory(facts) < facts.memory_total


def test_this_machine_lends_all_but_the_rank_s_physical_core():
    facts = read_node_facts()
    spare = spare_cores(facts, lend="yes")
    assert sorted([*spare.cores, *spare.kept]) == list(facts.cpuset)
    physical = len({facts.core_of[cpu] for cpu in facts.cpuset})
    allowed = physical - 1 if facts.quota_cpus is None else 0
    assert len(spare.cores) >= allowed
