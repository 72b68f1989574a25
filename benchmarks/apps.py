#!/usr/bin/env python3
"""Runs the apps and prints one table; renders their reports into docs/benchmarks.md and draws them.

USAGE: python benchmarks/apps.py run [--over shm|tcp]... [--rounds 3] [--small] [--app NAME]... [--out benchmarks]
       python benchmarks/apps.py report [--docs docs/benchmarks.md] [--plot docs/apps.png] benchmarks/app-*.json

`run` has every app of apps/ run in turn: local, remote, split, 2 MPI ranks, the bound and the split once more, round by
round; see apps/common.py. It ends with status 1 where a verdict is wrong. `--over tcp` has the workers on another node,
which is a network namespace of this machine: for root. Nothing else should run meanwhile.

`report` replaces what is between two marks of the page. The plot needs matplotlib (`pip install 'rfaas_mpi[demo]'`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rfaas_mpi import config
from rfaas_mpi.bench.namespaces import other_node
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.cli import apps
from rfaas_mpi.errors import RFaaSError

BEGIN, END = "<!-- apps: begin -->", "<!-- apps: end -->"
GUARD_S = 900.0
COMPARED = ("--mode", "local", "--mode", "remote", "--mode", "split", "--bound", "--ranks", "2", "--again")
# Of the bound's speed-up, over shared memory.
WANTED = {"blackscholes": 0.97, "matmul": 0.97, "transport": 0.97, "ensemble": 0.97, "jacobi": 0.95, "hydro": 0.90}
PREDICTED_WITHIN = 0.10
OVER = {"shm": "over shared memory", "tcp": "over tcp, between two network namespaces"}


# --- running them --------------------------------------------------------------------------

@contextlib.contextmanager
def workers(over: str) -> Iterator[dict[str, str]]:
    """What is in the environment of ranks whose workers are had this way, from a service of their own.

    BenchError where no other node can be made.
    """
    with tempfile.TemporaryDirectory(prefix="rfaas-apps-") as directory:
        there = {**config.environment(), "RFAAS_RUNTIME_DIR": directory}
        if over == "shm":
            try:
                yield {"RFAAS_RUNTIME_DIR": directory}
            finally:
                rfaas("down", environment=there)
            return
        allowed = sorted(os.sched_getaffinity(0))
        with other_node() as place:
            # Ranks take the first core.
            said = rfaas("up", "--json", "--listen", f"{place.host}:0", prefix=place.prefix,
                         environment={**there, "RFAAS_CORES": str(allowed[-1])})
            try:
                yield {"RFAAS_RUNTIME_DIR": f"{directory}/rank", "RFAAS_SERVICE": said["listen"][0],
                       "RFAAS_KEY_FILE": said["key_file"]}
            finally:
                rfaas("down", prefix=place.prefix, environment=there)


def rfaas(*words: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> dict[str, Any]:
    """What a command answers; BenchError where it fails."""
    asked = [*words, *(["--json"] if "--json" not in words else [])]
    done = subprocess.run([*prefix, sys.executable, "-m", "rfaas_mpi.cli", *asked], env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GUARD_S, check=False)
    if done.returncode != 0:
        raise BenchError(f"rfaas {' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def run_one(app: apps.App, arguments: Sequence[str], environment: dict[str, str], file: Path) -> dict[str, Any] | None:
    """The report of an app, which is in `file` then; None where its verdict is wrong, or it failed, and said so."""
    command = apps.command(app, [*arguments, "--json", str(file)])
    process = subprocess.Popen(command, env={**config.scrubbed(config.environment()), **environment},
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace")
    try:
        said, _ = process.communicate(timeout=GUARD_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        said = f"{process.communicate()[0]}\n{app.name} was ended after {GUARD_S:g} s"
    finally:
        if process.poll() is None:      # Ctrl-C
            process.terminate()
            process.wait()
    if process.returncode != 0 or not file.is_file():
        print(said, file=sys.stderr)
        return None
    return json.loads(file.read_text())


def run(given: argparse.Namespace) -> int:
    """Runs what is asked for; the exit status."""
    found = {name: app for name, app in apps.find().items() if app.common}
    unknown = set(given.app) - set(found)
    if unknown:
        raise BenchError(f"there is no app {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    wrong = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rfaas-apps-") as scratch:
        out = given.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for over in given.over or ["shm"]:
            reports: dict[str, dict[str, Any] | None] = {}
            with workers(over) as environment:
                for name in given.app or found:
                    since = time.monotonic()
                    file = out / f"app-{name}{'' if over == 'shm' else f'-{over}'}-{given.machine}.json"
                    file.unlink(missing_ok=True)
                    reports[name] = run_one(found[name], [*COMPARED, "--small" if given.small else "--figures",
                                                          "--rounds", str(given.rounds)], environment, file)
                    print(f"  {name} {OVER[over]}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
            print(f"{OVER[over]}, {given.rounds} rounds: medians in ms\n")
            print("\n".join(table(reports)) + "\n", flush=True)
            wrong += [f"{name} {OVER[over]}" for name, report in reports.items() if report is None]
    print(f"all of it took {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if wrong:
        print(f"wrong, or failed: {', '.join(wrong)}; see above", file=sys.stderr)
    return 1 if wrong else 0


COLUMNS = ("local", "remote", "split", "mpi", "bound")


def table(reports: dict[str, dict[str, Any] | None]) -> list[str]:
    """One line an app, for people: medians in ms, the prediction of the split, and the verdict."""
    lines = [f"{'app':<14}" + "".join(f"{name:>10}" for name in COLUMNS)
             + f"{'predicted':>11}{'speed-up':>10}{'of bound':>10}  verdict"]
    for name, report in reports.items():
        if report is None:
            lines.append(f"{name:<14}" + f"{'':>{10 * len(COLUMNS) + 31}}  WRONG")
            continue
        median, ratios = report["median_s"], report["ratios"]
        cells = [f"{median[mode] * 1e3:.4g}" if mode in median else "-" for mode in COLUMNS]
        predicted = [value for value in report["predicted_s"] if value is not None]
        cells_after = (f"{sorted(predicted)[len(predicted) // 2] * 1e3:.4g}" if predicted else "-",
                       _ratio(ratios, "speedup_split", "{:.2f}x"), _ratio(ratios, "split_of_bound", "{:.0%}"))
        lines.append(f"{name:<14}" + "".join(f"{cell:>10}" for cell in cells)
                     + "{:>11}{:>10}{:>10}".format(*cells_after) + "  right")
    return lines


def _ratio(ratios: dict[str, Any], name: str, form: str) -> str:
    return form.format(ratios[name]["median"]) if name in ratios else "-"


# --- the page ------------------------------------------------------------------------------

def over_of(report: dict[str, Any]) -> str:
    return "tcp" if "transport=tcp" in report["config"]["executor"] else "shm"


def resolution(report: dict[str, Any]) -> float:
    """The difference that the same thing, measured twice, may have from itself."""
    low, high = report["ratios"]["again"]["median_between"]
    return max(abs(low - 1.0), abs(high - 1.0))


def judged(report: dict[str, Any], value: float, wanted: float) -> str:
    """Whether so much was reached; not, if it can't be told."""
    if value >= wanted:
        return "reached"
    return "not resolved here" if wanted - value <= resolution(report) else "**missed**"


def render(reports: Sequence[dict[str, Any]], sources: Sequence[str], plot: str | None) -> str:
    """The part of the page that is made of reports, as markdown."""
    lines = [BEGIN, ""]
    for over, title in OVER.items():
        pairs = [(report, source) for report, source in zip(reports, sources, strict=True) if over_of(report) == over]
        if pairs:
            lines += [*_section(pairs, title, over), ""]
            if plot and over == "shm":
                lines += [f"![Speed-up of each app, by mode]({plot})", ""]
    return "\n".join([*lines, END])


def _section(pairs: Sequence[tuple[dict[str, Any], str]], title: str, over: str) -> Iterator[str]:
    first = pairs[0][0]
    where = first["environment"]
    yield f"### The apps, {title}"
    yield ""
    yield (f"{where['cpu']}, {where['cores_online']} cores{', virtual' if where['virtual'] else ''}, Linux "
           f"{where['kernel']}, Python {where['python']}; {where['when'][:10]}; load before the first "
           f"{where['load_average'][0]:.2f}. One rank and {len(first['config']['worker_cores'][0])} borrowed core; "
           "raw: " + ", ".join(f"[{report['config']['app']}]({source})" for report, source in pairs) + ".")
    yield ""
    yield ("| | rounds | local, ms | remote, ms | split, ms | 2 MPI ranks, ms | bound, ms | split over local | "
           "split of bound | wanted | | 2 MPI ranks over split | predicted over split | A/A |")
    yield "|---|" + "--:|" * 9 + "---|" + "--:|" * 3
    for report, _ in pairs:
        name, ratios, median = report["config"]["app"], report["ratios"], report["median_s"]
        wanted = WANTED.get(name) if over == "shm" else None
        of_bound = ratios.get("split_of_bound", {}).get("median")
        cells = [name, str(report["config"]["rounds"]),
                 *(f"{median[mode] * 1e3:.4g}" if mode in median else "" for mode in COLUMNS),
                 _spread(ratios, "speedup_split", "x"), _spread(ratios, "split_of_bound", "%"),
                 f"≥ {100 * wanted:.0f} %" if wanted else "",
                 judged(report, of_bound, wanted) if wanted and of_bound is not None else "",
                 _spread(ratios, "split_over_mpi", "x") + _unresolved(report, "split_over_mpi"),
                 _spread(ratios, "predicted_of_split", "%") + _predicted(report),
                 _spread(ratios, "again", "x")]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield ("Medians; ratios are the median of the rounds' ratios, in brackets where it lies (95 %, by order "
           "statistics). A/A is the split over itself; what differs by less than A/A may is *not resolved here*. "
           "Sizes: " + "; ".join(f"{report['config']['app']} {_sizes(report)}" for report, _ in pairs) + ".")
    noisy = [report["config"]["app"] for report, _ in pairs if report["disturbed"]]
    if noisy:
        yield ""
        yield (f"The machine was disturbed by others in {', '.join(noisy)}: the bound's slowest round took more than "
               "1.2 times its fastest.")


def _spread(ratios: dict[str, Any], name: str, unit: str) -> str:
    if name not in ratios:
        return ""
    values = (ratios[name]["median"], *ratios[name]["median_between"])
    if unit == "%":
        return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * value for value in values))
    return "{:.3f}x ({:.3f} to {:.3f})".format(*values)


def _unresolved(report: dict[str, Any], name: str) -> str:
    ratios = report["ratios"]
    return ", not resolved here" if name in ratios and abs(ratios[name]["median"] - 1) <= resolution(report) else ""


def _predicted(report: dict[str, Any]) -> str:
    value = report["ratios"].get("predicted_of_split", {}).get("median")
    if value is None:
        return ""
    return "" if abs(value - 1) <= PREDICTED_WITHIN else ", **missed**"


def _sizes(report: dict[str, Any]) -> str:
    """The arguments of its own that it was run with."""
    compared = {"app", "mode", "workers", "rounds", "seed", "bound", "ranks", "again", "arguments", "mpi_ranks",
                "cores", "worker_cores", "executor"}
    own = {key: value for key, value in report["config"].items()
           if key not in compared and value is not None and value is not False}
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in own.items()) or "as it comes"


def draw(reports: Iterable[dict[str, Any]], file: Path) -> None:
    """Speed-up of each app over shared memory, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sys.path.insert(0, str(apps.apps_directory()))
    import common

    shown = [report for report in reports if over_of(report) == "shm"]
    columns = 2 if len(shown) > 1 else 1
    rows = -(-len(shown) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(6.2 * columns, 2.5 * rows), layout="constrained",
                                   squeeze=False)
    for axes in grid.flat[len(shown):]:
        axes.set_axis_off()
    for axes, report in zip(grid.flat, shown, strict=False):
        common.draw(report, axes)
    figure.supxlabel("speed-up over the rank alone; a tick is one round, the dotted line is two bare processes",
                     fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def insert(page: str, part: str) -> str:
    """The page with what is between the marks replaced. ValueError if it lacks one of them."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return page[:page.index(BEGIN)] + part + page[page.index(END) + len(END):]


def report(given: argparse.Namespace) -> int:
    """Renders what is asked for; the exit status."""
    files = sorted(given.json)
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    home = given.docs.resolve().parent if given.docs else Path.cwd()
    if given.plot:
        draw(reports, given.plot)
    plot = _relative(given.plot, home) if given.plot else None
    part = render(reports, [_relative(file, home) for file in files], plot)
    if given.docs is None:
        print(part)
    else:
        given.docs.write_text(insert(given.docs.read_text(encoding="utf-8"), part), encoding="utf-8")
    return 0


def _relative(file: Path, home: Path) -> str:
    return Path(os.path.relpath(file.resolve(), home)).as_posix()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run the apps and print a table")
    one.add_argument("--over", action="append", choices=[*OVER], help="may be repeated (default: shm)")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--small", action="store_true", help="the apps' smallest sizes, not those of the figures")
    one.add_argument("--app", action="append", default=[], metavar="NAME", help="may be repeated (default: all)")
    one.add_argument("--out", type=Path, help="where to keep the reports, as app-NAME-MACHINE.json")
    one.add_argument("--machine", default="here", help="what they are called after (default: here)")
    two = commands.add_parser("report", help="render their reports")
    two.add_argument("json", type=Path, nargs="+", help="what `run --out` kept")
    two.add_argument("--docs", type=Path, help="page whose part to replace")
    two.add_argument("--plot", type=Path, help="PNG to draw")
    given = parser.parse_args(arguments)
    try:
        return run(given) if given.command == "run" else report(given)
    except RFaaSError as error:
        print(f"apps: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
