"""One benchmark, or all of them, as the JSON object that is printed and kept."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rfaas_mpi._version import __version__
from rfaas_mpi.bench import environment
from rfaas_mpi.bench.cold import measure_cold
from rfaas_mpi.bench.fairness import measure_fairness
from rfaas_mpi.bench.latency import measure_latency
from rfaas_mpi.bench.network import measure_network_latency, measure_network_payload
from rfaas_mpi.bench.null import measure_null
from rfaas_mpi.bench.payload import measure_payload
from rfaas_mpi.bench.reclaim import measure_reclaim
from rfaas_mpi.bench.split import measure_split
from rfaas_mpi.bench.stage import Options
from rfaas_mpi.bench.throughput import measure_throughput
from rfaas_mpi.errors import ConfigError

__all__ = ["NAMES", "Options", "check_writable", "keep", "measure"]

def measure_control(options: Options) -> dict:
    """The control plane's parts that `options.of` names, else all of them."""
    try:
        from rfaas_mpi.bench import control, first, manager
    except ImportError as error:
        raise ConfigError(f"the control plane needs {error.name}", hint="pip install 'rfaas_mpi[cluster]'") from None
    parts = {"book": control.measure_book, "http": manager.measure_http, "restart": manager.measure_restart,
             "first": first.measure_first}
    found: dict = {"figures": {}}
    for name in options.of or parts:
        part = parts[name](options)
        found["figures"] |= part.pop("figures", {})
        found |= part
    return found


def measure_faults(options: Options) -> dict:
    """What faults cost apps; ConfigError where the cluster's packages are missing."""
    try:
        from rfaas_mpi.bench import faults
    except ImportError as error:
        raise ConfigError(f"a cluster needs {error.name}", hint="pip install 'rfaas_mpi[cluster]'") from None
    return faults.measure_faults(options)


def measure_crossover(options: Options) -> dict:
    """Where the planner runs what; ConfigError where the cluster's packages are missing."""
    try:
        from rfaas_mpi.bench import crossover
    except ImportError as error:
        raise ConfigError(f"a cluster needs {error.name}", hint="pip install 'rfaas_mpi[cluster]'") from None
    return crossover.measure_crossover(options)


_BENCHMARKS: dict[str, Callable[[Options], dict]] = {
    "latency": measure_latency, "throughput": measure_throughput, "payload": measure_payload, "cold": measure_cold}
NAMES = tuple(_BENCHMARKS)
# No part of "all": they measure something else than invocations.
_APART: dict[str, Callable[[Options], dict]] = {"reclaim": measure_reclaim, "control": measure_control,
                                              "faults": measure_faults, "crossover": measure_crossover,
                                              "fairness": measure_fairness, "split": measure_split}
_OVER_A_NETWORK: dict[str, Callable[[Options], dict]] = {
    "latency": measure_network_latency, "payload": measure_network_payload, "crossover": measure_crossover,
    "split": measure_split}


def measure(what: str, options: Options) -> dict:
    """Measures one of NAMES, "all" of them, "reclaim", "control", "faults", "fairness" or "split"; the figures, how they were
    made, and where.

    The figures of one benchmark lie on the top level; of "all", one level down. BenchError where there is no core to
    borrow.
    """
    benchmarks = _BENCHMARKS if options.transport == "shm" else _OVER_A_NETWORK
    if options.provider == "null":
        benchmarks = {"latency": measure_null}
    if what in _APART and options.transport == "shm":
        benchmarks = _APART
    if options.provider != "device" and (what, options.transport) != ("latency", "verbs"):
        raise ConfigError(f"provider {options.provider} is for the latency of verbs",
                          hint=f"rfaas bench latency --transport verbs --provider {options.provider}")
    if what not in (*benchmarks, *(["all"] if benchmarks is _BENCHMARKS else [])):
        raise ConfigError(f"{what} is measured on shared memory only",
                          hint=f"leave --transport {options.transport} out, or measure {' or '.join(benchmarks)}")
    head = {"bench": what, "version": __version__, "command": ["rfaas", *sys.argv[1:]],
            "settings": options.settings(), "environment": environment.facts()}
    stolen, begin = environment.stolen_ticks(), time.monotonic()
    figures = {name: benchmarks[name](options) for name in NAMES} if what == "all" else benchmarks[what](options)
    seconds = time.monotonic() - begin
    after = environment.stolen_ticks()
    if stolen is not None and after is not None:
        # A hypervisor that took the core away explains a figure; nothing else in here would.
        ticks = os.sysconf("SC_CLK_TCK") * seconds * (os.cpu_count() or 1)
        head["environment"]["stolen_percent"] = round(100 * (after - stolen) / ticks, 3)
    return {**head, "seconds": round(seconds, 1), **figures}


def check_writable(file: Path) -> None:
    """ConfigError if the file can't be written, before anything is measured."""
    folder = file.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"there is no directory {folder} for {file.name}", hint=f"mkdir -p {folder}")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"{file} can't be written", hint="choose another --out")


def keep(data: dict, file: Path) -> None:
    """Writes the object to a file: all of it, or nothing."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
