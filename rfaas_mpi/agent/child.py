"""What a fresh fork of the zygote becomes before it serves: one worker, on its own cores, tied to its parents."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib.abc
import importlib.machinery
import os
import random
import resource
import signal
import sys
import types
from collections.abc import Iterable, Sequence

from rfaas_mpi import config
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.priority import NO_PRIORITY, LowPriority
from rfaas_mpi.errors import NestedError

__all__ = ["Embryo", "adopt_orphans", "close_all_but", "die_with_parent", "forbid_mpi", "gain_no_privileges",
           "name_process"]

# What an agent may keep from its workers; see zygote.main.
MAY_BE_DEAF_TO = frozenset((signal.SIGTERM, signal.SIGTSTP, signal.SIGUSR1))

AGENT_FD = 3
PAGE_FD = 4

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _libc.prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that forked it ends; ends it now if that has ended already.

    A parent of 0 is one that can't be known.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """The name that ps and top show; at most 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def adopt_orphans() -> None:
    """Processes that a kernel left behind become our children, so that we can end them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def gain_no_privileges() -> None:
    """No program that is started from here on has more rights than this process; what seccomp and Landlock ask for."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


class _NoMPI:
    """Stands for a name of mpi4py.MPI: harmless to import and to hold, an error to use."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def _refuse(self, *_: object, **__: object) -> object:
        raise NestedError(f"mpi4py.{object.__getattribute__(self, '_name')} was used inside a kernel",
                          hint="a worker is no MPI rank: communicate in the rank, compute in the kernel")

    __call__ = __getitem__ = __iter__ = __len__ = __index__ = _refuse

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._refuse()

    def __repr__(self) -> str:
        return f"<mpi4py.{object.__getattribute__(self, '_name')}: not available inside a kernel>"


class _NoMPIFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a stand-in for mpi4py.MPI: modules of an MPI application can be imported, MPI can't be used.

    Importing the real one would initialise MPI a second time under the rank's identity.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None,
                  ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == "mpi4py.MPI" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def missing(name: str) -> object:
            if name.startswith("__") and name.endswith("__"):
                raise AttributeError(name)
            return _NoMPI(f"MPI.{name}")

        module.__getattr__ = missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def forbid_mpi() -> None:
    """From here on `from mpi4py import MPI` gives names whose use raises NestedError."""
    sys.meta_path.insert(0, _NoMPIFinder())


def _cap_threads(threads: int) -> None:
    if threads == 1:
        return                        # as the zygote was started
    for name in config.THREAD_VARIABLES:
        os.environ[name] = str(threads)
    # Libraries that the zygote has loaded read their variable long ago.
    import threadpoolctl
    threadpoolctl.threadpool_limits(limits=threads)


def _data_bytes() -> int:
    """Private writable memory of this process."""
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")), 0)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        # Not every kernel or container has it, and it protects others, not us.
        return


class Embryo:
    """A fork that is everything that any worker is, and waits to be told which one.

    Making it is where the time goes (each page that it touches first has to be
    copied), so the zygote keeps one ready. Raises OSError where the node
    refuses something that isolation needs.
    """

    def __init__(self, parent: int, keep: Iterable[int], plan: sandbox.Plan,
                 scratch: sandbox.Scratch | None, low: LowPriority = NO_PRIORITY) -> None:
        die_with_parent(parent)
        os.setsid()
        # Before anything of a user's runs, and never left. The agent looks whether it worked.
        low.take()
        signal.set_wakeup_fd(-1)
        deaf = [number for number in MAY_BE_DEAF_TO if signal.getsignal(number) is signal.SIG_IGN]
        for number in {signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGQUIT}.difference(deaf):
            signal.signal(number, signal.SIG_DFL)
        # Ctrl-C in the terminal is for the rank.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        close_all_but(keep)
        gain_no_privileges()
        _write("/proc/self/oom_score_adj", "1000")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Forks share their parent's streams of random numbers otherwise.
        random.seed()
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed()
        forbid_mpi()
        os.environ[config.WORKER_MARK] = "0"
        self._data_bytes = _data_bytes()
        # Here already: what is left to do needs nothing that a sandbox denies, and
        # the order for a worker does not wait for it.
        sandbox.restrict(plan, scratch)

    def become(self, worker: int, cores: Sequence[int], memory_bytes: int, agent_fd: int, page_fd: int,
               output_fd: int, *entrances: int) -> None:
        """From here on this is worker `worker`: its agent socket is descriptor 3, its page 4, nothing else is open.

        It enters the control groups of these entrances first. Where it isn't let in it is moved there: a container
        may have given it another uid than its zygote's user has.
        """
        for entrance in entrances:
            with contextlib.suppress(PermissionError):
                os.write(entrance, b"0")
        os.sched_setaffinity(0, cores)
        # The three may already have the numbers that they get.
        agent_fd, page_fd, output_fd = (_above(fd) for fd in (agent_fd, page_fd, output_fd))
        os.dup2(output_fd, 1)
        os.dup2(output_fd, 2)
        os.dup2(agent_fd, AGENT_FD, inheritable=False)
        os.dup2(page_fd, PAGE_FD, inheritable=False)
        os.closerange(PAGE_FD + 1, _ABOVE + 4)
        name_process(f"rfaas-worker{worker}")
        os.environ[config.WORKER_MARK] = str(worker)
        _cap_threads(len(cores))
        if memory_bytes > 0:
            # Bounds private writable memory, on top of what it has now. Arenas are shared and don't count.
            limit = memory_bytes + self._data_bytes
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


# Copies of descriptors go where nothing else is.
_ABOVE = 64


def close_all_but(keep: Iterable[int]) -> None:
    """Closes every descriptor beyond 0 to 2 but these."""
    wanted = {0, 1, 2, *keep}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError as error:
                if error.errno != errno.EBADF:      # the listing's own descriptor
                    raise


def _above(fd: int) -> int:
    """A copy of `fd` that is out of the way of 0 to 4."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
