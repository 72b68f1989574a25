"""config show: every setting, its value, and where that comes from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rfaas_mpi import config

DEFAULT = "default"


def show(origin: bool) -> tuple[dict[str, Any], list[str]]:
    """The settings that an Executor made here would have, and the files that were looked for.

    Raises ConfigError that names the setting and its source.
    """
    given = config.Settings.given()
    settings = config.Settings.load()
    found = {item.name: {"value": getattr(settings, item.name),
                         "origin": given[item.name].origin if item.name in given else DEFAULT,
                         "meaning": item.metadata["what"]} for item in fields(settings)}
    looked = [{"path": str(path), "exists": path.exists()} for path in config.files()]
    width = max(map(len, found))
    lines = [f"{name:{width}} = {_shown(entry['value'])}" + (f"  ({entry['origin']})" if origin else "")
             for name, entry in found.items()]
    if origin:
        lines += ["", "files, the strongest last:",
                  *(f"  {file['path']}" + ("" if file["exists"] else "  (not there)") for file in looked)]
    return {"settings": found, "files": looked}, lines


def _shown(value: Any) -> str:
    match value:
        case None | "" | ():
            return "-"
        case bool():
            return "yes" if value else "no"
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)
