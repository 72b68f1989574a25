"""A worker's Python side: output that arrives line by line, a name for every crash, then the data plane's loop."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import sys
from collections.abc import Callable

from rfaas_mpi import config, fabric
from rfaas_mpi.worker.handlers import Handlers

__all__ = ["Ready"]

_STDIO_LINES = 1          # _IOLBF


class _Lines(io.TextIOWrapper):
    """Text to a descriptor, written at each end of a line, so that a crash loses no finished one."""

    def __init__(self, fd: int) -> None:
        super().__init__(io.FileIO(fd, "w", closefd=False), encoding="utf-8", errors="backslashreplace",
                         line_buffering=True)
        self.pending = False

    def write(self, text: str) -> int:
        self.pending = True
        return super().write(text)


def _capture_output() -> Callable[[], bool]:
    """Replaces sys.stdout and sys.stderr; the function it returns flushes what stands without an end of line.

    It says whether anything was written since.
    """
    out, err = _Lines(1), _Lines(2)
    sys.stdout, sys.stderr = out, err

    def flush() -> bool:
        if not (out.pending or err.pending):
            return False
        for stream in (out, err):
            stream.pending = False
            stream.flush()
        return True
    return flush


def _line_buffer_stdio() -> None:
    """C's stdout to a pipe is buffered in blocks otherwise, and a native kernel's crash would take its lines along."""
    libc = ctypes.CDLL(None)
    stdout = ctypes.c_void_p.in_dll(libc, "stdout")
    libc.setvbuf(stdout, None, ctypes.c_int(_STDIO_LINES), ctypes.c_size_t(0))


class Ready:
    """All of it that needs none of a worker's descriptors: done by a fork that waits to become one."""

    def __init__(self) -> None:
        # By their numbers, which will be other files' once it is known which worker this is.
        self._flush = _capture_output()
        faulthandler.enable(file=2, all_threads=False)
        _line_buffer_stdio()
        self._spin_us = config.Settings.load().spin_us

    def serve(self, agent_fd: int, page_fd: int) -> int:
        """Serves kernels; returns the exit status.

        Ends when it is told to on the agent's socket, or when that is closed.
        """
        worker = fabric.Worker(agent_fd, page_fd, Handlers(self._flush), spin_us=self._spin_us, output_fd=1)
        try:
            return worker.run()
        finally:
            self._flush()
