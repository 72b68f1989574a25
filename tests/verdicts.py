"""What an app's verdict says of a worker that lies."""

from __future__ import annotations

from typing import Any


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
