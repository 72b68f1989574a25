"""The commands that make and use a cluster: the manager itself, and what people ask it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rfaas_mpi.cli.agent import agent
from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.shape import Ordered, common, examples
from rfaas_mpi.cli.slurm import slurm

__all__ = ["COMMANDS"]

_FILE = click.Path(dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


# --- the manager -----------------------------------------------------------------

def _directory(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--directory", metavar="DIRECTORY", type=_DIRECTORY, default=None,
                        help="The manager's state.  [default: /var/lib/rfaas for root, else ~/.local/state/rfaas]"
                        )(command)


def _named(context: click.Context) -> Path | None:
    """The directory that this command, or one around it, was given."""
    found: click.Context | None = context
    while found is not None:
        if (directory := found.params.get("directory")) is not None:
            return directory
        found = found.parent
    return None


@click.group(invoke_without_command=True, epilog=examples(
    "rfaas manager --directory ~/manager",
    "rfaas manager --listen 10.0.0.1:4712 --munge",
    "rfaas manager --listen 10.0.0.1:4712 --key alice=alice.key",
    "rfaas manager --listen 10.0.0.2:4712 --munge --store postgresql://db/rfaas"))
@_directory
@click.option("--socket", metavar="PATH", type=_FILE, default=None,
              help="Where it listens.  [default: /run/rfaas/manager.sock with the site's directory, else manager.sock "
                   "in the directory]")
@click.option("--listen", metavar="HOST:PORT", multiple=True, help="Listen on a network too; port 0 is any.")
@click.option("--key", "keys", metavar="USER=FILE", multiple=True,
              help="Who knows the key in this file is that user, on the network; made if missing.")
@click.option("--munge", is_flag=True, help="Believe MUNGE who calls on the network.")
@click.option("--name", "names", metavar="HOST:PORT", multiple=True,
              help="What callers call it besides its host's name and address, where a proxy stands before it.")
@click.option("--tls-cert", metavar="FILE", type=_FILE, default=None, help="Certificate for the network, PEM.")
@click.option("--tls-key", metavar="FILE", type=_FILE, default=None, help="Its private key.")
@click.option("--slurm", is_flag=True, help="Read what Slurm plans, so that leases end before the jobs that are planned for their nodes, and "
                   "whose jobs lend what they leave idle.")
@click.option("--store", metavar="URL", default=None,
              help="Keep leases and accounts in this PostgreSQL database, where other managers may stand by: "
                   "postgresql://USER@HOST/DATABASE, without a password.")
@click.option("--policy", metavar="FILE", type=_FILE, default=None,
              help="Who lends, who administers, quotas, placement: a TOML file, read at the start.")
@click.option("--metrics", metavar="HOST:PORT", default=None,
              help="Where Prometheus finds /metrics, and nothing else, without proving who it is.")
@click.option("--foreground", is_flag=True, hidden=True, expose_value=False, help="The default.")
@common
@click.pass_context
def manager(context: click.Context, **options: Any) -> None:
    """Run a cluster's resource manager, in the foreground.

    It knows which cores the agents of all nodes lend, grants leases on them,
    and keeps what it must not forget in its directory. It ends with SIGTERM or
    Ctrl-C, and goes on where it was when it is started again; leases run on
    meanwhile.

    Who calls on its socket is who the kernel says he is; on a network callers
    prove it with MUNGE or a key of theirs, and without either it doesn't listen
    there. Needs the extra `cluster`: pip install 'rfaas_mpi[cluster]'.
    """
    if context.invoked_subcommand is not None:
        return
    from rfaas_mpi.cli import manager as daemon
    out: Output = context.obj

    def ready(data: dict[str, Any], lines: list[str]) -> None:
        for line in lines:
            out.progress(line)
        if out.json:
            out.answer(data, lines)

    daemon.serve(**options, ready=ready)


@manager.group("key", invoke_without_command=True, epilog=examples("rfaas manager key", "rfaas manager key rotate"))
@_directory
@common
@click.pass_context
def key(context: click.Context, **_options: Any) -> None:
    """Show the public keys with which a manager signs what it grants."""
    if context.invoked_subcommand is None:
        from rfaas_mpi.cli import manager as daemon
        context.obj.answer(*daemon.key(_named(context)))


@key.command("rotate", epilog=examples("rfaas manager key rotate"))
@_directory
@common
@click.pass_context
def key_rotate(context: click.Context, **_options: Any) -> None:
    """Make the next key.

    A manager that runs tells its agents of it with their next reports, and
    signs with it for each one that knows it. The older key is believed until
    `rfaas manager key retire`.
    """
    from rfaas_mpi.cli import manager as daemon
    context.obj.answer(*daemon.rotate(_named(context)))


@key.command("retire", epilog=examples("rfaas manager key retire"))
@_directory
@common
@click.pass_context
def key_retire(context: click.Context, **_options: Any) -> None:
    """Remove the older of two keys.

    Agents stop believing it. Give them a minute after `rotate` before: one that
    has not heard of the next key believes no new lease until its next report.
    """
    from rfaas_mpi.cli import manager as daemon
    context.obj.answer(*daemon.retire(_named(context)))


# --- what people ask it ------------------------------------------------------------

def asked(command: Callable[..., Any]) -> Callable[..., Any]:
    """--manager, and what every command has."""
    return common(click.option("--manager", metavar="ADDRESS", default=None,
                               help="unix:/PATH, http(s)://HOST:PORT.  [default: RFAAS_MANAGER]")(command))


_grace = click.option("--grace", "grace_s", metavar="SECONDS", type=click.FloatRange(0, 86400), default=0.0,
                      show_default=True, help="How long what runs there may go on.")
_number = click.argument("number", metavar="LEASE", type=click.IntRange(min=1))


@click.group("lease", cls=Ordered, epilog=examples("rfaas lease ls", "rfaas lease revoke 1700000012"))
def lease() -> None:
    """Show and take back leases of a cluster.

    Yours; everybody's, for an administrator.
    """


@lease.command("ls", epilog=examples("rfaas lease ls", "rfaas lease ls --json"))
@asked
@click.pass_obj
def lease_ls(out: Output, manager: str | None) -> None:
    """List live leases."""
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.leases(manager))


@lease.command("show", epilog=examples("rfaas lease show 1700000012"))
@_number
@asked
@click.pass_obj
def lease_show(out: Output, number: int, manager: str | None) -> None:
    """Show one lease, also one that ended within the last hour."""
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.lease(manager, number))


@lease.command("explain", epilog=examples("rfaas lease explain --workers 4",
                                         "rfaas lease explain --workers 1:16 --cores 2 --duration 600"))
@click.option("--workers", metavar="N | MIN:MAX", default="1", show_default=True, help="How many would be asked for.")
@click.option("--cores", type=click.IntRange(1), default=1, show_default=True, help="Cores of each.")
@click.option("--memory", metavar="SIZE", default=None, help="Memory of each, like 2GiB.  [default: a fair share]")
@click.option("--duration", "duration_s", metavar="S", type=click.FloatRange(0, min_open=True), default=None,
              help="For how long they would be kept.")
@click.option("--least", "least_s", metavar="S", type=click.FloatRange(0), default=0.0,
              help="No node that is wanted back sooner.")
@click.option("--at", metavar="HOST", default=None, help="Where the rank would run.  [default: here]")
@asked
@click.pass_obj
def lease_explain(out: Output, manager: str | None, **options: Any) -> None:
    """Say where workers would go now, and why not elsewhere; nothing is leased.

    For each node the seconds that a worker would lose there, or every reason
    against it.
    """
    from rfaas_mpi.cli import explain
    out.answer(*explain.explain(manager, **options))


@lease.command("revoke", epilog=examples("rfaas lease revoke 1700000012 --grace 2"))
@_number
@_grace
@asked
@click.pass_obj
def lease_revoke(out: Output, number: int, grace_s: float, manager: str | None) -> None:
    """Take a lease back: its workers stop, what ran there runs elsewhere."""
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.revoke(manager, number, grace_s))


def _nodes(nodes: tuple[str, ...], every: bool) -> tuple[str, ...]:
    if bool(nodes) == every:
        raise click.UsageError("name nodes, or say --all")
    return nodes


@click.command(epilog=examples("rfaas drain nid00042 --grace 5", "rfaas drain --all"))
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every node.")
@_grace
@asked
@click.pass_obj
def drain(out: Output, nodes: tuple[str, ...], every: bool, grace_s: float, manager: str | None) -> None:
    """Take back all that nodes lend, until undrain.

    Nothing is lent there from now on. For administrators. It stays so, over restarts too, until `rfaas undrain`.
    """
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.drain(manager, _nodes(nodes, every), grace_s))


@click.command(epilog=examples("rfaas undrain nid00042", "rfaas undrain --all"))
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every node.")
@asked
@click.pass_obj
def undrain(out: Output, nodes: tuple[str, ...], every: bool, manager: str | None) -> None:
    """Let drained nodes lend again. For administrators."""
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.undrain(manager, _nodes(nodes, every)))


@click.command(epilog=examples("rfaas usage --by kernel", "rfaas usage --since 2026-11-01 --until 2026-12-01",
                               "rfaas usage --by job --since P7D --json"))
@click.option("--by", type=click.Choice(["user", "job", "kernel", "node", "lease"]), default="user", show_default=True,
              help="What a line stands for.")
@click.option("--since", metavar="DAY", help="From that day on (UTC): 2026-11-01, or P7D, P2W, P1M, P1Y ago.")
@click.option("--until", metavar="DAY", help="Before that day.  [default: up to now]")
@asked
@click.pass_obj
def usage(out: Output, by: str, since: str | None, until: str | None, manager: str | None) -> None:
    """Show what workers used: you; everybody, for an administrator.

    Without a day, all of the last 30.
    """
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.usage(manager, by, since, until))


@click.command(epilog=examples("rfaas policy"))
@asked
@click.pass_obj
def policy(out: Output, manager: str | None) -> None:
    """Show who may lend to all, and who administers."""
    from rfaas_mpi.cli import cluster
    out.answer(*cluster.policy(manager))


@click.command(epilog=examples("rfaas logs -f", "rfaas logs --node nid00042 --since P1D",
                               "rfaas logs --lease 12 --json"))
@click.option("--node", metavar="NODE", help="Of leases on that node only.")
@click.option("--lease", type=click.IntRange(min=1), metavar="LEASE", help="Of that lease only.")
@click.option("--since", metavar="WHEN", help="From that day on (UTC): 2026-11-01, P7D, P2W, P1M, P1Y ago; "
                                              "or PT12H, PT30M ago.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C; a JSON object each time.")
@asked
@click.pass_obj
def logs(out: Output, node: str | None, lease: int | None, since: str | None, follow: bool,
         manager: str | None) -> None:
    """Show what became of your leases, and when.

    Workers that were taken back, expired or were lost with their node, of the last 30 days. An administrator sees all.
    """
    from rfaas_mpi.cli import cluster
    cluster.log(manager, follow=follow, say=out.answer, node=node, lease=lease, since=since)


COMMANDS = (manager, agent, lease, drain, undrain, usage, policy, logs, slurm)
