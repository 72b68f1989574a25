"""What the detector costs on a node with 128 CPUs, all of them owned, and 1 000 threads of their owners.

    python tests/detector_cost.py [--seconds S] [--layout v1|v2]

Prints one JSON object. The cgroups and the CPUs' times are files; the threads are real and asleep, and their masks are
read from the kernel. CPU time is this process' own, from the first look at the node on. What the kernel itself
needs to write /proc/stat on such a node is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from rfaas_mpi.agent.classes import CoreClass  # noqa: E402
from rfaas_mpi.agent.detector import Detector, Policy  # noqa: E402
from rfaas_mpi.agent.observer import NodeWatch, Observer  # noqa: E402

CPUS, THREADS, JOBS, RANKS = 128, 1000, 4, 128
SLEEPERS = f"""
import sys, threading
threading.stack_size(65536)
never = threading.Event()
for _ in range({THREADS - 1}):
    threading.Thread(target=never.wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def make_node(root: Path, layout: str, tids: list[int]) -> None:
    for cpu in range(CPUS):
        write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list", f"{cpu % 64},{cpu % 64 + 64}\n")
    write(root / "sys/devices/system/cpu/online", f"0-{CPUS - 1}\n")
    write(root / "proc/meminfo", "MemTotal: 263000000 kB\n")
    write(root / "proc/stat", "cpu  1 2 3 4 5 6 7 8 0 0\n" + "".join(
        f"cpu{cpu} {123456789 + cpu} 20 3456789 456789012 5678 0 67890 0 0 0\n" for cpu in range(CPUS))
        + "intr " + "0 " * 4000 + "\nctxt 1\n")
    base = "sys/fs/cgroup"
    mounts = {"": base} if layout == "v2" else {name: f"{base}/{name}" for name in ("cpuset", "freezer", "memory")}
    write(root / "proc/self/mountinfo", "".join(
        f"30 1 0:30 / /{point} rw - {f'cgroup cgroup rw,{name}' if name else 'cgroup2 cgroup2 rw'}\n"
        for name, point in mounts.items()))
    for job in range(JOBS):
        cpus = f"{16 * job}-{16 * job + 15},{16 * job + 64}-{16 * job + 79}\n"
        for name, point in mounts.items():
            top = root / point / (f"slurm/uid_1000/job_{job}" if name else f"system.slice/slurmstepd.scope/job_{job}")
            write(top / "cpuset.cpus", cpus)
            write(top / ("memory.limit_in_bytes" if name else "memory.max"), f"{32 << 30}\n")
            for rank in range(RANKS // JOBS):
                group = top / "step_0" / (f"task_{rank}" if name else f"user/task_{rank}")
                mine = tids[job * RANKS // JOBS + rank::RANKS]
                write(group / ("tasks" if name else "cgroup.threads"), "".join(f"{tid}\n" for tid in mine))


def measure(layout: str, seconds: float) -> dict:
    sleepers = subprocess.Popen([sys.executable, "-c", SLEEPERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with sleepers, tempfile.TemporaryDirectory() as directory:
        assert sleepers.stdout is not None
        sleepers.stdout.readline()
        tids = sorted(int(name) for name in os.listdir(f"/proc/{sleepers.pid}/task"))
        make_node(Path(directory), layout, tids)
        both = frozenset((CoreClass.UNUSED, CoreClass.IDLE))
        begin, used = time.monotonic(), time.process_time()
        watch = NodeWatch(Detector(Policy(low_priority=True, by_default=both)), Observer(Path(directory)),
                          Path(directory))
        poll = select.poll()
        poll.register(watch.fileno(), select.POLLIN)
        steps = 0
        while (now := time.monotonic()) < begin + seconds:
            report = watch.step(now)
            steps += 1
            poll.poll(max(0.0, 1000 * (watch.next_deadline() - time.monotonic())))
        used, took = time.process_time() - used, time.monotonic() - begin
        watch.close()
        return {"layout": layout, "cpus": CPUS, "threads": len(tids), "seconds": round(took, 1), "steps": steps,
                "classes": {which: len(report.of(which)) for which in CoreClass}, "cpu_s": round(used, 4),
                "percent_of_a_core": round(100 * used / took, 3), "kernel": platform.release()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--layout", choices=("v1", "v2"), default="v2")
    options = parser.parse_args()
    print(json.dumps(measure(options.layout, options.seconds)))
