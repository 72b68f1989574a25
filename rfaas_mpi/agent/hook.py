"""What Slurm's Prolog and Epilog tell a node's agent: that a job is about to start, and that one has ended.

    prolog ──▶ held: nothing is lent ──▶ its group is there: the detector says what it leaves ──▶ lent again
                      └── epilog, or HOLD_S: it never came ──▶ lent again

At a Prolog's time the job has no control group, so that nothing here can tell which cores it will get: all of them
are taken back. What is on the other end is csrc/hook/hook.c, which kills in the groups that are named in a file
beside the socket if it has no answer in time, and leaves a file there for each job that has begun: an agent that
begins after its Prolog waits for its group, too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import struct
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from rfaas_mpi.agent.groups import Roots, maker
from rfaas_mpi.agent.kernel_files import read_text
from rfaas_mpi.errors import ConfigError

__all__ = ["HOLD_S", "HookDoor", "News", "Starting", "groups_text"]

log = logging.getLogger("rfaas_mpi.agent.hook")

HOLD_S = 60.0                        # a job whose group is not there by then is no reason to lend nothing
ANSWER = b"free\n"
LINE_BYTES_MAX = 64
CALLERS_MAX = 64
BACKLOG = 64
NOTE = "starting-"                   # a file of a hook's, and then the job's number


# --- what is decided ---------------------------------------------------------

class News(NamedTuple):
    """A line of a hook; `caller` is to be answered once nothing is lent any more."""

    starts: bool
    job: str
    caller: int


class Starting:
    """The jobs that are about to start on this node, pure: while there is one, nothing is lent."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}           # job → when it is waited for no longer

    @property
    def jobs(self) -> tuple[str, ...]:
        """Their numbers."""
        return tuple(self._until)

    def prolog(self, job: str, now: float) -> None:
        """It is about to start. Its cores are not known to be free before its group says which they are."""
        self._until[job] = now + HOLD_S

    def epilog(self, job: str) -> bool:
        """It has ended, whether it came or not; True if it was waited for."""
        return self._until.pop(job, None) is not None

    def there(self, jobs: Collection[str]) -> bool:
        """These have groups that say what is theirs; True if one of them was waited for."""
        came = [job for job in self._until if job in jobs]
        for job in came:
            del self._until[job]
        return bool(came)

    def tick(self, now: float) -> bool:
        """True if one is waited for no longer."""
        late = [job for job, until in self._until.items() if now >= until]
        for job in late:
            del self._until[job]
        return bool(late)

    def next_deadline(self) -> float:
        """When to call tick() at the latest."""
        return min(self._until.values(), default=math.inf)


# --- the hook's end ----------------------------------------------------------

def groups_text(pid: int, low: Path | None = None) -> str:
    """What a hook without an answer kills: the groups that process `pid` makes for workers, and `low`, if there is one.

    Where there are none workers end with the agent, which is named too.
    """
    roots = Roots.find()
    tops = dict.fromkeys(path for path in (roots.memory, roots.pids, roots.cpu) if path is not None)
    lines = [f"group {top / maker(pid)}-" for top in tops]
    if low is not None:
        lines.append(f"group {low}")
    lines.append(f"agent {os.getpid()} {_started(os.getpid())}")
    return "\n".join(lines) + "\n"


def _started(pid: int) -> str:
    return read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[19]


class HookDoor:
    """Owns the socket that hooks dial, and their connections. Only root, and who made it, is heard. close() ends it."""

    def __init__(self, selector: selectors.BaseSelector, directory: Path, groups: str) -> None:
        """Listens in a directory that stays its maker's. ConfigError, which names it, where that can't be.

        Who runs this may be another user later, and need not be able to change anything there.
        """
        self._selector = selector
        self._allowed = frozenset((0, os.geteuid()))
        self._callers: dict[int, tuple[socket.socket, bytes]] = {}       # oldest first
        self._next = 1
        self.path = directory / "socket"
        self._groups = directory / "groups"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            facts = directory.lstat()
            if directory.is_symlink() or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
                raise ConfigError(f"{directory} is not a directory that only uid {os.geteuid()} may change",
                                  hint="name one of its own with --hook")
            if self.path.is_socket():
                self.path.unlink()    # of an agent that was killed
            new = directory / ".groups"
            new.unlink(missing_ok=True)
            new.touch(mode=0o644)
            new.write_text(groups)
            new.replace(self._groups)
            self._listener.bind(str(self.path))
            self.path.chmod(0o600)
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"hooks can't be heard in {directory}: {error.strerror or error}",
                              hint="name another directory with --hook") from None
        except BaseException:
            self._listener.close()
            raise
        # What they say is heard in hear(), before anything else.
        selector.register(self._listener, selectors.EVENT_READ, lambda _m: None)

    def missed(self) -> tuple[str, ...]:
        """Jobs whose Prolog was here in the last minute and whose Epilog wasn't yet, as hooks have noted."""
        # One that began before has its group, or nobody waits for it any more. It may have ended without an Epilog.
        oldest, found = time.time() - HOLD_S, []
        for path in self.path.parent.glob(f"{NOTE}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime >= oldest:
                    found.append(path.name.removeprefix(NOTE))
        return tuple(sorted(found))

    def hear(self) -> list[News]:
        """What hooks have said since; asks nobody to wait."""
        while self._accept():
            pass
        return [news for caller in list(self._callers) if (news := self._line(caller)) is not None]

    def _accept(self) -> bool:
        """True if there may be another one."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            # Without an answer it does itself what it came for.
            log.warning("a hook is not heard: %s", error)
            return False
        uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in self._allowed:
            log.warning("uid %d is no hook, and is sent away", uid)
            connection.close()
            return True
        connection.setblocking(False)
        if len(self._callers) >= CALLERS_MAX:
            self.drop(next(iter(self._callers)))
        self._callers[self._next] = connection, b""
        self._next += 1
        self._selector.register(connection, selectors.EVENT_READ, lambda _m: None)
        return True

    def _line(self, caller: int) -> News | None:
        connection, said = self._callers[caller]
        try:
            piece = connection.recv(LINE_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError:
            piece = b""
        if not piece:
            self.drop(caller)         # it has gone, and doesn't wait for an answer
            return None
        said += piece
        self._callers[caller] = connection, said
        if not said.endswith(b"\n") and len(said) < LINE_BYTES_MAX:
            return None
        words = said.decode("ascii", "replace").split()
        if (not said.endswith(b"\n") or len(words) != 3 or words[0] not in ("prolog", "epilog")
                or not words[1].isdecimal()):
            log.warning("a hook says nothing that makes sense: %r", said)
            self.drop(caller)
            return None
        if words[0] == "epilog":
            self.drop(caller)
        return News(words[0] == "prolog", words[1], caller)

    def answer(self, callers: Iterable[int]) -> None:
        """Tells these that nothing is lent, unless they have gone."""
        for caller in callers:
            if caller in self._callers:
                try:
                    self._callers[caller][0].send(ANSWER)
                except OSError as error:
                    log.debug("a hook has gone: %s", error)
                self.drop(caller)

    def drop(self, caller: int) -> None:
        """Hangs up."""
        connection, _ = self._callers.pop(caller)
        self._selector.unregister(connection)
        connection.close()

    def close(self) -> None:
        """Safe to call twice."""
        if self._listener.fileno() < 0:
            return
        for caller in list(self._callers):
            self.drop(caller)
        self._selector.unregister(self._listener)
        self._listener.close()
        for path in (self.path, self._groups):
            try:
                path.unlink(missing_ok=True)
            except PermissionError as error:
                # They are root's, which we no longer are; nobody listens, and the groups are gone.
                log.debug("%s stays: %s", path, error)
