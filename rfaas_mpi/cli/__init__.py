"""The command `rfaas`. Imports nothing until it is called, so that `rfaas version` answers at once."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status (see `rfaas --help`); never raises but with --debug."""
    try:
        from rfaas_mpi.cli.app import run
        return run(arguments)
    except KeyboardInterrupt:
        # Before click has taken over, or in our own clean-up: still no traceback.
        return 130
