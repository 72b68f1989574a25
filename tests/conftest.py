"""Every run has its own runtime directory, leaves nothing behind, and skips nothing in CI."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Paths of Unix sockets are short (107 bytes), pytest's own directories are not.
RUNTIME_DIR = Path(tempfile.mkdtemp(prefix="rfaas-t-"))
RUN_ID = uuid.uuid4().hex
# Set before rfaas_mpi is imported, and inherited by every process that a test
# starts, however detached: it is how we find them again.
os.environ["RFAAS_RUNTIME_DIR"] = str(RUNTIME_DIR)
os.environ["RFAAS_TEST_RUN"] = RUN_ID
os.environ["RFAAS_CONFIG"] = os.devnull  # nobody's own settings
# Started in the background of a shell, we would hand an ignored Ctrl-C on to
# every rank that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}


# --- no skipped tests in CI ----------------------------------------------------

def _fail_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI runs every test, but this one was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_skip(report)
    return report


# --- what takes long runs beside the rest ---------------------------------------

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """A module whose begin_beside() starts something has it ended by end_beside(), whatever becomes of the tests."""
    if session.config.option.collectonly:
        return
    for module in {item.getparent(pytest.Module) for item in session.items}:
        if module is not None and (begin := getattr(module.obj, "begin_beside", None)):
            session.config.add_cleanup(module.obj.end_beside)
            begin()


# --- nothing is left behind ----------------------------------------------------

def wait_until(condition: Callable[[], object], what: str, guard_s: float = 30.0) -> object:
    """The condition's first true value; fails with `what` after the hang guard."""
    deadline = time.monotonic() + guard_s
    pause = 0.001
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {guard_s:g} s: {what}")
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


@pytest.fixture(name="wait_until", scope="session")
def _wait_until() -> Callable[..., object]:
    """wait_until(condition, what, guard_s=30): for tests that wait for another process."""
    return wait_until


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server: a PostgresServer."""
    from postgres_server import PostgresServer
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def stderr_kept(tmp_path: Path) -> Callable[[], contextlib.AbstractContextManager[Callable[[], str]]]:
    """with stderr_kept() as said: said() is all that went to sys.stderr; capfd loses what comes while it is read."""
    @contextlib.contextmanager
    def kept() -> Iterator[Callable[[], str]]:
        path = tmp_path / "stderr"
        with open(path, "a", buffering=1) as stderr, contextlib.redirect_stderr(stderr):
            yield path.read_text
    return kept


# --- every transport --------------------------------------------------------------

@pytest.fixture(name="executor_over", scope="session")
def _executor_over() -> Callable[..., object]:
    """executor_over(transport): a context manager, for tests that hold on every transport."""
    import transports
    return transports.executor_over


def processes_of_this_run() -> dict[int, str]:
    """Living processes that this run started, other than itself: pid → command."""
    marker = f"RFAAS_TEST_RUN={RUN_ID}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker not in entry.joinpath("environ").read_bytes().split(b"\0"):
                continue
            command = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is somebody else's
        found[int(entry.name)] = command.strip() or "(no command line)"
    return found


def memory_files() -> set[str]:
    """memfds that this process holds open or mapped."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if target.startswith("/memfd:"):
            held.add(f"fd {link.name} {target}")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:" in line:
            held.add(line)
    return held


def sockets_of_this_run() -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if str(RUNTIME_DIR) in line]


def shared_memory_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "rfaas" in name or "rfm" in name}


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    memory_before = memory_files()
    shared_before = shared_memory_files()
    yield
    # A service lingers for two seconds after its last rank.
    deadline = time.monotonic() + 20.0
    while (left := processes_of_this_run()) and time.monotonic() < deadline:
        time.sleep(0.05)
    # Functions that were submitted are remembered, the last 256, and with them the libraries that they call.
    from rfaas_mpi import kernels
    kernels._objects.clear()
    gc.collect()
    for pid in left:  # so that one failure does not spoil the next run
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not left, f"processes left over: {left}"
    assert not sockets_of_this_run(), f"sockets left over: {sockets_of_this_run()}"
    files = [str(path) for path in RUNTIME_DIR.rglob("*") if path.is_socket()]
    assert not files, f"socket files left over: {files}"
    shared = shared_memory_files() - shared_before
    assert not shared, f"files left over in /dev/shm: {shared}"
    memory = memory_files() - memory_before
    assert not memory, f"memory of closed executors left over: {memory}"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(RUNTIME_DIR, ignore_errors=True)
