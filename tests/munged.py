"""A munged of the tests' own, with a key of its own."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from rfaas_mpi import munge
from rfaas_mpi.munge import MungeError

MUNGED = "/usr/sbin/munged"


class Munged:
    """A munged in a directory of its own; `socket` is where it listens."""

    def __init__(self, where: Path, key: bytes) -> None:
        where.mkdir(mode=0o755)
        self.socket = str(where / "socket")
        (where / "key").write_bytes(key)
        (where / "key").chmod(0o600)
        self._log = where / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [MUNGED, "--foreground", "--force", f"--socket={self.socket}", f"--key-file={where / 'key'}",
                 f"--pid-file={where / 'pid'}", f"--seed-file={where / 'seed'}", "--num-threads=1"],
                stdout=subprocess.DEVNULL, stderr=log)

    def serves(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            munge.encode(socket=self.socket)
        except MungeError:
            return False
        return True

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(30)
