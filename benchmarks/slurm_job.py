#!/usr/bin/env python3
"""A job whose second node lends its core to the rank on the first one, beside the same job without workers.

USAGE: python benchmarks/slurm_job.py run [--pairs 8] [--app transport] --out slurm-job.json [-- APP'S ARGUMENTS]
       python benchmarks/slurm_job.py report slurm-job.json

`run` starts two virtual nodes (tests/slurm_cluster.py; as root), each with one of the machine's first two cores, and a
network between them. In turn, each time in another order, three jobs of both nodes run the same app on one rank, which is
bound to its node's core:

    lent     rfaas slurm run --ranks 1 -- python apps/APP.py --mode split --workers 1
    plain    srun --ntasks=1 --cpu-bind=map_cpu:0 … python apps/APP.py --mode local
    again    the same once more: what is measured where there is no difference

Of each it keeps what the app says of itself (the median of its rounds, after a verdict on all of them) and how long the
whole job's script took. More runs with the same --out add their jobs to it. `report` prints medians of the jobs' ratios, and
between which they lie (95 %, by order statistics).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from slurm_cluster import Slurm, why_not  # noqa: E402

from rfaas_mpi.bench import environment  # noqa: E402

KINDS = ("lent", "plain", "again")
RFAAS = Path(sys.executable).with_name("rfaas")


def job(slurm: Slurm, kind: str, app: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the app reports of its rounds, and how long the script took. AssertionError where the app was wrong."""
    report = slurm.directory / "report.json"
    report.unlink(missing_ok=True)
    mode = "split --workers 1" if kind == "lent" else "local"
    program = f"'{sys.executable}' '{REPOSITORY}/apps/{app}.py' --mode {mode} --json '{report}' {' '.join(arguments)}"
    start = (f"'{RFAAS}' slurm run --ranks 1 --mpi pmi2 --" if kind == "lent" else
             f"srun --mpi=pmi2 --nodes=1 --ntasks=1 --nodelist={slurm.names[0]} --cpu-bind=map_cpu:0")
    said = slurm.finish(f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}' OMP_NUM_THREADS=1\nbegin=$(date +%s.%N)\n"
                        f"{start} {program} || exit 1\necho \"seconds $begin $(date +%s.%N)\"\n",
                        f"--nodes={len(slurm.names)}", "--exclusive")
    begin, end = map(float, said.rpartition("seconds ")[2].split())
    found = json.loads(report.read_text())
    assert found["verdict"]["correct"], said
    (seconds,) = found["seconds"].values()
    found["config"].pop("arguments", None)       # they name files that are gone
    where = [line for line in said.splitlines() if line.startswith("rfaas:")]
    return {"kind": kind, "app_s": statistics.median(seconds), "rounds_s": seconds, "script_s": end - begin, "where": where,
            "config": found["config"]}


def run(args: argparse.Namespace) -> int:
    if reason := why_not():
        sys.exit(reason)
    out: Path = args.out
    report = json.loads(out.read_text()) if out.exists() else {
        "app": args.app, "arguments": args.arguments, "jobs": [], "runs": []}
    assert (report["app"], report["arguments"]) == (args.app, args.arguments), f"{out} has another app"
    report["runs"].append({"environment": environment.facts(), "load": os.getloadavg(), "began": time.time()})
    # Slurm leaves the core that is named to itself, so that each node has the other one.
    with Slurm(2, 2, apart=True, confined=True, each=("CpuSpecList=1", "CpuSpecList=0")) as slurm:
        for pair in range(args.pairs):
            for kind in KINDS[pair % 3:] + KINDS[:pair % 3]:
                report["jobs"].append({"turn": len(report["runs"]) * 1000 + pair,
                                       **job(slurm, kind, args.app, args.arguments)})
                print(*(f"{key} {report['jobs'][-1][key]}" for key in ("turn", "kind", "app_s", "script_s")), flush=True)
            out.write_text(json.dumps(report, indent=1))
    return show(args)


def between(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies, with 95 %, by order statistics."""
    ordered, count = sorted(values), len(values)
    below, chance = 0, 0.5 ** count
    while below < count // 2 and chance <= 0.025:
        below += 1
        chance += comb(count, below) * 0.5 ** count
    low = max(0, below - 1)
    return ordered[low], ordered[count - 1 - low]


def show(args: argparse.Namespace) -> int:
    report = json.loads(args.out.read_text())
    turns: dict[int, dict[str, dict[str, Any]]] = {}
    for each in report["jobs"]:
        turns.setdefault(each["turn"], {})[each["kind"]] = each
    whole = [turn for turn in turns.values() if len(turn) == len(KINDS)]
    print(f"{report['app']} {' '.join(report['arguments'])}: {len(whole)} turns")
    for what in ("app_s", "script_s"):
        medians = {kind: statistics.median(turn[kind][what] for turn in whole) for kind in KINDS}
        print(what, *(f"{kind} {value * 1e3:.1f} ms" for kind, value in medians.items()))
        for top, bottom in (("plain", "lent"), ("plain", "again")):
            ratios = [turn[top][what] / turn[bottom][what] for turn in whole]
            low, high = between(ratios)
            print(f"  {top} over {bottom}: {statistics.median(ratios):.3f}x ({low:.3f} to {high:.3f})")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--pairs", type=int, default=8)
    runs.add_argument("--app", default="transport")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("arguments", nargs="*", metavar="APP'S ARGUMENT")
    runs.set_defaults(do=run)
    shows = commands.add_parser("report")
    shows.add_argument("out", type=Path)
    shows.set_defaults(do=show)
    args = parser.parse_args()
    return args.do(args)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
