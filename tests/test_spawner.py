"""The root process that starts programs as users: what it does, what can't be asked of it, and what its end ends."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfaas_mpi.agent import groups
from rfaas_mpi.agent import spawner as module
from rfaas_mpi.agent.groups import Group, Roots, maker, remove_stale
from rfaas_mpi.agent.kernel_files import cgroup_mounts
from rfaas_mpi.agent.memory import held_bytes
from rfaas_mpi.agent.spawner import (
    ANSWER,
    Answer,
    Command,
    Op,
    Request,
    Spawner,
    SpawnerLost,
    identity,
    pack_command,
    unsafe_places,
)
from rfaas_mpi.errors import ServiceError

ALICE, BOB = 61001, 61002
UID_MIN = 60_000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="starts programs as other users: needs root")


class Started:
    """A program that was started as a user, with what it says."""

    def __init__(self, spawner: Spawner, uid: int, *argv: str, directory: str = "/", memory_bytes: int = 0) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.output, output_w = os.pipe()
        setup = os.memfd_create("rfaas-setup", os.MFD_CLOEXEC)
        command = os.memfd_create("rfaas-command", os.MFD_CLOEXEC)
        os.write(command, pack_command(Command(tuple(word.encode() for word in argv), directory.encode(),
                                               ((b"PATH", b"/usr/bin:/bin"), (b"MARK", b"mine")))))
        try:
            self.number, self.pid, self.pidfd = spawner.zygote(uid, theirs.fileno(), output_w, setup, command,
                                                                 memory_bytes)
        except BaseException:
            self.channel.close()
            os.close(self.output)
            raise
        finally:
            theirs.close()
            for fd in (output_w, setup, command):
                os.close(fd)

    def said(self) -> str:
        """All that it says until its end."""
        text = b""
        while select.select([self.output], [], [], 30)[0] and (piece := os.read(self.output, 1 << 16)):
            text += piece
        return text.decode()

    def line(self) -> str:
        """Its next line."""
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([self.output], [], [], 30)[0], "it says nothing"
            piece = os.read(self.output, 1)
            assert piece, f"it ended after {text!r}"
            text += piece
        return text.decode().strip()

    def ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 30)[0])

    def close(self) -> None:
        self.channel.close()
        os.close(self.output)
        os.close(self.pidfd)


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    with contextlib.closing(Spawner.start(UID_MIN)) as started:
        yield started


@pytest.fixture
def start(spawner):
    with contextlib.ExitStack() as stack:
        yield lambda *words, **more: stack.enter_context(contextlib.closing(Started(spawner, *words, **more)))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def make_group(spawner: Spawner, zygote: int, number: int, *, low: bool = False) -> None:
    for fd in spawner.make_group(zygote, number, 64 << 20, low=low):
        os.close(fd)


def pidfd(pid: int) -> int:
    return os.pidfd_open(pid)


# --- who it becomes ---------------------------------------------------------------------------

def test_what_is_started_is_that_user_in_everything_and_can_not_be_another_again(start):
    facts = "^(Uid|Gid|Groups|CapEff|CapPrm|CapAmb|NoNewPrivs):"
    said = start(ALICE, "/bin/sh", "-c", f"grep -E '{facts}' /proc/self/status; pwd; echo $MARK").said().split("\n")
    assert said[0].split() == ["Uid:"] + ["61001"] * 4
    assert said[1].split() == ["Gid:"] + ["61001"] * 4
    assert said[2].split() == ["Groups:", "61001"]
    assert [int(line.split()[1], 16) for line in said[3:6]] == [0, 0, 0]
    assert said[6].split() == ["NoNewPrivs:", "1"]
    assert said[7:9] == ["/", "mine"]


def test_it_holds_nothing_of_ours_but_what_it_was_given(start):
    said = start(ALICE, "/bin/sh", "-c",
                 "ls /proc/self/fd; cat /proc/self/oom_score_adj; ps -o sid= -p $$ | tr -d ' '; echo $$").said().split()
    *fds, score, session, pid = said
    # 5 or so is the directory that ls reads.
    assert set(fds) - {"5"} == {"0", "1", "2", "3", "4"}
    assert int(score) > 0 and session == pid


def test_a_user_of_the_nodes_database_has_its_groups(start):
    name = f"rfaas{uuid.uuid4().hex[:8]}"
    subprocess.run(["groupadd", "--gid", "61777", f"{name}g"], check=True)
    try:
        subprocess.run(["useradd", "--uid", "61003", "-M", "-N", "--gid", "61777", "--groups", "audio", name],
                       check=True)
        said = start(61003, "/usr/bin/id").said()
        audio = identity(61003).groups
        assert len(audio) == 2 and 61777 in audio
        assert f"uid=61003({name}) gid=61777({name}g)" in said and "(audio)" in said
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)
        subprocess.run(["groupdel", f"{name}g"], check=False, capture_output=True)


def test_a_user_that_is_not_in_the_database_never_gets_somebody_elses_group():
    name = f"rfaas{uuid.uuid4().hex[:8]}"
    subprocess.run(["groupadd", "--gid", "61004", name], check=True)
    try:
        with pytest.raises(PermissionError, match=name):
            identity(61004)
    finally:
        subprocess.run(["groupdel", name], check=True)
    assert identity(61004) == (61004, 61004, (61004,))


@pytest.mark.parametrize("uid", [0, 1, 999, UID_MIN - 1, 65534, 0xFFFF_FFFE, 0xFFFF_FFFF])
def test_root_and_who_is_no_user_is_refused(start, uid):
    with pytest.raises(PermissionError, match=f"uid {uid}"):
        start(uid, "/bin/true")


def test_what_the_user_may_not_run_or_enter_is_not_run_or_entered_for_him(start, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    (secret / "program").write_text("#!/bin/sh\necho it ran\n")
    (secret / "program").chmod(0o755)
    said = start(ALICE, str(secret / "program"), directory=str(secret)).said()
    assert "Permission denied" in said and str(secret / "program") in said and "it ran" not in said
    assert start(ALICE, "/bin/pwd", directory=str(secret)).said().strip() == "/"


def test_how_it_ended_is_told_once(spawner, start):
    first, second = start(ALICE, "/bin/sh", "-c", "exit 7"), start(BOB, "/bin/sh", "-c", "kill -9 $$")
    assert first.ended() and second.ended()
    told = {}
    while len(told) < 2:
        assert select.select([spawner], [], [], 30)[0]
        told |= {each.zygote: each.code for each in spawner.ended()}
    assert told == {first.number: 7, second.number: -9}


# --- what it sends signals to, and binds -------------------------------------------------------------

def test_a_descendant_is_killed_and_bound_by_its_pidfd(spawner, start, wait_until):
    started = start(ALICE, "/bin/sh", "-c", "sleep 600 & echo $!; wait")
    pid = int(started.line())
    fd = pidfd(pid)
    try:
        cpu = min(os.sched_getaffinity(0))
        spawner.bind(started.number, fd, [cpu])
        assert os.sched_getaffinity(pid) == {cpu}
        spawner.signal(started.number, fd, wait=True)
        assert select.select([fd], [], [], 30)[0]
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its parent has reaped it")
        with pytest.raises(ProcessLookupError):
            spawner.signal(started.number, fd, wait=True)
    finally:
        os.close(fd)


def test_others_processes_are_out_of_reach_whatever_pidfd_is_shown(spawner, start):
    alices, bobs = (start(uid, "/bin/sh", "-c", "echo; exec sleep 600") for uid in (ALICE, BOB))
    assert alices.line() == bobs.line() == ""
    stranger = subprocess.Popen(["sleep", "600"], user=ALICE, group=ALICE, extra_groups=[])
    own = pidfd(os.getpid())
    its = pidfd(stranger.pid)
    null = os.open("/dev/null", os.O_RDONLY)
    cpu = min(os.sched_getaffinity(0))
    try:
        for fd in (own, its, bobs.pidfd):
            with pytest.raises(PermissionError):
                spawner.signal(alices.number, fd, signal.SIGSTOP, wait=True)
            with pytest.raises(PermissionError):
                spawner.bind(alices.number, fd, [cpu])
        with pytest.raises(OSError, match="no pidfd"):
            spawner.signal(alices.number, null, signal.SIGSTOP, wait=True)
        with pytest.raises(ProcessLookupError):
            spawner.signal(99, own, wait=True)
        with pytest.raises(PermissionError):
            spawner.signal(alices.number, number=signal.SIGUSR1, wait=True)
        assert stranger.poll() is None and not gone(bobs.pid) and not gone(alices.pid)
    finally:
        stranger.kill()
        stranger.wait()
        for fd in (own, its, null):
            os.close(fd)


def test_a_zygote_that_passes_another_process_off_as_its_own_is_ended_in_its_place(spawner, start):
    liar, other = (start(ALICE, "/bin/sh", "-c", "echo; exec sleep 600") for _ in range(2))
    assert liar.line() == other.line() == ""
    own = pidfd(os.getpid())
    try:
        with pytest.raises(PermissionError):
            spawner.signal(liar.number, own, wait=True)
        assert liar.ended() and not gone(other.pid)
    finally:
        os.close(own)


NAMED = ("import ctypes, time; ctypes.CDLL(None).prctl(15, ctypes.c_char_p({name!r}), 0, 0, 0); "
         "print('on', flush=True); time.sleep(600)")


@pytest.mark.parametrize("name", [b"gr\xc3", b"\xff\xfe", b"a\nUid:\t0", b"\x1cPPid:\t1"])
def test_a_process_of_any_name_is_bound_and_killed(spawner, start, interpreter, name):
    started = start(ALICE, interpreter, "-I", "-c", NAMED.format(name=name))
    assert started.line() == "on"
    cpu = min(os.sched_getaffinity(0))
    spawner.bind(started.number, started.pidfd, [cpu])
    assert os.sched_getaffinity(started.pid) == {cpu}
    spawner.clear(started.number, started.pidfd, [], [cpu])
    spawner.signal(started.number, started.pidfd, wait=True)
    assert started.ended()


def test_the_memory_of_a_process_of_any_name_is_known(start, interpreter):
    started = start(ALICE, interpreter, "-I", "-c", NAMED.format(name=b"\x1cVmSwap:"))
    assert started.line() == "on"
    assert held_bytes(started.pid) > 0


def test_a_process_with_more_ancestors_than_are_looked_at_is_nobodys(spawner, start, interpreter):
    # A fork costs the kernel the more the more forks lie between it and the last exec.
    code = ("import os, time\n"
            "left = int(sys.argv[1])\n"
            "while left:\n"
            "    left -= 1\n"
            "    if os.fork():\n"
            "        time.sleep(600)\n"
            "    if left % 50 == 0 and left:\n"
            "        os.execv(sys.executable, [*sys.orig_argv[:-2], str(left), sys.argv[2]])\n"
            "print(os.getpid(), flush=True)\n"
            "time.sleep(600)\n")
    started = start(ALICE, interpreter, "-I", "-S", "-c", "import sys; exec(sys.argv[2])",
                    str(module.ANCESTORS_MAX + 2), code)
    last = pidfd(int(started.line()))
    try:
        with pytest.raises(PermissionError, match="ancestors"):
            spawner.signal(started.number, last, signal.SIGSTOP, wait=True)
    finally:
        os.close(last)


# --- bytes that are no request ------------------------------------------------------------------------

def raw(spawner: Spawner, data: bytes, fds: list[int]) -> Answer:
    socket.send_fds(spawner.channel, [data], fds)
    return spawner._hear()[0]


def test_what_is_no_request_is_refused_and_the_next_one_is_served(spawner, start):
    good = Request(Op.SIGNAL, 7, 1, argument=9).pack()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        for data, fds in ((b"x", []), (good + b"x", []), (good[:-1], []), (b"\0" * len(good), []),
                          (good, [null] * 2), (good, [null] * 20), (Request(99, 1).pack(), []),
                          (Request(Op.ENDED, 1).pack(), []), (Request(Op.ZYGOTE, 3, 1, uid=ALICE).pack(), [null])):
            assert raw(spawner, data, fds).error == errno.EINVAL
    finally:
        os.close(null)
    before = len(os.listdir(f"/proc/{spawner.pid}/fd"))
    assert start(ALICE, "/bin/echo", "still here").said() == "still here\n"
    assert len(os.listdir(f"/proc/{spawner.pid}/fd")) == before


@given(data=st.binary(max_size=module.REQUEST.size + 8), fds=st.integers(0, 9))
@settings(max_examples=300)
def test_any_bytes_are_a_request_or_a_value_error(data, fds):
    with contextlib.suppress(ValueError):
        assert Request.unpack(data, fds).op in list(Op)


@given(st.builds(Request, op=st.sampled_from([Op.SIGNAL]), serial=st.integers(0, 2**32 - 1),
                 zygote=st.integers(0, 2**32 - 1), group=st.integers(0, 2**32 - 1), uid=st.integers(0, 2**32 - 1),
                 argument=st.integers(0, 2**16 - 1), size_bytes=st.integers(0, 2**64 - 1),
                 cpus=st.binary(min_size=128, max_size=128), others=st.binary(min_size=128, max_size=128)))
def test_requests_arrive_as_they_were_made(request):
    assert Request.unpack(request.pack(), 0) == request


def test_an_answer_carries_at_least_the_beginning_of_its_text():
    answer = Answer(Op.LIMIT, 2**32 - 1, 7, errno.EPERM, 2**31, 65535, "ü" * 500)
    again = Answer.unpack(answer.pack())
    assert again._replace(text="") == answer._replace(text="") and again.text.startswith("ü" * 60)
    with pytest.raises(ValueError):
        Answer.unpack(bytes(ANSWER.size - 1))


# --- ends ------------------------------------------------------------------------------------------

# It and its children do all that a user can do to live on.
CLINGING = ("import ctypes, os, signal, sys, time\n"
            "for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
            "libc = ctypes.CDLL(None)\n"
            "def cling():\n"
            "    libc.prctl(1, 0); os.setsid()\n"
            "    os.closerange(3, 100)\n"
            "for depth in range(3):\n"
            "    if os.fork() == 0:\n"
            "        cling()\n"
            "        if os.fork() == 0:\n"
            "            cling()\n"
            "libc.prctl(1, 0)\n"
            "sys.stdout.write('%d\\n' % os.getpid()); sys.stdout.flush()\n"
            "time.sleep(600)\n")


def of_user(uid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid and not gone(int(entry.name)):
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python that every user may run."""
    for program in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(PermissionError, FileNotFoundError):
            subprocess.run([program, "-I", "-c", ""], user=ALICE, group=ALICE, extra_groups=[], check=True)
            return program
    raise AssertionError("no Python here may be run by every user: apt-get install python3")


def test_the_end_of_the_agents_socket_ends_all_of_it_however_it_clings(spawner, start, interpreter, wait_until):
    started = start(ALICE, interpreter, "-I", "-c", CLINGING)
    for _ in range(8):
        started.line()
    assert len(of_user(ALICE)) >= 8
    spawner.close()
    assert of_user(ALICE) == []
    assert spawner._process.returncode == 0
    assert not groups_left(spawner.pid)


def test_the_end_of_a_zygote_ends_what_it_left_and_tells(spawner, start, interpreter, wait_until):
    started = start(ALICE, interpreter, "-I", "-c", CLINGING)
    bobs = start(BOB, "/bin/sleep", "600")
    for _ in range(8):
        started.line()
    spawner.signal(started.number)
    wait_until(lambda: of_user(ALICE) == [], "all of it is gone")
    assert not gone(bobs.pid)


def test_a_spawner_that_is_killed_takes_what_it_started_along_and_the_agent_hears_of_it(spawner, start, wait_until):
    started = start(ALICE, "/bin/sh", "-c", "echo $$; exec sleep 600")
    started.line()
    os.kill(spawner.pid, signal.SIGKILL)
    assert started.ended()
    with pytest.raises(SpawnerLost, match="spawner"):
        while True:
            select.select([spawner], [], [], 30)
            spawner.ended()
    remove_stale(Roots.find())
    assert not groups_left(spawner.pid)


def test_an_agent_that_is_killed_leaves_nothing(interpreter, wait_until):
    code = ("import sys, os; sys.path[:0] = sys.argv[1:]\n"
            "from test_spawner import *\n"
            "spawner = Spawner.start(UID_MIN)\n"
            "started = Started(spawner, BOB, sys.argv[3], '-I', '-c', CLINGING)\n"
            "for _ in range(8): started.line()\n"
            "print(spawner.pid, flush=True); os.kill(os.getpid(), 9)\n")
    places = (Path(module.__file__).parents[2], Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, *map(str, places), interpreter], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until(lambda: of_user(BOB) == [] and gone(int(done.stdout)), "all of it is gone")
    assert not groups_left(int(done.stdout))


# --- control groups ------------------------------------------------------------------------------

def groups_left(pid: int) -> list[Path]:
    roots = Roots.find()
    return [path for root in (roots.memory, roots.pids) if root is not None for path in root.glob(f"rfaas-*.{pid}.*")]


@pytest.fixture
def roots() -> Roots:
    found = Roots.find()
    if found.memory is None:
        pytest.skip(found.why_not)
    return found


def test_a_worker_that_takes_more_than_its_group_may_is_killed_and_that_is_told(roots, spawner, start, interpreter):
    taking = ("import socket; print('begun', flush=True)\n"
              "channel = socket.socket(fileno=3); channel.recv(1)\n"
              "held = bytearray(200 << 20)\nprint('it had room', flush=True)\n")
    started = start(ALICE, interpreter, "-I", "-c", taking)
    started.line()
    make_group(spawner, started.number, 1)
    spawner.enter(started.number, 1, started.pidfd)
    started.channel.send(b"x")
    assert "it had room" not in started.said()
    assert started.ended()
    while not (ended := spawner.ended()):
        select.select([spawner], [], [], 30)
    assert ended[0].code == -signal.SIGKILL


def test_a_zygote_that_takes_more_than_it_may_is_killed_and_the_reason_is_told(roots, spawner, start, interpreter):
    held = ("held = bytearray(%d << 20); held[::4096] = b'x' * len(held[::4096]); print('it had room', flush=True)\n"
            "import time; time.sleep(600)")
    modest, greedy = (start(ALICE, interpreter, "-I", "-c", held % megabytes, memory_bytes=64 << 20)
                      for megabytes in (8, 200))
    assert modest.line() == "it had room"
    assert "it had room" not in greedy.said() and greedy.ended()
    while not (ended := spawner.ended()):
        select.select([spawner], [], [], 30)
    assert [(each.zygote, each.code) for each in ended] == [(greedy.number, -signal.SIGKILL)]
    assert "memory" in ended[0].why
    assert 8 << 20 <= Group(f"{maker(spawner.pid)}-z{modest.number}", roots).anonymous_bytes() < 64 << 20


def test_the_end_of_a_group_ends_what_is_in_it_and_tells_how_often_its_limit_killed(roots, spawner, start, wait_until):
    started = start(ALICE, "/bin/sh", "-c", "sleep 600 & echo $!; wait; echo it ended; sleep 600")
    child = int(started.line())
    fd = pidfd(child)
    try:
        make_group(spawner, started.number, 3)
        spawner.enter(started.number, 3, fd)
        assert str(child) in (roots.memory / f"{maker(spawner.pid)}-w3" / "cgroup.procs").read_text().split()
        spawner.limit(started.number, 3, 128 << 20)
        assert spawner.remove_group(started.number, 3) == 0
        assert started.line() == "it ended"
        wait_until(lambda: not [path for path in groups_left(spawner.pid) if path.name.endswith("w3")], "it is removed")
        with pytest.raises(FileNotFoundError):
            spawner.remove_group(started.number, 3)
    finally:
        os.close(fd)


def test_a_worker_of_low_priority_is_in_a_group_that_has_it(roots, spawner, start, wait_until):
    started = start(ALICE, "/bin/sh", "-c", "echo; exec sleep 600")
    started.line()
    make_group(spawner, started.number, 4, low=True)
    spawner.enter(started.number, 4, started.pidfd)
    assert roots.cpu is not None
    group = roots.cpu / f"{maker(spawner.pid)}-w4"
    assert str(started.pid) in (group / "cgroup.procs").read_text().split()
    low = {"cpu.idle": "1", "cpu.weight": "1", "cpu.shares": "2"}
    assert any((group / name).exists() and (group / name).read_text().strip() == value for name, value in low.items())
    # On a busy core it would need long to end.
    spawner.clear(started.number, started.pidfd, [], os.sched_getaffinity(0))
    assert not any((group / name).exists() and (group / name).read_text().strip() == value for name, value in low.items())
    assert spawner.remove_group(started.number, 4) == 0
    assert started.ended()
    wait_until(lambda: not group.exists(), "the group is removed")


def test_a_killed_process_is_taken_off_its_cores_with_what_it_started(spawner, start):
    started = start(ALICE, "/bin/sh", "-c", "sh -c 'sleep 600 & echo $! $$; wait' & echo $!; wait; sleep 600")
    shell, pids = int(started.line()), started.line().split()
    first, fd = min(os.sched_getaffinity(0)), pidfd(shell)
    other = {max(os.sched_getaffinity(0))} - {first} or {first}
    try:
        assert pids[1] == str(shell)
        spawner.bind(started.number, fd, [first])
        os.sched_setaffinity(int(pids[0]), [first])
        spawner.signal(started.number, fd)
        while not spawner.clear(started.number, fd, [first] if other != {first} else [], other):
            pass
        for pid in (shell, int(pids[0])):
            with contextlib.suppress(ProcessLookupError):
                assert gone(pid) or os.sched_getaffinity(pid) == other
    finally:
        os.close(fd)


def test_a_group_takes_only_its_own_users_processes(roots, spawner, start):
    alices, bobs = (start(uid, "/bin/sh", "-c", "echo; exec sleep 600") for uid in (ALICE, BOB))
    assert alices.line() == bobs.line() == ""
    make_group(spawner, alices.number, 1)
    for zygote, fd in ((alices.number, bobs.pidfd), (alices.number, pidfd(os.getpid())), (bobs.number, bobs.pidfd)):
        with pytest.raises((PermissionError, FileNotFoundError)):
            spawner.enter(zygote, 1, fd)
        if fd != bobs.pidfd:
            os.close(fd)
    with pytest.raises(FileExistsError):
        make_group(spawner, alices.number, 1)


def test_a_user_enters_his_worker_s_group_himself_and_can_let_in_nobody_else(roots, spawner, start, interpreter):
    if roots.unified:
        pytest.skip("in version 2 processes are moved")
    code = ("import os, socket\n"
            "channel = socket.socket(fileno=3)\n"
            "print(os.getpid(), flush=True)\n"
            "while data := (got := socket.recv_fds(channel, 99, 3))[0]:\n"
            "    for fd in got[1]:\n"
            "        try:\n"
            "            os.write(fd, data)\n"
            "        except OSError as error:\n"
            "            print(error.strerror, flush=True)\n"
            "            break\n"
            "    else:\n"
            "        print('in', flush=True)\n")
    alices, bobs = (start(uid, interpreter, "-I", "-S", "-c", code) for uid in (ALICE, BOB))
    assert alices.line() == str(alices.pid) and bobs.line() == str(bobs.pid)
    group = Group(f"{maker(spawner.pid)}-w1", roots)
    entrances = spawner.make_group(alices.number, 1, 64 << 20)
    try:
        for who, pid, said in ((alices, bobs.pid, "Permission denied"), (alices, os.getpid(), "Permission denied"),
                               (bobs, 0, "Permission denied"), (alices, 0, "in")):
            assert not group.holds(alices.pid)
            socket.send_fds(who.channel, [str(pid).encode()], entrances)
            assert who.line() == said
    finally:
        for fd in entrances:
            os.close(fd)
    assert group.holds(alices.pid) and group.members() == [alices.pid]
    assert (group.memory / "tasks").stat().st_uid == 0, "nobody opens it once more"


def test_the_end_of_a_group_ends_what_has_entered_one_hierarchy_only(roots):
    if roots.unified:
        pytest.skip("version 2 has one hierarchy")
    group = Group.make(f"{maker()}-w1", roots, 64 << 20, low=True)
    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    try:
        for sleeper, directory in zip(sleepers, (group.memory, group.pids, group.cpu), strict=True):
            (directory / "tasks").write_text(str(sleeper.pid))
            assert not group.holds(sleeper.pid)
        assert group.members() == sorted(sleeper.pid for sleeper in sleepers)
    finally:
        group.close()
        assert [sleeper.wait(30) for sleeper in sleepers] == [-signal.SIGKILL] * 3
    assert not groups_left(os.getpid())


def test_a_group_of_the_same_name_in_another_hierarchy_is_not_taken_for_it(roots):
    if roots.unified:
        pytest.skip("version 2 has one hierarchy")
    # systemd gives users a part of its own hierarchy, where they may make groups as they like.
    others = [Path(mount.point) for mount in cgroup_mounts(Path("/proc/self/mountinfo").read_text())
              if not {"memory", "pids", "cpu", "cpuset"} & set(mount.controllers)]
    other = next(place for place in others if (place / "tasks").exists())
    group = Group.make(f"{maker()}-w2", roots, 64 << 20)
    namesake = other / group.name
    namesake.mkdir()
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        assert group.pids is not None
        for directory in (namesake, group.pids):
            (directory / "tasks").write_text(str(sleeper.pid))
        assert not group.holds(sleeper.pid), "it is not bounded by that"
        (group.memory / "tasks").write_text(str(sleeper.pid))
        assert group.holds(sleeper.pid)
    finally:
        group.close()
        sleeper.wait(30)
        namesake.rmdir()


def test_groups_of_who_lives_no_more_are_removed_with_what_runs_there_and_no_others(roots):
    done = subprocess.Popen(["true"])
    dead = f"rfaas-{os.stat('/proc/self/ns/pid').st_ino}.{done.pid}.1-w1"
    done.wait()
    left, ours = Group.make(dead, roots), Group.make(f"{maker()}-w1", roots)
    elsewhere = Group.make("rfaas-1.1.1-w1", roots)
    process = subprocess.Popen(["sleep", "600"])
    try:
        left.enter(process.pid)
        assert dead in remove_stale(roots)
        assert process.wait(30) == -signal.SIGKILL
        assert not left.memory.exists() and ours.memory.exists() and elsewhere.memory.exists()
    finally:
        process.kill()
        process.wait()
        for group in (left, ours, elsewhere):
            group.close()


def test_a_group_that_can_not_be_removed_keeps_no_other_one_from_it(roots, monkeypatch):
    monkeypatch.setattr(groups, "END_S", 0.05)
    inode = os.stat("/proc/self/ns/pid").st_ino
    stuck, dead = (Group.make(f"rfaas-{inode}.{1 << 23}.{number}-w1", roots) for number in (77, 78))
    inner = stuck.memory / "inner"
    inner.mkdir()
    try:
        removed = remove_stale(roots)
        assert dead.name in removed and stuck.name not in removed
        assert stuck.memory.exists() and not dead.memory.exists()
    finally:
        inner.rmdir()
        for group in (stuck, dead):
            group.close()


# --- whose files they are afterwards --------------------------------------------------------------

def left_root(directory: Path) -> str:
    """What a process of root's says that gives its files away and becomes ALICE."""
    code = ("import sys; from pathlib import Path; from rfaas_mpi.agent.spawner import Identity, leave_root\n"
            "try:\n"
            f"    leave_root(Identity({ALICE}, {ALICE}, ({ALICE},)), Path(sys.argv[1]))\n"
            "except Exception as error:\n"
            "    print(error)")
    return subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True).stdout


def test_the_services_user_gets_the_directory_and_the_files_there_and_nobody_elses(tmp_path):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    for directory in (place, elsewhere):
        directory.mkdir()
        (directory / "file").write_text("")
    (place / "link").symlink_to(elsewhere / "file")
    (place / "name").hardlink_to(elsewhere / "file")
    left_root(place)
    assert place.stat().st_uid == (place / "file").stat().st_uid == ALICE
    assert elsewhere.stat().st_uid == (elsewhere / "file").stat().st_uid == 0


def test_a_link_in_the_place_of_the_services_directory_gives_nothing_away(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("")
    (tmp_path / "place").symlink_to(tmp_path / "elsewhere")
    assert "is not a directory" in left_root(tmp_path / "place")
    assert (tmp_path / "elsewhere" / "file").stat().st_uid == 0


# --- what it runs from -----------------------------------------------------------------------------

def test_it_does_not_start_from_files_that_a_user_it_serves_could_change(tmp_path, monkeypatch):
    place = tmp_path / "site"
    place.mkdir()
    assert not [line for line in unsafe_places([str(place)], UID_MIN) if str(place) in line]
    os.chown(place, ALICE, -1)
    assert [line for line in unsafe_places([str(place)], UID_MIN) if line == f"{place} belongs to uid {ALICE}"]
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(ServiceError, match=str(place)):
        Spawner.start(UID_MIN)
    os.chown(place, 0, -1)
    place.chmod(0o777)
    with pytest.raises(ServiceError, match="everybody"):
        Spawner.start(UID_MIN)


def unsafe_in(tmp_path: Path, path: Path) -> list[str]:
    return [line.removeprefix(f"{tmp_path}/") for line in unsafe_places([str(path)], UID_MIN) if str(tmp_path) in line]


def test_a_way_through_a_users_directory_is_unsafe_wherever_it_leads(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "link").symlink_to("../site")
    (tmp_path / "first").symlink_to(tmp_path / "users" / "link")
    assert unsafe_in(tmp_path, tmp_path / "first") == []
    os.chown(tmp_path / "users", ALICE, -1)
    assert unsafe_in(tmp_path, tmp_path / "first") == [f"users belongs to uid {ALICE}"]
    assert unsafe_in(tmp_path, tmp_path / "site") == []


def test_a_users_link_is_unsafe_also_where_only_owners_replace_theirs(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "site").mkdir()
    (shared / "link").symlink_to(tmp_path / "site")
    assert unsafe_in(tmp_path, shared / "link") == []
    os.chown(shared / "link", ALICE, -1, follow_symlinks=False)
    assert unsafe_in(tmp_path, shared / "link") == [f"shared/link belongs to uid {ALICE}"]
    assert unsafe_in(tmp_path, shared) == ["shared can be written to by everybody"]
    assert unsafe_in(tmp_path, shared / "site.zip") == ["shared/site.zip can be made by everybody"]


def test_a_place_that_a_group_may_write_to_is_unsafe_unless_it_is_roots(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    site.chmod(0o775)
    assert unsafe_in(tmp_path, site / "package") == []
    os.chown(site, -1, ALICE)
    assert unsafe_in(tmp_path, site / "package") == [f"site can be written to by group {ALICE}"]


def test_links_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert unsafe_in(tmp_path, tmp_path / "a") == []
