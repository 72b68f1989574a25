"""A small cluster of a benchmark's own: `rfaas manager`, and one `rfaas agent` that lends a core."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rfaas_mpi import config
from rfaas_mpi.bench.manager import end
from rfaas_mpi.bench.namespaces import Place
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ServiceLost

__all__ = ["Cluster"]

START_S = 60.0
NODE = "bench"


class Cluster:
    """A manager of our own, and an agent that lends one core. close() ends them.

    Ranks reach its workers over tcp, or by shared memory. Raises BenchError, with what
    they said, where they don't come up.
    """

    def __init__(self, directory: Path, place: Place, *, rank_core: int, lent: int, allowed: Sequence[int],
                 transport: str = "tcp") -> None:
        self.directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.settings = Settings.load(manager=f"unix:{directory / 'manager.sock'}", manager_user=str(os.geteuid()),
                                      transport=transport)
        others = [core for core in allowed if core not in (rank_core, lent)]
        # Where there are only two cores the manager has the worker's: it isn't needed while a worker runs.
        self._manager_core = (others or [lent])[-1]
        self.client = ManagerClient(self.settings)
        try:
            self._run_manager()
            self._run(None, "agent", "--manager", self.settings.manager, "--node", NODE, "--cores", lent,
                      *(["--socket", "none"] if transport == "tcp" else []), "--directory", directory / NODE,
                      "--listen", f"{place.host}:0", prefix=place.prefix)
            self._wait(lambda: self.free)
        except BaseException:
            self.close()
            raise

    def _run_manager(self) -> None:
        self._run(self._manager_core, "manager", "--directory", self.directory / "manager",
                  "--socket", self.directory / "manager.sock")

    def _run(self, core: int | None, *words: object, prefix: Sequence[str] = ()) -> None:
        kept = {name: value for name, value in config.environment().items() if not name.startswith(config.PREFIX)}
        # A benchmark that is killed closes nothing: they end with it.
        command = ["setpriv", "--pdeathsig", "TERM", "--"]
        if core is not None:
            command += ["taskset", "-c", str(core)]
        with (self.directory / f"{words[0]}.log").open("ab") as log:
            self._processes[str(words[0])] = subprocess.Popen(
                [*prefix, *command, sys.executable, "-m", "rfaas_mpi.cli", *map(str, words)],
                env={**kept, "RFAAS_CONFIG": os.devnull, "RFAAS_RUNTIME_DIR": str(self.directory),
                     "RFAAS_MANAGER_USER": str(os.geteuid()),
                     "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def free(self) -> bool:
        """True if the core can be lent now."""
        with contextlib.suppress(ServiceLost):
            return any(view.free for view in self.client.call("nodes").nodes)
        return False

    def rest(self) -> None:
        """Returns once the core can be lent again."""
        self._wait(lambda: self.free)

    def kill_manager(self) -> None:
        """SIGKILL; gone when it returns."""
        process = self._processes.pop("manager")
        process.kill()
        process.wait()

    def restart_manager(self) -> None:
        """Starts it again where it runs no more; returns when it has heard of the agent."""
        if "manager" not in self._processes:
            self._run_manager()
        self._wait(self._heard)

    def _heard(self) -> bool:
        with contextlib.suppress(ServiceLost):
            return any(not view.silent for view in self.client.call("nodes").nodes)
        return False

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes.values()):
                said = [path.read_text(errors="replace")[-500:] for path in sorted(self.directory.glob("*.log"))]
                raise BenchError("the manager and its agent lend nothing: " + " … ".join(said))
            time.sleep(0.002)

    def close(self) -> None:
        """Safe to call twice."""
        self.client.close()
        for process in reversed(self._processes.values()):
            end(process)
        self._processes.clear()
