"""The filter on a worker's system calls, built as bytes of classic BPF; pure, so that a test can run it on any machine.

    arch, number ──▶ another ABI ──▶ EPERM
                 ──▶ denied      ──▶ EPERM          what a kernel has no use for
                 ──▶ clone3      ──▶ ENOSYS         its flags lie in memory, where a filter can't look;
                                                    C libraries then use clone
                 ──▶ arguments   ──▶ EPERM | allow  clone, unshare, ioctl, kill, prlimit64
                 ──▶ allow

EPERM, not a kill: honest libraries try what there is and go on without. Calls that
are allowed whatever their arguments cost nothing on Linux 5.11 and newer, which
remembers them by number.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

__all__ = ["ALLOW", "ARGUMENTS", "DENIED", "MACHINES", "NO_NEW_SOCKETS", "Machine", "build", "denied_numbers"]


@dataclass(frozen=True)
class Machine:
    """What the filter must know of a machine: its audit name, and its column in the tables."""

    audit_arch: int
    column: int
    x32: bool = False                # shares the audit name, but sets a bit in the number


MACHINES = {"x86_64": Machine(0xC000003E, 0, x32=True), "aarch64": Machine(0xC00000B7, 1)}

# Name: number on x86_64, on aarch64; None where the machine has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory and descriptors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # what is mounted where, and other namespaces
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "fsconfig": (431, 431), "fspick": (433, 433), "open_tree": (428, 428),
    "open_tree_attr": (467, 467), "mount_setattr": (442, 442), "pivot_root": (155, 41), "chroot": (161, 51),
    "setns": (308, 268), "open_by_handle_at": (304, 265),
    # large parts of the kernel that numerical work never needs; io_uring would also pass by this filter
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "_sysctl": (156, None),
    # keys of the user's session
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # the machine itself: matters where workers run as root
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "create_module": (174, None),
    "get_kernel_syms": (177, None), "query_module": (178, None), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "vhangup": (153, 58), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
}
# Denied too where a policy wants no network: socketpair() still works.
NO_NEW_SOCKETS: dict[str, tuple[int | None, int | None]] = {"socket": (41, 198), "connect": (42, 203)}
# Answered by their arguments.
ARGUMENTS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "clone3": (435, 435), "unshare": (272, 97), "ioctl": (16, 29), "kill": (62, 129),
    "prlimit64": (302, 261),
}

CLONE_NEWTIME = 0x80                 # in clone() these bits are the signal at the child's end
CLONE_NEW = 0x7E020000               # NS, CGROUP, UTS, IPC, USER, PID, NET
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # put words into the mouth of a terminal
EVERYBODY = 0xFFFFFFFF               # kill(-1)

ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_X32 = 0x40000000

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16         # offsets in struct seccomp_data


class _Program:
    """Instructions whose jumps name labels; forward only, as BPF has it."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, str, str]] = []
        self._labels: dict[str, int] = {}

    def load(self, offset: int) -> None:
        self._code.append((_LD, offset, "", ""))

    def jump(self, test: int, value: int, yes: str = "", no: str = "") -> None:
        """To `yes` or `no`; an empty one is the next instruction."""
        self._code.append((test, value, yes, no))

    def answer(self, label: str, value: int) -> None:
        self.label(label)
        self._code.append((_RET, value, "", ""))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def bytes(self) -> bytes:
        def skip(here: int, label: str) -> int:
            return self._labels[label] - here - 1 if label else 0
        return b"".join(struct.pack("<HBBI", code, skip(here, yes), skip(here, no), value)
                        for here, (code, value, yes, no) in enumerate(self._code))


def denied_numbers(machine: str, *, sockets: bool = True) -> tuple[int, ...]:
    """Numbers that are refused whatever their arguments."""
    column = MACHINES[machine].column
    tables = DENIED if sockets else DENIED | NO_NEW_SOCKETS
    return tuple(sorted(number for row in tables.values() if (number := row[column]) is not None))


def _argument(index: int, *, high: bool = False) -> int:
    # Both machines are little-endian. The kernel itself takes only the low half
    # of clone's and unshare's flags, of ioctl's command and of a pid.
    return _ARGS + 8 * index + (4 if high else 0)


def build(machine: str, *, sockets: bool = True) -> bytes:
    """The filter as an array of struct sock_filter. KeyError for a machine that is not in MACHINES."""
    facts = MACHINES[machine]
    number = {name: row[facts.column] for name, row in ARGUMENTS.items()}
    out = _Program()
    out.load(_ARCH)
    out.jump(_JEQ, facts.audit_arch, no="deny")
    out.load(_NR)
    if facts.x32:
        out.jump(_JGE, _X32, yes="deny")
    for denied in denied_numbers(machine, sockets=sockets):
        out.jump(_JEQ, denied, yes="deny")
    for name, value in number.items():
        assert value is not None
        out.jump(_JEQ, value, yes="absent" if name == "clone3" else name)
    out.answer("others", ALLOW)

    out.label("clone")
    out.load(_argument(0))
    out.jump(_JSET, CLONE_NEW, yes="deny", no="allow")

    out.label("unshare")
    out.load(_argument(0))
    out.jump(_JSET, CLONE_NEW | CLONE_NEWTIME, yes="deny", no="allow")

    out.label("ioctl")
    out.load(_argument(1))
    out.jump(_JEQ, TIOCSTI, yes="deny")
    out.jump(_JEQ, TIOCLINUX, yes="deny", no="allow")

    out.label("kill")
    out.load(_argument(0))
    out.jump(_JEQ, EVERYBODY, yes="deny", no="allow")

    # A lower limit on CPU time would kill the rank. setrlimit() names no process.
    out.label("prlimit64")
    out.load(_argument(0))
    out.jump(_JEQ, 0, yes="allow")
    out.load(_argument(2))
    out.jump(_JEQ, 0, no="deny")
    out.load(_argument(2, high=True))
    out.jump(_JEQ, 0, yes="allow", no="deny")

    out.answer("absent", _ERRNO | errno.ENOSYS)
    out.answer("deny", _ERRNO | errno.EPERM)
    out.answer("allow", ALLOW)
    return out.bytes()
