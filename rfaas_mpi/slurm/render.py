"""Batch scripts, as text. Pure: what is wanted in, a script out, every blank quoted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import msgspec

from rfaas_mpi.errors import ConfigError

__all__ = ["TEMPLATE", "Script", "directive", "script"]

TEMPLATE = """\
#!/bin/bash
@directives@

@run@
"""

_PLACES = ("@directives@", "@run@")


class Script(msgspec.Struct, frozen=True):
    """What a batch script is to ask for, and to run. What is None is left to the site.

    `time` as Slurm has it ("30", "2:00:00", "1-0"). `lend`: the job's other cores are lent to its
    ranks; without it the ranks borrow from the site's service.
    """

    command: tuple[str, ...]
    nodes: int = 1
    ntasks: int | None = None
    cpus_per_task: int | None = None
    threads: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    name: str | None = None
    output: str | None = None
    array: str | None = None
    memory: str | None = None
    mpi: str | None = None
    launcher: str | None = None
    workers: int | None = None
    lend: bool = True
    rfaas: str = "rfaas"


def directive(option: str, value: object) -> str:
    """One `#SBATCH` line. ConfigError where the value can't stand in one.

    sbatch reads a line as a shell would, but for variables and commands: it knows quotes and
    backslashes, and takes # for the end.
    """
    text = str(value)
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise ConfigError(f"--{option}={text!r} can't stand in a batch script",
                          hint="leave out line ends and other control characters, and what is empty")
    if re.fullmatch(r"[\w@%+=:,./\[\]*~^-]+", text):
        return f"#SBATCH --{option}={text}"
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{quoted}"'


def script(wanted: Script, template: str = TEMPLATE) -> str:
    """The batch script, by a template with the lines @directives@ and @run@.

    ConfigError where the template has no such lines, or a word can't stand in a script.
    """
    lines = template.splitlines()
    if not lines or not lines[0].startswith("#!"):
        raise ConfigError("the template of batch scripts doesn't begin with #!", hint="its first line names the shell, "
                                                                                    "like #!/bin/bash")
    for place in _PLACES:
        if [line.strip() for line in lines].count(place) != 1:
            raise ConfigError(f"the template of batch scripts has no line {place}, or several",
                              hint="one line @directives@ and, below it, one @run@")
    parts = {"@directives@": _directives(wanted), "@run@": _run(wanted)}
    made = [text for line in lines for text in parts.get(line.strip(), [line])]
    return "\n".join(made) + "\n"


def _directives(wanted: Script) -> list[str]:
    asked: list[tuple[str, object]] = [
        ("job-name", wanted.name), ("partition", wanted.partition), ("account", wanted.account),
        ("nodes", wanted.nodes), ("ntasks", wanted.ntasks), ("cpus-per-task", wanted.cpus_per_task),
        ("time", wanted.time), ("mem", wanted.memory), ("array", wanted.array), ("output", wanted.output)]
    lines = [directive(option, value) for option, value in asked if value is not None]
    # Cores that ranks leave are the job's only if nodes are.
    return [*lines, "#SBATCH --exclusive"] if wanted.lend else lines


def _run(wanted: Script) -> list[str]:
    if not wanted.command or not wanted.command[0]:
        raise ConfigError("a batch script needs something to run", hint="name the program: rfaas slurm script app.py")
    if wanted.mpi is not None and wanted.launcher is not None:
        raise ConfigError("--mpi is srun's, and --launcher has another program start the ranks", hint="give one of them")
    words = _lending(wanted) if wanted.lend else _borrowing(wanted)
    lines = [] if wanted.threads is None else [f"export OMP_NUM_THREADS={wanted.threads}"]
    return [*lines, " ".join(["exec", *words, _quoted(_program(wanted.command))])]


def _lending(wanted: Script) -> list[str]:
    """`rfaas slurm run` and its options, quoted."""
    words = [wanted.rfaas, "slurm", "run"]
    if wanted.workers is not None:
        words += ["--workers", str(wanted.workers)]
    if wanted.mpi is not None:
        words += ["--mpi", wanted.mpi]
    if wanted.launcher is not None:
        words += ["--launcher", wanted.launcher]
    return [_quoted([*words, "--"])]


def _borrowing(wanted: Script) -> list[str]:
    """What starts the ranks where nothing of the job is lent, quoted."""
    if wanted.workers is not None:
        raise ConfigError("--workers is how much of the job is lent, and with --borrow nothing is",
                          hint="leave one of them out; Executor(workers=…) says how many a rank borrows")
    if wanted.launcher is not None:
        # As srun has it: one on each node where no tasks were asked for.
        return [_quoted([wanted.launcher, "-n"]), '"${SLURM_NTASKS:-$SLURM_NNODES}"']
    words = ["srun", *([] if wanted.mpi is None else [f"--mpi={wanted.mpi}"])]
    # Said again: whether srun takes over what sbatch was asked for depends on Slurm's version.
    return [_quoted([*words, *([] if wanted.cpus_per_task is None else [f"--cpus-per-task={wanted.cpus_per_task}"])])]


def _program(command: Sequence[str]) -> Sequence[str]:
    """A Python file is run by Python."""
    return ["python", *command] if command[0].endswith(".py") else command


def _quoted(words: Sequence[str]) -> str:
    for word in words:
        if re.search(r"[\x00\r\n]", word):
            raise ConfigError(f"{word!r} can't stand in a batch script", hint="leave out line ends")
    return shlex.join(words)
