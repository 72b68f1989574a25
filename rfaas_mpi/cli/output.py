"""What a command prints: lines for people or one JSON object on stdout; progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TextIO

# Exit statuses; `rfaas --help` shows them.
OK = 0
FAILED = 1
USAGE = 2
NOT_RUNNING = 3
TAKEN = 4          # systemd/rfaas-agent.service knows it
BUG = 70           # EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT
CLOSED_STDOUT = 141  # 128 + SIGPIPE


class StdoutClosed(Exception):
    """Nobody reads stdout any more, as in `rfaas status | head -1`."""


class StdoutFailed(Exception):
    """stdout can't be written, a full disk for instance."""


def _write(text: str) -> None:
    if sys.stdout is None:  # started with stdout closed: nobody wants it
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise StdoutClosed from None
    except OSError as error:
        raise StdoutFailed(error.strerror or str(error)) from None
    except UnicodeEncodeError:
        # A terminal or file of another encoding: better a ? than no answer.
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def abandon_stdout() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's exit does not complain."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:  # out of descriptors: the exit will complain, and that is all
        return


def can_show(text: str, stream: TextIO | None = None) -> bool:
    """True if stdout's encoding has these characters."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def core_ranges(cores: Iterable[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8."""
    groups: list[list[int]] = []
    for core in sorted(cores):
        if groups and core == groups[-1][-1] + 1:
            groups[-1].append(core)
        else:
            groups.append([core])
    return ",".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


@dataclass
class Output:
    """How this command was asked to answer."""

    json: bool = False
    debug: bool = False
    answered: bool = False

    def answer(self, data: dict[str, Any], lines: Iterable[str]) -> None:
        """The command's answer, once: the JSON object, or the lines."""
        self.answered = True
        if self.json:
            _write(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")
        else:
            _write("".join(f"{line}\n" for line in lines))

    def progress(self, text: str) -> None:
        """A line for who waits; never on stdout."""
        self._stderr(text)

    def error(self, message: str, *, kind: str, hint: str = "") -> None:
        """The error on stderr, and as the one JSON object if that was asked for and nothing was answered yet."""
        self._stderr(f"rfaas: {message}")
        if hint:
            self._stderr(f"  fix: {hint}")
        if self.json and not self.answered:
            self.answer({"ok": False, "error": {"type": kind, "message": message, "hint": hint}}, [])

    @staticmethod
    def _stderr(text: str) -> None:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # stderr is closed: there is nobody left to tell
            return
