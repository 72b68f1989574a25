"""Runs a command on a machine that has RDMA: a guest with Linux's software devices.

Debian's own kernel boots in QEMU, emulated, with as many verbs devices as nodes are
wanted. There is no disk image: the guest sees this machine's files, through 9p, with
its own memory above them. So the command finds compilers, programs and virtual
environments where it expects them, and can write anywhere without reaching the
host; only directories named as writable are written through.

    python tests/rdma_guest.py [options] -- COMMAND [ARGUMENT...]

COMMAND runs as root, in the current directory, with this environment (less what looks
secret) and an empty stdin. The exit status is its own; 128 + N when signal N ended
it, 124 when time ran out, 125 when the guest failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import lzma
import os
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

HERE = Path(__file__).resolve().parent / "guest"
# In Linux 6.1, whoever posts moves rxe's packets himself; later kernels leave that to
# threads that wait behind the pollers for a processor.
SERIES = "6.1"
# These and what they depend on, in this order; a module that the kernel does not
# have is built in, or its absence is noticed when a device is made.
MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay",
           "crc32_generic", "crc32_pclmul", "veth", "bridge", "ib_uverbs", "rdma_ucm", "rdma_rxe")
NEEDED = ("9p", "overlay", "veth", "bridge", "ib_uverbs", "rdma_ucm", "rdma_rxe")
# Large, and nothing that we load depends on them.
UNREAD = ("sound/", "drivers/gpu/", "drivers/media/", "drivers/net/wireless/", "drivers/net/ethernet/")
PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "ip": "iproute2", "rdma": "iproute2",
            "setpriv": "util-linux", "gcc": "gcc", "dpkg-deb": "dpkg"}
IN_GUEST = "RFAAS_GUEST_NODES"  # set in COMMAND's environment
SUBNET = "10.77.0"
MTU = 4200  # room for RoCE's largest packets, of 4096 bytes
TIMED_OUT, GUEST_FAILED = 124, 125
_SECRET_NAME = re.compile(r"secret|token|passw|credential|private|cookie|auth|api_?key|access_?key", re.I)
_SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]*@")


class GuestError(Exception):
    """The guest could not be made, or ended before the command did; the text says why."""


# --- the kernel: a Debian package, unpacked, never installed ---------------------

@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the guest boots."""

    image: Path
    modules: tuple[Path, ...]  # in the order in which to load them


def cache_directory() -> Path:
    """$RFAAS_VM_CACHE, else a directory of ours in the user's cache."""
    if named := os.environ.get("RFAAS_VM_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "rfaas_mpi" / "guest"


def prepare(cache: Path | None = None) -> Kernel:
    """The kernel from the cache, downloaded first if it is not there.

    GuestError names the programs that are missing, or what apt said.
    """
    absent = sorted({package for program, package in PACKAGES.items() if not _which(program)})
    if absent:
        raise GuestError(f"the RDMA guest needs programs that are not installed; as root: "
                         f"apt-get install --no-install-recommends {' '.join(absent)}")
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(repr((SERIES, MODULES, UNREAD)).encode()).hexdigest()[:8]
    with _locked(cache / "lock"):
        if not (ready := sorted(cache.glob(f"linux-image-*.{stamp}"))):
            ready = [_fetch_kernel(cache, stamp)]
    root = ready[-1]
    names = (root / "order").read_text().split()
    return Kernel(root / "vmlinux", tuple(root / "modules" / name for name in names))


def _which(program: str) -> str | None:
    # Where users other than root don't look.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_kernel(cache: Path, stamp: str) -> Path:
    # A directory of that name is complete: it is renamed when all is in it.
    for rest in cache.glob("unfinished-*"):
        shutil.rmtree(rest)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as directory:
        where = Path(directory)
        package = _download(where)
        print(f"unpacking {package.name} into {cache}", file=sys.stderr)
        _unpack(package, where / "kernel")
        name = package.name.partition("_")[0]
        return (where / "kernel").rename(cache / f"{name}.{stamp}")


def _download(where: Path) -> Path:
    """The newest kernel package of the series that apt knows, as a file.

    With an index of our own, made as any user, where the system's has no such package
    or names one that the mirror has replaced.
    """
    state = where / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True)
    own = [f"-oDir::State::Lists={state}/lists", f"-oDir::Cache={state}"]
    why = "apt knows no kernel package"
    for options in ([], own):
        if options:
            _call("apt-get", *options, "update", "-qq")
        if name := _newest_package(options):
            try:
                _call("apt-get", *options, "-oAPT::Sandbox::User=", "download", "-q", name, cwd=where)
                return next(where.glob("linux-image-*.deb"))
            except GuestError as error:
                why = str(error)
    raise GuestError(f"no kernel for the RDMA guest: {why}")


def _newest_package(options: Sequence[str]) -> str | None:
    pattern = rf"^linux-image-{re.escape(SERIES)}\.[0-9.]+-[0-9]+-amd64$"
    found = [line.split()[0] for line in
             _call("apt-cache", *options, "search", "--names-only", pattern).splitlines()]
    if not found:  # another release of Debian: what it would install
        about = _call("apt-cache", *options, "depends", "linux-image-amd64")
        found = re.findall(r"Depends: (linux-image-\d\S*)", about)
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)


def _unpack(package: Path, into: Path) -> None:
    """vmlinux, modules/ and their order, out of a kernel package."""
    bootable, modules = b"", {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking:
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                _, _, module = member.name.partition("/kernel/")
                if member.name.startswith("./boot/vmlinuz-"):
                    bootable = _contents(archive, member)
                elif ".ko" in module and not module.startswith(UNREAD):
                    data = _contents(archive, member)
                    modules[_module_name(module)] = lzma.decompress(data) if module.endswith(".xz") else data
    if unpacking.returncode != 0 or not bootable:
        raise GuestError(f"{package.name} holds no kernel, or dpkg-deb could not read it")
    if lacking := [name for name in NEEDED if name not in modules]:
        raise GuestError(f"{package.name} lacks modules: {', '.join(lacking)}")
    order = _load_order(modules)
    (into / "modules").mkdir(parents=True)
    for name in order:
        (into / "modules" / f"{name}.ko").write_bytes(modules[name])
    (into / "order").write_text("".join(f"{name}.ko\n" for name in order))
    (into / "vmlinux").write_bytes(_uncompressed(bootable))


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _load_order(modules: Mapping[str, bytes]) -> list[str]:
    """MODULES and what their own descriptions say that they depend on, dependencies first."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in modules or name in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)", modules[name])
        for other in depends[1].decode().split(",") if depends else []:
            add(other.replace("-", "_"))
        order.append(name)

    for name in MODULES:
        add(name)
    return order


def _uncompressed(image: bytes) -> bytes:
    """The ELF file in a bzImage: emulated, the kernel's own decompressor takes seconds.

    The image itself where it is compressed in a way that we can't read.
    """
    # Linux's Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (sectors + 1) * 512 + offset
    payload = image[begin:begin + length - 4]  # the size of the contents follows
    try:
        if payload.startswith(b"\xfd7zXZ"):
            plain = lzma.decompress(payload)
        elif payload.startswith(b"\x28\xb5\x2f\xfd") and (zstd := shutil.which("zstd")):
            plain = subprocess.run([zstd, "-dc"], input=payload, stdout=subprocess.PIPE, check=True).stdout
        else:
            return image
    except (lzma.LZMAError, subprocess.CalledProcessError) as error:
        raise GuestError(f"the kernel's image could not be decompressed: {error}") from error
    return plain if plain.startswith(b"\x7fELF") else image


def _call(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C.UTF-8"})
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


# --- the initial file system: process 1, modules, the job -------------------------

def _archive(files: Mapping[str, bytes]) -> bytes:
    """A cpio archive ("newc") of files, the directories above them and a console."""
    directories = {str(parent): None for name in files for parent in reversed(Path(name).parents[:-1])}
    entries = [(name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in [*directories, "dev"]]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)))
    entries += [(name, stat.S_IFREG | 0o755, data, (0, 0)) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    archive = bytearray()
    for inode, (name, mode, data, (major, minor)) in enumerate(entries, 1):
        # inode mode uid gid links mtime size dev(2) rdev(2) length of the name, checksum
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        archive += b"070701" + "".join(f"{field:08x}" for field in fields).encode()
        for part in (name.encode() + b"\0", data):
            archive += part
            archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _process_1() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "init"
        _call("gcc", "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-static",
              "-o", str(program), str(HERE / "init.c"))
        return program.read_bytes()


def _strings(items: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(item) + b"\0" for item in items)


def harmless(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment less the variables that look as if they held a secret."""
    return {name: value for name, value in environment.items()
            if not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)}


# --- the machine --------------------------------------------------------------------

class Guest:
    """A guest that runs one command; its output is passed on while we wait for it.

    It is killed when it is closed, when its time is up, and when this process ends,
    however that happens. Must be made by a thread that lives as long as the guest.
    """

    def __init__(self, command: Sequence[str], *, nodes: int = 2, timeout_s: float = 300.0,
                 writable: Sequence[Path] = (), cpus: int = 2, memory_mib: int = 2048,
                 directory: Path | None = None, environment: Mapping[str, str] | None = None,
                 stdout: BinaryIO | None = None, stderr: BinaryIO | None = None,
                 kernel_arguments: str = "", cache: Path | None = None, niceness: int = 0) -> None:
        self.status: int | None = None  # as a shell would say it, once the guest has ended
        self._kernel = prepare(cache)
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._said = b""
        self._closing: list[Callable[[], object]] = []
        try:
            files = self._files([*command], nodes, writable, directory or Path.cwd(),
                                os.environ if environment is None else environment)
            self._boot(files, writable, cpus, memory_mib, kernel_arguments,
                       (stdout or sys.stdout.buffer, stderr or sys.stderr.buffer), niceness)
        except BaseException:
            self.close()
            raise

    def _files(self, command: Sequence[str], nodes: int, writable: Sequence[Path],
               directory: Path, environment: Mapping[str, str]) -> dict[str, bytes]:
        network = f"HOSTNAME=rdma-guest NODES={nodes} SUBNET={SUBNET} MTU={MTU}\n"
        environment = {**harmless(environment), IN_GUEST: str(nodes)}
        return {
            "init": _process_1(),
            "order": "".join(f"{module.name}\n" for module in self._kernel.modules).encode(),
            **{f"modules/{module.name}": module.read_bytes() for module in self._kernel.modules},
            "job/argv": _strings(command),
            "job/env": _strings([f"{name}={value}" for name, value in environment.items()]),
            "job/cwd": _strings([str(directory)]),
            "job/writable": _strings([str(path) for path in writable]),
            "job/network": network.encode() + (HERE / "network.sh").read_bytes(),
        }

    def _boot(self, files: Mapping[str, bytes], writable: Sequence[Path], cpus: int, memory_mib: int,
              kernel_arguments: str, outputs: tuple[BinaryIO, BinaryIO], niceness: int) -> None:
        # Memory and pipes only: whatever ends us, nothing stays on a disk.
        initial, self._console, self._complaints = (
            self._memory_file(name) for name in ("initial", "console", "complaints"))
        initial.write(_archive(files))
        initial.flush()
        ours, theirs = socket.socketpair()
        self._closing.append(ours.close)
        self._streams: dict[int, BinaryIO | None] = {ours.fileno(): None}
        ends = []
        for output in outputs:
            reading, writing = os.pipe()
            self._closing.append(functools.partial(os.close, reading))
            self._streams[reading] = output
            ends.append(writing)
        try:
            self._machine = subprocess.Popen(
                self._command(initial, theirs.fileno(), ends, writable, cpus, memory_mib, kernel_arguments),
                stdin=subprocess.DEVNULL, stdout=self._complaints, stderr=self._complaints,
                # A Ctrl-C is for us to handle.
                start_new_session=True,
                pass_fds=[theirs.fileno(), initial.fileno(), self._console.fileno(), *ends])
        finally:
            theirs.close()
            for end in ends:
                os.close(end)
        self._closing.append(self._kill)
        if niceness:
            os.setpriority(os.PRIO_PROCESS, self._machine.pid, niceness)
            # In a session of its own that alone would be no word about it and other sessions.
            with suppress(OSError):
                Path(f"/proc/{self._machine.pid}/autogroup").write_text(str(niceness))
        self._pidfd = os.pidfd_open(self._machine.pid)
        self._closing.append(functools.partial(os.close, self._pidfd))

    def _memory_file(self, name: str) -> BinaryIO:
        file = os.fdopen(os.memfd_create(f"rdma-guest-{name}"), "w+b")
        self._closing.append(file.close)
        return file

    def _command(self, initial: BinaryIO, control: int, ends: Sequence[int], writable: Sequence[Path],
                 cpus: int, memory_mib: int, kernel_arguments: str) -> list[str]:
        def share(tag: str, path: str, rest: str = "") -> list[str]:
            return ["-fsdev", f"local,id={tag},path={path.replace(',', ',,')},security_model=none,"
                              f"multidevs=remap{rest}",
                    "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]

        def port(name: str, backend: str) -> list[str]:
            return ["-chardev", f"{backend},id={name}", "-device", f"virtserialport,chardev={name},name={name}"]

        arguments = ("console=ttyS0 quiet panic=-1 nokaslr mitigations=off cryptomgr.notests "
                     "rcupdate.rcu_expedited=1 tsc=reliable no_timer_check cgroup_no_v1=all "
                     f"random.trust_cpu=on {kernel_arguments}")
        command = [
            "setpriv", "--pdeathsig", "KILL", "--",
            "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max",
            "-machine", "q35", "-smp", str(cpus), "-m", str(memory_mib),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(self._kernel.image), "-initrd", f"/proc/self/fd/{initial.fileno()}",
            "-append", arguments,
            "-serial", f"file:/proc/self/fd/{self._console.fileno()}",
            "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
            *port("control", f"socket,fd={control}"),
            *port("out", f"file,path=/proc/self/fd/{ends[0]}"),
            *port("err", f"file,path=/proc/self/fd/{ends[1]}"),
            *share("host", "/", ",readonly=on"),
        ]
        for number, path in enumerate(writable):
            command += share(f"rw{number}", str(path))
        return command

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the guest if it runs, and frees what we hold. Safe to call twice."""
        while self._closing:
            self._closing.pop()()

    def _kill(self) -> None:
        if self._machine.returncode is None:
            self._machine.kill()
            self._machine.wait()

    def wait(self) -> int:
        """The command's exit status; 124 if its time was up. GuestError says how the guest failed."""
        while self.status is None:
            self.attend(3600.0)
        return self.status

    def attend(self, limit_s: float) -> None:
        """Passes output on for at most that long, or until something has happened.

        Sets `status` when the guest has ended; errors as with wait().
        """
        if self.status is not None:
            return
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            self._kill()
            self._drain()
            self.status = TIMED_OUT
            return
        readable, _, _ = select.select([*self._streams, self._pidfd], [], [], min(limit_s, left_s))
        for fd in readable:
            if fd in self._streams:
                self._pass_on(fd)
        if self._pidfd in readable:
            self._machine.wait()
            self._drain()
            self._conclude()

    def _drain(self) -> None:
        # QEMU, the only writer, has ended, so each has an end.
        for fd in list(self._streams):
            while self._pass_on(fd):
                pass

    def _pass_on(self, fd: int) -> bool:
        data = os.read(fd, 65536)
        if not data:
            del self._streams[fd]
        elif (output := self._streams[fd]) is None:
            self._said += data
        else:
            output.write(data)
            output.flush()
        return bool(data)

    def _conclude(self) -> None:
        reason = "it ended before the command did"
        for line in self._said.decode(errors="replace").splitlines():
            what, _, rest = line.partition(" ")
            match what:
                case "exit":
                    self.status = int(rest)
                case "signal":
                    self.status = 128 + int(rest)
                case "failed":
                    reason = rest
        if self.status is None:
            self._fail(reason)

    def _fail(self, reason: str) -> NoReturn:
        self.status = GUEST_FAILED
        complaint = self._text(self._complaints).strip()
        tail = "\n".join(self.console().splitlines()[-30:])
        raise GuestError(f"the RDMA guest failed: {reason}"
                         + (f"\nQEMU said: {complaint}" if complaint else "")
                         + (f"\nits console ended with:\n{tail}" if tail else "\nits console is empty"))

    def console(self) -> str:
        """What the guest's kernel and set-up have printed; before close()."""
        return self._text(self._console)

    @staticmethod
    def _text(file: BinaryIO) -> str:
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace").replace("\r", "")


# --- the command line ----------------------------------------------------------------

def main(arguments: Sequence[str]) -> int:
    own, command = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="rdma_guest.py", usage="%(prog)s [options] -- COMMAND [ARGUMENT...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, metavar="N",
                        help="verbs devices: rxe0, rxe1, ... (2)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S",
                        help="kill the guest after that long, boot included (300)")
    parser.add_argument("--rw", type=Path, action="append", default=[], metavar="DIRECTORY",
                        help="write through to this directory; may be given several times")
    parser.add_argument("--cpus", type=int, default=2, metavar="N",
                        help="with one, two processes that poll take turns (2)")
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB", help="(2048)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="run it so much below others (0)")
    parser.add_argument("--console", action="store_true", help="print the guest's console at the end")
    parser.add_argument("--prepare", action="store_true", help="only download what a guest needs")
    options = parser.parse_args(own)
    if not options.prepare and not command:
        parser.error("what is to run? Put it behind --")
    if not 1 <= options.nodes <= 16:
        parser.error("--nodes: from 1 to 16")
    for directory in options.rw:
        if not directory.is_dir():
            parser.error(f"--rw: {directory} is not a directory")
    try:
        if options.prepare:
            prepare()
            return 0
        with Guest(command, nodes=options.nodes, timeout_s=options.timeout, cpus=options.cpus,
                   writable=[path.absolute() for path in options.rw], memory_mib=options.memory,
                   niceness=options.nice) as guest:
            try:
                status = guest.wait()
            finally:
                if options.console:
                    sys.stderr.write(guest.console())
    except GuestError as error:
        print(f"rdma_guest.py: {error}", file=sys.stderr)
        return GUEST_FAILED
    if status == TIMED_OUT:
        print(f"rdma_guest.py: killed after {options.timeout:g} s", file=sys.stderr)
    return status


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and the command behind the first `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:at]], [*arguments[at + 1:]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
