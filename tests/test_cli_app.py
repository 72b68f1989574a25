"""`rfaas app` knows every app, says what each is for, and runs it with an exit status that is the app's own."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from test_cli import rfaas

from rfaas_mpi.cli import apps, output

APPS = Path(__file__).resolve().parent.parent / "apps"
FOUND = apps.find()


def test_every_program_in_apps_is_listed_and_nothing_else():
    programs = {path.stem for path in APPS.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert set(FOUND) == programs
    assert {"blackscholes", "matmul", "jacobi", "transport"} <= programs


@pytest.mark.parametrize("words", [(), ("--list",)], ids=" ".join)
def test_the_list_has_a_line_for_each_app(words):
    done = rfaas("app", *words)
    assert done.returncode == output.OK, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FOUND)
    assert [line for line in lines if len(line) > 110] == []


def test_the_list_is_one_json_object_too():
    data = json.loads(rfaas("app", "--json").stdout)
    assert {one["name"]: one["summary"] for one in data["apps"]} == {name: app.summary for name, app in FOUND.items()}
    assert all(Path(one["path"]).is_file() and one["missing"] == [] for one in data["apps"])


@pytest.mark.parametrize("name", FOUND)
def test_each_app_says_what_it_is_for_how_it_is_used_and_what_its_verdict_is(name):
    text = FOUND[name].text
    for section in ("NAME", "PURPOSE", "USAGE"):
        assert f"{section}\n    " in text, section
    assert "prints no rate, where" in " ".join(text.split())


@pytest.mark.parametrize("name", ["matmul", "thumbnails"])
def test_describe_and_help_say_what_the_app_says_of_itself(name):
    described, helped = rfaas("app", "--describe", name), rfaas("app", name, "--help")
    assert (described.returncode, helped.returncode) == (output.OK, output.OK)
    assert FOUND[name].text.strip() in described.stdout
    assert "PURPOSE" in helped.stdout and "--workers" in helped.stdout


@pytest.mark.parametrize("words, kept, asked", [
    ("--n 3 --json", "--n 3", True), ("--json --n 3", "--n 3", True), ("--json FILE --n 3", "--json FILE --n 3", False),
    ("--n 3", "--n 3", False), ("", "", False)])
def test_json_without_a_file_behind_the_name_is_the_commands_own(words, kept, asked):
    assert apps.without_json(words.split()) == (tuple(kept.split()), asked)


def test_json_behind_the_name_answers_on_stdout():
    done = rfaas("app", "matmul", "--n", "20", "--rounds", "1", "--mode", "local", "--json")
    assert json.loads(done.stdout)["report"]["verdict"]["correct"], done.stderr
    assert "verdict" in done.stderr


def test_an_option_of_the_apps_before_the_name_is_no_name():
    done = rfaas("app", "--mode", "split", "matmul")
    assert done.returncode == output.USAGE and "No such option '--mode'" in done.stderr


@pytest.mark.parametrize("words, said", [
    ("matmul --n 0", "--n: 0 is less than 1"), ("matmul --rounds 0", "--rounds: 0"), ("matmul --workers -1", "--workers: -1"),
    ("matmul --seed -1", "--seed: -1"), ("jacobi --n 1", "--n: 1 is less than 2"), ("nstream --length 0", "--length: 0"),
    ("blackscholes --options 0", "--options: 0"), ("hydro --steps 0", "--steps: 0"),
    ("matmul --json /no/such/report.json", "there is no directory /no/such")])
def test_what_no_verdict_could_be_about_is_refused_before_anything_runs(words, said):
    done = rfaas("app", *words.split())
    assert done.returncode != 0 and said in done.stderr, done.stderr
    assert "verdict" not in done.stdout and "Traceback" not in done.stderr


def test_an_app_runs_under_mpiexec_with_its_own_arguments_and_answers_in_json_if_asked(tmp_path):
    report = tmp_path / "report.json"
    # Behind the name --json is the app's.
    plain = rfaas("app", "--ranks", "2", "matmul", "--n", "50", "--rounds", "1", "--mode", "mpi", "--json", str(report))
    assert plain.returncode == output.OK, plain.stdout + plain.stderr
    assert "verdict  all" in plain.stdout
    assert json.loads(report.read_text())["config"]["ranks"] == 2
    asked = rfaas("app", "--json", "matmul", "--n", "50", "--rounds", "1", "--mode", "mpi")
    data = json.loads(asked.stdout)
    assert (data["ok"], data["status"], data["app"], data["ranks"]) == (True, 0, "matmul", 1)
    assert data["report"]["verdict"]["correct"] is True
    assert "verdict  all" in asked.stderr


@pytest.mark.parametrize("before", [(), ("--json",)], ids=["plain", "json"])
def test_the_exit_status_is_the_app_s(before):
    done = rfaas("app", *before, "matmul", "--nonsense")
    assert done.returncode == 2
    if before:
        assert json.loads(done.stdout) == {"ok": False, "app": "matmul", "ranks": 1, "arguments": ["--nonsense"],
                                           "status": 2, "report": None}


def test_an_app_that_there_isn_t_is_a_wrong_command_line():
    done = rfaas("app", "nosuch")
    assert done.returncode == output.USAGE
    assert "no app 'nosuch'" in done.stderr and "matmul" in done.stderr and "Traceback" not in done.stderr


def test_what_an_app_lacks_is_named_before_it_is_run(tmp_path, monkeypatch):
    path = tmp_path / "fishes.py"
    path.write_text('"""NAME\n    fishes.py: count fishes\n    in a pond\n"""\n\nimport beside\nimport numpy\n')
    (tmp_path / "beside.py").write_text("def net():\n    import no_such_net\n    import matplotlib\n")
    (tmp_path / "helper.py").write_text('"""No app."""\n')
    (app,) = apps.find(tmp_path).values()
    assert (app.name, app.summary, app.missing) == ("fishes", "count fishes in a pond", ("no_such_net",))
    assert "no_such_net" in "\n".join(apps.as_text({"fishes": app}))
    with pytest.raises(ValueError, match="fishes needs no_such_net"):
        apps.command(app, [])


def test_help_for_an_app_that_lacks_something_is_what_it_says_of_itself(monkeypatch, capsys):
    from rfaas_mpi.cli import app
    lacking = dataclasses.replace(FOUND["matmul"], missing=("no_such_net",))
    monkeypatch.setattr(apps, "find", lambda: {"matmul": lacking})
    assert app.run(["app", "matmul", "--help"]) == output.OK
    said = capsys.readouterr().out
    assert "PURPOSE" in said and "not installed: no_such_net" in said


def test_without_mpiexec_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(apps.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no mpiexec") as caught:
        apps.command(FOUND["matmul"], [])
    assert "rfaas_mpi[demo]" in caught.value.hint
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text("#!/bin/sh\n")
    os.chmod(mpiexec, stat.S_IRWXU)
    assert apps.command(FOUND["matmul"], ["--n", "5"], 3) == [
        str(mpiexec), "-n", "3", str(tmp_path / "python"), str(FOUND["matmul"].path), "--n", "5"]
