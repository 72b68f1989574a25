"""`rfaas bench latency --transport verbs --provider null`: what the verbs transport itself costs."""

from __future__ import annotations

import ctypes

from rfaas_mpi.bench import environment, measure
from rfaas_mpi.bench.bare import NULL_LIBRARY, verbs_library
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet

# Invocations of a block, and bytes each way by what stands in a figure's name.
BLOCK = 20_000
CYCLES = 50
SIZES = {"": 8, "_1KiB": 1024}


def measure_null(options: Options) -> dict:
    """What the verbs transport itself costs: over a device that is none, both sides in this thread.

    `verbs_null_ns` is an invocation that does nothing, `verbs_null_raw_ns` the same work requests (posts, polls,
    receives) and nothing else; both with what the device that is none costs. Nothing is borrowed for it.
    """
    check_quiet(options.progress)
    lib = verbs_library(NULL_LIBRARY)
    lib.rfm_null_bench.restype = ctypes.c_int
    lib.rfm_null_bench.argtypes = [ctypes.c_uint64, ctypes.c_uint64, *2 * [ctypes.POINTER(ctypes.c_double)]]
    figures: dict[str, dict] = {}
    with environment.pinned(options.core) as cores:
        for suffix, size in SIZES.items():
            runs = []
            for number in range(1, options.runs + 1):
                options.progress(f"verbs over a device that is none, {size} bytes: run {number} of {options.runs}")
                runs.append(_null_run(lib, size, options.cycles(CYCLES)))
            figures |= {
                f"verbs_null{suffix}_ns": measure.latency_figure(runs, "product"),
                f"verbs_null{suffix}_raw_ns": measure.latency_figure(runs, "raw"),
                f"verbs_null{suffix}_over_raw_ns": measure.over(runs, "product", "raw", "raw_again")}
    return {**measure.flat(figures), "pinning": {"rank_core": cores.rank}}


def _null_run(lib: ctypes.CDLL, size: int, cycles: int) -> measure.Run:
    """The library measures both, one after the other; the second pair of a cycle is there for the A/A."""
    run = measure.Run({"product": [], "raw": [], "raw_again": []})
    for _ in range(cycles):
        pairs = [(ctypes.c_double(), ctypes.c_double()) for _ in range(2)]
        for product, bare in pairs:
            status = lib.rfm_null_bench(BLOCK, size, ctypes.byref(product), ctypes.byref(bare))
            if status < 0:
                raise BenchError(f"the device that is none failed with status {status}")
        run.blocks["product"].append(pairs[0][0].value)
        run.blocks["raw"].append(pairs[0][1].value)
        run.blocks["raw_again"].append(pairs[1][1].value)
    return run
