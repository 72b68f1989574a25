"""What a worker may do: a policy and this node's facts in, a plan out (pure); then the system calls that carry it out.

    off      no sandbox beyond what every worker has
    default  seccomp (seccomp.py), and Landlock where it hinders no honest kernel:
             no signals to, no tracing of processes outside, no device nodes
    strict   the interpreter and its modules readable, a scratch directory writable,
             no new sockets; nothing else

Which things each policy keeps from a kernel, and which nothing here can: docs/decisions/0006-sandbox.md.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfaas_mpi import config
from rfaas_mpi.agent import seccomp
from rfaas_mpi.errors import ServiceError

__all__ = [
    "Facts", "Places", "Plan", "Ruleset", "Scratch", "filter_calls", "level", "level_text", "places", "plan", "probe",
    "required", "restrict",
]

# Landlock's rights on files, in the order in which they came.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READING = EXECUTE | READ_FILE | READ_DIR
_ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV   # the others are about directories
_LAST_RIGHT = {1: 12, 2: 13, 3: 14, 4: 14}                            # by ABI; 15 from ABI 5 on
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1                                # ABI 4
SCOPE_ABSTRACT_UNIX, SCOPE_SIGNAL = 1 << 0, 1 << 1                    # ABI 6

# The first that can keep a kernel from emptying a file that it may not write to.
STRICT_ABI = 3

# What programs and libraries read, wherever the interpreter lies.
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/etc", "/proc", "/sys")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Facts:
    """What this node's kernel offers; each `why` says why something is not there."""

    machine: str
    seccomp_flags: int = 0
    no_seccomp: str = ""
    landlock: int = 0                # its ABI, 0: none
    no_landlock: str = ""


@dataclass(frozen=True)
class Places:
    """Directories and files that a strict worker needs to read."""

    prefixes: tuple[str, ...] = ()
    path: tuple[str, ...] = ()       # sys.path
    directory: str = ""
    programs: tuple[str, ...] = ()   # PATH and LD_LIBRARY_PATH

    @property
    def readable(self) -> tuple[str, ...]:
        """All of them, each once; relative ones are the directory's."""
        found = (*_SYSTEM, *self.prefixes, *self.path, self.directory,
                 *(entry for entry in self.programs if entry.startswith("/")))
        return tuple(dict.fromkeys(entry for entry in found if entry))


@dataclass(frozen=True)
class Ruleset:
    """What Landlock is to restrict, and the paths (→ rights) on which it does not."""

    fs: int
    net: int = 0
    scoped: int = 0
    allowed: tuple[tuple[str, int], ...] = ()
    scratch: int = 0                 # rights on the worker's own scratch directory; 0: it gets none


@dataclass(frozen=True)
class Plan:
    """What is done to each worker, and the level that this reaches, as `rfaas status` shows it."""

    level: Mapping[str, Any]
    filter: bytes = b""
    flags: int = 0
    landlock: Ruleset | None = None


# --- deciding -----------------------------------------------------------------------

def _rights(abi: int) -> int:
    """Every right on files that this ABI knows."""
    return (2 << _LAST_RIGHT.get(abi, 15)) - 1


def _ruleset(policy: str, abi: int, places: Places) -> Ruleset | None:
    if policy == "default":
        # Any ruleset of ABI 1 forbids renaming from one directory to another.
        if abi < 2:
            return None
        return Ruleset(fs=MAKE_CHAR | MAKE_BLOCK | REFER, scoped=SCOPE_SIGNAL if abi >= 6 else 0,
                       allowed=(("/", REFER),))
    rights = _rights(abi)
    devices = (READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV) & rights
    return Ruleset(
        fs=rights, net=BIND_TCP | CONNECT_TCP if abi >= 4 else 0,
        scoped=SCOPE_ABSTRACT_UNIX | SCOPE_SIGNAL if abi >= 6 else 0,
        allowed=(*((path, READING) for path in places.readable), *((path, devices) for path in _DEVICES)),
        scratch=rights & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV))


def required(policy: str, facts: Facts) -> None:
    """ServiceError where this node can't keep what the policy promises; only strict promises something."""
    if policy != "strict":
        return
    lacks = facts.no_seccomp
    if facts.landlock < STRICT_ABI:
        lacks = facts.no_landlock or (f"its kernel's Landlock (ABI {facts.landlock}) can't keep a worker from "
                                      "emptying files")
    if lacks:
        raise ServiceError(f"sandbox=strict can't be kept on node {os.uname().nodename}: {lacks}",
                           hint="use a node with Linux 6.2 or newer that starts with `landlock` among its `lsm=`, on "
                                "x86_64 or aarch64, or set RFAAS_SANDBOX=default")


def plan(policy: str, facts: Facts, places: Places) -> Plan:
    """The plan for one policy on one node. ServiceError where the policy can't be kept there."""
    required(policy, facts)
    if policy == "off":
        return Plan({"policy": "off", "seccomp": False, "landlock": 0, "keeps": [], "lacks": []})
    code = b"" if facts.no_seccomp else seccomp.build(facts.machine, sockets=policy != "strict")
    rules = _ruleset(policy, facts.landlock, places)
    keeps, lacks = [], []
    if code:
        keeps.append("system calls that numerical work has no use for")
        keeps += ["new sockets"] if policy == "strict" else []
    else:
        lacks.append(f"no filter of system calls: {facts.no_seccomp}")
    if rules is None:
        lacks.append(facts.no_landlock or f"Landlock ABI {facts.landlock} would forbid honest renames: not used")
    else:
        keeps.append("memory of other processes")
        if rules.scoped & SCOPE_SIGNAL:
            keeps.append("signals to others")
        else:
            lacks.append(f"signals to the user's other processes are not kept back: Landlock ABI {facts.landlock}, "
                         "6 (Linux 6.12) is needed")
        if policy == "strict":
            keeps.append("files other than its modules and its scratch directory")
    return Plan({"policy": policy, "seccomp": bool(code), "landlock": facts.landlock if rules is not None else 0,
                 "keeps": keeps, "lacks": lacks}, code, facts.seccomp_flags, rules)


def level_text(level: Mapping[str, Any]) -> str:
    """A level, as plan() gives it, on one line."""
    if level["policy"] == "off":
        return "off: a kernel may do whatever its user may"
    parts = ["seccomp"] if level["seccomp"] else []
    parts += [f"Landlock ABI {level['landlock']}"] if level["landlock"] else []
    text = f"{level['policy']}: {' and '.join(parts) or 'nothing restricts a kernel'}"
    if level["keeps"]:
        text += f", keeps back {', '.join(level['keeps'])}"
    return "; ".join((text, *level["lacks"]))


# --- looking ------------------------------------------------------------------------

_SECCOMP = {"x86_64": 317, "aarch64": 277}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446    # everywhere
_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_SET_MODE_FILTER = 1
_TSYNC, _SPEC_ALLOW = 1, 4

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("fd", ctypes.c_int32))


class _FilterProgram(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _call(number: int, *arguments: Any) -> tuple[int, int]:
    """(result, errno) of a system call whose integers fit 32 bits, or 64 where they are ctypes' own."""
    ctypes.set_errno(0)
    result = _syscall(ctypes.c_long(number), *(ctypes.c_ulong(item) if isinstance(item, int) else item
                                               for item in arguments))
    return result, ctypes.get_errno()


def probe() -> Facts:
    """What this kernel lets this process have; restricts nothing."""
    machine = os.uname().machine
    flags, no_seccomp = 0, ""
    if machine not in seccomp.MACHINES or sys.maxsize < 1 << 32:
        no_seccomp = f"no filter is known for {machine}" + (" with 32 bits" if sys.maxsize < 1 << 32 else "")
    else:
        # A filter at address 0 is refused with EFAULT, after the flags were understood. Without
        # SPEC_ALLOW, kernels before 5.16 slow down the whole worker with a mitigation.
        for flags in (_TSYNC | _SPEC_ALLOW, _TSYNC):
            _, error = _call(_SECCOMP[machine], _SET_MODE_FILTER, flags, None)
            if error == errno.EFAULT:
                break
        else:
            flags, no_seccomp = 0, f"this kernel or container has no seccomp filters ({os.strerror(error)})"
    abi, error = _call(_CREATE_RULESET, None, 0, _RULESET_VERSION)
    no_landlock = ""
    if abi <= 0:
        abi, no_landlock = 0, {
            errno.ENOSYS: "this kernel is built without Landlock",
            errno.EOPNOTSUPP: "this kernel was started without Landlock",
        }.get(error, f"this kernel or container refuses Landlock ({os.strerror(error)})")
    return Facts(machine, flags, no_seccomp, abi, no_landlock)


def places() -> Places:
    """What this interpreter, set up like the rank's, needs to read."""
    environment = config.environment()
    programs = ":".join((environment.get("PATH", ""), environment.get("LD_LIBRARY_PATH", ""))).split(":")
    package = str(Path(__file__).parents[2])
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        directory = ""
    return Places(tuple(dict.fromkeys((sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, package))),
                  tuple(sys.path), directory, tuple(programs))


def level() -> dict[str, Any]:
    """What a worker of a rank that was started like this process would get; ServiceError as plan() raises it."""
    return dict(plan(config.Settings.load().sandbox, probe(), places()).level)


# --- acting -------------------------------------------------------------------------

def _check(result: int, error: int, what: str) -> int:
    if result < 0:
        raise OSError(error, f"sandbox: {what}: {os.strerror(error)}")
    return result


def filter_calls(plan: Plan) -> None:
    """Puts this process, and all that it will start, behind the filter for ever. no_new_privs is set already.

    For the zygote: a fork inherits it for nothing, where loading it costs half a
    millisecond. Raises OSError where the kernel refuses what it offered to probe().
    """
    if plan.filter:
        program = _FilterProgram(len(plan.filter) // 8, plan.filter)
        # A positive result is a thread that could not follow: there is none but this one.
        result, error = _call(_SECCOMP[os.uname().machine], _SET_MODE_FILTER, plan.flags, ctypes.byref(program))
        _check(-1 if result != 0 else 0, error or errno.EBUSY, "seccomp")


def restrict(plan: Plan, scratch: Scratch | None = None) -> None:
    """Landlock for this process and all that it will start, for ever. no_new_privs is set already.

    For each worker by itself: who shares a domain may signal and trace each other.
    Raises OSError as filter_calls() does.
    """
    rules = plan.landlock
    if rules is None:
        return
    own = scratch.enter() if rules.scratch and scratch is not None else ""
    attributes = _RulesetAttr(rules.fs, rules.net, rules.scoped)
    ruleset = _check(*_call(_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0),
                     "landlock_create_ruleset")
    try:
        for path, rights in (*rules.allowed, *([(own, rules.scratch)] if own else [])):
            _allow(ruleset, path, rights)
        _check(*_call(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return                        # what is not there, or not for us, needs no leave
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _ON_FILES
        rule = _PathBeneath(rights, fd)
        _check(*_call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0), f"landlock_add_rule {path}")
    finally:
        os.close(fd)


class Scratch:
    """A zygote's directory with one directory for each of its workers, gone with them.

    It is locked as long as the zygote lives, so that what a killed one left behind
    can be told, and is removed by the user's next.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        prefix = f"rfaas-scratch-{os.getuid()}-"
        for entry in os.listdir(parent):
            if entry.startswith(prefix):
                _remove_stale(parent / entry)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _locked(self._fd) and self.path.exists():
                return
            os.close(self._fd)        # another one took it for stale

    def enter(self) -> str:
        """In a worker: its own directory, new, where temporary files and caches go from now on."""
        own = str(self.path / str(os.getpid()))
        os.mkdir(own, 0o700)
        os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = own
        tempfile.tempdir = None
        return own

    def remove(self, pid: int) -> None:
        """Once that worker is gone."""
        shutil.rmtree(self.path / str(pid), ignore_errors=True)

    def close(self) -> None:
        """Removes all. Safe to call twice."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return                        # another user's, or gone
    try:
        if os.fstat(fd).st_uid == os.getuid() and _locked(fd):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)
