"""One agent, several users: workers are their rank's user's, and closed to every other."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from cluster import tell, wait_until
from site_of_users import ALICE, BOB, SERVICE, Site

from rfaas_mpi import api

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an agent of several users is started by root")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


WHO = """
    def who():
        return os.getuid(), os.getgid(), os.getgroups(), os.getresuid()
    with Executor(workers=1) as ex:
        say(ex.submit(who).result())
        x = np.arange(1000.0)
        assert (ex.Invoke(faults.adds_one, x, np.empty_like(x)) == x + 1).all()
"""

# Holds a worker until it is told to end; says who and where it is.
HOLDS = """
    def facts():
        return os.getpid(), os.getppid()
    with Executor(workers=1) as ex:
        array = ex.full(1000, 7.0)
        worker, zygote = ex.submit(facts).result()
        say(worker, zygote, os.getpid())
        sys.stdin.readline()
        assert (array == 7.0).all()
        assert ex.submit(facts).result() == (worker, zygote), "it is the same worker as before"
        say("unharmed")
"""

# Tries everything that a user could try on another one's processes; says what it could do.
ATTACKS = """
    import ctypes, errno, glob, signal, socket, struct
    from pathlib import Path
    pids = [int(word) for word in sys.argv[1:4]]
    directory, agent_socket = sys.argv[4:6]
    found = []
    def refused(what, act):
        try:
            got = act()
        except (PermissionError, FileNotFoundError, ProcessLookupError, ConnectionError) as error:
            return
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.ESRCH, errno.ENXIO):
                return
            got = error                   # it was let in
        found.append(f"COULD {what}: {got!r}"[:300])
    def call(result):
        if result == -1:
            raise OSError(ctypes.get_errno(), "refused")
        return result
    def attack():
        libc = ctypes.CDLL(None, use_errno=True)
        for pid in pids:
            for what, act in {
                "kill": lambda: os.kill(pid, 0), "stop": lambda: os.kill(pid, signal.SIGSTOP),
                "pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL),
                "ptrace": lambda: call(libc.ptrace(16, pid, 0, 0)),
                "memory": lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR),
                "maps": lambda: os.open(f"/proc/{pid}/maps", os.O_RDONLY),
                "environment": lambda: os.open(f"/proc/{pid}/environ", os.O_RDONLY),
                "descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
                "its cwd": lambda: os.readlink(f"/proc/{pid}/cwd"),
                "affinity": lambda: os.sched_setaffinity(pid, {0}),
                "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
                "limits": lambda: __import__("resource").prlimit(pid, 7, (1, 1)),
                "its descriptor": lambda: call(libc.syscall(438, os.pidfd_open(pid), 3, 0)),
                "oom": lambda: open(f"/proc/{pid}/oom_score_adj", "w").write("1000"),
            }.items():
                refused(f"{what} of {pid}", act)
            for number in range(10):
                refused(f"descriptor {number} of {pid}", lambda: os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
        for root, names, files in os.walk(directory):
            if root.endswith(f"run-{os.getuid()}"):
                names.clear()             # his own
                continue
            for name in files:
                path = os.path.join(root, name)
                if name != "socket":      # which is for all
                    refused(f"write {path}", lambda: os.open(path, os.O_WRONLY))
            for name in (*names, *files):
                path = os.path.join(root, name)
                refused(f"remove {path}", lambda: os.rename(path, path + ".gone"))
        for path in glob.glob("/sys/fs/cgroup/**/rfaas-*/cgroup.procs", recursive=True):
            refused(f"enter {path}", lambda: Path(path).write_text(str(os.getpid())))
            refused(f"another limit {path}", lambda: Path(path).with_name("memory.limit_in_bytes").write_text("1"))
        return found
    if sys.argv[6] == "rank":
        found = attack()
    else:
        with Executor(workers=1) as ex:
            found = ex.submit(attack).result()
    for line in (*found, "done"):
        say(line)
"""


@pytest.mark.parametrize("uid", [ALICE, BOB])
def test_workers_run_as_the_user_whose_rank_asked(site, uid):
    assert f"({uid}, {uid}, [{uid}], ({uid}, {uid}, {uid}))" in site.run(uid, WHO)


def uids(pid: int) -> set[int]:
    """All that its rights come from."""
    with open(f"/proc/{pid}/status") as file:
        return {int(word) for line in file if line.startswith("Uid:") for word in line.split()[1:]}


def test_the_agent_is_the_service_user_s_process_and_only_the_spawner_is_root_s(site):
    assert uids(site.agent.pid) == {SERVICE}
    assert uids(site.spawner) == {0}


def test_two_users_work_side_by_side_with_zygotes_of_their_own(site):
    with site.running(ALICE, HOLDS) as alices, site.running(BOB, HOLDS) as bobs:
        (worker_a, zygote_a, _), (worker_b, zygote_b, _) = (map(int, faults.line(rank).split())
                                                              for rank in (alices, bobs))
        assert zygote_a != zygote_b
        assert uids(worker_a) == uids(zygote_a) == {ALICE} and uids(worker_b) == uids(zygote_b) == {BOB}
        for rank in (alices, bobs):
            tell(rank, "end")
            assert faults.line(rank) == "unharmed"


@pytest.mark.parametrize("who", ["rank", "kernel"])
def test_one_user_can_do_nothing_to_another_one_s_rank_zygote_or_worker_nor_to_the_agent(site, who):
    with site.running(ALICE, HOLDS) as alices:
        worker, zygote, rank = map(int, faults.line(alices).split())
        for pids in ((worker, zygote, rank), (site.agent.pid, site.spawner, site.manager.pid)):
            said = site.run(BOB, ATTACKS, *pids, site.directory, site.directory / "node0" / "socket", who)
            assert said == "done\n"
        tell(alices, "go on")
        assert faults.line(alices) == "unharmed"


def test_what_a_user_may_do_to_his_own_shows_that_the_attack_is_one(site):
    """The judge of the test above sees what can be done."""
    with site.running(ALICE, HOLDS) as alices:
        worker, zygote, rank = map(int, faults.line(alices).split())
        said = site.run(ALICE, ATTACKS, rank, rank, rank, site.directory, site.directory / "node0" / "socket", "rank")
        assert all(f"COULD {what} of {rank}" in said for what in ("kill", "pidfd", "affinity", "maps"))


def test_a_lease_s_connection_of_another_user_is_refused_though_he_knows_its_number(site):
    """Numbers of leases and workers are no secret, and open nothing."""
    with site.running(ALICE, HOLDS) as alices:
        faults.line(alices)
        said = site.run(BOB, """
            import secrets, socket
            from rfaas_mpi import messages as msg
            for lease in range(1, 60):
                for worker in (1, 2, 3):
                    with socket.socket(socket.AF_UNIX) as connection:
                        connection.settimeout(20)
                        connection.connect(sys.argv[1])
                        hello = msg.Hello.make(msg.KIND_WORKER, bytes(16), lease=lease, worker=worker)
                        connection.sendall(hello.pack())
                        answer = connection.recv(64)
                        if len(answer) < 64 or msg.Hello.unpack(answer).status != msg.HELLO_OK:
                            continue
                        connection.sendall(secrets.token_bytes(32))
                        status, proof = msg.PROOF_ANSWER.unpack(connection.recv(msg.PROOF_ANSWER.size))
                        assert status != msg.HELLO_OK and proof == bytes(32), (lease, worker)
            say("refused")
        """, site.directory / "node0" / "socket")
        assert said == "refused\n"
        tell(alices, "go on")
        assert faults.line(alices) == "unharmed"


# --- what the agent does to others' workers ----------------------------------------------------------

def test_workers_of_users_have_low_priority_where_it_is_wanted_beside_their_memory_s_limit():
    with Site(words=["--priority", "low"]) as low, low.running(ALICE, HOLDS) as alices:
        worker, *_ = map(int, faults.line(alices).split())
        groups = {controller: path for _, controllers, path in
                  (line.split(":", 2) for line in Path(f"/proc/{worker}/cgroup").read_text().splitlines())
                  for controller in controllers.split(",")}
        assert all(f".{low.spawner}." in groups[controller] for controller in ("cpu", "memory") if controller in groups)
        assert any("rfaas-" in path for path in groups.values())
        tell(alices, "go on")
        assert faults.line(alices) == "unharmed"


def test_too_much_memory_is_the_kernel_s_error_for_a_user_of_a_cluster_too(site):
    said = site.run(ALICE, """
        import test_memory_limit
        with Executor(workers=1, memory_per_worker="128M") as ex:
            try:
                ex.submit(test_memory_limit.take_in_children, 256 << 20).result()
            except rfaas_mpi.KernelError as error:
                say(error)
            say(ex.submit(os.getuid).result())
    """)
    assert "134217728 bytes" in said and said.endswith(f"{ALICE}\n")


def test_a_user_s_worker_is_off_its_core_when_that_is_wanted_back(site):
    with site.running(ALICE, HOLDS) as alices:
        worker, zygote, _ = map(int, faults.line(alices).split())
        (lease,) = site.call("leases").leases
        site.call("revoke", api.RevokeLease(), lease=lease.id)
        wait_until(lambda: not faults.alive(worker) and site.free() == 2, "its core is free")
        assert faults.alive(zygote) and "can't be moved" not in site.agent.said()
        tell(alices, "go on")
        alices.wait(60)


def test_a_kernel_that_is_cancelled_by_force_is_ended_though_it_is_another_user_s(site):
    assert site.run(BOB, """
        with Executor(workers=1) as ex:
            future = ex.submit(time.sleep, 600)
            while not future.running():
                time.sleep(0.01)
            assert future.cancel(force=True)
            say(ex.submit(faults.plus_one, 2).result())
    """) == "3\n"


# --- ends -------------------------------------------------------------------------------------------

def test_a_killed_agent_leaves_nothing_of_any_user():
    with Site() as site, site.running(ALICE, HOLDS) as alices, site.running(BOB, HOLDS) as bobs:
        pids = [int(word) for rank in (alices, bobs) for word in faults.line(rank).split()[:2]]
        spawner = site.spawner
        assert all(faults.alive(pid) for pid in (*pids, spawner))
        site.agent.kill()
        wait_until(lambda: not any(faults.alive(pid) for pid in (*pids, spawner)), "all of it is gone")
        alices.kill(), bobs.kill()
        assert not groups_of(spawner)


def test_a_killed_spawner_ends_the_agent_and_all_of_its_workers():
    with Site() as site, site.running(ALICE, HOLDS) as alices:
        worker, zygote, _ = map(int, faults.line(alices).split())
        agent = site.agent.pid
        os.kill(site.spawner, signal.SIGKILL)
        wait_until(lambda: not any(faults.alive(pid) for pid in (worker, zygote)), "its workers are gone")
        wait_until(lambda: not faults.alive(agent), "the agent has ended")
        assert "spawner" in site.agent.said()


def test_an_agent_that_is_told_to_end_leaves_neither_processes_nor_groups():
    with Site() as site, site.running(ALICE, HOLDS) as alices:
        pids = [int(word) for word in faults.line(alices).split()[:2]]
        spawner = site.spawner
        assert site.agent.stop() == 0
        assert not faults.alive(spawner) and not groups_of(spawner)
        assert not any(faults.alive(pid) for pid in pids)


def groups_of(spawner: int) -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").glob("**/rfaas-*") if f".{spawner}." in path.name]


# --- who is not served -----------------------------------------------------------------------------

def test_root_and_users_below_the_lowest_uid_are_denied_with_the_reason(site):
    for uid in (0, 60_950):
        with pytest.raises(AssertionError, match=f"from uid 61000 on.*uid {uid}"):
            site.run(uid, WHO)


def test_a_user_without_the_interpreter_on_the_node_is_told_node_and_path(site):
    with pytest.raises(AssertionError, match=f"{socket.gethostname()}.*/no/such/python"):
        site.run(ALICE, """
            sys.executable = "/no/such/python"
            with Executor(workers=1, fallback=False) as ex:
                say(ex.submit(os.getpid).result())
        """)
