"""A persistent request that is started and waited for allocates nothing, in Python or in C; counted, with a control."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transports

HERE = Path(__file__).resolve().parent

# With PYTHONMALLOC=malloc each object that Python makes is a malloc, too.
PROGRAM = """
    import ctypes, itertools, sys
    import numpy as np
    import transports
    import rfaas_mpi as rf
    from rfaas_mpi.bench import kernels

    counter = ctypes.PyDLL(None).malloc_count
    counter.argtypes, counter.restype = (), ctypes.c_ulong

    def mallocs(turn, calls=1000):
        turn()
        before = counter()
        for _ in itertools.repeat(None, calls):
            turn()
        return counter() - before

    def idle():
        pass

    def makes_one():
        bytearray(100)

    def main():
        with transports.executor_over(sys.argv[1], spin_us=10_000_000) as ex:
            for kernel in (kernels.native_copy(), kernels.python_copy):
                x, y = ex.array(np.arange(4.0)), ex.zeros(4)
                request = ex.Invoke_init(kernel, x, y)
                large = ex.Invoke_init(kernel, np.ones(100_000), np.zeros(100_000))

                def start_and_wait(request=request):
                    request.Start()
                    request.Wait()

                def start_and_test(request=request):
                    request.Start()
                    while not request.Test():
                        pass

                for _ in range(200):
                    start_and_wait()
                nothing = mallocs(idle)
                found = {"wait": mallocs(start_and_wait), "test": mallocs(start_and_test),
                         "staged": mallocs(lambda: (large.Start(), large.Wait()), 50)}
                assert (y == x).all()
                # The control shows that one a call would be seen.
                assert mallocs(makes_one) >= 1000, "the control counts nothing"
                print(kernel, "nothing", nothing, found, flush=True)
                for name in ("wait", "test"):
                    assert found[name] - nothing < 100, (kernel, nothing, found)
                large.Free()
                request.Free()

    if __name__ == "__main__":
        main()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("malloc") / "malloc_count.so"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o", made,
                    HERE / "malloc_count.c"], check=True)
    return made


@pytest.mark.parametrize("transport", transports.OVER)
def test_start_and_wait_between_hot_peers_allocate_nothing(library, tmp_path, transport):
    program = tmp_path / "counts.py"
    program.write_text(textwrap.dedent(PROGRAM))
    done = subprocess.run(
        [sys.executable, program, transport], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc",
             "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])})
    assert done.returncode == 0, done.stdout + done.stderr
