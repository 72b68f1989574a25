"""What docs/admin.md tells an administrator to do is done here, as it stands there, in a directory of the test's own.

Each command on the page is found and run; one that no test knows is a failure, so that
the page can't say more than was tried. Addresses, directories and the service's user are
replaced by ones of this machine, and what systemd would do is done from its units.
"""

from __future__ import annotations

import configparser
import itertools
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import GUARD_S, Daemon, wait_until
from munged import Munged

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "admin.md").read_text()
ME = pwd.getpwuid(os.geteuid()).pw_name
RFAAS = shlex.join([sys.executable, "-m", "rfaas_mpi.cli"])
_asked = itertools.count(1)


def blocks() -> list[list[str]]:
    """The indented blocks of the page, without comments at the ends of their lines."""
    found = re.findall(r"(?:^    \S.*\n)+", PAGE, re.MULTILINE)
    return [[re.sub(r"\s+# .*", "", line.strip()) for line in block.splitlines()] for block in found]


def commands() -> list[str]:
    """Each command on the page, in a block or in a sentence, once, in order."""
    lines = [line for block in blocks() for line in block
             if not re.match(r"[A-Z_]+=\S* *-|[A-Z_]+=\S+$|\w+ = |\[\w+\]$", line)]
    sentences = [" ".join(text.split()) for text in re.findall(r"`((?:rfaas|munge) [^`]+)`", PAGE)]
    # `rfaas manager` and `rfaas agent` are names of programs there.
    return list(dict.fromkeys([*lines, *(text for text in sentences if text not in ("rfaas manager", "rfaas agent"))]))


def assigned(name: str) -> dict[str, str]:
    """The variables of the block that follows /etc/rfaas_mpi/NAME on the page."""
    (block,) = re.findall(rf"^`/etc/rfaas_mpi/{re.escape(name)}`[^\n]*\n\n((?:    .*\n)+)", PAGE, re.MULTILINE)
    return dict(line.strip().split("=", 1) for line in block.splitlines())


class Site:
    """The page's cluster; close() ends it."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rfaas-a-"))
        self.daemons: dict[str, Daemon] = {}
        (self.root / "munge").mkdir()
        self.munged = Munged(self.root / "munge" / "d", secrets.token_bytes(128))
        self.ports = dict.fromkeys(("4711", "4712", "4713", "4714"), "0")        # any, until it is known which

    def here(self, text: str) -> str:
        """Text of the page with this machine's places."""
        for there, path in (("/var/lib/rfaas", "state"), ("/run/rfaas-agent", "agent"), ("/run/rfaas", "run"),
                            ("/etc/systemd/system", "units")):
            text = text.replace(there, str(self.root / path))
        text = re.sub(r"(?:10\.0\.0\.1|0\.0\.0\.0|127\.0\.0\.1):(\d{4})",
                      lambda found: f"127.0.0.1:{self.ports[found[1]]}", text)
        text = re.sub(r"_USER=rfaas\b", f"_USER={ME}", text).replace("--key rfaas=", f"--key {ME}=")
        text = text.replace('manager_user = "rfaas"', f'manager_user = "{ME}"').replace("--key alice=", "--key nobody=")
        text = text.replace("munge -n | unmunge", f"munge -S {self.munged.socket} -n | unmunge -S {self.munged.socket}")
        return re.sub(r"(^|[ =])(?:/opt/rfaas/bin/)?rfaas (?=[a-z])", rf"\1{RFAAS} ", text)

    @property
    def environment(self) -> dict[str, str]:
        """A user's: what is set is in the file that the page shows."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RFAAS_")}
        return {**kept, "PYTHONPATH": str(ROOT), "RFAAS_MUNGE_SOCKET": self.munged.socket,
                "RFAAS_CONFIG": str(self.root / "config.toml")}

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A line of the page, by a shell in the sources."""
        return subprocess.run(["sh", "-c", self.here(command)], cwd=ROOT, env={**self.environment, **more},
                              capture_output=True, text=True, timeout=100)

    def start(self, unit: str, variables: dict[str, str], *more: str) -> None:
        """What `systemctl start` does: the unit's command, with its variables."""
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.optionxform = str
        parser.read_string((self.root / "units" / f"{unit}.service").read_text())
        options = f"{unit.replace('-', '_').upper()}_OPTIONS"
        line = parser["Service"]["ExecStart"].replace(f"${options}", variables[options])
        words = shlex.split(line.replace("/run/rfaas-agent", str(self.root / "agent")).replace(
            "/var/lib/rfaas", str(self.root / "state")))
        (self.root / "agent").mkdir(exist_ok=True)
        daemon = Daemon(self.root / f"{unit}.log", [*words[1:], *more], RFAAS_MUNGE_SOCKET=self.munged.socket,
                        RFAAS_CONFIG=os.devnull, **{name: value for name, value in variables.items()
                                                    if name != options})
        self.daemons[unit] = daemon
        daemon.start()

    def listens(self, unit: str, pattern: str) -> str:
        """What its daemon says of where it listens."""
        daemon = self.daemons[unit]
        return wait_until(lambda: re.search(pattern, daemon.said()) or self._check(), f"{unit} listens")[1]

    def _check(self) -> None:
        for daemon in self.daemons.values():
            assert daemon.alive, daemon.said()

    def settings(self) -> Settings:
        return Settings.load({"RFAAS_MANAGER": f"http://127.0.0.1:{self.ports['4712']}", "RFAAS_MANAGER_USER": ME,
                              "RFAAS_MUNGE_SOCKET": self.munged.socket})

    def call(self, name: str, *arguments: object, **parameters: object) -> object:
        with ManagerClient(self.settings()) as client:
            return client.call(name, *arguments, **parameters)

    def free(self) -> int:
        self._check()
        return sum(len(view.free) for view in self.call("nodes").nodes)

    def lease(self) -> int:
        (lent,) = self.call("ask", api.AskLease(f"admin-{os.getpid()}", next(_asked), 1, 1, timeout_s=GUARD_S)).leases
        return lent.id

    def close(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.close()
        self.munged.close()
        shutil.rmtree(self.root, ignore_errors=True)


def said(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(pattern, done.stdout, re.MULTILINE), done.stdout


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Begun as the page says, from MUNGE to the users' file."""
    site = Site()
    try:
        wait_until(site.munged.serves, "munged serves")
        said(site.run("munge -n | unmunge"), "Success")
        (site.root / "units").mkdir()
        assert site.run("cp systemd/rfaas-manager.service /etc/systemd/system/").returncode == 0
        shutil.copy(ROOT / "systemd" / "rfaas-agent.service", site.root / "units")
        (site.root / "run").mkdir()
        # With a directory that isn't the site's own its socket is there unless it is told another place.
        site.start("rfaas-manager", {name: site.here(value) for name, value in assigned("manager.env").items()},
                   "--socket", str(site.root / "run" / "manager.sock"))
        site.ports["4712"] = site.listens("rfaas-manager", r"listening on .*http://127\.0\.0\.1:(\d+)")
        site.ports["4713"] = site.listens("rfaas-manager", r"metrics at http://127\.0\.0\.1:(\d+)")
        variables = dict(site.here(f"{name}={value}").split("=", 1) for name, value in assigned("agent.env").items())
        # This user is the service's here. One that root leaves for it is started in test_agent_users.py.
        assert variables.pop("RFAAS_SERVICE_USER") == ME
        site.start("rfaas-agent", variables, "--cores", "0-1", "--node", "node0")
        site.ports["4714"] = site.listens("rfaas-agent", r"metrics at http://127\.0\.0\.1:(\d+)")
        (users,) = re.findall(r"^`/etc/rfaas_mpi/config.toml`[^\n]*\n\n((?:    manager.*\n)+)", PAGE, re.MULTILINE)
        (site.root / "config.toml").write_text(site.here("\n".join(line.strip() for line in users.splitlines())))
        wait_until(lambda: site.free() == 2, "the agent has reported")
        yield site
    finally:
        site.close()


# What each command is expected to say; None: another test is about it.
SAYS: dict[str, str | None] = {
    "python3 -m venv /opt/rfaas": None,
    "/opt/rfaas/bin/pip install '.[cluster]'": None,
    "useradd --system --no-create-home --shell /usr/sbin/nologin rfaas": None,
    "cp systemd/rfaas-manager.service /etc/systemd/system/": None,
    "systemctl enable --now rfaas-manager": None,
    "/opt/rfaas/bin/pip install '.[cluster,postgres]'": None,
    "createuser rfaas; createdb --owner rfaas rfaas": None,
    "rfaas lease explain": r"^1 of 1 worker would be granted now \(policy default\)\n\nNODE .*\nnode0 +1 +2 ",
    "rfaas usage --by job": "^JOB|^Nothing was used yet",
    "rfaas usage --by kernel --json": r'^\{\n +"by": "kernel"',
    "rfaas usage --since 2026-11-01 --until 2026-12-01": "^USER|^Nothing was used then",
    "munge -n | unmunge": "Success",
    "RFAAS_MANAGER=unix:/run/rfaas/manager.sock RFAAS_MANAGER_USER=rfaas rfaas status":
        r"^  node0: 2 cores, 0 lent, 2 free",
    "rfaas status": r"^  node0: 2 cores, 0 lent, 2 free",
    "rfaas doctor": r"manager clock +no more than .* s from this node's",
    "rfaas config show --origin": r"manager\b.*http://127\.0\.0\.1:\d+.*config\.toml",
    "rfaas lease ls": "^No leases",
    "rfaas lease show LEASE": r"^lease +\d+, epoch \d+, granted",
    "rfaas lease revoke LEASE --grace 5": "is taken back, within 5 s",
    "rfaas drain NODE --grace 30": "^node0: everything is taken back",
    "rfaas undrain NODE": "^node0: lent again",
    "rfaas drain --all": "^All nodes: everything is taken back",
    "rfaas usage --by user": "^USER|^Nothing was used yet",
    "rfaas slurm install": None,
    "rfaas logs -f": None,
    "rfaas logs --node NODE --since P7D": None,
    "rfaas logs --lease LEASE": None,
    "rfaas manager key --directory /var/lib/rfaas": r"^\w{16}  in use  \w{64}$",
    "rfaas manager key rotate --directory /var/lib/rfaas": r"^\w{16}  next    \w{64}$",
    "rfaas manager key retire --directory /var/lib/rfaas": r"^\w{16}  in use  \w{64}$",
}


def test_no_command_of_the_page_is_left_out():
    assert set(commands()) == set(SAYS)


@pytest.mark.parametrize("command", [command for command in commands() if SAYS.get(command)])
def test_what_the_page_says_to_run_does_what_it_says(site, command):
    line = command.replace("NODE", "node0")
    if "LEASE" in line:
        lease = site.lease()
        line = line.replace("LEASE", str(lease))
    try:
        said(site.run(line), SAYS[command] or "")
    finally:
        if "LEASE" in command:
            site.call("release", lease=lease)
            wait_until(lambda: site.free() == 2, "its core is free")
        if "drain --all" in command:
            said(site.run("rfaas undrain --all"), "lent again")


def test_every_way_to_sum_usage_is_one(site):
    (others,) = re.findall(r"`rfaas usage --by user` \(or ([a-z, ]+)\)", PAGE)
    for by in re.findall("[a-z]+", others.replace(" or ", " ")):
        assert site.run(f"rfaas usage --by {by} --json").returncode == 0


def test_the_log_is_followed_until_ctrl_c(site):
    assert "`rfaas logs -f`" in PAGE
    with subprocess.Popen([*shlex.split(RFAAS), "logs", "-f"], env=site.environment, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
        try:
            lease = site.lease()
            said(site.run(f"rfaas lease revoke {lease}"), "is taken back")
            assert any(f"lease {lease} on node0" in line for line in following.stdout)
        finally:
            following.send_signal(signal.SIGINT)
            following.communicate(timeout=GUARD_S)
    wait_until(lambda: site.free() == 2, "its core is free")


def test_what_became_of_a_lease_or_on_a_node_is_found_since_a_day_or_some_hours(site):
    lease = site.lease()
    said(site.run(f"rfaas lease revoke {lease}"), "is taken back")
    (hours,) = re.findall(r"or how long ago: `P\d+D`, `(PT\d+H)`", PAGE)
    for line in ("rfaas logs --lease LEASE", "rfaas logs --node NODE --since P7D", f"rfaas logs --since {hours}"):
        said(site.run(line.replace("NODE", "node0").replace("LEASE", str(lease))),
             rf"  lease {lease} on node0 \({ME}\): 1 worker revoked$")
    wait_until(lambda: site.free() == 2, "its core is free")


@pytest.mark.parametrize("port", ["4713", "4714"])
def test_figures_are_where_the_page_says(site, port):
    assert f"127.0.0.1:{port}" in PAGE
    with urllib.request.urlopen(site.here(f"http://127.0.0.1:{port}/metrics"), timeout=GUARD_S) as answer:
        assert b"# TYPE rfaas_" in answer.read()


def test_the_audit_log_is_where_the_page_says_a_json_object_each_line(site):
    lease = site.lease()
    site.call("release", lease=lease)
    lines = Path(site.here("/var/lib/rfaas/audit.log")).read_text().splitlines()
    assert lines and all(line.startswith("{") and line.endswith("}") for line in lines)


def test_without_munge_a_key_is_made_for_each_user_and_lets_him_in(site):
    (line,) = re.findall(r"^    RFAAS_MANAGER_OPTIONS=(.*--key.*)$", PAGE, re.MULTILINE)
    place = site.root / "without"
    place.mkdir()
    options = re.sub(r":\d+ --key", ":0 --key", site.here(line), count=1).replace(str(site.root / "state"), str(place))
    manager = Daemon(site.root / "without.log", ["manager", "--directory", place / "state", *shlex.split(options)])
    manager.start()
    try:
        found = wait_until(lambda: re.search(r"listening on .*(http://127\.0\.0\.1:\d+)", manager.said()), "it listens")
        address = found[1]
        assert (place / "rfaas").stat().st_mode & 0o777 == 0o600
        said(site.run("rfaas status", RFAAS_MANAGER=address, RFAAS_MANAGER_KEY_FILE=str(place / "rfaas")), "^nodes +0")
    finally:
        manager.close()


def test_what_the_page_installs_is_there_to_be_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"pip install '\.\[(\w+)\]'", PAGE)
    assert wanted in extras
    options = next(command for command in commands() if command.startswith("useradd")).split()[1:-1]
    known = subprocess.run(["useradd", "--help"], capture_output=True, text=True, timeout=GUARD_S).stdout
    assert [option for option in options if option.startswith("--") and option not in known] == []


def test_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
