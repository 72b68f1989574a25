"""Writes docs/apps.md from what each of apps/ says of itself: `python tools/apps_doc.py`."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "apps.md"

BEGIN = """\
# The apps

Each stands for a kind of program that ranks run, and shows what borrowed cores do for
it. `rfaas app` lists them, and runs one:

    rfaas app matmul --n 500 --mode local --mode split

All have the same modes, with the same arguments:

* `local`: the rank's core alone;
* `remote`: all of the work on borrowed cores;
* `split`: divided between both, as [the planner](planner.md) says, which may be: not at all;
* `mpi`: ranks alone, as in `mpiexec -n 2`.

A run goes through the modes in turn, for `--rounds N`, on `--workers N` cores and numbers
that follow from `--seed N`. It ends with a *verdict* on every result of every round; only
if all are right it says how fast it was, and what the planner had predicted. `--bound`
times bare pinned processes beside it, which do the same without any protocol: no borrowed
core can do better. `--ranks 2` puts as many MPI ranks beside it, `--again` tells how much
two equal runs differ, `--small` and `--figures` take the smallest size and the one of
[the benchmarks](benchmarks.md), `--json FILE` and `--plot FILE` write what was found, and
`rfaas app NAME --json` prints it.
`--help` explains the rest. `make apps` runs all of them and prints one table.

Inputs differ from round to round, and constants change midway. So what a worker answers
out of place, or too late, is seen; each app's tests have a worker that lies: it zeroes a
part, takes one for another, answers what was right before, keeps an older constant, or is
off by a millionth in one value.

What is below is what the programs say of themselves; `python tools/apps_doc.py` writes it.
"""


def written(apps: Path) -> str:
    """All of docs/apps.md. Raises ValueError where an app doesn't say what it is."""
    found = [text for path in sorted(apps.glob("*.py")) if (text := _of(path))]
    lines = [f"| [{name}](#{name}) | {summary} |" for name, summary, _ in found]
    table = "\n".join(["| app | what it does |", "|---|---|", *lines])
    return "\n".join([BEGIN, table, "", *(section for _, _, section in found)])


def _of(path: Path) -> tuple[str, str, str] | None:
    """An app's name, its line in the table, and its section; None if it is no app."""
    opening = re.match(r'"""(NAME\n.*?)"""', path.read_text(), re.DOTALL)
    if opening is None:
        return None
    parts = re.split(r"^([A-Z]+)\n", opening[1], flags=re.MULTILINE)
    said = {name: textwrap.dedent(text).strip("\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    name, _, summary = " ".join(said["NAME"].split()).partition(".py: ")
    if name != path.stem or "PURPOSE" not in said or "USAGE" not in said:
        raise ValueError(f"{path} doesn't begin with its NAME, PURPOSE and USAGE")
    section = [f"## {name}", _plain(summary[0].upper() + summary[1:]) + ".", _plain(said["PURPOSE"]),
               textwrap.indent(said["USAGE"], "    ")]
    section += [_titled(title, _plain(said[key])) for key, title in (("VERDICT", "Verdict"), ("SOURCE", "Source"))
                if key in said]
    return name, _plain(summary), "\n\n".join(section) + "\n"


def _titled(title: str, text: str) -> str:
    return f"*{title}.*" + ("\n\n" if text.startswith("-") else " ") + text


def _plain(text: str) -> str:
    """Text of a docstring as text of Markdown: lists have empty lines around them, arrows are no tags."""
    lines: list[str] = []
    listed = False
    for line in text.splitlines():
        item = line.lstrip().startswith("- ")
        begins = item and not listed
        ends = listed and not item and bool(line) and not line.startswith("  ")
        if (begins or ends) and lines and lines[-1]:
            lines.append("")
        listed = item or (listed and not ends)
        code = line.startswith("    ") and not listed
        lines.append(line if code else re.sub(r"([<*|])", r"\\\1", line))
    return "\n".join(lines)


if __name__ == "__main__":
    DOC.write_text(written(ROOT / "apps"))
    sys.stdout.write(f"{DOC}\n")
