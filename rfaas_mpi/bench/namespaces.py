"""A second node on this machine, for a measurement: a network namespace, with a pair of devices that leads there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rfaas_mpi.bench.raw import BenchError

__all__ = ["Place", "other_node"]

# Of a network of documentation (RFC 5737): nobody's real one is hidden. Each of its parts has two hosts.
_NETWORK, _PREFIX, _PARTS = "198.51.100", 30, 64
_GUARD_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where the agent runs: its command goes behind `prefix`, and it listens on `host`, behind our `device`."""

    prefix: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    device: str = "lo"


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
    number, claim = _claim()
    with claim:
        here, there = (f"{_NETWORK}.{4 * number + host}" for host in (1, 2))
        # It ends with its stdin, however we end, and takes its device and so the other one along.
        owner = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            _wait(owner)
            enter = ("nsenter", f"--net=/proc/{owner.pid}/ns/net", "--")
            _ip("link", "add", _device(number), "type", "veth", "peer", "name", "rfaas0", "netns", str(owner.pid))
            for prefix, name, address in (((), _device(number), here), (enter, "rfaas0", there)):
                _ip("address", "add", f"{address}/{_PREFIX}", "dev", name, prefix=prefix)
                _ip("link", "set", name, "up", prefix=prefix)
            _ip("link", "set", "lo", "up", prefix=enter)
            yield Place(enter, there, _device(number))
        finally:
            # The kernel takes its time to end a namespace.
            subprocess.run(["ip", "link", "delete", _device(number)], capture_output=True, check=False)
            owner.communicate()


def _device(number: int) -> str:
    return f"rfaas-n{number}"


def _claim() -> tuple[int, socket.socket]:
    """Which part of the network is ours, and what has to stay open as long: others may measure at the same time."""
    # Abstract names are known in one network namespace, as addresses and devices are, and go with their process.
    claim = socket.socket(socket.AF_UNIX)
    for number in range(_PARTS):
        if os.path.exists(f"/sys/class/net/{_device(number)}"):
            continue                # whose owner was killed; the kernel takes its time with it
        try:
            claim.bind(f"\0rfaas-namespaces-{number}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return number, claim
    claim.close()
    raise BenchError(f"{_PARTS} measurements use all addresses of {_NETWORK}.0/24", hint="wait for one of them")


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
                         hint="leave --namespaces out")
