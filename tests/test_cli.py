"""The command line answers on stdout alone, in one JSON object if asked, and ends with the status it documents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from rfaas_mpi._version import __version__
from rfaas_mpi.cli import output

COMMANDS = [(), ("demo",), ("app",), ("up",), ("down",), ("status",), ("doctor",), ("bench",), ("bench", "latency"),
            ("bench", "throughput"), ("bench", "payload"), ("bench", "cold"), ("bench", "split"), ("bench", "faults"),
            ("bench", "all"), ("version",)]
GROUPS = [(), ("bench",)]


def rfaas(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 100, **options}
    return subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", *arguments], **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_shows_an_example(command):
    done = rfaas(*command, "--help", env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == output.OK, done.stderr
    assert "Example:" in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert done.stderr == ""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in GROUPS], ids=" ".join)
def test_every_command_has_json_and_debug(command):
    text = rfaas(*command, "--help").stdout
    assert "--json" in text and "--debug" in text


def test_the_list_of_commands_is_not_cut_short():
    for group in GROUPS:
        usage, *lines = rfaas(*group, "--help").stdout.splitlines()
        assert usage.startswith("Usage: ")
        assert [line for line in lines if line.endswith("...")] == []


def test_the_documented_statuses_are_the_real_ones():
    text = rfaas("--help").stdout
    for status in (output.OK, output.FAILED, output.USAGE, output.NOT_RUNNING, output.BUG, output.INTERRUPTED,
                   output.CLOSED_STDOUT):
        assert any(line.split()[:1] == [str(status)] for line in text.splitlines()), status


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_without_a_command_the_help_is_shown_as_an_error(group):
    done = rfaas(*group)
    assert done.returncode == output.USAGE
    assert done.stdout == ""
    assert "Usage: rfaas" in done.stderr


def test_version_is_the_packages():
    done = rfaas("version", "--json")
    assert done.returncode == output.OK
    assert json.loads(done.stdout)["version"] == __version__
    assert rfaas("--version").stdout == f"rfaas {__version__}\n"


def test_version_loads_neither_numpy_nor_the_data_plane_nor_mpi():
    code = ("import sys; from rfaas_mpi.cli import main; main(['version'])\n"
            "heavy = {'numpy', 'mpi4py', 'rfaas_mpi.fabric', 'rfaas_mpi.executor', 'msgspec'} & set(sys.modules)\n"
            "sys.exit(f'loaded: {heavy}' if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("nonsense",), ("status", "--nonsense"), ("bench", "latency", "--runs", "0"),
                                       ("bench", "latency", "--transport", "pigeon"), ("version", "too", "many")])
def test_a_wrong_command_line_is_status_2_with_a_way_out_and_no_traceback(arguments):
    done = rfaas(*arguments)
    assert done.returncode == output.USAGE
    assert done.stdout == ""
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_json_object_too():
    done = rfaas("bench", "latency", "--json", "--runs", "0")
    assert done.returncode == output.USAGE
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert answer["error"]["type"] == "BadParameter"
    assert "--runs" in answer["error"]["message"]


def impossible_setting() -> dict[str, str]:
    return {**os.environ, "RFAAS_SPIN_US": "a while"}


def test_an_error_has_no_traceback_and_says_how_to_go_on():
    done = rfaas("status", env=impossible_setting())
    assert done.returncode == output.FAILED
    assert "RFAAS_SPIN_US" in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback():
    for arguments in (("status", "--debug"), ("--debug", "status")):
        done = rfaas(*arguments, env=impossible_setting())
        assert done.returncode == output.FAILED
        assert "Traceback" in done.stderr


def test_a_bug_is_told_in_one_line_with_its_own_status(monkeypatch, capsys):
    from rfaas_mpi.cli import app, service

    def broken() -> dict:
        raise KeyError("the bug")

    monkeypatch.setattr(service, "status", broken)
    assert app.run(["status", "--json"]) == output.BUG
    seen = capsys.readouterr()
    assert json.loads(seen.out)["error"]["type"] == "KeyError"
    assert "--debug" in seen.err and "Traceback" not in seen.err


def test_ctrl_c_ends_a_command_quietly(monkeypatch, capsys):
    from rfaas_mpi.cli import app, service

    def interrupted() -> dict:
        signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr(service, "status", interrupted)
    assert app.run(["status"]) == output.INTERRUPTED
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "interrupted" in seen.err and "Traceback" not in seen.err


@pytest.mark.parametrize("arguments", [("version",), ("version", "--json"), ("--help",), ("doctor",)])
def test_a_reader_that_went_away_is_no_error_message(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        done = rfaas(*arguments, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == output.CLOSED_STDOUT
    assert done.stderr == ""


def test_a_full_disk_is_said():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = rfaas("version", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == output.FAILED
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_stdout_that_was_never_open_is_no_crash():
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' -m rfaas_mpi.cli version >&-"], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode in (output.OK, output.FAILED)
    assert "Traceback" not in done.stderr


def test_an_encoding_without_ticks_gets_words():
    done = rfaas("doctor", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "✔" not in done.stdout
    assert "\nok memfd" in done.stdout


def test_status_is_readable_and_fits_80_columns():
    from rfaas_mpi.cli.service import describe
    data = {
        "running": True, "pid": 4321, "version": "0.1.0", "uptime_s": 75.2, "directory": "/run/user/1000/rfaas/0123",
        "stay": False, "cores": {"spare": [1, 2, 3], "lent": [1, 2], "free": [3], "kept": {"0": "a rank's"},
                                 "why_none": ""},
        "memory": {"lendable_bytes": 3 << 30, "free_bytes": 1 << 30}, "waiting": 1,
        "leases": [{"id": 7, "epoch": 1, "session": 1, "state": "ACTIVE", "cores": [1, 2], "memory_bytes": 2 << 30,
                    "hard_end": None}],
        "workers": [{"number": 9, "lease": 7, "pid": 4400, "cores": [1], "state": "WAITING", "running": True,
                     "invocations": 12, "exec_ns": 5_000_000, "poll_ns": 0, "connections": 1}],
        "sessions": [{"number": 1, "pid": 4300, "age_s": 60.0}], "zygotes": [], "usage": [],
        "sandbox": {"policy": "default", "seccomp": True, "landlock": 7, "keeps": ["signals"], "lacks": []}}
    lines = list(describe(data))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for fact in ("pid 4321", "lent 1-2", "free 3", "1.0 GiB of 3.0 GiB", "7: active", "9: pid 4400", "12 invocations",
                 "default: seccomp and Landlock ABI 7"):
        assert fact in text
    none = {**data, "cores": {**data["cores"], "lent": [], "free": [], "why_none": "one core only"}}
    assert any("one core only" in line for line in describe(none))


def test_status_without_a_service_says_so_and_starts_none(tmp_path):
    environment = {**os.environ, "RFAAS_RUNTIME_DIR": str(tmp_path)}
    done = rfaas("status", "--json", env=environment)
    assert done.returncode == output.NOT_RUNNING
    said = json.loads(done.stdout)
    assert said["running"] is False and said["sandbox"]["policy"] == "default"
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_down_without_a_service_is_done_already(tmp_path):
    done = rfaas("down", "--json", env={**os.environ, "RFAAS_RUNTIME_DIR": str(tmp_path)})
    assert done.returncode == output.OK
    assert json.loads(done.stdout) == {"running": False, "was_running": False}


def lives(pid: int) -> bool:
    """False for a zombie too: it waits for init, and nothing of it runs."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_up_keeps_a_service_until_down():
    # A directory of its own: other tests' services are not this one's to end. Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="rfaas-t-") as directory:
        environment = {**os.environ, "RFAAS_RUNTIME_DIR": directory}
        started = rfaas("up", "--json", env=environment)
        assert started.returncode == output.OK, started.stderr
        pid = json.loads(started.stdout)["pid"]
        try:
            again = rfaas("up", "--json", env=environment)
            assert json.loads(again.stdout)["pid"] == pid, "up joins the service that runs"
            seen = rfaas("status", "--json", env=environment)
            assert seen.returncode == output.OK
            data = json.loads(seen.stdout)
            assert data["running"] and data["pid"] == pid and data["stay"]
            people = rfaas("status", env=environment)
            assert f"pid {pid}" in people.stdout and people.stderr == ""
        finally:
            ended = rfaas("down", "--json", env=environment)
        assert ended.returncode == output.OK
        assert json.loads(ended.stdout) == {"running": False, "was_running": True}
        assert not lives(pid)


def test_status_shows_the_worker_of_a_rank():
    code = ("import subprocess, sys\n"
            "from rfaas_mpi.executor import Executor\n"
            "with Executor(workers=1) as executor:\n"
            "    executor.submit(abs, -1).result()\n"
            "    sys.exit(subprocess.call([sys.executable, '-m', 'rfaas_mpi.cli', 'status', '--json']))\n")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a worker needs a core besides the rank's")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == output.OK, done.stderr
    data = json.loads(done.stdout)
    assert len(data["leases"]) == len(data["workers"]) == 1
    assert data["workers"][0]["cores"] == data["leases"][0]["cores"]
    assert len(data["sessions"]) == 1


def test_demo_answers_with_one_object_and_draws_its_picture(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("the demo needs a core for the rank and one to borrow")
    for name in ("scipy", "skimage", "matplotlib"):
        pytest.importorskip(name)
    done = rfaas("demo", "--options", "200000", "--out", str(tmp_path), "--json")
    assert done.returncode == output.OK, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert [path.name for path in tmp_path.glob("*.png")] == ["demo.png"]


def test_a_demo_of_nothing_is_refused():
    done = rfaas("demo", "--options", "0")
    assert done.returncode == output.USAGE
    assert "--options" in done.stderr
