"""Settings: an argument wins over the environment, the environment over files, files over the default.

The only module that reads environment variables and configuration files.
"""

from __future__ import annotations

import difflib
import functools
import os
import pwd
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from rfaas_mpi.errors import ConfigError
from rfaas_mpi.types import TcpOptions

__all__ = [
    "Given", "Places", "Settings", "core_list", "describe", "environment", "files", "inside_worker", "misspelt",
    "packed_environment", "password_in_environment", "places", "scrubbed", "site_users", "slurm_job", "uid_range",
    "user_id",
]

PREFIX = "RFAAS_"
WORKER_MARK = "RFAAS_INSIDE_WORKER"
CONFIG_VARIABLE = "RFAAS_CONFIG"          # files that are read instead of the usual ones, separated by colons
SITE_FILE = Path("/etc/rfaas_mpi/config.toml")
CONFIG_BYTES_MAX = 1 << 20
SWITCHES_MAX = 8
NAME_CHARS_MAX = 128                       # of a switch or a partition
DEVICE_VARIABLE = "RFAAS_DEVICE"          # read by the verbs transport where no argument names one

# Every thread pool that numerical libraries size by an environment variable.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                    "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "GOTO_NUM_THREADS")

# What a launcher gave one rank alone. A service or a worker that kept these
# would differ from rank to rank, or would take itself for that rank. And what
# pytest changes with each test, and where a rank's node is in the network: each
# would start an interpreter of its own.
_RANK_VARIABLES = re.compile(
    r"^(PMI_|PMIX_|PMI2_|OMPI_|OPAL_|ORTE_|PRTE_|MPI_LOCAL|MPIR_|MPICH_INTERFACE|HYDRA_|HYDI_|HYDT_"
    r"|I_MPI_HYDRA|I_MPI_INFO|MV2_COMM_WORLD|PALS_|ALPS_APP|FLUX_TASK|GMON_OUT|KMP_|GOMP_|OMP_PROC_BIND$|OMP_PLACES$"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|STEP|SRUN_|LAUNCH|CPU_BIND|MEM_BIND|DISTRIBUTION|UMASK|PRIO_PROCESS"
    r"|PMI|PTY|TOPOLOGY|TASKS_PER_NODE$)|PYTEST_CURRENT_TEST$|RFAAS_(SWITCHES|PARTITION)$)")


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what belongs to one MPI rank alone."""
    return {name: value for name, value in environment.items() if not _RANK_VARIABLES.match(name)}


def _number(kind: Callable[[str], Any], low: float, high: float = float("inf")) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(f"not between {low} and {high}")
        return value
    return parse


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size_of(text: str) -> int:
    """Bytes of a size like `512M`; ValueError if it isn't one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError("a size looks like 512M, 2GiB or 1048576")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _flag(text: str) -> bool:
    if text.lower() in ("1", "yes", "on", "true"):
        return True
    if text.lower() in ("0", "no", "off", "false", ""):
        return False
    raise ValueError("a switch is yes or no")


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text
    return parse


def core_list(text: str) -> tuple[int, ...]:
    """Core numbers of a list like `0-3,8`; ValueError if it isn't one."""
    cores: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if low < 0 or high < low:
            raise ValueError(f"{part!r} is no range of cores")
        cores.update(range(low, high + 1))
    return tuple(sorted(cores))


def _lend(text: str) -> str:
    return text if text == "auto" else "yes" if _flag(text) else "no"


def _manager(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"unix:/.+|https?://[^/@?#\s]+", name) for name in names):
        raise ValueError("it looks like unix:/PATH, http://HOST:PORT or https://HOST:PORT, with a comma before each "
                         "further manager that may lead")
    return ",".join(names)


def _switches(text: str) -> tuple[str, ...]:
    names = tuple(piece.strip() for piece in text.split(",") if piece.strip())
    if len(names) > SWITCHES_MAX or len(set(names)) != len(names) or max(map(len, names), default=0) > NAME_CHARS_MAX:
        raise ValueError(f"at most {SWITCHES_MAX} names of at most {NAME_CHARS_MAX} characters, none of them twice")
    return names


def _name(text: str) -> str:
    if len(text) > NAME_CHARS_MAX:
        raise ValueError(f"longer than {NAME_CHARS_MAX} characters")
    return text


def _command(text: str) -> str:
    words = shlex.split(text)
    if words and not os.path.isabs(words[0]):
        raise ValueError("a command begins with the path of its program, like /usr/bin/bwrap")
    return shlex.join(words)


def uid_range(text: str) -> range:
    """The uids of `70000-70063`, none of `""`; ValueError if it is something else."""
    if not text:
        return range(0)
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 0x7FFFFFFF:
        raise ValueError("a range of uids looks like 70000-70063")
    return range(int(match[1]), int(match[2]) + 1)


def _uids(text: str) -> str:
    uids = uid_range(text)
    return f"{uids[0]}-{uids[-1]}" if uids else ""


def _setting(default: Any, parse: Callable[[str], Any], what: str) -> Any:
    return field(default=default, metadata={"parse": parse, "what": what})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set; each field `x` also by the environment variable `RFAAS_X`."""

    runtime_dir: str | None = _setting(None, str, "where sockets and locks of services live")
    service: str | None = _setting(None, str, "a service on another node, like tcp://HOST:PORT; default: this node's")
    key_file: str | None = _setting(None, str, "the key that a service on another node shares with its ranks")
    manager: str | None = _setting(
        None, _manager, "a cluster's manager: unix:/PATH, http(s)://HOST:PORT; several with commas")
    auth: str = _setting("auto", _choice("auto", "munge", "key"),
                         "how to prove to a manager who calls; auto: a key if there is one, else munge")
    manager_key_file: str | None = _setting(None, str, "the key that stands for you at a cluster's manager")
    manager_user: str = _setting("root", str, "the user as whom the manager and its agents run, by name or uid")
    munge_socket: str | None = _setting(None, str, "where munged listens; default: where libmunge looks")
    ca_file: str | None = _setting(None, str, "who certifies the manager, for https; default: whom the system trusts")
    transport: str = _setting("auto", _choice("auto", "shm", "tcp", "verbs", "inline"),
                              "how invocations travel; auto: shm on one node, else verbs or tcp; inline: run in the rank")
    lend_jobs: str = _setting("opt-in", _choice("opt-in", "all", "none"),
                              "whether a site's agents lend what jobs leave idle of their own cores: those with "
                              "--comment=lend, all, none")
    lend: str = _setting("auto", _lend, "whether to lend cores: auto, yes (even on a login node) or no")
    cores: tuple[int, ...] = _setting((), core_list, "lend exactly these cores, like 2-5,8; default: find out")
    linger_s: float = _setting(2.0, _number(float, 0), "how long the service stays after its last rank")
    start_timeout_s: float = _setting(20.0, _number(float, 0.1), "how long to wait for the service to start or answer")
    lease_duration_s: float | None = _setting(
        None, _number(float, 0.001, 1e9), "when leases end at the latest; default: when they are given back")
    lease_timeout_s: float = _setting(10.0, _number(float, 0), "how long to wait for cores when none is spare")
    idle_s: float | None = _setting(None, _number(float, 0.01, 86400),
                                    "workers beyond the least go back when all were idle for so long, and are asked "
                                    "for when calls queue; default: kept")
    zygote_idle_s: float = _setting(300.0, _number(float, 0), "how long a zygote without workers stays")
    meter_s: float = _setting(10.0, _number(float, 0.01, 3600), "how often an agent tells what its workers have used")
    usage_days: int = _setting(400, _number(int, 31, 36500), "for how many days a manager keeps sums of what was used")
    spin_us: int = _setting(1000, _number(int, 0, 10_000_000), "how long a waiter spins before it sleeps")
    spin_us_max: int | None = _setting(None, _number(int, 0, 10_000_000),
                                       "the longest that workers may spin on a node that lends; 0: not at all")
    slots: int = _setting(16, _number(int, 2, 64), "slots of a connection from rank to worker")
    slot_bytes: int = _setting(16384, _number(size_of, 64, 1 << 20), "size of one slot")
    memory_per_worker: int | None = _setting(None, size_of, "memory a worker may use; default: a fair share")
    constants_bytes: int | None = _setting(None, size_of, "constants that a worker keeps over tcp, before those not used "
                                           "for longest go; 0: any amount; default: 3/4 of its memory")
    sandbox: str = _setting("default", _choice("off", "default", "strict"),
                            "what a kernel in a worker may do; strict: read modules, write a scratch directory")
    memory_limit: str = _setting("auto", _choice("auto", "cgroup", "watch"),
                                 "what keeps workers within their memory; cgroup: fail where there is none")
    worker_prefix: str = _setting("", _command, "a command that workers are started through, as a container")
    service_user: str = _setting("", str, "the user that a node's agent becomes if root starts it, to serve every user")
    switches: tuple[str, ...] = _setting((), _switches,
                                         "the switches above this node, from its leaf switch up, like leaf3,core")
    partition: str = _setting("", _name, "what nodes of one kind here are called, as the batch system's partition")
    slurm_template: str | None = _setting(None, str, "the site's batch script, in which `rfaas slurm script` fills in lines")
    worker_identity: str = _setting("user", _choice("user", "pool"),
                                    "as whom workers run there: as who leased them, or as a user of the pool")
    worker_pool: str = _setting("", _uids, "the pool: uids that are nobody's, like 70000-70063")
    uid_min: int = _setting(1000, _number(int, 1, 0x7FFFFFFF), "the lowest uid that such an agent serves")
    zygote_memory: int = _setting(2 << 30, size_of, "what another user's zygote may hold; 0: any amount")
    memory_reserve: int = _setting(512 << 20, size_of, "memory of the node that is never lent")
    low_priority: str = _setting("auto", _choice("auto", "yes", "no"),
                                 "workers leave their cores to whoever else wants them; auto: where owners may be")
    fallback: bool = _setting(True, _flag, "run on the rank what no worker could run")
    integrity: bool = _setting(False, _flag, "check what travels over tcp once more, with a crc32c")
    device: str = _setting("", str, "the device for verbs, like mlx5_0; default: the first that works")
    tcp_idle_s: int = _setting(5, _number(int, 1, 32767), "a silent TCP peer is asked after so long if it lives")
    tcp_probe_s: int = _setting(2, _number(int, 1, 32767), "and again after so long")
    tcp_probes: int = _setting(3, _number(int, 1, 127), "and given up after so many questions")
    tcp_timeout_s: float = _setting(15.0, _number(float, 0.1, 86400), "how long a TCP peer may leave data unacknowledged")
    debug: bool = _setting(False, _flag, "tracebacks in the CLI, more in the log")

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Settings from `arguments` (None: not given), the environment, `files()` and defaults.

        With an environment that isn't this process' own no file is read. Raises
        ConfigError that names the setting, its source and what it takes.
        """
        return cls(**{name: given.value for name, given in cls.given(environment, **arguments).items()})

    @classmethod
    def given(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Given]:
        """What `load` would take from elsewhere than the defaults, and from where. Raises ConfigError as it does."""
        # Asked for each setting; os.environ encodes each name first.
        own = dict(os.environ) if environment is None else environment
        return cls._found(own, environment is None, arguments)

    @classmethod
    def _found(cls, own: Mapping[str, str], with_files: bool, arguments: Mapping[str, Any]) -> dict[str, Given]:
        known = _known()
        for name in arguments:
            if name not in known:
                raise _unknown(name, f"there is no setting {name!r}")
        found: dict[str, tuple[Any, str, str]] = {}
        if with_files:
            for path, in_file in _read_files(own):
                found |= {name: (value, str(path), f"{name} = {value!r} in {path}") for name, value in in_file.items()}
        for name, variable in _variables().items():
            if (text := own.get(variable, "")) != "":
                found[name] = text, variable, f"{variable}={text!r}"
        for name, value in arguments.items():
            if value is not None:
                found[name] = value, "argument", f"argument {name}={value!r}"
        return {name: Given(_parsed(known[name].metadata, value, source), origin)
                for name, (value, origin, source) in found.items()}

    @property
    def tcp(self) -> TcpOptions:
        """When a silent TCP peer is given up."""
        return TcpOptions(self.tcp_idle_s, self.tcp_probe_s, self.tcp_probes, self.tcp_timeout_s)

    def with_(self, **changes: Any) -> Settings:
        """A copy with some fields changed; unchecked."""
        return replace(self, **changes)


class Given(NamedTuple):
    """A setting that is not left at its default; `origin` is "argument", a variable or a file."""

    value: Any
    origin: str


@functools.cache
def _known() -> Mapping[str, Field[Any]]:
    return {item.name: item for item in fields(Settings)}


@functools.cache
def _variables() -> Mapping[str, str]:
    return {name: PREFIX + name.upper() for name in _known()}


def misspelt(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that are no setting's, and so are not heeded, but are close to one: name → that setting's variable."""
    known = set(_variables().values())
    strange = [name for name in environment if name.startswith(PREFIX) and name not in {*known, CONFIG_VARIABLE}]
    near = {name: difflib.get_close_matches(name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], 1, 0.8)
            for name in strange}
    return {name: PREFIX + found[0] for name, found in near.items() if found}


def _unknown(name: str, said: str) -> ConfigError:
    known = list(_known())
    near = difflib.get_close_matches(name, known, 1)
    return ConfigError(said, hint=f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}")


def _parsed(metadata: Mapping[str, Any], value: Any, source: str) -> Any:
    try:
        return metadata["parse"](value if isinstance(value, str) else _as_text(value))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source} is not possible: {error}", hint=metadata["what"]) from None


# --- files --------------------------------------------------------------------

def files(environment: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The files that settings are read from, the strongest last; those of `RFAAS_CONFIG` have to exist."""
    env = os.environ if environment is None else environment
    if named := env.get(CONFIG_VARIABLE):
        return tuple(Path(piece) for piece in named.split(os.pathsep) if piece)
    home = env.get("XDG_CONFIG_HOME") or (os.path.join(env["HOME"], ".config") if env.get("HOME") else "")
    return (SITE_FILE, *([Path(home, "rfaas_mpi", "config.toml")] if os.path.isabs(home) else []))


def _read_files(environment: Mapping[str, str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    must_exist = bool(environment.get(CONFIG_VARIABLE))
    known = _known()
    for path in files(environment):
        if str(path) == os.devnull:
            continue
        try:
            text = trusted_text(path)
        except (FileNotFoundError, NotADirectoryError):
            if must_exist:
                raise ConfigError(f"{CONFIG_VARIABLE} names {path}, which isn't there") from None
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration file {path} can't be read: {error}") from None
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no TOML: {error}") from None
        for name, value in found.items():
            if name not in known:
                raise _unknown(name, f"{path} sets {name!r}, and there is no such setting")
            if isinstance(value, dict):
                raise ConfigError(f"{name} in {path} is a table, and takes one value")
        yield path, found


def trusted_text(path: Path) -> str:
    """What the file holds. Raises OSError, and ConfigError where others could have written it."""
    # not to wait for a FIFO
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"the configuration file {path} is no file")
        if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
            raise ConfigError(f"other users could have written {path}",
                              hint=f"it has to belong to you or root: chown {os.getuid()} {path}; chmod go-w {path}")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    if len(data) > CONFIG_BYTES_MAX:
        raise ConfigError(f"the configuration file {path} is longer than {CONFIG_BYTES_MAX} bytes")
    return data.decode()


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(str(item) for item in value)
    return os.fspath(value) if hasattr(value, "__fspath__") else str(value)


def describe() -> list[tuple[str, str, str]]:
    """(variable, default, meaning) of every setting, for help and documentation."""
    return [(PREFIX + item.name.upper(), str(item.default), item.metadata["what"]) for item in fields(Settings)]


def environment() -> dict[str, str]:
    """A copy of this process' environment, in which files' settings are variables.

    Services and workers are started from it, on other nodes too: they need no file.
    """
    copy = dict(os.environ)
    for name, given in Settings._found(copy, True, {}).items():
        if given.origin != PREFIX + name.upper():
            copy[PREFIX + name.upper()] = _as_text(given.value)
    copy[CONFIG_VARIABLE] = os.devnull
    return copy


def packed_environment(sandbox: str) -> tuple[tuple[bytes, bytes], ...]:
    """environment(), as a join carries it, with that sandbox. What files say is read once for each environment."""
    return _packed(tuple(os.environb.items()), sandbox)


@functools.lru_cache(maxsize=4)
def _packed(_own: tuple[tuple[bytes, bytes], ...], sandbox: str) -> tuple[tuple[bytes, bytes], ...]:
    wanted = {**environment(), f"{PREFIX}SANDBOX": sandbox}
    return tuple((os.fsencode(name), os.fsencode(value)) for name, value in wanted.items())


def inside_worker(environment: Mapping[str, str] | None = None) -> bool:
    """True in a worker and in whatever a kernel starts there."""
    return WORKER_MARK in (os.environ if environment is None else environment)


def password_in_environment(environment: Mapping[str, str] | None = None) -> bool:
    """True where PostgreSQL's library would take a password from the environment."""
    return bool((os.environ if environment is None else environment).get("PGPASSWORD"))


def slurm_job(environment: Mapping[str, str] | None = None) -> str:
    """The id of the Slurm job around this process, or an empty string."""
    return (os.environ if environment is None else environment).get("SLURM_JOB_ID", "")


def user_id(user: str) -> int:
    """The uid of a user given by name or number. ConfigError for one that this node doesn't know."""
    if user.isascii() and user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise ConfigError(f"this node knows no user {user!r}",
                          hint="RFAAS_MANAGER_USER is a user's name or uid: the one as whom the manager runs") from None


def site_users(settings: Settings) -> frozenset[int]:
    """The users whose daemons on this node we have to do with: root, ourselves, the manager's. ConfigError."""
    return frozenset((0, os.geteuid(), user_id(settings.manager_user)))


@dataclass(frozen=True)
class Places:
    """Where runtime files may live."""

    given: str | None
    xdg: str | None


def places(settings: Settings, environment: Mapping[str, str] | None = None) -> Places:
    """The candidates for the runtime directory that settings and environment name."""
    env = os.environ if environment is None else environment
    return Places(given=settings.runtime_dir, xdg=env.get("XDG_RUNTIME_DIR") or None)
