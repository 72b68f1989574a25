"""A manager for tests of who calls it: a real ManagerServer in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rfaas_mpi.manager.cluster import Policy
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.server import ManagerServer
from rfaas_mpi.remote import Address

GUARD_S = 60.0
ME = os.geteuid()


class Managed:
    """Serves from `with` to its end, with `callers` on a port of 127.0.0.1, too: behind TLS if there is a context."""

    def __init__(self, directory: Path, *, tls: ssl.SSLContext | None = None, **options: Any) -> None:
        self.directory = directory
        self.socket = directory / "manager.sock"
        self.network = ""                    # http://127.0.0.1:PORT
        self.server: ManagerServer | None = None
        self._tls = tls
        self._options = {"policy": Policy(lenders=frozenset((ME,)), admins=frozenset((ME,))), **options}
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="manager")

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def __enter__(self) -> Managed:
        self._thread.start()
        assert self._ready.wait(GUARD_S), "the manager doesn't start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(GUARD_S)
        assert not self._thread.is_alive(), "the manager doesn't end"

    def do(self, what: Callable[[ManagerServer], Any]) -> Any:
        """Has the manager's own loop call it."""
        async def called() -> Any:
            return what(self.server)
        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(GUARD_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with ManagerServer(Ledger(self.directory / "ledger.db"), **self._options) as self.server:
            await self.server.listen_unix(self.socket)
            if "callers" in self._options:
                self.network = await self.server.listen_network(Address("127.0.0.1", 0), self._tls)
            self._ready.set()
            await self._end.wait()
