"""One line of `rfaas doctor`'s report, which all of its chapters make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """What was found, and the way out if it is not ok. `needed`: without it no invocation works at all.

    `facts` are what programs read: figures and names that JSON can tell.
    """

    name: str
    ok: bool
    reason: str
    fix: str = ""
    needed: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)
