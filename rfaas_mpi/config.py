"""Settings: an argument wins over the environment, the environment over the default.

The only module that reads environment variables.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rfaas_mpi.errors import ConfigError
from rfaas_mpi.types import TcpOptions

__all__ = [
    "Places", "Settings", "core_list", "describe", "environment", "inside_worker", "places", "scrubbed", "slurm_job",
]

PREFIX = "RFAAS_"
WORKER_MARK = "RFAAS_INSIDE_WORKER"
DEVICE_VARIABLE = "RFAAS_DEVICE"          # read by the verbs transport where no argument names one

# Every thread pool that numerical libraries size by an environment variable.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                    "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "GOTO_NUM_THREADS")

# What a launcher gave one rank alone. A service or a worker that kept these
# would differ from rank to rank, or would take itself for that rank. And what
# pytest changes with each test: each would start an interpreter of its own.
_RANK_VARIABLES = re.compile(
    r"^(PMI_|PMIX_|PMI2_|OMPI_|OPAL_|ORTE_|PRTE_|MPI_LOCAL|MPIR_|MPICH_INTERFACE|HYDRA_|HYDI_|HYDT_"
    r"|I_MPI_HYDRA|I_MPI_INFO|MV2_COMM_WORLD|PALS_|ALPS_APP|FLUX_TASK|GMON_OUT|KMP_|GOMP_|OMP_PROC_BIND$|OMP_PLACES$"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|STEP|SRUN_|LAUNCH|CPU_BIND|MEM_BIND|DISTRIBUTION|UMASK|PRIO_PROCESS"
    r"|PMI|PTY|TOPOLOGY|TASKS_PER_NODE$)|PYTEST_CURRENT_TEST$)")


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


def _size(text: str) -> int:
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


def _setting(default: Any, parse: Callable[[str], Any], what: str) -> Any:
    return field(default=default, metadata={"parse": parse, "what": what})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set; each field `x` also by the environment variable `RFAAS_X`."""

    runtime_dir: str | None = _setting(None, str, "where sockets and locks of services live")
    service: str | None = _setting(None, str, "a service on another node, like tcp://HOST:PORT; default: this node's")
    key_file: str | None = _setting(None, str, "the key that a service on another node shares with its ranks")
    transport: str = _setting("auto", _choice("auto", "shm", "tcp", "verbs", "inline"),
                              "how invocations travel; auto: shm on one node, else verbs or tcp; inline: run in the rank")
    lend: str = _setting("auto", _lend, "whether to lend cores: auto, yes (even on a login node) or no")
    cores: tuple[int, ...] = _setting((), core_list, "lend exactly these cores, like 2-5,8; default: find out")
    linger_s: float = _setting(2.0, _number(float, 0), "how long the service stays after its last rank")
    start_timeout_s: float = _setting(20.0, _number(float, 0.1), "how long to wait for the service to start or answer")
    lease_timeout_s: float = _setting(10.0, _number(float, 0), "how long to wait for cores when none is spare")
    zygote_idle_s: float = _setting(300.0, _number(float, 0), "how long a zygote without workers stays")
    spin_us: int = _setting(1000, _number(int, 0, 10_000_000), "how long a waiter spins before it sleeps")
    slots: int = _setting(16, _number(int, 2, 64), "slots of a connection from rank to worker")
    slot_bytes: int = _setting(16384, _number(_size, 64, 1 << 20), "size of one slot")
    memory_per_worker: int | None = _setting(None, _size, "memory a worker may use; default: a fair share")
    sandbox: str = _setting("default", _choice("off", "default", "strict"),
                            "what a kernel in a worker may do; strict: read modules, write a scratch directory")
    memory_reserve: int = _setting(512 << 20, _size, "memory of the node that is never lent")
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
        """Settings from `arguments` (None: not given), the environment and defaults.

        Raises ConfigError that names the setting, its source and what it takes.
        """
        environment = os.environ if environment is None else environment
        known = {item.name: item for item in fields(cls)}
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(f"there is no setting {name!r}",
                                  hint=f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            given = arguments.get(name)
            variable = PREFIX + name.upper()
            if given is not None:
                source, text = f"argument {name}={given!r}", given
            elif environment.get(variable, "") != "":
                source, text = f"{variable}={environment[variable]!r}", environment[variable]
            else:
                continue
            try:
                values[name] = item.metadata["parse"](text if isinstance(text, str) else _as_text(text))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{source} is not possible: {error}", hint=item.metadata["what"]) from None
        return cls(**values)

    @property
    def tcp(self) -> TcpOptions:
        """When a silent TCP peer is given up."""
        return TcpOptions(self.tcp_idle_s, self.tcp_probe_s, self.tcp_probes, self.tcp_timeout_s)

    def with_(self, **changes: Any) -> Settings:
        """A copy with some fields changed; unchecked."""
        return replace(self, **changes)


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
    """A copy of this process' environment."""
    return dict(os.environ)


def inside_worker(environment: Mapping[str, str] | None = None) -> bool:
    """True in a worker and in whatever a kernel starts there."""
    return WORKER_MARK in (os.environ if environment is None else environment)


def slurm_job(environment: Mapping[str, str] | None = None) -> str:
    """The id of the Slurm job around this process, or an empty string."""
    return (os.environ if environment is None else environment).get("SLURM_JOB_ID", "")


@dataclass(frozen=True)
class Places:
    """Where runtime files may live."""

    given: str | None
    xdg: str | None


def places(settings: Settings, environment: Mapping[str, str] | None = None) -> Places:
    """The candidates for the runtime directory that settings and environment name."""
    env = os.environ if environment is None else environment
    return Places(given=settings.runtime_dir, xdg=env.get("XDG_RUNTIME_DIR") or None)
