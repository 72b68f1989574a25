"""Arrows point down: who imports whom, and who may touch what."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "rfaas_mpi"
HERE = "tests/test_layering.py"

# From the top down. A module imports from the steps below its own only; names on
# one step don't import each other. A package (leases/) counts as one name.
STEPS = (
    ("cli",),
    ("bench", "service"),
    ("executor",),
    ("offloading",),
    ("splitting",),
    ("boards",),
    ("requests", "futures", "mapping", "mpi"),
    ("crew", "choice"),
    ("manager", "agent"),
    ("planner", "worker", "lending", "local"),
    ("cluster",),
    ("client",),
    ("arrays", "api", "cells"),
    ("fabric", "placement", "leases", "slurm", "kernels", "session", "inline",
     "identity"),
    ("codec", "config", "messages", "policy", "elastic", "native", "calling", "remote",
     "sealing", "munge", "errands", "gang"),
    ("skew",),
    ("errors", "types", "_version", "_include"),
)
STEP_OF = {name: step for step, names in enumerate(STEPS) for name in names}


class Import(NamedTuple):
    """One imported module, and whether importing ours imports it at once."""

    line: int
    module: str
    at_once: bool


# --- reading sources --------------------------------------------------------

def imports_of(source: str, package: str) -> Iterator[Import]:
    """Everything that Python source of a module in `package` imports."""
    tree = ast.parse(source)
    lazy = {id(inner) for outer in ast.walk(tree) if _is_lazy(outer)
            for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        at_once = id(node) not in lazy
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(node.lineno, alias.name, at_once)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[:len(package.split(".")) - level + 1]
                origin = ".".join([*base, *([module] if module else [])]
                                  if level else [module or ""])
                for alias in names:
                    # `from rfaas_mpi import leases` is about leases.
                    own = origin == "rfaas_mpi"
                    yield Import(node.lineno,
                                 f"{origin}.{alias.name}" if own else origin, at_once)


def _is_lazy(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.If(test=ast.Attribute(attr="TYPE_CHECKING")):
            return True
    return False


def cython_imports_of(source: str) -> Iterator[Import]:
    """The same for Cython, which ast can't read: one import a line, no lists."""
    for number, line in enumerate(source.splitlines(), 1):
        found = re.match(r"\s*(?:from\s+([\w.]+)\s+c?import\s+(\w+)|c?import\s+([\w.]+))",
                         line)
        if found is not None:
            origin, name, whole = found.groups()
            module = whole or (f"{origin}.{name}" if origin == "rfaas_mpi" else origin)
            yield Import(number, module, at_once=not line[:1].isspace())


def layering_problems(name: str, imports: list[Import]) -> list[str]:
    """What is wrong with the imports of the part `name`, a line each."""
    if name not in STEP_OF:
        return [f"rfaas_mpi.{name} is on no step: add it to STEPS in {HERE}, as low as "
                "its imports allow"]
    problems: dict[str, None] = {}  # in order, each once
    for line, module, _ in imports:
        parts = module.split(".")
        if parts[0] != "rfaas_mpi":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target == name:
            continue
        if target not in STEP_OF:
            problems[f"line {line} imports {module}, which is on no step: if it is a "
                     f"part, add it to STEPS in {HERE}; if it is a name of the package's "
                     "front, import it from the part that defines it"] = None
        elif STEP_OF[target] <= STEP_OF[name]:
            where = "above" if STEP_OF[target] < STEP_OF[name] else "on the same step"
            problems[f"line {line} imports {module}, which is {where}: move what both "
                     "need down, or hand it in as an argument"] = None
    return list(problems)


def environment_reads(source: str) -> Iterator[int]:
    """Lines that read the process' environment; changing it is another matter."""
    tree = ast.parse(source)
    changes = set()
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                changes.add(id(value))
            case ast.Attribute(value=value, attr="update" | "clear"):
                changes.add(id(value))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb"):
                if id(node) not in changes:
                    yield node.lineno
            case ast.Attribute(value=ast.Name(id="os"), attr="getenv" | "getenvb"):
                yield node.lineno
            case ast.ImportFrom(module="os", names=names):
                if any(alias.name.startswith(("environ", "getenv")) for alias in names):
                    yield node.lineno


# --- the project ------------------------------------------------------------

def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def part_of(path: Path) -> str:
    """The part a file belongs to: its package below rfaas_mpi, or its own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def sources(*suffixes: str) -> list[Path]:
    """The package's files, all but its front, which is on top of everything."""
    return sorted(path for suffix in suffixes for path in PACKAGE.rglob(f"*{suffix}")
                  if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"))


def imports_in(path: Path) -> list[Import]:
    source = path.read_text()
    if path.suffix != ".py":
        return list(cython_imports_of(source))
    return list(imports_of(source, ".".join(path.relative_to(REPOSITORY).parent.parts)))


def test_every_part_imports_only_from_the_steps_below_it():
    problems = [f"{relative(path)}: {problem}"
                for path in sources(".py", ".pyx", ".pxi")
                for problem in layering_problems(part_of(path), imports_in(path))]
    assert not problems, "\n".join(problems)


def test_only_config_reads_the_environment():
    problems = [f"{relative(path)}:{line} reads the environment: take a setting from "
                "config.py, or the environment as an argument"
                for path in sources(".py") if path != PACKAGE / "config.py"
                for line in environment_reads(path.read_text())]
    assert not problems, "\n".join(problems)


def test_only_mpi_and_the_apps_import_mpi4py():
    # tests/ may start MPI to look at it; the package has one door to it.
    problems = [f"{relative(path)}:{line} imports {module}: only rfaas_mpi/mpi.py does"
                for path in sources(".py", ".pyx", ".pxi") if path != PACKAGE / "mpi.py"
                for line, module, _ in imports_in(path)
                if module.split(".")[0] == "mpi4py"]
    assert not problems, "\n".join(problems)


# Parts that only the daemons of a cluster import, and the extra that they need.
EXTRAS = {"rfaas_mpi/agent/metrics.py": "cluster", "rfaas_mpi/leases/grants.py": "cluster",
          "rfaas_mpi/manager/callers.py": "cluster", "rfaas_mpi/manager/server.py": "cluster",
          "rfaas_mpi/manager/metrics.py": "cluster", "rfaas_mpi/manager/postgres.py": "postgres",
          "rfaas_mpi/bench/manager.py": "cluster"}


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=~! \[]", item)[0].replace("-", "_") for item in requirements}


def test_importing_a_part_needs_nothing_beyond_the_declared_dependencies():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {path: names_of(project["optional-dependencies"][extra]) for path, extra in EXTRAS.items()}
    known = names_of(project["dependencies"]) | sys.stdlib_module_names | {"rfaas_mpi"}
    problems = [f"{relative(path)}:{line} imports {module} at once, which isn't among "
                "the dependencies: import it where it is used, and say what to install"
                for path in sources(".py") if path != PACKAGE / "mpi.py"
                for line, module, at_once in imports_in(path)
                if at_once and module.split(".")[0] not in known | extras.get(relative(path), set())]
    assert not problems, "\n".join(problems)


def test_the_data_plane_knows_nothing_of_python():
    found = [relative(path) for path in sorted((REPOSITORY / "csrc").rglob("*.[ch]"))
             if re.search(r"^\s*#\s*include\s*[<\"]Python\.h", path.read_text(),
                          re.MULTILINE)]
    assert not found, f"these include Python.h, which is the fabric layer's: {found}"


# --- the rules themselves ---------------------------------------------------

@pytest.mark.parametrize("name, source, said", [
    ("leases", "from rfaas_mpi.errors import RFaaSError", None),
    ("leases", "from rfaas_mpi.leases.types import Lease", None),
    ("leases", "from .types import Lease", None),
    ("leases", "from rfaas_mpi.placement import pick_cores", "on the same step"),
    ("leases", "from ..placement import pick_cores", "on the same step"),
    ("leases", "from .. import placement", "on the same step"),
    ("leases", "import rfaas_mpi.manager.core", "above"),
    ("leases", "from rfaas_mpi import service", "above"),
    ("leases", "def f():\n    from rfaas_mpi import cli", "above"),
    ("leases", "from rfaas_mpi import Executor", "package's front"),
    ("leases", "import rfaas_mpi", "package's front"),
    ("novel", "", "on no step")])
def test_the_rules_tell_a_good_import_from_a_bad_one(name, source, said):
    problems = layering_problems(
        name, list(imports_of(source, f"rfaas_mpi.{name}")))
    assert (said is None and not problems) or (len(problems) == 1 and said in problems[0])


@pytest.mark.parametrize("source", [
    "from rfaas_mpi.errors import KernelError",
    "    from rfaas_mpi import config",
    "import rfaas_mpi.errors as e"])
def test_cython_s_imports_are_seen_too(source):
    (found,) = cython_imports_of(source)
    assert layering_problems("fabric", [found]) == []
    assert layering_problems("errors", [found]) or found.module == "rfaas_mpi.errors"


@pytest.mark.parametrize("source, count", [
    ("os.environ['A']", 1), ("os.environ.get('A')", 1), ("os.getenv('A')", 1),
    ("from os import environ", 1), ("x = dict(os.environ)", 1), ("'A' in os.environ", 1),
    ("os.environ.pop('A')", 1), ("os.environ['A'] = '1'", 0),
    ("os.environ.update(A='1')", 0), ("del os.environ['A']", 0),
    ("facts.environ.get('A')", 0)])
def test_reading_the_environment_is_told_from_changing_it(source, count):
    assert len(list(environment_reads(source))) == count


@pytest.mark.parametrize("source, at_once", [
    ("import numba", True), ("try:\n    import numba\nexcept ImportError:\n    pass", True),
    ("def f():\n    import numba", False),
    ("if TYPE_CHECKING:\n    import numba", False)])
def test_what_is_imported_at_once_is_told_from_what_is_imported_when_used(
        source, at_once):
    assert [found.at_once for found in imports_of(source, "rfaas_mpi")] == [at_once]
