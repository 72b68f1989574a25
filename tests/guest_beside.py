"""A guest that runs beside this process's own tests: it begins early, and is asked later for what it found.

Emulated guests take minutes and have processors of their own to wait for, and so a run of all tests starts them first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import rdma_guest

# Below everybody else's, but never nothing: it has clocks of its own that run on.
NICENESS = 5


class GuestBeside:
    """One command in a guest of its own; where there are several, one guest runs after the other.

    It ends with this process, and with close().
    """

    def __init__(self, command: Sequence[str], *options: object, timeout_s: float,
                 environment: Mapping[str, str] | None = None) -> None:
        directory = Path(os.environ["RFAAS_RUNTIME_DIR"])
        # What services leave here while it runs is none of the guest's: it has an empty one.
        own = directory / "of-guests"
        own.mkdir(exist_ok=True)
        # It is not among the processes of this run that have to be gone when their tests are.
        inherited = {name: value for name, value in (os.environ if environment is None else environment).items()
                     if name != "RFAAS_TEST_RUN"}
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "flock", "--no-fork", directory / "guests.lock",
             sys.executable, rdma_guest.__file__, *map(str, options), "--timeout", f"{timeout_s:g}",
             "--nice", str(NICENESS), "--", *command],
            cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._errors,
            # Whatever home the command is to have, the kernel is where it always is.
            start_new_session=True, env={**inherited, "RFAAS_RUNTIME_DIR": str(own),
                                         "RFAAS_VM_CACHE": str(rdma_guest.cache_directory())})

    @property
    def pid(self) -> int:
        """The harness's, whose child the emulator is."""
        assert self._process is not None, "it is closed"
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The command's, or the guest's (rdma_guest.py); None while it runs."""
        assert self._process is not None, "it is closed"
        return self._process.poll()

    def wait(self) -> int:
        while (status := self.status) is None:
            time.sleep(0.05)
        return status

    def output(self) -> str:
        """All that the command has written so far."""
        return text(self._output)

    def errors(self) -> str:
        """The same of its stderr, and what is wrong with the guest."""
        return text(self._errors)

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._output.close()
        self._errors.close()


def text(file: BinaryIO) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
