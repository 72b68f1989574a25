"""What an app's verdict says of a worker that lies."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

APPS = Path(__file__).resolve().parent.parent / "apps"


@contextlib.contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """An app's module, which imports what lies beside it; by no name, so that its kernels travel by value."""
    sys.path.insert(0, str(APPS))
    try:
        spec = importlib.util.spec_from_file_location(name, APPS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(APPS))
        sys.modules.pop("common", None)


def first_failed(app: Any, rounds: int = 3) -> tuple[int | None, str]:
    """The first of so many rounds on workers alone that the app's verdict fails, and why; (None, "") if none."""
    split = app.split("workers")
    try:
        for turn in range(rounds):
            app.prepare(turn)
            split.Run()
            if problem := app.check(turn):
                return turn, problem
        return None, ""
    finally:
        split.Free()


def settled(app: Any, wanted: bool, *, runs: int = 8, guard_s: float = 100.0) -> Any:
    """What the planner says of an app's steps when it has wanted to offload them, or not to, so often in a row.

    What doesn't follow from costs that were measured doesn't count: that no worker is there, or nothing known.
    """
    split = app.split("both")
    until = time.monotonic() + guard_s
    try:
        in_a_row = 0
        while in_a_row < runs:
            app.prepare(0)
            split.Run()
            found = split.predict()
            in_a_row = in_a_row + 1 if found.offload is wanted and "with 1 worker" in found.why else 0
            assert time.monotonic() < until, f"the planner says: {found}"
        assert app.check(0) == ""
        return found
    finally:
        split.Free()
