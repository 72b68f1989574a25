"""What callers send, pure: read as this version has it, also where a newer one says more (decision 0018)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from rfaas_mpi import skew
from rfaas_mpi.errors import VersionMismatch

__all__ = ["Bodies", "check_version"]

US = "this manager"
# What decoding raises for some bytes or other: not only errors of msgspec's own.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _At(msgspec.Struct, frozen=True):
    node: str = ""


class _Who(msgspec.Struct, frozen=True):
    """Whose body it is, whatever else its version has there."""

    node: str = ""
    agent: str = ""
    place: _At | None = None


class Bodies:
    """Decoders of these types. What one of them doesn't know is an error, unless a newer version says it."""

    def __init__(self, kinds: Iterable[type[msgspec.Struct]]) -> None:
        self._decoders = {kind: msgspec.json.Decoder(kind) for kind in kinds}
        self._shapes: dict[type[msgspec.Struct], inspect.Type] = {}

    def read(self, kind: type[Any], data: bytes, theirs: str = "") -> Any:
        """The body, of a caller of version `theirs`. msgspec's errors, UnicodeDecodeError or RecursionError."""
        if not skew.is_newer(theirs):
            return self._decoders[kind].decode(data)
        if kind not in self._shapes:
            self._shapes[kind] = inspect.type_info(kind)
        return self._decoders[kind].decode(msgspec.json.encode(_known(self._shapes[kind], msgspec.json.decode(data))))


def _known(shape: inspect.Type, value: Any) -> Any:
    """The value without the fields that its type hasn't got."""
    match shape:
        case inspect.StructType(fields=fields) if isinstance(value, dict):
            of = {field.encode_name: field.type for field in fields}
            return {name: _known(of[name], part) for name, part in value.items() if name in of}
        case inspect.VarTupleType(item_type=item) if isinstance(value, list):
            return [_known(item, part) for part in value]
        case inspect.UnionType(types=types) if value is not None:
            others = [each for each in types if not isinstance(each, inspect.NoneType)]
            return _known(others[0], value) if len(others) == 1 else value
        case _:
            return value


def check_version(theirs: str, path: Mapping[str, str], data: bytes) -> None:
    """VersionMismatch that names the node, if a caller of that version can't be served. ValueError if it is none."""
    try:
        skew.check(theirs, "", US)
    except VersionMismatch:
        # Only now is it worth while to look who that is.
        skew.check(theirs, _caller(path, data), US)


def _caller(path: Mapping[str, str], data: bytes) -> str:
    try:
        who = msgspec.json.decode(data, type=_Who) if data else _Who()
    except UNREADABLE:
        who = _Who()
    if node := path.get("node") or (who.node if who.agent else ""):
        return f"the agent of {_shown(node)}"
    if who.place is not None and who.place.node:
        return f"the rank on {_shown(who.place.node)}"
    return "who calls"


def _shown(name: str) -> str:
    """What a caller says that he is called, in one line: nobody has looked at it, and it goes into the log."""
    return "".join(char if char.isprintable() else "?" for char in name[:254])
