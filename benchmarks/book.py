"""NAME: book - the lease book of this checkout beside another one's.

PURPOSE: how many whole lives of grants (asked for, granted, activated, given back, gone) each does in a second, with
the default placement policy: the cluster of `rfaas bench control --of book`. The two and a second copy of the other
one take turns, so that all meet the same machine.

USAGE: python benchmarks/book.py OTHER [--pairs 5] [--cycles 20] [--out FILE]
       python benchmarks/book.py --parts [--cycles 20] [--out FILE]

OTHER is a checkout of an earlier version, with its extension built. The copy (A/A) should be as fast as what it is a
copy of: what its ratio shows instead is what this machine can't resolve. With --parts: of this checkout's lives, the
CPU time of each part, one part watched at a time, and what a life takes while none is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIVES = 200
PLAYER = f"""
import sys, time
from rfaas_mpi.bench.control import Cluster
cluster = Cluster()
cluster.lives(500)
print("ready", flush=True)
for _ in sys.stdin:
    begin = time.perf_counter_ns()
    cluster.lives({LIVES})
    print((time.perf_counter_ns() - begin) / {LIVES}, flush=True)
cluster.check()
"""


def player(checkout: Path) -> subprocess.Popen[str]:
    found = subprocess.Popen([sys.executable, "-c", PLAYER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
    assert found.stdout is not None and found.stdout.readline() == "ready\n", checkout
    return found


def pair(checkouts: dict[str, Path], cycles: int) -> dict:
    """One pair: new books of all three, and the ns of a life in each block."""
    players = {name: player(checkout) for name, checkout in checkouts.items()}
    took: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(cycles):
        for name, one in players.items():
            assert one.stdin is not None and one.stdout is not None
            one.stdin.write("\n")
            one.stdin.flush()
            took[name].append(float(one.stdout.readline()))
    for name, one in players.items():
        one.communicate()
        assert one.returncode == 0, f"{name}: a core is lent twice, or a lease was lost"

    def ratio(top: str, bottom: str) -> float:
        return round(statistics.median(a / b for a, b in zip(took[top], took[bottom], strict=True)), 3)

    return {"grants_per_s": {name: round(1e9 / statistics.median(times)) for name, times in took.items()},
            "faster": ratio("other", "this"), "aa": ratio("other", "other_again"), "ns_per_life": took}


def parts(cycles: int) -> dict:
    """The µs of CPU time of each part of a life: the median of the blocks, with the least beside it."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from rfaas_mpi.bench.control import Cluster
    from rfaas_mpi.leases import LeaseBook
    from rfaas_mpi.leases.nodes import Nodes
    from rfaas_mpi.placement import Placer

    cluster, clock = Cluster(), time.thread_time_ns
    cluster.lives(500)
    watched = {"decision": (Placer, "choose"), "grants": (LeaseBook, "_grant"), "ends": (LeaseBook, "_end"),
               "stops": (LeaseBook, "_stop"), "activations": (LeaseBook, "_activated"),
               "what changes on nodes, in grants and ends": (Nodes, "changed")}
    took: dict[str, list[float]] = {"a life": [], **{name: [] for name in watched}}
    for _ in range(cycles):
        begin = clock()
        cluster.lives(LIVES)
        took["a life"].append((clock() - begin) / LIVES / 1e3)
        for name, (owner, method) in watched.items():
            whole, spent = getattr(owner, method), 0

            def timed(*args: object, whole: Callable = whole, **more: object) -> object:
                nonlocal spent
                start = clock()
                try:
                    return whole(*args, **more)
                finally:
                    spent += clock() - start

            setattr(owner, method, timed)
            cluster.lives(LIVES)
            setattr(owner, method, whole)
            took[name].append(spent / LIVES / 1e3)
    cluster.check()
    return {name: {"p50_us": round(statistics.median(times), 1), "least_us": round(min(times), 1)}
            for name, times in took.items()}


def keep(found: dict, out: Path | None) -> None:
    text = json.dumps(found, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--parts", action="store_true", help="no other checkout: the parts of a life, of this one")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.parts:
        keep({"bench": "book", "parts": parts(options.cycles), "cycles": options.cycles, "lives_per_block": LIVES,
              "load_after": os.getloadavg()[0]}, options.out)
        return
    if options.other is None:
        parser.error("OTHER is missing: a checkout of an earlier version")
    here = Path(__file__).resolve().parent.parent
    checkouts = {"other": options.other.resolve(), "this": here, "other_again": options.other.resolve()}
    commits = {name: subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True, check=True,
                                    capture_output=True).stdout.strip() for name, checkout in checkouts.items()}
    pairs = []
    for number in range(options.pairs):
        pairs.append(pair(checkouts, options.cycles))
        print(f"pair {number + 1}: {pairs[-1]['grants_per_s']}, {pairs[-1]['faster']} times as fast "
              f"(A/A {pairs[-1]['aa']})", file=sys.stderr, flush=True)
    found = {"bench": "book", "command": ["python", "benchmarks/book.py", "OTHER", *sys.argv[2:]], "commits": commits,
             "lives_per_block": LIVES, "cycles": options.cycles,
             "load_after": os.getloadavg()[0],
             "grants_per_s": {name: round(statistics.median(one["grants_per_s"][name] for one in pairs))
                              for name in checkouts},
             "faster": statistics.median(one["faster"] for one in pairs),
             "aa": statistics.median(one["aa"] for one in pairs), "pairs": pairs}
    keep(found, options.out)


if __name__ == "__main__":
    main()
