"""`rfaas doctor` says what is missing, why, and the way out; it neither starts nor changes anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rfaas_mpi import fabric
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.priority import Lowering
from rfaas_mpi.cli import doctor, output
from rfaas_mpi.cli.manager_checks import agents_text
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.config import core_list


def by_name(found: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in found}


@pytest.fixture(scope="module")
def report() -> dict:
    done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "doctor", "--json"], capture_output=True, text=True,
                          timeout=100)
    assert done.stderr == ""
    return {"status": done.returncode, **json.loads(done.stdout)}


def test_every_check_has_a_verdict_and_a_reason(report):
    assert len({check["name"] for check in report["checks"]}) == len(report["checks"])
    for check in report["checks"]:
        assert check["reason"], check
        assert check["ok"] or check["fix"], f"{check['name']} is not ok and nothing says what to do"
        assert "could not be checked" not in check["reason"], check


def test_all_that_the_report_promises_is_in_it(report):
    names = {check["name"] for check in report["checks"]}
    assert names >= {"python", "packages", "extension", "memfd, seals", "pidfd", "futex", "membarrier",
                     "runtime directory", "own agent", "seccomp", "landlock", "sandbox levels", "sandbox",
                     "memory limit", "low priority", "spare cores", "memory to lend", "cpu.max", "bound",
                     "mpi launcher", "mpi4py", "numba", "shm", "verbs", "tcp", "offers", "service"}


def test_the_status_is_0_exactly_if_nothing_needed_is_missing(report):
    missing = [check for check in report["checks"] if check["needed"] and not check["ok"]]
    assert report["ok"] is not bool(missing)
    assert report["status"] == (output.FAILED if missing else output.OK)


def test_every_core_is_lent_or_has_a_reason(report):
    told: set[int] = set()
    for check in report["checks"]:
        if check["name"] == "spare cores" and check["ok"]:
            told.update(core_list(check["reason"].split()[0]))
        elif check["name"].startswith("core "):
            told.update(core_list(check["name"].removeprefix("core ")))
    assert told >= os.sched_getaffinity(0)


def test_a_transport_that_is_not_there_is_a_line_and_no_failure(report):
    verbs = next(check for check in report["checks"] if check["name"] == "verbs")
    assert verbs["reason"].startswith("not there: ")
    assert not verbs["needed"]


def test_what_an_agent_here_could_do_is_what_one_then_can(report):
    facts = {check["name"]: check["facts"] for check in report["checks"]}
    lowering = Lowering()
    try:
        assert facts["low priority"]["means"] == str(lowering.priority.means or "")
    finally:
        lowering.close()
    assert facts["own agent"] == {"uid": os.geteuid(), "serves_all": os.geteuid() == 0}
    assert tuple(facts["offers"]["transports"]) == fabric.transports()
    assert facts["memory limit"]["means"] in ("cgroup", "watch")


def hierarchy(root: Path, kind: str, **files: str) -> Path:
    """A tree in which control groups of that kind are mounted, with these files at their top."""
    top = root / "sys/fs/cgroup"
    top.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(f"30 1 0:30 / /sys/fs/cgroup rw - {kind}\n")
    for name, text in files.items():
        (top / name.replace("_", ".", 1)).write_text(text)
    return top


def test_the_means_to_bound_memory_are_told_by_version(tmp_path, monkeypatch):
    monkeypatch.delenv("RFAAS_MEMORY_LIMIT", raising=False)
    one = hierarchy(tmp_path / "v1", "cgroup cgroup rw,memory")
    two = hierarchy(tmp_path / "v2", "cgroup2 cgroup2 rw", cgroup_subtree_control="memory pids")
    for number, top in ((1, one), (2, two)):
        [check] = doctor._memory_limit(tmp_path / f"v{number}")
        assert check.ok and f"{top} (cgroup v{number})" in check.reason
        assert check.facts == {"means": "cgroup", "version": number, "delegated": False, "why": ""}
    (tmp_path / "none/proc/self").mkdir(parents=True)
    [check] = doctor._memory_limit(tmp_path / "none")
    assert check.ok and check.facts["means"] == "watch" and "memory controller" in check.facts["why"]
    monkeypatch.setenv("RFAAS_MEMORY_LIMIT", "cgroup")
    [check] = doctor._memory_limit(tmp_path / "none")
    assert not check.ok and check.needed and "as root" in check.fix


def test_the_means_of_low_priority_are_told_by_version(tmp_path):
    hierarchy(tmp_path / "v1", "cgroup cgroup rw,cpu,cpuacct", cpu_idle="0")
    hierarchy(tmp_path / "v2", "cgroup2 cgroup2 rw", cgroup_subtree_control="cpu memory")
    found = {name: next(iter(doctor._low_priority(tmp_path / name))) for name in ("v1", "v2", "none")}
    assert {name: check.facts["means"] for name, check in found.items()} == {
        "v1": "cpu.idle", "v2": "cpu.weight", "none": ""}
    assert "cgroup v1" in found["v1"].reason and "cgroup v2" in found["v2"].reason
    assert not found["none"].ok and "as root" in found["none"].fix


def test_a_sandbox_that_this_node_cannot_keep_is_named_with_the_way_out():
    full = doctor._sandbox_levels(sandbox.Facts("x86_64", landlock=7))
    assert full.ok and full.facts["levels"] == ["off", "default", "strict"]
    poor = doctor._sandbox_levels(sandbox.Facts("x86_64", no_landlock="this kernel is built without Landlock"))
    assert not poor.ok and not poor.needed and poor.facts["levels"] == ["off", "default"]
    assert "without Landlock" in poor.reason and "Linux 6.2" in poor.fix


def test_a_report_does_not_start_the_service(report, tmp_path):
    environment = {**os.environ, "RFAAS_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "doctor", "--json"], capture_output=True, text=True,
                          timeout=100, env=environment)
    service = next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "service")
    assert service["ok"] and "does not run" in service["reason"]
    assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_a_report_does_not_initialise_mpi():
    code = ("import sys; from rfaas_mpi.cli import doctor; doctor.examine()\n"
            "sys.exit(1 if 'mpi4py' in sys.modules else 0)")
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_runtime_directory_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode):
    tmp_path.chmod(mode)
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(tmp_path))
    check = by_name(list(doctor._runtime_directory()))["runtime directory"]
    assert not check.ok and check.needed
    assert "write" in check.reason and str(tmp_path) in check.fix


def test_a_runtime_directory_behind_a_link_is_refused(tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(link))
    check = by_name(list(doctor._runtime_directory()))["runtime directory"]
    assert not check.ok


def test_a_check_that_fails_itself_is_in_the_report(monkeypatch):
    def broken() -> list[doctor.Check]:
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(doctor, "_cores_and_memory", broken)
    check = by_name(doctor.examine())["cores and memory"]
    assert not check.ok
    assert "no /proc here" in check.reason


def test_lines_fit_80_columns():
    found = [doctor.Check("short", True, "word " * 60), doctor.Check("longer name", False, "why " * 40, "fix it " * 40)]
    lines = doctor.as_text(found)
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("fix: ") for line in lines)


def test_a_fix_is_shown_only_where_something_is_broken():
    assert not any("fix:" in line for line in doctor.as_text([doctor.Check("fine", True, "yes", "do this")]))


def test_something_needed_that_is_missing_is_named_at_the_end():
    lines = doctor.as_text([doctor.Check("futex", False, "blocked", "allow it", needed=True),
                            doctor.Check("numba", False, "not installed", "install it")])
    assert lines[-1] == "Not usable yet: futex."


@pytest.mark.parametrize(("cores", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([8, 0, 2, 3], "0,2-3,8")])
def test_core_lists_are_short(cores, text):
    assert core_ranges(cores) == text


def test_packages_are_those_that_the_build_requires():
    import re
    import tomllib
    project = Path(__file__).parents[1] / "pyproject.toml"
    wanted = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    required = {}
    for line in wanted["dependencies"]:
        name, version = re.match(r"([a-z_-]+)>=([0-9.]+)", line).groups()
        required[name] = tuple(int(part) for part in version.split("."))
    assert doctor.PACKAGES == required
    assert wanted["requires-python"] == ">=" + ".".join(map(str, doctor.MINIMUM_PYTHON))


def test_less_cpu_time_than_cores_is_told_and_a_way_out():
    assert doctor._quota(None, 4).ok
    assert doctor._quota(4.0, 4).ok
    check = doctor._quota(1.5, 4)
    assert not check.ok and "1.5" in check.reason and check.fix


def test_a_bound_rank_is_told_from_one_that_may_float():
    assert doctor._bound([2], 4, 1).ok
    floating = doctor._bound([0, 1, 2, 3], 4, 2)
    assert not floating.ok
    assert "2 cores are kept" in floating.reason and "bind-to" in floating.fix


def test_agents_that_are_silent_or_drained_are_named_and_many_are_counted():
    assert agents_text(0, [], []) == "none lends to you"
    assert agents_text(3, [], []) == "3 of 3 report"
    assert agents_text(3, ["nid1"], ["nid2", "nid3"]) == "2 of 3 report; silent: nid1; drained: nid2, nid3"
    many = [f"nid{number}" for number in range(20)]
    assert agents_text(20, many, []).endswith("nid7 and 12 more")


def test_a_setting_that_is_not_possible_is_said_with_what_it_takes_and_nothing_is_a_bug_of_ours(monkeypatch):
    monkeypatch.setenv("RFAAS_SPIN_US", "x")
    found = doctor.examine()
    said = by_name(found)["settings"]
    assert not said.ok and said.needed and "RFAAS_SPIN_US='x' is not possible" in said.reason, said
    assert not [check for check in found if "report this" in check.fix], found


def test_a_variable_that_is_almost_a_setting_is_told(monkeypatch):
    monkeypatch.setenv("RFAAS_CORE", "1")
    monkeypatch.setenv("RFAAS_MANAGER_OPTIONS", "--slurm")      # a unit's own
    said = by_name(list(doctor._settings()))["settings"]
    assert not said.ok and not said.needed and said.reason == "not heeded: RFAAS_CORE"
    assert "RFAAS_CORES" in said.fix


def test_settings_that_were_made_are_told_with_where(monkeypatch):
    monkeypatch.setenv("RFAAS_CONFIG", "/dev/null")
    monkeypatch.setenv("RFAAS_LINGER_S", "1")
    assert "linger_s (RFAAS_LINGER_S)" in by_name(list(doctor._settings()))["settings"].reason
