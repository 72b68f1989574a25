"""What a user makes of his zygote and his workers, which are his processes: neither the agent nor others suffer."""

from __future__ import annotations

import os
import subprocess
import sys

from rfaas_mpi.agent.pool import WorkerHandle

NAMED = r"import ctypes; ctypes.CDLL(None).prctl(15, ctypes.c_char_p(b'gr\xc3) 1'), 0, 0, 0, 0); print(); input()"


def test_a_worker_may_have_any_name():
    with subprocess.Popen([sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        handle = WorkerHandle.__new__(WorkerHandle)
        handle.pid, handle.pidfd = process.pid, os.pidfd_open(process.pid)
        try:
            assert not handle.ending()
            process.communicate(b"\n")
            assert handle.ending()
        finally:
            os.close(handle.pidfd)
