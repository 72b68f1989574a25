"""Batch scripts: what is printed is what was asked for, a shell and Slurm take it, and it runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from cluster import Cluster
from mpi_launch import World
from slurm_cluster import Slurm
from test_apps import needs_two_cores

from rfaas_mpi.cli import main
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.slurm import render
from rfaas_mpi.slurm.render import Script

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPOSITORY / "jobscripts").glob("*.sh"))
NASTY = ["a b", "x;y", "$(touch owned)", "`touch owned`", 'say "hi"', "it's", "back\\slash", "#5", "$HOME", "*", "~", "ä"]

# Says of each rank how many there are, and whether workers have worked for it; the rank's own core is none of theirs.
APP = r"""
import os
from mpi4py import MPI
import rfaas_mpi as rf
comm = MPI.COMM_WORLD
with rf.Executor(workers=(1, 2), comm=comm, lease_timeout_s=60) as executor:
    elsewhere = executor.submit(os.getpid).result() != os.getpid()
    os.write(1, f"rank {comm.rank} of {comm.size}, worker {elsewhere}\n".encode())
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_cluster.cluster(6, 2) as found:
        yield found


def printed(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["slurm", "script", *words]) == 0
    return said.getvalue()


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_example_is_what_the_command_in_it_prints(path):
    shell, what, command, *rest = path.read_text().splitlines()
    assert what.startswith("# ") and command.startswith("# rfaas slurm script ")
    assert [shell, *rest] == printed(*shlex.split(command)[4:]).splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shells_and_slurm_take_each_example(path, slurm):
    subprocess.run(["bash", "-n", path], check=True)
    assert shutil.which("shellcheck"), "apt-get install shellcheck"
    found = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    # These nodes are smaller than the examples': only how a job is asked for is looked at.
    slurm.run("sbatch", "--test-only", "--ntasks=2", "--nodes=1", path)


def test_nothing_is_asked_for_that_was_not_named():
    assert directives(printed("app.py")) == ["--nodes=1", "--exclusive"]
    assert directives(printed("--borrow", "app.py")) == ["--nodes=1"]
    assert "--mem=4G" in directives(printed("--mem", "4G", "app.py"))


def test_json_has_the_same_script():
    assert json.loads(printed("--json", "app.py"))["script"] == printed("app.py")


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "", "a\x00b", "tab\there"])
def test_what_can_not_stand_in_a_directive_is_refused(text):
    with pytest.raises(ConfigError, match="can't stand in a batch script"):
        render.script(Script(("app.py",), name=text))


def test_a_word_with_a_line_end_is_refused():
    with pytest.raises(ConfigError, match="can't stand in a batch script"):
        render.script(Script(("app.py", "a\nb")))


@pytest.mark.parametrize("template, said", [
    ("", "begin with #!"), ("@directives@\n@run@\n", "begin with #!"), ("#!/bin/sh\n@run@\n", "no line @directives@"),
    ("#!/bin/sh\n@directives@\n@run@\n@run@\n", "no line @run@, or several")])
def test_a_template_without_its_lines_is_refused(template, said):
    with pytest.raises(ConfigError, match=said):
        render.script(Script(("app.py",)), template)


def test_a_sites_template_comes_from_its_settings(tmp_path, monkeypatch):
    template = tmp_path / "site.sh"
    template.write_text("#!/bin/bash -l\n@directives@\nmodule load rfaas\n@run@\n")
    monkeypatch.setenv("RFAAS_SLURM_TEMPLATE", str(template))
    assert printed("--borrow", "app.py") == (
        "#!/bin/bash -l\n#SBATCH --nodes=1\nmodule load rfaas\nexec srun python app.py\n")


@pytest.mark.parametrize("name", NASTY)
def test_slurm_reads_a_name_as_it_was_given(slurm, name):
    # Held, so that it can be looked at; nothing of it runs.
    job = slurm.submit(render.script(Script(("true",), name=name, lend=False)), "--hold")
    try:
        assert slurm.run("squeue", "-h", "-j", job, "-o", "%j").rstrip("\n") == name
    finally:
        slurm.run("scancel", job)


def test_words_of_the_command_come_to_it_as_they_were_given(slurm):
    program = slurm.directory / "my program.py"
    program.write_text("import sys\nfor word in sys.argv[1:]: print(repr(word))\n")
    path = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    text = render.script(Script((str(program), *NASTY), lend=False), f"#!/bin/bash\n@directives@\nexport {path}\n@run@\n")
    assert slurm.finish(text).splitlines() == [repr(word) for word in NASTY]
    assert not (slurm.directory / "owned").exists()


@needs_two_cores
def test_each_example_runs_with_workers_where_it_is_submitted(slurm, tmp_path):
    """With two ranks, since these nodes are smaller than the examples'; those that borrow do so from a manager beside."""
    (slurm.directory / "app.py").write_text(APP)
    path = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    with Cluster(["1"], sockets=[0]) as cluster:
        jobs: dict[str, int] = {}
        for script in SCRIPTS:
            world = World("openmpi" if "openmpi" in script.name else "mpich")
            changes = {**world.changes, "LD_LIBRARY_PATH": str(world.mpiexec.parent.parent / "lib")}
            if "--borrow" in script.read_text():
                changes |= {name: cluster.environment[name] for name in ("RFAAS_MANAGER", "RFAAS_MANAGER_USER")}
            # A node here has two cores.
            text = script.read_text().replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=1")
            less = ["--array=0-1"] if script.name == "array.sh" else ["--ntasks=2"]
            jobs[script.name] = slurm.submit(text, *less, f"--output={tmp_path}/{script.name}-%a", PATH=path,
                                             PYTHONPATH=str(REPOSITORY), **changes)
        for name, job in jobs.items():
            assert slurm.ended(job) == "COMPLETED", "\n".join(each.read_text() for each in tmp_path.glob(f"{name}-*"))
            said = "".join(each.read_text() for each in tmp_path.glob(f"{name}-*"))
            ranks = ["rank 0 of 1"] * 2 if name == "array.sh" else ["rank 0 of 2", "rank 1 of 2"]
            assert sorted(re.findall(r"^rank.*", said, re.MULTILINE)) == [f"{rank}, worker True" for rank in ranks], said


@pytest.mark.parametrize("words, said", [
    (("--borrow", "--workers", "3", "app.py"), "--workers is how much of the job is lent"),
    (("--mpi", "pmi2", "--launcher", "mpiexec", "app.py"), "--mpi is srun's"),
    (("--wrokers", "3", "app.py"), "No such option '--wrokers'"), (("",), "needs something to run")])
def test_what_would_not_be_heeded_is_refused(words, said, capsys):
    assert main(["slurm", "script", *words]) != 0
    assert said in capsys.readouterr().err


def test_a_misspelt_option_is_no_command_to_run(capsys):
    assert main(["slurm", "run", "--wrokers", "3", "app.py"]) == 2
    assert "No such option '--wrokers'" in capsys.readouterr().err


def test_a_template_that_is_not_there_is_named_with_its_setting(monkeypatch, capsys):
    monkeypatch.setenv("RFAAS_SLURM_TEMPLATE", "/no/such/template")
    assert main(["slurm", "script", "app.py"]) == 1
    said = capsys.readouterr().err
    assert "/no/such/template" in said and "RFAAS_SLURM_TEMPLATE" in said


def test_ranks_that_borrow_are_started_with_the_cpus_that_were_asked_for():
    """By srun's own option: not every Slurm hands sbatch's on."""
    text = printed("--borrow", "--ntasks", "1", "--cpus-per-task", "2", "app.py")
    assert directives(text) == ["--nodes=1", "--ntasks=1", "--cpus-per-task=2"]
    assert text.endswith("exec srun --cpus-per-task=2 python app.py\n")


def test_a_launcher_that_is_not_there_is_named_before_anything_starts(capsys):
    assert main(["slurm", "run", "--launcher", "no-such-mpiexec", "--", "true"]) == 1
    assert "there is no launcher no-such-mpiexec" in capsys.readouterr().err


@pytest.mark.parametrize("status", [143, 0])
def test_who_is_told_to_end_ends_with_the_signals_status_and_not_as_if_stdout_were_closed(status, monkeypatch):
    def told(*_: object) -> int:
        raise SystemExit(status)

    monkeypatch.setattr("rfaas_mpi.slurm.run.run", told)
    assert main(["slurm", "run", "--", "true"]) == status
