"""The guest that tests of verbs run in: it ends as its command does, and never outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest

import guest_beside
import rdma_guest
from rdma_guest import Guest, GuestError

CLI = Path(rdma_guest.__file__)
pytestmark = pytest.mark.timeout(500)  # the kernel may have to be downloaded first


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    rdma_guest.prepare()


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CLI, *(str(argument) for argument in arguments)], capture_output=True,
                          text=True, timeout=200, env={**os.environ, **environment})


def emulators_under(pid: int) -> list[int]:
    """Processes that the harness started and that have become QEMU."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().startswith("qemu-system"):
            found.append(int(child))
    return found


def test_a_command_finds_its_place_and_its_own_status_and_output_come_back(tmp_path):
    shared, kept = tmp_path / "shared", tmp_path / "kept"
    shared.mkdir()
    kept.write_text("as it was\n")
    script = (f'cat {kept}; echo changed >{kept}; echo "seen $PLAIN${{OUR_SECRET-}} $1" >{shared}/file;'
              'pwd >&2; exit 7')
    done = run("--nodes", 1, "--rw", shared, "--", "sh", "-c", script, "sh", "an 'argument'",
               PLAIN="variable", OUR_SECRET="hidden")
    assert (done.returncode, done.stdout, done.stderr) == (7, "as it was\n", f"{Path.cwd()}\n")
    assert kept.read_text() == "as it was\n"
    assert (shared / "file").read_text() == "seen variable an 'argument'\n"


def test_a_signal_ends_a_command_as_in_a_shell_and_what_it_left_running_is_not_waited_for():
    out = BytesIO()
    command = ["sh", "-c", "sleep infinity & echo before; kill -TERM $$"]
    with Guest(command, nodes=1, stdout=out, timeout_s=100) as guest:
        assert guest.wait() == 128 + signal.SIGTERM
    assert out.getvalue() == b"before\n"


def test_a_guest_is_killed_when_its_time_is_up():
    done = run("--timeout", 2, "--", "sleep", "infinity")
    assert (done.returncode, done.stderr) == (124, "rdma_guest.py: killed after 2 s\n")


def test_a_killed_harness_leaves_no_guest(wait_until):
    with subprocess.Popen([sys.executable, CLI, "--", "sleep", "infinity"]) as harness:
        (emulator,) = wait_until(lambda: emulators_under(harness.pid), "the emulator runs")
        pidfd = os.pidfd_open(emulator)
        try:
            harness.kill()
            harness.wait()
            wait_until(lambda: not Path(f"/proc/{emulator}").exists(), "the emulator has ended")
        finally:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # as it should be
            os.close(pidfd)


def test_a_guest_beside_us_gives_way_and_ends_when_it_is_closed(monkeypatch, tmp_path, wait_until):
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(tmp_path))  # it is in no line with guests that are there already
    monkeypatch.setattr(guest_beside, "NICENESS", 3)
    beside = guest_beside.GuestBeside(["sleep", "infinity"], timeout_s=100)
    try:
        (emulator,) = wait_until(lambda: emulators_under(beside.pid), "the emulator runs")
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, emulator) == 3, "it is below others")
        assert beside.status is None
    finally:
        beside.close()
        beside.close()
    wait_until(lambda: not Path(f"/proc/{emulator}").exists(), "the emulator has ended")


def test_a_guest_that_cannot_boot_shows_the_end_of_its_console():
    with Guest(["true"], kernel_arguments="rdinit=/nothing", timeout_s=100) as guest:
        with pytest.raises(GuestError, match=r"(?s)ended before the command did.*console ended with:.*Kernel panic"):
            guest.wait()


def test_a_machine_that_cannot_be_made_says_why(tmp_path):
    with Guest(["true"], writable=[tmp_path / "absent"], timeout_s=100) as guest:
        with pytest.raises(GuestError, match=r"(?s)QEMU said: .*absent"):
            guest.wait()


def test_missing_programs_are_named_with_the_packages_that_have_them(monkeypatch):
    monkeypatch.setitem(rdma_guest.PACKAGES, "qemu-of-nobody", "a-package")
    with pytest.raises(GuestError, match="apt-get install --no-install-recommends a-package$"):
        rdma_guest.prepare()


def test_what_looks_secret_does_not_reach_the_guest():
    environment = {"PATH": "/bin", "RFAAS_TOKEN": "x", "AWS_ACCESS_KEY_ID": "x", "db_password": "x",
                   "INDEX": "https://user:word@host/", "OTHER_INDEX": "https://host:8080/"}
    assert rdma_guest.harmless(environment).keys() == {"PATH", "OTHER_INDEX"}


def test_modules_are_loaded_after_those_they_depend_on():
    def module(*depends: str) -> bytes:
        return b"license=GPL\0depends=" + ",".join(depends).encode() + b"\0retpoline=Y\0"

    modules = {"rdma_rxe": module("ib_core", "udp-tunnel"), "ib_core": module(), "udp_tunnel": module("ib_core"),
               "unrelated": module()}
    assert rdma_guest._load_order(modules) == ["ib_core", "udp_tunnel", "rdma_rxe"]
