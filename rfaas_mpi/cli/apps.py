"""`rfaas app`: which apps there are, what each is for, and how one is run under mpiexec.

An app is a file of apps/ that begins with NAME and what it does. It is read, not imported: what it
needs may be missing here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfaas_mpi import config
from rfaas_mpi.errors import ConfigError, RFaaSError

__all__ = ["App", "apps_directory", "as_json", "as_text", "command", "described", "find", "launcher", "named", "run",
           "without_json"]

EXTRA = "pip install 'rfaas_mpi[demo]'"
# Imported where an option asks for them.
_OPTIONAL = {"matplotlib", "numba"}


@dataclass(frozen=True)
class App:
    """What a file of apps/ says of itself."""

    name: str
    summary: str
    text: str                    # all that it begins with: NAME, PURPOSE, USAGE and so on
    path: Path
    common: bool                 # it has the modes and options of apps/common.py
    missing: tuple[str, ...]     # packages that it needs and that aren't here

    @property
    def reports(self) -> bool:
        """It writes what it found to `--json FILE`."""
        return self.common or "--json" in self.text


def apps_directory() -> Path:
    """Where the apps lie: in the package, or in a checkout.

    Raises RFaaSError where the package was installed without them.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "apps", package.parent / "apps"):
        if (directory / "blackscholes.py").is_file():
            return directory
    raise RFaaSError(f"the apps are not in {package / 'apps'}", hint="reinstall rfaas_mpi")


def launcher() -> str:
    """The mpiexec that belongs to this interpreter, else the first on the PATH.

    Raises ConfigError where there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if found is None:
        raise ConfigError("there is no mpiexec", hint=EXTRA)
    return found


# --- which there are -------------------------------------------------------------

def find(directory: Path | None = None) -> dict[str, App]:
    """Every app of this directory (default: that of the package), by its name; errors as apps_directory()'s."""
    paths = sorted((directory or apps_directory()).glob("*.py"))
    return {app.name: app for path in paths if (app := _read(path)) is not None}


def named(name: str) -> App:
    """That app. Raises KeyError, whose words name the others, where there is none."""
    found = find()
    if name not in found:
        raise KeyError(f"there is no app {name!r}; there are {', '.join(found)}")
    return found[name]


def _read(path: Path) -> App | None:
    tree = ast.parse(path.read_text(), str(path))
    text = ast.get_docstring(tree, clean=False) or ""
    begin = re.match(rf"NAME\n +{re.escape(path.name)}: ((?:.+\n?)+)", text)
    if begin is None:
        return None
    needs = _packages(tree, path.parent, {path.stem})
    return App(path.stem, " ".join(begin[1].split()), text, path, _is_common(tree),
               tuple(sorted(name for name in needs if importlib.util.find_spec(name) is None)))


def _is_common(tree: ast.Module) -> bool:
    """It has a class App of apps/common.py."""
    return any(ast.unparse(base) in ("common.App", "App")
               for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases)


def _packages(tree: ast.Module, directory: Path, seen: set[str]) -> set[str]:
    """What it imports, and the files beside it that it imports, wherever in them: all but what Python has."""
    found: set[str] = set()
    for name in _imported(tree):
        beside = directory / f"{name}.py"
        if name in seen or name == "rfaas_mpi" or name in sys.stdlib_module_names:
            continue
        seen.add(name)
        if beside.is_file():
            found |= _packages(ast.parse(beside.read_text(), str(beside)), directory, seen)
        elif name not in _OPTIONAL:
            found.add(name)
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def as_json(app: App) -> dict[str, Any]:
    return {**dataclasses.asdict(app), "path": str(app.path)}


def as_text(found: dict[str, App]) -> list[str]:
    """A line for each app."""
    width = max(map(len, found), default=0)
    lines = [f"{name:<{width}}  {app.summary}" for name, app in found.items()]
    missing = sorted({package for app in found.values() for package in app.missing})
    if missing:
        which = ", ".join(name for name, app in found.items() if app.missing)
        lines += ["", f"not installed: {', '.join(missing)}, for {which}: {EXTRA}"]
    return lines


def described(app: App) -> list[str]:
    """What it is, and what it lacks here."""
    lines = [*app.text.rstrip().splitlines(), "", "FILE", f"    {app.path}"]
    if app.missing:
        lines += ["", f"not installed: {', '.join(app.missing)}: {EXTRA}"]
    return lines


# --- running one -----------------------------------------------------------------

def command(app: App, arguments: Sequence[str], ranks: int = 1) -> list[str]:
    """How it is started. Raises ConfigError where it lacks something."""
    if app.missing:
        raise ConfigError(f"{app.name} needs {', '.join(app.missing)}", hint=EXTRA)
    return [launcher(), "-n", str(ranks), sys.executable, str(app.path), *arguments]


def run(app: App, arguments: Sequence[str], ranks: int) -> int:
    """Becomes the app, or its mpiexec: what it prints, how it ends and what ends it is its own.

    Returns only where it shows its help. Errors as command()'s.
    """
    sys.stdout.flush()
    if {"-h", "--help"} & set(arguments):
        return subprocess.run([sys.executable, app.path, *arguments], check=False).returncode
    words = command(app, arguments, ranks)
    os.execve(words[0], words, config.scrubbed(config.environment()))


def without_json(arguments: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """An app's arguments without a `--json` that names no file, and whether there was one."""
    kept = tuple(word for word, file in zip(arguments, [*arguments[1:], "-"], strict=False)
                 if word != "--json" or not file.startswith("-"))
    return kept, len(kept) < len(arguments)


def run_quietly(app: App, arguments: Sequence[str], ranks: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """What the app reports in the end; what it prints goes to `progress`. Errors as command()'s."""
    with tempfile.TemporaryDirectory(prefix="rfaas-app-") as scratch:
        file = Path(scratch, "report.json")
        words = command(app, [*arguments, *(["--json", str(file)] if app.reports else [])], ranks)
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", env=config.scrubbed(config.environment()))
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    progress(line.rstrip("\n"))
            status = process.wait()
        finally:
            if process.poll() is None:  # Ctrl-C: mpiexec ends its ranks when it is told to
                process.terminate()
                process.wait()
        report = json.loads(file.read_text()) if file.is_file() else None
    return {"ok": status == 0, "app": app.name, "ranks": ranks, "arguments": [*arguments], "status": status,
            "report": report}
