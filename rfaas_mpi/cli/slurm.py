"""`rfaas slurm`: ranks and workers in Slurm's jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.pilots import pilot, pilots
from rfaas_mpi.cli.shape import Finished, Ordered, common, examples
from rfaas_mpi.cli.slurm_install import install

__all__ = ["slurm"]


@click.group(cls=Ordered)
def slurm() -> None:
    """Run ranks with borrowed cores in Slurm's jobs.

    Needs the extras `cluster` and `slurm`: pip install 'rfaas_mpi[cluster,slurm]'.
    """


@slurm.command(context_settings={"allow_interspersed_args": False},
               epilog=examples("rfaas slurm run -- python app.py", "rfaas slurm run --workers 8 --mpi pmi2 -- python app.py"))
@click.option("--workers", type=click.IntRange(min=0), default=None,
              help="Cores to lend, on all nodes together.  [default: all that ranks leave]")
@click.option("--ranks", type=click.IntRange(min=1), default=None,
              help="Ranks, on all nodes together.  [default: the job's tasks, else one on each node]")
@click.option("--mpi", metavar="TYPE", default=None,
              help="How ranks find each other, as srun's --mpi.  [default: the site's]")
@click.option("--launcher", metavar="PROGRAM", default=None,
              help="MPICH's or Open MPI's mpiexec, which starts the ranks in srun's place.")
@common
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def run(out: Output, command: tuple[str, ...], **options: Any) -> None:
    """Run a job's ranks on some of its cores, and lend them the others.

    In a batch script or a shell of salloc. Each rank gets as many cores as OMP_NUM_THREADS
    says, one without it, and is bound to them; an agent on each node lends the rest, to
    this job alone. Ends with the ranks, and with their status.
    """
    from rfaas_mpi import config
    from rfaas_mpi.slurm import run as job
    status = job.run(job.Wanted(command=command, **options), config.environment(), out.progress)
    if status != 0:
        raise Finished(status)


@slurm.command(context_settings={"allow_interspersed_args": False},
               epilog=examples("rfaas slurm script --nodes 2 --ntasks 64 app.py >job.sh",
                               "rfaas slurm script --ntasks 4 --mpi pmi2 --time 30 app.py --n 1000 | sbatch"))
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of the job.")
@click.option("--ntasks", type=click.IntRange(min=1), default=None, help="Ranks, on all nodes together.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), default=None, help="CPUs of each rank, as Slurm counts.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="OpenMP threads of each rank.")
@click.option("--time", metavar="TIME", default=None, help="How long the job may run, like 30 (minutes), 2:00:00 or 1-0.")
@click.option("--partition", metavar="NAME", default=None, help="Where it runs.")
@click.option("--account", metavar="NAME", default=None, help="Who pays.")
@click.option("--name", metavar="NAME", default=None, help="What it is called.")
@click.option("--output", metavar="FILE", default=None, help="Where what it prints goes.")
@click.option("--array", metavar="INDEXES", default=None, help="Run it once for each index, like 0-15%4.")
@click.option("--mem", "memory", metavar="SIZE", default=None, help="Memory of each node; many sites want none named.")
@click.option("--mpi", metavar="TYPE", default=None, help="How ranks find each other, as srun's --mpi.")
@click.option("--launcher", metavar="PROGRAM", default=None,
              help="MPICH's or Open MPI's mpiexec, which starts the ranks in srun's place.")
@click.option("--workers", type=click.IntRange(min=0), default=None,
              help="Cores to lend, on all nodes together.  [default: all that ranks leave]")
@click.option("--lend/--borrow", default=True, show_default=True,
              help="Lend the job's own other cores to its ranks, or borrow from the site's service.")
@click.option("--template", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None,
              help="The site's script, with lines @directives@ and @run@.  [default: RFAAS_SLURM_TEMPLATE]")
@common
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def script(out: Output, command: tuple[str, ...], template: Path | None, **options: Any) -> None:
    """Print a batch script that runs a program with borrowed cores.

    A file that ends with .py is run by Python. The script asks for nothing that isn't named here, and for
    whole nodes where their other cores are lent.
    """
    from rfaas_mpi.config import Settings
    from rfaas_mpi.slurm import render
    named = template or Settings.load().slurm_template
    text = render.script(render.Script(command=command, **options),
                         render.TEMPLATE if named is None else _template(Path(named)))
    out.answer({"script": text}, text.splitlines())


def _template(path: Path) -> str:
    from rfaas_mpi.errors import ConfigError
    try:
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the template of batch scripts, {path}, can't be read: {error}",
                          hint="name another one with --template or RFAAS_SLURM_TEMPLATE") from None


slurm.add_command(pilots)
slurm.add_command(pilot)
slurm.add_command(install)


@slurm.command(hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
@common
def clear(directory: Path) -> None:
    """Removes what a job's agent left on this node when it was killed, and says the node; `rfaas slurm run` has it done."""
    from rfaas_mpi import config
    from rfaas_mpi.agent.groups import Roots, remove_stale
    from rfaas_mpi.agent.priority import remove_stale_groups
    from rfaas_mpi.slurm import run as job
    node = config.environment()["SLURMD_NODENAME"]
    remove_stale(Roots.find())
    remove_stale_groups()
    if job.clear(directory, node):
        # One write: srun mixes what nodes say.
        os.write(sys.stdout.fileno(), f"{node}\n".encode())


@slurm.command(hidden=True)
@common
def agent() -> None:
    """A node's agent in a job; `rfaas slurm run` starts it and tells it the rest."""
    import msgspec

    from rfaas_mpi import config
    from rfaas_mpi.agent.window import Window
    from rfaas_mpi.cli.agent import serve
    from rfaas_mpi.errors import RFaaSError
    from rfaas_mpi.slurm import facts, layout, run as job

    def say(said: job.Said) -> None:
        # One write each: srun mixes what nodes say.
        os.write(sys.stdout.fileno(), msgspec.json.encode(said) + b"\n")

    def told() -> Iterator[bytes]:
        left = b""
        while data := os.read(0, 65536):
            *whole, left = (left + data).split(b"\n")
            yield from whole

    def leave_with_the_job() -> None:
        for line in lines:
            until(msgspec.json.decode(line, type=facts.Until))
        os.kill(os.getpid(), signal.SIGTERM)

    def until(said: facts.Until) -> None:
        window.tell_wall(None if said.ends is None else said.ends - facts.LEAD_S, said.sent)

    def leave(*_: object) -> None:
        # Slurm tells twice: the clean-up is not to end half-way.
        signal.signal(signal.SIGTERM, lambda *_: None)
        sys.exit(0)

    def until_told() -> None:
        signal.signal(signal.SIGTERM, leave)
        while True:
            signal.pause()

    # Slurm sends what a job is to be warned by (--signal) to all of its steps: it is meant for the ranks.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    lines, window = told(), Window()
    plan = msgspec.json.decode(next(lines), type=job.Plan)
    until(plan.until)
    node = config.environment()["SLURMD_NODENAME"]
    mine = plan.nodes[node]
    stack = contextlib.ExitStack()
    try:
        usable = os.sched_getaffinity(0)
        # Where Slurm confines the job, what is left is its part; else its numbers have to be translated.
        here = job.cpus_here()
        cpus = (usable if len(usable) == len(mine.ids)
                else usable.intersection(facts.physical(mine.ids, here)))
        cores = facts.whole_cores(cpus, here)
        mine_laid_out = layout.lay_out(node, cores, mine.ranks, mine.threads, mine.workers)
        job.clear_killed()
        directory = job.private(Path(plan.directory))
        # By the agent: its job's first process may be killed before it could.
        stack.callback(job.clear, directory, node)
        stack.enter_context(job.held(job.private(directory / node)))
        given = {"runtime_dir": str(directory / node), "manager_user": str(os.geteuid())}
        if plan.key:
            key = directory / "key"
            spare = directory / f".key-{node}"
            spare.touch(mode=0o600)
            spare.write_bytes(plan.key)
            spare.replace(key)
            given |= {"auth": "key", "manager_key_file": str(key)}
    except BaseException as error:
        stack.close()
        if isinstance(error, RFaaSError):
            say(job.Said(error=Exception.__str__(error), hint=error.hint))
        raise
    say(job.Said(layout=mine_laid_out))
    serving = False

    def ready(_facts: object) -> None:
        nonlocal serving
        serving = True
        say(job.Said(ready=node))

    threading.Thread(target=leave_with_the_job, daemon=True).start()
    try:
        if not mine_laid_out.lent:
            ready(None)
            until_told()
        serve(ready, manager=plan.manager, listen=(f"{mine.address}:0",), socket=None,
              node=node, cores=",".join(map(str, mine_laid_out.lent)), keep=None, grace_s=0.0, priority="auto",
              metrics="", directory=directory / node, deaf=(signal.SIGTERM, signal.SIGUSR1), window=window, **given)
    except Exception:
        if serving:
            # The node's ranks still need the key that is there.
            traceback.print_exc()
            until_told()
        raise
    finally:
        stack.close()
