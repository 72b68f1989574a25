"""Settings: which source wins, and what is said of a wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rfaas_mpi as rf
from rfaas_mpi import config
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError


# By which conftest finds, and ends, what a test leaves behind.
OF_THIS_RUN = {name: os.environ[name] for name in ("RFAAS_RUNTIME_DIR", "RFAAS_TEST_RUN")}


@pytest.fixture
def user_file(tmp_path, monkeypatch) -> Path:
    """A user's own configuration file, which every test fills itself; there is no site's, nor a variable."""
    monkeypatch.setattr(config, "SITE_FILE", tmp_path / "site.toml")
    for name in [name for name in os.environ if name.startswith("RFAAS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "rfaas_mpi" / "config.toml"
    path.parent.mkdir()
    path.touch(0o644)
    return path


def test_a_file_wins_over_the_default_the_environment_over_the_file_an_argument_over_both(user_file, monkeypatch):
    assert Settings.load().spin_us == Settings().spin_us == 1000
    user_file.write_text("spin_us = 7\nslots = 8")
    assert Settings.load().spin_us == 7
    monkeypatch.setenv("RFAAS_SPIN_US", "8")
    assert Settings.load().spin_us == 8
    assert Settings.load(spin_us=9).spin_us == 9
    assert Settings.given(spin_us=9) == {"spin_us": (9, "argument"), "slots": (8, str(user_file))}
    assert Settings.given()["spin_us"] == (8, "RFAAS_SPIN_US")


def test_every_type_can_be_written_in_toml(user_file):
    user_file.write_text('cores = [2, 3, 8]\nlinger_s = 0.5\nfallback = false\nmemory_per_worker = "2G"\n'
                         'memory_reserve = 4096\ntransport = "tcp"')
    settings = Settings.load()
    assert (settings.cores, settings.linger_s, settings.fallback, settings.memory_per_worker, settings.memory_reserve,
            settings.transport) == ((2, 3, 8), 0.5, False, 2 << 30, 4096, "tcp")


def test_a_user_s_file_wins_over_the_site_s(user_file):
    config.SITE_FILE.write_text("slots = 4\nspin_us = 5")
    user_file.write_text("spin_us = 7")
    assert Settings.given() == {"slots": (4, str(config.SITE_FILE)), "spin_us": (7, str(user_file))}


@pytest.mark.parametrize("text, said", [
    ("spin_uss = 1", "sets 'spin_uss', and there is no such setting; did you mean 'spin_us'"),
    ("nonsense = 1", "sets 'nonsense', and there is no such setting; there are: runtime_dir, "),
    ("spin_us = -1", r"spin_us = -1 in .*config.toml is not possible: not between 0 and"),
    ('spin_us = "fast"', r"spin_us = 'fast' in .*config.toml is not possible"),
    ("[slots]\nmore = 1", "slots in .* is a table"),
    ("spin_us = = 1", r"is no TOML: .*line 1"),
    ("spin_us = 1\nspin_us = 2", "is no TOML"),
    ("slots = 2026-01-01", "is not possible"),
    ("fallback = 7", "a switch is yes or no"),
    (f"# {'x' * config.CONFIG_BYTES_MAX}", "longer than 1048576 bytes"),
])
def test_a_mistake_in_a_file_names_file_and_setting(user_file, text, said):
    user_file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        Settings.load()
    assert str(user_file) in str(error.value)


def test_a_file_that_is_no_text_is_named(user_file):
    user_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        Settings.load()


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_could_have_written_is_refused_with_the_way_out(user_file, mode):
    user_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        Settings.load()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_user_s_file_is_refused(user_file):
    os.chown(user_file, 4711, -1)
    with pytest.raises(ConfigError, match="other users could have written"):
        Settings.load()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(user_file, make):
    user_file.unlink()
    make(user_file)
    with pytest.raises(ConfigError, match="is no file"):
        Settings.load()


def test_no_file_is_needed(user_file):
    user_file.unlink()
    assert Settings.load() == Settings()


def test_files_named_are_read_instead_of_the_usual_ones_the_last_is_the_strongest(user_file, tmp_path, monkeypatch):
    user_file.write_text("slots = 4")
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("spin_us = 1\nslot_bytes = 128")
    second.write_text("spin_us = 2")
    monkeypatch.setenv("RFAAS_CONFIG", f"{first}:{second}")
    settings = Settings.load()
    assert (settings.spin_us, settings.slot_bytes, settings.slots) == (2, 128, Settings().slots)
    second.unlink()
    with pytest.raises(ConfigError, match="RFAAS_CONFIG names .*2.toml, which isn't there"):
        Settings.load()


def test_another_process_environment_reads_no_file(user_file):
    user_file.write_text("slots = 4")
    assert Settings.load({"XDG_CONFIG_HOME": os.environ["XDG_CONFIG_HOME"]}).slots == Settings().slots


def test_who_is_started_gets_the_files_settings_as_variables(user_file, monkeypatch):
    user_file.write_text("cores = [2, 3]\nfallback = false\nslots = 4\nspin_us = 3")
    monkeypatch.setenv("RFAAS_SPIN_US", "5")
    environment = config.environment()
    assert {name: environment[name] for name in environment if name.startswith("RFAAS_")} == {
        "RFAAS_CORES": "2,3", "RFAAS_FALLBACK": "no", "RFAAS_SLOTS": "4", "RFAAS_SPIN_US": "5",
        "RFAAS_CONFIG": os.devnull}
    assert Settings.load(environment) == Settings.load()


def test_a_worker_has_the_rank_s_settings(user_file, monkeypatch):
    for name, value in OF_THIS_RUN.items():
        monkeypatch.setenv(name, value)
    user_file.write_text('sandbox = "off"\nspin_us = 77')
    with rf.Executor(workers=1) as ex:
        assert ex.submit(os.getenv, "RFAAS_SPIN_US").result() == "77"
        assert ex.submit(os.getenv, "RFAAS_SANDBOX").result() == "off"
        assert ex.submit(os.getenv, "RFAAS_CONFIG").result() == os.devnull


def rfaas(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", *arguments], capture_output=True, text=True, timeout=60)


def test_config_show_names_each_value_and_its_origin(user_file, monkeypatch):
    user_file.write_text("slots = 4")
    monkeypatch.setenv("RFAAS_SPIN_US", "5")
    done = rfaas("config", "show", "--origin")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split(None, 2)[2] for line in done.stdout.splitlines() if " = " in line}
    assert lines["slots"] == f"4  ({user_file})"
    assert lines["spin_us"] == "5  (RFAAS_SPIN_US)"
    assert lines["fallback"] == "yes  (default)"
    assert set(lines) == set(Settings.__dataclass_fields__)
    data = json.loads(rfaas("config", "show", "--json").stdout)
    assert data["settings"]["slots"] == {"value": 4, "origin": str(user_file),
                                         "meaning": "slots of a connection from rank to worker"}
    assert {"path": str(user_file), "exists": True} in data["files"]


def test_config_show_of_a_wrong_file_says_what_is_wrong(user_file):
    user_file.write_text("slotz = 4")
    done = rfaas("config", "show")
    assert done.returncode == 1
    assert "slotz" in done.stderr and "did you mean 'slots'" in done.stderr and done.stdout == ""


def test_the_page_on_settings_lists_each_with_its_default_and_meaning():
    page = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()
    rows = {tuple(cell.strip(" `") for cell in line.split("|")[1:4]) for line in page.splitlines()
            if line.startswith("| `")}
    assert rows == {(variable.removeprefix("RFAAS_").lower(), default if default not in ("None", "()") else "", meaning)
                    for variable, default, meaning in config.describe()}
