"""The commands of `rfaas`. Each imports what it needs when it runs: `--help` and `version` stay quick."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from rfaas_mpi._version import __version__
from rfaas_mpi.cli import commands, output
from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.shape import WIDTH, Finished, Ordered, common, examples, flag
from rfaas_mpi.errors import NodeTaken, RFaaSError, ServiceLost


@click.group(cls=Ordered, context_settings=WIDTH, epilog=(
    "\b\nExit status:\n"
    "  0   done\n"
    "  1   could not be done; the message says why and what to do\n"
    "  2   the command line is wrong\n"
    "  3   status: no service runs\n"
    "  4   agent: another one has taken its node over\n"
    "  70  a bug in rfaas; --debug shows where\n"
    "  130 interrupted (Ctrl-C)\n"
    "  141 nobody reads stdout any more\n\n"
    + examples("rfaas doctor      # what works here, and how to get the rest",
               "rfaas demo        # see a rank finish sooner")))
@click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=flag("debug"),
              help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="rfaas", message="%(prog)s %(version)s")
def app() -> None:
    """Borrow spare cores for the kernels of an MPI application.

    Nothing needs to be started or configured: the first Executor of a rank
    starts a service for this node, and the service leaves again 2 s after the
    last rank. These commands show what happens and what it costs.
    """


# --- demo ----------------------------------------------------------------------

@app.command(epilog=examples("rfaas demo", "rfaas demo --options 1000000 --out /tmp/demo"))
@click.option("--options", "n_options", type=click.IntRange(min=1000), default=10_000_000, show_default=True,
              help="Options to price with Black-Scholes.")
@click.option("--out", "directory", type=click.Path(file_okay=False, path_type=Path), default=Path("out"),
              show_default=True, help="Directory for the pictures.")
@common
@click.pass_obj
def demo(out: Output, n_options: int, directory: Path) -> None:
    """Run the main job with a borrowed core.

    Prices options with Black-Scholes on the rank's core alone, then with one
    borrowed core.

    Verifies both results before it prints a number, kills the worker in
    mid-run to show that nothing is lost, and writes a picture of the timeline.
    """
    from rfaas_mpi.cli import demo as job
    data, lines = job.run(n_options=n_options, out_dir=directory, progress=out.progress)
    out.answer(data, lines)
    if not data.get("ok", True):
        raise Finished(output.FAILED)


@app.command("app", context_settings={"allow_interspersed_args": False},
             epilog=examples("rfaas app", "rfaas app matmul --help", "rfaas app --describe matmul",
                             "rfaas app matmul --n 500 --mode local --mode split",
                             "rfaas app --ranks 2 jacobi --mode mpi"))
@click.option("--list", "listing", is_flag=True, help="List the apps; the default.")
@click.option("--describe", is_flag=True, help="Say what the app is and how it is checked; run nothing.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="MPI ranks that run it.")
@common
@click.argument("name", metavar="[NAME", required=False)
@click.argument("arguments", metavar="[ARGUMENT]...]", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def app_(context: click.Context, name: str | None, arguments: tuple[str, ...], listing: bool, describe: bool,
         ranks: int) -> None:
    """List, describe and run the apps.

    Small applications of the kinds that are common on such machines, each with
    the same arguments for the rank's core alone, borrowed cores, and both.

    Options before NAME are of this command; those after it are the app's own,
    and `rfaas app NAME --help` shows them. The app runs under mpiexec, and the
    exit status is its own. With --json before NAME, or without a file behind it,
    the answer has what the app reports, and what it prints goes to stderr.
    """
    from rfaas_mpi.cli import apps
    out: Output = context.obj
    # Behind NAME, and with a file, it is an option of the app.
    arguments, asked = apps.without_json(arguments)
    out.json = asked or context.get_parameter_source("json") is click.core.ParameterSource.COMMANDLINE
    if name is None or listing:
        found = apps.find()
        out.answer({"apps": [apps.as_json(one) for one in found.values()]}, apps.as_text(found))
        return
    try:
        chosen = apps.named(name)
    except KeyError as error:
        raise click.UsageError(error.args[0]) from None
    # What it lacks it can't import, and so not say what its options are.
    if describe or (chosen.missing and {"-h", "--help"} & set(arguments)):
        out.answer(apps.as_json(chosen), apps.described(chosen))
        return
    if not out.json:
        if (status := apps.run(chosen, arguments, ranks)) != output.OK:
            raise Finished(status)
        return
    data = apps.run_quietly(chosen, arguments, ranks, out.progress)
    out.answer(data, [])
    if not data["ok"]:
        raise Finished(data["status"])


# --- the service ---------------------------------------------------------------

def elsewhere(command: Callable[..., Any]) -> Callable[..., Any]:
    """--service and --key-file: the service of another node."""
    command = click.option("--key-file", metavar="FILE", default=None,
                           help="The key of that service.  [default: RFAAS_KEY_FILE]")(command)
    return click.option("--service", metavar="tcp://HOST:PORT", default=None,
                        help="A service on another node.  [default: RFAAS_SERVICE, else this node's]")(command)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@app.command(epilog=examples("rfaas up && mpiexec -n 2 python app.py && rfaas down",
                             "rfaas up --listen 10.0.0.7:4711   # for ranks on other nodes"))
@click.option("--listen", metavar="HOST:PORT", multiple=True,
              help="Listen on TCP too, for ranks on other nodes; port 0 is any that is free.")
@click.option("--key-file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), default=None,
              help="Where the key is that those ranks must know; made if missing.  [default: one beside the log]")
@common
@click.pass_obj
def up(out: Output, listen: tuple[str, ...], key_file: Path | None) -> None:
    """Start this node's service and keep it.

    It stays until `rfaas down`, with or without ranks; if it runs already, it
    stays from now on.

    Not needed before an application runs: the first Executor does it. With the
    service up, that Executor's first lease comes some 100 ms sooner.

    With --listen it lends this node's cores to ranks on other nodes as well: to
    whoever knows the key. RFAAS_CORES and RFAAS_LEND say what they may get.
    """
    from rfaas_mpi.cli import service
    if key_file is not None and not listen:
        raise click.UsageError("--key-file goes with --listen")
    data = service.up(listen, key_file)
    out.answer(data, service.describe(data))


@app.command(epilog=examples("rfaas down"))
@elsewhere
@common
@click.pass_obj
def down(out: Output, **which: Any) -> None:
    """End this node's service. Its leases end; ranks run on without them."""
    from rfaas_mpi.cli import service
    data = service.down(**_given(**which))
    out.answer(data, ["The service has ended."] if data["was_running"] else ["No service was running."])


@app.command(epilog=examples("rfaas status", "rfaas status --service tcp://10.0.0.7:4711 --key-file key"))
@elsewhere
@common
@click.pass_obj
def status(out: Output, **which: Any) -> None:
    """Show the service, its leases and its workers. Starts nothing.

    Where RFAAS_MANAGER names a cluster's manager: its nodes, and the leases
    that you have there.

    Exit status 3 if no service runs.
    """
    from rfaas_mpi.cli import service
    from rfaas_mpi.config import Settings
    if which.get("service") is None and Settings.load().manager is not None:
        from rfaas_mpi.cli import cluster
        out.answer(*cluster.status(None))
        return
    data = service.status(**_given(**which))
    out.answer(data, service.describe(data))
    if not data["running"]:
        raise Finished(output.NOT_RUNNING)


for command in commands.COMMANDS:
    app.add_command(command)


# --- doctor --------------------------------------------------------------------

@app.command(epilog=examples("rfaas doctor", "mpiexec -n 1 rfaas doctor   # as a rank sees it"))
@elsewhere
@common
@click.pass_obj
def doctor(out: Output, **which: Any) -> None:
    """Say what works here, what does not, and why.

    Each ✘ comes with a line that says how to change that.

    Starts nothing and changes nothing. Exit status 1 if something that every
    application needs is missing.
    """
    from rfaas_mpi.cli import doctor as checks
    found = checks.examine(**_given(**which))
    out.answer(checks.as_json(found), checks.as_text(found))
    if not checks.healthy(found):
        raise Finished(output.FAILED)


# --- config --------------------------------------------------------------------

@app.group("config", cls=Ordered, epilog=examples("rfaas config show --origin"))
def config_() -> None:
    """What is set, and where.

    An argument wins over RFAAS_… in the environment, that over the files
    ~/.config/rfaas_mpi/config.toml and /etc/rfaas_mpi/config.toml (or those
    that RFAAS_CONFIG names), and they over the defaults.
    """


@config_.command("show", epilog=examples("rfaas config show --origin", "RFAAS_SPIN_US=0 rfaas config show --json"))
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@common
@click.pass_obj
def config_show(out: Output, origin: bool) -> None:
    """Show every setting as an Executor made here would have it."""
    from rfaas_mpi.cli import settings
    out.answer(*settings.show(origin))


# --- bench ---------------------------------------------------------------------

@app.group(cls=Ordered, epilog=examples(
    "rfaas bench latency", "rfaas bench all --json --out benchmarks/laptop.json >/dev/null"))
def bench() -> None:
    """Measure what an invocation costs here.

    Beside every figure stands what two bare processes need for the same.

    The rank is pinned to one core and borrows another. Things that are
    compared alternate in blocks of 200 invocations; what costs more is the
    median of the differences of neighbouring blocks, the best of 3 runs. The
    `A/A` beside it is the same thing measured twice: what this machine can't
    resolve. For figures that mean something nothing else should run.
    """


def measured(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every benchmark."""
    command = click.option("--transport", type=click.Choice(["shm", "tcp", "verbs"]), default="shm",
                           show_default=True, help="How invocations travel; tcp, verbs: latency and payload.")(command)
    command = click.option("--runs", type=click.IntRange(1, 99), default=3, show_default=True,
                           help="Runs; the best one counts for differences.")(command)
    command = click.option("--core", type=click.IntRange(min=0), default=None,
                           help="Core of the rank.  [default: the first it may use]")(command)
    command = click.option("--quick", is_flag=True, help="A tenth of the work: to try it, not to report it.")(command)
    command = click.option("--out", "file", type=click.Path(dir_okay=False, path_type=Path), default=None,
                           help="Keep the JSON in this file too.")(command)
    return common(command)


def _bench(out: Output, what: str, arguments: dict[str, Any]) -> None:
    from rfaas_mpi.bench import report, suite
    file = arguments.pop("file")
    if file is not None:
        # Not after minutes of measuring.
        suite.check_writable(file)
    data = suite.measure(what, suite.Options(progress=out.progress, **arguments))
    if file is not None:
        suite.keep(data, file)
    out.answer(data, report.as_text(data))


@bench.command(epilog=examples("rfaas bench latency --transport shm --json",
                                 "rfaas bench latency --transport verbs --provider null"))
@measured
@click.option("--provider", type=click.Choice(["device", "null"]), default="device", show_default=True,
              help="With verbs; null: a device that is none, for what the transport itself costs.")
@click.pass_obj
def latency(out: Output, **arguments: Any) -> None:
    """One invocation at a time: native, Python and object kernels.

    Beside them: two bare processes with a mailbox each way, a futex wake-up
    after 5 ms of idling, and the same Python kernel called locally. Over tcp
    and verbs: two bare processes that send the same bytes through a socket or
    a queue pair.
    """
    _bench(out, "latency", arguments)


@bench.command(epilog=examples("rfaas bench throughput"))
@measured
@click.pass_obj
def throughput(out: Output, **arguments: Any) -> None:
    """Invocations per second with many in flight, on one worker."""
    _bench(out, "throughput", arguments)


@bench.command(epilog=examples("rfaas bench payload"))
@measured
@click.pass_obj
def payload(out: Output, **arguments: Any) -> None:
    """y = 2x from 1 KiB to 64 MiB.

    Locally, between two bare processes, and through the product with arrays in
    the executor's memory and with plain ones. Once with x and y left alone, once with x written before and y read after
    each invocation. Over tcp and verbs: how much of the bandwidth of a bare socket or queue pair is left.
    """
    _bench(out, "payload", arguments)


@bench.command(epilog=examples("rfaas bench cold"))
@measured
@click.pass_obj
def cold(out: Output, **arguments: Any) -> None:
    """From nothing to the first result, in steps.

    Runs a service of its own beside the one that may be running.
    """
    _bench(out, "cold", arguments)


@bench.command(epilog=examples("rfaas bench reclaim --json", "rfaas bench reclaim --of memory"))
@measured
@click.option("--of", type=click.Choice(["spin", "spin_grace", "threads", "threads_grace", "memory", "memory_grace", "bare"]),
              multiple=True, help="Only this; may be repeated.")
@click.pass_obj
def reclaim(out: Output, **arguments: Any) -> None:
    """How soon cores that are wanted back are free.

    And how soon their ranks know.

    Real workers that spin, have 64 threads or hold 1 GiB are revoked, with and without a grace. Runs a service of its
    own beside the one that may be running; as root its workers have low priority.
    """
    _bench(out, "reclaim", arguments)


@bench.command(epilog=examples("rfaas bench control --json", "rfaas bench control --of http"))
@measured
@click.option("--of", type=click.Choice(["book", "http", "restart", "first"]), multiple=True,
              help="This part only; may be repeated.")
@click.option("--namespaces", is_flag=True,
              help="For `first`: the agent in a network namespace of its own, as on another node. Needs root.")
@click.pass_obj
def control(out: Output, **arguments: Any) -> None:
    """How many leases a cluster's manager grants.

    The lease book alone, with 1 000 nodes; a real manager through HTTP, pinned
    to one core, while 1 000 agents that are played on the other one report and
    leases are asked for at rising rates; a manager's start, with the records of
    100 000 leases and with none; and how long it takes from a lease to its first
    result, with a real agent.
    """
    _bench(out, "control", arguments)


@bench.command(epilog=examples("rfaas bench fairness --json", "rfaas bench fairness --of equal"))
@measured
@click.option("--of", type=click.Choice(["equal", "mixed", "together"]), multiple=True,
              help="This demand only; may be repeated.")
@click.pass_obj
def fairness(out: Output, **arguments: Any) -> None:
    """How much kernel time ranks get of workers that they share.

    Four processes share two workers, as ranks of a communicator do, and keep as many invocations in flight as each
    other: of the same kernel, of one that takes four times as long, and with both workers for everybody. Spreads are
    most less least, in % of the mean; A/A is each rank against itself. Runs a service of its own.
    """
    _bench(out, "fairness", arguments)


@bench.command(epilog=examples("rfaas bench crossover --json", "rfaas bench crossover --transport tcp --namespaces"))
@measured
@click.option("--namespaces", is_flag=True,
              help="The worker in a network namespace of its own, as on another node. Needs root, and --transport tcp.")
@click.pass_obj
def crossover(out: Output, **arguments: Any) -> None:
    """Where the planner offloads, and where that pays.

    A kernel of 30 µs to 100 ms on 64 KiB to 32 MiB, run by the rank, by one
    worker, divided by fixed parts, and as the planner decides (`Split`,
    `Offload`), all in turn. Lost is what the planner's way took more than the
    best of the fixed ones. Runs a manager and an agent of its own.
    """
    if arguments["namespaces"] and arguments["transport"] != "tcp":
        raise click.UsageError("--namespaces needs --transport tcp: nothing else reaches the worker there")
    _bench(out, "crossover", arguments)


@bench.command(epilog=examples("rfaas bench split", "rfaas bench split --transport tcp --namespaces"))
@measured
@click.option("--namespaces", is_flag=True,
              help="With tcp: the worker in a network namespace of its own, as on another node. Needs root.")
@click.pass_obj
def split(out: Output, **arguments: Any) -> None:
    """What a split costs, and if its prediction holds.

    Kernels of 1, 4.5 and 20 ms, in C and in numpy: run by the rank alone in a
    split's cells beside one bare call, divided beside halves by hand, set up
    anew beside set up once; and what was predicted beside what it took.
    """
    _bench(out, "split", arguments)


@bench.command(epilog=examples("rfaas bench faults", "rfaas bench faults --app jacobi --of killed --of stopped"))
@measured
@click.option("--app", "names", metavar="NAME", multiple=True, help="This app only; may be repeated.")
@click.option("--of", type=click.Choice(["stopped", "killed", "manager", "revoked"]), multiple=True,
              help="This fault only; may be repeated.")
@click.pass_obj
def faults(out: Output, names: tuple[str, ...], **arguments: Any) -> None:
    """What faults cost the apps.

    Each app of `rfaas app` runs on a cluster of its own, is checked in every
    round, and its results are compared with those without faults: while a
    worker is stopped for 2 s, a worker is killed every second, the manager is
    killed half-way, and all workers are revoked half-way. Exit status 1 where
    an answer is wrong.
    """
    from rfaas_mpi.bench import report, suite
    from rfaas_mpi.cli import apps
    found = {name: app for name, app in apps.find().items() if app.common}
    if unknown := [name for name in names if name not in found]:
        raise click.UsageError(f"there is no app {unknown[0]!r} for this; there are {', '.join(found)}")
    file = arguments.pop("file")
    if file is not None:
        suite.check_writable(file)
    data = suite.measure("faults", suite.Options(
        progress=out.progress, apps=tuple(found[name].path for name in names or found), **arguments))
    if file is not None:
        suite.keep(data, file)
    out.answer(data, report.as_text(data))
    if not data["right"]:
        raise Finished(output.FAILED)


@bench.command(name="all", epilog=examples("rfaas bench all --json --out benchmarks/laptop.json >/dev/null"))
@measured
@click.pass_obj
def all_(out: Output, **arguments: Any) -> None:
    """latency, throughput, payload and cold, one after another."""
    _bench(out, "all", arguments)


# --- version -------------------------------------------------------------------

@app.command(epilog=examples("rfaas version"))
@common
@click.pass_obj
def version(out: Output) -> None:
    """Show the versions of rfaas and what it runs on."""
    import platform
    data = {"version": __version__, "python": platform.python_version(), "system": platform.system(),
            "release": platform.release(), "machine": platform.machine(), "package": str(Path(__file__).parents[1])}
    out.answer(data, [f"rfaas {data['version']} (Python {data['python']}, {data['system']} {data['release']}, "
                      f"{data['machine']})"])


# --- running one command ---------------------------------------------------------

def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process') and returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Known before click has parsed anything, for errors of the command line itself.
    out = Output(json="--json" in given, debug="--debug" in given)
    try:
        return _run(given, out)
    except output.StdoutClosed:
        output.abandon_stdout()
        return output.CLOSED_STDOUT
    except output.StdoutFailed as error:
        output.abandon_stdout()
        out.error(f"stdout can't be written: {error}", kind="StdoutFailed")
        return output.FAILED


def _run(given: list[str], out: Output) -> int:
    try:
        app.main(given, prog_name="rfaas", obj=out, standalone_mode=False)
    except Finished as end:
        return end.status
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    except (click.Abort, KeyboardInterrupt):
        out.error("interrupted", kind="KeyboardInterrupt")
        return output.INTERRUPTED
    except SystemExit as end:
        if end.code == 1:  # click's answer to a closed stdout, met while it prints help
            raise output.StdoutClosed from None
        return end.code if isinstance(end.code, int) else output.OK     # it was told to end
    except click.ClickException as error:
        hint = f"see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
        out.error(error.format_message(), kind=type(error).__name__, hint=hint)
        return error.exit_code
    except (RFaaSError, OSError) as error:
        if out.debug:
            traceback.print_exc()
        hint = error.hint if isinstance(error, RFaaSError) else ""
        message = Exception.__str__(error) if isinstance(error, RFaaSError) else str(error)
        # Which kind of loss it was is nothing for scripts: they have known one name from the start.
        kind = ServiceLost.__name__ if isinstance(error, ServiceLost) else type(error).__name__
        out.error(message or kind, kind=kind, hint=hint)
        return output.TAKEN if isinstance(error, NodeTaken) else output.FAILED
    except (output.StdoutClosed, output.StdoutFailed):
        raise
    except Exception as error:  # a bug: say so in one line, and where to see more
        if out.debug:
            traceback.print_exc()
        out.error(f"a bug in rfaas: {type(error).__name__}: {error}", kind=type(error).__name__,
                  hint="run it again with --debug and report what it prints")
        return output.BUG
    return output.OK
