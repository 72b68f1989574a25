"""What a kernel can't do in a worker's sandbox, what honest ones still can, and what a node says that lacks the means.

The filter is run here instruction by instruction, for both machines; the rest is tried in real workers. A node
without Landlock is a real one, too: a process for which the kernel answers as if it had none.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest

from rfaas_mpi import Executor, ServiceError
from rfaas_mpi.agent import sandbox, seccomp
from rfaas_mpi.agent.sandbox import Facts, Places, Scratch, plan
from rfaas_mpi.cli import doctor
from rfaas_mpi.cli import service as cli
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError

EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
MACHINE = platform.machine()
ABI = sandbox.probe().landlock


# --- the filter, instruction by instruction --------------------------------------------

def run_filter(code: bytes, number: int, *arguments: int, arch: int) -> int:
    """What the kernel would do with the call; fails where the kernel would refuse the program."""
    arguments = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    program = list(struct.iter_unpack("<HBBI", code))
    assert 0 < len(program) <= 4096
    accumulator, here = 0, 0
    while True:
        opcode, yes, no, value = program[here]
        here += 1
        match opcode:
            case 0x20:
                assert value % 4 == 0 and value + 4 <= len(data)
                [accumulator] = struct.unpack_from("<I", data, value)
            case 0x15:
                here += yes if accumulator == value else no
            case 0x35:
                here += yes if accumulator >= value else no
            case 0x45:
                here += yes if accumulator & value else no
            case 0x06:
                return value
            case _:
                pytest.fail(f"no such instruction: {opcode:#x}")


@pytest.fixture(params=seccomp.MACHINES)
def machine(request) -> str:
    return request.param


def asked(machine: str, number: int, *arguments: int, sockets: bool = True) -> int:
    code = seccomp.build(machine, sockets=sockets)
    return run_filter(code, number, *arguments, arch=seccomp.MACHINES[machine].audit_arch)


def number_of(machine: str, name: str) -> int:
    number = (seccomp.DENIED | seccomp.ARGUMENTS | seccomp.NO_NEW_SOCKETS)[name][seccomp.MACHINES[machine].column]
    assert number is not None
    return number


@pytest.mark.parametrize("sockets", [True, False])
def test_exactly_the_calls_of_the_table_are_denied_whatever_their_arguments(machine, sockets):
    denied = set(seccomp.denied_numbers(machine, sockets=sockets))
    judged = {number_of(machine, name) for name in seccomp.ARGUMENTS}
    for number in range(1024):
        if number in judged:
            continue
        for argument in (0, 1, 0xFFFFFFFFFFFFFFFF):
            expected = EPERM if number in denied else seccomp.ALLOW
            assert asked(machine, number, *[argument] * 6, sockets=sockets) == expected, number


def test_calls_of_another_abi_are_denied(machine):
    code, arch = seccomp.build(machine), seccomp.MACHINES[machine].audit_arch
    for foreign in (0x40000003, 0x40000028, 0x8000003E, arch ^ 0x40000000, 0):      # i386, arm, …
        for number in (0, 1, 20, 39, 172, 1000):
            assert run_filter(code, number, arch=foreign) == EPERM


def test_calls_of_x32_are_denied():
    for number in (0, 1, 39, 101, 512, 547, 0x3FFFFFFF):
        assert asked("x86_64", 0x40000000 | number) == EPERM
    assert asked("x86_64", 0xFFFFFFFF) == EPERM
    assert asked("x86_64", 0x3FFFFFFF) == seccomp.ALLOW


NEW = {"NS": 0x20000, "CGROUP": 0x2000000, "UTS": 0x4000000, "IPC": 0x8000000, "USER": 0x10000000,
       "PID": 0x20000000, "NET": 0x40000000}
THREAD = 0x3D0F00                    # what pthread_create asks for
FORK = 0x1200011                     # and fork


@pytest.mark.parametrize("name", NEW)
def test_no_namespace_can_be_made(machine, name):
    for base in (0, THREAD, FORK):
        assert asked(machine, number_of(machine, "clone"), base | NEW[name]) == EPERM
        assert asked(machine, number_of(machine, "clone"), base | NEW[name] | 1 << 40) == EPERM
    assert asked(machine, number_of(machine, "unshare"), NEW[name]) == EPERM
    assert asked(machine, number_of(machine, "unshare"), 0x80) == EPERM         # of time


@pytest.mark.parametrize("call, arguments, answer", [
    ("clone", (THREAD,), seccomp.ALLOW), ("clone", (FORK,), seccomp.ALLOW), ("clone", (0x4111,), seccomp.ALLOW),
    ("clone", (0x80 | 17,), seccomp.ALLOW),                                     # a signal's number there
    ("clone3", (0, 0), ENOSYS), ("clone3", (1 << 40, 88), ENOSYS),
    ("unshare", (0x600,), seccomp.ALLOW),                                       # CLONE_FS | CLONE_FILES
    ("ioctl", (0, 0x5412), EPERM), ("ioctl", (0, 0x541C), EPERM), ("ioctl", (3, 0xFF00005412), EPERM),
    ("ioctl", (0, 0x5401), seccomp.ALLOW), ("ioctl", (0x5412, 0x5413), seccomp.ALLOW),
    ("kill", (0xFFFFFFFF, 9), EPERM), ("kill", (0xFFFFFFFFFFFFFFFF, 15), EPERM),
    ("kill", (77, 9), seccomp.ALLOW), ("kill", (0, 9), seccomp.ALLOW),
    ("prlimit64", (0, 7, 0x7F0000001000, 0), seccomp.ALLOW), ("prlimit64", (77, 7, 0, 0x7F0000001000), seccomp.ALLOW),
    ("prlimit64", (77, 7, 0x7F0000001000, 0), EPERM), ("prlimit64", (77, 7, 0x700000000, 0), EPERM)])
def test_arguments_decide_where_they_can(machine, call, arguments, answer):
    assert asked(machine, number_of(machine, call), *arguments) == answer


def test_strict_workers_make_no_sockets_and_others_do(machine):
    for name in seccomp.NO_NEW_SOCKETS:
        assert asked(machine, number_of(machine, name)) == seccomp.ALLOW
        assert asked(machine, number_of(machine, name), sockets=False) == EPERM


HEADERS = {"x86_64": "#include <asm/unistd_64.h>\n",
           "aarch64": "#define __BITS_PER_LONG 64\n#define __ARCH_WANT_SYS_CLONE3\n#define __ARCH_WANT_SET_GET_RLIMIT\n"
                      "#include <asm-generic/unistd.h>\n"}


# What is compiled here has the headers of this machine, and the generic ones.
@pytest.mark.parametrize("machine", sorted({MACHINE, "aarch64"}))
def test_the_numbers_are_those_of_the_kernel_s_headers(machine):
    tables = seccomp.DENIED | seccomp.ARGUMENTS | seccomp.NO_NEW_SOCKETS
    source = HEADERS[machine] + "".join(f"@{name} __NR_{name}\n" for name in tables)
    text = subprocess.run(["gcc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True,
                          timeout=60).stdout
    found = {name: int(number) for name, number in re.findall(r"@(\w+) (\d+)$", text, re.MULTILINE)}
    ours = {name: row[seccomp.MACHINES[machine].column] for name, row in tables.items()}
    assert {name: ours[name] for name in found} == found
    # What these headers lack is newer than they, or never was on that machine.
    assert {name for name in ours if name not in found and ours[name] is not None} <= {"open_tree_attr"}


# --- what is decided from a node's facts --------------------------------------------------

def facts(abi: int = 7, **changes: Any) -> Facts:
    return Facts(**{"machine": "x86_64", "seccomp_flags": 5, "landlock": abi,
                    "no_landlock": "" if abi else "this kernel was started without Landlock", **changes})


@pytest.mark.parametrize("abi", range(3, 10))
def test_strict_asks_landlock_for_all_that_its_abi_knows_and_for_no_more(abi):
    rules = plan("strict", facts(abi), Places()).landlock
    assert rules.fs == (1 << (16 if abi >= 5 else 15)) - 1
    assert (rules.net, rules.scoped) == (3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    assert all(rights & ~rules.fs == 0 for _, rights in rules.allowed)


@pytest.mark.parametrize("abi", range(10))
def test_default_lets_files_alone_and_says_what_it_lacks(abi):
    made = plan("default", facts(abi), Places())
    if abi < 2:
        assert made.landlock is None and made.level["landlock"] == 0
    else:
        assert made.landlock.allowed == (("/", sandbox.REFER),)
        assert made.landlock.fs & (sandbox.READING | sandbox.WRITE_FILE | sandbox.TRUNCATE) == 0
        assert bool(made.landlock.scoped) is (abi >= 6)
    assert made.level["seccomp"] and made.filter
    assert bool(made.level["lacks"]) is (abi < 6)


@pytest.mark.parametrize("known, says", [
    (facts(0), "started without Landlock"), (facts(2), "ABI 2"),
    (facts(7, no_seccomp="no filter is known for riscv64"), "riscv64")])
def test_strict_is_refused_where_it_can_not_be_kept_with_the_way_out(known, says):
    with pytest.raises(ServiceError, match=f"sandbox=strict can't be kept on node .*{says}.*RFAAS_SANDBOX=default"):
        plan("strict", known, Places())


def test_a_machine_without_a_filter_says_so():
    made = plan("default", facts(no_seccomp="no filter is known for riscv64"), Places())
    assert made.filter == b"" and not made.level["seccomp"]
    assert "riscv64" in sandbox.level_text(made.level)
    nothing = plan("default", facts(0, no_seccomp="no filter is known for riscv64"), Places())
    assert "nothing restricts a kernel" in sandbox.level_text(nothing.level)


def test_off_does_nothing_and_says_so():
    made = plan("off", facts(), Places())
    assert (made.filter, made.landlock) == (b"", None)
    assert sandbox.level_text(made.level).startswith("off: ")


def test_a_policy_that_there_is_not_is_refused_by_name():
    with pytest.raises(ConfigError, match="sandbox='paranoid'.*off, default, strict"):
        Settings.load({}, sandbox="paranoid")


# --- in real workers -------------------------------------------------------------------

@pytest.fixture(scope="module")
def ex() -> Iterator[Executor]:
    """A worker as everybody gets it."""
    with Executor(workers=1, cores=(0, 1), memory_per_worker="1G", fallback=False) as executor:
        yield executor


@pytest.fixture(scope="class")
def strict() -> Iterator[Executor]:
    with Executor(workers=1, cores=(0, 1), memory_per_worker="1G", sandbox="strict", fallback=False) as executor:
        yield executor


@pytest.fixture
def runtime() -> Path:
    """For a service of this test's own: it locks its cores apart from those of others."""
    return Path(tempfile.mkdtemp(dir=os.environ["RFAAS_RUNTIME_DIR"]))


def error_of(call: Callable[..., Any], *arguments: Any) -> int:
    """0, or its errno."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0


def called(number: int, *arguments: int) -> tuple[int, int]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    return libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)), ctypes.get_errno()


def called_with_nonsense(number: int) -> tuple[int, int]:
    # Nothing happens where it is not denied: no such address, size or descriptor.
    return called(number, *[-1] * 6)


@pytest.mark.parametrize("name", [name for name, row in seccomp.DENIED.items()
                                  if row[seccomp.MACHINES[MACHINE].column] is not None])
def test_a_kernel_is_denied(ex, name):
    assert ex.submit(called_with_nonsense, number_of(MACHINE, name)).result() == (-1, errno.EPERM)


def test_the_same_calls_are_answered_otherwise_without_a_sandbox():
    with Executor(workers=1, cores=(0, 1), memory_per_worker="1G", sandbox="off", fallback=False) as executor:
        for name in ("process_vm_readv", "kcmp", "io_uring_setup"):
            result, error = executor.submit(called_with_nonsense, number_of(MACHINE, name)).result()
            assert result == -1 and error != errno.EPERM, name
        assert executor.submit(error_of, os.kill, os.getpid(), 0).result() == 0


def test_a_kernel_makes_no_namespace(ex):
    for flag in (*NEW.values(), 0x80):
        assert ex.submit(called, number_of(MACHINE, "unshare"), flag).result() == (-1, errno.EPERM)
    assert ex.submit(called, number_of(MACHINE, "clone3"), 0, 0).result() == (-1, errno.ENOSYS)


def test_a_kernel_signals_nobody_at_large(ex):
    assert ex.submit(error_of, os.kill, -1, 0).result() == errno.EPERM


def _int_0x80() -> int:
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(bytes.fromhex("b814000000 cd80 c3"))              # mov $20, %eax; int $0x80; ret: getpid of i386
        here = ctypes.c_char.from_buffer(page)
        result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(here))()
        del here
    return result


def test_a_kernel_makes_no_call_of_another_abi(ex):
    if MACHINE == "x86_64":           # the only one whose 64-bit processes can try
        assert ex.submit(_int_0x80).result() == -errno.EPERM
        assert ex.submit(called, 0x40000000 | 39).result() == (-1, errno.EPERM)
    assert run_filter(seccomp.build(MACHINE), 20, arch=0x40000003) == EPERM


def _in_a_program_that_it_starts(number: int) -> list[int]:
    code = ("import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
            f"print(libc.syscall({number}, -1, -1, -1, -1, -1), ctypes.get_errno())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_what_a_kernel_starts_is_in_the_same_sandbox(ex):
    assert ex.submit(_in_a_program_that_it_starts, number_of(MACHINE, "ptrace")).result() == [-1, errno.EPERM]


def _change_limit_of(pid: int) -> int:
    limits = resource.prlimit(pid, resource.RLIMIT_CPU)             # looking is allowed
    return error_of(resource.prlimit, pid, resource.RLIMIT_CPU, limits)


def test_a_kernel_does_not_change_limits_of_the_rank(ex):
    assert ex.submit(_change_limit_of, os.getpid()).result() == errno.EPERM


def _reach(pid: int) -> dict[str, int]:
    return {"signal": error_of(os.kill, pid, 0), "memory": error_of(open, f"/proc/{pid}/mem", "rb")}


def test_a_kernel_does_not_reach_the_rank_or_the_service(ex):
    service = cli.status()["pid"]
    for pid in (os.getpid(), service):
        reached = ex.submit(_reach, pid).result()
        assert bool(reached["signal"]) is (ABI >= 6)
        assert bool(reached["memory"]) is (ABI >= 2)


def _node_error(directory: str) -> int:
    return error_of(os.mknod, f"{directory}/node", 0o600 | 0o020000, os.makedev(1, 3))


def test_a_kernel_makes_no_device_node(ex, tmp_path):
    assert ex.submit(_node_error, str(tmp_path)).result() in (errno.EACCES, errno.EPERM)
    assert not (tmp_path / "node").exists()


# --- what honest kernels do -----------------------------------------------------------------

def _multiply(n: int) -> tuple[float, int]:
    import threadpoolctl
    a = np.arange(n * n, dtype=float).reshape(n, n) / n ** 2
    threads = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return float(np.abs(a @ np.eye(n) - a).max()), max(threads)


def test_blas_runs_its_threads(runtime):
    with Executor(workers=1, cores=(0, 1), cores_per_worker=2, fallback=False, runtime_dir=str(runtime),
                  linger_s=0) as executor:
        assert executor.submit(_multiply, 600).result() == (0.0, 2)


def _spawned() -> list[int]:
    context = multiprocessing.get_context("spawn")
    with context.Lock(), context.Pool(2) as pool:
        return pool.map(abs, [-1, -2, -3])


def _forked() -> int:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    os.kill(pid, signal.SIGTERM)                                    # its own may be signalled
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def _ran() -> str:
    return subprocess.run(["sh", "-c", "echo one | cat"], capture_output=True, text=True, check=True).stdout


def _talked() -> bytes:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            return accepted.recv(5, socket.MSG_WAITALL)


def _moved() -> str:
    """Renamed and linked from one directory to another, with rights changed and written again."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        Path(one, "a").write_text("text")
        os.rename(f"{one}/a", f"{two}/b")
        os.link(f"{two}/b", f"{one}/c")
        os.chmod(f"{one}/c", 0o600)
        Path(one, "d").mkdir()
        os.rename(f"{one}/d", f"{two}/d")
        return Path(one, "c").read_text()


def _compiled() -> int:
    import numba
    return numba.njit(lambda n: n * 2)(21)


def _bound() -> int:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(threading.get_native_id(), cores)         # as OpenMP binds its threads
    return len(cores)


def _limited() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return error_of(resource.prlimit, 0, resource.RLIMIT_NOFILE, (soft, hard))


def _threaded() -> list[int]:
    said: list[int] = []
    threads = [threading.Thread(target=said.append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(said)


@pytest.mark.parametrize("deed, result", [
    (_spawned, [1, 2, 3]), (_forked, signal.SIGTERM), (_ran, "one\n"), (_talked, b"hello"), (_moved, "text"),
    (_compiled, 42), (_bound, 1), (_limited, 0), (_threaded, [0, 1, 2, 3])])
def test_an_honest_kernel_notices_nothing(ex, deed, result):
    assert ex.submit(deed).result() == result


def test_a_native_kernel_runs(ex):
    assert ex.Invoke(faults.native("rfm_scale2"), np.ones(2), np.zeros(2)).tolist() == [2, 2]


# --- strict ----------------------------------------------------------------------------------

def _text_of(path: str) -> str:
    return Path(path).read_text()


def _pair() -> bytes:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(b"x")
        return two.recv(1)


def _scratch() -> str:
    Path(tempfile.gettempdir(), "deep").mkdir()
    Path(tempfile.gettempdir(), "deep", "file").write_text("x")
    return tempfile.gettempdir()


def _end_by(number: int) -> None:
    os.kill(os.getpid(), number)


class TestStrict:
    """Kept where Landlock is new enough; where it is not, it is refused, as the node without it below shows."""

    __test__ = ABI >= sandbox.STRICT_ABI

    def test_native_kernels_run(self, strict):
        assert strict.Invoke(faults.native("rfm_scale2"), np.ones(2), np.zeros(2)).tolist() == [2, 2]

    def test_a_strict_worker_reads_its_modules_and_nothing_of_others(self, strict, tmp_path):
        secret = tmp_path / "secret"
        secret.write_text("secret")
        assert strict.submit(error_of, _text_of, str(secret)).result() == errno.EACCES
        assert strict.submit(error_of, os.listdir, str(tmp_path)).result() == errno.EACCES
        assert strict.submit(error_of, _text_of, json.__file__).result() == 0
        assert strict.submit(error_of, _text_of, __file__).result() == 0

    def test_a_strict_worker_writes_its_scratch_directory_and_nothing_else(self, strict, tmp_path):
        kept = tmp_path / "kept"
        kept.write_text("kept")
        assert strict.submit(error_of, os.truncate, str(kept), 0).result() == errno.EACCES
        assert strict.submit(error_of, os.unlink, str(kept)).result() == errno.EACCES
        assert strict.submit(error_of, open, str(kept), "a").result() == errno.EACCES
        assert strict.submit(error_of, os.mkdir, str(tmp_path / "new")).result() == errno.EACCES
        assert strict.submit(error_of, open, __file__, "a").result() == errno.EACCES
        assert kept.read_text() == "kept"
        assert strict.submit(_moved).result() == "text"

    def test_a_strict_worker_opens_no_socket(self, strict):
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
            assert strict.submit(error_of, socket.socket, family).result() == errno.EPERM
        assert strict.submit(_pair).result() == b"x"

    @pytest.mark.parametrize("deed, result", [
        (_ran, "one\n"), (_compiled, 42), (_threaded, [0, 1, 2, 3]), (_forked, signal.SIGTERM), (_limited, 0)])
    def test_a_strict_worker_still_computes(self, strict, deed, result):
        assert strict.submit(deed).result() == result

    def test_scratch_directories_go_with_their_workers_however_these_end(self, tmp_path, runtime, monkeypatch,
                                                                         wait_until):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        left = tmp_path / f"rfaas-scratch-{os.getuid()}-left"           # as a zygote that was killed leaves it
        (left / "123").mkdir(parents=True)
        with Executor(workers=1, cores=(0, 1), sandbox="strict", fallback=False,
                      runtime_dir=str(runtime), linger_s=0) as executor:
            assert not left.exists()
            first = Path(executor.submit(_scratch).result())
            assert first.is_dir() and first.parent.parent == tmp_path
            with pytest.raises(Exception, match="SIGSEGV"):
                executor.submit(_end_by, signal.SIGSEGV).result()
            second = Path(executor.submit(_scratch).result())
            assert second != first and not first.exists()
        wait_until(lambda: not any(tmp_path.iterdir()), "the scratch directories are removed")


def test_a_scratch_directory_in_use_is_no_other_s_to_remove(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = Scratch(), Scratch()
    assert first.path.is_dir() and second.path.is_dir()
    first.close()
    assert not first.path.exists() and second.path.is_dir()
    second.close()
    second.close()
    assert list(tmp_path.iterdir()) == []


# --- a node without Landlock --------------------------------------------------------------

WITHOUT_LANDLOCK = f"""
    import os, struct, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from rfaas_mpi.agent import child, sandbox
    child.gain_no_privileges()
    # load the number; landlock_create_ruleset: ENOSYS; else allow
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (6, 0, 0, {ENOSYS}), (6, 0, 0, {seccomp.ALLOW})]
    sandbox.filter_calls(sandbox.Plan({{}}, b"".join(struct.pack("<HBBI", *line) for line in code), 1))
    assert sandbox.probe().landlock == 0
    from rfaas_mpi import Executor, RFaaSError
    from test_sandbox import _reach, called_with_nonsense
"""


def without_landlock(code: str, *arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose kernel has no Landlock, and which has a service of its own."""
    environment = {**os.environ, "RFAAS_RUNTIME_DIR": str(runtime), "RFAAS_LINGER_S": "0"}
    return subprocess.run([sys.executable, *arguments, "-c", textwrap.dedent(WITHOUT_LANDLOCK) + textwrap.dedent(code)],
                          capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_strict_is_refused_on_a_node_without_landlock(runtime):
    done = without_landlock("""
        for workers in (1, (0, 1), None):
            try:
                Executor(workers=workers, cores=(0, 1), sandbox="strict")
            except RFaaSError as error:
                print(type(error).__name__, error)
    """, runtime=runtime)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    for line in lines:
        assert line.startswith("ServiceError sandbox=strict can't be kept on node ")
        assert "without Landlock" in line and "RFAAS_SANDBOX=default" in line


def test_default_goes_on_without_landlock_and_says_so(runtime):
    done = without_landlock(f"""
        from rfaas_mpi.cli import doctor, service
        with Executor(workers=1, cores=(0, 1), fallback=False) as ex:
            print(ex.submit(called_with_nonsense, {number_of(MACHINE, "ptrace")}).result())
            print(ex.submit(_reach, os.getpid()).result()["signal"])
            print(*service.describe(service.status()))
            print(*doctor.as_text(list(doctor._sandbox())))
    """, runtime=runtime)
    ptrace, signalled, status, report = done.stdout.splitlines()
    assert ptrace == f"(-1, {errno.EPERM})", done.stderr
    assert signalled == "0"
    for text in (status, report):
        assert "default: seccomp, keeps back" in text and "without Landlock" in text


def test_doctor_names_a_strict_policy_that_can_not_be_kept(runtime):
    done = without_landlock("""
        os.environ["RFAAS_SANDBOX"] = "strict"
        from rfaas_mpi.cli import doctor, service
        [check] = [check for check in doctor._sandbox() if check.name == "sandbox"]
        assert not check.ok and check.needed and "can't be kept" in check.reason and "default" in check.fix, check
        print(*service.describe(service.status()))
    """, runtime=runtime)
    assert done.returncode == 0, done.stderr
    assert "can't be kept" in done.stdout


# --- what is told ---------------------------------------------------------------------------

def test_status_shows_the_level_that_workers_have(ex):
    data = cli.status()
    levels = [zygote["sandbox"] for zygote in data["zygotes"] if zygote["sandbox"]]
    assert any(level["policy"] == "default" and level["seccomp"] and level["landlock"] == (ABI if ABI >= 2 else 0)
               for level in levels)
    lines = list(cli.describe(data))
    assert any(line.startswith("sandbox    default: seccomp") for line in lines)
    assert json.loads(json.dumps(data)) == data


def test_status_without_a_service_shows_what_workers_would_get(runtime, monkeypatch):
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(runtime))
    for policy in ("off", "default"):
        monkeypatch.setenv("RFAAS_SANDBOX", policy)
        data = cli.status()
        assert data["sandbox"]["policy"] == policy
        assert any(line.startswith(f"sandbox    {policy}: ") for line in cli.describe(data))


@pytest.mark.parametrize("policy", ["off", "default"])
def test_doctor_shows_what_there_is_and_the_level_that_it_gives(policy, monkeypatch):
    monkeypatch.setenv("RFAAS_SANDBOX", policy)
    checks = {check.name: check for check in doctor._sandbox()}
    assert list(checks) == ["seccomp", "landlock", "sandbox levels", "sandbox"]
    assert checks["seccomp"].ok is not bool(sandbox.probe().no_seccomp)
    assert checks["landlock"].ok is bool(ABI)
    assert checks["sandbox"].reason.startswith(f"{policy}: ") and not checks["sandbox"].needed
