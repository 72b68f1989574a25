#!/usr/bin/env python3
"""Renders the JSON of `rfaas bench all` into docs/benchmarks.md, and draws its picture.

USAGE: python benchmarks/report.py benchmarks/2-core-vm.json [--docs docs/benchmarks.md] [--plot docs/benchmarks.png]

Only the part of the page between its two marks is replaced: the words around it are written by hand, the figures are
not. Without --docs the part is printed. The plot needs matplotlib (`pip install 'rfaas_mpi[demo]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
LARGE = 256 << 10
WAYS = ("local", "bound", "registered", "bound_plain", "plain")
STYLES = ("k:", "C7-", "C0-", "C7--", "C1-")
# What stands in a figure's name where the rank writes x before and reads y after.
KINDS = {"untouched": "", "touched": "_touched"}


@dataclass(frozen=True)
class Target:
    """A speed that this project wants to reach, and what was measured."""

    what: str
    got: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.got >= self.limit if self.at_least else self.got <= self.limit


def targets(data: dict) -> Iterator[Target]:
    """All targets for which `data`, of `rfaas bench all`, has the figures."""
    latency, rate, cold = data["latency"], data["throughput"], data["cold"]
    # The difference is of whole blocks, with no clock in them, so raw is too.
    raw = latency["figures"]["raw_ns"]["in_blocks"]
    yield Target("native kernel, from C, over raw", latency["native_over_raw_ns"], 200, "ns")
    yield Target("native kernel, from Python, over raw", latency["native_call_over_raw_ns"], 500, "ns")
    yield Target("Python kernel over the local call", latency["python_over_local_ns"], round(raw + 1500), "ns")
    yield Target("object kernel, two ints", latency["object_us"], 15, "µs")
    yield Target("object kernel, float64[8]", latency["object_array_us"], 25, "µs")
    yield Target("warm worker over a futex", latency["warm_over_futex"], 1.5, "x")
    for name, what, least in (("native_c", "native, from C", 3e6), ("native", "native, from Python", 1e6),
                              ("python", "Python kernel", 3e5), ("object", "objects", 4e4)):
        yield Target(f"invocations per second, {what}", rate[f"{name}_per_s"], least, "1/s", at_least=True)
    rows = data["payload"]["rows"]
    for kind, part in KINDS.items():
        ratio = f"registered{part}_over_bound"
        worst = max((row for row in rows if row["size_bytes"] >= LARGE), key=lambda row: row[ratio])
        yield Target(f"registered arrays over bound, {kind}, worst of {size_text(LARGE)} and up "
                     f"({size_text(worst['size_bytes'])})", worst[ratio], 1.1, "x")
        # Below that a call's fixed cost is more than a tenth; what it may be is said above.
        small = [row for row in rows if row["size_bytes"] < LARGE]
        worst = max(small, key=lambda row: more_than_bound(row, kind))
        yield Target(f"registered arrays less 1.1 x bound, {kind}, worst below that ({size_text(worst['size_bytes'])})",
                     round(more_than_bound(worst, kind), 2), 0.5, "µs")
    worst = max(rows, key=copies_more)
    yield Target(f"plain arrays over registered, touched, in copies each way, worst size "
                 f"({size_text(worst['size_bytes'])})", round(copies_more(worst), 2), 1, "copies")
    # What a copy between two cores costs, not one within the rank's own.
    for kind, part in KINDS.items():
        ratio = f"plain{part}_over_bound"
        worst = max((row for row in rows if row["size_bytes"] >= LARGE), key=lambda row: row[ratio])
        yield Target(f"plain arrays over bare processes that copy too, {kind}, worst of {size_text(LARGE)} and up "
                     f"({size_text(worst['size_bytes'])})", worst[ratio], 1.1, "x")
    yield Target("lease to first result, warm service", cold["lease_to_first_result_ms"], 10, "ms")
    yield Target("start of the service", cold["service_start_ms"], 1000, "ms")
    yield Target("a worker that waits", cold["waiting_worker_percent"], 1, "% of a core")


def more_than_bound(row: dict, kind: str) -> float:
    """µs by which registered arrays exceed 1.1 times what bare processes need."""
    part = KINDS[kind]
    return row[f"registered{part}_us"] - 1.1 * row[f"bound{part}_us"]


def copies_more(row: dict) -> float:
    """What plain arrays cost over registered ones, in units of one copy each way.

    Touched, since a copy touches: x then is in the rank's cache on both sides of the comparison.
    """
    return (row["plain_touched_us"] - row["registered_touched_us"]) / row["copies_touched_us"]


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def render(data: dict, source: str, plot: str | None = None) -> str:
    """The part of the page that is made of figures, as markdown."""
    return "\n".join([BEGIN, *_environment(data, source), *_targets(data),
                      *([f"![Time of y = 2x by payload]({plot})", ""] if plot else []),
                      *_figures(data), *_payload(data), END])


def _environment(data: dict, source: str) -> Iterator[str]:
    where = data["environment"]
    pinning = data["latency"]["pinning"]
    yield f"Made by `{' '.join(data['command'])}` (raw: [`{source}`]({source})), {where['when']}, {data['seconds']} s."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| Processor | {where['cpu']}, {where['cores_online']} cores{', virtual' if where['virtual'] else ''} |"
    yield f"| System | Linux {where['kernel']}, {where['libc']} |"
    yield f"| Versions | rfaas_mpi {data['version']}, Python {where['python']}, numpy {where['versions']['numpy']} |"
    yield f"| Pinning | rank on core {pinning['rank_core']}, worker and bare partner on {pinning['worker_cores']} |"
    yield f"| Load before | {where['load_average'][0]:.2f}; stolen by the hypervisor {where.get('stolen_percent', '?')} % |"
    yield f"| Two readings of the clock | {where['clock_ns']} ns, in every figure of single invocations |"
    yield ""


def _targets(data: dict) -> Iterator[str]:
    yield "### What was to be reached"
    yield ""
    yield "| | measured | wanted | |"
    yield "|---|--:|--:|---|"
    for target in targets(data):
        sign = "≥" if target.at_least else "≤"
        yield (f"| {target.what} | {number(target.got)} {target.unit} | {sign} {number(target.limit)} {target.unit} | "
               f"{'reached' if target.met else '**missed**'} |")
    yield ""


def _figures(data: dict) -> Iterator[str]:
    for part in ("latency", "throughput", "cold"):
        yield f"### {part.capitalize()}"
        yield ""
        yield "| | p50 | p99 | in blocks | A/A | count |"
        yield "|---|--:|--:|--:|--:|--:|"
        for name, figure in data[part]["figures"].items():
            blocks = number(figure["in_blocks"]) if "in_blocks" in figure else ""
            aa = number(figure["aa"]["p50"]) if "aa" in figure else ""
            yield (f"| `{name}` | {number(figure['p50'])} | {number(figure['p99'])} | {blocks} | {aa} | "
                   f"{figure['count']:,} |")
        yield ""


def _payload(data: dict) -> Iterator[str]:
    yield "### Payload"
    for kind, part in KINDS.items():
        yield ""
        yield f"y = 2x, {kind}; p50 (p99) in µs."
        yield ""
        yield ("| size | " + " | ".join(f"`{way}{part}_us`" for way in WAYS)
               + " | copies | registered / bound | A/A | plain / bound_plain | A/A | count |")
        yield "|---|" + "--:|" * (len(WAYS) + 6)
        for row in data["payload"]["rows"]:
            names = [f"{way}{part}_us" for way in WAYS]
            cells = [f"{number(row[name])} ({number(row[f'{name}_p99'])})" for name in names]
            ratio, plain = (row["figures"][f"{way}{part}_over_bound"] for way in ("registered", "plain"))
            yield (f"| {size_text(row['size_bytes'])} | {' | '.join(cells)} | "
                   f"{number(row[f'copies{part}_us'])} | {ratio['p50']} | {ratio['aa']['p50']} | "
                   f"{plain['p50']} | {plain['aa']['p50']} | "
                   f"{row[f'bound{part}_us_count']:,} |")
    yield ""


def insert(page: str, part: str) -> str:
    """The page with its figures replaced. ValueError if it lacks one of the marks."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return page[:page.index(BEGIN)] + part + page[page.index(END) + len(END):]


def draw(data: dict, file: Path) -> None:
    """Time of y = 2x by payload, each way, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = data["payload"]["rows"]
    sizes = [row["size_bytes"] for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, (kind, part) in zip(axes, KINDS.items(), strict=True):
        for way, style in zip(WAYS, STYLES, strict=True):
            axis.plot(sizes, [row[f"{way}{part}_us"] for row in rows], style, marker=".", label=way)
        axis.set(xscale="log", yscale="log", xlabel="bytes in x and in y", title=f"y = 2x, {kind}")
        axis.set_xticks(sizes, [size_text(size) for size in sizes], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs, median")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what `rfaas bench all --out` wrote")
    parser.add_argument("--docs", type=Path, help="page whose figures to replace")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    given = parser.parse_args(arguments)
    data = json.loads(given.json.read_text(encoding="utf-8"))
    if data.get("bench") != "all":
        parser.error(f"{given.json} is of `rfaas bench {data.get('bench')}`; this needs `rfaas bench all`")
    if given.plot:
        draw(data, given.plot)
    home = given.docs.resolve().parent if given.docs else Path.cwd()
    part = render(data, _relative(given.json, home), _relative(given.plot, home) if given.plot else None)
    if given.docs is None:
        print(part)
        return 0
    given.docs.write_text(insert(given.docs.read_text(encoding="utf-8"), part), encoding="utf-8")
    return 0


def _relative(file: Path, home: Path) -> str:
    return Path(os.path.relpath(file.resolve(), home)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
