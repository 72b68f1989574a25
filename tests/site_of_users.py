"""A site as an administrator sets it up: manager and agent of a service user, a spawner, and ranks of two users.

Root starts the agent, which becomes the service's user; everybody runs a Python that everybody may run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import faults
from cluster import Daemon, finished, wait_until

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings

SERVICE, ALICE, BOB = 60_900, 61_001, 61_002
UID_MIN = 61_000

TESTS = Path(__file__).parent


@functools.cache
def interpreter() -> str:
    """A Python that every user may run, with what we need. AssertionError if there is none."""
    why = ""
    for program in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            done = subprocess.run([program, "-B", "-c", "import rfaas_mpi.fabric, numpy, aiohttp, cryptography"],
                                  user=ALICE, group=ALICE, extra_groups=[], env=environment(), capture_output=True,
                                  text=True, cwd="/")
        except OSError as error:
            why += f"{program}: {error}\n"
            continue
        if done.returncode == 0:
            return program
        why += f"{program}: {done.stderr}\n"
    raise AssertionError(f"no Python here may be run by every user: apt-get install python3\n{why}")


def environment(**changes: str) -> dict[str, str]:
    """Of a process of any user; where the interpreter that it runs finds the packages of this one."""
    # (In a guest this is such a process itself, and what it was given holds there, too.)
    path = [str(TESTS.parent), str(TESTS), sysconfig.get_path("purelib"), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_RUNTIME_DIR", "TMPDIR")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent",
            **changes}


class Service(Daemon):
    """A daemon that this user starts, where root's own interpreter may be closed to others."""

    def __init__(self, uid: int, log: Path, words: Sequence[object], **changes: str) -> None:
        super().__init__(log, words, **changes)
        self._uid = uid
        # It ends with us, however we end.
        self._words = ["setpriv", "--pdeathsig", "KILL", interpreter(), "-m", "rfaas_mpi.cli", *map(str, words)]
        self._changes = changes

    def add(self, *words: str, **changes: str) -> None:
        """To its command and its environment, from its next start on."""
        self._words += words
        self._changes = {**self._changes, **changes}

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._words, env=environment(PYTHONFAULTHANDLER="1", **self._changes), cwd="/",
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, user=self._uid,
                group=self._uid, extra_groups=[])


class Site:
    """A manager, an agent that lends `cores` ("": those that it finds), and ranks of users; close() ends everything."""

    def __init__(self, cores: str = "0-1", words: Sequence[str] = (), **changes: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rfaas-s-"))
        self.directory.chmod(0o755)
        (self.directory / "manager").mkdir()
        os.chown(self.directory / "manager", SERVICE, SERVICE)
        self.socket = self.directory / "manager" / "socket"
        self.changes = {"RFAAS_MANAGER": f"unix:{self.socket}", "RFAAS_MANAGER_USER": str(SERVICE)}
        self.manager = Service(SERVICE, self.directory / "manager.log", [
            "manager", "--directory", self.directory / "manager", "--socket", self.socket])
        self.agent = Service(0, self.directory / "agent.log", [
            "agent", "--manager", f"unix:{self.socket}", "--node", "node0", *(("--cores", cores) if cores else ()),
            "--directory", self.directory / "node0", "--listen", "127.0.0.1:0", *words], RFAAS_SERVICE_USER=str(SERVICE),
            RFAAS_UID_MIN=str(UID_MIN), **self.changes, **changes)

    def start(self) -> Site:
        try:
            self.manager.start()
            self.agent.start()
            wait_until(lambda: self.free() or self._check(), "the agent has reported")
        except BaseException:
            self.close()
            raise
        return self

    def _check(self) -> None:
        for daemon in (self.manager, self.agent):
            assert daemon.alive, f"{daemon.log.name} ended:\n{daemon.said()}"

    def call(self, name: str, *arguments: object, **parameters: object) -> object:
        """Asks the manager, as an administrator."""
        with ManagerClient(Settings.load({**os.environ, **self.changes})) as client:
            return client.call(name, *arguments, **parameters)

    def free(self) -> int:
        """Cores that could be lent now; 0 while the manager can't be asked."""
        with contextlib.suppress(OSError), ManagerClient(Settings.load({**os.environ, **self.changes})) as client:
            nodes: api.Nodes = client.call("nodes")
            return sum(len(view.free) for view in nodes.nodes if "/" not in view.node)
        return 0

    @property
    def spawner(self) -> int:
        """Its pid."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        return next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "rfaas-spawner")

    def command(self, body: str, arguments: Sequence[object]) -> list[str]:
        return [interpreter(), *faults.command(body, *arguments)[1:]]

    @contextlib.contextmanager
    def running(self, uid: int, body: str, *arguments: object, **changes: str) -> Iterator[subprocess.Popen[str]]:
        """A rank of that user; killed in the end if it has not ended."""
        place = self.directory / f"run-{uid}"
        if not place.exists():
            place.mkdir(mode=0o700)
            os.chown(place, uid, uid)
        process = subprocess.Popen(
            self.command(body, arguments), user=uid, group=uid, extra_groups=[], cwd="/", text=True,
            env=environment(**{**self.changes, "RFAAS_RUNTIME_DIR": str(place), **changes}), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, uid: int, body: str, *arguments: object, **changes: str) -> str:
        """The same to its end; what it said."""
        with self.running(uid, body, *arguments, **changes) as process:
            return finished(process)

    def close(self) -> None:
        """Safe to call twice."""
        self.agent.close()
        self.manager.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Site:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
