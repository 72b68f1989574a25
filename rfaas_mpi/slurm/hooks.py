"""What a site adds to its Slurm for the service, and which lines of its own hooks would end workers. Pure: text in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from rfaas_mpi.slurm.facts import config_value

__all__ = ["HOOKS", "Advice", "Found", "advise", "killers", "paths"]

# The programs that slurmd runs as root on a node.
HOOKS = ("Prolog", "Epilog", "HealthCheckProgram")
DIRECTORY = "/run/rfaas-hook"
# Of the agent's environment, where hooks end all that a user runs.
POOL = ("RFAAS_WORKER_IDENTITY=pool", "RFAAS_WORKER_POOL=70000-70063")

_USER = r"(?:-\w*[uU]\b|--(?:user|euid|uid)\b)"
_KILLERS = tuple(re.compile(pattern) for pattern in (
    rf"\b(?:pkill|killall|skill|slay)\b.*\s{_USER}",
    rf"\bkill\b.*\b(?:pgrep|ps)\b.*\s{_USER}",
    rf"\b(?:pgrep|ps)\b.*\s{_USER}.*\|.*\bkill\b",
    r"\bkill\s+(?:-\w+\s+)+(?:--\s+)?-1\b",
    r"\bloginctl\s+(?:\S+\s+)*(?:terminate|kill)-user\b",
    r"\bsystemctl\s+(?:\S+\s+)*(?:stop|kill)\s+.*\buser(?:-|@)",
))


class Found(msgspec.Struct, frozen=True):
    """A line of a hook that ends all that a user runs, his workers too."""

    file: str
    line: int
    text: str


class Advice(msgspec.Struct, frozen=True):
    """What is to be added, where; what would end workers; what can't be told or doesn't fit."""

    add: dict[str, tuple[str, ...]]      # place → lines
    kills: tuple[Found, ...]
    notes: tuple[str, ...]


def paths(shown: str) -> dict[str, tuple[str, ...]]:
    """The hooks of slurmd by `scontrol show config`, which may be patterns."""
    found: dict[str, tuple[str, ...]] = {}
    for name in HOOKS:
        # Newer ones number several of a kind.
        values = re.findall(rf"^{name}(?:\[\d+\])?\s*=\s*(.*)$", shown, re.MULTILINE)
        each = [part.strip() for value in values for part in re.split(r"[:,]", value)]
        found[name] = tuple(path for path in each if path.startswith("/"))
    return found


def killers(file: str, text: str) -> tuple[Found, ...]:
    """Lines of a script that end all processes of a user. What is behind variables and programs isn't seen."""
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return tuple(Found(file, number, line) for number, line in lines
                 if not line.startswith("#") and any(pattern.search(line) for pattern in _KILLERS))


def advise(shown: str, hook: str, scripts: Mapping[str, Mapping[str, str | None]]) -> Advice:
    """`scripts`: of Prolog, Epilog and the like the files there, with what is in them; None: that can't be read."""
    add: dict[str, tuple[str, ...]] = {}
    conf, kills, notes = [], [], []
    for name in ("Prolog", "Epilog"):
        files = scripts.get(name, {})
        command = f"{hook} {name.lower()}"
        if not files:
            conf.append(f"{name}={hook}")
        elif not any(text is not None and hook in text or file == hook for file, text in files.items()):
            where = "at the beginning of" if name == "Prolog" else "at the end of"
            add[f"{where} {next(iter(files))} (slurm.conf's {name})"] = (command,)
    flags = config_value(shown, "PrologFlags")
    if "contain" not in flags.lower():
        kept = [flag for flag in flags.split(",") if flag and flag.lower() not in ("(null)", "alloc")]
        conf.append(f"PrologFlags={','.join((*kept, 'Alloc', 'Contain'))}")
    if config_value(shown, "ProctrackType") != "proctrack/cgroup":
        conf.append("ProctrackType=proctrack/cgroup")
    if "cgroup" not in config_value(shown, "TaskPlugin"):
        conf.append("TaskPlugin=task/cgroup,task/affinity")
    if conf:
        add["slurm.conf, on all nodes alike"] = tuple(conf)
    for name, files in scripts.items():
        for file, text in files.items():
            if text is None:
                notes.append(f"{file} ({name}) can't be read here or is no script: see if it ends users' processes")
            else:
                kills += killers(file, text)
    return Advice(add, tuple(dict.fromkeys(kills)), tuple(notes))
