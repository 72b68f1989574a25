"""`rfaas agent`: a node's agent, in the foreground."""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import socket as sockets
from pathlib import Path
from typing import Any

import click

from rfaas_mpi.cli.output import Output
from rfaas_mpi.cli.shape import common, examples

__all__ = ["agent", "serve"]

SITE_DIRECTORY = Path("/run/rfaas")


@click.command(epilog=examples("rfaas agent --manager unix:/run/rfaas/manager.sock",
                               "rfaas agent --manager https://head:4712 --listen 0.0.0.0:4711 --cores 2-31"))
@click.option("--manager", metavar="ADDRESS", default=None,
              help="The manager: unix:/PATH, http(s)://HOST:PORT.  [default: RFAAS_MANAGER]")
@click.option("--listen", metavar="HOST:PORT", multiple=True,
              help="Listen on TCP too, for ranks on other nodes; port 0 is any that is free.")
@click.option("--socket", metavar="PATH", default=None,
              help="Where ranks of this node come in; none: they use TCP.  [default: socket in the directory]")
@click.option("--node", metavar="NAME", default=None, help="What this node is called.  [default: the host's name]")
@click.option("--cores", metavar="LIST", default=None,
              help="Lend exactly these cores, like 2-5,8.  [default: those that no batch job needs]")
@click.option("--keep", metavar="LIST", default=None,
              help="Cores for the agent itself, which are never lent.  [default: the first physical core]")
@click.option("--grace", "grace_s", metavar="SECONDS", type=click.FloatRange(0, 86400), default=0.0, show_default=True,
              help="How long what runs on a core may go on that is wanted back.")
@click.option("--priority", type=click.Choice(["auto", "low", "normal"]), default="auto", show_default=True,
              help="Of workers, beside what else runs on their cores; auto: normal on cores that are named, else low.")
@click.option("--metrics", metavar="ADDRESS", default="",
              help="Where Prometheus finds /metrics, without proving who it is: HOST:PORT, unix:/PATH.  [default: nowhere]")
@click.option("--until", metavar="TIME", type=click.DateTime(["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M"]), default=None,
              help="Lend until then (2026-11-23T16:30, local time): no lease goes on beyond it.  [default: without end]")
@click.option("--hook", metavar="DIRECTORY", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Where Slurm's Prolog and Epilog find it.  [default: they don't]")
@click.option("--directory", metavar="DIRECTORY", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Its files.  [default: agent-NODE in /run/rfaas for root, else in the runtime directory]")
@click.option("--foreground", is_flag=True, hidden=True, expose_value=False, help="The default.")
@common
@click.pass_obj
def agent(out: Output, **options: Any) -> None:
    """Lend this node's spare cores, in the foreground.

    It tells the manager what there is to lend, and runs the workers of ranks
    that come with the manager's grant. Cores that their owner wants back are
    free at once, whether the manager can be reached or not. It ends with
    SIGTERM or Ctrl-C: what runs is stopped, and ranks run it elsewhere.

    Needs the extra `cluster`: pip install 'rfaas_mpi[cluster]'.
    """
    def ready(data: dict[str, Any]) -> None:
        cores = ",".join(map(str, data["cores"])) or "nothing"
        line = f"rfaas agent: node {data['node']} lends {cores}; listening on {', '.join(data['listening'])}"
        out.progress(line)
        if data["metrics"]:
            out.progress(f"rfaas agent: metrics at {data['metrics']}")
        if out.json:
            out.answer(data, [line])

    serve(ready, **options)


def serve(ready: Any, *, manager: str | None, listen: tuple[str, ...], socket: str | None, node: str | None,
          cores: str | None, keep: str | None, grace_s: float, priority: str, metrics: str,
          directory: Path | None, hook: Path | None = None, deaf: tuple[int, ...] = (),
          until: datetime.datetime | None = None, window: Any = None, **given: Any) -> None:
    """Runs the agent until it is told to end; `ready` gets its facts once it listens. `given` are settings.

    No lease outlives the `window`, or the moment in `until`.
    """
    _need_the_extra()
    from rfaas_mpi.agent import daemon
    from rfaas_mpi.config import Settings
    from rfaas_mpi.remote import Address
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    settings = Settings.load(manager=manager, **given)
    name = node or sockets.gethostname().partition(".")[0]
    place = directory.absolute() if directory is not None else _directory(settings) / f"agent-{name}"
    place.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    unix = socket != "none"
    daemon.run(daemon.Options(
        directory=place, node=name, socket=Path(socket).absolute() if socket is not None and unix else None, unix=unix,
        listen=tuple(Address.parse(each, port_0=True) for each in listen), cores=_cores("--cores", cores),
        keep=_cores("--keep", keep), grace_s=grace_s,
        low_priority={"auto": None, "low": True, "normal": False}[priority], metrics=metrics,
        hook=None if hook is None else hook.absolute(), deaf=deaf), settings, ready, _window(until, window))


def _window(until: datetime.datetime | None, window: Any) -> Any:
    from rfaas_mpi.agent.window import Window
    if until is not None:
        window = Window()
        window.tell_wall(until.timestamp())
    return window


def _directory(settings: Any) -> Path:
    from rfaas_mpi.session import runtime_directory
    return SITE_DIRECTORY if os.geteuid() == 0 and settings.runtime_dir is None else runtime_directory(settings)


def _cores(option: str, text: str | None) -> tuple[int, ...] | None:
    from rfaas_mpi.config import core_list
    if text is None:
        return None
    try:
        return core_list(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _need_the_extra() -> None:
    """ConfigError that says what to install, where the agent's libraries are not there."""
    from rfaas_mpi.errors import ConfigError
    for name in ("cryptography", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the agent needs {name}, which isn't installed",
                              hint="pip install 'rfaas_mpi[cluster]'")
