"""What the observer reads: jobs by Slurm's names for them, the tasks that count, and no change missed."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from pathlib import Path

import pytest

from rfaas_mpi.agent.detector import Detector, Told
from rfaas_mpi.agent.observer import LoadReader, Observer, own_step, task_mask
from rfaas_mpi.agent.reading import reading

V1 = "30 1 0:30 / /cg/cpuset rw - cgroup cgroup rw,cpuset\n31 1 0:31 / /cg/freezer rw - cgroup cgroup rw,freezer\n"
V2 = "30 1 0:30 / /cg rw - cgroup2 cgroup2 rw\n"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def node(tmp_path):
    """Makes an observer of a node with four CPUs and these mounts."""
    made = []

    def make(mounts: str, **more) -> Observer:
        write(tmp_path / "sys/devices/system/cpu/online", "0-3\n")
        write(tmp_path / "proc/self/mountinfo", mounts)
        for line in mounts.splitlines():
            (tmp_path / line.split()[4].lstrip("/")).mkdir(parents=True, exist_ok=True)
        made.append(Observer(tmp_path, **more))
        return made[-1]

    yield make
    for observer in made:
        observer.close()
        observer.close()


def test_a_job_that_comes_and_goes_is_known_at_once_on_both_hierarchies(node, tmp_path):
    observer = node(V1, mask_of={5: 0b10}.get)
    assert observer.read(0.0).jobs == ()
    for controller in ("cpuset", "freezer"):
        tasks = tmp_path / f"cg/{controller}/slurm_n1/uid_7/job_42/step_0/task_0/tasks"
        write(tasks, "5\n" if controller == "freezer" else "")
    write(tmp_path / "cg/cpuset/slurm_n1/uid_7/job_42/cpuset.cpus", "1-2\n")
    (job,) = observer.read(0.1).jobs
    assert (job.name, job.uid, job.cpus, job.mask) == ("n1/42", 7, {1, 2}, {1})
    for controller in ("cpuset", "freezer"):
        shutil.rmtree(tmp_path / f"cg/{controller}/slurm_n1/uid_7/job_42")
    assert observer.read(0.2).jobs == ()


def test_jobs_of_another_slurmd_are_not_ours(node, tmp_path):
    observer = node(V2, nodes=["n1"])
    for name in ("n1", "n2"):
        write(tmp_path / f"cg/system.slice/{name}_slurmstepd.scope/job_1/cpuset.cpus", "0\n")
    assert [job.name for job in observer.read(0.0).jobs] == ["n1/1"]


def test_the_agent_s_own_step_and_slurm_s_helpers_are_no_owners(node, tmp_path):
    top = tmp_path / "cg/system.slice/slurmstepd.scope/s5K1KKYAYG5D00"
    write(top / "cpuset.cpus", "0-3\n")
    write(top / "step_extern/user/task_special/cgroup.threads", "10\n11\n")
    write(tmp_path / "proc/10/comm", "sleep\n")
    write(tmp_path / "proc/11/comm", "bash\n")
    write(top / "step_0/slurm/cgroup.threads", "12\n")
    write(top / "step_0/user/task_0/cgroup.threads", "13\n")
    write(top / "step_1/user/task_0/cgroup.threads", "14\n")
    masks = {10: 0b1111, 11: 0b0001, 12: 0b1111, 13: 0b0010, 14: 0b0100}
    (job,) = node(V2, mask_of=masks.get).read(0.0).jobs
    assert (job.name, job.mask) == ("s5K1KKYAYG5D00", {0, 1, 2})
    (job,) = node(V2, mask_of=masks.get, ours=("s5K1KKYAYG5D00", "step_1")).read(0.0).jobs
    assert job.mask == {0, 1}


def test_a_fork_of_the_step_daemon_counts_once_it_is_the_user_s_program(node, tmp_path):
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/step_0/cgroup.threads", "5\n")
    write(tmp_path / "proc/5/comm", "slurmstepd\n")
    observer = node(V2, mask_of={5: 0b1}.get)
    assert observer.read(0.0).jobs[0].mask is None
    write(tmp_path / "proc/5/comm", "a.out\n")
    assert observer.read(2.0).jobs[0].mask == {0}


def test_no_thread_of_the_step_daemon_is_an_owner_s_whatever_its_name_is(node, tmp_path):
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/step_0/cgroup.threads", "5\n6\n")
    write(tmp_path / "proc/5/comm", "slurmstepd\n")
    write(tmp_path / "proc/6/comm", "acctg_prof\n")
    write(tmp_path / "proc/6/status", "Name:\tacctg_prof\nTgid:\t5\nPid:\t6\n")
    masks = {5: 0b11, 6: 0b11, 7: 0b1, 8: 0b10}
    observer = node(V2, mask_of=masks.get)
    assert observer.read(0.0).jobs[0].mask is None
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/step_0/cgroup.threads", "5\n6\n7\n8\n")
    for thread, leader in ((7, 7), (8, 7)):
        write(tmp_path / f"proc/{thread}/comm", "a.out\n")
        write(tmp_path / f"proc/{thread}/status", f"Name:\ta.out\nTgid:\t{leader}\n")
    assert observer.read(2.0).jobs[0].mask == {0, 1}, "threads of the owner's program are his"


def test_a_task_that_another_pid_namespace_hides_may_run_anywhere(node, tmp_path):
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/step_0/user/task_0/cgroup.threads", "0\n")
    assert node(V2).read(0.0).jobs[0].mask == {0, 1, 2, 3}


def test_more_changes_than_inotify_keeps_are_not_missed(node, tmp_path):
    observer = node(V2)
    observer.read(0.0)
    first = write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/cpuset.cpus", "0\n")
    second = write(first.with_name("memory.max"), "max\n")
    observer.read(0.1)
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    files = [os.open(file, os.O_WRONLY) for file in (first, second)]
    for number in range(most + 2):
        os.pwrite(files[number % 2], b"1", 0)
    for file in files:
        os.close(file)
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_2/cpuset.cpus", "2-3\n")
    assert {job.name: job.cpus for job in observer.read(0.2).jobs} == {"1": {1}, "2": {2, 3}}


def test_the_step_that_an_agent_runs_in_is_found_by_its_cgroup(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/slurmstepd.scope/job_3/step_1/user/task_0\n")
    assert own_step(tmp_path) == ("3", "step_1")
    write(tmp_path / "proc/self/cgroup", "4:cpuset:/slurm/uid_0/job_9/step_batch\n0::/\n")
    assert own_step(tmp_path) == ("9", "step_batch")
    write(tmp_path / "proc/self/cgroup", "0::/user.slice\n")
    assert own_step(tmp_path) is None


def test_what_the_batch_system_says_fills_in_for_a_missing_cpuset(node, tmp_path):
    write(tmp_path / "cg/system.slice/slurmstepd.scope/job_1/step_0/user/task_0/cgroup.threads", "5\n")
    observed = node(V2, mask_of={5: 0b1}.get).read(0.0)
    detector = Detector()
    detector.observe(observed)
    assert detector.report(0.0).spare == ()
    detector.tell("1", Told(cpus=frozenset({0, 1})))
    assert detector.report(0.1).spare == (2, 3)


def test_masks_of_threads_are_those_of_the_kernel(tmp_path):
    ready, done = threading.Event(), threading.Event()
    tids = []

    def wait() -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        tids.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        ready.wait()
        narrow = 1 << max(os.sched_getaffinity(0))
        assert task_mask(tids[0]) == narrow
        lists = [write(tmp_path / "one", f"{tids[0]}\n"), tmp_path / "gone", write(tmp_path / "none", "")]
        words = (ctypes.c_uint64 * 128)()
        assert reading.rfm_read_masks("\0".join([*map(str, lists), ""]).encode(), words, 128) == 1
        assert int.from_bytes(bytes(words), "little") == narrow
    finally:
        done.set()
        thread.join()
    assert task_mask(2**22 + 1) is None


def test_the_load_is_what_proc_stat_says_less_what_is_idle(tmp_path):
    write(tmp_path / "proc/stat", "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 1000 1000 8 16 32 1 1\ncpu3 1 0 0 7 0 0 0 0 0 0\n"
                                  "intr 5 0 0\nctxt 1\n")
    reader = LoadReader(tmp_path)
    load = reader.read(1.0)
    reader.close()
    reader.close()
    assert load.cpus.tolist() == [0, 3] and load.busy_ticks.tolist() == [63, 1]
