"""Whose a CPU is: what the detector finds, and what the manager is told."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["CoreClass"]


class CoreClass(StrEnum):
    """Whose a CPU is; the best to lend first."""

    FREE = "free"
    SPECIALISED = "specialised"
    UNUSED = "unused"
    IDLE = "idle"
    OWNED = "owned"

    @property
    def badness(self) -> int:
        return _BADNESS[self]


_BADNESS = {which: number for number, which in enumerate(CoreClass)}
