"""Every error that rfaas_mpi raises; each message names the thing and the way out."""

from __future__ import annotations

__all__ = [
    "RFaaSError", "ConfigError", "AuthError", "VersionMismatch", "ServiceError",
    "NoService", "ServiceLost", "StoreError", "NotLeading", "NodeTaken",
    "LeaseDenied", "LeaseExpired", "LeaseRevoked", "WorkerLost",
    "KernelError", "KernelTimeout", "BadKernel", "KernelChanged", "InvalidBuffer",
    "Backpressure", "ClosedError", "TransportError", "ForkedError", "NestedError",
]


def _rebuild(cls: type, args: tuple, state: dict) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class RFaaSError(Exception):
    """Base of all errors raised by rfaas_mpi.

    `hint` is one line that says what to do, or an empty string. Errors survive
    pickling with all their attributes.
    """

    hint: str = ""

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}; {self.hint}" if self.hint else message

    def __reduce__(self):
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(RFaaSError, ValueError):
    """A setting is unknown or has a value out of range."""


class AuthError(RFaaSError, PermissionError):
    """The other side could not prove who it is."""


class VersionMismatch(RFaaSError):
    """Two parts run versions that do not work together: more than one minor version apart."""


class ServiceError(RFaaSError):
    """The service could not be started, joined, or refused a request."""


class NoService(ServiceError):
    """No service runs here, and none was to be started."""


class ServiceLost(ServiceError, ConnectionError):
    """The service ended while it was in use; a new Executor starts another."""


class NodeTaken(ServiceError):
    """Another agent has taken this one's node over; started again it would only take it back."""


class StoreError(ServiceError):
    """The manager's store can't be opened, read or written."""


class NotLeading(StoreError):
    """Another manager has taken the store over: this one decides nothing any more."""


class LeaseDenied(RFaaSError):
    """The demand can't be met now."""


class LeaseExpired(RFaaSError):
    """The lease came to its hard end."""


class LeaseRevoked(RFaaSError):
    """The cores were taken back by their owner."""


class WorkerLost(RFaaSError):
    """A worker ended and the invocation could not be run elsewhere.

    `worker`, `cause`, `signal`, `exit_code` and `last_lines` say how it ended.
    """

    worker: int = 0
    cause: str = "unknown"
    signal: int = 0
    exit_code: int | None = None
    last_lines: tuple[str, ...] = ()


class KernelError(RFaaSError):
    """The kernel failed: it raised, crashed its worker, or returned nonsense.

    The remote exception, where there is one, is `__cause__`. `signal`,
    `exit_code` and `last_lines` are set when the worker died in it.
    """

    signal: int = 0
    exit_code: int | None = None
    last_lines: tuple[str, ...] = ()


class KernelTimeout(KernelError, TimeoutError):
    """The invocation's time limit passed; its worker was stopped."""


class BadKernel(RFaaSError, TypeError):
    """The kernel can't be shipped, loaded or bound."""


class KernelChanged(BadKernel):
    """The module of a kernel was edited since it was first used."""


class InvalidBuffer(RFaaSError, ValueError):
    """An array can't be used as input or output; the message says why."""


class Backpressure(RFaaSError):
    """Every slot is taken: wait for an invocation to end, then try again."""


class ClosedError(RFaaSError, RuntimeError):
    """The executor, request or array was used after its end."""


class TransportError(RFaaSError, OSError):
    """The connection to a worker could not be set up or broke."""


class ForkedError(RFaaSError, RuntimeError):
    """An executor was used in a forked child; make a new one there."""


class NestedError(RFaaSError, RuntimeError):
    """Executor or MPI was used inside a kernel."""
