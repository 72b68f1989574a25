"""What splits of a numpy kernel take below a few milliseconds, in this version and in another checkout.

    python benchmarks/short_splits.py --other /path/to/checkout --out benchmarks/short-splits-2core-vm.json

The kernel is that of `rfaas bench crossover`. In each process the same rows are run, in turn, by one call on the rank,
by halves by hand, by a split that stays on the rank, by `Split`, and by `Split` with rowwise=True where the version has
that; call, halves and split once more for the A/A. Processes of both versions take turns, as both have to be built.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
ROWS = 4096
WIDTHS = (1, 32)
WORK_S = (30e-6, 100e-6, 300e-6, 1e-3, 3e-3)
LEARN = 60
SERVICE_ENDS_S = 3.0
AGAIN = ("call", "halves", "split")


def measured(rounds: int) -> list[dict]:
    """One process: every point's times by way, seconds."""
    from rfaas_mpi import Executor
    from rfaas_mpi.bench import crossover, environment
    from rfaas_mpi.splitting import Split
    has = "rowwise" in inspect.signature(Split.__init__).parameters
    works, turn_s, points = crossover.works, crossover._turn_s(), []
    with environment.pinned(None), Executor(workers=1, transport="shm") as executor:
        for width in WIDTHS:
            for work_s in WORK_S:
                turns = work_s / turn_s / ROWS
                x = executor.array(np.random.default_rng(1).random((ROWS, width)))
                out, given = executor.zeros((ROWS, width)), np.array(turns)
                splits = {"here": {"where": "here"}, "split": {}}
                if has:
                    splits |= {"together_here": {"where": "here", "rowwise": True}, "together": {"rowwise": True}}
                made = {name: executor.Split_init(works, (x, given), out, **how) for name, how in splits.items()}
                request = executor.Invoke_init(works, (x[:ROWS // 2], given), out[:ROWS // 2])
                ways = _ways(works, x, out, turns, request) | {name: one.Run for name, one in made.items()}
                ways |= {f"{name}_again": ways[name] for name in AGAIN}
                for name, run in ways.items():
                    for _ in range(LEARN):
                        run()
                    out.fill(np.nan)
                    run()
                    if not np.array_equal(out, 2 * x):
                        sys.exit(f"{name} gave a wrong answer; no figure is worth anything then")
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(rounds):
                    for name, run in ways.items():
                        begin = time.perf_counter()
                        run()
                        times[name].append(round(time.perf_counter() - begin, 7))
                points.append({"work_s": work_s, "bytes": x.nbytes + out.nbytes, "times_s": times,
                               "why": {name: one.predict().why for name, one in made.items()}})
                for one in (*made.values(), request):
                    one.Free()
    return points


def _ways(works: Callable, x: np.ndarray, out: np.ndarray, turns: float, request: object) -> dict[str, Callable]:
    rest, result = x[ROWS // 2:], out[ROWS // 2:]

    def halves() -> None:
        request.Start()
        works(rest, turns, out=result)
        request.Wait()
    return {"call": lambda: works(x, turns, out=out), "halves": halves}


def table(runs: list[dict]) -> str:
    """Medians over all processes of a version, µs; A/A is the second split's to the first one's."""
    lines = ["| work, ms | KiB | version | one call | halves by hand | rank alone | Split | rowwise, rank alone | "
             "rowwise | A/A |", "|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for k, point in enumerate(runs[0]["points"]):
        for version in dict.fromkeys(run["version"] for run in runs):
            ways = [run["points"][k]["times_s"] for run in runs if run["version"] == version]

            def us(name: str, ways: list[dict] = ways) -> str:
                found = [value for each in ways for value in each.get(name, ())]
                return f"{statistics.median(found) * 1e6:.0f}" if found else ""
            pairs = [b / a for each in ways for a, b in zip(each["split"], each["split_again"], strict=True)]
            lines.append(f"| {point['work_s'] * 1e3:g} | {point['bytes'] >> 10} | {version} | {us('call')} | "
                         f"{us('halves')} | {us('here')} | {us('split')} | {us('together_here')} | {us('together')} | "
                         f"{100 * (statistics.median(pairs) - 1):.1f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout of another version, built")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--processes", type=int, default=3, help="of each version")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help="this process alone, as JSON")
    options = parser.parse_args()
    if options.one:
        json.dump(measured(options.rounds), sys.stdout)
        return
    checkouts = {"this": HERE} | ({"other": options.other.resolve()} if options.other else {})
    runs = []
    for number in range(options.processes):
        for version, path in sorted(checkouts.items(), reverse=bool(number % 2)):
            argv = [sys.executable, str(Path(__file__).resolve()), "--one", "--rounds", str(options.rounds)]
            done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=path,
                                  env={**os.environ, "PYTHONPATH": str(path)})
            runs.append({"version": version, "points": json.loads(done.stdout)})
            # The service of one version is no worker's parent in the other.
            time.sleep(SERVICE_ENDS_S)
    if options.out:
        options.out.write_text(json.dumps({"rows": ROWS, "runs": runs}) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
