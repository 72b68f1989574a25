"""`rfaas slurm install`: what an administrator adds to Slurm for the site's service."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import click

from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.shape import common, examples

__all__ = ["install"]


@click.command(epilog=examples("rfaas slurm install", "rfaas slurm install --json"))
@common
@click.pass_obj
def install(out: Output) -> None:
    """Print what to add to Slurm for the site's service.

    Run it as root on a batch node, where Slurm's hooks are. It changes nothing. A job's Prolog has
    the node's agent take everything back before the job starts; its Epilog has it lend again.
    Lines of the site's own hooks are named that would end workers with all that a user runs.
    """
    import msgspec

    from rfaas_mpi.agent.spawner import unsafe_places
    from rfaas_mpi.slurm import hooks
    from rfaas_mpi.slurm.run import ask
    hook = Path(__file__).parents[1] / "agent" / "rfaas-hook"
    shown = ask(["scontrol", "show", "config"])
    scripts = {name: {file: _text(file) for pattern in patterns for file in sorted(glob.glob(pattern)) or [pattern]}
               for name, patterns in hooks.paths(shown).items()}
    advice = hooks.advise(shown, str(hook), scripts)
    unsafe = unsafe_places((str(hook),)) if hook.exists() else [f"{hook} is not there: build it"]
    notes = (*advice.notes, *(f"root would run what a user can change: {one}" for one in unsafe))
    lines = []
    for place, texts in {**advice.add, "the agent's options, in /etc/rfaas_mpi/agent.env":
                         (f"--hook {hooks.DIRECTORY}",)}.items():
        lines += [f"{place}:", *(f"    {text}" for text in texts)]
    for found in advice.kills:
        lines.append(f"ends workers of the job's user, too: {found.file}:{found.line}: {found.text}")
    if advice.kills:
        lines += ["    Slurm itself ends what a job leaves (ProctrackType=proctrack/cgroup). What such a line kills",
                  "    runs again elsewhere. To keep it from being killed have workers run as users of a pool, whose",
                  "    uids are nobody's, by the agent's environment:", *(f"        {text}" for text in hooks.POOL)]
    lines += [f"note: {note}" for note in notes]
    out.answer({**msgspec.to_builtins(advice), "pool": list(hooks.POOL if advice.kills else ()), "notes": list(notes),
                "hook": str(hook), "directory": hooks.DIRECTORY}, lines)


def _text(file: str) -> str | None:
    """A script's text; None where it can't be read or is none."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as script:
            data = script.read(1 << 20)
    except OSError:
        return None
    return data.decode(errors="replace") if data.startswith(b"#!") else None
