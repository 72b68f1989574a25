"""docs/wire.md says what the code does: each size, offset and number in its tables is the C compiler's or Python's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from rfaas_mpi import kernels, messages

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "wire.md"
CSRC = REPOSITORY / "csrc"

# What never leaves a node: agent and worker, and a ring in shared memory. It is in docs/architecture.md.
LOCAL_STRUCTS = {"rfm_ctl_adopt", "rfm_channel_page", "rfm_door", "rfm_page", "rfm_page_kernel", "rfm_page_output",
                 "rfm_mark"}
LOCAL_NAMES = re.compile(r"RFM_(AGENT_|PAGE_|MARK_|KERNEL_NAME_|CLAIM_|DOOR_BYTES|CONTROL_BYTES|WIRE_H|CANARY_WORD)|"
                         r"RFM_(MAGIC|TRANSPORTS|ST_LAST)$")


class Field(NamedTuple):
    offset: int
    size: int
    name: str


def rows(text: str) -> list[list[str]]:
    """The cells of each row of each table, heads included, lines of dashes not."""
    return [[cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]


def structs_of(text: str) -> dict[str, tuple[int, list[Field]]]:
    """name → (size, fields), from the headings and the table below each."""
    found = {}
    for part in re.split(r"^### struct ", text, flags=re.M)[1:]:
        head = re.match(r"(\w+), (\d+) bytes\n", part)
        assert head is not None, f"what is this heading? {part[:60]!r}"
        table = re.search(r"(?:^\|.*\n)+", part, flags=re.M)
        assert table is not None, f"struct {head[1]} has no table"
        first, *fields = rows(table[0])
        assert first[:3] == ["offset", "size", "field"], first
        found[head[1]] = int(head[2]), [Field(int(row[0]), int(row[1]), row[2]) for row in fields]
    return found


def numbers_of(text: str) -> dict[str, int]:
    """Every name in the first column that has a number in the second."""
    found: dict[str, int] = {}
    for name, number, *_ in (row for row in rows(text) if len(row) > 1):
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", name) and re.fullmatch(r"-?\d+|0x[0-9a-f]+", number):
            assert found.setdefault(name, int(number, 0)) == int(number, 0), f"{name} is two numbers"
    return found


PAGE_TEXT = PAGE.read_text()
STRUCTS = structs_of(PAGE_TEXT)
NUMBERS = numbers_of(PAGE_TEXT)
IN_C = {name for name in NUMBERS if name.startswith("RFM_")}
HEADER = re.sub(r"/\*.*?\*/", "", (CSRC / "rfm_wire.h").read_text(), flags=re.S)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, int]:
    """What the compiler says of each name, size, `struct.field` and `struct.field size` of the page."""
    wanted = {name: name for name in IN_C}
    for struct, (_, fields) in STRUCTS.items():
        wanted[struct] = f"sizeof(struct {struct})"
        for field in fields:
            wanted[f"{struct}.{field.name}"] = f"offsetof(struct {struct}, {field.name})"
            wanted[f"{struct}.{field.name} size"] = f"sizeof(((struct {struct} *)0)->{field.name})"
    directory = tmp_path_factory.mktemp("wire")
    source, program = directory / "wire.c", directory / "wire"
    lines = [f'    printf("{name}=%lld\\n", (long long)({expression}));' for name, expression in wanted.items()]
    source.write_text('#include <stdio.h>\n#include "rfm.h"\n\nint main(void)\n{\n' + "\n".join(lines)
                      + "\n    return 0;\n}\n")
    done = subprocess.run(["gcc", "-std=c11", f"-I{CSRC}", "-o", program, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, _, value in (line.partition("=") for line in printed.splitlines())}


@pytest.mark.parametrize("struct", STRUCTS)
def test_a_struct_of_the_page_is_the_headers(compiled, struct):
    size, fields = STRUCTS[struct]
    assert size == compiled[struct]
    assert [Field(compiled[f"{struct}.{field.name}"], compiled[f"{struct}.{field.name} size"], field.name)
            for field in fields] == fields


@pytest.mark.parametrize("struct", STRUCTS)
def test_a_struct_of_the_page_has_no_gap(struct):
    size, fields = STRUCTS[struct]
    ends = [field.offset + field.size for field in fields]
    assert [0, *ends] == [*(field.offset for field in fields), size]


def test_the_page_has_every_struct_that_travels():
    in_header = set(re.findall(r"^struct (\w+) \{", HEADER, flags=re.M))
    assert set(STRUCTS) == in_header - LOCAL_STRUCTS
    assert in_header >= LOCAL_STRUCTS


def test_the_numbers_of_the_page_are_the_headers(compiled):
    assert {name: NUMBERS[name] for name in IN_C} == {name: compiled[name] for name in IN_C}


def test_the_page_has_every_number_that_matters_to_a_peer():
    in_header = set(re.findall(r"^ +(RFM_\w+) *=", HEADER, flags=re.M))
    in_header |= set(re.findall(r"^#define +(RFM_\w+)", HEADER, flags=re.M))
    missing = {name for name in in_header if not LOCAL_NAMES.match(name)} - IN_C
    assert not missing


def test_the_numbers_that_python_has_are_pythons():
    in_python = {name: NUMBERS[name] for name in NUMBERS.keys() - IN_C}
    assert {"HELLO_OK", "KIND_OBJECT", "KIND_LEASE", "GRANT_BYTES_MAX"} <= in_python.keys()
    for name, number in in_python.items():
        owner = messages if hasattr(messages, name) else kernels
        assert getattr(owner, name) == number, name
    assert {name for name in vars(messages) if re.match(r"HELLO_(?!TEXT)", name)} <= in_python.keys()


def test_a_hello_is_packed_as_the_page_says():
    _, fields = STRUCTS["rfm_hello"]
    assert tuple(field.name for field in fields) == messages.Hello._fields
    hello = messages.Hello(messages.MAGIC, 2, 3, 4, 5, 6, 7, bytes(range(16)), 8, 9)
    packed = hello.pack()
    for field, value in zip(fields, hello, strict=True):
        raw = packed[field.offset:field.offset + field.size]
        assert raw == value if isinstance(value, bytes) else int.from_bytes(raw, "little") == value, field
    assert (messages.PROTOCOL, messages.KIND_SESSION, messages.KIND_WORKER, messages.KIND_DATA) == tuple(
        NUMBERS[name] for name in ("RFM_PROTOCOL", "RFM_HELLO_SESSION", "RFM_HELLO_WORKER", "RFM_HELLO_DATA"))


def test_the_messages_of_a_session_have_the_fields_of_the_page():
    table = [row for row in rows(PAGE_TEXT) if len(row) == 4 and row[2] in ("rank", "agent")]
    described = {name: (tag, fields.split(", ")) for name, tag, _, fields in table
                 if hasattr(messages, name)}
    assert {"Join", "Welcome", "LeaseRequest", "Granted"} <= described.keys()
    for name, (tag, fields) in described.items():
        kind = getattr(messages, name)
        assert (kind.__struct_config__.tag, [field.name for field in msgspec.structs.fields(kind)]) == (tag, fields)
    lease = [row[1] for row in rows(PAGE_TEXT) if row[0] == "GrantLease"]
    assert lease == [field.name for field in msgspec.structs.fields(messages.GrantLease)]


def test_the_roles_and_limits_of_the_page_are_those_of_messages():
    roles = {role for row in rows(PAGE_TEXT) if len(row) == 4 and row[0] in ("session", "worker", "data", "lease")
             for role in re.findall(r"`([^`]+)`", row[2] + row[3])}
    assert roles == {getattr(messages, name).decode() for name in vars(messages) if name.startswith("ROLE_")}
    assert NUMBERS["RFM_MAX_FRAME"] == messages.MAX_BODY
    assert messages.FRAME.size == STRUCTS["rfm_frame"][0]
