"""What Slurm says is read as it is meant, and a job's cores are divided the same way on every node."""

from __future__ import annotations

import subprocess

import pytest

from rfaas_mpi.errors import ConfigError
from rfaas_mpi.slurm import facts, layout
from rfaas_mpi.slurm.layout import NodeLayout

# Two packages of two cores of two threads, as Linux often numbers them: all first threads come first.
TWO_THREADS = [(package, core, thread * 4 + package * 2 + core)
               for package in (0, 1) for core in (0, 1) for thread in (0, 1)]


def job(**changes: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2],gpu07", "SLURM_JOB_CPUS_PER_NODE": "4(x2),8",
            "SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "2(x2),1", **changes}


def test_a_job_is_read_from_its_environment():
    found = facts.allocation(job())
    assert found == facts.Allocation(7, ("n1", "n2", "gpu07"), (4, 4, 8), (2, 2, 1))


def test_without_tasks_each_node_has_one_rank_and_those_that_are_asked_for_are_spread():
    without = {name: value for name, value in job().items() if "TASKS" not in name}
    assert facts.allocation(without).tasks == (1, 1, 1)
    assert facts.allocation(without, 4).tasks == (2, 1, 1)
    assert facts.allocation(job(SLURM_TASKS_PER_NODE="2")).tasks == (2, 0, 0)


@pytest.mark.parametrize("changes, said", [
    ({"SLURM_JOB_ID": ""}, "no Slurm job"),
    ({"SLURM_JOB_CPUS_PER_NODE": "4"}, "3 nodes .* CPUs of 1"),
    ({"SLURM_JOB_CPUS_PER_NODE": "4(y2)"}, r"4\(y2\)"),
    ({"SLURM_JOB_NODELIST": "n[1-"}, "no list of nodes"),
])
def test_what_is_no_job_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        facts.allocation(job(**changes))
    assert error.value.hint


def test_cores_of_a_job_are_read_for_each_of_its_nodes():
    shown = ("JobId=7 NumNodes=3 JOB_GRES=(null)   Nodes=n[1-2] CPU_IDs=0-1,4 Mem=0 GRES= "
             "  Nodes=gpu07 CPU_IDs=3 Mem=200 GRES= MinCPUsNode=1")
    assert facts.core_ids(shown) == {"n1": (0, 1, 4), "n2": (0, 1, 4), "gpu07": (3,)}


def test_addresses_and_settings_are_read_from_what_scontrol_shows():
    shown = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 Port=1 \nNodeName=n2 NodeAddr=n2.site NodeHostName=n2\n"
    assert facts.node_addresses(shown) == {"n1": "10.0.0.1", "n2": "n2.site"}
    shown = "TaskPlugin              = task/cgroup,task/affinity\nTaskPluginParam         = (null type)\n"
    assert facts.config_value(shown, "TaskPlugin") == "task/cgroup,task/affinity"
    assert facts.config_value(shown, "Task") == ""


def test_a_step_is_found_by_the_srun_that_started_it():
    shown = ("StepId=1.batch UserId=0 Name=batch SrunHost:Pid=(null):0\n\n"
             "StepId=1.0 UserId=0 Name=sh Dist=Cyclic SrunHost:Pid=n1:4321 \n\n"
             "StepId=1_2.1 UserId=0 Name=sh Dist=Cyclic SrunHost:Pid=n1:321\n")
    assert (facts.step_of(shown, 4321), facts.step_of(shown, 321), facts.step_of(shown, 21)) == ("1.0", "1_2.1", "")


def test_slurms_numbers_go_package_by_package_and_linux_has_its_own():
    assert facts.physical([0, 1, 2, 3], TWO_THREADS) == (0, 1, 4, 5)
    assert facts.physical([4, 7], TWO_THREADS) == (2, 7)
    assert facts.physical([6, 8], TWO_THREADS) == (3,)


def test_of_each_core_one_thread_is_used_and_none_is_lent_beside_it():
    assert facts.whole_cores(range(8), TWO_THREADS) == (0, 1, 2, 3)
    assert facts.whole_cores([4, 5, 2], TWO_THREADS) == (2, 4, 5)
    assert facts.whole_cores([0, 9], TWO_THREADS) == (0, 9)


def test_ranks_have_the_first_cores_and_the_others_are_lent():
    assert layout.lay_out("n1", (6, 2, 4, 0), 1, 2, None) == NodeLayout("n1", ((0, 2),), (4, 6))
    assert layout.lay_out("n1", (0, 1, 2, 3), 2, 1, 1) == NodeLayout("n1", ((0,), (1,)), (2,))
    assert layout.lay_out("n1", (0, 1), 2, 1, None) == NodeLayout("n1", ((0,), (1,)), ())
    with pytest.raises(ConfigError, match="3 ranks of 2 threads need 6 cores, and the job has 4 on n1"):
        layout.lay_out("n1", (0, 1, 2, 3), 3, 2, None)


def test_workers_come_from_who_has_most_to_spare():
    assert layout.workers_of(None, (1, 2)) == (None, None)
    assert layout.workers_of(3, (1, 4, 2)) == (0, 3, 0)
    assert layout.workers_of(9, (1, 2)) == (1, 2)


def test_srun_binds_ranks_where_all_nodes_are_alike():
    one, two = NodeLayout("n1", ((0,), (1,)), (2,)), NodeLayout("n2", ((0,),), (1, 2))
    assert layout.bind_option([one, two]) == "--cpu-bind=map_cpu:0,1"
    assert layout.bind_option([NodeLayout("n1", ((0, 2), (4, 6)), ())]) == "--cpu-bind=mask_cpu:0x5,0x50"
    assert layout.bind_option([one, NodeLayout("n2", ((1,),), (0,))]) is None


def test_the_shell_binds_each_rank_by_its_place_and_leaves_its_command_as_it_is():
    layouts = [NodeLayout("n1", ((0,),), ()), NodeLayout("n2", ((1,),), ())]
    words = ["printf", "%s|", "a b", "$(id)", "x;y"]

    def run(node: str, local: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*layout.wrapper(layouts), *words], capture_output=True, text=True, check=False,
                              env={"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": node, "SLURM_LOCALID": local, **changes})

    assert run("n1", "0").stdout == "a b|$(id)|x;y|"
    assert run("n1", "1", MPI_LOCALRANKID="0").returncode == 0
    assert run("n1", "1", OMPI_COMM_WORLD_LOCAL_RANK="0").returncode == 0
    refused = run("n1", "1")
    assert refused.returncode == 1 and "no cores for rank" in refused.stderr
