"""`rfaas doctor`: what works on this machine, what does not, why, and what to do about it.

Every check looks and changes nothing, but that the runtime directory is made if it is missing. None initialises MPI
or starts the service.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import fcntl
import importlib
import mmap
import os
import platform
import re
import shutil
import signal
import stat
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rfaas_mpi.cli import output
from rfaas_mpi.cli.checks import Check
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.errors import RFaaSError

if TYPE_CHECKING:
    from rfaas_mpi.agent import sandbox

WIDTH = 80
MINIMUM_PYTHON = (3, 11)
# Distribution and the least version that is tested; as in pyproject.toml.
PACKAGES = {"numpy": (1, 26), "msgspec": (0, 19), "cloudpickle": (3, 0), "click": (8, 1), "threadpoolctl": (3, 2)}


def examine(**which: str) -> list[Check]:
    """All checks, in the order in which to read them. Never raises for what it finds.

    `service`, `key_file`: settings that name another node's service.
    """
    groups: Sequence[tuple[str, Callable[[], Iterable[Check]]]] = (
        ("python", _python), ("packages", _packages), ("extension", _extension), ("settings", _settings),
        ("system calls", _system_calls), ("runtime directory", _runtime_directory), ("own agent", _own_agent),
        ("sandbox", _sandbox), ("memory limit", _memory_limit), ("low priority", _low_priority),
        ("cores and memory", _cores_and_memory), ("mpi", _mpi), ("numba", _numba), ("transports", _transports),
        ("service", lambda: _service(**which)), ("manager", _manager), ("slurm", _slurm))
    found: list[Check] = []
    for name, group in groups:
        try:
            found.extend(group())
        except RFaaSError as error:  # mostly a setting, which the line about settings is about, too
            found.append(Check(name, False, f"not checked: {Exception.__str__(error)}",
                               error.hint or "rfaas config show --origin"))
        except Exception as error:  # the report must come out whole, with this in it
            found.append(Check(name, False, f"could not be checked: {type(error).__name__}: {error}",
                               "report this with the output of `rfaas doctor --json`"))
    return found


def healthy(found: Iterable[Check]) -> bool:
    return all(check.ok for check in found if check.needed)


def as_json(found: Sequence[Check]) -> dict:
    return {"ok": healthy(found), "checks": [asdict(check) for check in found]}


def as_text(found: Sequence[Check]) -> list[str]:
    yes, no = ("✔", "✘") if output.can_show("✔✘") else ("ok", "no")
    margin = max(len(yes), len(no)) + 1
    left = max(len(check.name) for check in found)
    lines = []
    for check in found:
        head = f"{yes if check.ok else no:<{margin}}{check.name:<{left}}  "
        lines += textwrap.wrap(check.reason, WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
                               break_long_words=False, break_on_hyphens=False)
        if check.fix and not check.ok:
            lines += textwrap.wrap(f"fix: {check.fix}", WIDTH, initial_indent=" " * (len(head)),
                                   subsequent_indent=" " * (len(head) + 5), break_long_words=False,
                                   break_on_hyphens=False)
    broken = [check.name for check in found if check.needed and not check.ok]
    lines.append("")
    lines.append(f"Not usable yet: {', '.join(broken)}." if broken else
                 "Everything that an application needs is there.")
    return lines


# --- the interpreter and its packages --------------------------------------------

def _python() -> Iterable[Check]:
    have = sys.version_info[:2]
    needed = ".".join(map(str, MINIMUM_PYTHON))
    yield Check("python", have >= MINIMUM_PYTHON, f"{platform.python_version()} ({sys.executable})",
                f"use Python {needed} or newer", needed=True)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:3]:
        digits = "".join(ch for ch in part if ch.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _packages() -> Iterable[Check]:
    good, bad = [], []
    for name, least in PACKAGES.items():
        needs = f"{name}>={'.'.join(map(str, least))}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            bad.append((f"{name} is not installed", needs))
            continue
        if _numbers(version) < least:
            bad.append((f"{name} {version} is too old", needs))
        else:
            good.append(f"{name} {version}")
    reason = ", ".join([text for text, _ in bad] + good)
    yield Check("packages", not bad, reason, "pip install " + " ".join(f"'{needs}'" for _, needs in bad), needed=True)


def _extension() -> Iterable[Check]:
    try:
        module = importlib.import_module("rfaas_mpi.fabric._fabric")
    except ImportError as error:
        yield Check("extension", False, f"can't be loaded: {error}",
                    "install the package (`pip install .`), or `make setup` in a checkout; both need a C compiler",
                    needed=True)
        return
    yield Check("extension", True, f"built ({Path(module.__file__ or '').parent})", needed=True)


# --- what the kernel offers ------------------------------------------------------

def _settings() -> Iterable[Check]:
    from rfaas_mpi import config
    try:
        given = config.Settings.given()
    except RFaaSError as error:
        yield Check("settings", False, Exception.__str__(error), error.hint or "rfaas config show --origin", needed=True)
        return
    if near := config.misspelt(config.environment()):
        yield Check("settings", False, "not heeded: " + ", ".join(near),
                    "; ".join(f"{name} may be meant for {known}" for name, known in near.items()))
        return
    said = ", ".join(f"{name} ({each.origin})" for name, each in given.items())
    yield Check("settings", True, f"set: {said}" if said else "all are at their defaults")


def _system_calls() -> Iterable[Check]:
    yield _memfd()
    yield _pidfd()
    yield _futex()
    yield _membarrier()


def _memfd() -> Check:
    name, fix = "memfd, seals", "run on Linux 4.14 or newer, and allow memfd_create in the container's seccomp profile"
    try:
        fd = os.memfd_create("rfaas-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Check(name, False, f"memfd_create: {error.strerror}", fix, needed=True)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals != seals:
            return Check(name, False, "seals are accepted but not kept", fix, needed=True)
        try:
            os.ftruncate(fd, 2 * mmap.PAGESIZE)
        except PermissionError:
            return Check(name, True, "shared memory of our own, safe from resizing", needed=True)
        return Check(name, False, "a sealed memfd could be resized", fix, needed=True)
    except OSError as error:
        return Check(name, False, f"sealing: {error.strerror}", fix, needed=True)
    finally:
        os.close(fd)


def _pidfd() -> Check:
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        return Check("pidfd", False, f"{error.strerror}: the end of a worker can't be told",
                     "run on Linux 5.3 or newer, and allow pidfd_open in the container's seccomp profile", needed=True)
    return Check("pidfd", True, "the end of a worker is seen at once", needed=True)


# Numbers of system calls that Python has no function for, by machine.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}
_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365}


def _syscall(numbers: dict[str, int], *arguments: object) -> tuple[int, int] | None:
    """(result, errno), or None on a machine whose numbers we don't know."""
    number = numbers.get(platform.machine())
    if number is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    return libc.syscall(ctypes.c_long(number), *arguments), ctypes.get_errno()


def _futex() -> Check:
    word = ctypes.c_uint32(0)
    wake, nobody = ctypes.c_int(1), ctypes.c_int(1)
    answer = _syscall(_FUTEX, ctypes.byref(word), wake, nobody, None, None, ctypes.c_int(0))
    if answer is None:
        return Check("futex", True, f"not checked on {platform.machine()}", needed=True)
    result, error = answer
    if result < 0:
        return Check("futex", False, f"{os.strerror(error)}: a sleeping worker can't be woken",
                     "allow futex in the container's seccomp profile", needed=True)
    return Check("futex", True, "a sleeping worker can be woken", needed=True)


def _membarrier() -> Check:
    answer = _syscall(_MEMBARRIER, ctypes.c_int(0), ctypes.c_uint(0), ctypes.c_int(0))
    if answer is None:
        return Check("membarrier", True, f"not checked on {platform.machine()}; not needed")
    commands, error = answer
    private_expedited = 1 << 3
    if commands < 0 or not commands & private_expedited:
        why = os.strerror(error) if commands < 0 else "this kernel has no expedited one"
        return Check("membarrier", False, f"{why}; nothing here needs it yet",
                     "run on Linux 4.14 or newer, and allow membarrier in the container's seccomp profile")
    return Check("membarrier", True, "expedited")


# --- what an agent that this user starts here can do --------------------------------------

def _own_agent() -> Iterable[Check]:
    root = os.geteuid() == 0
    yield Check("own agent", True,
                "one that you start can serve every user: RFAAS_SERVICE_USER names whom it runs as" if root else
                f"one that you start (uid {os.geteuid()}) lends to you alone, and can do what the next lines say",
                facts={"uid": os.geteuid(), "serves_all": root})


def _sandbox() -> Iterable[Check]:
    from rfaas_mpi import config
    from rfaas_mpi.agent import sandbox
    facts, policy = sandbox.probe(), config.Settings.load().sandbox
    yield Check("seccomp", not facts.no_seccomp, facts.no_seccomp or f"system calls can be filtered ({facts.machine})",
                "allow seccomp in the container's profile; only x86_64 and aarch64 have a filter")
    yield Check("landlock", not facts.no_landlock, facts.no_landlock or f"ABI {facts.landlock}",
                "run on Linux 5.13 or newer, with landlock among the `lsm=` of the kernel's command line",
                facts={"abi": facts.landlock})
    yield _sandbox_levels(facts)
    try:
        level = sandbox.level()
    except RFaaSError as error:
        yield Check("sandbox", False, Exception.__str__(error), error.hint, needed=True)
        return
    yield Check("sandbox", policy == "off" or not level["lacks"], sandbox.level_text(level),
                "nothing to do where you trust your kernels as your ranks; else mend the lines above",
                facts=level)


def _sandbox_levels(found: sandbox.Facts) -> Check:
    """Which of them ranks may ask for here."""
    from rfaas_mpi.agent import sandbox
    kept, why, fix = ["off", "default"], "", ""
    try:
        sandbox.required("strict", found)
        kept.append("strict")
    except RFaaSError as error:
        why, fix = Exception.__str__(error), error.hint
    return Check("sandbox levels", not why, ", ".join(kept) + (f"; {why}" if why else ""), fix,
                 facts={"levels": kept, "why": why})


def _memory_limit(root: Path = Path("/")) -> Iterable[Check]:
    from rfaas_mpi import config
    from rfaas_mpi.agent.groups import Roots
    from rfaas_mpi.agent.memory import Means
    wanted, roots = config.Settings.load().memory_limit, Roots.find(root)
    why_not = "no control groups are to be made (RFAAS_MEMORY_LIMIT)" if wanted == "watch" else roots.why_not
    version = 2 if roots.unified else 1
    whose = ", which is delegated to us" if roots.delegated else ""
    yield Check("memory limit", wanted != "cgroup" or not why_not,
                f"control groups below {roots.memory} (cgroup v{version}){whose} can bound workers' memory"
                if not why_not else f"an agent looks at what workers hold, and kills: {why_not}",
                "start the agent as root on a node whose control groups have the memory controller, or set "
                "RFAAS_MEMORY_LIMIT=auto", needed=wanted == "cgroup",
                facts={"means": str(Means.WATCH if why_not else Means.CGROUP), "version": None if why_not else version,
                       "delegated": roots.delegated, "why": why_not})


def _low_priority(root: Path = Path("/")) -> Iterable[Check]:
    from rfaas_mpi.agent import priority
    how, where = priority.can_be_had(root)
    yield Check("low priority", how is not None,
                f"workers can leave their core to its owner by {how}: {where}" if how else
                f"{where}: an agent that you start lends no idle cores of a job, and stops a worker as soon as its "
                "core has an owner", "nothing to do on your own machine; on batch nodes start the agent as root",
                facts={"means": str(how or ""), "where": where})


# --- the place for sockets and locks ----------------------------------------------

def _runtime_directory() -> Iterable[Check]:
    from rfaas_mpi import session
    from rfaas_mpi.config import Settings
    name, fix = "runtime directory", "name a local directory of your own with RFAAS_RUNTIME_DIR"
    try:
        path = session.runtime_directory(Settings.load())
    except RFaaSError as error:
        yield Check(name, False, Exception.__str__(error), error.hint or fix, needed=True)
        return
    found = path.stat()
    filesystem = _filesystem(path)
    facts = f"{path} (uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}, {filesystem or 'file system unknown'})"
    if found.st_uid != os.geteuid():
        yield Check(name, False, f"{facts} is not ours", fix, needed=True)
    elif stat.S_IMODE(found.st_mode) & 0o022:
        yield Check(name, False, f"{facts}: others may write to it", f"chmod 700 {path}", needed=True)
    elif filesystem in _SHARED_BY_NODES:
        yield Check(name, False, f"{facts} is shared with other nodes, where its locks mean nothing", fix, needed=True)
    else:
        yield Check(name, True, facts, needed=True)


_SHARED_BY_NODES = frozenset((
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "smbfs", "afs", "ceph", "9p", "panfs", "orangefs",
    "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "dvs"))


def _filesystem(path: Path) -> str:
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return kind.split()[0]
    return ""


# --- what there is to lend ----------------------------------------------------------

def _cores_and_memory() -> Iterable[Check]:
    from rfaas_mpi import config
    from rfaas_mpi.agent import cores
    settings = config.Settings.load()
    environment = config.environment()
    facts = cores.read_node_facts()
    slurm = cores.slurm_facts(environment)
    # As if this process were a rank, which is what a user asks about.
    me = cores.Rank(pid=os.getpid(), mask=tuple(sorted(os.sched_getaffinity(0))),
                    local_ranks=cores.local_ranks(environment),
                    launch=cores.launch_key(environment, os.getpid(), cores.launcher_pid(environment, os.getpid())))
    spare = cores.spare_cores(facts, [me], slurm, lend=settings.lend, only=settings.cores)
    if spare.cores:
        yield Check("spare cores", True,
                    f"{core_ranges(spare.cores)} can be lent to a rank that was started like this process")
    else:
        why, *way_out = re.split("[:;] ", spare.reason or "every core is kept", maxsplit=1)
        yield Check("spare cores", False, f"none ({why}); kernels run on the rank itself then",
                    way_out[0] if way_out else "bind the ranks, start fewer of them, or ask for more cores")
    by_reason: dict[str, list[int]] = {}
    for core, why in spare.kept.items():
        by_reason.setdefault(why, []).append(core)
    for why, kept in by_reason.items():
        yield Check(f"core {core_ranges(kept)}", True, f"not lent: {why}")
    memory = cores.lendable_memory(facts, slurm, reserve=settings.memory_reserve)
    yield Check("memory to lend", memory > 0, f"{memory / (1 << 30):.1f} GiB",
                "ask for more memory, or lower RFAAS_MEMORY_RESERVE")
    yield _quota(facts.quota_cpus, len(facts.cpuset))
    yield _bound(me.mask, len(facts.cpuset), me.local_ranks)


def _quota(cpus: float | None, cores: int) -> Check:
    if cpus is None:
        return Check("cpu.max", True, "CPU time is not limited")
    if cpus >= cores:
        return Check("cpu.max", True, f"{cpus:g} CPUs' worth of time for {cores} cores")
    return Check("cpu.max", False, f"{cpus:g} CPUs' worth of time for {cores} cores: cores beyond that are not lent, "
                 "since the kernel would stop all of them in turn", "ask for a larger limit")


def _bound(mask: Sequence[int], cores: int, ranks: int) -> Check:
    if cores == 1:
        return Check("bound", False, "there is one core only",
                     "ask for more cores: one for the rank, the others to lend")
    if len(mask) < cores:
        return Check("bound", True, f"this process is bound to {core_ranges(mask)}")
    kept = "one core is kept for it" if ranks == 1 else f"{ranks} cores are kept for the {ranks} ranks on this node"
    return Check("bound", False, f"this process may run on all {cores} cores: {kept}, and the kernel may still put "
                 "the rank on a core that is lent",
                 "bind ranks: `mpiexec -bind-to core` (MPICH, Open MPI) or `srun --cpu-bind=cores`")


# --- what is optional ----------------------------------------------------------------

def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _mpi() -> Iterable[Check]:
    # A launcher of the venv may be off the PATH where `rfaas` was called by its full path.
    beside = os.pathsep.join((os.pathsep.join(os.get_exec_path()), str(Path(sys.executable).parent)))
    found = [path for name in ("mpiexec", "mpirun", "srun") if (path := shutil.which(name, path=beside))]
    yield Check("mpi launcher", bool(found), ", ".join(found) or "none of mpiexec, mpirun, srun is on the PATH",
                "pip install 'rfaas_mpi[mpi]', or load your site's MPI module")
    version = _version("mpi4py")
    yield Check("mpi4py", version is not None, version or "not installed; only MPI applications need it",
                "pip install 'rfaas_mpi[mpi]'")


def _slurm() -> Iterable[Check]:
    from rfaas_mpi import config
    from rfaas_mpi.cli.slurm_checks import slurm_checks
    return slurm_checks(config.environment())


def _numba() -> Iterable[Check]:
    version = _version("numba")
    yield Check("numba", version is not None, version or "not installed; only @cfunc kernels need it",
                "pip install 'rfaas_mpi[numba]'")


def _transports() -> Iterable[Check]:
    yield Check("shm", True, "available: ranks and workers of one node")
    yield from _verbs()
    yield Check("tcp", True, "available: a service on another node (RFAAS_SERVICE)")
    from rfaas_mpi import fabric
    offered = fabric.transports()
    yield Check("offers", True, f"what an agent of this node offers: {', '.join(offered)}",
                facts={"transports": list(offered)})


def _verbs() -> Iterable[Check]:
    from rfaas_mpi import config, fabric
    nothing = "nothing to do: on one node shm is the fastest, and tcp reaches others"
    if ctypes.util.find_library("ibverbs") is None:
        yield Check("verbs", False, "not there: there is no libibverbs here", nothing)
        return
    try:
        fabric.load_verbs()
        facts = fabric.verbs_report(config.Settings.load().device)
    except RFaaSError as error:
        why = Exception.__str__(error).removeprefix("verbs can't be used here: ")
        yield Check("verbs", False, f"not there: {why}", nothing)
        return
    yield Check("verbs", True, f"available on {facts['device']}, port {facts['port']} ({facts['path']}, "
                               f"{facts['state']}), GID {facts['gid_index']} {facts['gid']}, MTU {facts['mtu']}")
    yield Check("verbs limits", True,
                f"up to {facts['inline_bytes']} bytes inline; {facts['max_qp']} queue pairs of {facts['max_qp_wr']} "
                f"requests, completion queues of {facts['max_cqe']}, {_size(facts['max_write_bytes'])} in one write")
    memory = facts["memlock_bytes"]
    enough = memory == "unlimited" or int(memory) >= _MEMLOCK_ENOUGH or os.geteuid() == 0
    yield Check("locked memory", enough, memory if memory == "unlimited" else _size(memory),
                "`ulimit -l unlimited`, LimitMEMLOCK=infinity in the systemd unit, or `* - memlock unlimited` in "
                "/etc/security/limits.conf: arrays that a device reads and writes are locked in memory")


# One arena of an executor and its mirrors.
_MEMLOCK_ENOUGH = 256 << 20


def _size(text: str) -> str:
    size = int(text)
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} bytes"


def _service(**which: str) -> Iterable[Check]:
    from rfaas_mpi import config, remote
    from rfaas_mpi.cli import service
    settings = config.Settings.load(**which)
    if settings.service and settings.key_file:
        try:
            remote.read_key(settings.key_file)
            yield Check("key", True, f"{settings.key_file}, which only you can read")
        except RFaaSError as error:
            yield Check("key", False, Exception.__str__(error), error.hint)
    where = f" at {settings.service}" if settings.service else ""
    try:
        data = service.status(**which)
    except RFaaSError as error:
        yield Check("service", False, Exception.__str__(error), error.hint or "`rfaas down`, then try again")
        return
    if data["running"]:
        on = f" on {data['host']}" if where else ""
        yield Check("service", True, f"runs{where} (pid {data.get('pid')}{on})")
    elif where:
        yield Check("service", False, f"none runs{where}", "`rfaas up --listen` on that node starts one")
    else:
        yield Check("service", True, "does not run; the first Executor starts it")


def _manager() -> Iterable[Check]:
    from rfaas_mpi import config
    from rfaas_mpi.cli.manager_checks import manager_checks
    try:
        yield from manager_checks(config.Settings.load())
    except RFaaSError as error:
        yield Check("manager", False, Exception.__str__(error), error.hint)
