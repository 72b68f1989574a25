"""docs/transports.md says what the ops table has: each op and fact once, no other, and the example is the code."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "transports.md").read_text()
HEADER = (REPOSITORY / "csrc" / "rfm_transport.h").read_text()


def table() -> str:
    """The body of struct rfm_transport, without comments."""
    body = re.search(r"^struct rfm_transport \{\n(.*?)^\};", HEADER, re.M | re.S)
    assert body is not None
    return re.sub(r"/\*.*?\*/", "", body.group(1), flags=re.S)


def ops() -> list[str]:
    return re.findall(r"\(\*(\w+)\)\(", table())


def facts() -> list[str]:
    return re.findall(r"^\s*[\w ]+[ *](\w+);", re.sub(r"\(\*\w+\)\([^;]*;", "", table()), re.M)


def documented() -> list[str]:
    """The names in the first cells of the tables of ops."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_every_op_and_fact_of_the_table_is_on_the_page_once():
    assert len(ops()) > 20
    assert {"name", "number", "remote", "last_words_ns"} == set(facts())
    assert sorted(documented()) == sorted(ops() + facts())


def test_what_the_page_calls_an_op_is_one():
    called = set(re.findall(r"`((?:side|rank|worker)_\w+)`", PAGE))
    assert called <= set(ops())


def test_the_example_is_the_code():
    example = re.search(r"```c\n(.*?)```", PAGE, re.S)
    assert example is not None
    assert example.group(1) in (REPOSITORY / "csrc" / "shm.c").read_text()


def test_what_the_page_links_and_names_is_there():
    files = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert files
    assert all((REPOSITORY / "docs" / name).exists() for name in files)
    named = re.findall(r"`((?:csrc|tests|rfaas_mpi)/[\w/.]+)`", PAGE)
    assert named
    assert all((REPOSITORY / name).exists() for name in named)


def test_the_page_is_found_from_where_one_starts():
    assert "transports.md" in (REPOSITORY / "docs" / "architecture.md").read_text()
    assert "docs/transports.md" in (REPOSITORY / "README.md").read_text()
