"""`rfaas slurm pilots`: idle nodes lend, by jobs that give way to any other; and what runs in such a job."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.shape import Finished, common, examples

__all__ = ["pilot", "pilots"]

# A pilot leaves a moment after its leases have ended,
_LEAVES_S = 0.5
# and when its manager was away for so long: nobody would know what it lends.
_ALONE_S = 60.0
_ASK_S = 20.0


def _minutes(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(each) for each in text.split(","))
    except ValueError:
        raise click.BadParameter("minutes with commas between them, like 2,4,8") from None
    if any(each < 1 for each in found):
        raise click.BadParameter("a job has one minute at least")
    return found


@click.command(epilog=examples("rfaas slurm pilots --partition lowprio --check",
                               "rfaas slurm pilots --partition lowprio --nodes-max 16"))
@click.option("--partition", metavar="NAME", required=True, help="Where others' jobs preempt those of pilots.")
@click.option("--nodes-max", type=click.IntRange(min=1), default=1, show_default=True,
              help="Pilots at a time, each on a node.")
@click.option("--lengths", metavar="MINUTES", callback=_minutes, default="2,4,6,8,14,22,34,56,90", show_default=True,
              help="How long pilots are.")
@click.option("--time-min", metavar="MINUTES", type=click.IntRange(min=1), default=None,
              help="Slurm may shorten them to this.  [default: fixed lengths]")
@click.option("--queued-max", type=click.IntRange(min=1), default=20, show_default=True,
              help="Pilots that wait, at the most.")
@click.option("--busy-max", type=click.IntRange(min=0), default=0, show_default=True,
              help="None waits while more of others' jobs wait for resources.")
@click.option("--account", metavar="NAME", default=None, help="Who pays.")
@click.option("--qos", metavar="NAME", default=None, help="Their quality of service.")
@click.option("--directory", metavar="DIRECTORY", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="For key and logs, where all nodes see it; yours alone.  [default: ~/.rfaas/pilots-PARTITION]")
@click.option("--check", is_flag=True, help="Only tell whether pilots would be preempted there, and what they cost.")
@common
@click.pass_obj
def pilots(out: Output, check: bool, directory: Path | None, **options: Any) -> None:
    """Have idle nodes lend to your ranks, in the foreground.

    Keeps short jobs queued that anybody's job preempts; each has a node whose cores it lends. Prints
    what ranks have to set. Ends with SIGTERM or Ctrl-C, and the pilots with it.
    """
    from rfaas_mpi.errors import ConfigError
    from rfaas_mpi.slurm import filling, run
    from rfaas_mpi.slurm.pilots import Wanted
    wanted = Wanted(**options)
    found = filling.look_up(wanted.partition, wanted.qos)
    if check:
        _answer_check(out, found)
        return
    if found.preemptible is False:
        # A partition that isn't there charges nothing.
        raise ConfigError(f"pilots would keep others waiting: {found.why}" if found.charges else found.why,
                          hint=f"rfaas slurm pilots --partition {wanted.partition} --check")
    with run.told_to_end() as undisturbed, filling.own_directory(directory, wanted.partition) as own, \
            _line(own, wanted.partition) as line, undisturbed:
        def ready() -> None:
            lines = [f"export {name}={shlex.quote(value)}" for name, value in line.environment.items()]
            out.answer({"running": True, "environment": line.environment, "directory": str(own)}, lines)
            out.progress(f"rfaas: pilots for {wanted.partition}, {wanted.nodes_max} at the most; Ctrl-C ends them")
        filling.fill(wanted, own, line, ready, out.progress)


def _answer_check(out: Output, found: Any) -> None:
    import msgspec
    word = {True: "yes", False: "no", None: "can't be told"}[found.preemptible]
    lines = [f"preempted   {word}: {found.why}", *(f"charged     {each}" for each in found.charges)]
    if found.advice:
        lines += ["", "An administrator would have in slurm.conf:", *(f"    {each}" for each in found.advice)]
    out.answer(msgspec.to_builtins(found), lines)
    if found.preemptible is False:
        raise Finished(1)


@contextlib.contextmanager
def _line(directory: Path, partition: str) -> Iterator[Any]:
    """To the manager that is named, or to one of one's own."""
    from rfaas_mpi.config import Settings
    from rfaas_mpi.errors import ConfigError
    from rfaas_mpi.slurm import filling
    settings = Settings.load()
    if settings.manager is not None:
        if settings.manager.startswith("unix:"):
            raise ConfigError(f"pilots on other nodes can't reach the manager at {settings.manager}",
                              hint="name it by http(s)://HOST:PORT in RFAAS_MANAGER, or unset that")
        with _asking(settings) as agents:
            yield filling.Line({"RFAAS_MANAGER": settings.manager}, tuple(_options(settings)), agents)
        return
    with filling.own_manager(directory, partition) as manager:
        given = {name.removeprefix("RFAAS_").lower(): value for name, value in manager.environment.items()}
        settings = Settings.load(**given)
        with _asking(settings) as agents:
            yield filling.Line(manager.environment, tuple(_options(settings)), agents)


def _options(settings: Any) -> Iterator[str]:
    """What a pilot is told of the manager: where it is, and in which file the key lies."""
    for name in ("manager", "auth", "manager_user", "manager_key_file", "munge_socket", "ca_file"):
        if (value := getattr(settings, name)) is not None:
            yield f"--{name.replace('_', '-')}={value}"


@contextlib.contextmanager
def _asking(settings: Any) -> Iterator[Callable[[], frozenset[str] | None]]:
    """Asks the manager on which nodes agents of this user lend something."""
    from rfaas_mpi.client import ManagerClient
    from rfaas_mpi.config import user_id
    from rfaas_mpi.errors import RFaaSError
    # Agents bear their user's uid, but those of the manager's own user.
    uids = {str(os.geteuid())} | ({""} if user_id(settings.manager_user) == os.geteuid() else set())
    with ManagerClient(settings) as client:
        def agents() -> frozenset[str] | None:
            try:
                found = client.call("nodes").nodes
            except RFaaSError:
                return None
            parts = [(view, *view.node.partition("/")) for view in found]
            return frozenset(name for view, name, _, uid in parts if uid in uids and view.spare and not view.silent)
        yield agents


# --- in the job -----------------------------------------------------------------------------------

@click.command(hidden=True)
@click.option("--minutes", type=int, default=None)
@click.option("--manager", required=True)
@click.option("--auth")
@click.option("--manager-user")
@click.option("--manager-key-file")
@click.option("--munge-socket")
@click.option("--ca-file")
@common
def pilot(minutes: int | None, manager: str, **given: Any) -> None:
    """A pilot's agent; `rfaas slurm pilots` has jobs run it."""
    from rfaas_mpi.agent.window import Window
    from rfaas_mpi.cli.agent import serve
    from rfaas_mpi.config import Settings, environment
    from rfaas_mpi.slurm import filling
    environ = environment()
    began = time.time()

    def leave(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def end(*_: object) -> None:
        # Slurm tells twice: the clean-up is not to end half-way.
        signal.signal(signal.SIGTERM, lambda *_: None)
        sys.exit(0)

    # The first of them ends it, whatever is behind it: preemption, suspension, a warning. Slurm sends them to all that
    # runs in the job: a worker that one ended would have failed, one that is stopped would be waited for.
    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGUSR1, signal.SIGTSTP):
        signal.signal(number, leave)
    given = {name: value for name, value in given.items() if value is not None}
    settings = Settings.load(manager=manager, **given)
    with filling.pilot_directory(environ["SLURM_JOB_ID"]) as directory:
        window = Window()
        _say(environ, "begins")
        for watch in (lambda: _leave_in_time(environ, began, minutes, window, leave),
                      lambda: _leave_alone(environ, settings, leave)):
            threading.Thread(target=watch, daemon=True).start()
        said = _asked(environ)
        # While Slurm answers: it takes longer than all else until it lends.
        from rfaas_mpi.agent import daemon  # noqa: F401
        lent = _lent(environ, said)
        serve(lambda _facts: None, manager=manager, listen=(f"{_own_address(manager)}:0",), socket=None,
              node=environ["SLURMD_NODENAME"], cores=",".join(map(str, lent)), keep=None, grace_s=0.0, priority="auto",
              metrics="", directory=directory, runtime_dir=str(directory),
              deaf=(signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1), window=window, **given)
    # What the interpreter does at its end takes longer than all of the above, and nothing is left to be done.
    logging.shutdown()
    os._exit(0)


def _asked(environ: Any) -> Callable[[], str] | None:
    """What waits for Slurm's word on which cores the job has; None where it is confined to them."""
    from rfaas_mpi.slurm import facts, run
    if len(os.sched_getaffinity(0)) <= facts.counts(environ["SLURM_JOB_CPUS_PER_NODE"])[0]:
        return None
    return run.asking(["scontrol", "show", "job", "-d", "-o", environ["SLURM_JOB_ID"]])


def _lent(environ: Any, said: Callable[[], str] | None) -> tuple[int, ...]:
    """The node's cores but the first, which is the agent's own; a node's only core is lent."""
    from rfaas_mpi.slurm import facts, run
    usable, here = os.sched_getaffinity(0), run.cpus_here()
    if said is not None:
        ids = facts.core_ids(said()).get(environ["SLURMD_NODENAME"], ())
        usable = usable.intersection(facts.physical(ids, here)) or usable
    cores = facts.whole_cores(usable, here)
    return cores[1:] or cores


def _own_address(manager: str) -> str:
    """Where this node is reached by those that the manager reaches."""
    from rfaas_mpi.remote import Address
    host = Address.parse(manager.partition(",")[0].partition("://")[2]).host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 9))              # nothing is sent
        return str(way.getsockname()[0])


def _leave_in_time(environ: Any, began: float, minutes: int | None, window: Any, leave: Callable[[], None]) -> None:
    """Has leases end before the job's time is over, and then leaves."""
    from rfaas_mpi.errors import RFaaSError
    from rfaas_mpi.slurm import facts, run
    end: float | None
    if (said := environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        end = float(said)
    elif minutes is not None:
        end = began + 60.0 * minutes
    else:
        try:
            end = facts.end_of(run.read(["squeue", "-h", "-j", environ["SLURM_JOB_ID"], "-o", facts.ENDS]),
                               int(environ["SLURM_JOB_ID"]))
        except RFaaSError:
            return      # its warning comes from Slurm
        if end is None:
            return
    window.tell_wall(end - facts.LEAD_S)
    time.sleep(max(0.0, end - facts.LEAD_S + _LEAVES_S - time.time()))
    _say(environ, "leaves: its time is over")
    leave()


def _leave_alone(environ: Any, settings: Any, leave: Callable[[], None]) -> None:
    """Leaves when there is no manager any more."""
    from rfaas_mpi.client import ManagerClient
    from rfaas_mpi.errors import RFaaSError
    heard = time.monotonic()
    with ManagerClient(settings) as client:
        while time.monotonic() - heard < _ALONE_S:
            # First of all it has an agent to start.
            time.sleep(_ASK_S)
            try:
                client.call("policy")
                heard = time.monotonic()
            except RFaaSError as error:
                print(f"rfaas: {error}", file=sys.stderr)
    _say(environ, f"leaves: its manager has been away for {_ALONE_S:.0f} s")
    leave()


def _say(environ: Any, what: str) -> None:
    """To its node's log, where others have been before and others come after."""
    print(f"rfaas: pilot {environ['SLURM_JOB_ID']} {what}", file=sys.stderr, flush=True)
