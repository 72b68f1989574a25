"""Where large arrays begin in their pages: what it costs a kernel that streams through several of them.

    python benchmarks/starts.py --json benchmarks/starts-2core-vm.json

Black-Scholes by one pinned process on private memory with huge pages, in turn on
arrays that all begin at a huge page (`equal`), on arrays that begin at different
cache lines of a page, as arenas have them (`apart`), and on a second set of each.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import rfaas_mpi as rf
from rfaas_mpi.bench import environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "apps"))
import blackscholes
import common

HUGE = 2 << 20
STEP = 25 * 64      # csrc/arena.c
SETS = {"equal": 0, "apart": STEP, "equal again": 0, "apart again": STEP}


def maker(step: int) -> Callable[[int, str], np.ndarray]:
    """Makes arrays of which each begins `step` bytes further behind a huge page's begin, within 4 KiB."""
    made = 0

    def empty(count: int, dtype: str) -> np.ndarray:
        nonlocal made
        kind = np.dtype(dtype)
        area = mmap.mmap(-1, count * kind.itemsize + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(area, np.uint8)
        start = -raw.__array_interface__["data"][0] % HUGE + made * step % 4096
        made += 1
        return raw[start:start + count * kind.itemsize].view(kind)

    return empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    common.bind(min(os.sched_getaffinity(0)))
    kernel = rf.Kernel.from_library(Path(rf.__file__).with_name("_native_kernels.so"), "rfm_black_scholes")
    sets = {}
    for name, step in SETS.items():
        empty = maker(step)
        options, prices = blackscholes.make_options(0, given.options, 1973, empty), empty(given.options, "f8")
        sets[name] = options, prices, kernel.bind(tuple(options), (prices,))
    seconds: dict[str, list[float]] = {name: [] for name in sets}
    for turn in range(given.rounds + 1):
        order = list(sets)[turn % len(sets):] + list(sets)[:turn % len(sets)]
        for name in order if turn % 2 == 0 else order[::-1]:
            options, prices, run = sets[name]
            np.bitwise_xor(options.put, 1, out=options.put)
            prices.fill(np.nan)
            common.wait_for(time.monotonic_ns() + common.PAUSE_NS)
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    answers = [prices for _, prices, _ in sets.values()]
    assert all((answer == answers[0]).all() for answer in answers), "the sets' prices differ"
    ratios = {f"{one} over {two}": common.summary(a / b for a, b in zip(seconds[one], seconds[two], strict=True))
              for one, two in (("equal", "apart"), ("equal again", "apart again"), ("equal", "equal again"),
                               ("apart", "apart again"))}
    for name, found in ratios.items():
        low, high = found["median_between"]
        print(f"{name}: {found['median']:.3f} ({low:.3f} to {high:.3f})")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values) * 1e3:.2f} ms")
    if given.json:
        given.json.write_text(json.dumps({
            "options": given.options, "rounds": given.rounds, "sets": SETS, "seconds": seconds, "ratios": ratios,
            "environment": environment.facts()}))


if __name__ == "__main__":
    main()
