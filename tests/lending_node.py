"""A node of a real Slurm whose cores a site's agent lends while no job has them: Prolog and Epilog call its hook."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import faults
from cluster import tell, wait_until
from site_of_users import ALICE, Site
from slurm_cluster import Slurm

import rfaas_mpi

HOOK = Path(rfaas_mpi.__file__).parent / "agent" / "rfaas-hook"
GUARD_S = 60

# Has work for a worker until it is told to end, and asks for another one where it is taken back; then says whether all
# was right.
BORROWS = """
    import threading
    def square(x):
        time.sleep(0.002)
        return x * x
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ends.set()), daemon=True).start()
    rounds = 0
    with Executor(workers=(1, 1), idle_s=60) as ex:
        while not ends.is_set():
            assert list(ex.map(square, range(20))) == [x * x for x in range(20)]
            rounds += 1
            if rounds == 1:
                say("began")
    say("right")
"""

# How many processes are in workers' groups, and which.
LOOK = r"""
members() { sed -n 's/^group //p' "$1/groups" | while read -r prefix; do cat "$prefix"w*/cgroup.procs; done 2>/dev/null |
            sort -u; }
count() { members "$1" | wc -l; }
"""

# Of a shell, as a job's first task: where it may run, and where every thread of a worker may that has not begun to end.
WHERE = LOOK + r"""
where() { echo job $(sed -n 's/^Cpus_allowed_list://p' /proc/self/status)
          for pid in $(members "$1"); do
              awk '/^State:/ {state = $2} /^Cpus_allowed_list:/ && state !~ /[ZX]/ {print "worker", FILENAME, $2}' \
                  /proc/$pid/task/*/status
          done 2>/dev/null; echo seen; }
"""


class LendingNode:
    """The node, its agent and a manager; close() ends everything.

    `words` and `changes` are the agent's, `prolog` and `epilog` lines of the site's own that run before the hook's.
    """

    def __init__(self, directory: Path, *, cpus: int = 2, words: Sequence[str] = (), prolog: str = "", epilog: str = "",
                 settings: Mapping[str, object] | None = None, **changes: str) -> None:
        self.top = directory
        self.directory = directory / "hook"
        programs = {}
        for kind, own in (("prolog", prolog), ("epilog", epilog)):
            programs[kind] = directory / kind
            programs[kind].write_text(f"#!/bin/sh\necho {kind} $SLURM_SCRIPT_CONTEXT >>'{directory}/contexts'\n{own}\n"
                                      f"exec '{HOOK}' {kind} '{self.directory}'\n")
            programs[kind].chmod(0o755)
        self.cpus = cpus
        self.slurm = Slurm(1, cpus, confined=True, settings={
            "Prolog": programs["prolog"], "Epilog": programs["epilog"], "PrologFlags": "Alloc,Contain",
            **(settings or {})})
        self.site = Site("", ["--hook", str(self.directory), *words], **changes)

    def __enter__(self) -> LendingNode:
        self.slurm.start()
        try:
            self.site.start()
        except BaseException:
            self.slurm.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.site.close()
        self.slurm.close()

    def workers(self) -> int:
        """How many processes workers are."""
        return int(self._shell('count "$1"'))

    def members(self) -> set[int]:
        """And which."""
        return {int(word) for word in self._shell('members "$1"').split()}

    def _shell(self, words: str) -> str:
        return subprocess.run(["bash", "-c", f"{LOOK} {words}", "look", self.directory], check=True,
                              capture_output=True, text=True, timeout=GUARD_S).stdout

    def job(self) -> int:
        """One with all cores, that says how many workers there are when it starts, and then waits to be ended."""
        return self.slurm.submit(f'#!/bin/bash\n{LOOK}\necho workers $(count "{self.directory}")\n'
                                 f'until [ -e "{self.slurm.directory}/end" ]; do sleep 0.05; done\n',
                                 "--ntasks=1", f"--cpus-per-task={self.cpus}")

    def end(self, job: int) -> str:
        """Ends that job; what it said."""
        (self.slurm.directory / "end").touch()
        assert self.slurm.ended(job) == "COMPLETED", self.slurm.said()
        return self.slurm.output(job)

    @contextlib.contextmanager
    def borrowing(self, cores: int = 1) -> Iterator[subprocess.Popen[str]]:
        """A user's rank has a worker on the node; in the end all of its answers have to be right."""
        (self.slurm.directory / "end").unlink(missing_ok=True)
        wait_until(lambda: self.site.free() == cores, "cores are lent")
        with self.site.running(ALICE, BORROWS) as rank:
            assert faults.line(rank) == "began"
            wait_until(self.workers, "a worker runs")
            yield rank
            tell(rank, "end")
            assert faults.line(rank) == "right"
        wait_until(lambda: self.site.free() == cores, "all is lent again")
