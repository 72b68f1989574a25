"""`rfaas demo`: runs the apps under mpiexec, one after another, and draws what happened."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfaas_mpi import config
from rfaas_mpi.cli.apps import apps_directory, launcher
from rfaas_mpi.errors import ConfigError

__all__ = ["apps_directory", "launcher", "run"]

NEEDED = ("mpi4py", "scipy", "skimage", "matplotlib")
TIMEOUT_S = 1800.0

RANK, WORKER, REPLACED, BOUND, KILL = "#3b6ea8", "#e08a2b", "#4f9d69", "#9aa0a6", "#c0392b"


def run(*, n_options: int, out_dir: Path,
        progress: Callable[[str], None]) -> tuple[dict[str, Any], list[str]]:
    """Prices, kills, verifies, makes thumbnails, draws: (data, lines for people).

    data["ok"] is False where an app found a wrong answer. Raises ConfigError
    where a package of the demo is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the demo needs {', '.join(missing)}", hint="pip install 'rfaas_mpi[demo]'")
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rfaas-demo-") as scratch:
        report_file = Path(scratch, "report.json")
        thumbnails_file = Path(scratch, "thumbnails.npz")
        steps = {
            "blackscholes": ["--options", str(n_options), "--bound", "--kill", "--json", str(report_file)],
            # In numpy: nobody needs a compiler for a demo.
            "thumbnails": ["--mode", "remote", "--kernel", "numpy", "--repeat", "2", "--rounds", "2",
                           "--save", str(thumbnails_file)],
        }
        for app, arguments in steps.items():
            status = _run_app(app, arguments, progress)
            if status != 0:
                return ({"ok": False, "app": app, "status": status},
                        [f"{app} ended with status {status}; see above"])
        report = json.loads(report_file.read_text())
        picture = out_dir / "demo.png"
        progress("drawing")
        _draw(report, thumbnails_file, picture)
    return {"ok": True, "picture": str(picture), **report}, [*_summary(report), f"picture  {picture}"]


def _run_app(app: str, arguments: list[str], progress: Callable[[str], None]) -> int:
    script = apps_directory() / f"{app}.py"
    command = [launcher(), "-n", "1", sys.executable, str(script), *arguments]
    # Without the file for us at the end, it can be typed as it stands.
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    progress(" ".join(["$ mpiexec -n 1 python", str(shown), *arguments[:-2]]))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", env=config.scrubbed(config.environment()))
    guard = threading.Timer(TIMEOUT_S, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                progress(line.rstrip("\n"))
        return process.wait()
    finally:
        guard.cancel()
        if process.poll() is None:  # Ctrl-C: mpiexec ends its ranks when it is told to
            process.terminate()
            process.wait()


def _summary(report: dict[str, Any]) -> list[str]:
    median = report["median_s"]
    if "bound" not in median:
        return ["speed-up  none: no core is spare here, so the rank did all of it"]
    speedup = median["local"] / median["shared"]
    bound = median["local"] / median["bound"]
    lines = [f"speed-up {speedup:.2f}x with a borrowed core; two bare processes reach {bound:.2f}x "
             f"({report['of_bound']:.0%} of it, median of {len(report['seconds']['bound'])} rounds)"]
    if report["disturbed"]:
        lines.append("         this machine had other work to do: run it again when it is quiet for figures that last")
    return lines


# --- the picture -----------------------------------------------------------------

def _draw(report: dict[str, Any], thumbnails_file: Path, picture: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left"})
    figure = plt.figure(figsize=(12, 7.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.0, 1.15], hspace=0.04)
    left, right = lower.subfigures(1, 2, width_ratios=[1.15, 1.0], wspace=0.04)
    _draw_timeline(upper.subplots(), report)
    _draw_speedup(left.subplots(), report)
    _draw_thumbnails(right, thumbnails_file)
    figure.savefig(picture, dpi=140)
    plt.close(figure)


def _draw_timeline(axes: Any, report: dict[str, Any]) -> None:
    kill, config_ = report["kill"], report["config"]
    if kill is None:
        axes.text(0.5, 0.5, "no core was spare: the rank worked alone", ha="center", va="center")
        axes.set_axis_off()
        return
    begin = kill["begin_ns"]

    def ms(ns: int) -> float:
        return (ns - begin) / 1e6

    core = config_["worker_cores"][0][0]
    rows = [(f"rank\ncore {config_['cores'][0]}", kill["rank"], RANK)]
    for position, (_, bars) in enumerate(kill["workers"].items()):
        name = "worker" if position == 0 else "its\nreplacement"
        rows.append((f"{name}\ncore {core}" if position == 0 else name, bars, WORKER if position == 0 else REPLACED))
    for row, (_, bars, colour) in enumerate(rows):
        axes.broken_barh([(ms(start), (end - start) / 1e6) for start, end in bars], (row - 0.36, 0.72),
                         facecolors=colour, edgecolor="white", linewidth=0.35)
    killed = ms(kill["killed_ns"])
    axes.axvline(killed, color=KILL, linewidth=1.6)
    axes.annotate("worker killed (SIGKILL)", (killed, -0.62), xytext=(6, 0), textcoords="offset points",
                  color=KILL, va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.85)
    axes.set_xlim(0, ms(kill["end_ns"]) * 1.01)
    axes.set_xlabel("ms since the start; a bar is one cell of options")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{config_['options']:,} options, {kill['passes']} times over, and the worker killed in mid-run: "
                   "every price is right")


def _draw_speedup(axes: Any, report: dict[str, Any]) -> None:
    seconds, median = report["seconds"], report["median_s"]
    names = {"local": "rank's core alone", "shared": "with one\nborrowed core",
             "bound": "bound: two\nbare processes"}
    colours = {"local": RANK, "shared": WORKER, "bound": BOUND}
    ways = [way for way in names if way in median and (way == "local" or "bound" in median)]
    for row, way in enumerate(ways):
        speedup = median["local"] / median[way]
        axes.barh(row, speedup, height=0.62, color=colours[way])
        axes.plot([median["local"] / value for value in seconds[way]], [row] * len(seconds[way]), "|",
                  color="black", alpha=0.45, markersize=9)
        axes.text(0.04, row, f"{speedup:.2f}x   {median[way] * 1e3:.1f} ms", color="white", va="center",
                  fontweight="bold")
    if "bound" in median:
        axes.axvline(median["local"] / median["bound"], color="black", linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(ways)), [names[way] for way in ways])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"speed-up (median of {len(seconds['local'])} rounds; a tick is one round)")
    axes.set_title("The same prices, sooner")


def _draw_thumbnails(figure: Any, thumbnails_file: Path) -> None:
    import numpy as np

    with np.load(thumbnails_file) as stored:
        thumbnails = {name: stored[name] for name in stored.files}
    columns = 4
    rows = -(-len(thumbnails) // columns)
    figure.suptitle("Thumbnails made by the worker through ex.map", x=0.02, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, image) in zip(grid.flat, thumbnails.items()):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(name.replace("_", " "), fontsize=8, fontweight="normal", loc="center")
