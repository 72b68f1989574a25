"""A manager to kill: ManagerServer in a process of its own.

    python manager_process.py DIRECTORY [tls]     listens on DIRECTORY/manager.sock, ends with its stdin

With DIRECTORY/options.json ({"keys": {UID: FILE}, "munge": SOCKET, "port": PORT,
"names": […], "audit": FILE}) it listens on a port of 127.0.0.1, too; with tls, by
DIRECTORY/cert.pem and key.pem. Says where on a line of stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rfaas_mpi.manager.callers import Callers
from rfaas_mpi.manager.cluster import Policy
from rfaas_mpi.manager.keys import Keys
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.server import ManagerServer
from rfaas_mpi.remote import Address


async def serve(directory: Path, tls: bool) -> None:
    given = directory / "options.json"
    options = json.loads(given.read_text()) if given.exists() else {}
    port = options.pop("port", None)
    callers = Callers(**{**options, "keys": {int(uid): Path(path) for uid, path in options.get("keys", {}).items()},
                         "audit": Path(options["audit"]) if "audit" in options else None})
    policy = Policy(lenders=frozenset((os.geteuid(),)), admins=frozenset((os.geteuid(),)))
    path = directory / "manager.sock"
    path.unlink(missing_ok=True)
    server = ManagerServer(Ledger(directory / "ledger.db"), keys=Keys.of(directory), policy=policy, callers=callers)
    async with server:
        await server.listen_unix(path)
        where = ""
        if port is not None:
            context = None
            if tls:
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
            where = await server.listen_network(Address("127.0.0.1", port), context)
        print(json.dumps({"unix": f"unix:{path}", "network": where}), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()


class ManagerProcess:
    """Starts one; `unix` and `network` are its addresses."""

    def __init__(self, directory: Path, *, tls: bool = False, **options: Any) -> None:
        if options:
            (directory / "options.json").write_text(json.dumps(options, default=str))
        self._process = subprocess.Popen([sys.executable, __file__, str(directory), *(["tls"] if tls else [])],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, "the manager didn't start"
        where = json.loads(said)
        self.unix, self.network = where["unix"], where["network"]

    def __enter__(self) -> ManagerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.kill()

    def stop(self) -> None:
        """SIGSTOP: it is there, and does nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL; safe to call twice."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2:] == ["tls"]))
