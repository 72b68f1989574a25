"""What the first call of a request takes over tcp, in this version and in another checkout.

    python benchmarks/new_requests.py --other /path/to/checkout --out benchmarks/new-requests-2core-vm.json

A rank and one worker over the loopback, a core each. Each of 40 requests for the same 64 KiB is set up (`Invoke_init`),
run once and freed, and then one of them is run 40 times: seconds of each call, from `Start` to the end of `Wait`.
Processes of both versions, which have to be built, take turns, two of this one in each round (A/A).
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

import numpy as np

HERE = Path(__file__).resolve().parent.parent
REQUESTS = 40


def measured() -> dict[str, list[float]]:
    """One process: seconds of each first call, and of each later one."""
    from rfaas_mpi.bench import crossover
    from rfaas_mpi.bench.stage import Options
    with crossover._borrowed(Options(transport="tcp")) as (executor, _pinning):
        x = executor.array(np.random.default_rng(1).random((4096, 1)))
        out, turns = executor.zeros(x.shape), np.array(0.0)

        def request() -> object:
            return executor.Invoke_init(crossover.works, (x, turns), out)

        def call(one: object) -> float:
            begin = time.perf_counter()
            one.Start()
            one.Wait()
            return time.perf_counter() - begin
        kept = request()
        call(kept)
        first = []
        for _ in range(REQUESTS):
            one = request()
            out.fill(np.nan)
            first.append(call(one))
            if not np.array_equal(out, 2 * x):
                sys.exit("a wrong answer; no figure is worth anything then")
            one.Free()
        return {"first": first, "later": [call(kept) for _ in range(REQUESTS)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout of another version, built")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured()))
        return
    from rfaas_mpi.bench import environment
    checkouts = {"this": HERE, "this_again": HERE} | ({"other": options.other.resolve()} if options.other else {})
    runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in checkouts}
    for turn in range(options.rounds):
        names = sorted(checkouts)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            path = checkouts[name]
            done = subprocess.run([sys.executable, __file__, "--child"], check=True, stdout=subprocess.PIPE, cwd=path,
                                  env={**os.environ, "PYTHONPATH": str(path)})
            runs[name].append(json.loads(done.stdout))
    figures = {name: {
        "first_sum_ms": statistics.median(1e3 * sum(run["first"]) for run in each),
        "first_longest_ms": statistics.median(1e3 * max(run["first"]) for run in each),
        "first_p50_us": statistics.median(1e6 * statistics.median(run["first"]) for run in each),
        "later_p50_us": statistics.median(1e6 * statistics.median(run["later"]) for run in each)}
        for name, each in runs.items()}
    for name, figure in figures.items():
        print(f"{name:<12}" + "".join(f"{key} {value:8.2f}   " for key, value in figure.items()))
    if options.out is not None:
        options.out.write_text(json.dumps({
            "bench": "new_requests", "rounds": options.rounds,
            "command": "python benchmarks/new_requests.py --other CHECKOUT --out FILE",
            "requests": REQUESTS, "environment": environment.facts(),
            "figures": figures, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
