"""`rfaas manager`: what the command does once its options are parsed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfaas_mpi.config import user_id
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.remote import Address
from rfaas_mpi.slurm.facts import hosts

__all__ = ["key", "retire", "rotate", "serve"]


def _need_the_extra() -> None:
    """ConfigError that says what to install, where the manager's libraries are not there."""
    try:
        import aiohttp  # noqa: F401
        import cryptography  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the manager needs {error.name}, which isn't installed",
                          hint="pip install 'rfaas_mpi[cluster]'") from None


def _need_psycopg() -> None:
    """ConfigError that says what to install, where PostgreSQL's library is not there."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--store needs psycopg, which can't be loaded: {error}",
                          hint="pip install 'rfaas_mpi[cluster,postgres]'") from None


def serve(*, directory: Path | None, socket: Path | None, listen: tuple[str, ...], keys: tuple[str, ...], munge: bool,
          names: tuple[str, ...], tls_cert: Path | None, tls_key: Path | None, metrics: str | None, policy: Path | None,
          store: str | None, slurm: bool, ready: Callable[[dict[str, Any], list[str]], None]) -> None:
    """Runs the manager until it is told to end; `ready` gets its facts once it listens."""
    _need_the_extra()
    if store is not None:
        _need_psycopg()
    if slurm:
        # Said now, and not when the first job is planned.
        hosts("n1")
    from rfaas_mpi.manager import daemon
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    state = daemon.state_directory(directory)
    settings = Settings.load()
    options = daemon.Options(
        directory=state, socket=daemon.socket_path(socket, state),
        listen=tuple(Address.parse(each, port_0=True) for each in listen), tls_cert=tls_cert, tls_key=tls_key,
        keys=dict(map(_key, keys)), munge=(settings.munge_socket or "") if munge else None, names=names,
        metrics=None if metrics is None else Address.parse(metrics, port_0=True), policy=policy,
        store=store, slurm=slurm, usage_days=settings.usage_days)

    def listening(facts: daemon.Facts) -> None:
        data = {"running": True, "directory": str(facts.directory), "listening": list(facts.listening),
                "metrics": facts.metrics or None, "store": facts.store}
        lines = [f"rfaas manager: listening on {', '.join(facts.listening)}; state in {facts.directory}"]
        ready(data, lines + ([f"rfaas manager: metrics at {facts.metrics}"] if facts.metrics else []))

    daemon.run(options, listening)


def _key(text: str) -> tuple[int, Path]:
    user, separator, file = text.partition("=")
    if not user or not separator or not file:
        raise ConfigError(f"{text!r} names no key of a user", hint="it looks like USER=FILE")
    return user_id(user), Path(file)


# --- keys ---------------------------------------------------------------------

def key(directory: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The public keys of a manager's directory."""
    return _keys(directory, lambda keys, state: keys.show(state))


def rotate(directory: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The same, with a next one."""
    return _keys(directory, lambda keys, state: keys.rotate(state))


def retire(directory: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The same, without the older one."""
    return _keys(directory, lambda keys, state: keys.retire(state))


def _keys(directory: Path | None, act: Callable[[Any, Path], tuple[bytes, ...]]) -> tuple[dict[str, Any], list[str]]:
    _need_the_extra()
    from rfaas_mpi.manager import daemon, keys
    state = daemon.state_directory(directory)
    public = act(keys, state)
    names = ("in use", "next")
    data = {"directory": str(state), "keys": [{"id": keys.name_of(each), "public": each.hex(), "use": use}
                                              for each, use in zip(public, names, strict=False)]}
    return data, [f"{one['id']}  {one['use']:<6}  {one['public']}" for one in data["keys"]]
