"""Somebody on the way between a rank and a service."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from rfaas_mpi.remote import Address

GUARD_S = 60.0


@contextlib.contextmanager
def proxy(address: Address, turn_bit_at: int = -1) -> Iterator[tuple[Address, bytearray]]:
    """Somebody on the way to a service: what went from ranks to it, and, if asked, one bit that it turned."""
    seen = bytearray()
    lock = threading.Lock()
    threads: list[threading.Thread] = []
    ends: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket, outwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if outwards:
                    with lock:
                        at = turn_bit_at - len(seen)
                        seen.extend(data)
                    if 0 <= at < len(data):
                        data[at] ^= 1
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                rank, _ = listener.accept()
                service = socket.create_connection(address)
                ends.extend((rank, service))
                for a, b, outwards in ((rank, service, True), (service, rank, False)):
                    threads.append(threading.Thread(target=pump, args=(a, b, outwards)))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield Address("127.0.0.1", listener.getsockname()[1]), seen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(GUARD_S)
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(GUARD_S)
            for end in ends:
                end.close()
