"""A real `rfaas manager` for tests: the command as administrators start it, in a directory of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

GUARD_S = 60.0


def environment(**more: str) -> dict[str, str]:
    """This process', with no manager but the one that is named."""
    return {**{key: value for key, value in os.environ.items() if key != "RFAAS_MANAGER"}, **more}


def rfaas(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """One command of `rfaas`, with these variables."""
    return subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", *map(str, arguments)], capture_output=True, text=True,
                          timeout=GUARD_S, env=environment(**more))


class RfaasManager:
    """Starts with `with`, listens when that returns, ends with SIGTERM."""

    def __init__(self, directory: Path, *options: object) -> None:
        self.directory = directory
        self.command = [sys.executable, "-m", "rfaas_mpi.cli", "manager", "--json", "--directory", str(directory),
                        *map(str, options)]
        self.facts: dict[str, Any] = {}
        self.said = ""                   # on stderr, once it has ended
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts it, and doesn't wait for anything."""
        # What it says must not fill a pipe that nobody reads.
        self._stderr = self.directory.with_name(f"{self.directory.name}.stderr").open("w+")
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
                                         env=environment())

    def __enter__(self) -> RfaasManager:
        self.start()
        assert self._process is not None and self._process.stdout is not None
        lines = []
        while (line := self._process.stdout.readline()):
            lines.append(line)
            if line == "}\n":
                break
        self.facts = json.loads("".join(lines)) if lines else {}
        if not self.facts.get("running"):
            self.stop()
            raise AssertionError(f"the manager doesn't start: {self.said}")
        return self

    @property
    def address(self) -> str:
        return self.facts["listening"][0]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def rfaas(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command that asks this manager."""
        return rfaas(*arguments, RFAAS_MANAGER=self.address)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; its exit status. Safe to call twice."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended; it must be about to."""
        assert self._process is not None
        process, self._process = self._process, None
        try:
            process.communicate(timeout=GUARD_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        finally:
            self._stderr.seek(0)
            self.said = self._stderr.read()
            self._stderr.close()
        return process.returncode

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()
