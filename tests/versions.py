"""This package as another version of it, to run beside ours: files that differ are changed copies, the rest are links.

What such a version says differs from what ours says where versions may differ: it has fields that ours has never
heard of, and leaves out those that have a default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import rfaas_mpi
from rfaas_mpi._version import __version__

PACKAGE = Path(rfaas_mpi.__file__).parent
TESTS = Path(__file__).parent
Changes = Mapping[str, Sequence[tuple[str, str]]]


def apart(minors: int) -> str:
    """The version so many minor versions after ours."""
    major, minor, *_ = map(int, __version__.split("."))
    return f"{major}.{minor + minors}.0"


# What a later version may look like: more is said to managers, agents and ranks, and what is usual is left unsaid.
RICHER: Changes = {
    "api.py": [
        ("class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):",
         "class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):"),
        ("class Traits(Body, frozen=True):", "class Weather(Body, frozen=True):\n    wind_mps: float = -1.0\n\n\n"
                                             "class Traits(Body, frozen=True):"),
        ("    speed: Annotated[float, Meta(ge=0.01, le=100)] = 1.0\n",
         "    speed: Annotated[float, Meta(ge=0.01, le=100)] = 1.0\n"
         "    weather: Weather = msgspec.field(default_factory=lambda: Weather(7.5))\n"),
        ("    switches: Switches = ()\n    ranks:",
         "    switches: Switches = ()\n    mood: list[str] = msgspec.field(default_factory=lambda: ['good'])\n    ranks:"),
        ("class Admitted(msgspec.Struct, frozen=True):", "class Admitted(msgspec.Struct, frozen=True, omit_defaults=True):"),
        ("class Orders(msgspec.Struct, frozen=True):", "class Orders(msgspec.Struct, frozen=True, omit_defaults=True):"),
        ("    register: bool = False\n    clock_ns: int = 0\n",
         "    register: bool = False\n    clock_ns: int = 0\n"
         "    advice: str = msgspec.field(default_factory=lambda: 'none')\n"),
        ("class LentLease(msgspec.Struct, frozen=True):",
         "class LentLease(msgspec.Struct, frozen=True, kw_only=True):\n    colour: str = 'green'"),
    ],
    "leases/grants.py": [
        ("class GrantBody(msgspec.Struct, frozen=True):", "class GrantBody(msgspec.Struct, frozen=True, omit_defaults=True):"),
        ("    sealed: bytes = b\"\"\n",
         "    sealed: bytes = b\"\"\n    ink: str = msgspec.field(default_factory=lambda: 'blue')\n"),
    ],
    "manager/directory.py": [
        ("    version: str = \"\"  ", "    version: str = \"\"\n    birthday: str = 'today'  "),
    ],
    "messages.py": [
        ("    observer: bool = False           # asks", "    shoes: int = 43\n    observer: bool = False           # asks"),
        ("    why_none: str = \"\"               # why no core", "    song: str = ''\n    why_none: str = \"\"               # why no core"),
        # Something that an older rank has never heard of, before each answer to its join.
        ("class Granted(Answer, frozen=True, tag=\"granted\"):",
         "class Gossip(msgspec.Struct, frozen=True, tag_field=\"t\", tag=\"gossip\"):\n    about: str\n\n\n"
         "class Granted(Answer, frozen=True, tag=\"granted\"):"),
    ],
    "agent/server.py": [
        ("        offer = self.offer(session, now)\n        self.send(session, msg.Welcome(",
         "        offer = self.offer(session, now)\n        self.send(session, msg.Gossip('the weather'))\n"
         "        self.send(session, msg.Welcome("),
    ],
}


def other(directory: Path, version: str, changes: Changes = {}) -> dict[str, str]:
    """Makes this package as that version in an empty directory; the environment in which it is found."""
    package = directory / "rfaas_mpi"
    package.mkdir(parents=True)
    _link(PACKAGE, package, "", set(changes) | {"_version.py"})
    (package / "_version.py").write_text(f'__version__ = "{version}"\n')
    for name, replacements in changes.items():
        text = (PACKAGE / name).read_text()
        for before, after in replacements:
            assert text.count(before) == 1, f"{name} has {text.count(before)} times {before!r}"
            text = text.replace(before, after)
        (package / name).write_text(text)
    # Where a daemon is started there may be ours.
    return {"PYTHONPATH": os.pathsep.join(map(str, (directory, TESTS))), "PYTHONSAFEPATH": "1"}


def _link(source: Path, target: Path, inside: str, but: set[str]) -> None:
    for entry in source.iterdir():
        name = f"{inside}{entry.name}"
        if name in but or entry.name == "__pycache__":
            continue
        if entry.is_dir() and any(one.startswith(f"{name}/") for one in but):
            (target / entry.name).mkdir()
            _link(entry, target / entry.name, f"{name}/", but)
        else:
            (target / entry.name).symlink_to(entry)
