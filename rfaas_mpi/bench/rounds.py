"""An app of apps/ in this process: rounds of its work on an executor, each with the app's own verdict."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.executor import Executor

__all__ = ["GUARD_S", "Rounds", "bits_of", "class_of"]

GUARD_S = 120.0                      # what has not happened by then never will


class Rounds:
    """One rank's part of an app, on an executor: rounds of its split, each with its verdict."""

    def __init__(self, path: Path, executor: Executor, where: str, *, rounds: int, small: bool = False,
                 arguments: Sequence[str] = ()) -> None:
        made = class_of(path)
        words = [*(made.small if small else ()), "--rounds", str(rounds), *arguments]
        parser = argparse.ArgumentParser(prog=path.name)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--rounds", type=int)
        parser.add_argument("--seed", type=int, default=1)
        made.arguments(parser)
        args = parser.parse_args(words)
        self.turns = range(args.rounds + 1)
        self.executor = executor
        self._app = made(args, 0, 1, executor)
        self._split = self._app.split(where)
        # round → what its results were without faults.
        self._bits: dict[int, bytes] = {}
        self.begun = threading.Event()
        self.running = False

    @property
    def told(self) -> str:
        return self._app.told()

    def run(self, turn: int, during: Callable[[], None] = lambda: None) -> tuple[float, str]:
        """Seconds of one round, and what is wrong with it. `during` is called in a thread of its own when it begins."""
        self._app.prepare(turn)
        self.begun.clear()
        meanwhile = _Meanwhile(during)
        meanwhile.start()
        try:
            begin = time.perf_counter()
            self.running = True
            self.begun.set()
            self._split.Run()
            took = time.perf_counter() - begin
        finally:
            self.running = False
            meanwhile.end()
        problem = self._app.check(turn)
        bits = bits_of(self._split)
        if not problem and bits is not None and self._bits.setdefault(turn, bits) != bits:
            problem = f"round {turn}: other bits than without faults"
        return took, problem

    @property
    def compared(self) -> bool:
        """Results were compared bit by bit."""
        return bool(self._bits)

    def close(self) -> None:
        self._split.Free()


def class_of(path: Path) -> Any:
    """The App of a file in apps/."""
    with _importing(path) as module:
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "prepare"):
                return value
    raise BenchError(f"{path} has no App of apps/common.py")


@contextlib.contextmanager
def _importing(path: Path) -> Iterator[ModuleType]:
    """The module, imported as `python FILE` would find its neighbours; forgotten again, with these.

    Its functions then travel by value, as those of `__main__` do.
    """
    name, before = path.stem, dict(sys.modules)
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        for new in set(sys.modules) - set(before):
            if getattr(sys.modules[new], "__file__", None) and Path(sys.modules[new].__file__).parent == path.parent:
                del sys.modules[new]


def bits_of(split: Any) -> bytes | None:
    """A digest of a split's results; None where it isn't one that has some."""
    out = getattr(getattr(split, "split", split), "out", None)
    arrays = out if isinstance(out, (tuple, list)) else (out,)
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return None
    digest = hashlib.blake2b()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


class _Meanwhile(threading.Thread):
    """Calls something while others work. end() waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(name="rfaas-fault", daemon=True)
        self._call = call
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        self.join(GUARD_S)
        if self.is_alive():
            raise BenchError(f"what goes on beside a round has not ended after {GUARD_S:g} s")
        if self._error is not None:
            raise self._error
