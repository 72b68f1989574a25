"""A worker that is small enough to see through: it adopts a connection and does what the lines on it say.

The process around it is the real one; only what it serves is replaced (see `tiny_workers` in test_service.py).
"""

import ctypes  # noqa: F401  (for the lines)
import mmap
import os  # noqa: F401
import signal  # noqa: F401
import socket
import struct
import sys  # noqa: F401
import time

FRAME = struct.Struct("<IHHQ")
READY, LIMITS, GONE, ADOPT, QUIT = 48, 49, 50, 40, 41


class Tiny:
    def __init__(self, agent_fd, page_fd):
        self.agent = socket.socket(fileno=agent_fd)
        self.page = memoryview(mmap.mmap(page_fd, 4096)).cast("Q")
        self.connection = 0

    def send(self, kind, body=b""):
        self.agent.sendall(FRAME.pack(len(body), kind, 0, 0) + body)

    def run(self, invocation, limit_s=None):
        """From here on the page says that this invocation runs."""
        self.page[1] = 2 << 32 | self.connection
        self.page[2] = time.monotonic_ns()
        self.page[3] = 0 if limit_s is None else time.monotonic_ns() + int(limit_s * 1e9)
        self.page[0] = invocation
        if limit_s is not None:
            self.send(LIMITS)

    def idle(self):
        self.page[0] = 0
        self.page[6] += 1

    def serve(self):
        self.send(READY)
        while True:
            head, fds, _, _ = socket.recv_fds(self.agent, FRAME.size, 2)
            if not head:
                return 0
            length, kind, _, _ = FRAME.unpack(head)
            body = self.agent.recv(length) if length else b""
            if kind == QUIT:
                return 0
            assert kind == ADOPT, kind
            _, self.connection, _ = struct.unpack("<QII", body)
            self.data = socket.socket(fileno=fds[1]) if len(fds) > 1 else None
            with socket.socket(fileno=fds[0]) as rank, rank.makefile("rw") as lines:
                for line in lines:
                    word, _, rest = line.strip().partition(" ")
                    if word == "eval":
                        lines.write(repr(eval(rest, globals(), {"tiny": self})) + "\n")
                        lines.flush()
                    else:
                        exec(rest, globals(), {"tiny": self})
            if self.data is not None:
                self.data.close()
            self.send(GONE, struct.pack("<II", self.connection, 0))


class Ready:
    def serve(self, agent_fd, page_fd):
        return Tiny(agent_fd, page_fd).serve()
