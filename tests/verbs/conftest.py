"""Tests here need a verbs device: the machine's own, or those of a guest.

Without an active device, each test collected here becomes an item that waits for the
test's result in the guest. The guest boots once, before the first test of all, and runs
all that were selected beside what runs here, in a pytest of its own that writes its
reports down as they come.
A test marked `guest` counts on the guest's two nodes, and runs there in any case.

New tests are files test_*.py beside this one. Start-up is slow in there, so import
little at the top. C programs beside them are built on the host: see `program`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from verbs import support

if TYPE_CHECKING:
    from guest_beside import GuestBeside

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PROGRAMS = REPOSITORY / "build" / "verbs"
# The data plane's own tests, in C; what they promise holds over every transport.
SUITE = ("test_invoke", "test_ranks", "test_wake", "test_threads", "test_faults", "test_mixed", "test_remote",
         "test_many", "test_verbs")
REPORTS = "RFAAS_GUEST_REPORTS"  # set in the guest: the file that reports go to
IN_GUEST = "RFAAS_GUEST_NODES" in os.environ
GUEST_TIMEOUT_S = float(os.environ.get("RFAAS_GUEST_TIMEOUT_S", "2700"))
# An item may also wait for the kernel's download and for a guest before this one.
ITEM_TIMEOUT_S = GUEST_TIMEOUT_S + 900
# Of a test in there that names none: what runs beside it takes its share of the processors.
TEST_TIMEOUT_S = 400


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest: counts on the two nodes of the guest, wherever it is started")


# --- what tests use ---------------------------------------------------------------

@pytest.fixture(scope="session")
def nodes() -> tuple[support.Node, support.Node]:
    """Two nodes; on a machine with one active port, both are the same."""
    found = support.active_nodes()
    assert found, "no active port of a verbs device"
    return found[0], found[-1]


@pytest.fixture(scope="session")
def program() -> Callable[[str], Path]:
    """program("x"): the program built from tests/verbs/x.c."""
    if not IN_GUEST:
        build_programs()
    return lambda name: PROGRAMS / name


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(command, ...): a process whose output is captured, and which ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: object) -> subprocess.Popen[str]:
        process = subprocess.Popen([str(part) for part in command], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield run
    for process in started:
        with process:
            process.kill()


def build_programs() -> None:
    """One program of each C file here, under build/; renamed into place, so that nobody runs half of one."""
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    for source in sorted(HERE.glob("*.c")):
        unfinished = PROGRAMS / f"{source.stem}.{os.getpid()}"
        done = subprocess.run(["gcc", "-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-o", unfinished,
                               source, "-libverbs"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.replace(PROGRAMS / source.stem)
    done = subprocess.run(["make", "--silent", "--no-print-directory", "-j2",
                           *(f"build/plain/{name}.run" for name in SUITE)],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- in the guest: reports are written down ------------------------------------------

def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if IN_GUEST and (path := os.environ.get(REPORTS)):
        longrepr = report.longrepr
        line = {
            "test": report.nodeid, "when": report.when, "outcome": report.outcome,
            "xfail": getattr(report, "wasxfail", None),
            # A skip is (file, line, reason).
            "text": longrepr[2] if isinstance(longrepr, tuple) else report.longreprtext,
            "output": [list(section) for section in report.sections],
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


# --- on the host: items that stand for tests in the guest --------------------------------

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config,
                                  items: list[pytest.Item]) -> None:
    if IN_GUEST:
        return
    own_device = bool(support.active_nodes())
    there = [item for item in items if HERE in item.path.parents
             and not (own_device and item.get_closest_marker("guest") is None)]
    run = config.stash[RUN] = GuestRun([item.nodeid for item in there])
    for item in there:
        items[items.index(item)] = GuestItem.from_parent(item.parent, name=item.name, item=item, run=run)


def pytest_runtestloop(session: pytest.Session) -> None:
    if not session.config.option.collectonly and (run := session.config.stash.get(RUN, None)):
        run.begin()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if run := session.config.stash.get(RUN, None):
        run.close()


@dataclasses.dataclass(frozen=True)
class Result:
    """How one phase of a test ended in the guest."""

    when: str
    outcome: str
    xfail: str | None
    text: str
    output: list[list[str]]


class FailedInGuest(Exception):
    """A test failed in the guest; the text is its report."""


class GuestItem(pytest.Item):
    """Stands for a test that runs in the guest, and ends as that does."""

    def __init__(self, *, item: pytest.Item, run: GuestRun, **rest: object) -> None:
        super().__init__(**rest)
        self._stands_for = item
        self._run = run
        self.own_markers = [*item.own_markers]
        self.keywords.update(item.keywords)
        # The guest has its own limits; this one is for a guest that does not keep them.
        self.add_marker(pytest.mark.timeout(ITEM_TIMEOUT_S), append=False)

    def reportinfo(self):
        return self._stands_for.reportinfo()

    def runtest(self) -> None:
        results = self._run.results(self.nodeid)
        if failed := [result for result in results if result.outcome == "failed"]:
            parts = []
            for result in failed:
                parts += [f"in the guest, {result.when}:", result.text]
                parts += [f"--- {title} ---\n{text}" for title, text in result.output]
            raise FailedInGuest("\n".join(parts))
        for result in results:
            if result.outcome == "skipped" and result.xfail is None:
                pytest.skip(result.text.removeprefix("Skipped: "))
            elif result.outcome == "skipped":
                pytest.xfail(result.xfail or "expected")

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, FailedInGuest):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class GuestRun:
    """One guest for all selected tests, beside those of this machine."""

    def __init__(self, tests: list[str]) -> None:
        self._tests = tests
        self._awaited = set(tests)
        self._results: dict[str, list[Result]] = {}
        self._guest: GuestBeside | None = None
        self._read = 0
        self._broken: str | None = None

    def begin(self) -> None:
        """Starts the guest; what goes wrong with that, its tests say."""
        if not self._tests:
            return
        try:
            self._start()
        except (AssertionError, OSError) as error:
            self._broken = str(error)

    def results(self, test: str) -> list[Result]:
        """All that became of a test; fails where the guest ended before."""
        while not self._ended(test) and self._broken is None:
            self._attend()
        self._awaited.discard(test)
        if not self._ended(test):
            said = self._guest.output() + self._guest.errors() if self._guest is not None else ""
            raise FailedInGuest(f"{self._broken}\n{said}")
        if not self._awaited:
            self._finish()
        return self._results[test]

    def _ended(self, test: str) -> bool:
        return any(result.when == "teardown" for result in self._results.get(test, ()))

    def _start(self) -> None:
        from guest_beside import GuestBeside

        build_programs()
        # Removed with the rest of that directory when pytest ends.
        directory = Path(os.environ["RFAAS_RUNTIME_DIR"]) / "guest"
        directory.mkdir(exist_ok=True)
        self._reports = directory / "reports"
        self._reports.write_bytes(b"")
        command = [sys.executable, "-m", "pytest", "--rootdir", str(REPOSITORY), "--confcutdir", str(HERE),
                   "-p", "no:cacheprovider", "-p", "pytest_timeout", "-o", "timeout_method=signal",
                   "-o", f"timeout={TEST_TIMEOUT_S}", "--durations=20", *self._tests]
        environment = {**os.environ, REPORTS: str(self._reports), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                       "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), str(REPOSITORY),
                                                                   os.environ.get("PYTHONPATH")]))}
        self._guest = GuestBeside(command, "--rw", directory, timeout_s=GUEST_TIMEOUT_S, environment=environment)

    def _attend(self) -> None:
        assert self._guest is not None, "begin() comes first"
        time.sleep(0.05)
        # Asked before what it wrote is read: all of that is there when it has ended.
        if (status := self._guest.status) is not None:
            self._broken = f"the guest's pytest ended with status {status} before this test:"
        with open(self._reports, "rb") as file:
            file.seek(self._read)
            complete = file.read().rpartition(b"\n")[0]
        if complete:
            self._read += len(complete) + 1
            for line in complete.splitlines():
                fields = json.loads(line)
                self._results.setdefault(fields.pop("test"), []).append(Result(**fields))

    def _finish(self) -> None:
        """Lets the guest end, so that it has seen all of its tests through."""
        broken = ""
        if self._guest is not None and self._broken is None:
            broken = self._untold(self._guest.wait())
            broken += f"\n{self._guest.output()}{self._guest.errors()}" if broken else ""
        self.close()
        if broken:
            # All tests passed, and yet it says no: the last one has to say so.
            raise FailedInGuest(broken)

    def _untold(self, status: int) -> str:
        """What the end of the guest's pytest says that no test's result does."""
        failed = any(result.outcome == "failed" for results in self._results.values() for result in results)
        return "" if status == (1 if failed else 0) else f"the guest's pytest ended with status {status}:"

    def close(self) -> None:
        """Ends the guest, if there is one. Safe to call twice."""
        if self._guest is not None:
            self._guest.close()


RUN = pytest.StashKey[GuestRun]()
