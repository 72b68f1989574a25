"""From a lease to its first result in two trees of this project, in turn: what a change made of it.

    python benchmarks/first.py OTHER [--pairs N] [--namespaces] [--out FILE]

OTHER is a checkout with its extension built in place, of the commit before. One pair is a lease of this tree, one of
OTHER and one more of this tree (A/A), in ms as in `rfaas bench control --of first`; each tree has its own manager and
agent. `cpu_ms` is what they and the rank used meanwhile, from the demand until the lease was let go, which other work
beside it hardly changes. Prints one JSON object, with every pair. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
WARM_UP = 5
REST_S = 0.06                        # both trees' zygotes have forked the next worker ahead

# Runs in either tree, whose bench has these names.
SIDE = """
import contextlib, json, os, sys, tempfile
from pathlib import Path
from rfaas_mpi.bench import environment, first
with contextlib.ExitStack() as stack:
    cores = stack.enter_context(environment.pinned(None))
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rfaas-b-")))
    place = first.Place(tuple(sys.argv[2:]), sys.argv[1])
    lent = max(core for core in cores.allowed if core != cores.rank)
    cluster = first._Cluster(directory, place, rank_core=cores.rank, lent=lent, allowed=cores.allowed)
    stack.callback(cluster.close)
    rank = first._Rank(cluster)
    pids = dict(zip(("manager", "agent"), [process.pid for process in cluster._processes])) | {"rank": os.getpid()}
    rest, cluster.rest = cluster.rest, lambda: None
    def cpu_ms():
        return {name: sum(int(thread.read_text().split()[0]) / 1e6
                          for thread in Path(f"/proc/{pid}/task").glob("*/schedstat")) for name, pid in pids.items()}
    print("ready", flush=True)
    for _ in sys.stdin:
        before, steps, after = cpu_ms(), rank.lease(), cpu_ms()
        rest()
        print(json.dumps([steps, {name: after[name] - before[name] for name in pids}]), flush=True)
"""


class Side:
    """A tree's manager, agent and rank. close() ends them."""

    def __init__(self, tree: Path, place: tuple[str, ...]) -> None:
        self.tree = tree
        self.cpu_ms: list[dict[str, float]] = []         # of each lease
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SIDE, *place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "RFAAS_CONFIG": os.devnull})
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"the bench in {self.tree} ended; it says above why")
        return line

    def lease(self) -> dict[str, float]:
        time.sleep(REST_S)
        assert self._process.stdin is not None
        self._process.stdin.write("lease\n")
        self._process.stdin.flush()
        steps, cpu_ms = json.loads(self._line())
        self.cpu_ms.append(cpu_ms)
        return steps

    @property
    def commit(self) -> str:
        told = subprocess.run(["git", "-C", str(self.tree), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, check=False)
        return told.stdout.strip()

    def close(self) -> None:
        self._process.communicate()


def summary(pairs: list[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Medians of the totals and of their ratios, and of each step."""
    total = {name: [sum(pair[name].values()) for pair in pairs] for name in pairs[0]}
    steps = {name: {step: round(statistics.median(pair[name][step] for pair in pairs), 3) for step in pairs[0][name]}
             for name in pairs[0]}
    return {"ms": {name: {"p50": round(statistics.median(values), 3),
                          "p90": round(sorted(values)[int(0.9 * len(values))], 3)} for name, values in total.items()},
            "ratio": round(statistics.median(map(float.__truediv__, total["this"], total["other"])), 3),
            "ratio_aa": round(statistics.median(map(float.__truediv__, total["this"], total["again"])), 3),
            "steps_p50_ms": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--namespaces", action="store_true", help="each agent in a network namespace of its own")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE)]
    from rfaas_mpi.bench import environment, namespaces
    with namespaces.other_node(wanted=options.namespaces) as place:
        words = (place.host, *place.prefix)
        sides = {"this": Side(HERE, words), "other": Side(options.other.resolve(), words)}
        try:
            for _ in range(WARM_UP):
                for side in sides.values():
                    side.lease()
            pairs = [{name: sides[side].lease() for name, side in
                      (("this", "this"), ("other", "other"), ("again", "this"))} for _ in range(options.pairs)]
        finally:
            for side in sides.values():
                side.close()
    found = {"bench": "first, two trees in turn", "command": ["python", *sys.argv],
             "commits": {name: side.commit for name, side in sides.items()},
             "environment": environment.facts(), **summary(pairs), "cpu_ms": {
                 name: {process: round(statistics.median(each[process] for each in side.cpu_ms[WARM_UP:]), 3)
                        for process in side.cpu_ms[0]} for name, side in sides.items()}, "pairs": pairs}
    text = json.dumps(found, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("pairs", "environment")}, indent=1))


if __name__ == "__main__":
    main()
