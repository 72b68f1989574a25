"""The fork server: an interpreter like the rank's, with everything imported, that forks workers in milliseconds.

It is exec'ed by the service, is single-threaded, opens no fabric, and is the
parent of its workers: it alone can reap them. One socket pair (datagrams that
keep their boundaries) leads to the service; its end is the end of everything.

    service ── exec, setup in a memfd ──▶ zygote ── zygote_ready ──▶ service
            ── fork + descriptors ────▶         ── forked + pidfd, exited ──▶
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import selectors
import signal
import socket
import sys
import traceback

from rfaas_mpi import config
from rfaas_mpi import messages as msg
from rfaas_mpi._version import __version__
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.priority import LowPriority, Means

__all__ = ["main", "serve"]

DATAGRAM_BYTES = 1 << 16
FDS_MAX = 8                          # of an order: three, and the entrances of the worker's group
SPARE_AFTER_S = 0.02

# Its number, where struct rusage is eighteen words.
_WAITID = {"x86_64": 247, "aarch64": 95}.get(os.uname().machine) if sys.maxsize >> 32 else None
_libc = ctypes.CDLL(None, use_errno=True)


def main(fd: int, setup_fd: int, parent: int) -> None:
    """Entry of the exec'ed interpreter: never returns. `setup_fd` holds a ZygoteSetup, `fd` is the channel."""
    from rfaas_mpi.agent import child
    child.die_with_parent(parent)
    child.adopt_orphans()
    child.name_process("rfaas-zygote")
    # Signals that are the agent's alone, for the workers, too: it ends us as it was told to.
    for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()) & child.MAY_BE_DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    channel = socket.socket(fileno=fd)
    status = 1
    try:
        with open(setup_fd, "rb") as file:
            file.seek(0)
            setup = msg.unpack_to_zygote(file.read())
        assert isinstance(setup, msg.ZygoteSetup)
        _become_like_the_rank(setup)
        status = serve(channel, _low_priority(setup, channel), tell_spares=setup.spares)
    except ConnectionError:
        status = 0
    except BaseException:
        text = traceback.format_exc()
        sys.stderr.write(text)
        sys.stderr.flush()
        _say(channel, msg.ZygoteProblem(0, text[-4000:]))
    finally:
        os._exit(status)


def _low_priority(setup: msg.ZygoteSetup, channel: socket.socket) -> LowPriority:
    """What workers take. Their entrance to a group is passed here: whatever started us need not know of it."""
    means = Means(setup.low) if setup.low else None
    if not setup.low_group:
        return LowPriority(means)
    data, fds, _, _ = socket.recv_fds(channel, DATAGRAM_BYTES, 1)
    if not data:
        raise ConnectionError("the agent is gone")
    assert isinstance(msg.unpack_to_zygote(data), msg.Entrance)
    return LowPriority(means, setup.low_group, fds[0])


def _become_like_the_rank(setup: msg.ZygoteSetup) -> None:
    os.environ.clear()
    os.environ.update((os.fsdecode(name), os.fsdecode(value)) for name, value in setup.environment)
    sys.path[:] = [os.fsdecode(entry) for entry in setup.path]
    sys.argv[:] = ["rfaas-worker"]


def _import_all() -> None:
    """Everything that a worker needs and that costs time to import."""
    import cloudpickle  # noqa: F401
    import numpy.random  # noqa: F401
    import threadpoolctl  # noqa: F401

    import rfaas_mpi.worker.main  # noqa: F401


def threads() -> int:
    """Threads of this process, of whatever origin."""
    return len(os.listdir("/proc/self/task"))


class _Zygote:
    def __init__(self, channel: socket.socket, plan: sandbox.Plan, low: LowPriority, tell_spares: bool) -> None:
        self.channel = channel
        self.plan = plan
        self.low = low
        self.tell_spares = tell_spares
        needs_scratch = plan.landlock is not None and plan.landlock.scratch
        self.scratch = sandbox.Scratch() if needs_scratch else None
        self.workers: dict[int, int] = {}        # pid → worker
        self.spare: tuple[int, socket.socket] | None = None

    def fork(self, data: bytes, fds: list[int]) -> None:
        """Makes one worker of the spare fork, else of a new one; tells the service, with a pidfd, before it can be
        reaped."""
        order = msg.unpack_to_zygote(data)
        assert isinstance(order, msg.ForkWorker)
        try:
            pid = self._order_spare(order, data, fds) or self._fork(order, fds)
        except RuntimeError as error:
            _say(self.channel, msg.ZygoteProblem(order.worker, str(error)))
            return
        self.workers[pid] = order.worker
        pidfd = os.pidfd_open(pid)
        try:
            _say(self.channel, msg.WorkerForked(order.worker, pid), [pidfd])
        finally:
            os.close(pidfd)

    def _fork(self, order: msg.ForkWorker | None, fds: list[int]) -> int:
        """A child that becomes the worker at once, or, without an order, the spare one."""
        if threads() != 1:
            raise RuntimeError(f"{threads()} threads run in the zygote: forking now could lock up the worker; "
                               "a module that was imported there started them")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_worker(order, fds, theirs, parent, self.plan, self.scratch, self.low)
        theirs.close()
        if order is None:
            self.spare = pid, ours
        else:
            ours.close()
        return pid

    def _order_spare(self, order: msg.ForkWorker, data: bytes, fds: list[int]) -> int:
        """Its pid; 0 if there is none."""
        if self.spare is None:
            return 0
        (pid, channel), self.spare = self.spare, None
        with channel:
            try:
                # While it sleeps, so that it wakes up where it belongs: to move by itself takes half a millisecond.
                os.sched_setaffinity(pid, order.cores)
                socket.send_fds(channel, [data], fds)
            except OSError:
                return 0              # it was killed; it will be reaped like any other
        return pid

    def make_spare(self) -> None:
        """Forks the next worker ahead of its order."""
        if self.spare is not None:
            return
        pid = self._fork(None, [])
        if self.tell_spares:
            pidfd = os.pidfd_open(pid)
            try:
                _say(self.channel, msg.SpareForked(pid), [pidfd])
            finally:
                os.close(pidfd)

    def reap(self) -> bool:
        """Tells of every worker that ended, once nothing that it started runs any more; whether any has."""
        told = False
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return told
            if ended is None:
                return told
            pid = ended.si_pid
            worker = self.workers.pop(pid, None)
            if self.spare is not None and pid == self.spare[0]:
                self.spare[1].close()
                self.spare = None
            if worker is not None:
                # Its number is not free before it is reaped, so this hits its own group only.
                _kill_group(pid)
            cpu_s, max_rss_bytes = _usage(pid)
            if self.scratch is not None:
                self.scratch.remove(pid)
            if worker is not None:
                # Before it is reaped, which may take milliseconds: it holds nothing any more that a job could want.
                killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                _say(self.channel, msg.WorkerExited(
                    worker, pid, signal=ended.si_status if killed else 0,
                    exit_code=0 if killed else ended.si_status, cpu_s=cpu_s, max_rss_bytes=max_rss_bytes))
                told = True
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Ends what dead workers left behind, whatever session it moved to; theirs come to us, the subreaper."""
        for pid in _children():
            if pid in self.workers or (self.spare is not None and pid == self.spare[0]):
                continue
            try:
                if os.getsid(pid) in self.workers:
                    continue          # started by a kernel whose worker lives
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        """Ends every worker, and removes what they were given."""
        for pid in list(self.workers):
            _kill_group(pid)
            os.kill(pid, signal.SIGKILL)
        if self.spare is not None:
            self.spare[1].close()
        if self.scratch is not None:
            for pid in (*self.workers, *([self.spare[0]] if self.spare is not None else [])):
                os.waitpid(pid, 0)    # so that nobody writes there any more
            self.scratch.close()


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _usage(pid: int) -> tuple[float, int]:
    """CPU seconds, and the most bytes, of a child that has ended and those that it reaped; it needn't be reaped for that.

    The kernel tells it by `waitid`, but neither C's library nor Python's passes that on.
    """
    if _WAITID is None:
        _, _, reaped = os.wait4(pid, 0)
        return reaped.ru_utime + reaped.ru_stime, reaped.ru_maxrss << 10
    who, usage = (ctypes.c_char * 128)(), (ctypes.c_long * 18)()
    if _libc.syscall(ctypes.c_long(_WAITID), ctypes.c_long(os.P_PID), ctypes.c_long(pid), who,
                     ctypes.c_long(os.WEXITED | os.WNOWAIT), usage) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return usage[0] + usage[2] + (usage[1] + usage[3]) / 1e6, usage[4] << 10


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return                        # it did not get as far as setsid, or nothing is left


def _say(channel: socket.socket, message: object, fds: list[int] | None = None) -> None:
    socket.send_fds(channel, [msg.pack_plain(message)], fds or [])  # type: ignore[arg-type]


def _run_worker(order: msg.ForkWorker | None, fds: list[int], orders: socket.socket, parent: int,
                plan: sandbox.Plan, scratch: sandbox.Scratch | None, low: LowPriority) -> None:
    """In the fork: becomes the worker that is ordered, now or later; never returns."""
    status = 70
    try:
        from rfaas_mpi.agent import child
        embryo = child.Embryo(parent, [*fds, orders.fileno()], plan, scratch, low)
        from rfaas_mpi.worker.main import Ready
        ready = Ready()
        if order is None:
            data, fds, _, _ = socket.recv_fds(orders, DATAGRAM_BYTES, FDS_MAX)
            if not data:
                os._exit(0)
            later = msg.unpack_to_zygote(data)
            assert isinstance(later, msg.ForkWorker)
            order = later
        orders.detach()               # become() closes it with all the rest
        embryo.become(order.worker, order.cores, order.memory_bytes, *fds)
        status = ready.serve(child.AGENT_FD, child.PAGE_FD)
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


def serve(channel: socket.socket, low: LowPriority, *, tell_spares: bool = False) -> int:
    """Forks on demand until the service is gone; returns the exit status."""
    from rfaas_mpi.agent import child
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    plan = sandbox.plan(config.Settings.load().sandbox, sandbox.probe(), sandbox.places())
    zygote = _Zygote(channel, plan, low, tell_spares)
    # Once for all workers, which inherit it: nothing here needs what is denied there.
    child.gain_no_privileges()
    sandbox.filter_calls(plan)
    zygote.make_spare()
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(wake_r, selectors.EVENT_READ)
    _say(channel, msg.ZygoteReady(os.getpid(), dict(zygote.plan.level), __version__))
    while True:
        ready = selector.select(SPARE_AFTER_S if zygote.spare is None else None)
        if not ready:
            # Only now: forking at once would take time from the worker just made.
            zygote.make_spare()
        for key, _ in ready:
            if key.fileobj is channel:
                data, fds, _, _ = socket.recv_fds(channel, DATAGRAM_BYTES, FDS_MAX)
                if not data:
                    zygote.close()
                    return 0
                try:
                    zygote.fork(data, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
            else:
                try:
                    os.read(wake_r, 4096)
                except BlockingIOError:
                    continue
                if zygote.reap() and not zygote.workers:
                    # Nobody's time is taken, and the next one may be ordered soon. (A spare fork that
                    # ended by itself might do so again at once.)
                    zygote.make_spare()
