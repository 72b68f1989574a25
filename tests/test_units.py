"""The systemd units start commands that exist, with options that they take."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from rfaas_mpi.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
UNITS = sorted((ROOT / "systemd").glob("*.service"))
VARIABLE = {"rfaas-manager.service": "RFAAS_MANAGER_OPTIONS", "rfaas-agent.service": "RFAAS_AGENT_OPTIONS"}


def commands() -> list[tuple[Path, str]]:
    """Each unit with no options, and with each of docs/admin.md's examples."""
    text = (ROOT / "docs" / "admin.md").read_text()
    return [(unit, options) for unit in UNITS
            for options in ["", *re.findall(rf"^    {VARIABLE[unit.name]}=(.*)$", text, re.MULTILINE)]]


def test_there_is_a_unit_for_each_daemon():
    assert [unit.name for unit in UNITS] == ["rfaas-agent.service", "rfaas-manager.service"]
    assert len(commands()) == 6, "an example of docs/admin.md isn't found"


@pytest.mark.parametrize("unit, options", commands())
def test_a_unit_s_command_takes_its_options(unit, options):
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(unit.read_text())
    line = parser["Service"]["ExecStart"]
    assert line.endswith(f"${VARIABLE[unit.name]}")
    program, name, *arguments = shlex.split(line.replace(f"${VARIABLE[unit.name]}", options))
    assert program == "/opt/rfaas/bin/rfaas"
    command = app.commands[name]
    assert isinstance(command, click.Command)
    with command.make_context(name, arguments):
        pass
