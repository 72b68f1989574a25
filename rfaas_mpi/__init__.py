"""An MPI rank borrows spare cores and calls stateless kernels on them in about a microsecond.

Importing this initialises nothing, starts nothing and needs no MPI. Names are
loaded when they are first used, so that the service, the CLI and the workers
load no more than they need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rfaas_mpi._version import __version__

if TYPE_CHECKING:
    from concurrent.futures import CancelledError

    from rfaas_mpi._include import get_include
    from rfaas_mpi.arrays import Constant
    from rfaas_mpi.errors import (
        AuthError,
        Backpressure,
        BadKernel,
        ClosedError,
        ConfigError,
        ForkedError,
        InvalidBuffer,
        KernelChanged,
        KernelError,
        KernelTimeout,
        LeaseDenied,
        LeaseExpired,
        LeaseRevoked,
        NestedError,
        RFaaSError,
        ServiceError,
        ServiceLost,
        TransportError,
        VersionMismatch,
        WorkerLost,
    )
    from rfaas_mpi.executor import Executor
    from rfaas_mpi.futures import Future
    from rfaas_mpi.kernels import Kernel, kernel
    from rfaas_mpi.requests import (
        PersistentRequest,
        Request,
        Startall,
        Testall,
        Testany,
        Testsome,
        Waitall,
        Waitany,
        Waitsome,
    )
    from rfaas_mpi.types import UNDEFINED

__all__ = [
    "UNDEFINED", "AuthError", "Backpressure", "BadKernel", "CancelledError", "ClosedError", "ConfigError",
    "Constant", "Executor", "ForkedError", "Future", "InvalidBuffer", "Kernel", "KernelChanged", "KernelError",
    "KernelTimeout", "LeaseDenied", "LeaseExpired", "LeaseRevoked", "NestedError", "PersistentRequest",
    "RFaaSError", "Request", "ServiceError", "ServiceLost", "Startall", "Testall", "Testany", "Testsome",
    "TransportError", "VersionMismatch", "Waitall", "Waitany", "Waitsome", "WorkerLost", "__version__",
    "get_include", "kernel",
]

_HOME = {
    "CancelledError": "concurrent.futures",
    "Constant": "rfaas_mpi.arrays",
    "Executor": "rfaas_mpi.executor",
    "Future": "rfaas_mpi.futures",
    "Kernel": "rfaas_mpi.kernels",
    "UNDEFINED": "rfaas_mpi.types",
    "get_include": "rfaas_mpi._include",
    "kernel": "rfaas_mpi.kernels",
    **dict.fromkeys(("PersistentRequest", "Request", "Startall", "Testall", "Testany", "Testsome", "Waitall",
                     "Waitany", "Waitsome"), "rfaas_mpi.requests"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "rfaas_mpi.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
