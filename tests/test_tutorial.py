"""Each step of docs/tutorial.md runs as it stands, and prints what the text shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
STEPS = 10


@dataclass(frozen=True)
class Block:
    kind: str      # python: a file, whose name is in its first line; diff: changes of one; console: what is typed
    text: str


def steps(text: str) -> dict[str, list[Block]]:
    """Title of each step → its blocks, in order."""
    found = {}
    for part in re.split(r"^## (?=\d+\. )", text, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        found[title] = [Block(kind, body) for kind, body in
                        re.findall(r"^```(\w+)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)]
    return found


def changed(text: str, hunks: str) -> str:
    """A file's text after the hunks of a diff, each of which must fit in one place."""
    for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE)[1:]:
        lines = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        before = "".join(f"{line}\n" for sign, line in lines if sign in " -")
        after = "".join(f"{line}\n" for sign, line in lines if sign in " +")
        places = [found.start() for found in re.finditer(f"^(?={re.escape(before)})", text, re.MULTILINE)]
        assert len(places) == 1, f"this is not there once:\n{before}"
        text = text[:places[0]] + after + text[places[0] + len(before):]
    return text


def put(block: Block, directory: Path) -> None:
    """Writes or changes the file of a block."""
    name = re.match(r"(?:# |--- )(\S+)\n", block.text)
    assert name is not None, f"it doesn't say which file it is:\n{block.text}"
    file = directory / name[1]
    file.write_text(block.text if block.kind == "python" else changed(file.read_text(), block.text))


def typed(block: Block) -> list[tuple[list[str], str]]:
    """The commands of a console, and what each prints."""
    return [(shlex.split(command), output)
            for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)]


def matches(shown: str, printed: str) -> bool:
    """`…` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, shown.split("…"))), printed, re.DOTALL) is not None


TUTORIAL = steps((DOCS / "tutorial.md").read_text())


def test_it_has_ten_steps_each_of_which_is_run():
    assert [title.split(".")[0] for title in TUTORIAL] == [str(number) for number in range(1, STEPS + 1)]
    for title, blocks in TUTORIAL.items():
        assert any(block.kind == "console" and typed(block) for block in blocks), title
        assert {block.kind for block in blocks} <= {"python", "diff", "console"}, title


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where all steps are taken, in order."""
    return tmp_path_factory.mktemp("tutorial")


def files_until(title: str, directory: Path) -> None:
    """The files as a reader has them when she comes to a step's commands."""
    for step, blocks in TUTORIAL.items():
        for block in blocks:
            if block.kind != "console":
                put(block, directory)
        if step == title:
            return


@pytest.mark.parametrize("title", TUTORIAL)
def test_a_step_prints_what_it_says(title, directory):
    files_until(title, directory)
    beside = Path(sys.executable).parent
    for block in TUTORIAL[title]:
        for command, shown in typed(block) if block.kind == "console" else ():
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=100,
                                  stdin=subprocess.DEVNULL,
                                  env={**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"})
            assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}{done.stderr}"
            assert matches(shown, done.stdout), f"{shlex.join(command)}:\n{done.stdout}\nand not\n{shown}"


def test_a_change_that_fits_nowhere_is_found():
    assert changed("a\nb\nc\n", "--- f\n@@\n a\n-b\n+B\n") == "a\nB\nc\n"
    with pytest.raises(AssertionError, match="not there once"):
        changed("a\nb\n", "--- f\n@@\n-x\n+y\n")
    with pytest.raises(AssertionError, match="not there once"):
        changed("a\na\n", "--- f\n@@\n-a\n+y\n")


def test_output_that_differs_is_found():
    assert matches("x … z\n", "x 1.5 z\n") and not matches("x … z\n", "x 1.5 y\n")


def test_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)#:]+)", (DOCS / "tutorial.md").read_text())
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []
