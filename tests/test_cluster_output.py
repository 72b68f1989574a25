"""What kernels print over a cluster: the rank hears it, and a flood is cut where it comes from and says so."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from cluster import Cluster

FLOOD_BYTES = 100 << 20

BODY = """
def flood(size):
    lines = 64 * (b"x" * 1023 + bytes([10]))
    for _ in range(size // len(lines)):
        os.write(1, lines)

with Executor(1, fallback=False) as ex:
    ex.submit(flood, int(sys.argv[1])).result()
    ex.submit(print, "after it").result()
say("done")
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(["0-1"]) as cluster:
        yield cluster


def test_a_hundred_megabytes_of_output_are_cut_and_say_so_and_cost_no_result(cluster):
    with cluster.running(BODY, FLOOD_BYTES) as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out == "done\n", err[-2000:]
    assert len(err) < FLOOD_BYTES
    assert re.search(r"^\[rfaas worker \d+\] \(\d+ (bytes of output|lines) are left out", err, re.MULTILINE)
    assert all(line.startswith("[rfaas worker ") for line in err.splitlines()), "each line names its worker"
    assert re.search(r"^\[rfaas worker \d+, invocation \d+\] after it$", err, re.MULTILINE), "what comes after the flood is heard"
