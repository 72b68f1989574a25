"""Functions that tests have workers run; importable, as a user's module beside the script is."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from rfaas_mpi import kernel


@kernel
def double(x, out):
    np.multiply(x, 2, out=out)


@kernel
def total(x):
    return x.sum()


@kernel
def sum_and_difference(x, y, out):
    out[0][...] = x + y
    out[1][...] = x - y


@kernel
def scaled(x, factor):
    return x * factor


@kernel
def fails(x):
    raise ValueError(f"no good: {x[0]}")


@kernel
def wrong_shape(x):
    return np.zeros(len(x) + 1)


@kernel
def waits_for(path):
    """Returns once the file exists, or nobody would wait for it any more."""
    name = path.tobytes().decode()
    _wait_for(name)
    return np.float64(os.getpid())


@kernel
def segfaults_once(path):
    """Crashes its worker unless the file exists."""
    name = path.tobytes().decode()
    if not Path(name).exists():
        Path(name).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return np.float64(1)


@kernel
def spins(x):
    while True:
        pass


def _wait_for(name: str) -> None:
    deadline = time.monotonic() + 60
    while not Path(name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.002)


# --- for submit ----------------------------------------------------------------------

def add(a, b=0):
    return a + b


def identity(value):
    return value


def wait_for(name, value=None):
    """Returns `value` once the file exists."""
    _wait_for(str(name))
    return value


def start_and_wait_for(started, name, value=None):
    Path(started).touch()
    return wait_for(name, value)


def touch(name):
    Path(name).touch()


def append(name, text):
    with open(name, "a") as file:
        file.write(text)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


def raise_key_error(key):
    raise KeyError(key)


def raise_unpicklable():
    raise Unpicklable("this", "that")


def return_unpicklable():
    return (value for value in range(3))


def set_item(array, index, value):
    array[index] = value
    return array


def is_writable(array):
    return array.flags.writeable


def pid():
    return os.getpid()


def write_to_stdout(text):
    print(text)


def write_to_stderr(text):
    print(text, file=sys.stderr)


def crash(number):
    os.kill(os.getpid(), number)


def leave(status):
    os._exit(status)


def make_executor():
    from rfaas_mpi import Executor
    Executor(workers=1)


_state = []


def remember(value):
    _state.append(value)


def remembered():
    return list(_state)
