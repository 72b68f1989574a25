"""A second node on this machine, for a measurement: a network namespace, with a pair of devices that leads there."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rfaas_mpi.bench.raw import BenchError

__all__ = ["Place", "other_node"]

# A network of documentation (RFC 5737): nobody's real one is hidden.
_HERE, _THERE, _PREFIX = "198.51.100.1", "198.51.100.2", 30
_GUARD_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where the agent runs: its command goes behind `prefix`, and it listens on `host`."""

    prefix: tuple[str, ...] = ()
    host: str = "127.0.0.1"


@contextmanager
def other_node(*, wanted: bool = True) -> Iterator[Place]:
    """Another network namespace, gone in the end; loopback, unless it is wanted.

    BenchError where none can be made.
    """
    if not wanted:
        yield Place()
        return
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        raise BenchError("network namespaces can't be made: " + (f"there is no {missing[0]}" if missing else
                                                                 "this isn't root"),
                         hint="run it as root, with util-linux and iproute2; or leave --namespaces out")
    # It ends with its stdin, however we end, and takes its device and so the other one along.
    owner = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    device = f"rfaas{os.getpid()}"
    try:
        _wait(owner)
        enter = ("nsenter", f"--net=/proc/{owner.pid}/ns/net", "--")
        _ip("link", "add", device, "type", "veth", "peer", "name", "rfaas0", "netns", str(owner.pid))
        for prefix, name, address in (((), device, _HERE), (enter, "rfaas0", _THERE)):
            _ip("address", "add", f"{address}/{_PREFIX}", "dev", name, prefix=prefix)
            _ip("link", "set", name, "up", prefix=prefix)
        _ip("link", "set", "lo", "up", prefix=enter)
        yield Place(enter, _THERE)
    finally:
        # The kernel takes its time to end a namespace.
        subprocess.run(["ip", "link", "delete", device], capture_output=True, check=False)
        owner.communicate()


def _wait(owner: subprocess.Popen[bytes]) -> None:
    mine, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + _GUARD_S
    while os.readlink(f"/proc/{owner.pid}/ns/net") == mine:
        if owner.poll() is not None or time.monotonic() > deadline:
            raise BenchError("unshare made no network namespace", hint="leave --namespaces out")
        time.sleep(0.001)


def _ip(*words: str, prefix: tuple[str, ...] = ()) -> None:
    done = subprocess.run([*prefix, "ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"ip {' '.join(words)}: {done.stderr.strip()}",
                         hint="does another measurement run? leave --namespaces out")
