"""Ranks of one MPI world, in a world of their own: what they assert is in mpi_world.py.

They share the runtime directory of this test run, and so one service.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_ranks_of_one_world_borrow_and_share_workers():
    launcher = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(launcher) if launcher.exists() else shutil.which("mpiexec")
    assert mpiexec, "no mpiexec: pip install 'rfaas_mpi[mpi]'"
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, "-m", "pytest", "--with-mpi", "--noconftest", "-q",
         "-p", "no:cacheprovider", str(HERE / "mpi_world.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and done.stdout.count("3 passed") == 2, done.stdout + done.stderr
