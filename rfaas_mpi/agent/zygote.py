"""The fork server: an interpreter like the rank's, with everything imported, that forks workers in milliseconds.

It is exec'ed by the service, is single-threaded, opens no fabric, and is the
parent of its workers: it alone can reap them. One socket pair (datagrams that
keep their boundaries) leads to the service; its end is the end of everything.

    service ── exec, setup in a memfd ──▶ zygote ── zygote_ready ──▶ service
            ── fork + 3 descriptors ──▶         ── forked + pidfd, exited ──▶
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import traceback

from rfaas_mpi import messages as msg

__all__ = ["main", "serve"]

DATAGRAM_BYTES = 1 << 20


def main(fd: int, setup_fd: int, parent: int) -> None:
    """Entry of the exec'ed interpreter: never returns. `setup_fd` holds a ZygoteSetup, `fd` is the channel."""
    from rfaas_mpi.agent import child
    child.die_with_parent(parent)
    child.adopt_orphans()
    child.name_process("rfaas-zygote")
    os.set_inheritable(fd, False)
    channel = socket.socket(fileno=fd)
    status = 1
    try:
        with open(setup_fd, "rb") as file:
            file.seek(0)
            setup = msg.unpack_to_zygote(file.read())
        assert isinstance(setup, msg.ZygoteSetup)
        _become_like_the_rank(setup)
        status = serve(channel)
    except ConnectionError:
        status = 0
    except BaseException:
        text = traceback.format_exc()
        sys.stderr.write(text)
        sys.stderr.flush()
        _say(channel, msg.ZygoteProblem(0, text[-4000:]))
    finally:
        os._exit(status)


def _become_like_the_rank(setup: msg.ZygoteSetup) -> None:
    os.environ.clear()
    os.environ.update((os.fsdecode(name), os.fsdecode(value)) for name, value in setup.environment)
    sys.path[:] = [os.fsdecode(entry) for entry in setup.path]
    sys.argv[:] = ["rfaas-worker"]


def _import_all() -> None:
    """Everything that a worker needs and that costs time to import."""
    import cloudpickle  # noqa: F401
    import numpy  # noqa: F401
    import numpy.random  # noqa: F401
    import threadpoolctl  # noqa: F401

    import rfaas_mpi.worker.main  # noqa: F401


def threads() -> int:
    """Threads of this process, of whatever origin."""
    return len(os.listdir("/proc/self/task"))


class _Zygote:
    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.workers: dict[int, int] = {}        # pid → worker

    def fork(self, order: msg.ForkWorker, fds: list[int]) -> None:
        """Forks one worker and tells the service, with a pidfd, before it can be reaped."""
        agent_fd, page_fd, output_fd = fds
        if threads() != 1:
            _say(self.channel, msg.ZygoteProblem(
                order.worker, f"{threads()} threads run in the zygote: forking now could lock up the worker; "
                              "a module that was imported there started them"))
            return
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_worker(order, agent_fd, page_fd, output_fd, parent)
        self.workers[pid] = order.worker
        pidfd = os.pidfd_open(pid)
        try:
            _say(self.channel, msg.WorkerForked(order.worker, pid), [pidfd])
        finally:
            os.close(pidfd)

    def reap(self) -> None:
        """Tells of every worker that ended, once nothing that it started runs any more."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            worker = self.workers.pop(pid, None)
            if worker is not None:
                # Its number is not free before it is reaped, so this hits its own group only.
                _kill_group(pid)
            _, _, usage = os.wait4(pid, 0)
            if worker is not None:
                killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                _say(self.channel, msg.WorkerExited(
                    worker, pid, signal=ended.si_status if killed else 0,
                    exit_code=0 if killed else ended.si_status,
                    cpu_s=usage.ru_utime + usage.ru_stime, max_rss_bytes=usage.ru_maxrss << 10))
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Ends what dead workers left behind, whatever session it moved to; theirs come to us, the subreaper."""
        for pid in _children():
            if pid in self.workers:
                continue
            try:
                if os.getsid(pid) in self.workers:
                    continue          # started by a kernel that still runs
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def kill_all(self) -> None:
        for pid in list(self.workers):
            _kill_group(pid)
            os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return                        # it did not get as far as setsid, or nothing is left


def _say(channel: socket.socket, message: object, fds: list[int] | None = None) -> None:
    socket.send_fds(channel, [msg.pack_plain(message)], fds or [])  # type: ignore[arg-type]


def _run_worker(order: msg.ForkWorker, agent_fd: int, page_fd: int, output_fd: int, parent: int) -> None:
    """In the fork: becomes the worker, never returns."""
    status = 70
    try:
        from rfaas_mpi.agent import child
        child.become_worker(order.worker, order.cores, order.memory_bytes, agent_fd, page_fd, output_fd, parent)
        child.forbid_mpi()
        from rfaas_mpi.worker.main import main as serve_kernels
        status = serve_kernels(child.AGENT_FD, child.PAGE_FD, order.cores)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue              # nobody reads it any more
        os._exit(status & 0xFF)


def serve(channel: socket.socket) -> int:
    """Forks on demand until the service is gone; returns the exit status."""
    import gc

    _import_all()
    if threads() != 1:
        _say(channel, msg.ZygoteProblem(0, f"importing a worker's modules left {threads()} threads running"))
        return 1
    # What is imported stays shared between all workers: the collector would
    # touch, and so copy, every page of it.
    gc.collect()
    gc.freeze()

    wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    zygote = _Zygote(channel)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_r, selectors.EVENT_READ)
    _say(channel, msg.ZygoteReady(os.getpid()))
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                data, fds, _, _ = socket.recv_fds(channel, DATAGRAM_BYTES, 3)
                if not data:
                    zygote.kill_all()
                    return 0
                try:
                    order = msg.unpack_to_zygote(data)
                    if isinstance(order, msg.ForkWorker):
                        zygote.fork(order, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
            else:
                try:
                    os.read(wake_r, 4096)
                except BlockingIOError:
                    continue
                zygote.reap()
