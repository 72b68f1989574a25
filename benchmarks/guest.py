#!/usr/bin/env python3
"""Measures verbs in guests with software RDMA, several boots, and adds what each said to one JSON.

USAGE: python benchmarks/guest.py [--boots 5] [--out benchmarks/verbs-guest.json] [--only latency]

Each boot (see tests/rdma_guest.py) runs perftest's ib_write_lat, `rfaas bench latency` and `rfaas bench payload` over
the guest's first device, one after another. It is emulated, so only ratios of times of one boot mean something, and
what is judged is the median of theirs over the boots. Run again with the same --out to add more of them. Nothing else
should run on this machine: the guest's two processors are its two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parent.parent
PARTS = ("perftest", "latency", "payload")
# How much of `rfaas bench` fits into some minutes there.
AMOUNT = {"latency": ("--runs", "1"), "payload": ("--runs", "1", "--quick")}
# A line's bytes; the first device, its IPv4 address; half a round trip of plain writes, without immediate.
WRITE_LAT = ("ib_write_lat", "-d", "rxe0", "-x", "1", "-s", "64", "-n", "5000", "-F", "-p", "18600")


@dataclass(frozen=True)
class Goal:
    """What the median over the boots should be."""

    part: str
    figure: str
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = (
    Goal("latency", "verbs_over_raw", 1.15),
    Goal("latency", "verbs_warm_over_raw", 1.5),
    Goal("latency", "verbs_pipelined_over_sequential", 2.0, at_least=True),
    Goal("payload", "verbs_bandwidth_over_raw_1MiB", 0.9, at_least=True),
    Goal("payload", "verbs_bandwidth_over_raw_16MiB", 0.9, at_least=True),
)


# --- in the guest ---------------------------------------------------------------------------

def measure_inside(parts: Sequence[str], directory: Path) -> None:
    """One JSON for each part, in `directory`."""
    for part in parts:
        begin = time.monotonic()
        file = directory / f"{part}.json"
        if part == "perftest":
            if said := write_lat():
                file.write_text(json.dumps(said))
        else:
            subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "bench", part, "--transport", "verbs", *AMOUNT[part],
                            "--out", file], stdout=subprocess.DEVNULL, check=True)
        print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr)


def write_lat() -> dict[str, float]:
    """µs of half a round trip, as perftest prints them; {} where there is no perftest."""
    if not all(shutil.which(program) for program in ("ib_write_lat", "taskset")):
        return {}
    with subprocess.Popen(["taskset", "-c", "1", *WRITE_LAT], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as listening:
        try:
            deadline = time.monotonic() + 30
            while not _listens(int(WRITE_LAT[-1])) and time.monotonic() < deadline and listening.poll() is None:
                time.sleep(0.1)
            done = subprocess.run(["taskset", "-c", "0", *WRITE_LAT, "localhost"], capture_output=True, text=True,
                                  timeout=60, check=True)
        finally:
            listening.kill()
    title, values = re.findall(r"^ *(#bytes.*)\n *(\d.*)$", done.stdout, re.M)[-1]
    names = [re.sub(r"\[usec\]|[%#]", "", name) for name in re.split(r" {2,}|\t+| (?=#)|(?<=\]) ", title.strip())]
    return {name.strip(): float(value) for name, value in zip(names, values.split(), strict=True)}


def _listens(port: int) -> bool:
    tables = "".join(Path(table).read_text() for table in ("/proc/net/tcp", "/proc/net/tcp6"))
    return re.search(rf":{port:04X} \S+ 0A ", tables) is not None


# --- around it --------------------------------------------------------------------------------

def boot(parts: Sequence[str], timeout_s: float) -> dict:
    """What one guest measured: the parts that it finished in time. CalledProcessError if it finished none."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rfaas-guest-") as directory:
        done = subprocess.run([sys.executable, REPOSITORY / "tests" / "rdma_guest.py", "--nodes", "1",
                               "--timeout", str(timeout_s), "--rw", directory,
                               "--", sys.executable, HERE, "--inside", directory,
                               *(option for part in parts for option in ("--only", part))], check=False)
        files = {part: Path(directory) / f"{part}.json" for part in parts}
        found = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    if not found:
        done.check_returncode()
    for part in set(found) & set(AMOUNT):
        found[part]["command"] = found[part]["command"][:-2]  # where it was put is gone
    return {"seconds": round(time.monotonic() - begin), **found}


def ratios(data: dict, goal: Goal, *, aa: bool = False) -> list[float]:
    """Of each boot that measured it."""
    figures = [one[goal.part]["figures"][goal.figure] for one in data["boots"] if goal.part in one]
    return [figure["aa"]["p50"] if aa else figure["p50"] for figure in figures]


def perftest_ratios(data: dict) -> Iterator[float]:
    """The product's round trip over two halves of perftest's, of each boot that has both."""
    for one in data["boots"]:
        if "latency" in one and (half := one.get("perftest", {}).get("t_typical")):
            yield one["latency"]["figures"]["verbs_latency_us"]["p50"] / (2 * half)


def summary(data: dict) -> dict:
    found: dict = {}
    for goal in GOALS:
        if values := ratios(data, goal):
            median = statistics.median(values)
            found[goal.figure] = {"median": round(median, 3), "boots": values, "aa": ratios(data, goal, aa=True),
                                  "wanted": f"{'>=' if goal.at_least else '<='} {goal.limit}", "met": goal.met(median)}
    bare = [one["latency"]["verbs_raw_pipelined_over_sequential"] for one in data["boots"] if "latency" in one]
    if bare:
        found["verbs_raw_pipelined_over_sequential"] = {"median": round(statistics.median(bare), 3), "boots": bare}
    if values := [round(value, 3) for value in perftest_ratios(data)]:
        found["verbs_latency_over_ib_write_lat"] = {"median": round(statistics.median(values), 3), "boots": values}
    return found


def table(found: dict) -> Iterator[str]:
    yield "| figure | median over boots | of each boot | A/A of each boot | wanted | |"
    yield "|---|--:|---|---|--:|---|"
    for name, value in found.items():
        each = (" · ".join(f"{one:.3g}" for one in value.get(key, ())) for key in ("boots", "aa"))
        yield (f"| `{name}` | {value['median']:.3g} | {' | '.join(each)} | {value.get('wanted', '')} | "
               f"{ {True: 'reached', False: '**missed**'}.get(value.get('met'), '')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boots", type=int, default=5, metavar="N", help="guests, one after another (5)")
    parser.add_argument("--out", type=Path, default=HERE.with_name("verbs-guest.json"), metavar="FILE")
    parser.add_argument("--only", action="append", choices=PARTS, help="not all parts; may be given several times")
    parser.add_argument("--timeout", type=float, default=420.0, metavar="S", help="of one boot (420)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.only or PARTS
    if options.inside is not None:
        measure_inside(parts, options.inside)
        return
    data: dict = {"bench": "verbs in guests", "boots": []}
    with contextlib.suppress(FileNotFoundError):
        data = json.loads(options.out.read_text())
    for number in range(1, options.boots + 1):
        print(f"boot {number} of {options.boots}", file=sys.stderr)
        data["boots"].append(boot(parts, options.timeout))
        data["summary"] = summary(data)
        # After each: what was measured is not lost with the next one.
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(table(data.get("summary", {}))))


if __name__ == "__main__":
    main()
