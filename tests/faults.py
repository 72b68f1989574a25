"""What the tests of faults share: kernels that misbehave, other processes, and what can be seen of them in /proc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import rfaas_mpi
from rfaas_mpi import Kernel, kernel

TESTS = Path(__file__).parent
NATIVE = Path(rfaas_mpi.__file__).parent / "_native_kernels.so"


def native(symbol: str) -> Kernel:
    return Kernel.from_library(str(NATIVE), symbol)


# --- kernels that misbehave -----------------------------------------------------------

def _segfault() -> None:
    ctypes.string_at(16)


def _leave_a_child() -> None:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)


def _leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(600,), daemon=False).start()


def _close_all() -> None:
    os.closerange(0, 1024)


def _close_all_and_stay() -> None:
    _close_all()
    time.sleep(600)


def _deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()


def _shout() -> None:
    line = b"x" * 99 + b"\n"
    for _ in range(1000):
        os.write(1, line * 1000)


DEEDS = {
    "raise": lambda: int("no number"),
    "raise KeyboardInterrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "raise GeneratorExit": lambda: (_ for _ in ()).throw(GeneratorExit()),
    "sys.exit": lambda: sys.exit("that is all"),
    "recurse": lambda: DEEDS["recurse"](),
    "take too much memory": lambda: bytearray(2 << 30),
    "segfault": _segfault,
    "abort": os.abort,
    "kill -BUS": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "kill -FPE": lambda: os.kill(os.getpid(), signal.SIGFPE),
    "kill -ILL": lambda: os.kill(os.getpid(), signal.SIGILL),
    "os._exit": lambda: os._exit(3),
    "leave a child": _leave_a_child,
    "leave a thread": _leave_a_thread,
    "be deaf": _deaf,
    "shout": _shout,
    "close all": _close_all,
    "close all and stay": _close_all_and_stay,
}


def do(deed: str, value: float = 0.0) -> float:
    """For submit: says its deed, does it, and returns the value plus one if it still can."""
    print(f"now: {deed}")
    DEEDS[deed]()
    return value + 1


@kernel
def does(deed, value):
    """The same for buffers."""
    return do(deed.tobytes().decode(), value)


def text(words: object) -> np.ndarray:
    """Words as an input."""
    return np.frombuffer(str(words).encode(), np.uint8)


def plus_one(value):
    return value + 1


@kernel
def adds_one(x, out):
    np.add(x, 1, out=out)


@kernel
def loops(x):
    while True:
        pass


@kernel
def sleeps(x):
    time.sleep(600)


def begin(name: object) -> None:
    """Says in a file which process has begun."""
    path = Path(str(name))
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(str(os.getpid()))
    fresh.rename(path)


@kernel
def scribbles(begun, value, out):
    """Says that it runs, then writes to its output for ever."""
    begin(begun.tobytes().decode())
    while True:
        out += 1


@kernel
def fills_when(begun, flag, out):
    """Says that it runs, waits for a file, fills its output with 5."""
    begin(begun.tobytes().decode())
    wait_for(flag.tobytes().decode())
    out[...] = 5


@kernel
def stops_itself(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    return x


def wait_for(name: object) -> None:
    deadline = time.monotonic() + 60
    while not Path(str(name)).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(str(name))
        time.sleep(0.002)


def begin_then_wait(begun, flag, value):
    begin(begun)
    wait_for(flag)
    return value


def swallow(call):
    """Calls it and keeps its error to itself."""
    with contextlib.suppress(BaseException):
        call()


def make_array(count):
    return np.arange(float(count))


# --- other processes --------------------------------------------------------------------

def alive(pid: int) -> bool:
    """True for a process that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])


def worker_pids(executor: rfaas_mpi.Executor) -> dict[int, int]:
    """Worker number → pid, of those that are there now."""
    return {channel.worker: channel.pid for channel in executor._crew.invoker.channels if channel.alive}


def service_pid(executor: rfaas_mpi.Executor) -> int:
    return executor._crew.lending.session.service_pid


def environment(**changes: str) -> dict[str, str]:
    """For another interpreter beside the tests' kernels."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **changes}


PRELUDE = """
import os, pickle, signal, sys, threading, time
import numpy as np
import faults, rfaas_mpi
from pathlib import Path
from rfaas_mpi import Executor
def say(*words):
    print(*words, flush=True)
"""


def command(body: str, *arguments: object) -> list[str]:
    """A Python script, after PRELUDE; warnings are errors."""
    return [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(body), *map(str, arguments)]


def run(body: str, *arguments: object, timeout: float = 100, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run(command(body, *arguments), env=environment(**changes), capture_output=True, text=True,
                          timeout=timeout, check=False)


@contextlib.contextmanager
def rank(body: str, *arguments: object, **changes: str) -> Iterator[subprocess.Popen[str]]:
    """Another rank that runs a script in a session of its own; killed in the end if it has not ended."""
    process = subprocess.Popen(command(body, *arguments), env=environment(**changes), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """What it says next; what it died of, if it did."""
    assert process.stdout is not None and process.stderr is not None
    said = process.stdout.readline()
    if not said:
        process.wait(60)
        raise AssertionError(f"it ended with {process.returncode}: {process.stderr.read()}")
    return said.strip()


def memory_of(pids: object) -> set[str]:
    """Our memory files that these processes hold open or mapped, but for pages of workers and code that was shipped."""
    held = set()
    for pid in pids:  # type: ignore[attr-defined]
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if (name := os.readlink(link)).startswith("/memfd:rfaas-"):
                        held.add(f"{pid} {name}")
            for text_ in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/memfd:rfaas-" in text_:
                    held.add(f"{pid} {text_.split(maxsplit=5)[5]}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue        # it ended meanwhile
    return held
