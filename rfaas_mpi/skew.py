"""Which versions of this package work with each other, and what is said to those that don't (decision 0018)."""

from __future__ import annotations

import re

from rfaas_mpi._version import __version__
from rfaas_mpi.errors import VersionMismatch

__all__ = ["HEADER", "check", "is_newer", "near", "number", "text"]

HEADER = "RFaaS-Version"             # of each request to a manager, and of each answer
_FORM = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){0,2}(([a-z]|[.+-][a-z0-9])[a-z0-9.+-]{0,40})?", re.ASCII)
_RELEASE = re.compile(r"[0-9]+(\.[0-9]+){0,2}", re.ASCII)
HINT = "versions may be one minor number apart: install one that is, the manager's first where it is to be a newer one"


def number(version: str = __version__) -> int:
    """`major<<16 | minor<<8 | patch`, as the hello carries it."""
    # Of 0.4rc1 and 0.4+site.5 these are 0 and 4: what follows is no part of them.
    release = _RELEASE.match(version)
    numbers = [] if release is None else [int(part) for part in release[0].split(".")]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    return major << 16 | min(minor, 255) << 8 | min(patch, 255)


def text(number: int) -> str:
    """The version that a hello carries, as people write it."""
    return f"{number >> 16}.{number >> 8 & 255}.{number & 255}"


def near(one: int, other: int) -> bool:
    """Whether the two work together: of one major version, and at most one minor version apart."""
    return one >> 16 == other >> 16 and abs((one >> 8 & 255) - (other >> 8 & 255)) <= 1


def is_newer(theirs: str) -> bool:
    """Whether who runs that may say what we have never heard of. "": not known, and taken for ours."""
    return bool(theirs) and number(theirs) >> 8 > number() >> 8


def check(theirs: str, who: str, us: str) -> None:
    """VersionMismatch, which names both, unless `who` with that version works with `us`. "": not known, which works.

    ValueError for what is no version.
    """
    if not theirs:
        return
    if not _FORM.fullmatch(theirs):
        raise ValueError(f"{HEADER} is {theirs[:40]!r}, which is no version")
    if not near(number(theirs), number()):
        raise VersionMismatch(f"{who} runs rfaas_mpi {theirs}, {us} runs {__version__}", hint=HINT)
