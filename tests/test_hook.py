"""A job that starts on a node that lends: everything back before its first task, whatever state the agent is in."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from cluster import wait_until
from lending_node import GUARD_S, HOOK, LendingNode
from site_of_users import ALICE, interpreter
from test_apps import needs_two_cores

from rfaas_mpi.agent.groups import Group, Roots
from rfaas_mpi.agent.hook import HOLD_S, HookDoor, Starting
from rfaas_mpi.agent.kernel_files import read_text
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.slurm import hooks

SOURCE = Path(__file__).parents[1] / "csrc" / "hook" / "hook.c"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes control groups: needs root")


# --- what is decided ---------------------------------------------------------

def test_nothing_is_lent_until_the_job_s_group_says_what_is_its():
    starting = Starting()
    starting.prolog("7", 100.0)
    assert starting.jobs == ("7",)
    assert not starting.there({"6"}) and starting.jobs
    assert starting.there({"6", "7"}) and not starting.jobs


def test_a_job_that_ends_or_never_comes_is_waited_for_no_longer():
    starting = Starting()
    starting.prolog("7", 100.0)
    starting.prolog("8", 101.0)
    assert starting.epilog("7") and not starting.epilog("7")
    assert not starting.tick(100.5 + HOLD_S) and starting.next_deadline() == 101.0 + HOLD_S
    assert starting.tick(101.0 + HOLD_S) and not starting.jobs


# --- whom the agent hears ----------------------------------------------------

@pytest.fixture
def door(tmp_path) -> Iterator[HookDoor]:
    with selectors.DefaultSelector() as selector:
        door = HookDoor(selector, tmp_path / "hook", "agent 1 1\n")
        yield door
        door.close()
        door.close()
    assert not list((tmp_path / "hook").iterdir())


def say(door: HookDoor, text: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(GUARD_S)
    connection.connect(str(door.path))
    connection.sendall(text)
    return connection


def test_a_prolog_is_answered_and_what_was_said_while_nobody_listened_is_heard(door):
    say(door, b"epilog 6 0\n").close()
    with say(door, b"prolog 7 1000\n") as hook:
        ends, starts = door.hear()
        assert (ends.starts, ends.job, starts.starts, starts.job) == (False, "6", True, "7")
        assert door.hear() == []
        door.answer([starts.caller])
        assert hook.recv(100) == b"free\n" and hook.recv(1) == b""
        door.answer([starts.caller, ends.caller])        # they are gone


@pytest.mark.parametrize("text", [b"prolog\n", b"prolog x 1\n", b"lend 7 1\n", b"\xff" * 64, b"prolog 7 1" + b"1" * 60])
def test_what_makes_no_sense_is_sent_away(door, text):
    with say(door, text) as hook:
        assert door.hear() == []
        with contextlib.suppress(ConnectionResetError):
            assert hook.recv(1) == b""


def test_half_a_line_is_waited_for(door):
    with say(door, b"prolog 7") as hook:
        assert door.hear() == []
        hook.sendall(b" 1000\n")
        assert [news.job for news in door.hear()] == ["7"]


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_hooks_are_not_heard_where_others_could_change_what_they_kill(tmp_path, mode):
    tmp_path.chmod(mode)
    with selectors.DefaultSelector() as selector, pytest.raises(ConfigError, match="only uid"):
        HookDoor(selector, tmp_path, "")


@needs_root
def test_a_user_who_reaches_the_socket_is_not_heard(door):
    door.path.chmod(0o666)
    for directory in door.path.parents[:-1]:
        if directory.owner() == "root" and directory.stat().st_mode & 0o001 == 0:
            directory.chmod(0o755)
    words = [interpreter(), "-c", "import socket, sys\nwith socket.socket(socket.AF_UNIX) as s:\n"
             "    s.connect(sys.argv[1])\n    s.sendall(b'prolog 7 0\\n')\n", door.path]
    subprocess.run(words, user=ALICE, group=ALICE, extra_groups=[], cwd="/", check=True, timeout=GUARD_S)
    assert door.hear() == []


# --- the hook alone ----------------------------------------------------------

@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module", params=["gcc", "clang"])
def run(request, tmp_path_factory) -> Callable[..., None]:
    """Runs the hook as slurmd does, built with whatever sees an error; it must end well whatever there is."""
    program = tmp_path_factory.mktemp("hook") / "rfaas-hook"
    subprocess.run([request.param, "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program,
                    "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], check=True, timeout=GUARD_S)
    return functools.partial(run_hook, program)


def run_hook(program: Path, directory: Path, *words: str, **changes: str) -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_UID": "1000", **changes}
    done = subprocess.run([program, *words, *([directory] if words else [])], env=environment, cwd="/", timeout=GUARD_S,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def name(directory: Path, process: subprocess.Popen[bytes], *groups: object) -> None:
    """Writes what an agent does."""
    began = read_text(Path(f"/proc/{process.pid}/stat")).rpartition(")")[2].split()[19]
    (directory / "groups").write_text("".join(f"group {group}\n" for group in groups)
                                      + f"agent {process.pid} {began}\n")
    (directory / "groups").chmod(0o644)


class Agent:
    """Listens, and says `answer` to the first hook that comes; None: it accepts nobody."""

    def __init__(self, directory: Path, answer: bytes | None) -> None:
        self.heard = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(directory / "socket"))
        self._socket.listen(8)
        self._socket.settimeout(GUARD_S)
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Agent:
        if self._answer is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._answer is not None:
            self._thread.join(GUARD_S)
        self._socket.close()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(GUARD_S)
            self.heard = connection.recv(100)
            if self._answer:
                connection.sendall(self._answer)


def test_the_hook_ends_well_where_there_is_no_agent_and_never_was_one(run, tmp_path):
    run(tmp_path / "nowhere", "prolog")
    run(tmp_path / "nowhere", "epilog")
    run(tmp_path / ("x" * 200), "prolog")
    run(tmp_path)                    # as Slurm itself starts it


def test_an_agent_that_answers_is_told_the_job_and_keeps_what_it_has(run, tmp_path, sleeper):
    name(tmp_path, sleeper)
    with Agent(tmp_path, b"free\n") as agent:
        run(tmp_path, "prolog")
    assert agent.heard == b"prolog 7 1000\n"
    assert sleeper.poll() is None


def test_a_job_that_ends_is_told_and_nobody_is_waited_for(run, tmp_path, sleeper):
    name(tmp_path, sleeper)
    with Agent(tmp_path, b"") as agent:
        run(tmp_path, "epilog")
    assert agent.heard == b"epilog 7 1000\n"
    assert sleeper.poll() is None


@pytest.mark.parametrize("answer", [None, b"", b"fre", b"later"], ids=["hung", "hangs up", "half", "nonsense"])
def test_what_an_agent_without_an_answer_started_ends_with_it(run, tmp_path, sleeper, answer):
    name(tmp_path, sleeper)
    with Agent(tmp_path, answer):
        run(tmp_path, "prolog")
    assert sleeper.wait(GUARD_S) == -signal.SIGKILL


def test_a_job_that_has_begun_is_noted_until_its_epilog_for_an_agent_that_begins_later(run, tmp_path):
    run(tmp_path, "prolog")
    run(tmp_path, "prolog", SLURM_JOB_ID="8")
    run(tmp_path, "epilog", SLURM_JOB_ID="8")
    run(tmp_path, "epilog", SLURM_JOB_ID="9")
    with selectors.DefaultSelector() as selector, contextlib.closing(HookDoor(selector, tmp_path, "")) as door:
        assert door.missed() == ("7",)


def age(path: Path, by_s: float) -> None:
    at = path.stat().st_mtime - by_s
    os.utime(path, (at, at))


def test_a_job_that_ended_without_an_epilog_is_not_waited_for_for_ever(run, tmp_path):
    """Slurm runs none where slurmd was killed as the job ended."""
    run(tmp_path, "prolog")
    run(tmp_path, "prolog", SLURM_JOB_ID="8")
    age(tmp_path / "starting-7", HOLD_S + 5)
    with selectors.DefaultSelector() as selector, contextlib.closing(HookDoor(selector, tmp_path, "")) as door:
        assert door.missed() == ("8",)


def test_what_was_noted_of_a_job_without_an_epilog_goes_with_the_next_one(run, tmp_path):
    for job in "78":
        run(tmp_path, "prolog", SLURM_JOB_ID=job)
        age(tmp_path / f"starting-{job}", HOLD_S + 5)
    run(tmp_path, "prolog", SLURM_JOB_ID="8")
    assert {path.name for path in tmp_path.iterdir()} == {"starting-8"}, "it begins again, with the same number"


def test_nothing_is_noted_where_others_may_write(run, tmp_path):
    (tmp_path / "victim").write_text("")
    (tmp_path / "starting-8").symlink_to(tmp_path / "victim")
    run(tmp_path, "prolog", SLURM_JOB_ID="8")
    tmp_path.chmod(0o777)
    run(tmp_path, "prolog")
    run(tmp_path, "epilog", SLURM_JOB_ID="8")
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "starting-8"}


def test_words_of_slurm_that_are_no_numbers_go_nowhere(run, tmp_path):
    with Agent(tmp_path, b"free\n") as agent:
        run(tmp_path, "prolog", SLURM_JOB_ID="7\nepilog 8", SLURM_JOB_UID="")
    assert agent.heard == b"prolog 0 0\n"


def test_a_list_that_others_may_write_is_not_believed(run, tmp_path, sleeper):
    name(tmp_path, sleeper)
    (tmp_path / "groups").chmod(0o666)
    run(tmp_path, "prolog")
    assert sleeper.poll() is None


def test_a_process_that_only_has_the_agent_s_number_lives(run, tmp_path, sleeper):
    (tmp_path / "groups").write_text(f"agent {sleeper.pid} 1\n")
    run(tmp_path, "prolog")
    assert sleeper.poll() is None


@needs_root
def test_what_is_in_the_agent_s_groups_is_killed_and_nothing_else(run, tmp_path, sleeper):
    roots = Roots.find()
    assert roots.memory is not None, roots.why_not
    inside, beside = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"])
    mine = Group.make(f"rfaas-test.{os.getpid()}.1-w1", roots, 1 << 30)
    other = Group.make(f"rfaas-test.{os.getpid()}.2-w1", roots, 1 << 30)
    try:
        mine.enter(inside.pid)
        other.enter(beside.pid)
        name(tmp_path, sleeper, *dict.fromkeys(directory.parent / f"rfaas-test.{os.getpid()}.1-"
                                               for directory in (mine.memory, mine.pids) if directory is not None))
        run(tmp_path, "prolog")
        assert inside.wait(GUARD_S) == -signal.SIGKILL
        assert beside.poll() is None and sleeper.poll() is None, "others', and the agent, live on"
    finally:
        for process in (inside, beside):
            process.kill()
            process.wait()
        mine.close()
        other.close()


# --- with Slurm --------------------------------------------------------------

@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[LendingNode]:
    assert not (reason := slurm_cluster.why_not()), reason
    directory = tmp_path_factory.mktemp("hooks")
    directory.chmod(0o755)
    with LendingNode(directory) as found:
        yield found


@needs_root
@needs_two_cores
def test_no_worker_is_left_when_a_job_s_first_task_starts_and_after_it_cores_are_lent_again(node):
    with node.borrowing():
        job = node.job()
        node.slurm.wait_until(lambda: node.slurm.output(job), "the job runs")
        wait_until(lambda: f"job={job} is about to start" in node.site.agent.said(), "the agent was told")
        wait_until(lambda: node.site.free() == 0, "nothing is lent to anybody else")
        assert node.end(job) == "workers 0\n"
        wait_until(lambda: node.workers() or node.site.free(), "its cores are lent again")


@needs_root
@needs_two_cores
def test_a_stopped_agent_keeps_no_worker_on_a_job_s_cores_and_no_job_from_its_node(node):
    with node.borrowing():
        node.site.agent.signal(signal.SIGSTOP)
        try:
            job = node.job()
            assert node.end(job) == "workers 0\n"
            state = node.slurm.run("sinfo", "-h", "-N", "-o", "%T").strip()
            assert state in ("idle", "completing"), state
        finally:
            node.site.agent.signal(signal.SIGCONT)
        wait_until(lambda: f"job={job} is about to start" in node.site.agent.said(), "the agent hears what it missed")


@needs_root
@needs_two_cores
def test_nothing_is_left_once_the_hook_ends_nor_lent_before_the_job_it_was_for_does(node):
    with node.borrowing():
        run_hook(HOOK, node.directory, "prolog", SLURM_JOB_ID="99")
        assert node.workers() == 0
        # Other jobs that come and go are not the one that is waited for.
        assert node.slurm.finish("#!/bin/bash\n", "--ntasks=1") == ""
        assert node.site.free() == 0 and node.workers() == 0
        run_hook(HOOK, node.directory, "epilog", SLURM_JOB_ID="99")
        wait_until(lambda: node.workers() or node.site.free(), "its cores are lent again")


@needs_root
@needs_two_cores
def test_slurm_tells_the_hook_itself_which_of_the_two_it_is(node):
    assert node.slurm.finish("#!/bin/bash\n", "--ntasks=1") == ""
    contexts = node.top / "contexts"
    node.slurm.wait_until(lambda: len(contexts.read_text().splitlines()) >= 2, "both have run")
    assert {"prolog prolog_slurmd", "epilog epilog_slurmd"} == set(contexts.read_text().splitlines())


@needs_root
@needs_two_cores
def test_what_is_to_be_added_to_slurm_is_said_by_what_it_has(node):
    said = json.loads(node.slurm.run(sys.executable, "-m", "rfaas_mpi.cli", "slurm", "install", "--json",
                                     PYTHONPATH=str(HOOK.parents[2])))
    # It has all of it: the agent's part is for who knows where that is.
    assert said["add"] == {} and said["kills"] == [] and said["hook"] == str(HOOK)


# --- what a site has to add --------------------------------------------------

@pytest.mark.parametrize("line", [
    "pkill -u $SLURM_JOB_USER", "/usr/bin/pkill -9 -U 1000", "killall -u $USER -9", "pkill --signal KILL --euid $U",
    "kill -9 $(pgrep -u $U)", "pgrep -u $U | xargs kill", "ps -u $U -o pid= | xargs kill -9", "su $U -c 'kill -9 -1'",
    "loginctl terminate-user $SLURM_JOB_USER", "loginctl --no-pager kill-user $U", "systemctl stop user-$UID.slice"])
def test_a_line_that_ends_all_that_a_user_runs_is_found(line):
    assert hooks.killers("epilog", f"#!/bin/sh\n# {line}\nif true; then\n  {line}\nfi\n") == (
        hooks.Found("epilog", 4, line),)


@pytest.mark.parametrize("line", ["kill $pid", "pkill -f stale-daemon", "kill -1 $daemon", "loginctl list-users",
                                  "rm -rf /tmp/$SLURM_JOB_USER", "systemctl stop nfs", "ps -u $U"])
def test_what_ends_nobody_s_workers_is_left_alone(line):
    assert hooks.killers("epilog", f"#!/bin/sh\n{line}\n") == ()


def test_a_site_without_hooks_is_told_all_that_it_has_to_set():
    advice = hooks.advise("Prolog = (null)\nEpilog = (null)\nPrologFlags = X11\nProctrackType = proctrack/linuxproc\n"
                          "TaskPlugin = task/affinity\n", "/x/rfaas-hook", {"Prolog": {}, "Epilog": {}})
    assert advice.add == {"slurm.conf, on all nodes alike": (
        "Prolog=/x/rfaas-hook", "Epilog=/x/rfaas-hook", "PrologFlags=X11,Alloc,Contain",
        "ProctrackType=proctrack/cgroup", "TaskPlugin=task/cgroup,task/affinity")}


def test_a_site_with_hooks_of_its_own_is_told_what_to_add_to_them_and_what_is_wrong_there():
    shown = ("Epilog                  = /etc/e.sh\nHealthCheckProgram      = /etc/health\nProlog[0] = /etc/p.d/*\n"
             "PrologFlags = Alloc,Contain\nProctrackType = proctrack/cgroup\nTaskPlugin = task/cgroup\n")
    assert hooks.paths(shown) == {"Prolog": ("/etc/p.d/*",), "Epilog": ("/etc/e.sh",),
                                  "HealthCheckProgram": ("/etc/health",)}
    advice = hooks.advise(shown, "/x/rfaas-hook", {
        "Prolog": {"/etc/p.d/1": "#!/bin/sh\n"}, "Epilog": {"/etc/e.sh": "#!/bin/sh\npkill -u $U\n"},
        "HealthCheckProgram": {"/etc/health": None}})
    assert advice.add == {"at the beginning of /etc/p.d/1 (slurm.conf's Prolog)": ("/x/rfaas-hook prolog",),
                          "at the end of /etc/e.sh (slurm.conf's Epilog)": ("/x/rfaas-hook epilog",)}
    assert advice.kills == (hooks.Found("/etc/e.sh", 2, "pkill -u $U"),)
    assert [note.startswith("/etc/health (HealthCheckProgram)") for note in advice.notes] == [True]
