"""The Cython layer over csrc: rank side (Invoker, Arena memory, Request) and worker side (Worker)."""
from __future__ import annotations
from collections.abc import Sequence
from typing import Any, Protocol

# Outcome of a request (Request.outcome)
PENDING: int          # 0: not started, or still in flight
OK: int               # 1: result is there
KERNEL_ERROR: int     # 2: kernel raised / returned < 0 / overran; `detail` says what
BAD_KERNEL: int       # 3: could not be loaded or bound; `detail` says why
LARGE: int            # 4: object result kept at the worker; call fetch()
LOST: int             # 5: its worker ended (fence passed); see `worker`, `channel`
TIMEOUT: int          # 6: deadline passed while still queued (never ran)
CANCELLED: int        # 7: cancelled while queued
NO_WORKER: int        # 8: no channel left and none expected (set by Invoker.abandon())
BUSY: int             # 9: worker is draining: try elsewhere
NO_ROOM: int          # 10: an argument lies in memory that no worker has room for; `detail` says why

# Kinds of kernel (Invoker.kernel, WorkerHandlers.load_kernel)
KIND_PYTHON: int      # 1 blob is made by kernels.py
KIND_NATIVE: int      # 2 shared library with the rfm_call ABI
KIND_PLAIN: int       # 3 shared library with rFaaS' ABI
KIND_NUMBA: int       # 4 numba source function + signature
KIND_OBJECT: int      # 5 a callable for submit()

def monotonic_ns() -> int: ...

def transports() -> tuple[str, ...]:
    """Those that can be used here: "shm" and "tcp", and "verbs" where its library and an active port are."""
def load_verbs(path: str | None = None) -> None:
    """Raises TransportError that says why verbs can't be used here."""
def verbs_report(device: str = "") -> dict[str, str]:
    """Facts about an RDMA device, which it opens. Raises TransportError if there is none to use."""

class Block:
    """A piece of an arena: 64-byte aligned, buffer protocol, writable, freed with its last reference.
    Stays valid after Invoker.close()."""
    nbytes: int
    arena: int
    offset: int
    address: int
    def freeze(self) -> None:
        """Its bytes stay as they are from now on: workers on other nodes get them once, not with each call."""
    def close(self) -> None: ...

class KernelRef:
    number: int
    kind: int
    digest: bytes

class Invoker:
    """Rank side of the data plane: memory, channels, queue and the C service thread."""
    def __init__(self, *, slots: int = 16, slot_bytes: int = 16384,
                 spin_us: int = 1000, memory_limit: int = 0) -> None: ...
    closed: bool
    channels: list[Channel]          # live ones
    queued: int                      # invocations that wait for a slot
    in_flight: int
    def alloc(self, nbytes: int, *, zero: bool = False) -> Block:
        """Raises MemoryError. 0 bytes are allowed."""
    def locate(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """(arena, offset) if the bytes lie wholly in one live block, else None."""
    def attach(self, fd: int, *, lease: int, worker: int, timeout_s: float = 10.0, transport: str = "shm",
               data_fd: int = -1, integrity: bool = False, device: str = "") -> Channel:
        """Takes over an authenticated control connection (owns both descriptors from here on).

        transport: "shm" (fd is a Unix socket) | "tcp" (data_fd: a second connection; `integrity`: a crc32c
        of each message) | "verbs" (`device`: name[:port[:gid index]], any if empty).
        Raises TransportError; ValueError for a transport that there is not."""
    def kernel(self, kind: int, digest: bytes, blob: bytes) -> KernelRef:
        """The same digest gives the same ref."""
    def request(self, kernel: KernelRef, inputs: Sequence[Any], outputs: Sequence[Any],
                meta: bytes, *, persistent: bool = False, reclaimable: bool = False) -> Request:
        """A buffers request: contiguous buffers (numpy arrays, Blocks); outputs writable. The caller
        has checked dtype, shape and overlap. Chooses each argument's place; persistent ones
        keep their binding and staging memory until close(). `reclaimable`: on this node it can
        always be cancelled until a worker begins it, not only where it waits behind another one."""
    def object_request(self, kernel: KernelRef, parts: Sequence[Any],
                       refs: Sequence[tuple[int, int, int]] = ()) -> Request:
        """An object request: payload = parts (bytes-like), and refs = (arena, offset, nbytes) of arrays that
        already lie in arenas."""
    def next_watched(self, timeout_s: float | None) -> list[Request]:
        """Requests with watch() that ended; [] after the time-out."""
    def wake(self) -> None: """Makes waiters look again (after an event known to Python only)."""
    def progress(self) -> int: """One look at all channels; completions moved."""
    def abandon(self) -> None: """Ends all queued invocations with NO_WORKER (nobody will serve them)."""
    def limit_constants(self, nbytes: int) -> None: """At most so much of them at each worker over tcp; 0: any."""
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: """Fences every channel, ends everything in flight with LOST. Safe twice."""

class Channel:
    worker: int
    lease: int
    alive: bool
    fenced: bool                     # its worker can't write to our memory any more
    in_flight: int
    pid: int
    why: str                         # what went wrong on it; "" if nothing did
    def close(self) -> None: """Stops using the worker; in-flight invocations end LOST once it can't write any more."""
    def drain(self) -> None: """No new invocations; what is in flight ends normally."""
    def kill(self) -> bool: """SIGKILL through the pidfd; False if not permitted or gone."""

class Request:
    """One invocation at a time; a persistent one can be started again when it is not active."""
    active: bool                 # started and not yet ended
    outcome: int
    id: int
    worker: int                  # worker that ran it last (0: none)
    attempts: int
    exec_ns: int
    out_bytes: int               # bytes of the first output / of the object result
    out_sizes: tuple[int, ...]
    detail: bytes                # kernel error text / pickled exception from the worker
    def start(self, timeout_s: float | None = None) -> None:
        """Never blocks: posts to a free slot or queues. Raises ClosedError, ForkedError,
        RuntimeError when active."""
    def restart(self) -> None: """Re-issue after LOST/BUSY with the same id and attempts + 1."""
    def test(self) -> bool: """Makes progress; True once ended (outcome != PENDING)."""
    def wait(self, timeout_s: float | None = None) -> bool: """Interruptible by signals; False on time-out."""
    def cancel(self) -> bool: """True if it was still queued and now ended CANCELLED."""
    def watch(self) -> None: """Invoker.next_watched will return it when it ended."""
    def result(self) -> list[memoryview]: """Parts of an object result (outcome OK), writable, private."""
    def fetch(self, timeout_s: float | None = None) -> bool:
        """After LARGE: brings the result into memory of the rank, then outcome is OK and result() gives it;
        False on time-out; outcome LOST if the worker ended meanwhile. Waiting and watched requests need it too."""
    def close(self) -> None: """Frees binding and staging; if active, it is cancelled or left to end first."""

def start_all(requests: Sequence[Request]) -> None: ...
def wait_all(requests: Sequence[Request], timeout_s: float | None = None) -> bool: ...
def wait_any(requests: Sequence[Request], timeout_s: float | None = None) -> int:
    """Index of one request that ended; -1 after the time-out."""

class Board:
    """Cells that a rank and its workers take from, as one of them sees it. Not for several threads at once.

    `words`: a writable buffer of `Board.words(cells)` uint64 that all of them share; `edges`: cell k is rows
    edges[k] to edges[k + 1]; `who`: 0 is the rank; `margin`: it leaves a cell to the others if it would need so
    many times what they need for all that is left."""
    def __init__(self, words: object, edges: Sequence[int], who: int, margin: float) -> None: ...
    @staticmethod
    def words(cells: int) -> int:
        """How many uint64 a board of so many cells has."""
    def open(self, now_ns: int = 0, *, least: int = 0, parts: int = 0) -> None:
        """A new piece of work. Nobody may be taking from the board. `now_ns`: 0 is the clock's (CLOCK_MONOTONIC).

        For those who take several cells at once: `least` rows, and `parts` who take."""
    def join(self) -> None:
        """Begins to take cells: what was run before counts no more."""
    def close(self) -> None:
        """Nobody takes another cell. Safe to call twice."""
    def take(self, now_ns: int = 0) -> int:
        """The cell that is to be run now; -1: none."""
    def done(self, k: int, ns: int) -> None:
        """Cell k was run, in so many ns."""
    def take_some(self, now_ns: int = 0) -> tuple[int, int]:
        """The cells that are to be run now, by one call: the first and where they end; (-1, -1): none."""
    def done_some(self, first: int, stop: int, ns: int) -> None:
        """These cells were run by one call, in so many ns."""
    @property
    def left(self) -> list[int]:
        """The cells that nobody has run to their end."""
    @property
    def empty(self) -> bool:
        """Each cell was taken."""
    @property
    def ran(self) -> tuple[int, int, int]:
        """Cells, their rows and ns that this one has run since `join`."""
    def ran_by(self, who: int) -> tuple[int, int, int]:
        """Cells, their rows and ns that somebody has run."""
    def calls_by(self, who: int) -> list[tuple[int, int]]:
        """(rows, ns) of each call by which somebody has run cells, in the cells' order."""

class Calls:
    """A native kernel's calls on memory of this process, one for each cell of a grid, laid out before.

    `arguments`: inputs, then `n_out` outputs: (address, bytes, bytes for each row of the grid, bytes for each
    cell). `keep` is what keeps them, and the kernel, where they are."""
    def __init__(self, address: int, plain: bool, name: str, edges: Sequence[int],
                 arguments: Sequence[tuple[int, int, int, int]], n_out: int, keep: object) -> None: ...
    def run(self, first: int, stop: int) -> None:
        """Runs cells first to stop without the GIL; KernelError as a worker would raise it."""
    def share(self, board: Board, until_ns: int) -> bool:
        """Runs cells that it takes from the board, until there is none for it (True) or that moment has come (False).

        KernelError as a worker would raise it; nobody takes another cell then."""

class WorkerHandlers(Protocol):
    """What the Python side of a worker supplies."""
    def load_kernel(self, kind: int, digest: bytes, blob: memoryview) -> object:
        """Checks the digest; returns a kernel object, raises if it can't be loaded."""
    def kernel_name(self, kernel: object) -> bytes:
        """Under which name the worker's page counts what that kernel takes."""
    def bind(self, kernel: object, meta: bytes, n_in: int, n_out: int) -> int | object:
        """Native kernels: address of the function (int). Python kernels: an object with
        `views(inputs: tuple[memoryview], outputs: tuple[memoryview]) -> thunk`; thunk() runs the kernel
        once on those views and returns None, or a tuple of output byte counts."""
    def run_object(self, kernel: object, parts: tuple[memoryview, ...], refs: tuple[memoryview, ...]) -> list:
        """parts = what the rank gave to object_request, as private writable memory; refs = read-only
        views of arrays in the rank's arenas. Returns the result as a list of bytes-like parts."""
    def format_error(self, error: BaseException) -> bytes:
        """Text + pickled exception for Request.detail."""
    def after_call(self) -> bool:
        """Flush captured output; whether any was written."""

class Worker:
    def __init__(self, agent_fd: int, page_fd: int, handlers: WorkerHandlers, *,
                 spin_us: int = 1000, cpu: int = -1, output_fd: int = 0) -> None: ...
    def run(self) -> int: """Serves until told to end or the agent is gone; returns the exit status."""
