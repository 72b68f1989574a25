"""Every `rfaas` command that the documentation names is one, and has the options that are named with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from rfaas_mpi.cli.app import app

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")), *sorted((REPOSITORY / "jobscripts").glob("*.sh"))]
# Where a program's own words begin: they are nothing of ours.
_OWN_WORDS = ("run", "script", "app")


def commands(text: str) -> Iterator[str]:
    """What stands in a line of code, or between backticks."""
    for line in text.splitlines():
        if line.startswith(("    ", "$ ", "# rfaas", "exec ")):
            yield from re.split(r"[;|]|&&|  +# ", re.sub(r"^(# |exec |\$ )", "", line.strip()))
    yield from re.findall(r"`([^`\n]+)`", text)


def wrong(words: list[str]) -> str:
    """What the command line doesn't have; "" where all is there."""
    command: click.Command = app
    rest = iter(words)
    said = "rfaas"
    for word in rest:
        if word == "--":
            break
        if word.startswith("-"):
            name, given, _ = word.partition("=")
            options = {each: one for one in command.params if isinstance(one, click.Option)
                       for each in (*one.opts, *one.secondary_opts)}
            if name in ("-h", "--help"):
                continue
            if name not in options:
                return f"{said} has no {name}"
            if not options[name].is_flag and not given:
                next(rest, None)
        elif isinstance(command, click.Group):
            # What is no plain word stands for any.
            if not re.fullmatch(r"[a-z-]+", word):
                break
            if word not in command.commands:
                return f"{said} has no command {word}"
            command, said = command.commands[word], f"{said} {word}"
        elif command.name in _OWN_WORDS:
            break
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_that_a_page_names_are_there(page):
    found = []
    for text in commands(page.read_text()):
        begin = re.match(r"(?:[A-Z_]+=\S* +)*(?:\S*/)?rfaas +(.*)", text.strip())
        if begin is None:
            continue
        try:
            words = shlex.split(begin[1], comments=True)
        except ValueError:
            continue
        if problem := wrong([word.rstrip(",.:)") for word in words]):
            found.append(f"{text.strip()}: {problem}")
    assert found == []


@pytest.mark.parametrize("line, said", [
    ("slurm run --wrokers 3 -- x", "rfaas slurm run has no --wrokers"), ("slurm script --nodes 2 app.py --n 3", ""),
    ("lease lss", "rfaas lease has no command lss"), ("drain NODE --grce 3", "rfaas drain has no --grce"),
    ("bench latency|payload --transport tcp", ""), ("app matmul --n 500", "")])
def test_what_is_not_there_is_found_out(line, said):
    assert wrong(line.split()) == said
