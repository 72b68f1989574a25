"""What control groups do for us on a machine that has version 2 only: an agent of several users as systemd starts it,
the share of a core that a worker of low priority leaves to its owner, groups that were delegated to us, and the whole
service: manager, agent and ranks, with a job that comes and goes, a drain, and the main job. And what the detector
lends beside real owners.

    python tests/groups_v2.py

Prints one JSON object: each promise with "" if it was kept, else what was seen instead. Needs root, a Python that every
user may run, three CPUs and cgroup v2 with all controllers below its root (the guest: tests/rdma_guest.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["RFAAS_CONFIG"] = os.devnull
# Emulated, and beside tests that come first.
os.environ["RFAAS_TEST_SLOW"] = "8"

import faults  # noqa: E402
import numpy as np  # noqa: E402
from cluster import finished, tell, wait_until  # noqa: E402
from lending_node import LOOK, LendingNode  # noqa: E402
from owners import Groups as Jobs  # noqa: E402
from site_of_users import ALICE, BOB, SERVICE, UID_MIN, Site, environment, interpreter  # noqa: E402

from rfaas_mpi import api  # noqa: E402
from rfaas_mpi import messages as msg  # noqa: E402
from rfaas_mpi.agent.core import AgentCore, State, Worker  # noqa: E402
from rfaas_mpi.agent.groups import OWN, Group, Roots, maker, remove_stale  # noqa: E402
from rfaas_mpi.agent.pool import ZygoteKind  # noqa: E402
from rfaas_mpi.agent.priority import Lowering, make_group  # noqa: E402
from rfaas_mpi.agent.spawner import Spawner, become_user, service_identity  # noqa: E402
from rfaas_mpi.agent.workers import Workers  # noqa: E402

TOP = Path("/sys/fs/cgroup")
MIB = 1 << 20
LIMIT = 128 * MIB                    # of each worker
GUARD_S = 400.0
CLONE_NEWNS, CLONE_NEWCGROUP = 0x20000, 0x2000000
LIBC = ctypes.CDLL(None, use_errno=True)

promises: dict[str, Callable[[], None]] = {}


def promise(body: Callable[[], None]) -> Callable[[], None]:
    promises[body.__name__] = body
    return body


# --- groups as others make them ----------------------------------------------------------------------

@contextlib.contextmanager
def unit(name: str, owner: int = 0) -> Iterator[Path]:
    """A service's group as systemd makes it with Delegate=yes; with an owner as for a user's own services."""
    place = TOP / "system.slice" / name
    place.mkdir(parents=True)
    (place.parent / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    if owner:
        for path in (place, *(place / file for file in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"))):
            os.chown(path, owner, owner)
    try:
        yield place
    finally:
        wait_until(lambda: removed(place), f"{place} is empty", GUARD_S)


def removed(place: Path) -> bool:
    with contextlib.suppress(OSError):
        for path in sorted(place.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        place.rmdir()
        return True
    return False


def groups(pattern: str = "rfaas-*") -> list[str]:
    return sorted(path.name for path in TOP.glob(pattern))


def group_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


# --- workers of two users --------------------------------------------------------------------------------

class Users:
    """An agent's workers, a lease for each user; close() ends everything."""

    def __init__(self, uids: dict[int, int]) -> None:
        # As an agent does: on its own core root starts the spawner, and is the service's user from then on.
        os.sched_setaffinity(0, {0})
        self.spawner = Spawner.start(UID_MIN, SERVICE)
        become_user(service_identity(str(SERVICE)))
        self.events: list[msg.Event] = []
        self.freed: set[int] = set()
        self.stopped: set[int] = set()
        self.failed: list[str] = []
        join = msg.Join(id=1, pid=os.getpid(), executable=os.fsencode(sys.executable), flags=("-B",), directory=b"/",
                        path=tuple(map(os.fsencode, sys.path)), affinity=(0,),
                        environment=((b"RFAAS_CONFIG", b"/dev/null"), (b"PATH", os.fsencode(os.environ["PATH"]))))
        self.kinds = {lease: ZygoteKind.of(join, uid=uid) for lease, uid in uids.items()}
        self.selector = selectors.DefaultSelector()
        self.core = AgentCore()
        self.core.own_cores = (0,)
        self.workers = Workers(self.selector, self.core, self, zygote_idle_s=3600.0)
        self.workers.serve_users(self.spawner)
        self.workers.guard_memory("cgroup", low=True)
        for lease in uids:
            self.workers.act(self.core.start(lease, lease, {0: (lease,)}, LIMIT, time.monotonic())[1])

    # What the agent would do with it.

    def kind_for(self, lease: int) -> ZygoteKind:
        return self.kinds[lease]

    def tell(self, session: int, event: msg.Event) -> None:
        self.events.append(event)

    def show(self, session: int, event: msg.Log) -> None:
        print(*event.lines, sep="\n", file=sys.stderr)

    def used(self, meter: object, pid: int) -> None:
        pass

    def cores_freed(self, lease: int, seat: int, cores: tuple[int, ...]) -> None:
        self.freed.add(lease)

    def seat_stopped(self, lease: int, seat: int, last: bool) -> None:
        self.stopped.add(lease)

    def lease_failed(self, lease: int, why: str) -> None:
        self.failed.append(why)

    def spawner_lost(self, why: str) -> None:
        self.failed.append(why)

    def until(self, what: Callable[[], object]) -> object:
        """Turns the agent's loop until it is so: its first true value."""
        deadline = time.monotonic() + GUARD_S
        while not (value := what()):
            assert not self.failed and time.monotonic() < deadline, (self.failed, self.events)
            for key, _ in self.selector.select(0.01):
                if self.selector.get_map().get(key.fd) == key:
                    key.data(0)
            self.workers.check(time.monotonic())
        return value

    def worker(self, lease: int) -> Worker:
        """Once it serves."""
        return self.until(lambda: next((each for each in self.core.workers.values()
                                        if each.lease == lease and each.state is State.SERVING), None))

    def close(self) -> None:
        self.workers.close()
        self.selector.close()


@promise
def workers_of_several_users_are_bounded_lowered_and_cleared() -> None:
    with unit("rfaas-agent.service") as place:
        said = in_its_group(place, of_two_users)
        assert said == "kept", said


def of_two_users() -> str:
    with contextlib.closing(Users({1: ALICE, 2: BOB})) as users:
        assert users.workers.memory_status()["means"] == "cgroup", users.workers.memory_status()
        first, second = users.worker(1), users.worker(2)
        own = f"/{maker(users.spawner.pid)}-"
        for worker in (first, second):
            assert group_of(worker.pid).startswith(f"{own}w") and worker.low, group_of(worker.pid)
            assert os.sched_getaffinity(worker.pid) == set(worker.seat.cores), "it is not on its core"
            bounds = TOP / group_of(worker.pid)[1:]
            assert (bounds / "cpu.idle").read_text() == "1\n"
            assert LIMIT < int((bounds / "memory.max").read_text()) < 2 * LIMIT
        for zygote in users.workers.zygotes.values():
            assert group_of(zygote.pid).startswith(f"{own}z") and os.sched_getaffinity(zygote.pid) == {0}
        left = TOP / group_of(first.pid)[1:]
        users.workers.act(users.core.stop(1, [0], "revoked", 0.0, time.monotonic()))
        users.until(lambda: 1 in users.freed)
        users.until(lambda: 1 in users.stopped and not left.exists())
        assert faults.alive(second.pid) and not faults.alive(first.pid)
    assert not groups(f"rfaas-*.{users.spawner.pid}.*")
    return "kept"


# --- the whole service -------------------------------------------------------------------------------------

# Two workers' calls, round by round as it is told, with right answers whatever became of the workers.
SERVED = """
    with Executor(workers=2, start_timeout_s=100) as ex:
        said = "begun"
        while said:
            x = np.arange(2000.0)
            outs = [np.empty_like(x) for _ in range(8)]
            for request in [ex.Iinvoke(faults.adds_one, x + n, out) for n, out in enumerate(outs)]:
                request.Wait()
            assert all((out == x + n + 1).all() for n, out in enumerate(outs)), "a wrong answer"
            say(said, len(ex.workers))
            said = sys.stdin.readline().strip()
"""


@promise
def a_whole_service_serves_a_job_that_comes_a_drain_and_the_main_job() -> None:
    job = Jobs(f"t{os.getpid()}")
    try:
        with Site("", ["--keep", "0"]) as site:
            served(site, job)
            main_job(site)
        assert not groups(), groups()
    finally:
        job.close()


def served(site: Site, job: Jobs) -> None:
    wait_until(lambda: site.free() == 2, "its agent has found the cores that it does not keep", GUARD_S)

    def spare() -> set[int]:
        (view,) = site.call("nodes").nodes
        return set(view.spare)

    with site.running(ALICE, SERVED) as rank:
        assert faults.line(rank) == "begun 2"
        job.begin(1, [2])
        wait_until(lambda: spare() == {1}, "the job's core is lent no more", GUARD_S)
        assert told(rank, "reclaimed") == "reclaimed 1"
        (group,) = workers_groups()
        assert (TOP / group / "cpu.idle").read_text() == "1\n" and (TOP / group / "memory.max").read_text() != "max\n"
        job.end(1)
        wait_until(lambda: site.free() == 1, "and it is, once the job is over", GUARD_S)
        site.call("drain", api.DrainNodes(nodes=("node0",)))
        wait_until(lambda: not workers_groups(), "its last worker is gone", GUARD_S)
        assert told(rank, "drained") == "drained 0"
        site.call("undrain", api.UndrainNodes(nodes=("node0",)))
        wait_until(lambda: site.free() == 2, "every core can be lent again", GUARD_S)
        finished(rank)


def workers_groups() -> list[str]:
    """Those that a worker is in; a fork that is kept ready for the next one is none yet."""
    found = []
    for name in groups():
        with contextlib.suppress(FileNotFoundError):
            pids = (TOP / name / "cgroup.procs").read_text().split()
            if any(Path(f"/proc/{pid}/comm").read_text().startswith("rfaas-worker") for pid in pids):
                found.append(name)
    return found


def told(rank: subprocess.Popen[str], word: str) -> str:
    tell(rank, word)
    return faults.line(rank)


def main_job(site: Site) -> None:
    """Each price is checked, and a wrong one would be its status."""
    place = site.directory / f"run-{BOB}"
    place.mkdir(mode=0o700)
    os.chown(place, BOB, BOB)
    done = subprocess.run(
        [interpreter(), HERE.parent / "apps" / "blackscholes.py",
         "--options", "50000", "--rounds", "1", "--workers", "2"],
        user=BOB, group=BOB, extra_groups=[], cwd=place, capture_output=True, text=True, timeout=GUARD_S,
        # An MPI that came as a package of Python's lies where this interpreter doesn't look for it by itself.
        env=environment(**site.changes, RFAAS_RUNTIME_DIR=str(place),
                        LD_LIBRARY_PATH=str(Path(np.__file__).resolve().parents[3])))
    print(done.stdout, file=sys.stderr)
    assert done.returncode == 0 and "every price agrees" in done.stdout, done.stdout + done.stderr


# How many workers there are, as a job sees it. (A fork that is kept ready for the next one has a group, and is none.)
WORKERS = LOOK + r"""
workers() { for pid in $(members "$1"); do cat /proc/$pid/comm; done 2>/dev/null | grep -c '^rfaas-worker'; }
"""


@promise
def slurms_own_prolog_takes_everything_back_and_its_epilog_has_it_lent_again() -> None:
    """By its plugin for version 2, without systemd. What was killed may take its time to end here, emulated."""
    directory = Path(tempfile.mkdtemp(prefix="rfaas-v2-"))
    directory.chmod(0o755)
    with LendingNode(directory, cpus=3) as node:
        with node.borrowing(2):
            job = node.slurm.submit(
                f'#!/bin/bash\n{WORKERS}\nuntil [ "$(workers "{node.directory}")" = 0 ]; do sleep 0.2; done\necho none\n'
                f'until [ -e "{node.slurm.directory}/end" ]; do sleep 0.2; done\n', "--ntasks=1", "--cpus-per-task=3")
            node.slurm.wait_until(lambda: node.slurm.output(job) == "none\n", "no worker is left beside the job")
            wait_until(lambda: f"job={job} is about to start" in node.site.agent.said(), "the agent was told", GUARD_S)
            assert (TOP / "system.slice" / "n1_slurmstepd.scope" / f"job_{job}").is_dir(), "where does Slurm have it?"
            wait_until(lambda: node.site.free() == 0, "nothing is lent to anybody else", GUARD_S)
            assert not workers_groups()
            node.end(job)
            # Whether its rank has asked again by then is the rank's affair.
            wait_until(lambda: workers_groups() or node.site.free(), "its cores are lent again", GUARD_S)
    assert not groups(), groups()


# --- an owner's share ------------------------------------------------------------------------------------

SHARE_S = 0.8                        # of CPU time, both together


@promise
def an_owner_keeps_its_core_beside_a_group_of_low_priority_and_not_beside_an_idle_thread() -> None:
    low = make_group(f"rfaas-low-{os.getpid()}-share")
    assert low is not None and low.means == "cpu.idle", low
    plain, owners = TOP / f"plain-{os.getpid()}", TOP / f"owner-{os.getpid()}"
    plain.mkdir(), owners.mkdir()
    try:
        beside_low = share(owners, low.directory, os.SCHED_OTHER)
        beside_idle = share(owners, plain, os.SCHED_IDLE)
    finally:
        low.close(), plain.rmdir(), owners.rmdir()
    assert beside_low > 0.95, f"the owner had {beside_low:.0%} of its core beside a worker of low priority"
    assert beside_idle < 0.7, f"the owner had {beside_idle:.0%} beside a thread of SCHED_IDLE: is that harmless now?"


def share(owners: Path, workers: Path, policy: int) -> float:
    """The owner's part of the CPU time that both had on one core."""
    core = max(os.sched_getaffinity(0))
    pids = [spin(core, workers, policy), spin(core, owners, os.SCHED_OTHER)]
    try:
        begun = [cpu_s(pid) for pid in pids]
        had = [0.0, 0.0]
        deadline = time.monotonic() + GUARD_S
        while sum(had) < SHARE_S:
            assert time.monotonic() < deadline, f"they had {had} s of CPU time"
            time.sleep(0.05)
            had = [cpu_s(pid) - first for pid, first in zip(pids, begun, strict=True)]
        return had[1] / sum(had)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def spin(core: int, group: Path, policy: int) -> int:
    """A process that does so; it has begun when this returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            (group / "cgroup.procs").write_text("0")
            os.sched_setscheduler(0, policy, os.sched_param(0))
            os.write(writing, b"x")
            os.sched_setaffinity(0, {core})
            while True:
                pass
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return pid


def cpu_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


# --- groups that are delegated to us -----------------------------------------------------------------------

def in_its_group(place: Path, body: Callable[[], str], *, uid: int = 0, alone: bool = False) -> str:
    """What a process of that user says there; `alone`: it sees that group as the root of all."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            (place / "cgroup.procs").write_text("0")
            if alone:
                assert LIBC.unshare(CLONE_NEWCGROUP | CLONE_NEWNS) == 0, "unshare"
                for command in (["mount", "--make-rprivate", "/"], ["umount", str(TOP)],
                                ["mount", "-t", "cgroup2", "none", str(TOP)]):
                    # (A group that gives its controllers on may have no process: none is started later.)
                    subprocess.run(command, check=True)
            if uid:
                os.setresgid(uid, uid, uid)
                os.setgroups([])
                os.setresuid(uid, uid, uid)
            said = body()
        except BaseException:
            said = traceback.format_exc()
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def divides() -> str:
    """Divides its group, and has one worker in a group there take too much."""
    before = group_of(os.getpid())
    roots = Roots.find().settle(os.getpid())
    assert not roots.why_not, roots
    assert Lowering().priority.means is None, "low priority counts below the root of all groups only"
    again = Roots.find().settle(os.getpid())
    assert again.memory == roots.memory and not again.why_not, again
    groups = [Group.make(f"{maker()}-w{number}", again, 32 * MIB) for number in (1, 2)]
    greedy, modest = (take(group, megabytes) for group, megabytes in zip(groups, (64, 8), strict=True))
    assert os.waitpid(greedy, 0)[1] == signal.SIGKILL, "it was not killed"
    assert groups[0].oom_kills() > 0 and groups[1].oom_kills() == 0
    assert groups[1].members() == [modest]
    for group in groups:
        group.close()
    assert os.waitpid(modest, 0)[1] == signal.SIGKILL
    assert group_of(os.getpid()) == f"{before.rstrip('/')}/{OWN}"
    return "kept"


def take(group: Group, megabytes: int) -> int:
    """A child that enters the group, and holds so much memory."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(reading, 1)
            held = bytearray(megabytes * MIB)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(600)
        finally:
            os._exit(1)
    group.enter(pid)
    os.write(writing, b"x")
    return pid


@promise
def a_user_divides_the_group_that_was_delegated_to_him() -> None:
    with unit("user-service.service", ALICE) as place:
        said = in_its_group(place, divides, uid=ALICE)
        assert said == "kept", said
        assert (place / OWN).exists()


@promise
def root_divides_its_group_where_it_sees_no_other() -> None:
    with unit("container.scope") as place:
        said = in_its_group(place, divides, alone=True)
        assert said == "kept", said


@promise
def a_group_with_other_processes_is_not_divided_and_that_is_said() -> None:
    with unit("shared.service", ALICE) as place:
        other = subprocess.Popen(["sleep", "600"])
        try:
            (place / "cgroup.procs").write_text(str(other.pid))
            said = in_its_group(place, lambda: Roots.find().settle(os.getpid()).why_not, uid=ALICE)
        finally:
            other.kill()
            other.wait()
        assert "1 other processes are in it" in said, said
        assert not (place / OWN).exists()


# --- what is lent while jobs come, go and change ----------------------------------------------------------

@promise
def a_watcher_of_proc_finds_no_owner_on_a_core_that_is_lent() -> None:
    done = subprocess.run([sys.executable, HERE / "owners.py", "--seconds", "15", "--least", "1"], text=True,
                          capture_output=True, timeout=GUARD_S, env={**os.environ, "RFAAS_OWNERS_PACE": "4"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    assert found["cgroups"] == "v2" and found["violations"] == [], found
    # (A cpuset of few CPUs rarely leaves one of them unused; one will do.)
    assert min(found["judged"]["free"], found["judged"]["unused"]) >= 1, found


def main() -> int:
    names = set(sys.argv[1:]) or set(promises)
    roots = Roots.find()
    assert roots.unified and not roots.delegated and roots.cpu == TOP, f"no machine of version 2: {roots}"
    seen = {}
    for name, body in promises.items():
        if name in names:
            begin = time.monotonic()
            try:
                body()
                seen[name] = ""
            except BaseException:
                seen[name] = traceback.format_exc()
            print(f"{name}: {time.monotonic() - begin:.1f} s {seen[name]}", file=sys.stderr, flush=True)
    remove_stale(roots)
    left = [name for name in groups() if re.match(r"rfaas-\d", name)]
    seen["nothing_is_left"] = f"{left}" if left else ""
    print(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
